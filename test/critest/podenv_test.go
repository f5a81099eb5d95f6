package critest

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berthd/berth/test/images"
	"github.com/berthd/berth/test/node"
)

// fetch gets a URL, trying again until the server is there.
func (b *box) fetch(url string) string {
	b.Helper()
	client := http.Client{Timeout: 2 * time.Second}
	var last error
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		r, err := client.Get(url)
		if err != nil {
			last = err
			continue
		}
		body, err := io.ReadAll(r.Body)
		_ = r.Body.Close()
		b.must(err)
		return string(body)
	}
	b.Fatalf("%s: %v", url, last)
	return ""
}

// freePort returns a TCP port on which nobody listens at this moment.
func (b *box) freePort() int32 {
	b.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	b.must(err)
	defer l.Close()
	return int32(l.Addr().(*net.TCPAddr).Port)
}

func TestPodHTTP(t *testing.T) {
	b := open(t)
	p := b.pod()
	c := p.run([]string{"/guest", "http", ":80", "hello"})
	want := "hello from " + p.cfg.Hostname + "\n"
	if got := b.fetch("http://" + p.status().Network.Ip + "/"); got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if got := c.exec("wget", "-q", "-O-", "http://127.0.0.1/"); got != want {
		t.Errorf("over loopback: got %q, want %q", got, want)
	}
	second := p.run(sh("sleep 300"))
	if got := second.exec("wget", "-q", "-O-", "http://127.0.0.1/"); got != want {
		t.Errorf("from the other container of the pod: got %q, want %q", got, want)
	}
}

func TestPodPortMapping(t *testing.T) {
	b := open(t)
	port := b.freePort()
	p := b.pod(func(cfg *runtime.PodSandboxConfig) {
		cfg.PortMappings = []*runtime.PortMapping{
			{Protocol: runtime.Protocol_TCP, ContainerPort: 80, HostPort: port},
			{Protocol: runtime.Protocol_TCP, ContainerPort: 81}, // no host port: nothing to map
		}
	})
	p.run([]string{"/guest", "http", ":80", "mapped"})
	if got := b.fetch(fmt.Sprintf("http://127.0.0.1:%d/", port)); !strings.HasPrefix(got, "mapped from") {
		t.Errorf("through the host's port: got %q", got)
	}
}

func TestPodHostname(t *testing.T) {
	b := open(t)
	p := b.pod(func(cfg *runtime.PodSandboxConfig) { cfg.Hostname = "a-name.with-dots" })
	if got := p.output(sh("hostname; cat /proc/sys/kernel/hostname; cat /etc/hostname")); got != strings.Repeat("a-name.with-dots\n", 3) {
		t.Errorf("got %q", got)
	}
	hosts := p.output(sh("cat /etc/hosts"))
	if !strings.Contains(hosts, "localhost") {
		t.Errorf("/etc/hosts does not know localhost: %q", hosts)
	}
}

func TestPodDNS(t *testing.T) {
	b := open(t)
	p := b.pod(func(cfg *runtime.PodSandboxConfig) {
		cfg.DnsConfig = &runtime.DNSConfig{
			Servers: []string{"10.11.12.13", "10.11.12.14"}, Searches: []string{"one.example", "two.example"}, Options: []string{"ndots:5", "edns0"},
		}
	})
	got := p.output(sh("cat /etc/resolv.conf"))
	for _, want := range []string{"nameserver 10.11.12.13\nnameserver 10.11.12.14\n", "search one.example two.example\n", "options ndots:5 edns0\n"} {
		if !strings.Contains(got, want) {
			t.Errorf("resolv.conf %q lacks %q", got, want)
		}
	}
	host, err := os.ReadFile("/etc/resolv.conf")
	b.must(err)
	if got := b.pod().output(sh("cat /etc/resolv.conf")); got != string(host) {
		t.Errorf("without a DNS configuration: got %q, want the host's %q", got, host)
	}
}

