package sandbox

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berthd/berth/snapshotter"
)

// TestProfileText has the parser read the default profile, where there is one.
func TestProfileText(t *testing.T) {
	if !strings.HasPrefix(profileText, "profile "+defaultProfile+" ") {
		t.Errorf("the text does not define %s", defaultProfile)
	}
	parser, err := exec.LookPath(appArmorParser)
	if err != nil {
		t.Skip("needs apparmor_parser (Debian: apparmor)")
	}
	out, err := output(t.Context(), []byte(profileText), parser, "--skip-kernel-load", "--skip-cache")
	if err != nil {
		t.Errorf("%v: %s", err, out)
	}
}

func TestAppArmorCheck(t *testing.T) {
	dir := t.TempDir()
	a := &appArmor{enabled: true, list: mustWrite(t, filepath.Join(dir, "profiles"), "other (enforce)\nwith space (complain)\n/usr/bin/man (enforce)\n")}
	for _, name := range []string{"other", "with space", "/usr/bin/man"} {
		if ok, err := a.check(t.Context(), name); !ok || err != nil {
			t.Errorf("%s: %v, %v", name, ok, err)
		}
	}
	for _, name := range []string{"oth", "other (enforce)", "none"} {
		_, err := a.check(t.Context(), name)
		wantInvalid(t, err, "no such profile is loaded")
	}

	// A parser that notes what it is given, then one that fails, then none.
	got := filepath.Join(dir, "got")
	parser := mustWrite(t, filepath.Join(dir, appArmorParser), "#!/bin/sh\necho \"$@\" > "+got+"; cat >> "+got+"\n")
	if err := os.Chmod(parser, 0o755); err != nil {
		t.Fatal(err)
	}
	path := os.Getenv("PATH")
	t.Setenv("PATH", dir+":"+path)
	if ok, err := a.check(t.Context(), defaultProfile); !ok || err != nil {
		t.Errorf("load: %v, %v", ok, err)
	}
	if b, err := os.ReadFile(got); err != nil || !strings.HasSuffix(string(b), profileText) {
		t.Errorf("the parser was given %q, %v", b, err)
	}
	mustWrite(t, parser, "#!/bin/sh\necho no such rule >&2; exit 1\n")
	if _, err := a.check(t.Context(), defaultProfile); err == nil || !strings.Contains(err.Error(), "apparmor_parser: exit status 1: no such rule") {
		t.Errorf("a parser that fails: %v", err)
	}
	mustWrite(t, a.list, defaultProfile+" (enforce)\n")
	if ok, err := a.check(context.Background(), defaultProfile); !ok || err != nil {
		t.Errorf("loaded already: %v, %v", ok, err)
	}
}

// TestLabelsWithoutSELinux: options are checked and otherwise ignored.
func TestLabelsWithoutSELinux(t *testing.T) {
	s := &Service{}
	sc := &runtime.LinuxSandboxSecurityContext{SelinuxOptions: &runtime.SELinuxOption{Type: "t", Level: "s0:c1"}}
	cfg := &runtime.PodSandboxConfig{Linux: &runtime.LinuxPodSandboxConfig{SecurityContext: sc}}
	if r, err := s.podLabels(cfg); err != nil || r != (labelRow{}) {
		t.Errorf("pod: %+v, %v", r, err)
	}
	sc.SelinuxOptions.Type = "a b"
	_, err := s.podLabels(cfg)
	wantInvalid(t, err, "selinux_options.type")
	_, err = s.containerLabels(&pod{}, &runtime.LinuxContainerSecurityContext{SelinuxOptions: sc.SelinuxOptions})
	wantInvalid(t, err, "selinux_options.type")
	plan := &containerPlan{config: &runtime.ContainerConfig{Mounts: []*runtime.Mount{{HostPath: "/", SelinuxRelabel: true}}}}
	if err := errors.Join(relabelMounts(t.Context(), plan), labelFiles("", "/does/not/exist")); err != nil {
		t.Errorf("relabel without labels: %v", err)
	}
}

func TestLabelled(t *testing.T) {
	in := []snapshotter.Mount{
		{Type: "overlay", Source: "overlay", Options: []string{"lowerdir=a:b"}},
		{Type: "bind", Source: "/layers/1", Options: []string{"ro", "rbind"}},
		{Type: "bind", Source: "/layers/2", Options: []string{"rw", "rbind"}},
	}
	if got := labelled(in, "", "/b"); len(got) != 3 || len(got[0].Options) != 1 {
		t.Errorf("without a label: %v", got)
	}
	got := labelled(in, "u:r:t:s0:c1,c2", "/b")
	if o := strings.Join(got[0].Options, " "); o != `lowerdir=a:b context="u:r:t:s0:c1,c2"` {
		t.Errorf("overlay: %s", o)
	}
	if o := strings.Join(got[1].Options, " "); got[1].Type != "overlay" || o != `ro lowerdir=/layers/1:/b/rootfs context="u:r:t:s0:c1,c2"` {
		t.Errorf("view of one layer: %s %s", got[1].Type, o)
	}
	if got[2].Type != "bind" || len(got[2].Options) != 2 || len(in[0].Options) != 1 {
		t.Errorf("writable bind %v, input %v", got[2], in[0])
	}
}
