package critest

import (
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	ready    = runtime.PodSandboxState_SANDBOX_READY
	notReady = runtime.PodSandboxState_SANDBOX_NOTREADY
)

// podIDs lists pods with a filter.
func (b *box) podIDs(f *runtime.PodSandboxFilter) []string {
	b.Helper()
	r, err := b.client.ListPodSandbox(b.ctx, &runtime.ListPodSandboxRequest{Filter: f})
	b.must(err)
	var ids []string
	for _, p := range r.Items {
		ids = append(ids, p.Id)
	}
	return ids
}

func TestPodLife(t *testing.T) {
	b := open(t)
	begin := time.Now()
	p := b.pod(func(cfg *runtime.PodSandboxConfig) {
		cfg.Labels = map[string]string{"app": "life", "io.kubernetes.pod.name": "x"}
		cfg.Annotations = map[string]string{"example.org/note": "kept as it is"}
		cfg.Metadata.Attempt = 3
	})
	st := p.status()
	if st.Id != p.id || st.State != ready || !proto.Equal(st.Metadata, p.cfg.Metadata) {
		t.Errorf("status %v, want ID, READY and the metadata of %v", st, p.cfg)
	}
	if at := time.Unix(0, st.CreatedAt); at.Before(begin.Add(-time.Second)) || at.After(time.Now()) {
		t.Errorf("created at %v, run at %v", at, begin)
	}
	if st.Labels["app"] != "life" || len(st.Labels) != 2 || st.Annotations["example.org/note"] != "kept as it is" || len(st.Annotations) != 1 {
		t.Errorf("labels %v, annotations %v", st.Labels, st.Annotations)
	}
	addr, err := netip.ParseAddr(st.GetNetwork().GetIp())
	if err != nil {
		t.Errorf("address: %v", err)
	}
	if b.node != nil && !netip.MustParsePrefix(b.node.Subnet).Contains(addr) {
		t.Errorf("address %v, want one of %s", addr, b.node.Subnet)
	}
	if o := st.GetLinux().GetNamespaces().GetOptions(); o.GetNetwork() != runtime.NamespaceMode_POD || o.GetPid() != runtime.NamespaceMode_CONTAINER || o.GetIpc() != runtime.NamespaceMode_POD {
		t.Errorf("namespace options %v", o)
	}
	r, err := b.client.ListPodSandbox(b.ctx, &runtime.ListPodSandboxRequest{Filter: &runtime.PodSandboxFilter{Id: p.id}})
	b.must(err)
	if len(r.Items) != 1 || r.Items[0].State != ready || !proto.Equal(r.Items[0].Metadata, p.cfg.Metadata) || r.Items[0].CreatedAt != st.CreatedAt ||
		r.Items[0].Labels["app"] != "life" || r.Items[0].Annotations["example.org/note"] == "" {
		t.Errorf("list has %v", r.Items)
	}

	for range 2 { // stop is idempotent
		p.stop()
		if st := p.status(); st.State != notReady {
			t.Errorf("stopped pod is %v", st.State)
		}
	}
	for range 2 { // and so is removal
		_, err := b.client.RemovePodSandbox(b.ctx, &runtime.RemovePodSandboxRequest{PodSandboxId: p.id})
		b.must(err)
	}
	_, err = b.client.PodSandboxStatus(b.ctx, &runtime.PodSandboxStatusRequest{PodSandboxId: p.id})
	b.refused(err, codes.NotFound, p.id[:12])
	if ids := b.podIDs(&runtime.PodSandboxFilter{Id: p.id}); len(ids) != 0 {
		t.Errorf("removed pod is still listed: %v", ids)
	}
}