func TestPodSysctls(t *testing.T) {
	b := open(t)
	p := b.pod(func(cfg *runtime.PodSandboxConfig) {
		cfg.Linux.Sysctls = map[string]string{
			"net.ipv4.ip_unprivileged_port_start": "123", "kernel.shm_rmid_forced": "1", "kernel.msgmax": "16384", "fs.mqueue.msg_max": "99",
		}
	})
	got := p.output(sh("cd /proc/sys && cat net/ipv4/ip_unprivileged_port_start kernel/shm_rmid_forced kernel/msgmax fs/mqueue/msg_max"))
	if want := "123\n1\n16384\n99\n"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

// namespaces returns the inode names of the namespaces of a new process in c.
func (c *container) namespaces() map[string]string {
	c.Helper()
	out := map[string]string{}
	for _, line := range strings.Fields(c.exec("sh", "-c", "cd /proc/self/ns && for n in net ipc uts pid mnt; do readlink $n; done")) {
		kind, _, _ := strings.Cut(line, ":")
		out[kind] = line
	}
	return out
}

// hostNamespace returns the inode name of a namespace of the test itself.
func (b *box) hostNamespace(kind string) string {
	b.Helper()
	s, err := os.Readlink("/proc/self/ns/" + kind)
	b.must(err)
	return s
}

func modes(net, pid, ipc runtime.NamespaceMode) *runtime.NamespaceOption {
	return &runtime.NamespaceOption{Network: net, Pid: pid, Ipc: ipc}
}

func TestPodNamespaces(t *testing.T) {
	b := open(t)
	const (
		podMode  = runtime.NamespaceMode_POD
		own      = runtime.NamespaceMode_CONTAINER
		nodeMode = runtime.NamespaceMode_NODE
	)
	for _, c := range []struct {
		name                string
		options             *runtime.NamespaceOption
		host, shared, apart []string // kinds that are the host's, the pod's, each container's own
	}{
		{"all the pod's", modes(podMode, podMode, podMode), nil, []string{"net", "ipc", "uts", "pid"}, []string{"mnt"}},
		{"own PID", modes(podMode, own, podMode), nil, []string{"net", "ipc", "uts"}, []string{"pid", "mnt"}},
		{"host network", modes(nodeMode, own, podMode), []string{"net"}, []string{"ipc"}, []string{"pid", "mnt"}},
		{"host PID", modes(podMode, nodeMode, podMode), []string{"pid"}, []string{"net", "ipc", "uts"}, []string{"mnt"}},
		{"host IPC", modes(podMode, own, nodeMode), []string{"ipc"}, []string{"net", "uts"}, []string{"pid", "mnt"}},
		{"all the host's", modes(nodeMode, nodeMode, nodeMode), []string{"net", "pid", "ipc"}, nil, []string{"mnt"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := b.with(t)
			p := b.pod(func(cfg *runtime.PodSandboxConfig) {
				cfg.Linux.SecurityContext.NamespaceOptions = c.options
				if c.options.Network == nodeMode {
					cfg.Hostname = "" // as the kubelet does: the host has its own
				}
			})
			same := security(func(s *runtime.LinuxContainerSecurityContext) { s.NamespaceOptions = c.options })
			one, two := p.run(sh("sleep 300"), same).namespaces(), p.run(sh("sleep 300"), same).namespaces()
			for _, kind := range c.host {
				if want := b.hostNamespace(kind); one[kind] != want || two[kind] != want {
					t.Errorf("%s: %s and %s, want the host's %s", kind, one[kind], two[kind], want)
				}
			}
			for _, kind := range c.shared {
				if one[kind] != two[kind] || one[kind] == b.hostNamespace(kind) {
					t.Errorf("%s: %s and %s, want one of the pod", kind, one[kind], two[kind])
				}
			}
			for _, kind := range c.apart {
				if one[kind] == two[kind] || one[kind] == b.hostNamespace(kind) {
					t.Errorf("%s: %s and %s, want two of their own", kind, one[kind], two[kind])
				}
			}
			if got := p.status().GetLinux().GetNamespaces().GetOptions(); got.GetNetwork() != c.options.Network || got.GetPid() != c.options.Pid || got.GetIpc() != c.options.Ipc {
				t.Errorf("status tells the namespaces %v, want %v", got, c.options)
			}
		})
	}
}

func TestPodHostNetwork(t *testing.T) {
	b := open(t)
	p := b.pod(func(cfg *runtime.PodSandboxConfig) {
		cfg.Hostname = ""
		cfg.Linux.SecurityContext.NamespaceOptions.Network = runtime.NamespaceMode_NODE
	})
	host, err := os.Hostname()
	b.must(err)
	c := p.run(sh("sleep 300"), security(func(s *runtime.LinuxContainerSecurityContext) {
		s.NamespaceOptions.Network = runtime.NamespaceMode_NODE
	}))
	if got := c.exec("hostname"); got != host+"\n" {
		t.Errorf("host name %q, want the host's %q", got, host)
	}
	if ip := p.status().GetNetwork().GetIp(); ip != "" {
		t.Errorf("address %q, want none: the kubelet knows the host's", ip)
	}
}

// TestPodSharedPID: in a pod that shares its PID namespace there is an init
// that reaps, and containers see each other.
func TestPodSharedPID(t *testing.T) {
	b := open(t)
	shared := modes(runtime.NamespaceMode_POD, runtime.NamespaceMode_POD, runtime.NamespaceMode_POD)
	p := b.pod(func(cfg *runtime.PodSandboxConfig) { cfg.Linux.SecurityContext.NamespaceOptions = shared })
	same := security(func(s *runtime.LinuxContainerSecurityContext) { s.NamespaceOptions = shared })
	first, second := p.run(sh("exec sleep 4321"), same), p.run(sh("sleep 300"), same)
	if got := second.exec("ps", "-o", "pid,args"); !strings.Contains(got, "sleep 4321") {
		t.Errorf("the other container's process is not seen: %q", got)
	}
	if got := second.exec("sh", "-c", "echo $$"); got == "1\n" {
		t.Error("an exec is process 1")
	}
	// Orphans of a container become init's children and must not stay as zombies.
	second.exec("sh", "-c", "(sh -c 'sleep 0.1' & exit 0) & wait")
	b.until("reaped orphan", func() bool {
		return !strings.Contains(second.exec("sh", "-c", "cat /proc/[0-9]*/stat 2>/dev/null"), ") Z ")
	})
	first.stop(0)
	if st := second.status(); st.State != runtime.ContainerState_CONTAINER_RUNNING {
		t.Errorf("second container is %v after the first was stopped", st.State)
	}
	if got := second.exec("ps", "-o", "pid,args"); strings.Contains(got, "sleep 4321") {
		t.Errorf("stopped container's process lives on: %q", got)
	}
}

// TestPodTargetPID: a container in the PID namespace of another one, as
// ephemeral debug containers use it.
func TestPodTargetPID(t *testing.T) {
	b := open(t)
	p := b.pod()
	target := p.run(sh("exec sleep 4322"))
	debug := p.run(sh("sleep 300"), security(func(s *runtime.LinuxContainerSecurityContext) {
		s.NamespaceOptions.Pid, s.NamespaceOptions.TargetId = runtime.NamespaceMode_TARGET, target.id
	}))
	if got := debug.exec("ps", "-o", "pid,args"); !strings.Contains(got, "1 sleep 4322") {
		t.Errorf("process 1 of the target is not seen: %q", got)
	}
	p.refuses(sh("true"), security(func(s *runtime.LinuxContainerSecurityContext) {
		s.NamespaceOptions.Pid, s.NamespaceOptions.TargetId = runtime.NamespaceMode_TARGET, strings.Repeat("ab", 32)
	}), strings.Repeat("ab", 6))
}

func TestPodShm(t *testing.T) {
	b := open(t)
	p := b.pod()
	one, two := p.run(sh("sleep 300")), p.run(sh("sleep 300"))
	one.exec("sh", "-c", "echo shared > /dev/shm/x")
	if got := two.exec("cat", "/dev/shm/x"); got != "shared\n" {
		t.Errorf("got %q from the other container", got)
	}
	got := one.exec("sh", "-c", "grep ' /dev/shm ' /proc/mounts")
	if !strings.Contains(got, " tmpfs ") || !strings.Contains(got, "size=65536k") {
		t.Errorf("/dev/shm is %q, want a tmpfs of 64 MiB", got)
	}
	if strings.Contains(got, "ro,") || !strings.Contains(got, "noexec") || !strings.Contains(got, "nosuid") {
		t.Errorf("/dev/shm is %q, want it writable, noexec and nosuid", got)
	}
}

func TestPodCgroupParent(t *testing.T) {
	b := open(t)
	p := b.pod()
	c := p.run(sh("sleep 300"))
	dir, err := node.FindCgroup("memory", c.id)
	b.must(err)
	if !strings.Contains(dir, p.cfg.Linux.CgroupParent+"/") {
		t.Errorf("cgroup %s, want it below %s", dir, p.cfg.Linux.CgroupParent)
	}
	procs, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
	b.must(err)
	if len(strings.Fields(string(procs))) == 0 {
		t.Errorf("no process in %s", dir)
	}
}

// TestPodHasNoProcess: a pod is a set of namespaces, not a process.
func TestPodHasNoProcess(t *testing.T) {
	b := open(t)
	b.ours()
	p := b.pod()
	m, err := b.node.Marks()
	b.must(err)
	for k := range m {
		if strings.HasPrefix(k, "process: ") && strings.Contains(k, p.id) {
			t.Errorf("pod without containers has %s", k)
		}
	}
}

// TestRootfsIsNotOnTheHost: the mount of a running container's root is in the
// container's own mount namespace and nowhere else.
func TestRootfsIsNotOnTheHost(t *testing.T) {
	b := open(t)
	b.ours()
	c := b.pod().run(sh("sleep 300"))
	if got := c.exec("sh", "-c", "grep ' / ' /proc/mounts"); !strings.Contains(got, "overlay") {
		t.Errorf("root of the container is %q, want an overlay", got)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	b.must(err)
	for _, line := range strings.Split(string(mounts), "\n") {
		if strings.Contains(line, c.id) || strings.Contains(line, "overlay") && strings.Contains(line, b.node.StateDir) {
			t.Errorf("mount on the host: %s", line)
		}
	}
}

// TestPodTwoAddresses: of the addresses that the network gives, the first is the
// pod's and the others are additional, and all are in its hosts file.
func TestPodTwoAddresses(t *testing.T) {
	b := open(t)
	b.ours()
	b = b.ownNode(b.ctx, node.Options{CNI: fmt.Sprintf(`{"cniVersion": "1.0.0", "name": "two", "plugins": [{"type": "ptp", "ipam":
  {"type": "host-local", "dataDir": %q, "ranges": [[{"subnet": "10.123.45.0/24"}], [{"subnet": "fd00:77:45::/64"}]]}}]}`, t.TempDir())})
	b.pulled(images.Busybox)
	p := b.pod()
	n := p.status().GetNetwork()
	if !strings.HasPrefix(n.GetIp(), "10.123.45.") || len(n.GetAdditionalIps()) != 1 || !strings.HasPrefix(n.AdditionalIps[0].GetIp(), "fd00:77:45::") {
		t.Fatalf("network %v", n)
	}
	c := p.run(sh("sleep 300"))
	addresses, hosts := c.exec("ip", "addr", "show", "eth0"), c.exec("cat", "/etc/hosts")
	for _, ip := range []string{n.Ip, n.AdditionalIps[0].Ip} {
		if !strings.Contains(addresses, " "+ip+"/") {
			t.Errorf("eth0 does not have %s: %s", ip, addresses)
		}
		if !strings.Contains(hosts, ip) {
			t.Errorf("%s is not in the hosts file: %s", ip, hosts)
		}
	}
}
