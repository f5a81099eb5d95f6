package critest

import (
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berthd/berth/test/node"
)

func (p *pod) stats() *runtime.PodSandboxStats {
	p.Helper()
	r, err := p.client.PodSandboxStats(p.ctx, &runtime.PodSandboxStatsRequest{PodSandboxId: p.id})
	p.must(err)
	return r.Stats
}

const busyLoop = "i=0; while true; do i=$((i+1)); done"

func TestPodStats(t *testing.T) {
	b := open(t)
	p := b.pod(func(c *runtime.PodSandboxConfig) { c.Annotations = map[string]string{"note": "kept"} })
	busy := p.run(sh(busyLoop), resources(func(r *runtime.LinuxContainerResources) { r.MemoryLimitInBytes = 64 * mib }))
	idle := p.run([]string{"/guest", "http", ":80", "hello"})
	first := p.stats()
	if a := first.GetAttributes(); a.GetId() != p.id || !proto.Equal(a.GetMetadata(), p.cfg.Metadata) || a.GetLabels()["pod"] == "" || a.GetAnnotations()["note"] != "kept" {
		t.Errorf("attributes %v", first.Attributes)
	}
	// The second call tells a rate, even at once.
	if second := p.stats().GetLinux(); second.GetCpu().GetUsageNanoCores() == nil || second.GetContainers()[0].GetCpu().GetUsageNanoCores() == nil {
		t.Errorf("no rate in the second call: %v", second)
	}
	b.until("rising CPU usage and a rate of it", func() bool {
		now := p.stats().GetLinux().GetCpu()
		return now.GetUsageCoreNanoSeconds().GetValue() > first.GetLinux().GetCpu().GetUsageCoreNanoSeconds().GetValue()+uint64(100*time.Millisecond) &&
			now.GetUsageNanoCores().GetValue() > 10e6 && now.Timestamp > first.Linux.Cpu.Timestamp
	})
	l := p.stats().GetLinux()
	var ids []string
	var memory, cpu uint64
	for _, c := range l.GetContainers() {
		ids = append(ids, c.GetAttributes().GetId())
		memory += c.GetMemory().GetRssBytes().GetValue()
		cpu += c.GetCpu().GetUsageCoreNanoSeconds().GetValue()
		if c.GetWritableLayer().GetFsId().GetMountpoint() == "" || c.GetSwap().GetTimestamp() == 0 {
			t.Errorf("container %.12s lacks its writable layer or swap: %v", c.GetAttributes().GetId(), c)
		}
	}
	want := []string{busy.id, idle.id}
	slices.Sort(ids)
	slices.Sort(want)
	if !slices.Equal(ids, want) {
		t.Errorf("containers %.12q, want %.12q", ids, want)
	}
	if m := l.GetMemory(); m.GetWorkingSetBytes().GetValue() == 0 || m.GetUsageBytes().GetValue() < m.GetWorkingSetBytes().GetValue() || memory == 0 {
		t.Errorf("memory %v, RSS of the containers %d", m, memory)
	}
	if got := l.GetCpu().GetUsageCoreNanoSeconds().GetValue(); got < cpu/2 {
		t.Errorf("CPU of the pod %d, of its containers %d", got, cpu)
	}
	if n := l.GetProcess().GetProcessCount().GetValue(); n < 2 || n > 10 {
		t.Errorf("%d processes", n)
	}
	if _, err := os.Stat("/proc/pressure/cpu"); err == nil && b.node != nil && l.GetContainers()[0].GetCpu().GetPsi().GetSome() == nil {
		t.Errorf("no pressure of the CPU, which this kernel knows: %v", l.GetContainers()[0].GetCpu())
	}
}

