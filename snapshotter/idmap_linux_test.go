package snapshotter

import (
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/berthd/berth/test/userns"
)

func TestIDMapped(t *testing.T) {
	const state = "/var/lib/berth"
	view := Mount{Type: "overlay", Source: "overlay", Options: []string{"ro", "lowerdir=" + state + "/layers/2:" + state + "/layers/1"}}
	for _, tt := range []struct {
		name, base, dir string
		in              Mount
		options         []string
	}{
		{"writable", state, "layers", many(state, 2), []string{"index=off", "workdir=../snapshots/9/work", "upperdir=../snapshots/9/upper", "lowerdir=2:1"}},
		{"one layer", state, "layers", many(state, 1), []string{"index=off", "workdir=../snapshots/9/work", "upperdir=../snapshots/9/upper", "lowerdir=1"}},
		{"view", state + "/layers", ".", view, []string{"ro", "lowerdir=2:1"}},
		{"on a snapshot", state, ".", Mount{Type: "overlay", Options: []string{"lowerdir=" + state + "/snapshots/3/upper:" + state + "/layers/1", "upperdir=" + state + "/snapshots/9/upper", "context=\"a:b\""}},
			[]string{"lowerdir=snapshots/3/upper:layers/1", "upperdir=snapshots/9/upper", "context=\"a:b\""}},
		{"bind", "/x", "", Mount{Type: "bind", Source: "/x", Options: []string{"ro", "rbind"}}, []string{"ro", "rbind"}},
	} {
		base, dir, m, err := IDMapped(tt.in)
		if err != nil || base != tt.base || dir != tt.dir || !reflect.DeepEqual(m.Options, tt.options) || m.Type != tt.in.Type {
			t.Errorf("%s: base %q, dir %q, %q, %v; want %q, %q, %q", tt.name, base, dir, m.Options, err, tt.base, tt.dir, tt.options)
		}
	}
	// As many layers as there may be still fit into a page of options.
	if _, _, m, err := IDMapped(many(state, 499)); err != nil || len(strings.Join(m.Options, ",")) >= 4096 {
		t.Errorf("499 layers: %d bytes, %v", len(strings.Join(m.Options, ",")), err)
	}
	for name, m := range map[string]Mount{
		"another type":       {Type: "zfs", Source: "x"},
		"no layers":          {Type: "overlay", Options: []string{"ro"}},
		"nothing in common":  {Type: "overlay", Options: []string{"lowerdir=/a/1", "upperdir=/b/2"}},
		"not absolute paths": {Type: "overlay", Options: []string{"lowerdir=1:2"}},
	} {
		if _, _, _, err := IDMapped(m); !errors.Is(err, ErrIDMap) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestIDMapSupported(t *testing.T) {
	needRoot(t)
	ns := userns.Must(t, 300000)
	dir := t.TempDir()
	before := mountTable(t, dir)
	if err := IDMapSupported(dir, ns, 300000, 300000); errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) {
		t.Skipf("not on this kernel or file system: %v", err)
	} else if err != nil {
		t.Fatal(err)
	}
	if err := IDMapSupported(dir, ns, 300001, 300000); !errors.Is(err, ErrIDMap) {
		t.Errorf("with the wrong user: %v", err)
	}
	if err := IDMapSupported(dir+"/none", ns, 300000, 300000); !errors.Is(err, ErrIDMap) {
		t.Errorf("on a directory that is not there: %v", err)
	}
	if left, err := filepath.Glob(dir + "/*"); err != nil || len(left) > 0 || mountTable(t, dir) != before {
		t.Errorf("left: %v, %v", left, err)
	}
}

func TestCanIDMap(t *testing.T) {
	needRoot(t)
	ns := userns.Must(t, 300000)
	if err := CanIDMap("/proc/sys", ns); !errors.Is(err, ErrIDMap) {
		t.Errorf("of /proc: %v", err)
	}
	if err := CanIDMap(t.TempDir()+"/none", ns); !errors.Is(err, ErrIDMap) || !errors.Is(err, os.ErrNotExist) {
		t.Errorf("of nothing: %v", err)
	}
	own, err := os.Open("/proc/self/ns/user")
	if err != nil {
		t.Fatal(err)
	}
	defer own.Close()
	if err := CanIDMap(t.TempDir(), own); !errors.Is(err, ErrIDMap) {
		t.Errorf("with the host's user namespace: %v", err)
	}
}
