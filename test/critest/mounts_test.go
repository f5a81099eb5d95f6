package critest

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berthd/berth/test/images"
)

// mount is an edit that adds one mount.
func mount(host, inside string, edits ...func(*runtime.Mount)) edit {
	m := &runtime.Mount{HostPath: host, ContainerPath: inside}
	for _, e := range edits {
		e(m)
	}
	return func(c *runtime.ContainerConfig) { c.Mounts = append(c.Mounts, m) }
}

func readonly(m *runtime.Mount) { m.Readonly = true }

func propagation(p runtime.MountPropagation) func(*runtime.Mount) {
	return func(m *runtime.Mount) { m.Propagation = p }
}

// volume returns a directory of the host with a file "f" in it.
func (b *box) volume() string {
	b.Helper()
	dir := b.TempDir()
	b.must(os.WriteFile(filepath.Join(dir, "f"), []byte("of the host\n"), 0o644))
	return dir
}

func TestMountReadWrite(t *testing.T) {
	b := open(t)
	dir := b.volume()
	c := b.pod().run(sh("sleep 300"), mount(dir, "/vol"), mount(filepath.Join(dir, "f"), "/etc/one-file"))
	if got := c.exec("cat", "/vol/f", "/etc/one-file"); got != "of the host\nof the host\n" {
		t.Errorf("inside: %q", got)
	}
	c.exec("sh", "-c", "echo of the container > /vol/g")
	if got, err := os.ReadFile(filepath.Join(dir, "g")); err != nil || string(got) != "of the container\n" {
		t.Errorf("on the host: %q, %v", got, err)
	}
	ms := c.status().Mounts
	if len(ms) != 2 || ms[0].HostPath != dir || ms[0].ContainerPath != "/vol" || ms[0].Readonly {
		t.Errorf("status tells %v", ms)
	}
}

func TestMountReadonly(t *testing.T) {
	b := open(t)
	c := b.pod().run(sh("sleep 300"), mount(b.volume(), "/vol", readonly))
	if got := c.exec("sh", "-c", "cat /vol/f; touch /vol/x 2>&1 || true"); !strings.HasPrefix(got, "of the host\n") || !strings.Contains(got, "Read-only") {
		t.Errorf("got %q", got)
	}
	if ms := c.status().Mounts; len(ms) != 1 || !ms[0].Readonly {
		t.Errorf("status tells %v", ms)
	}
}

// TestMountMissingHostPath: a path of the host that does not exist is named,
// and not made: berth writes nowhere but in its own directories.
func TestMountMissingHostPath(t *testing.T) {
	b := open(t)
	b.ours()
	path := filepath.Join(t.TempDir(), "not", "there")
	b.pod().refuses(sh("true"), mount(path, "/vol"), path)
	if _, err := os.Stat(path); err == nil {
		t.Errorf("%s was made", path)
	}
}

func TestMountSymlinkOnHost(t *testing.T) {
	b := open(t)
	dir := b.volume()
	link := filepath.Join(t.TempDir(), "link")
	b.must(os.Symlink(dir, link))
	if got := b.pod().output(sh("cat /vol/f"), mount(link, "/vol")); got != "of the host\n" {
		t.Errorf("got %q", got)
	}
}

// TestMountSymlinkInImage: a link in the image that points to an absolute
// path is followed inside the container, never on the host.
func TestMountSymlinkInImage(t *testing.T) {
	b := open(t)
	host, err := os.ReadFile("/etc/passwd")
	b.must(err)
	p := b.pod()
	got := p.output(sh("cat /escape; cat /etc/passwd"), b.image(images.Layers), mount(filepath.Join(b.volume(), "f"), "/escape"))
	if got != "of the host\nof the host\n" {
		t.Errorf("inside: %q", got)
	}
	if now, err := os.ReadFile("/etc/passwd"); err != nil || string(now) != string(host) {
		t.Errorf("the host's /etc/passwd is hidden or changed: %q, %v", now, err)
	}
}

// TestMountOverSystemPaths: mounts of the configuration win over the usual ones.
func TestMountOverSystemPaths(t *testing.T) {
	b := open(t)
	dir := b.volume()
	got := b.pod().output(sh("cat /etc/hosts /dev/shm/f; echo x > /dev/termination-log"),
		mount(filepath.Join(dir, "f"), "/etc/hosts"), mount(dir, "/dev/shm"), mount(filepath.Join(dir, "f"), "/dev/termination-log"))
	if got != "of the host\nof the host\n" {
		t.Errorf("inside: %q", got)
	}
	if now, err := os.ReadFile(filepath.Join(dir, "f")); err != nil || string(now) != "x\n" {
		t.Errorf("termination log on the host: %q, %v", now, err)
	}
}

