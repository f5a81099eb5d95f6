package snapshotter

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

func TestMakeDir(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	lower := filepath.Join(dir, "layers/1")
	err := errors.Join(
		os.MkdirAll(filepath.Join(dir, "snapshots/9/upper"), 0o755), os.MkdirAll(filepath.Join(dir, "snapshots/9/work"), 0o755),
		os.MkdirAll(filepath.Join(dir, "layers/2/var"), 0o755),
		os.MkdirAll(filepath.Join(lower, "var/own"), 0o755), os.Chown(filepath.Join(lower, "var/own"), 5, 6),
		unix.Chmod(filepath.Join(lower, "var/own"), 0o2750), os.WriteFile(filepath.Join(lower, "var/own/kept"), nil, 0o644),
		os.Symlink("/var/own", filepath.Join(lower, "link")), os.Symlink("../../../../etc", filepath.Join(lower, "out")),
		os.Symlink("/nowhere", filepath.Join(lower, "dangling")), os.Symlink("below/", filepath.Join(lower, "var/next")),
		os.Symlink("../dangling/deep/../deeper", filepath.Join(lower, "var/far")), os.Symlink("missing/../../../../away", filepath.Join(lower, "var/up")),
		os.Symlink("own/kept/x", filepath.Join(lower, "var/in-file")), os.Symlink("self", filepath.Join(lower, "self")), os.MkdirAll(filepath.Join(lower, "etc"), 0o755))
	if err != nil {
		t.Fatal(err)
	}
	mounts := []Mount{many(dir, 2)}
	open := func() *os.File {
		t.Helper()
		root, err := OpenRoot(mounts)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { root.Close() })
		return root
	}
	for _, name := range []string{"/link/a/b", "relative", "/var/own", "/", "/var/own/kept", "/out/berth-test-mkdir", "/dangling/x", "/dangling", "/../../up",
		"/var/next/y", "/var/far/z", "/var/up", "/var/in-file/y"} {
		if err := MakeDir(mounts, open(), name); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := os.Lstat("/etc/berth-test-mkdir"); err == nil {
		t.Error("left the image")
	}
	top := fmt.Sprintf("/proc/self/fd/%d/", open().Fd())
	for path, want := range map[string]struct {
		mode     uint32
		uid, gid uint32
	}{
		"var/own":              {0o42750, 5, 6},
		"var/own/a":            {0o40755, 0, 0},
		"var/own/a/b":          {0o40755, 0, 0},
		"var/own/kept":         {0o100644, 0, 6},
		"relative":             {0o40755, 0, 0},
		"up":                   {0o40755, 0, 0},
		"dangling":             {0o120777, 0, 0},
		"nowhere":              {0o40755, 0, 0},
		"nowhere/x":            {0o40755, 0, 0},
		"var/next":             {0o120777, 0, 0},
		"var/below/y":          {0o40755, 0, 0},
		"nowhere/deeper/z":     {0o40755, 0, 0},
		"away":                 {0o40755, 0, 0},
		"etc/berth-test-mkdir": {0o40755, 0, 0},
	} {
		var st unix.Stat_t
		if err := unix.Lstat(top+path, &st); err != nil || st.Mode != want.mode || st.Uid != want.uid || st.Gid != want.gid {
			t.Errorf("%s: mode %o of %d:%d, %v; want %o of %d:%d", path, st.Mode, st.Uid, st.Gid, err, want.mode, want.uid, want.gid)
		}
	}
	for _, path := range []string{"var/missing", "nowhere/deep", "var/own/kept/x"} {
		if err := unix.Access(top+path, unix.F_OK); err == nil {
			t.Errorf("%s: made, and nobody has asked for it", path)
		}
	}
	if err := MakeDir(mounts, open(), "/self/x"); !errors.Is(err, unix.ELOOP) {
		t.Errorf("below a link to itself: %v, want ELOOP", err)
	}
	if err := MakeDir([]Mount{{Type: "overlay", Options: []string{"lowerdir=" + lower}}}, open(), "/new"); err == nil {
		t.Error("made in a view without a writable layer")
	}
	if err := MakeDir(nil, open(), "/new"); err == nil {
		t.Error("made without mounts")
	}
}
