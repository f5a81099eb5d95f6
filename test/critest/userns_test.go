package critest

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berthd/berth/test/images"
	"github.com/berthd/berth/test/node"
	"github.com/berthd/berth/test/stream"
)

// usersAt is where the user namespaces of these tests begin on the host.
const usersAt = 0x7a000000

func idMapping(inside, outside, length uint32) []*runtime.IDMapping {
	return []*runtime.IDMapping{{ContainerId: inside, HostId: outside, Length: length}}
}

// userNSOf is the user namespace that the kubelet would ask for.
func userNSOf(at uint32) *runtime.UserNamespace {
	return &runtime.UserNamespace{Mode: runtime.NamespaceMode_POD, Uids: idMapping(0, at, 65536), Gids: idMapping(0, at, 65536)}
}

func podNS(u *runtime.UserNamespace) func(*runtime.PodSandboxConfig) {
	return func(c *runtime.PodSandboxConfig) { c.Linux.SecurityContext.NamespaceOptions.UsernsOptions = u }
}

func containerNS(u *runtime.UserNamespace) edit {
	return func(c *runtime.ContainerConfig) { c.Linux.SecurityContext.NamespaceOptions.UsernsOptions = u }
}

// idmapped mounts a directory with the mappings of the user namespaces here.
func idmapped(host, inside string, edits ...func(*runtime.Mount)) edit {
	return mount(host, inside, append(edits, func(m *runtime.Mount) {
		m.UidMappings, m.GidMappings = idMapping(0, usersAt, 65536), idMapping(0, usersAt, 65536)
	})...)
}

// needsUserNS skips a test where the runtime has no user namespaces, which is what
// it says itself.
func (b *box) needsUserNS() {
	b.Helper()
	st, err := b.client.Status(b.ctx, &runtime.StatusRequest{})
	b.must(err)
	for _, h := range st.RuntimeHandlers {
		if h.Name == "" && h.GetFeatures().GetUserNamespaces() {
			if !st.GetFeatures().GetUserNamespacesHostNetwork() {
				b.Error("user namespaces without user_namespaces_host_network")
			}
			return
		}
	}
	_, err = b.client.Run(b.ctx, b.podConfig(podNS(userNSOf(usersAt))))
	b.refused(err, codes.InvalidArgument, "userns_options")
	b.Skipf("no user namespaces here: %v", err)
}

// users opens a test in a pod with a user namespace.
func users(t *testing.T, edits ...func(*runtime.PodSandboxConfig)) *pod {
	t.Helper()
	b := open(t)
	b.needsUserNS()
	return b.pod(append([]func(*runtime.PodSandboxConfig){podNS(userNSOf(usersAt))}, edits...)...)
}

const idMap = "0 2046820352 65536"

func words(s string) string { return strings.Join(strings.Fields(s), " ") }

// owner is who owns a file on the host.
func (b *box) owner(path string) string {
	b.Helper()
	var st unix.Stat_t
	b.must(unix.Lstat(path, &st))
	return fmt.Sprintf("%d:%d", st.Uid, st.Gid)
}

