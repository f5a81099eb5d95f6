package sandbox

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestCDINames(t *testing.T) {
	got, err := cdiNames(&runtime.ContainerConfig{
		CDIDevices:  []*runtime.CDIDevice{{Name: "v.com/c=b"}, {Name: "v.com/c=a"}},
		Annotations: map[string]string{"cdi.k8s.io/z": "v.com/c=z", "cdi.k8s.io/a": "v.com/c=a,v.com/c=y", "other": "no device"},
	})
	if want := []string{"v.com/c=b", "v.com/c=a", "v.com/c=y", "v.com/c=z"}; err != nil || !slices.Equal(got, want) {
		t.Errorf("got %q, %v, want %q", got, err, want)
	}
	for part, c := range map[string]*runtime.ContainerConfig{
		"CDI_devices[1]": {CDIDevices: []*runtime.CDIDevice{{Name: "v.com/c=b"}, {Name: "b"}}},
		"cdi.k8s.io/a":   {Annotations: map[string]string{"cdi.k8s.io/a": ""}},
	} {
		_, err := cdiNames(c)
		wantInvalid(t, err, part)
	}
	many := &runtime.ContainerConfig{}
	for i := range maxCDI + 1 {
		many.CDIDevices = append(many.CDIDevices, &runtime.CDIDevice{Name: "v.com/c=d" + strings.Repeat("x", i)})
	}
	_, err = cdiNames(many)
	wantInvalid(t, err, "more than 1024")
}

func TestCDIInject(t *testing.T) {
	off := &Service{}
	wantInvalid(t, off.checkCDI([]string{"v.com/c=a"}), "CDI is off")
	dir := filepath.Join(t.TempDir(), "cdi")
	cache, err := newCDI([]string{dir})
	if err != nil {
		t.Fatal(err)
	}
	s := &Service{cdi: cache}
	wantInvalid(t, s.checkCDI([]string{"v.com/c=a"}), `CDI device "v.com/c=a": not in `+dir)
	mustWrite(t, filepath.Join(dir, "v.yaml"), "cdiVersion: 0.6.0\nkind: v.com/c\ndevices:\n- name: a\n  containerEdits:\n    env: [A=1]\n"+
		"- name: bad\n  containerEdits:\n    deviceNodes:\n    - path: /dev/not-there\n")
	if err := s.checkCDI([]string{"v.com/c=a"}); err != nil {
		t.Error(err)
	}
	sp := &specs.Spec{Process: &specs.Process{Env: []string{"B=2"}}}
	if err := s.injectCDI(sp, []string{"v.com/c=a"}); err != nil || !slices.Equal(sp.Process.Env, []string{"B=2", "A=1"}) {
		t.Errorf("environment %q, %v", sp.Process.Env, err)
	}
	wantInvalid(t, s.injectCDI(sp, []string{"v.com/c=bad"}), "v.com/c=bad")
	if err := os.WriteFile(filepath.Join(dir, "w.json"), []byte("{"), 0o644); err != nil {
		t.Fatal(err)
	}
	wantInvalid(t, s.checkCDI([]string{"w.com/c=a"}), "w.json")
}
