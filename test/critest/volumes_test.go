package critest

import (
	"os"
	"strings"
	"testing"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berthd/berth/test/images"
)

// imageVolume is an edit that mounts one of the standard images.
func (b *box) imageVolume(name, inside, sub string, edits ...func(*runtime.Mount)) edit {
	m := &runtime.Mount{ContainerPath: inside, Readonly: true, ImageSubPath: sub,
		Image: &runtime.ImageSpec{Image: b.ref(name), UserSpecifiedImage: b.ref(name)}}
	for _, e := range edits {
		e(m)
	}
	return func(c *runtime.ContainerConfig) { c.Mounts = append(c.Mounts, m) }
}

// pulled makes sure that one of the standard images is there, and returns its ID.
func (b *box) pulled(name string) string {
	b.Helper()
	return b.pull(b.ref(name))
}

func TestImageVolume(t *testing.T) {
	b := open(t)
	id := b.pulled(images.Layers)
	guest := b.pulled(images.Guest)
	c := b.pod().run(sh("sleep 300"), b.imageVolume(images.Layers, "/vol", ""), b.imageVolume(images.Guest, "/one", ""))
	// Whiteouts and layers are applied, programs run, nothing can be written.
	if got := c.exec("sh", "-c", "cat /vol/kept; ls /vol/hidden; test -e /vol/gone || echo gone; /vol/bin/busybox echo runs; touch /vol/x 2>&1"+
		" || true; touch /vol/tmp/x 2>&1 || true; ls /one"); strings.Count(got, "Read-only file system") != 2 ||
		!strings.HasPrefix(got, "2\nnew\ngone\nruns\n") || !strings.HasSuffix(got, "guest\n") {
		t.Errorf("inside: %q", got)
	}
	ms := c.status().Mounts
	if len(ms) != 2 || ms[0].GetImage().GetImageRef() != id || ms[1].GetImage().GetImageRef() != guest || ms[0].GetImage().GetImage() != b.ref(images.Layers) || !ms[0].Readonly {
		t.Errorf("status tells %v, want images %s and %s", ms, id, guest)
	}
	if own, err := os.ReadFile("/proc/self/mountinfo"); err != nil || strings.Contains(string(own), c.id) {
		t.Errorf("the host has a mount of the container: %v", err)
	}
	// Two containers of one image do not disturb each other.
	d := c.pod.run(sh("sleep 300"), b.imageVolume(images.Layers, "/vol", "hidden"))
	c.remove()
	if got := d.exec("ls", "/vol"); got != "new\n" {
		t.Errorf("after the removal of another container: %q", got)
	}
}

func TestImageVolumeOptions(t *testing.T) {
	b := open(t)
	b.pulled(images.Layers)
	got := b.pod().output(sh("/vol/bin/busybox true 2>/dev/null || echo refused"),
		b.imageVolume(images.Layers, "/vol", "", func(m *runtime.Mount) { m.MountOptions = []string{"noexec"} }))
	if got != "refused\n" {
		t.Errorf("a program on a volume with noexec: %q", got)
	}
}

// TestImageVolumeSubPath: links of the image are followed inside the image.
func TestImageVolumeSubPath(t *testing.T) {
	b := open(t)
	b.pulled(images.Layers)
	p := b.pod()
	for sub, want := range map[string]string{"hidden": "new\n", "tree/a": "/vol\n"} {
		if got := p.output(sh("ls /vol"), b.imageVolume(images.Layers, "/vol", sub)); got != want {
			t.Errorf("sub path %q shows %q, want %q", sub, got, want)
		}
	}
	got := p.output(sh("cat /vol; cat /data/passwd"), b.imageVolume(images.Layers, "/vol", "escape"), b.imageVolume(images.Layers, "/data", "etc"))
	half := len(got) / 2
	if got == "" || got[:half] != got[half:] || !strings.Contains(got, "app:x:1000") {
		t.Errorf("a link to /etc/passwd in the image shows %q, want the image's own", got)
	}
}

func TestImageVolumeRefused(t *testing.T) {
	b := open(t)
	b.pulled(images.Layers)
	p := b.pod()
	dir := b.volume()
	for name, c := range map[string]struct {
		e     edit
		parts []string
	}{
		"writable":                    {b.imageVolume(images.Layers, "/vol", "", func(m *runtime.Mount) { m.Readonly = false }), []string{"readonly"}},
		"with a host path":            {b.imageVolume(images.Layers, "/vol", "", func(m *runtime.Mount) { m.HostPath = dir }), []string{"host_path", dir}},
		"no such image":               {b.imageVolume("berth/absent", "/vol", ""), []string{"berth/absent"}},
		"no such sub path":            {b.imageVolume(images.Layers, "/vol", "not/there"), []string{"image_sub_path", "not/there"}},
		"outside":                     {b.imageVolume(images.Layers, "/vol", "../x"), []string{"image_sub_path"}},
		"absolute":                    {b.imageVolume(images.Layers, "/vol", "/etc"), []string{"image_sub_path"}},
		"a device":                    {b.imageVolume(images.Layers, "/vol", "null-device"), []string{"image_sub_path", "null-device"}},
		"a host path with a sub path": {mount(dir, "/vol", func(m *runtime.Mount) { m.ImageSubPath = "f" }), []string{"image_sub_path"}},
		"shared":                      {b.imageVolume(images.Layers, "/vol", "", propagation(runtime.MountPropagation_PROPAGATION_BIDIRECTIONAL)), []string{"propagation"}},
	} {
		t.Run(name, func(t *testing.T) { p.with(t).refuses(sh("true"), c.e, c.parts...) })
	}
}

// TestImageVolumeKeepsImage: an image that is removed while it is mounted stays
// as long as that, and its layers go with the container.
func TestImageVolumeKeepsImage(t *testing.T) {
	b := open(t)
	b.pulled(images.Large)
	c := b.pod().run(sh("sleep 300"), b.imageVolume(images.Large, "/vol", ""))
	b.dropImage(b.ref(images.Large))
	if got := c.exec("sh", "-c", "wc -c < /vol/noise"); strings.TrimSpace(got) != "8388608" {
		t.Errorf("size of the file in a removed image: %q", got)
	}
	c.remove()
}