func TestUserNamespace(t *testing.T) {
	p := users(t)
	c := p.run(sh("sleep 300"))
	for _, f := range []string{"uid_map", "gid_map"} {
		if got := words(c.exec("cat", "/proc/self/"+f)); got != idMap {
			t.Errorf("%s is %q, want %q", f, got, idMap)
		}
	}
	// The same namespace for another container, which says so itself, as the
	// kubelet does.
	d := p.run(sh("sleep 300"), containerNS(userNSOf(usersAt)))
	ns := func(c *container, kind string) string { return c.exec("readlink", "/proc/self/ns/"+kind) }
	own, err := os.Readlink("/proc/self/ns/user")
	p.must(err)
	if a, b := ns(c, "user"), ns(d, "user"); a != b || strings.TrimSpace(a) == own {
		t.Errorf("user namespaces %q and %q, the host's is %q", a, b, own)
	}
	// Owners of the image's files and of what berth mounts are the container's.
	for _, path := range []string{"/", "/bin/busybox", "/etc/passwd", "/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/dev/shm", "/proc/1", "/dev/pts"} {
		if got := c.exec("stat", "-c", "%u:%g", path); got != "0:0\n" {
			t.Errorf("%s belongs to %q inside", path, got)
		}
	}
	// Its root is nobody on the host, and may do what root may inside.
	if st, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", c.pid())); p.node != nil && (err != nil || words(field(string(st), "Uid")) != strings.TrimSpace(strings.Repeat("2046820352 ", 4))) {
		t.Errorf("process on the host: %v, Uid %q", err, field(string(st), "Uid"))
	}
	c.exec("sh", "-c", "echo x > /new && chown 12:34 /new && chmod 600 /etc/passwd && mkdir /dir && mv /dir /moved && rm /bin/ls && echo 127.0.0.9 own >> /etc/hosts"+
		" && echo y > /dev/shm/f && echo out > /proc/self/fd/1 && echo err > /dev/stderr && mknod /fifo p && su app -c 'echo z > /tmp/of-app'")
	if got := c.exec("sh", "-c", "stat -c %u:%g:%a /new /etc/passwd /moved /tmp/of-app; cat /etc/hosts | tail -1; test -e /bin/ls || echo gone"); got != "12:34:644\n0:0:600\n0:0:755\n1000:1001:644\n127.0.0.9 own\ngone\n" {
		t.Errorf("what was written: %q", got)
	}
	if got := d.exec("sh", "-c", "test -e /new || cat /dev/shm/f"); got != "y\n" {
		t.Errorf("seen from the other container: %q", got)
	}
	want := p.cfg.Linux.SecurityContext.NamespaceOptions.UsernsOptions
	if got := p.status().GetLinux().GetNamespaces().GetOptions().GetUsernsOptions(); got.String() != want.String() {
		t.Errorf("status tells %v, want %v", got, want)
	}
	if own, err := os.ReadFile("/proc/self/mountinfo"); err != nil || strings.Contains(string(own), c.id) {
		t.Errorf("the host has a mount of the container: %v", err)
	}
}

// pid is the container's first process, by the verbose status; 0 of runtimes that
// do not tell.
func (c *container) pid() int {
	c.Helper()
	var info struct{ Pid int }
	c.info(&info)
	return info.Pid
}

// info reads the verbose status into v, which stays as it is of runtimes that have
// none.
func (c *container) info(v any) {
	c.Helper()
	r, err := c.client.ContainerStatus(c.ctx, &runtime.ContainerStatusRequest{ContainerId: c.id, Verbose: true})
	c.must(err)
	if text := r.Info["info"]; text != "" {
		c.must(json.Unmarshal([]byte(text), v))
	}
}

// TestUserNamespaceLayer: what a container writes is stored with the owners that
// it sees, so that nothing had to be changed for it before.
func TestUserNamespaceLayer(t *testing.T) {
	p := users(t)
	p.ours()
	c := p.run(sh("echo x > /mine && chown 7:8 /mine && chmod 4755 /guest && sleep 300"))
	p.until("file in a snapshot", func() bool {
		found, err := filepath.Glob(filepath.Join(p.node.StateDir, "snapshots", "*", "upper", "mine"))
		return err == nil && len(found) == 1 && p.owner(found[0]) == "7:8" && p.owner(filepath.Dir(found[0])) == "0:0"
	})
	if got := c.exec("stat", "-c", "%u:%g", "/mine"); got != "7:8\n" {
		t.Errorf("inside: %q", got)
	}
	// The image's own is untouched, and still shared.
	if got := p.box.pod().output(sh("stat -c %u:%g:%a /guest; test -e /mine || echo absent")); got != "0:0:755\nabsent\n" {
		t.Errorf("in a pod without a user namespace: %q", got)
	}
}

