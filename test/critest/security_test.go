package critest

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

type sctx = runtime.LinuxContainerSecurityContext

// procStatus returns /proc/self/status of a container with a security context.
func (p *pod) procStatus(fn func(*sctx)) string {
	p.Helper()
	return p.output([]string{"cat", "/proc/self/status"}, security(fn))
}

// mask parses a capability set of /proc/self/status.
func (b *box) mask(status, name string) uint64 {
	b.Helper()
	n, err := strconv.ParseUint(field(status, name), 16, 64)
	if err != nil {
		b.Fatalf("%s of %q: %v", name, status, err)
	}
	return n
}

func bits(caps ...uint) (n uint64) {
	for _, c := range caps {
		n |= 1 << c
	}
	return n
}

func TestCapabilities(t *testing.T) {
	b := open(t)
	p := b.pod()
	usual := bits(unix.CAP_CHOWN, unix.CAP_DAC_OVERRIDE, unix.CAP_FSETID, unix.CAP_FOWNER, unix.CAP_MKNOD, unix.CAP_NET_RAW, unix.CAP_SETGID,
		unix.CAP_SETUID, unix.CAP_SETFCAP, unix.CAP_SETPCAP, unix.CAP_NET_BIND_SERVICE, unix.CAP_SYS_CHROOT, unix.CAP_KILL, unix.CAP_AUDIT_WRITE)
	for _, c := range []struct {
		name string
		caps *runtime.Capability
		want uint64
	}{
		{"the usual ones", nil, usual},
		{"add", &runtime.Capability{AddCapabilities: []string{"NET_ADMIN"}}, usual | bits(unix.CAP_NET_ADMIN)},
		{"add with prefix and in lower case", &runtime.Capability{AddCapabilities: []string{"CAP_NET_ADMIN", "sys_ptrace"}}, usual | bits(unix.CAP_NET_ADMIN, unix.CAP_SYS_PTRACE)},
		{"drop", &runtime.Capability{DropCapabilities: []string{"CHOWN"}}, usual &^ bits(unix.CAP_CHOWN)},
		{"drop all", &runtime.Capability{DropCapabilities: []string{"ALL"}}, 0},
		{"drop all, add one", &runtime.Capability{DropCapabilities: []string{"ALL"}, AddCapabilities: []string{"NET_BIND_SERVICE"}}, bits(unix.CAP_NET_BIND_SERVICE)},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := b.with(t)
			st := p.with(t).procStatus(func(s *sctx) { s.Capabilities = c.caps })
			for _, set := range []string{"CapEff", "CapPrm", "CapBnd"} {
				if got := b.mask(st, set); got != c.want {
					t.Errorf("%s %#x, want %#x", set, got, c.want)
				}
			}
			if got := b.mask(st, "CapInh"); got != 0 {
				t.Errorf("CapInh %#x, want 0", got)
			}
		})
	}
	t.Run("all", func(t *testing.T) {
		b := b.with(t)
		st := p.with(t).procStatus(func(s *sctx) { s.Capabilities = &runtime.Capability{AddCapabilities: []string{"ALL"}} })
		want := usual | bits(unix.CAP_SYS_ADMIN, unix.CAP_NET_ADMIN, unix.CAP_SYS_PTRACE)
		if got := b.mask(st, "CapEff"); got&want != want {
			t.Errorf("CapEff %#x lacks %#x", got, want&^got)
		}
	})
}

// TestAmbientCapabilities: what is ambient is what a user without rights really has,
// in the container as in an exec.
func TestAmbientCapabilities(t *testing.T) {
	b := open(t)
	p := b.pod()
	ambient := func(names ...string) edit {
		return security(func(s *sctx) {
			s.RunAsUser = &runtime.Int64Value{Value: 1000}
			s.Capabilities = &runtime.Capability{DropCapabilities: []string{"ALL"}, AddAmbientCapabilities: names}
		})
	}
	want := bits(unix.CAP_NET_BIND_SERVICE)
	c := p.run(sh("cat /proc/self/status > /tmp/status; sleep 300"), ambient("NET_BIND_SERVICE"))
	b.until("status of the container", func() bool { return strings.Contains(c.exec("cat", "/tmp/status"), "CapAmb") })
	for what, st := range map[string]string{"container": c.exec("cat", "/tmp/status"), "exec": c.exec("cat", "/proc/self/status")} {
		for _, set := range []string{"CapAmb", "CapInh", "CapEff", "CapPrm", "CapBnd"} {
			if got := b.mask(st, set); got != want {
				t.Errorf("%s: %s %#x, want %#x", what, set, got, want)
			}
		}
	}
	c = p.run(sh("sleep 300"), security(func(s *sctx) { s.RunAsUser = &runtime.Int64Value{Value: 1000} }))
	if st := c.exec("cat", "/proc/self/status"); b.mask(st, "CapAmb") != 0 || b.mask(st, "CapEff") != 0 {
		t.Errorf("without ambient capabilities: %s", st)
	}
	if b.node != nil {
		p.refuses(sh("true"), ambient("NO_SUCH_ONE"), "add_ambient_capabilities", "NO_SUCH_ONE")
	}
}