func TestPodVerboseStatus(t *testing.T) {
	b := open(t)
	p := b.pod()
	r, err := b.client.PodSandboxStatus(b.ctx, &runtime.PodSandboxStatusRequest{PodSandboxId: p.id, Verbose: true})
	b.must(err)
	if len(r.Info) == 0 {
		t.Error("info is empty")
	}
	r, err = b.client.PodSandboxStatus(b.ctx, &runtime.PodSandboxStatusRequest{PodSandboxId: p.id})
	b.must(err)
	if len(r.Info) != 0 {
		t.Errorf("info %v, want it only when verbose", r.Info)
	}
}

// TestPodRemoveRunning: removal takes what still runs with it.
func TestPodRemoveRunning(t *testing.T) {
	b := open(t)
	p := b.pod()
	c := p.run(sh("sleep 300"))
	_, err := b.client.RemovePodSandbox(b.ctx, &runtime.RemovePodSandboxRequest{PodSandboxId: p.id})
	b.must(err)
	_, err = b.client.ContainerState(b.ctx, c.id)
	b.refused(err, codes.NotFound, c.id[:12])
}

// TestPodStopEndsContainers: after a stop nothing runs in the pod.
func TestPodStopEndsContainers(t *testing.T) {
	b := open(t)
	p := b.pod()
	runs, done, fresh := p.run(sh("sleep 300")), p.run(sh("exit 4")), p.create(sh("sleep 300"))
	done.wait()
	p.stop()
	if st := runs.status(); st.State != runtime.ContainerState_CONTAINER_EXITED || st.ExitCode != 137 && st.ExitCode != 143 {
		t.Errorf("container of a stopped pod: %v, exit code %d", st.State, st.ExitCode)
	}
	if st := done.status(); st.ExitCode != 4 {
		t.Errorf("earlier exit code became %d, want 4", st.ExitCode)
	}
	if st := fresh.status(); st.State == runtime.ContainerState_CONTAINER_RUNNING {
		t.Errorf("created container of a stopped pod: %v", st.State)
	}
	if _, err := p.tryCreate(sh("true")); err == nil {
		t.Error("a container was created in a stopped pod")
	}
}

func TestPodFilters(t *testing.T) {
	b := open(t)
	mark := "filter-" + time.Now().Format("150405.000000")
	label := func(kv ...string) func(*runtime.PodSandboxConfig) {
		return func(cfg *runtime.PodSandboxConfig) {
			cfg.Labels = map[string]string{"mark": mark}
			for i := 0; i < len(kv); i += 2 {
				cfg.Labels[kv[i]] = kv[i+1]
			}
		}
	}
	one, two := b.pod(label("tier", "front", "zone", "a")), b.pod(label("tier", "front", "zone", "b"))
	two.stop()
	state := func(s runtime.PodSandboxState) *runtime.PodSandboxStateValue {
		return &runtime.PodSandboxStateValue{State: s}
	}
	sel := func(kv ...string) map[string]string {
		m := map[string]string{"mark": mark}
		for i := 0; i < len(kv); i += 2 {
			m[kv[i]] = kv[i+1]
		}
		return m
	}
	for _, c := range []struct {
		name   string
		filter *runtime.PodSandboxFilter
		want   []string
	}{
		{"label of both", &runtime.PodSandboxFilter{LabelSelector: sel("tier", "front")}, []string{one.id, two.id}},
		{"label of one", &runtime.PodSandboxFilter{LabelSelector: sel("zone", "a")}, []string{one.id}},
		{"labels that exclude each other", &runtime.PodSandboxFilter{LabelSelector: sel("zone", "a", "tier", "back")}, nil},
		{"ready", &runtime.PodSandboxFilter{LabelSelector: sel(), State: state(ready)}, []string{one.id}},
		{"not ready", &runtime.PodSandboxFilter{LabelSelector: sel(), State: state(notReady)}, []string{two.id}},
		{"ID", &runtime.PodSandboxFilter{Id: two.id}, []string{two.id}},
		{"ID and state that exclude each other", &runtime.PodSandboxFilter{Id: two.id, State: state(ready)}, nil},
		{"part of an ID", &runtime.PodSandboxFilter{Id: one.id[:16]}, []string{one.id}},
		{"unknown ID", &runtime.PodSandboxFilter{Id: "ffffffffffffffffffffffffffffffff"}, nil},
	} {
		got := b.podIDs(c.filter)
		slices.Sort(got)
		slices.Sort(c.want)
		if !slices.Equal(got, c.want) {
			t.Errorf("%s: got %.12q, want %.12q", c.name, got, c.want)
		}
	}
	if all := b.podIDs(nil); !slices.Contains(all, one.id) || !slices.Contains(all, two.id) {
		t.Errorf("list without a filter lacks a pod")
	}
}