func TestUserNamespaceUsers(t *testing.T) {
	p := users(t)
	got := p.output([]string{"/guest", "ids"}, security(func(s *sctx) {
		s.RunAsUser, s.RunAsGroup, s.SupplementalGroups = &runtime.Int64Value{Value: 1234}, &runtime.Int64Value{Value: 5}, []int64{65535}
	}))
	if !strings.HasPrefix(got, "uid 1234 euid 1234 gid 5 ") || !strings.Contains(got, "65535") {
		t.Errorf("ran as %q", got)
	}
	if got := p.output([]string{"/guest-suid", "ids"}, security(func(s *sctx) { s.RunAsUser = &runtime.Int64Value{Value: 1000} })); !strings.HasPrefix(got, "uid 1000 euid 0 ") {
		t.Errorf("a set-user-ID program of the image ran as %q", got)
	}
	// A program may write to its own output by name whoever it runs as.
	c := p.run(sh("echo one > /dev/stdout; echo two > /dev/stderr"), security(func(s *sctx) { s.RunAsUser = &runtime.Int64Value{Value: 1000} }))
	if st := c.wait(); st.ExitCode != 0 || c.text() != "one\ntwo\n" || st.GetUser().GetLinux().GetUid() != 1000 {
		t.Errorf("exit code %d, printed %q, user %v", st.ExitCode, c.text(), st.GetUser())
	}
	p.refuses(sh("true"), security(func(s *sctx) { s.RunAsUser = &runtime.Int64Value{Value: 65536} }), "65536", "65535")
	p.refuses(sh("true"), security(func(s *sctx) { s.SupplementalGroups = []int64{70000} }), "70000", "65535")
}

// TestUserNamespaceVolume: files of a volume keep their owners on disk when it is
// mounted with mappings, and are nobody's when it is not.
func TestUserNamespaceVolume(t *testing.T) {
	p := users(t)
	dir := p.volume()
	p.must(os.WriteFile(filepath.Join(dir, "file"), []byte("on the host\n"), 0o640))
	p.must(os.Chown(filepath.Join(dir, "file"), 1000, 1001))
	if got := p.output(sh("stat -c %u:%g /v/file && cat /v/file && echo new > /v/mine && chown 3:4 /v/mine && stat -c %u:%g /v/mine"), idmapped(dir, "/v")); got != "1000:1001\non the host\n3:4\n" {
		t.Errorf("with mappings: %q", got)
	}
	if got := p.owner(filepath.Join(dir, "mine")); got != "3:4" {
		t.Errorf("on the host the new file belongs to %s", got)
	}
	if got := p.output(sh("stat -c %u:%g /v/file; cat /v/file 2>/dev/null || echo refused; touch /v/mine 2>/dev/null || echo refused"), mount(dir, "/v")); got != "65534:65534\nrefused\nrefused\n" {
		t.Errorf("without mappings: %q", got)
	}
	if got := p.output(sh("touch /v/file 2>&1 || stat -c %u:%g /v/file"), idmapped(dir, "/v", func(m *runtime.Mount) { m.Readonly = true })); !strings.Contains(got, "Read-only") || !strings.HasSuffix(got, "1000:1001\n") {
		t.Errorf("read-only: %q", got)
	}
	file := func(m *runtime.Mount) { m.HostPath = filepath.Join(dir, "file") }
	if got := p.output(sh("stat -c %u:%g /etc/one"), idmapped(dir, "/etc/one", file)); got != "1000:1001\n" {
		t.Errorf("one file: %q", got)
	}
}

// TestMountMappings: mappings are the mount's own, whatever the pod has.
func TestMountMappings(t *testing.T) {
	b := open(t)
	p := b.pod()
	dir := b.volume()
	c, err := p.tryCreate(sh("stat -c %u:%g /v/f"), mount(dir, "/v", func(m *runtime.Mount) {
		m.UidMappings, m.GidMappings = idMapping(0, 5000, 10), idMapping(0, 6000, 10)
	}))
	if err != nil {
		b.refused(err, codes.InvalidArgument, "mounts[0]", "uidMappings", "mountExtensions.idmap")
		t.Skipf("no ID-mapped mounts here: %v", err)
	}
	c.start()
	if c.wait(); c.text() != "5000:6000\n" {
		t.Errorf("the host's root owns the file, inside it belongs to %q", c.text())
	}
	p.refuses(sh("true"), mount(dir, "/v", func(m *runtime.Mount) { m.UidMappings = idMapping(0, 5000, 10) }), "mounts[0]", "gidMappings")
}