// sharedDir returns a directory that is a mount of its own with a propagation.
func (b *box) mountedDir(flag uintptr) string {
	b.Helper()
	dir := b.TempDir()
	b.must(unix.Mount("critest", dir, "tmpfs", 0, ""))
	b.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			b.Errorf("clean-up: %v", err)
		}
	})
	b.must(unix.Mount("", dir, "", flag, ""))
	b.must(os.Mkdir(filepath.Join(dir, "sub"), 0o755))
	return dir
}

// submount mounts a tmpfs with a file "late" at dir/sub on the host.
func (b *box) submount(dir string) {
	b.Helper()
	sub := filepath.Join(dir, "sub")
	b.must(unix.Mount("critest", sub, "tmpfs", 0, ""))
	b.Cleanup(func() { _ = unix.Unmount(sub, unix.MNT_DETACH) }) // goes with its parent as well
	b.must(os.WriteFile(filepath.Join(sub, "late"), nil, 0o644))
}

func TestMountPropagation(t *testing.T) {
	b := open(t)
	for _, c := range []struct {
		name           string
		mode           runtime.MountPropagation
		inward, onward bool // a mount on the host is seen inside, and the other way round
	}{
		{"private", runtime.MountPropagation_PROPAGATION_PRIVATE, false, false},
		{"host to container", runtime.MountPropagation_PROPAGATION_HOST_TO_CONTAINER, true, false},
		{"bidirectional", runtime.MountPropagation_PROPAGATION_BIDIRECTIONAL, true, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := b.with(t)
			dir := b.mountedDir(unix.MS_SHARED)
			b.must(os.Mkdir(filepath.Join(dir, "inner"), 0o755))
			p := b.pod(func(cfg *runtime.PodSandboxConfig) { cfg.Linux.SecurityContext.Privileged = true })
			run := p.run(sh("sleep 300"), mount(dir, "/vol", propagation(c.mode)), security(func(s *sctx) { s.Privileged = true }))
			b.submount(dir)
			if got := run.exec("ls", "/vol/sub"); (got == "late\n") != c.inward {
				t.Errorf("a mount on the host is seen inside as %q, want it seen: %v", got, c.inward)
			}
			run.exec("sh", "-c", "mount -t tmpfs none /vol/inner && touch /vol/inner/here")
			_, err := os.Stat(filepath.Join(dir, "inner", "here"))
			if (err == nil) != c.onward {
				t.Errorf("a mount inside on the host: %v, want it seen: %v", err, c.onward)
			}
			run.exec("umount", "/vol/inner")
		})
	}
}

// TestMountPropagationImpossible: what the host's mount cannot give is an
// error that names the path, not a silent difference.
func TestMountPropagationImpossible(t *testing.T) {
	b := open(t)
	p := b.pod(func(cfg *runtime.PodSandboxConfig) { cfg.Linux.SecurityContext.Privileged = true })
	dir := b.mountedDir(unix.MS_PRIVATE)
	for _, mode := range []runtime.MountPropagation{runtime.MountPropagation_PROPAGATION_BIDIRECTIONAL, runtime.MountPropagation_PROPAGATION_HOST_TO_CONTAINER} {
		e := func(c *runtime.ContainerConfig) {
			mount(dir, "/vol", propagation(mode))(c)
			c.Linux.SecurityContext.Privileged = true
		}
		p.refuses(sh("true"), e, dir)
	}
}

func TestMountRecursiveReadonly(t *testing.T) {
	b := open(t)
	dir := b.mountedDir(unix.MS_PRIVATE)
	b.submount(dir)
	p := b.pod()
	try := "touch /vol/x 2>/dev/null || echo top refused; touch /vol/sub/x 2>/dev/null || echo sub refused"
	if got := p.output(sh(try), mount(dir, "/vol", readonly)); got != "top refused\n" {
		t.Errorf("read-only: %q, want only the top refused", got)
	}
	c := p.run(sh(try), mount(dir, "/vol", readonly, func(m *runtime.Mount) { m.RecursiveReadOnly = true }))
	c.wait()
	if got := c.text(); got != "top refused\nsub refused\n" {
		t.Errorf("recursively read-only: %q, want both refused", got)
	}
	if ms := c.status().Mounts; len(ms) != 1 || !ms[0].RecursiveReadOnly {
		t.Errorf("status tells %v", ms)
	}
}
