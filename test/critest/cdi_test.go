package critest

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// cdiSpec has one device of every kind of edit that matters here.
const cdiSpec = `{"cdiVersion": "0.6.0", "kind": "critest.example/thing",
 "containerEdits": {"env": ["THING_KIND=critest"]},
 "devices": [
  {"name": "zero", "containerEdits": {"deviceNodes": [{"path": "/dev/my-log", "hostPath": "/dev/kmsg", "permissions": "r"}], "env": ["THING=zero"]}},
  {"name": "lib", "containerEdits": {"mounts": [{"hostPath": "MOUNT", "containerPath": "/opt/thing", "options": ["ro", "rbind"]}]}}]}`

func cdiDevices(names ...string) edit {
	return func(c *runtime.ContainerConfig) {
		for _, n := range names {
			c.CDIDevices = append(c.CDIDevices, &runtime.CDIDevice{Name: n})
		}
	}
}

// cdiNote asks for devices as kubelets before CDI_devices did.
func cdiNote(value string) edit {
	return func(c *runtime.ContainerConfig) { c.Annotations = map[string]string{"cdi.k8s.io/critest": value} }
}

// TestCDI: directories that come into being while berthd runs are found, and so
// are changes.
func TestCDI(t *testing.T) {
	b := open(t)
	b.ours()
	p := b.pod()
	p.refuses(sh("true"), cdiDevices("critest.example/thing=zero"), "critest.example/thing=zero")
	b.must(os.MkdirAll(b.cdi, 0o755))
	file := filepath.Join(b.cdi, "critest.json")
	b.must(os.WriteFile(file, []byte(strings.ReplaceAll(cdiSpec, "MOUNT", b.volume())), 0o644))

	script := "echo $THING_KIND $THING; cat /opt/thing/f 2>/dev/null; " +
		"if test -c /dev/my-log; then echo device; (echo x > /dev/my-log) 2>/dev/null || echo refused; fi"
	for name, c := range map[string]struct {
		e    edit
		want string
	}{
		"field":      {cdiDevices("critest.example/thing=zero"), "critest zero\ndevice\nrefused\n"},
		"annotation": {cdiNote("critest.example/thing=zero"), "critest zero\ndevice\nrefused\n"},
		"both, one twice": {func(c *runtime.ContainerConfig) {
			cdiDevices("critest.example/thing=zero")(c)
			cdiNote("critest.example/thing=zero,critest.example/thing=lib")(c)
		}, "critest zero\nof the host\ndevice\nrefused\n"},
		"mount, no variable": {cdiDevices("critest.example/thing=lib"), "critest\nof the host\n"},
	} {
		t.Run(name, func(t *testing.T) {
			if got := p.with(t).output(sh(script), c.e); got != c.want {
				t.Errorf("got %q, want %q", got, c.want)
			}
		})
	}
	for name, c := range map[string]struct {
		e     edit
		parts []string
	}{
		"unknown device":    {cdiDevices("critest.example/thing=none"), []string{"critest.example/thing=none", b.cdi}},
		"no qualified name": {cdiDevices("zero"), []string{"CDI_devices[0]", `"zero"`}},
		"bad annotation":    {cdiNote("critest.example/thing=zero,,"), []string{"cdi.k8s.io/critest"}},
		"unknown by note":   {cdiNote("critest.example/thing=gone"), []string{"critest.example/thing=gone"}},
	} {
		t.Run(name, func(t *testing.T) { p.with(t).refuses(sh("true"), c.e, c.parts...) })
	}

	// A file that is broken is named when a device of it is missing.
	b.must(os.WriteFile(file, []byte(`{"cdiVersion": "0.6.0", "kind": `), 0o644))
	b.until("news of the broken file", func() bool {
		_, err := p.tryCreate(sh("true"), cdiDevices("critest.example/thing=zero"))
		return err != nil && strings.Contains(err.Error(), "critest.json")
	})
	b.must(os.Remove(file))
	p.refuses(sh("true"), cdiDevices("critest.example/thing=zero"), "critest.example/thing=zero")
}