// TestPodSameMetadata: a kubelet that asks again gets the pod that it asked for.
func TestPodSameMetadata(t *testing.T) {
	b := open(t)
	b.ours()
	p := b.pod()
	again, err := b.client.Run(b.ctx, p.cfg)
	b.must(err)
	if again != p.id {
		t.Errorf("second run with the same metadata: pod %.12s, want %.12s", again, p.id)
	}
	next := proto.Clone(p.cfg).(*runtime.PodSandboxConfig)
	next.Metadata.Attempt++
	id, err := b.client.Run(b.ctx, next)
	b.must(err)
	b.adopt(id, next)
	if id == p.id {
		t.Error("the next attempt got the same pod")
	}
}

func TestPodSameMetadataAtOnce(t *testing.T) {
	b := open(t)
	b.ours()
	cfg := b.podConfig()
	ids, errs := make([]string, 8), make([]error, 8)
	var wg sync.WaitGroup
	for i := range ids {
		wg.Go(func() { ids[i], errs[i] = b.client.Run(b.ctx, cfg) })
	}
	wg.Wait()
	adopted := map[string]bool{}
	for i, id := range ids {
		if errs[i] != nil {
			t.Errorf("call %d: %v", i, errs[i])
			continue
		}
		if !adopted[id] {
			adopted[id] = true
			b.adopt(id, cfg)
		}
	}
	if len(adopted) != 1 {
		t.Errorf("%d calls at once made %d pods, want 1", len(ids), len(adopted))
	}
}