func TestPodStatsNetwork(t *testing.T) {
	b := open(t)
	p := b.pod()
	p.run([]string{"/guest", "http", ":80", "hello"})
	before := p.stats().GetLinux().GetNetwork()
	if d := before.GetDefaultInterface(); d.GetName() != "eth0" || before.GetTimestamp() == 0 || d.GetRxErrors() == nil || d.GetTxErrors() == nil {
		t.Errorf("network %v", before)
	}
	for _, i := range before.GetInterfaces() {
		if i.GetName() == "lo" || i.GetName() == "eth0" {
			t.Errorf("interface %v beside the default one", i)
		}
	}
	for range 20 {
		b.fetch("http://" + p.status().Network.Ip + "/")
	}
	now := p.stats().GetLinux().GetNetwork().GetDefaultInterface()
	if rx, tx := now.GetRxBytes().GetValue(), now.GetTxBytes().GetValue(); rx < before.DefaultInterface.RxBytes.Value+1000 || tx < before.DefaultInterface.TxBytes.Value+1000 {
		t.Errorf("after 20 requests %v, before %v", now, before)
	}
	host := b.pod(func(cfg *runtime.PodSandboxConfig) {
		cfg.Linux.SecurityContext.NamespaceOptions.Network = runtime.NamespaceMode_NODE
	})
	if n := host.stats().GetLinux().GetNetwork(); n != nil {
		t.Errorf("network of a pod on the host's: %v", n)
	}
}

// TestPodStatsSharedParent: of a cgroup that several pods share, each pod gets
// what its own containers use.
func TestPodStatsSharedParent(t *testing.T) {
	b := open(t)
	shared := func(c *runtime.PodSandboxConfig) { c.Linux.CgroupParent = b.parent + "/shared" }
	one, other := b.pod(shared), b.pod(shared)
	other.run(sh("echo up; exec sleep 300")).sees("up")
	cpu := func(p *pod) time.Duration {
		return time.Duration(p.stats().GetLinux().GetCpu().GetUsageCoreNanoSeconds().GetValue())
	}
	idle := cpu(other) // the start, which takes what it takes
	busy := one.run(sh(busyLoop))
	b.until("CPU usage", func() bool {
		return busy.stats().GetCpu().GetUsageCoreNanoSeconds().GetValue() > uint64(200*time.Millisecond)
	})
	if got := cpu(other) - idle; got > 100*time.Millisecond {
		t.Errorf("the idle pod has used %v of CPU", got)
	}
	if got := cpu(one); got < 200*time.Millisecond {
		t.Errorf("the busy pod has used %v of CPU", got)
	}
}

func TestPodStatsInit(t *testing.T) {
	b := open(t)
	shared := modes(runtime.NamespaceMode_POD, runtime.NamespaceMode_POD, runtime.NamespaceMode_POD)
	p := b.pod(func(cfg *runtime.PodSandboxConfig) { cfg.Linux.SecurityContext.NamespaceOptions = shared })
	p.run(sh("exec sleep 300"), security(func(s *runtime.LinuxContainerSecurityContext) { s.NamespaceOptions = shared }))
	if n := p.stats().GetLinux().GetProcess().GetProcessCount().GetValue(); n != 2 {
		t.Errorf("%d processes, want the container's and the init", n)
	}
	if l := p.stats().GetLinux().GetContainers(); len(l) != 1 {
		t.Errorf("%d containers, want 1: an init is none", len(l))
	}
}

func TestPodStatsList(t *testing.T) {
	b := open(t)
	one := b.pod(func(c *runtime.PodSandboxConfig) { c.Labels["kind"] = "one" })
	two := b.pod()
	list := func(f *runtime.PodSandboxStatsFilter) []string {
		r, err := b.client.ListPodSandboxStats(b.ctx, &runtime.ListPodSandboxStatsRequest{Filter: f})
		b.must(err)
		var ids []string
		for _, s := range r.Stats {
			ids = append(ids, s.Attributes.Id)
		}
		return ids
	}
	for name, c := range map[string]struct {
		filter *runtime.PodSandboxStatsFilter
		want   []string
	}{
		"ID":                    {&runtime.PodSandboxStatsFilter{Id: two.id}, []string{two.id}},
		"label":                 {&runtime.PodSandboxStatsFilter{Id: one.id, LabelSelector: map[string]string{"kind": "one"}}, []string{one.id}},
		"label of another pod":  {&runtime.PodSandboxStatsFilter{Id: two.id, LabelSelector: map[string]string{"kind": "one"}}, nil},
		"an ID that nobody has": {&runtime.PodSandboxStatsFilter{Id: strings.Repeat("0", 64)}, nil},
	} {
		if got := list(c.filter); !slices.Equal(got, c.want) {
			t.Errorf("%s: got %.12q, want %.12q", name, got, c.want)
		}
	}
	if all := list(nil); !slices.Contains(all, one.id) || !slices.Contains(all, two.id) {
		t.Error("list without a filter lacks a pod")
	}
	two.stop()
	if all := list(nil); slices.Contains(all, two.id) {
		t.Error("a stopped pod has stats")
	}
	_, err := b.client.PodSandboxStats(b.ctx, &runtime.PodSandboxStatsRequest{PodSandboxId: strings.Repeat("0", 64)})
	b.refused(err, codes.NotFound, strings.Repeat("0", 12))
}