// TestUserNamespacePrivate: what opens the way to a container's root for its user
// namespace opens nothing else.
func TestUserNamespacePrivate(t *testing.T) {
	p := users(t)
	p.ours()
	c := p.run(sh("sleep 300"))
	for path, want := range map[string]os.FileMode{"": 0o711, "c": 0o711, "ns": 0o700, "s": 0o700, "oci": 0o700, "tty": 0o700, "pods": 0o700, "c/" + c.id: 0o710, "c/" + c.id + "/config.json": 0o600} {
		st, err := os.Stat(filepath.Join(p.node.RunDir, path))
		p.must(err)
		if got := st.Mode().Perm(); got != want {
			t.Errorf("%s in the run directory has mode %04o, want %04o", path, got, want)
		}
	}
	if got := p.owner(filepath.Join(p.node.RunDir, "c", c.id)); got != fmt.Sprintf("0:%d", usersAt) {
		t.Errorf("the bundle belongs to %s", got)
	}
	// Of a pod without a user namespace nothing is opened.
	d := p.box.pod().run(sh("sleep 300"))
	if st, err := os.Stat(filepath.Join(p.node.RunDir, "c", d.id)); err != nil || st.Mode().Perm() != 0o700 {
		t.Errorf("another pod's bundle: %v, %v", st.Mode(), err)
	}
}

func TestUserNamespaceVolumeRefused(t *testing.T) {
	p := users(t)
	dir := p.volume()
	maps := func(uids, gids []*runtime.IDMapping) edit {
		return mount(dir, "/v", func(m *runtime.Mount) { m.UidMappings, m.GidMappings = uids, gids })
	}
	good := idMapping(0, usersAt, 65536)
	for name, c := range map[string]struct {
		e     edit
		parts []string
	}{
		"uids only": {maps(good, nil), []string{"mounts[0]", "gidMappings"}},
		"gids only": {maps(nil, good), []string{"mounts[0]", "uidMappings"}},
		"empty":     {maps(idMapping(0, usersAt, 0), good), []string{"uidMappings[0].length"}},
		"too high":  {maps(good, idMapping(0, 1<<32-10, 10)), []string{"gidMappings[0]", "4294967294"}},
		"no such file system": {mount("/proc/sys/kernel", "/v", func(m *runtime.Mount) { m.UidMappings, m.GidMappings = good, good }),
			[]string{"uidMappings", "/proc/sys/kernel"}},
		"bidirectional": {idmapped(dir, "/v", propagation(runtime.MountPropagation_PROPAGATION_BIDIRECTIONAL)), []string{"propagation"}},
		"another one for an image": {p.imageVolume(images.Guest, "/v", "", func(m *runtime.Mount) {
			m.UidMappings, m.GidMappings = idMapping(0, 5, 5), good
		}), []string{"uidMappings", "mounts[0]"}},
	} {
		t.Run(name, func(t *testing.T) { p.with(t).refuses(sh("true"), c.e, c.parts...) })
	}
	// No user namespace, no mappings for an image.
	p.box.pod().refuses(sh("true"), p.imageVolume(images.Guest, "/v", "", func(m *runtime.Mount) { m.UidMappings, m.GidMappings = good, good }), "uidMappings")
}

func TestUserNamespaceImageVolume(t *testing.T) {
	p := users(t)
	p.pulled(images.Layers)
	p.pulled(images.Guest)
	mapped := func(m *runtime.Mount) {
		m.UidMappings, m.GidMappings = idMapping(0, usersAt, 65536), idMapping(0, usersAt, 65536)
	}
	got := p.output(sh("stat -c %u:%g /v/tree/a /v/kept /one/guest /sub; cat /v/kept; touch /v/x /one/x 2>&1; /one/guest ids"),
		p.imageVolume(images.Layers, "/v", "", mapped), p.imageVolume(images.Guest, "/one", ""), p.imageVolume(images.Layers, "/sub", "hidden"))
	if !strings.HasPrefix(got, "12:34\n0:0\n0:0\n0:0\n2\n") || strings.Count(got, "Read-only") != 2 || !strings.Contains(got, "uid 0 ") {
		t.Errorf("inside: %q", got)
	}
}