func TestPodBadInput(t *testing.T) {
	b := open(t)
	b.ours()
	for _, c := range []struct {
		name  string
		edit  func(*runtime.PodSandboxConfig)
		parts []string
	}{
		{"no metadata", func(c *runtime.PodSandboxConfig) { c.Metadata = nil }, []string{"metadata"}},
		{"no name", func(c *runtime.PodSandboxConfig) { c.Metadata.Name = "" }, []string{"name"}},
		{"no namespace", func(c *runtime.PodSandboxConfig) { c.Metadata.Namespace = "" }, []string{"namespace"}},
		{"no UID", func(c *runtime.PodSandboxConfig) { c.Metadata.Uid = "" }, []string{"uid"}},
		{"host name too long", func(c *runtime.PodSandboxConfig) { c.Hostname = string(make([]byte, 65)) }, []string{"hostname"}},
		{"host name with a newline", func(c *runtime.PodSandboxConfig) { c.Hostname = "a\nb" }, []string{"hostname"}},
		{"port out of range", func(c *runtime.PodSandboxConfig) {
			c.PortMappings = []*runtime.PortMapping{{ContainerPort: 80, HostPort: 70000}}
		}, []string{"port", "70000"}},
		{"port negative", func(c *runtime.PodSandboxConfig) {
			c.PortMappings = []*runtime.PortMapping{{ContainerPort: -1, HostPort: 8080}}
		}, []string{"port", "-1"}},
		{"host address of no kind", func(c *runtime.PodSandboxConfig) {
			c.PortMappings = []*runtime.PortMapping{{ContainerPort: 80, HostPort: 8080, HostIp: "1.2.3.four"}}
		}, []string{"1.2.3.four"}},
		{"cgroup parent that climbs", func(c *runtime.PodSandboxConfig) { c.Linux.CgroupParent = "/../../x" }, []string{"cgroup"}},
		{"log directory not absolute", func(c *runtime.PodSandboxConfig) { c.LogDirectory = "logs/x" }, []string{"log", "logs/x"}},
		{"name server that is no address", func(c *runtime.PodSandboxConfig) {
			c.DnsConfig = &runtime.DNSConfig{Servers: []string{"1.1.1.1\noptions evil"}}
		}, []string{"dns"}},
		{"sysctl of the host", func(c *runtime.PodSandboxConfig) {
			c.Linux.Sysctls = map[string]string{"kernel.core_pattern": "|/bin/x"}
		}, []string{"kernel.core_pattern"}},
		{"sysctl with a slash", func(c *runtime.PodSandboxConfig) {
			c.Linux.Sysctls = map[string]string{"net.ipv4/../../kernel/core_pattern": "1"}
		}, []string{"core_pattern"}},
		{"sysctl value of two lines", func(c *runtime.PodSandboxConfig) {
			c.Linux.Sysctls = map[string]string{"net.ipv4.ip_forward": "1\nkernel.core_pattern=x"}
		}, []string{"net.ipv4.ip_forward"}},
		{"network sysctl with the host's network", func(c *runtime.PodSandboxConfig) {
			c.Linux.SecurityContext.NamespaceOptions.Network = runtime.NamespaceMode_NODE
			c.Linux.Sysctls = map[string]string{"net.ipv4.ip_forward": "1"}
		}, []string{"net.ipv4.ip_forward"}},
		{"IPC sysctl with the host's IPC", func(c *runtime.PodSandboxConfig) {
			c.Linux.SecurityContext.NamespaceOptions.Ipc = runtime.NamespaceMode_NODE
			c.Linux.Sysctls = map[string]string{"kernel.shmmax": "65536"}
		}, []string{"kernel.shmmax"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := b.with(t)
			cfg := b.podConfig(c.edit)
			id, err := b.client.Run(b.ctx, cfg)
			if err == nil {
				b.adopt(id, cfg)
			}
			b.refused(err, codes.InvalidArgument, c.parts...)
		})
	}
	t.Run("no config", func(t *testing.T) {
		b := b.with(t)
		_, err := b.client.RunPodSandbox(b.ctx, &runtime.RunPodSandboxRequest{})
		b.refused(err, codes.InvalidArgument, "config")
	})
	t.Run("sysctl that the kernel refuses", func(t *testing.T) {
		b := b.with(t)
		_, err := b.client.Run(b.ctx, b.podConfig(func(c *runtime.PodSandboxConfig) {
			c.Linux.Sysctls = map[string]string{"net.ipv4.no_such_key": "1"}
		}))
		if err == nil {
			t.Fatal("no error")
		}
		b.refused(err, codes.InvalidArgument, "net.ipv4.no_such_key")
	})
}

func TestPodRuntimeHandler(t *testing.T) {
	b := open(t)
	cfg := b.podConfig()
	r, err := b.client.RunPodSandbox(b.ctx, &runtime.RunPodSandboxRequest{Config: cfg, RuntimeHandler: "runc"})
	b.must(err)
	p := b.adopt(r.PodSandboxId, cfg)
	if h := p.status().RuntimeHandler; h != "runc" {
		t.Errorf("runtime handler %q, want runc", h)
	}
	p.output(sh("true"))
	_, err = b.client.RunPodSandbox(b.ctx, &runtime.RunPodSandboxRequest{Config: b.podConfig(), RuntimeHandler: "no-such-handler"})
	if err == nil {
		t.Fatal("unknown runtime handler: no error")
	}
	if b.node != nil {
		b.refused(err, codes.InvalidArgument, "no-such-handler")
	}
}