// TestStatusTellsTruth: limits in the status are those of the kernel, also when
// somebody else has changed them.
func TestStatusTellsTruth(t *testing.T) {
	b := open(t)
	b.ours()
	c := b.pod().run(sh("sleep 300"), resources(func(r *runtime.LinuxContainerResources) { r.MemoryLimitInBytes, r.CpuShares = 64*mib+1, 512 }))
	if r := c.status().GetResources().GetLinux(); r.GetMemoryLimitInBytes() != 64*mib || r.GetCpuShares() != 512 || r.GetCpuQuota() != 0 {
		t.Errorf("the kernel counts in pages, and no quota was asked for: %v", r)
	}
	dir, err := node.FindCgroup("memory", c.id)
	b.must(err)
	files := []string{"memory.memsw.limit_in_bytes", "memory.limit_in_bytes"}
	if node.Unified() {
		files = []string{"memory.max"}
	}
	for _, f := range files {
		b.must(os.WriteFile(filepath.Join(dir, f), []byte(strconv.Itoa(128*mib)), 0))
	}
	if got := c.status().GetResources().GetLinux().GetMemoryLimitInBytes(); got != 128*mib {
		t.Errorf("limit %d after a change to %d", got, 128*mib)
	}
	c.stop(0)
	if got := c.status().GetResources().GetLinux().GetCpuShares(); got != 512 {
		t.Errorf("shares of an exited container: %d", got)
	}
}

func TestUpdatePodResources(t *testing.T) {
	b := open(t)
	p := b.pod()
	update := func(r *runtime.UpdatePodSandboxResourcesRequest) error {
		_, err := b.client.UpdatePodSandboxResources(b.ctx, r)
		return err
	}
	info := func() string {
		r, err := b.client.PodSandboxStatus(b.ctx, &runtime.PodSandboxStatusRequest{PodSandboxId: p.id, Verbose: true})
		b.must(err)
		return r.Info["info"]
	}
	b.must(update(&runtime.UpdatePodSandboxResourcesRequest{PodSandboxId: p.id,
		Overhead: &runtime.LinuxContainerResources{CpuShares: 7701}, Resources: &runtime.LinuxContainerResources{MemoryLimitInBytes: 7702 * mib}}))
	b.must(update(&runtime.UpdatePodSandboxResourcesRequest{PodSandboxId: p.id, Resources: &runtime.LinuxContainerResources{CpuShares: 7703}}))
	if b.node != nil {
		if text := info(); !strings.Contains(text, "7701") || !strings.Contains(text, "7703") || strings.Contains(text, strconv.Itoa(7702*mib)) {
			t.Errorf("status tells %s", text)
		}
	}
	b.refused(update(&runtime.UpdatePodSandboxResourcesRequest{PodSandboxId: strings.Repeat("0", 64)}), codes.NotFound, strings.Repeat("0", 12))
	if b.node == nil {
		return
	}
	b.refused(update(&runtime.UpdatePodSandboxResourcesRequest{PodSandboxId: p.id, Resources: &runtime.LinuxContainerResources{MemoryLimitInBytes: -7}}),
		codes.InvalidArgument, "resources.memory_limit_in_bytes", "-7")
	p.stop()
	b.refused(update(&runtime.UpdatePodSandboxResourcesRequest{PodSandboxId: p.id, Resources: &runtime.LinuxContainerResources{CpuShares: 1}}),
		codes.FailedPrecondition, p.id[:12])
}