// TestUserNamespaceProcess: terminals, exec in all forms, signals.
func TestUserNamespaceProcess(t *testing.T) {
	p := users(t)
	c := p.run(sh("trap 'echo bye > /dev/stdout; exit 7' TERM; tty; stat -c %u /dev/console; while :; do sleep 0.1; done"), func(c *runtime.ContainerConfig) { c.Tty = true })
	c.sees("/dev/")
	c.stop(10)
	if st := c.wait(); st.ExitCode != 7 || !strings.Contains(c.text(), "0\r\n") || !strings.Contains(c.text(), "bye") {
		t.Errorf("exit code %d, %q", st.ExitCode, c.text())
	}
	d := p.run(sh("sleep 300"))
	if got := d.exec("sh", "-c", "id -u; cat /proc/self/uid_map; echo x > /dev/stderr"); words(got) != "0 "+idMap {
		t.Errorf("ExecSync: %q", got)
	}
	for _, tty := range []bool{false, true} {
		code, out, errs := d.stream(stream.SPDY, tty, sh("cat /proc/self/uid_map > /dev/stdout; id -u; stat -c %u /dev/stdin 2>&1 > /dev/null")...).wait()
		if code != 0 || words(out) != idMap+" 0" || errs != "" {
			t.Errorf("exec with terminal %v: code %d, %q, %q", tty, code, out, errs)
		}
	}
}

// TestUserNamespacePID: the pod's init and a target's processes are in the same
// user namespace.
func TestUserNamespacePID(t *testing.T) {
	p := users(t, func(c *runtime.PodSandboxConfig) {
		c.Linux.SecurityContext.NamespaceOptions.Pid = runtime.NamespaceMode_POD
	})
	pid := func(mode runtime.NamespaceMode, target string) edit {
		return security(func(s *sctx) { s.NamespaceOptions.Pid, s.NamespaceOptions.TargetId = mode, target })
	}
	c := p.run(sh("sleep 301"), pid(runtime.NamespaceMode_POD, ""))
	if got := c.exec("sh", "-c", "stat -c %u /proc/1; cat /proc/1/comm; readlink /proc/self/ns/user"); !strings.HasPrefix(got, "65535\n") || !strings.Contains(got, "berth-init") && p.node != nil {
		t.Errorf("process 1 of the pod: %q", got)
	}
	d := p.run(sh("sleep 302"), pid(runtime.NamespaceMode_CONTAINER, ""))
	e := p.run(sh("sleep 303"), pid(runtime.NamespaceMode_TARGET, d.id))
	if got := e.exec("ps", "-o", "pid,args"); !strings.Contains(got, "1 sleep 302") {
		t.Errorf("processes of the target: %q", got)
	}
	// Its root is root over the target's, not only a name.
	e.exec("sh", "-c", "readlink /proc/1/exe && kill -CONT 1")
	p.refuses(sh("true"), pid(runtime.NamespaceMode_NODE, ""), "namespace_options.pid", "NODE")
}

func TestUserNamespaceNetwork(t *testing.T) {
	p := users(t, func(c *runtime.PodSandboxConfig) {
		c.Linux.Sysctls = map[string]string{"net.ipv4.ip_unprivileged_port_start": "123", "net.ipv4.ping_group_range": "3 9", "kernel.msgmax": "16384", "kernel.shm_rmid_forced": "1", "fs.mqueue.msg_max": "99"}
	})
	c := p.run([]string{"/guest", "http", ":8080", "from inside"})
	c.sees("serving on")
	got := c.exec("sh", "-c", "cd /proc/sys && cat net/ipv4/ip_unprivileged_port_start net/ipv4/ping_group_range kernel/msgmax kernel/shm_rmid_forced fs/mqueue/msg_max")
	if words(got) != "123 3 9 16384 1 99" {
		t.Errorf("sysctls: %q", words(got))
	}
	if got := p.fetch("http://" + net.JoinHostPort(p.status().GetNetwork().GetIp(), "8080")); !strings.Contains(got, "from inside") {
		t.Errorf("over the network: %q", got)
	}
	f, err := stream.DialForward(p.ctx, p.forward())
	p.must(err)
	defer f.Close()
	data, _, err := f.Open(8080)
	p.must(err)
	if got := get(t, data); !strings.Contains(got, "from inside") {
		t.Errorf("forwarded: %q", got)
	}
	st, err := p.client.PodSandboxStats(p.ctx, &runtime.PodSandboxStatsRequest{PodSandboxId: p.id})
	p.must(err)
	if n := st.GetStats().GetLinux().GetNetwork().GetDefaultInterface(); n.GetName() == "" || n.GetRxBytes().GetValue() == 0 {
		t.Errorf("network statistics: %v", n)
	}
	// Who is root of the network namespace may change it.
	p.output(sh("ip link set lo down && ip link set lo up && hostname other && hostname"), security(func(s *sctx) {
		s.Capabilities = &runtime.Capability{AddCapabilities: []string{"NET_ADMIN", "SYS_ADMIN"}}
	}))
	_, err = p.client.Run(p.ctx, p.podConfig(podNS(userNSOf(usersAt)), func(c *runtime.PodSandboxConfig) {
		c.Linux.Sysctls = map[string]string{"net.ipv4.ping_group_range": "0 70000"}
	}))
	p.refused(err, codes.InvalidArgument, "net.ipv4.ping_group_range", "65535")
}

