package layer

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// mustRecord unpacks and returns the root and the manifest.
func mustRecord(t testing.TB, entries ...entry) (string, []byte) {
	t.Helper()
	root := t.TempDir()
	var m bytes.Buffer
	if _, err := ApplyDir(context.Background(), root, bytes.NewReader(mustTar(t, entries...)), Options{Manifest: &m}); err != nil {
		t.Fatal(err)
	}
	return root, m.Bytes()
}

func mustVerify(t testing.TB, root string, manifest []byte, opts VerifyOptions) (Checked, []string) {
	t.Helper()
	var got []string
	checked, err := Verify(context.Background(), mustOpen(t, root), bytes.NewReader(manifest), opts, func(d Deviation) {
		got = append(got, d.Path+" "+d.What)
	})
	if err != nil {
		t.Fatal(err)
	}
	if int(checked.Deviations) != len(got) {
		t.Errorf("%d deviations counted, %d reported", checked.Deviations, len(got))
	}
	return checked, got
}

func everything() []entry {
	return []entry{
		dir(".", 0o755), dir("d", 0o2750), with(file("d/f", "contents"), func(h *tar.Header) { h.Uid, h.Gid = 1, 2 }), hardlink("d/h", "d/f"),
		symlink("lib", "d"), file("lib/via", "through a link"), hardlink("lib/h2", "lib/via"), file("implied/x", "x"),
		{tar.Header{Typeflag: tar.TypeChar, Name: "null", Mode: 0o666, Devmajor: 1, Devminor: 3}, ""},
		{tar.Header{Typeflag: tar.TypeFifo, Name: "fifo", Mode: 0o622}, ""},
		with(file("ping", "elf"), func(h *tar.Header) {
			h.PAXRecords = map[string]string{xattrRecord + "user.k": "v", xattrRecord + "trusted.overlay.opaque": "y"}
		}),
		file(".wh.gone", ""), dir("o", 0o755), file("o/.wh..wh..opq", ""), file("big", strings.Repeat("0123456789", 100_000)),
		with(file("suid", "s"), func(h *tar.Header) { h.Mode = 0o4755 }), file("empty", ""),
	}
}

// replaced has entries that replace others in all ways.
func replaced() []entry {
	return []entry{
		file("x", "1"), hardlink("x2", "x"), file("x", "22"), dir("a", 0o755), dir("a/b", 0o700), file("a/b/c", ""), file("a", "now a file"),
		file("b", ""), dir("b", 0o711), symlink("l", "b"), dir("l", 0o700), file("l/in", ""), file("p", ""), file("p/q", ""),
		file(".wh.g", ""), file("g", ""), file(".wh.e", ""), dir("e", 0o755), file(".wh.i", ""), file("i/in", ""), file("f", ""), file(".wh.f", ""),
		dir("real", 0o755), symlink("via", "real"), dir("via/sub", 0o700), dir("real/sub", 0o711), file("s/t", ""), dir("s", 0o750), dir("s", 0o751),
	}
}

func TestVerifyWhole(t *testing.T) {
	needRoot(t)
	for name, entries := range map[string][]entry{"everything": everything(), "replaced": replaced(), "nothing": nil} {
		for _, opts := range []VerifyOptions{{}, {Contents: true}} {
			root, m := mustRecord(t, entries...)
			checked, got := mustVerify(t, root, m, opts)
			if len(got) > 0 || len(entries) > 0 && checked.Entries == 0 {
				t.Errorf("%s, %+v: %d entries, deviations %q", name, opts, checked.Entries, got)
			}
		}
	}
}

