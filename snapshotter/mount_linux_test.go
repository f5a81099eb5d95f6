package snapshotter

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: mounts file systems")
	}
}

// many returns an overlay mount of n made-up layers below dir, topmost first.
func many(dir string, n int) Mount {
	var lowers []string
	for i := n; i > 0; i-- {
		lowers = append(lowers, fmt.Sprintf("%s/layers/%d", dir, i))
	}
	return Mount{Type: "overlay", Source: "overlay", Options: []string{
		"index=off", "workdir=" + dir + "/snapshots/9/work", "upperdir=" + dir + "/snapshots/9/upper", "lowerdir=" + strings.Join(lowers, ":")}}
}

func TestCompact(t *testing.T) {
	short, long := many("/var/lib/berth", 3), many("/var/lib/berth", 200)
	bind := Mount{Type: "bind", Source: "/x", Options: []string{"rw", "rbind"}}
	view, err := readOnly(long)
	if err != nil {
		t.Fatal(err)
	}
	apart := Mount{Type: "overlay", Options: []string{"lowerdir=/a/" + strings.Repeat("x", 5000) + ":/b"}}
	tests := []struct {
		name string
		in   []Mount
		dir  string
	}{
		{"none", nil, ""},
		{"short", []Mount{short}, ""},
		{"bind", []Mount{bind}, ""},
		{"long", []Mount{long}, "/var/lib/berth/layers"},
		{"long beside bind", []Mount{long, bind}, "/var/lib/berth/layers"},
		{"view of a writable layer", []Mount{view}, "/var/lib/berth/layers"},
		{"nothing in common", []Mount{apart}, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			dir, out := Compact(tt.in)
			if dir != tt.dir {
				t.Fatalf("dir %q, want %q", dir, tt.dir)
			}
			if dir == "" && !reflect.DeepEqual(out, tt.in) {
				t.Errorf("changed without need: %+v", out)
			}
		})
	}

	_, out := Compact([]Mount{long, bind})
	if !strings.HasPrefix(out[0].option("lowerdir"), "200:199:") || out[0].option("upperdir") != long.option("upperdir") ||
		!slices.Contains(out[0].Options, "index=off") || !reflect.DeepEqual(out[1], bind) {
		t.Errorf("compact mounts %.200v", out)
	}
	if n := len(strings.Join(out[0].Options, ",")); n >= 4096 {
		t.Errorf("compact options of %d bytes", n)
	}
	_, out = Compact([]Mount{view})
	if !strings.HasPrefix(out[0].option("lowerdir"), "/var/lib/berth/snapshots/9/upper:200:199:") {
		t.Errorf("compact view %.200v", out)
	}
	if !strings.HasPrefix(long.option("lowerdir"), "/var/lib/berth/layers/200:") {
		t.Error("Compact changed its argument")
	}
}

func TestReadOnly(t *testing.T) {
	tests := []struct {
		name string
		in   Mount
		want []string
	}{
		{"active", many("/r", 2), []string{"index=off", "lowerdir=/r/snapshots/9/upper:/r/layers/2:/r/layers/1", "ro", "nosuid", "nodev", "noexec"}},
		{"view", Mount{Type: "overlay", Options: []string{"ro", "lowerdir=/a:/b"}}, []string{"ro", "lowerdir=/a:/b", "ro", "nosuid", "nodev", "noexec"}},
		{"bind", Mount{Type: "bind", Options: []string{"rw", "rbind"}}, []string{"rbind", "ro", "nosuid", "nodev", "noexec"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := readOnly(tt.in)
			if err != nil || !slices.Equal(got.Options, tt.want) {
				t.Errorf("options %q, %v, want %q", got.Options, err, tt.want)
			}
		})
	}
}

func TestOpenRootRefuses(t *testing.T) {
	bind := Mount{Type: "bind", Source: "/", Options: []string{"rbind"}}
	for name, mounts := range map[string][]Mount{
		"nothing":    nil,
		"two":        {bind, bind},
		"a target":   {{Type: "bind", Source: "/", Target: "sub", Options: []string{"rbind"}}},
		"no such fs": {{Type: "nosuchfs", Source: "x"}},
		"no source":  {{Type: "bind", Source: "/does/not/exist", Options: []string{"rbind"}}},
		"no layer":   {{Type: "overlay", Options: []string{"lowerdir=/does/not/exist:/nor/this"}}},
	} {
		if f, err := OpenRoot(mounts); err == nil {
			f.Close()
			t.Errorf("%s: was taken", name)
		}
	}
}