// TestUserNamespaceOfHost: with the host's network, or IPC, what belongs to those
// is mounted from the host.
func TestUserNamespaceOfHost(t *testing.T) {
	p := users(t, func(c *runtime.PodSandboxConfig) {
		c.Hostname = ""
		c.Linux.SecurityContext.NamespaceOptions.Network, c.Linux.SecurityContext.NamespaceOptions.Ipc = runtime.NamespaceMode_NODE, runtime.NamespaceMode_NODE
	})
	host := security(func(s *sctx) {
		s.NamespaceOptions.Network, s.NamespaceOptions.Ipc = runtime.NamespaceMode_NODE, runtime.NamespaceMode_NODE
	})
	net, err := os.Readlink("/proc/self/ns/net")
	p.must(err)
	got := p.output(sh("readlink /proc/self/ns/net; cat /proc/self/uid_map; touch /sys/x 2>&1; touch /sys/fs/x 2>&1; ls -d /sys/class/net/lo /sys/fs/cgroup; hostname other 2>&1; true"), host)
	if !strings.HasPrefix(got, net+"\n") || words(strings.Split(got, "\n")[1]) != idMap || !strings.Contains(got, "/sys/class/net/lo\n/sys/fs/cgroup\n") ||
		strings.Count(got, "touch: ") != 2 || !strings.Contains(got, "hostname: ") {
		t.Errorf("inside: %q", got)
	}
	name, err := os.Hostname()
	if err != nil || name == "other" {
		t.Errorf("the host's name is %q, %v", name, err)
	}
}

// TestUserNamespacePrivileged: a privileged container is privileged over what its
// user namespace owns.
func TestUserNamespacePrivileged(t *testing.T) {
	p := users(t, func(c *runtime.PodSandboxConfig) { c.Linux.SecurityContext.Privileged = true })
	c := p.run(sh("sleep 300"), security(func(s *sctx) { s.Privileged = true }))
	got := c.exec("sh", "-c", "mount -t tmpfs none /tmp && mount | grep -c ' /tmp '; test -c /dev/null && echo x > /dev/null && echo device; cat /proc/self/uid_map; echo 1 > /proc/sys/kernel/panic_on_oops; echo c > /proc/sysrq-trigger; true")
	if words(got) != "1 device "+idMap {
		t.Errorf("inside: %q", words(got))
	}
	if own, err := os.ReadFile("/proc/self/mountinfo"); err != nil || strings.Contains(string(own), c.id) {
		t.Errorf("the host has a mount of the container: %v", err)
	}
}

// TestUserNamespaceDevice: a device comes by its own name and by another.
func TestUserNamespaceDevice(t *testing.T) {
	p := users(t)
	got := p.output(sh("head -c 3 /dev/own | wc -c; head -c 4 /dev/zero | wc -c; stat -c %t:%T /dev/own /dev/null"), func(c *runtime.ContainerConfig) {
		c.Devices = []*runtime.Device{{HostPath: "/dev/zero", ContainerPath: "/dev/own", Permissions: "rw"}, {HostPath: "/dev/null", ContainerPath: "/dev/null", Permissions: "rw"}}
	})
	if words(got) != "3 4 1:5 1:3" {
		t.Errorf("inside: %q", got)
	}
}