func TestVerifyFinds(t *testing.T) {
	needRoot(t)
	later := time.Unix(2e9, 0)
	for _, tc := range []struct {
		name     string
		damage   func(root string) error
		want     []string
		contents bool // found only when contents are read
	}{
		{"missing file", func(r string) error { return os.Remove(r + "/d/f") }, []string{"d time", "d/f missing", "d/h target"}, false},
		{"missing directory", func(r string) error { return os.RemoveAll(r + "/implied") }, []string{" time", "implied missing", "implied/x missing"}, false},
		{"cut off", func(r string) error { return os.Truncate(r+"/big", 5) }, []string{"big size", "big time"}, false},
		{"empty", func(r string) error { return os.Truncate(r+"/d/via", 0) }, []string{"d/via size", "d/via time"}, false},
		{"mode", func(r string) error { return os.Chmod(r+"/suid", 0o755) }, []string{"suid mode"}, false},
		{"owner", func(r string) error { return os.Chown(r+"/empty", 5, 6) }, []string{"empty owner"}, false},
		{"time", func(r string) error { return os.Chtimes(r+"/empty", later, later) }, []string{"empty time"}, false},
		{"attribute gone", func(r string) error { return unix.Removexattr(r+"/ping", "user.k") }, []string{"ping attribute"}, false},
		{"attribute changed", func(r string) error { return unix.Setxattr(r+"/ping", "user.k", []byte("vv"), 0) }, []string{"ping attribute"}, false},
		{"not opaque", func(r string) error { return unix.Removexattr(r+"/o", opaqueXattr) }, []string{"o attribute"}, false},
		{"type", func(r string) error { return errors.Join(os.Remove(r+"/null"), os.Mkdir(r+"/null", 0o700)) }, []string{" time", "null type"}, false},
		{"device", func(r string) error {
			return errors.Join(os.Remove(r+"/null"), unix.Mknod(r+"/null", unix.S_IFCHR|0o666, int(unix.Mkdev(1, 5))), os.Chmod(r+"/null", 0o666))
		}, []string{" time", "null device", "null time"}, false},
		{"whiteout", func(r string) error { return os.Remove(r + "/gone") }, []string{" time", "gone missing"}, false},
		{"link target", func(r string) error { return errors.Join(os.Remove(r+"/lib"), os.Symlink("o", r+"/lib")) },
			[]string{" time", "lib target", "lib time"}, false},
		{"hard link", func(r string) error {
			return errors.Join(os.Remove(r+"/d/h2"), os.WriteFile(r+"/d/h2", nil, 0o644))
		}, []string{"d time", "d/h2 target"}, false},
		{"extra", func(r string) error {
			return errors.Join(os.WriteFile(r+"/new", nil, 0o600), os.MkdirAll(r+"/o/p/q", 0o700))
		}, []string{" time", "new extra", "o time", "o/p extra"}, false},
		{"one bit", func(r string) error {
			return keepTime(r+"/big", func(f *os.File) error { _, err := f.WriteAt([]byte{'x'}, 700_000); return err })
		}, []string{"big content"}, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			root, m := mustRecord(t, everything()...)
			if err := tc.damage(root); err != nil {
				t.Fatal(err)
			}
			for _, contents := range []bool{true, false} {
				want := tc.want
				if tc.contents && !contents {
					want = nil
				}
				_, got := mustVerify(t, root, m, VerifyOptions{Contents: contents})
				slices.Sort(got)
				if !slices.Equal(got, want) {
					t.Errorf("contents %v: got %q, want %q", contents, got, want)
				}
			}
		})
	}
}

func keepTime(path string, change func(*os.File) error) error {
	fi, err := os.Stat(path)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	return errors.Join(change(f), f.Close(), os.Chtimes(path, fi.ModTime(), fi.ModTime()))
}

// TestVerifyLinks: what a link points to is never looked at.
func TestVerifyLinks(t *testing.T) {
	needRoot(t)
	root, m := mustRecord(t, dir("d", 0o755), file("d/f", "x"))
	outside := t.TempDir()
	if err := errors.Join(os.RemoveAll(root+"/d"), os.Symlink(outside, root+"/d"), os.WriteFile(outside+"/f", []byte("x"), 0o644)); err != nil {
		t.Fatal(err)
	}
	_, got := mustVerify(t, root, m, VerifyOptions{Contents: true})
	slices.Sort(got)
	if want := []string{"d type", "d/f missing"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestDamagedManifest(t *testing.T) {
	needRoot(t)
	root, m := mustRecord(t, everything()...)
	for i := range m {
		for _, bad := range [][]byte{m[:i], append(append(bytes.Clone(m[:i]), m[i]^0x11), m[i+1:]...)} {
			_, err := Verify(context.Background(), mustOpen(t, root), bytes.NewReader(bad), VerifyOptions{}, func(Deviation) {})
			if !errors.Is(err, ErrManifest) {
				t.Fatalf("damage at byte %d of %d: %v, want ErrManifest", i, len(m), err)
			}
		}
	}
	why := errors.New("why")
	ctx, cancel := context.WithCancelCause(context.Background())
	cancel(why)
	if _, err := Verify(ctx, mustOpen(t, root), bytes.NewReader(m), VerifyOptions{}, nil); !errors.Is(err, why) {
		t.Errorf("cancelled: %v", err)
	}
}

// FuzzManifest: what reads a manifest ends with io.EOF or ErrManifest, and what it read
// stays below the root.
func FuzzManifest(f *testing.F) {
	needRoot(f)
	for _, entries := range [][]entry{everything(), replaced()} {
		_, m := mustRecord(f, entries...)
		f.Add(m)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := newManifestReader(bytes.NewReader(b))
		for err == nil {
			var r *record
			if r, err = m.next(); err == nil && r.path != "" && !filepath.IsLocal(r.path) {
				t.Fatalf("path %q", r.path)
			}
		}
		if err.Error() != "EOF" && !errors.Is(err, ErrManifest) {
			t.Fatal(err)
		}
	})
}