// TestExecCapabilities: a command by exec has what the container has, and an
// empty inheritable set as well.
func TestExecCapabilities(t *testing.T) {
	b := open(t)
	c := b.pod().run(sh("sleep 300"), security(func(s *sctx) {
		s.Capabilities, s.NoNewPrivs = &runtime.Capability{DropCapabilities: []string{"ALL"}, AddCapabilities: []string{"KILL"}}, true
	}))
	st := c.exec("cat", "/proc/self/status")
	if got, want := b.mask(st, "CapEff"), bits(unix.CAP_KILL); got != want {
		t.Errorf("CapEff %#x, want %#x", got, want)
	}
	if got := b.mask(st, "CapInh"); got != 0 {
		t.Errorf("CapInh %#x, want 0", got)
	}
	if field(st, "NoNewPrivs") != "1" {
		t.Errorf("NoNewPrivs %q, want 1", field(st, "NoNewPrivs"))
	}
}

func TestNoNewPrivileges(t *testing.T) {
	b := open(t)
	p := b.pod()
	for _, c := range []struct {
		set  bool
		euid string
	}{{false, "euid 0"}, {true, "euid 1000"}} {
		got := p.output([]string{"/guest-suid", "ids"}, security(func(s *sctx) {
			s.RunAsUser, s.NoNewPrivs = &runtime.Int64Value{Value: 1000}, c.set
		}))
		if !strings.Contains(got, "uid 1000 "+c.euid+" ") {
			t.Errorf("no_new_privs %v: a set-user-ID program ran as %q, want %s", c.set, got, c.euid)
		}
	}
}

func TestSeccomp(t *testing.T) {
	b := open(t)
	p := b.pod()
	profile := func(kind runtime.SecurityProfile_ProfileType, ref string) func(*sctx) {
		return func(s *sctx) { s.Seccomp = &runtime.SecurityProfile{ProfileType: kind, LocalhostRef: ref} }
	}
	filter := func(fn func(*sctx)) string { b.Helper(); return field(p.procStatus(fn), "Seccomp") }
	if got := filter(profile(runtime.SecurityProfile_RuntimeDefault, "")); got != "2" {
		t.Errorf("default profile: Seccomp %q, want 2 (a filter)", got)
	}
	if got := filter(profile(runtime.SecurityProfile_Unconfined, "")); got != "0" {
		t.Errorf("unconfined: Seccomp %q, want 0", got)
	}
	local := filepath.Join(t.TempDir(), "no-mkdir.json")
	b.must(os.WriteFile(local, []byte(`{"defaultAction": "SCMP_ACT_ALLOW",
		"syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95}]}`), 0o600))
	c := p.run(sh("mkdir /tmp/x"), security(profile(runtime.SecurityProfile_Localhost, local)))
	if st := c.wait(); st.ExitCode == 0 || !strings.Contains(c.text(), "not supported") {
		t.Errorf("a profile of the node: mkdir ended with %d, %q", st.ExitCode, c.text())
	}
	broken := filepath.Join(t.TempDir(), "broken.json")
	b.must(os.WriteFile(broken, []byte(`{"defaultAction": `), 0o600))
	p.refuses(sh("true"), security(profile(runtime.SecurityProfile_Localhost, broken)), "broken.json")
}

// TestDefaultSeccompSockets: families that reach into the kernel's crypto
// code or the hypervisor are denied, the usual ones work.
func TestDefaultSeccompSockets(t *testing.T) {
	b := open(t)
	p := b.pod()
	def := security(func(s *sctx) {
		s.Seccomp = &runtime.SecurityProfile{ProfileType: runtime.SecurityProfile_RuntimeDefault}
	})
	c := p.run(sh("sleep 300"), def)
	for name, family := range map[string]int{"AF_ALG": unix.AF_ALG, "AF_VSOCK": unix.AF_VSOCK} {
		if got := strings.TrimSpace(c.exec("/guest", "socket", fmt.Sprint(family))); got == "ok" {
			t.Errorf("%s: opened, want it denied", name)
		}
	}
	for name, family := range map[string]int{"AF_UNIX": unix.AF_UNIX, "AF_INET": unix.AF_INET, "AF_INET6": unix.AF_INET6} {
		if got := strings.TrimSpace(c.exec("/guest", "socket", fmt.Sprint(family))); got != "ok" {
			t.Errorf("%s: %s", name, got)
		}
	}
	if got := c.exec("sh", "-c", "unshare -U true 2>&1 || echo denied"); !strings.Contains(got, "denied") {
		t.Errorf("a new user namespace: %q, want it denied", got)
	}
}