// TestUserNamespaceCgroup: limits hold, and can be changed.
func TestUserNamespaceCgroup(t *testing.T) {
	p := users(t)
	c := p.run(sh("sleep 300"), func(c *runtime.ContainerConfig) { c.Linux.Resources.MemoryLimitInBytes = 64 << 20 })
	limit := func() string {
		return words(c.exec("sh", "-c", "cat /sys/fs/cgroup/memory.max 2>/dev/null || cat /sys/fs/cgroup/memory/memory.limit_in_bytes"))
	}
	if got := limit(); got != "67108864" {
		t.Errorf("memory limit inside: %q", got)
	}
	_, err := p.client.UpdateContainerResources(p.ctx, &runtime.UpdateContainerResourcesRequest{ContainerId: c.id, Linux: &runtime.LinuxContainerResources{MemoryLimitInBytes: 96 << 20}})
	p.must(err)
	if got := limit(); got != "100663296" {
		t.Errorf("memory limit inside after the update: %q", got)
	}
	c.exec("sh", "-c", "d=/sys/fs/cgroup; test -d $d/memory && d=$d/memory; ! mkdir $d/x 2>/dev/null")
	if st := p.run([]string{"/guest", "eat", "64"}, func(c *runtime.ContainerConfig) { c.Linux.Resources.MemoryLimitInBytes = 16 << 20 }).wait(); st.Reason != "OOMKilled" {
		t.Errorf("over the limit: %s, exit code %d", st.Reason, st.ExitCode)
	}
}

// TestUserNamespaceSmall: not the 65536 users that the kubelet always gives.
func TestUserNamespaceSmall(t *testing.T) {
	b := open(t)
	b.needsUserNS()
	small := &runtime.UserNamespace{Mode: runtime.NamespaceMode_POD, Uids: idMapping(0, usersAt, 2), Gids: idMapping(0, usersAt+7, 3)}
	p := b.pod(podNS(small), func(c *runtime.PodSandboxConfig) {
		c.Linux.SecurityContext.NamespaceOptions.Pid = runtime.NamespaceMode_POD
	})
	c := p.run(sh("sleep 300"), security(func(s *sctx) { s.NamespaceOptions.Pid = runtime.NamespaceMode_POD }))
	if got := c.exec("sh", "-c", "cat /proc/self/uid_map /proc/self/gid_map; stat -c %u:%g /proc/1"); words(got) != "0 2046820352 2 0 2046820359 3 1:2" {
		t.Errorf("inside: %q", words(got))
	}
	if got := p.output([]string{"tty"}, func(c *runtime.ContainerConfig) { c.Tty = true }); !strings.HasPrefix(got, "/dev/") {
		t.Errorf("terminal: %q", got)
	}
}

