package sandbox

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berthd/berth/snapshotter"
)

// image returns a directory that looks like a hostile image's.
func mustImage(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	mustWrite(t, filepath.Join(dir, "etc", "passwd"), "of the image\n")
	mustWrite(t, filepath.Join(dir, "data", "file"), "")
	for name, target := range map[string]string{
		"absolute": "/etc", "up": "../../../../../../etc", "file": "data/file", "proc": "/proc/self/root",
		"loop": "loop", "chain": "absolute/../up", "data/inside": "../data", "nowhere": "/not/there",
	} {
		mustSymlink(t, target, filepath.Join(dir, name))
	}
	if err := unix.Mkfifo(filepath.Join(dir, "fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestResolveIn(t *testing.T) {
	dir := mustImage(t)
	root, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	for name, want := range map[string]string{
		"etc": "etc", "etc/passwd": "etc/passwd", "absolute": "etc", "up": "etc", "file": "data/file", "chain": "etc",
		"absolute/passwd": "etc/passwd", "data/inside/inside/file": "data/file", ".": ".", "data/../../../etc": "etc", "/etc": "etc",
	} {
		got, err := resolveIn(root, name)
		if err != nil || got != want {
			t.Errorf("%s: %q, %v, want %q", name, got, err, want)
		}
	}
	for _, name := range []string{"none", "proc", "loop", "nowhere", "fifo", "file/below", ""} {
		if got, err := resolveIn(root, name); err == nil {
			t.Errorf("%s: resolved to %q, want an error", name, got)
		}
	}
}

// FuzzResolveIn holds that whatever is resolved is inside and has no links.
func FuzzResolveIn(f *testing.F) {
	for _, s := range []string{"absolute/../up/passwd", "data/inside/../../..", "proc/1/cwd", "a\x00b"} {
		f.Add(s)
	}
	dir := f.TempDir()
	for _, d := range []string{"etc", "data/deep"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			f.Fatal(err)
		}
	}
	for name, target := range map[string]string{"absolute": "/etc", "up": "../../etc", "data/back": "../up", "proc": "/proc/self/root"} {
		if err := os.Symlink(target, filepath.Join(dir, name)); err != nil {
			f.Fatal(err)
		}
	}
	root, err := os.Open(dir)
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, name string) {
		got, err := resolveIn(root, name)
		if err != nil {
			return
		}
		real, err := filepath.EvalSymlinks(filepath.Join(dir, got))
		if err != nil || real != filepath.Join(dir, got) || !filepath.IsLocal(got) {
			t.Errorf("%q: resolved to %q, really %q, %v", name, got, real, err)
		}
	})
}

func TestVolumeSource(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes detached mounts")
	}
	dir := mustImage(t)
	v := &imageVolume{sub: "up", mounts: []snapshotter.Mount{{Type: "bind", Source: dir, Options: []string{"ro", "rbind"}}}}
	got, err := volumeSource(v, "/b/vol-1")
	if err != nil || got != "/b/vol-1/etc" {
		t.Errorf("got %q, %v", got, err)
	}
	v.sub = "none"
	_, err = volumeSource(v, "/b/vol-1")
	wantInvalid(t, err, `image_sub_path "none"`)
	v.sub = ""
	if got, err = volumeSource(v, "/b/vol-1"); err != nil || got != "/b/vol-1" {
		t.Errorf("without a sub-path: %q, %v", got, err)
	}
}

func TestCheckVolume(t *testing.T) {
	good := func() *runtime.Mount {
		return &runtime.Mount{ContainerPath: "/v", Readonly: true, Image: &runtime.ImageSpec{Image: "a"}, ImageSubPath: "a/b"}
	}
	if err := checkVolume(good()); err != nil {
		t.Error(err)
	}
	for part, spoil := range map[string]func(*runtime.Mount){
		"readonly":       func(m *runtime.Mount) { m.Readonly = false },
		"host_path":      func(m *runtime.Mount) { m.HostPath = "/x" },
		"propagation":    func(m *runtime.Mount) { m.Propagation = runtime.MountPropagation_PROPAGATION_BIDIRECTIONAL },
		"image_sub_path": func(m *runtime.Mount) { m.ImageSubPath = "../x" },
	} {
		m := good()
		spoil(m)
		wantInvalid(t, checkVolume(m), part)
	}
}

func TestVolumeKey(t *testing.T) {
	id := strings.Repeat("a", 64)
	if got := snapshotOwner(volumeKey(id, 12)); got != id {
		t.Errorf("owner of a volume's snapshot %q", got)
	}
	if got := snapshotOwner(id); got != id {
		t.Errorf("owner of a writable layer %q", got)
	}
}

// TestVolumeStatus: the digest is told, and the configuration on record stays as
// it was sent.
func TestVolumeStatus(t *testing.T) {
	cfg := &runtime.ContainerConfig{Mounts: []*runtime.Mount{{HostPath: "/a"}, {Image: &runtime.ImageSpec{Image: "b"}}}}
	c := &container{containerRow: containerRow{ImageID: "sha256:1", Volumes: []volumeRow{{Mount: 1, ImageID: "sha256:2"}}}, config: cfg}
	got := c.mounts()
	if len(got) != 2 || got[0].HostPath != "/a" || got[1].Image.ImageRef != "sha256:2" || got[1].Image.Image != "b" {
		t.Errorf("got %v", got)
	}
	if cfg.Mounts[1].Image.ImageRef != "" {
		t.Error("the stored configuration was changed")
	}
	if ids := c.images(); len(ids) != 2 || ids[1] != "sha256:2" {
		t.Errorf("images %v", ids)
	}
}