func TestMaskedAndReadonlyPaths(t *testing.T) {
	b := open(t)
	c := b.pod().run(sh("sleep 300"), security(func(s *sctx) {
		s.MaskedPaths = []string{"/proc/timer_list", "/proc/acpi", "/proc/not-there"}
		s.ReadonlyPaths = []string{"/proc/sys", "/proc/sysrq-trigger"}
	}))
	if got := c.exec("sh", "-c", "cat /proc/timer_list; ls /proc/acpi 2>/dev/null"); got != "" {
		t.Errorf("masked paths show %q", got)
	}
	if got := c.exec("sh", "-c", "echo 1 > /proc/sys/kernel/shm_rmid_forced || echo refused"); !strings.Contains(got, "refused") {
		t.Errorf("a read-only path was written: %q", got)
	}
}

func TestReadonlyRootfs(t *testing.T) {
	b := open(t)
	c := b.pod().run(sh("sleep 300"), security(func(s *sctx) { s.ReadonlyRootfs = true }))
	if got := c.exec("sh", "-c", "touch /x 2>&1 || true"); !strings.Contains(got, "Read-only file system") {
		t.Errorf("writing to a read-only root: %q", got)
	}
	c.exec("sh", "-c", "touch /dev/shm/x && echo x > /dev/null")
}

func TestPrivileged(t *testing.T) {
	b := open(t)
	p := b.pod(func(cfg *runtime.PodSandboxConfig) { cfg.Linux.SecurityContext.Privileged = true })
	c := p.run(sh("sleep 300"), security(func(s *sctx) { s.Privileged = true }))
	st := c.exec("cat", "/proc/self/status")
	if want := bits(unix.CAP_SYS_ADMIN, unix.CAP_NET_ADMIN, unix.CAP_SYS_MODULE); b.mask(st, "CapEff")&want != want {
		t.Errorf("CapEff %s lacks some of %#x", field(st, "CapEff"), want)
	}
	if field(st, "Seccomp") != "0" {
		t.Errorf("Seccomp %q, want 0", field(st, "Seccomp"))
	}
	c.exec("sh", "-c", "mkdir /mnt && mount -t tmpfs none /mnt && umount /mnt")
	if got := c.exec("sh", "-c", "grep ' /sys ' /proc/mounts"); !strings.Contains(got, " rw") {
		t.Errorf("/sys is %q, want it writable", got)
	}
	host, err := os.ReadDir("/dev")
	b.must(err)
	inside := c.exec("ls", "/dev")
	for _, e := range host {
		if e.Type()&os.ModeCharDevice != 0 && !strings.HasPrefix(e.Name(), "tty") && !strings.Contains(e.Name(), "ptmx") && !strings.Contains(e.Name(), "console") && !strings.Contains("\n"+inside, "\n"+e.Name()+"\n") {
			t.Errorf("device %s of the host is not there", e.Name())
		}
	}
	plain := b.pod()
	if _, err := plain.tryCreate(sh("true"), security(func(s *sctx) { s.Privileged = true })); err == nil {
		t.Error("a privileged container was created in a pod that is not")
	}
}

func TestDevices(t *testing.T) {
	b := open(t)
	p := b.pod()
	device := func(host, inside, perm string) edit {
		return func(c *runtime.ContainerConfig) {
			c.Devices = []*runtime.Device{{HostPath: host, ContainerPath: inside, Permissions: perm}}
		}
	}
	if got := p.output(sh("head -c 3 /dev/my-zero | od -An -tx1; echo x > /dev/my-zero && echo written"), device("/dev/zero", "/dev/my-zero", "rwm")); got != " 00 00 00\nwritten\n" {
		t.Errorf("device: %q", got)
	}
	// /dev/kmsg is not among the devices that every container may use.
	if _, err := os.Stat("/dev/kmsg"); err == nil {
		got := p.output(sh("echo x 2>/dev/null > /dev/my-log || echo refused"), device("/dev/kmsg", "/dev/my-log", "r"))
		if got != "refused\n" {
			t.Errorf("a device for reading was written: %q", got)
		}
	}
	p.refuses(sh("true"), device("/dev/no-such-device", "/dev/x", "rwm"), "/dev/no-such-device")
	if b.node != nil {
		p.refuses(sh("true"), device("/dev/null", "/dev/x", "rwx"), "rwx")
	}
}

func TestUsualDevices(t *testing.T) {
	b := open(t)
	got := b.pod().output(sh("cd /dev; for d in null zero full random urandom tty; do [ -c $d ] || echo no $d; done; for l in fd stdin stdout stderr ptmx; do [ -e $l ] || echo no $l; done; ls -d pts shm mqueue; ls"))
	if strings.Contains(got, "no ") || !strings.Contains(got, "pts\n") {
		t.Errorf("/dev: %q", got)
	}
	for _, name := range []string{"kmsg", "mem", "vda", "sda", "fuse"} {
		if strings.Contains(got, "\n"+name+"\n") {
			t.Errorf("/dev has the host's %s", name)
		}
	}
}