func TestUserNamespaceRefused(t *testing.T) {
	b := open(t)
	const field = "linux.security_context.namespace_options.userns_options"
	one := idMapping(0, usersAt, 65536)
	two := append(idMapping(0, usersAt, 10), idMapping(10, usersAt+10, 10)...)
	ns := func(mode runtime.NamespaceMode, uids, gids []*runtime.IDMapping) *runtime.UserNamespace {
		return &runtime.UserNamespace{Mode: mode, Uids: uids, Gids: gids}
	}
	const pod, host = runtime.NamespaceMode_POD, runtime.NamespaceMode_NODE
	for name, c := range map[string]struct {
		u     *runtime.UserNamespace
		parts []string
	}{
		"mode CONTAINER":    {ns(runtime.NamespaceMode_CONTAINER, one, one), []string{field + ".mode", "CONTAINER"}},
		"mode TARGET":       {ns(runtime.NamespaceMode_TARGET, one, one), []string{field + ".mode", "TARGET"}},
		"mode unknown":      {ns(9, one, one), []string{field + ".mode", "9"}},
		"no mapping":        {ns(pod, nil, nil), []string{field + ".uids"}},
		"no gids":           {ns(pod, one, nil), []string{field + ".gids"}},
		"two uids":          {ns(pod, two, one), []string{field + ".uids", "2"}},
		"two gids":          {ns(pod, one, two), []string{field + ".gids", "2"}},
		"root not mapped":   {ns(pod, idMapping(1, usersAt, 9), one), []string{field + ".uids[0].container_id"}},
		"empty":             {ns(pod, one, idMapping(0, usersAt, 0)), []string{field + ".gids[0].length"}},
		"too high":          {ns(pod, idMapping(0, 1<<32-65536, 65536), one), []string{field + ".uids[0]", "4294967294"}},
		"the node's root":   {ns(pod, one, idMapping(0, 0, 65536)), []string{field + ".gids[0].host_id"}},
		"NODE with mapping": {ns(host, one, one), []string{field, "NODE"}},
	} {
		t.Run(name, func(t *testing.T) {
			b := b.with(t)
			_, err := b.client.Run(b.ctx, b.podConfig(podNS(c.u)))
			b.refused(err, codes.InvalidArgument, c.parts...)
		})
	}
	b.needsUserNS()
	_, err := b.client.Run(b.ctx, b.podConfig(podNS(userNSOf(usersAt)), func(c *runtime.PodSandboxConfig) { c.Linux.SecurityContext.NamespaceOptions.Pid = host }))
	b.refused(err, codes.InvalidArgument, "namespace_options.pid", "NODE")
	with, without := b.pod(podNS(userNSOf(usersAt))), b.pod(podNS(ns(host, nil, nil)))
	with.refuses(sh("true"), containerNS(userNSOf(usersAt+65536)), field, "65536")
	with.refuses(sh("true"), containerNS(ns(host, nil, nil)), field)
	with.refuses(sh("true"), containerNS(ns(runtime.NamespaceMode_CONTAINER, one, one)), field+".mode")
	without.refuses(sh("true"), containerNS(userNSOf(usersAt)), field)
	if got := without.output(sh("cat /proc/self/uid_map"), containerNS(ns(host, nil, nil))); words(got) != "0 0 4294967295" {
		t.Errorf("mode NODE: %q", got)
	}
}

// TestUserNamespaceRestart: a pod outlives berthd, also when the book is lost, and
// everything of it goes in the end.
func TestUserNamespaceRestart(t *testing.T) {
	b := open(t)
	b.ours()
	b.needsUserNS()
	own := b.ownNode(b.ctx, node.Options{})
	n := own.node
	own.pulled(images.Busybox)
	p := own.pod(podNS(userNSOf(usersAt)))
	c := p.run(sh("sleep 300"))
	was := c.exec("readlink", "/proc/self/ns/user")
	for _, lost := range []bool{false, true} {
		b.must(n.Kill())
		if lost {
			book := filepath.Join(n.StateDir, "book.db")
			raw, err := os.ReadFile(book)
			b.must(err)
			b.must(os.WriteFile(book, append(make([]byte, 16384), raw[16384:]...), 0o600))
		}
		b.must(n.Start(b.ctx))
		if got := c.exec("readlink", "/proc/self/ns/user"); got != was {
			t.Errorf("book lost %v: user namespace %q, before %q", lost, got, was)
		}
		if lost {
			own.pulled(images.Busybox)
		}
		if got := p.output(sh("cat /proc/self/uid_map; readlink /proc/self/ns/user")); words(got) != idMap+" "+words(was) {
			t.Errorf("book lost %v: a new container: %q", lost, got)
		}
		if got := p.status().GetLinux().GetNamespaces().GetOptions().GetUsernsOptions(); got.GetUids()[0].GetHostId() != usersAt {
			t.Errorf("book lost %v: status tells %v", lost, got)
		}
	}
	// A pin that is gone makes a pod that is not ready, and is no hindrance.
	b.must(n.Kill())
	b.must(unix.Unmount(filepath.Join(n.RunDir, "ns", p.id, "user"), unix.MNT_DETACH))
	b.must(n.Start(b.ctx))
	ctx, cancel := context.WithTimeout(b.ctx, 20*time.Second)
	defer cancel()
	for p.status().State == runtime.PodSandboxState_SANDBOX_READY && ctx.Err() == nil {
		time.Sleep(50 * time.Millisecond)
	}
	if st := p.status(); st.State != runtime.PodSandboxState_SANDBOX_NOTREADY {
		t.Errorf("without its user namespace the pod is %v", st.State)
	}
}