// Both ways to a root must show the same: what fsopen does and what mount(2)
// does, which stands in for it on old kernels.
func TestRootByEitherWay(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	for path, content := range map[string]string{"layers/1/a": "1", "layers/2/b": "2", "snapshots/9/upper/c": "9", "layers/1/d": "1"} {
		if err := errors.Join(os.MkdirAll(filepath.Dir(filepath.Join(dir, path)), 0o755), os.WriteFile(filepath.Join(dir, path), []byte(content), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Mknod(dir+"/snapshots/9/upper/d", unix.S_IFCHR, 0); err != nil {
		t.Fatal(err)
	}
	mounts := map[string]Mount{
		"overlay": many(dir, 2),
		"bind":    {Type: "bind", Source: dir + "/layers/1", Options: []string{"rw", "rbind"}},
	}
	want := map[string][]string{"overlay": {"a", "b", "c"}, "bind": {"a", "d"}}
	ways := map[string]func(Mount) (*os.File, error){"fsopen": detached, "mount": detachedByNamespace}
	before := mountTable(t, dir)
	for wayName, way := range ways {
		for name, m := range mounts {
			t.Run(wayName+"/"+name, func(t *testing.T) {
				m, err := readOnly(m)
				if err != nil {
					t.Fatal(err)
				}
				f, err := way(m)
				if errors.Is(err, unix.EINVAL) && wayName == "fsopen" && name == "overlay" {
					t.Skip("needs overlay's lowerdir+ (Linux 6.7)")
				}
				if err != nil {
					t.Fatal(err)
				}
				defer f.Close()
				checkRoot(t, f, want[name])
			})
		}
	}
	if after := mountTable(t, dir); after != before {
		t.Errorf("mounts on the host: %swant: %s", after, before)
	}
}

func checkRoot(t *testing.T, f *os.File, want []string) {
	t.Helper()
	flags, err := unix.FcntlInt(f.Fd(), unix.F_GETFL, 0)
	if err != nil || flags&unix.O_PATH == 0 {
		t.Errorf("descriptor flags %#x, %v, want O_PATH", flags, err)
	}
	if fdFlags, err := unix.FcntlInt(f.Fd(), unix.F_GETFD, 0); err != nil || fdFlags&unix.FD_CLOEXEC == 0 {
		t.Errorf("descriptor is inherited by programs: %#x, %v", fdFlags, err)
	}
	dir := fmt.Sprintf("/proc/self/fd/%d/", f.Fd())
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range entries {
		got = append(got, e.Name())
	}
	if !slices.Equal(got, want) {
		t.Errorf("entries %q, want %q", got, want)
	}
	if err := os.WriteFile(dir+"new", nil, 0o644); !errors.Is(err, unix.EROFS) {
		t.Errorf("write: %v, want read-only file system", err)
	}
	var st unix.Statfs_t
	const attrs = unix.ST_RDONLY | unix.ST_NOSUID | unix.ST_NODEV | unix.ST_NOEXEC
	if err := unix.Fstatfs(int(f.Fd()), &st); err != nil || st.Flags&attrs != attrs {
		t.Errorf("mount flags %#x, %v, want ro,nosuid,nodev,noexec", st.Flags, err)
	}
}

// mountTable returns the lines of the host's mounts that name dir.
func mountTable(t *testing.T, dir string) string {
	t.Helper()
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	var mine []string
	for line := range strings.Lines(string(b)) {
		if strings.Contains(line, dir) {
			mine = append(mine, line)
		}
	}
	return strings.Join(mine, "")
}

func TestClosingDropsTheMount(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=1m"); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(dir, unix.MNT_DETACH)
	m := Mount{Type: "bind", Source: dir, Options: []string{"rw", "rbind"}}
	for name, way := range map[string]func(Mount) (*os.File, error){"fsopen": detached, "mount": detachedByNamespace} {
		ro, err := readOnly(m)
		if err != nil {
			t.Fatal(err)
		}
		f, err := way(ro)
		if err != nil {
			t.Fatal(err)
		}
		fd := int(f.Fd())
		var st unix.Statfs_t
		if err := unix.Fstatfs(fd, &st); err != nil || st.Type != unix.TMPFS_MAGIC {
			t.Errorf("%s: file system %#x, %v, want the tmpfs", name, st.Type, err)
		}
		f.Close()
	}
	// With every view closed the file system is no longer busy.
	if err := unix.Unmount(dir, 0); err != nil {
		t.Errorf("unmount after closing: %v", err)
	}
}

func TestWithMounted(t *testing.T) {
	needRoot(t)
	dir, target := t.TempDir(), t.TempDir()
	if err := os.WriteFile(dir+"/f", nil, 0o644); err != nil {
		t.Fatal(err)
	}
	m := []Mount{{Type: "bind", Source: dir, Options: []string{"rbind", "ro"}}}
	boom := errors.New("boom")
	wd, _ := os.Getwd()
	for range 20 { // also when the first thread happens to be chosen
		err := WithMounted(m, target, func() error {
			if unix.Gettid() == unix.Getpid() {
				return errors.New("runs on the thread that never ends")
			}
			_, err := os.Stat(target + "/f")
			return errors.Join(err, boom)
		})
		if !errors.Is(err, boom) || errors.Is(err, os.ErrNotExist) {
			t.Fatalf("error %v, want that of the function", err)
		}
		runtime.Gosched()
	}
	if _, err := os.Stat(target + "/f"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("seen from outside: %v", err)
	}
	if now, _ := os.Getwd(); now != wd {
		t.Errorf("working directory became %s", now)
	}
	if err := WithMounted(m, target, func() error { runtime.Goexit(); return nil }); err == nil {
		t.Error("a function that does not return gives no error")
	}
	if err := WithMounted(m, target+"/none", func() error { return nil }); err == nil {
		t.Error("a target that does not exist gives no error")
	}
}
