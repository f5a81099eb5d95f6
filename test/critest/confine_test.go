package critest

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// profile sets the AppArmor profile of a container.
func appArmor(kind runtime.SecurityProfile_ProfileType, ref string) edit {
	return security(func(s *sctx) { s.Apparmor = &runtime.SecurityProfile{ProfileType: kind, LocalhostRef: ref} })
}

func oldAppArmor(s string) edit {
	return security(func(c *sctx) { c.ApparmorProfile = s }) //nolint:staticcheck // that it still works is what is tested
}

// appArmorParser returns the program that loads profiles, "" where AppArmor is off
// or nothing can be loaded.
func appArmorParser() string {
	if state, err := os.ReadFile("/sys/module/apparmor/parameters/enabled"); err != nil || !strings.HasPrefix(string(state), "Y") {
		return ""
	}
	for _, name := range []string{"apparmor_parser", "/sbin/apparmor_parser"} {
		if path, err := exec.LookPath(name); err == nil {
			return path
		}
	}
	return ""
}

const ownProfile = "cat /proc/self/attr/apparmor/current 2>/dev/null || echo none"

// TestAppArmor: a profile by name is used or refused, never ignored; the default
// one is used where there is AppArmor.
func TestAppArmor(t *testing.T) {
	b := open(t)
	p := b.pod()
	on := appArmorParser() != ""
	for name, e := range map[string]edit{
		"default":        appArmor(runtime.SecurityProfile_RuntimeDefault, ""),
		"nothing":        func(*runtime.ContainerConfig) {},
		"old default":    oldAppArmor("runtime/default"),
		"unconfined":     appArmor(runtime.SecurityProfile_Unconfined, ""),
		"old unconfined": oldAppArmor("unconfined"),
	} {
		got := p.output(sh(ownProfile), e)
		confined := strings.Contains(got, "(enforce)")
		if want := on && !strings.Contains(name, "unconfined"); confined != want {
			t.Errorf("%s: confined by %q, want it confined: %v", name, got, want)
		}
	}
	p.refuses(sh("true"), appArmor(runtime.SecurityProfile_Localhost, "critest-none"), "apparmor.localhost_ref", "critest-none")
	p.refuses(sh("true"), oldAppArmor("localhost/critest-none"), "critest-none")
	p.refuses(sh("true"), oldAppArmor("critest-none"), "apparmor_profile")
	// The new field wins.
	got := p.output(sh("echo runs"), oldAppArmor("localhost/critest-none"), appArmor(runtime.SecurityProfile_Unconfined, ""))
	if got != "runs\n" {
		t.Errorf("both fields: %q", got)
	}
}

// TestAppArmorEnforced: what a profile forbids does not work, also for an exec and
// with the capability for it.
func TestAppArmorEnforced(t *testing.T) {
	b := open(t)
	parser := appArmorParser()
	if parser == "" {
		t.Skip("AppArmor is off, or has no parser")
	}
	name := fmt.Sprintf("critest-%d", os.Getpid())
	profile := "profile " + name + " flags=(attach_disconnected,mediate_deleted) {\n file,\n capability,\n network,\n signal,\n ptrace,\n deny /tmp/denied* w,\n}\n"
	load := func(verb string) {
		cmd := exec.Command(parser, verb, "--skip-cache")
		cmd.Stdin = strings.NewReader(profile)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%s profile: %v: %s", verb, err, out)
		}
	}
	load("--replace")
	t.Cleanup(func() { load("--remove") })
	const try = "touch /tmp/denied1 2>/dev/null || echo denied; touch /tmp/other && echo allowed; " + ownProfile
	p := b.pod()
	for what, e := range map[string]edit{
		"profile": appArmor(runtime.SecurityProfile_Localhost, name), "old field": oldAppArmor("localhost/" + name),
	} {
		c := p.run(sh(try+"; sleep 300"), e)
		want := "denied\nallowed\n" + name + " (enforce)\n"
		c.sees(name)
		if got := c.text(); got != want {
			t.Errorf("%s: got %q, want %q", what, got, want)
		}
		if got := c.exec("sh", "-c", try); got != want {
			t.Errorf("%s: exec got %q, want %q", what, got, want)
		}
		c.stop(0)
	}
	admin := security(func(s *sctx) { s.Capabilities = &runtime.Capability{AddCapabilities: []string{"SYS_ADMIN"}} })
	const mount = "mkdir -p /tmp/m && mount -t tmpfs x /tmp/m 2>/dev/null && echo mounted || echo denied"
	for what, tc := range map[string]struct {
		e    edit
		want string
	}{
		"default profile": {appArmor(runtime.SecurityProfile_RuntimeDefault, ""), "denied\n"},
		"unconfined":      {appArmor(runtime.SecurityProfile_Unconfined, ""), "mounted\n"},
	} {
		if got := p.output(sh(mount), admin, tc.e); got != tc.want {
			t.Errorf("mount with %s: %q, want %q", what, got, tc.want)
		}
	}
}

// TestSELinuxOptions: options are checked; where SELinux is off they change
// nothing, and a volume is not labelled.
func TestSELinuxOptions(t *testing.T) {
	b := open(t)
	p := b.pod(func(c *runtime.PodSandboxConfig) {
		c.Linux.SecurityContext.SelinuxOptions = &runtime.SELinuxOption{Level: "s0:c7,c8"}
	})
	got := p.output(sh("cat /vol/f"), mount(b.volume(), "/vol", func(m *runtime.Mount) { m.SelinuxRelabel = true }),
		security(func(s *sctx) { s.SelinuxOptions = &runtime.SELinuxOption{Type: "container_t", Level: "s0:c7,c8"} }))
	if got != "of the host\n" {
		t.Errorf("got %q", got)
	}
	p.refuses(sh("true"), security(func(s *sctx) { s.SelinuxOptions = &runtime.SELinuxOption{Type: "a b"} }), "selinux_options.type")
}

func TestMountOptions(t *testing.T) {
	b := open(t)
	p := b.pod()
	dir := b.volume()
	with := func(options ...string) func(*runtime.Mount) {
		return func(m *runtime.Mount) { m.MountOptions = options }
	}
	got := p.output(sh("grep ' /vol ' /proc/self/mountinfo; cp /bin/busybox /vol/b; /vol/b true 2>/dev/null || echo refused"),
		mount(dir, "/vol", with("noexec", "nosuid", "nodev")))
	if f := strings.Fields(got); len(f) < 6 || !strings.HasSuffix(got, "refused\n") {
		t.Errorf("got %q, want a program refused", got)
	} else {
		for _, o := range []string{"rw", "noexec", "nosuid", "nodev"} {
			if !strings.Contains(","+f[5]+",", ","+o+",") {
				t.Errorf("options of the mount %s, want %s", f[5], o)
			}
		}
	}
	for _, bad := range []string{"rw", "bind", "context=x", "size=1", "", "noexec,suid"} {
		p.refuses(sh("true"), mount(dir, "/vol", with(bad)), "mount_options")
	}
	r, err := b.client.Status(b.ctx, &runtime.StatusRequest{})
	b.must(err)
	if !r.GetFeatures().GetMountOptions() {
		t.Error("features do not tell of mount options")
	}
}
