package critest

import (
	"os"
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

// TestAppArmor: a profile by name is used or refused, never ignored; the default
// one is used where there is AppArmor.
func TestAppArmor(t *testing.T) {
	b := open(t)
	p := b.pod()
	state, err := os.ReadFile("/sys/module/apparmor/parameters/enabled")
	on := err == nil && strings.HasPrefix(string(state), "Y")
	for name, e := range map[string]edit{
		"default":        appArmor(runtime.SecurityProfile_RuntimeDefault, ""),
		"nothing":        func(*runtime.ContainerConfig) {},
		"old default":    oldAppArmor("runtime/default"),
		"unconfined":     appArmor(runtime.SecurityProfile_Unconfined, ""),
		"old unconfined": oldAppArmor("unconfined"),
	} {
		got := p.output(sh("cat /proc/self/attr/apparmor/current 2>/dev/null || echo none"), e)
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
