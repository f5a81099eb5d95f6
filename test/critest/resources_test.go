package critest

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berthd/berth/test/node"
)

func resources(fn func(*runtime.LinuxContainerResources)) edit {
	return func(c *runtime.ContainerConfig) { fn(c.Linux.Resources) }
}

// limit is where a limit can be read: a file per cgroup version.
type limit struct{ controller, v1, v2 string }

var (
	memoryLimit = limit{"memory", "memory.limit_in_bytes", "memory.max"}
	cpuQuota    = limit{"cpu", "cpu.cfs_quota_us", "cpu.max"}
	cpuShares   = limit{"cpu", "cpu.shares", "cpu.weight"}
	cpuSet      = limit{"cpuset", "cpuset.cpus", "cpuset.cpus"}
)

// limitOf reads a limit from the host's cgroup file system.
func (c *container) limitOf(l limit) string {
	c.Helper()
	dir, err := node.FindCgroup(l.controller, c.id)
	c.must(err)
	file := l.v1
	if node.Unified() {
		file = l.v2
	}
	b, err := os.ReadFile(filepath.Join(dir, file))
	c.must(err)
	return strings.TrimSpace(string(b))
}

// byVersion returns the value that a file has on this host's cgroup version.
func byVersion(v1, v2 string) string {
	if node.Unified() {
		return v2
	}
	return v1
}

const mib = 1 << 20

func TestResourceLimits(t *testing.T) {
	b := open(t)
	c := b.pod().run(sh("sleep 300"), resources(func(r *runtime.LinuxContainerResources) {
		r.MemoryLimitInBytes, r.CpuPeriod, r.CpuQuota, r.CpuShares, r.OomScoreAdj, r.CpusetCpus = 64*mib, 100000, 20000, 512, 500, "0"
	}))
	for _, l := range []struct {
		limit
		want string
	}{
		{memoryLimit, strconv.Itoa(64 * mib)},
		{cpuQuota, byVersion("20000", "20000 100000")},
		{cpuSet, "0"},
	} {
		if got := c.limitOf(l.limit); got != l.want {
			t.Errorf("%s: %q, want %q", l.v1, got, l.want)
		}
	}
	if got := c.limitOf(cpuShares); !node.Unified() && got != "512" || node.Unified() && got == "100" {
		t.Errorf("CPU shares of 512 became %q", got)
	}
	if got := c.exec("cat", "/proc/1/oom_score_adj"); got != "500\n" {
		t.Errorf("OOM score adjustment %q, want 500", got)
	}
	r := c.status().GetResources().GetLinux()
	if r.GetMemoryLimitInBytes() != 64*mib || r.GetCpuQuota() != 20000 || r.GetCpuPeriod() != 100000 || r.GetCpusetCpus() != "0" {
		t.Errorf("status tells %v", r)
	}
}

func TestUpdateResources(t *testing.T) {
	b := open(t)
	p := b.pod()
	update := func(c *container, fn func(*runtime.LinuxContainerResources)) error {
		r := &runtime.LinuxContainerResources{}
		fn(r)
		_, err := b.client.UpdateContainerResources(b.ctx, &runtime.UpdateContainerResourcesRequest{ContainerId: c.id, Linux: r})
		return err
	}
	more := func(r *runtime.LinuxContainerResources) {
		r.MemoryLimitInBytes, r.CpuQuota, r.CpuPeriod = 128*mib, 50000, 100000
	}
	edit := resources(func(r *runtime.LinuxContainerResources) {
		r.MemoryLimitInBytes, r.CpuQuota, r.CpuPeriod, r.CpusetCpus = 64*mib, 20000, 100000, "0"
	})
	check := func(c *container, when string) {
		t.Helper()
		if got := c.limitOf(memoryLimit); got != strconv.Itoa(128*mib) {
			t.Errorf("%s: memory limit %s", when, got)
		}
		if got, want := c.limitOf(cpuQuota), byVersion("50000", "50000 100000"); got != want {
			t.Errorf("%s: CPU quota %s, want %s", when, got, want)
		}
		if got := c.limitOf(cpuSet); got != "0" {
			t.Errorf("%s: CPU set %s, want it kept", when, got)
		}
		if r := c.status().GetResources().GetLinux(); r.GetMemoryLimitInBytes() != 128*mib || r.GetCpuQuota() != 50000 || r.GetCpusetCpus() != "0" {
			t.Errorf("%s: status tells %v", when, r)
		}
	}
	c := p.run(sh("sleep 300"), edit)
	b.must(update(c, more))
	check(c, "running")

	fresh := p.create(sh("sleep 300"), edit)
	b.must(update(fresh, more))
	fresh.start()
	check(fresh, "updated before its start")

	if b.node != nil {
		err := update(c, func(r *runtime.LinuxContainerResources) { r.MemoryLimitInBytes = -7 })
		b.refused(err, codes.InvalidArgument, "memory", "-7")
		err = update(c, func(r *runtime.LinuxContainerResources) { r.CpusetCpus = "9999" })
		if err == nil {
			t.Error("a CPU that this machine does not have: no error")
		}
	}
	c.stop(0)
	if err := update(c, more); err == nil {
		t.Error("update of an exited container: no error")
	} else if b.node != nil {
		b.refused(err, codes.FailedPrecondition, c.id[:12])
	}
}

func TestOutOfMemory(t *testing.T) {
	b := open(t)
	c := b.pod().run([]string{"/guest", "eat", "256"}, resources(func(r *runtime.LinuxContainerResources) {
		r.MemoryLimitInBytes, r.MemorySwapLimitInBytes = 40*mib, 40*mib
	}))
	if st := c.wait(); st.Reason != "OOMKilled" || st.ExitCode != 137 {
		t.Errorf("reason %q, exit code %d; want OOMKilled, 137; log %q", st.Reason, st.ExitCode, c.text())
	}
}

// TestOutOfMemoryElsewhere: one container's OOM is not told of another.
func TestOutOfMemoryElsewhere(t *testing.T) {
	b := open(t)
	p := b.pod()
	other := p.run(sh("sleep 300"))
	p.run([]string{"/guest", "eat", "256"}, resources(func(r *runtime.LinuxContainerResources) {
		r.MemoryLimitInBytes, r.MemorySwapLimitInBytes = 40*mib, 40*mib
	})).wait()
	other.stop(0)
	if st := other.status(); st.Reason != "Error" || st.ExitCode != 137 {
		t.Errorf("the pod's other container: reason %q, exit code %d", st.Reason, st.ExitCode)
	}
}

func swapOf(limit int64) edit {
	return resources(func(r *runtime.LinuxContainerResources) {
		r.MemoryLimitInBytes, r.MemorySwapLimitInBytes = 64*mib, limit
	})
}

// TestSwap: the limit of CRI counts memory and swap together; without one there is
// no swap beyond the memory limit.
func TestSwap(t *testing.T) {
	b := open(t)
	p := b.pod()
	swap := limit{"memory", "memory.memsw.limit_in_bytes", "memory.swap.max"}
	c := p.run(sh("sleep 300"))
	dir, err := node.FindCgroup("memory", c.id)
	b.must(err)
	if _, err := os.Stat(filepath.Join(dir, byVersion(swap.v1, swap.v2))); err != nil {
		t.Skip("this kernel does not account for swap")
	}
	c = p.run(sh("sleep 300"), swapOf(96*mib))
	if got, want := c.limitOf(swap), byVersion(strconv.Itoa(96*mib), strconv.Itoa(32*mib)); got != want {
		t.Errorf("limit of swap %s, want %s", got, want)
	}
	if got := c.status().GetResources().GetLinux().GetMemorySwapLimitInBytes(); got != 96*mib {
		t.Errorf("status tells %d, want %d", got, 96*mib)
	}
	c = p.run(sh("sleep 300"), swapOf(0))
	if got, want := c.limitOf(swap), byVersion(strconv.Itoa(64*mib), "0"); got != want {
		t.Errorf("limit of swap %s where none was asked for, want %s", got, want)
	}
	if b.node != nil {
		p.refuses(sh("true"), swapOf(32*mib), "memory_swap_limit_in_bytes")
		p.refuses(sh("true"), swapOf(-2), "memory_swap_limit_in_bytes", "-2")
		p.refuses(sh("true"), resources(func(r *runtime.LinuxContainerResources) { r.MemorySwapLimitInBytes = 64 * mib }), "memory_swap_limit_in_bytes")
	}
}

// TestHugePages: limits are set where the kernel controls that size, and are an
// error where it does not; none at all is what a kernel without the controller gives.
func TestHugePages(t *testing.T) {
	b := open(t)
	p := b.pod()
	huge := func(size string, n uint64) edit {
		return resources(func(r *runtime.LinuxContainerResources) {
			r.HugepageLimits = []*runtime.HugepageLimit{{PageSize: size, Limit: n}}
		})
	}
	file := limit{"hugetlb", "hugetlb.2MB.limit_in_bytes", "hugetlb.2MB.max"}
	c := p.run(sh("sleep 300"), huge("2MB", 0))
	dir, err := node.FindCgroup(file.controller, c.id)
	if err == nil {
		_, err = os.Stat(filepath.Join(dir, byVersion(file.v1, file.v2)))
	}
	if err != nil {
		if b.node != nil {
			p.refuses(sh("true"), huge("2MB", 4*mib), "hugepage_limits[0].page_size", "2MB")
		}
	} else {
		if got := c.limitOf(file); got != "0" {
			t.Errorf("limit %s, want 0", got)
		}
		c = p.run(sh("sleep 300"), huge("2MB", 4*mib))
		if got := c.limitOf(file); got != strconv.Itoa(4*mib) {
			t.Errorf("limit %s, want %d", got, 4*mib)
		}
		if l := c.status().GetResources().GetLinux().GetHugepageLimits(); len(l) != 1 || l[0].GetLimit() != 4*mib {
			t.Errorf("status tells %v", l)
		}
	}
	if b.node != nil {
		p.refuses(sh("true"), huge("7MB", 7*mib), "hugepage_limits[0].page_size", "7MB")
	}
}

func unified(key, value string) edit {
	return resources(func(r *runtime.LinuxContainerResources) { r.Unified = map[string]string{key: value} })
}

// TestUnified: files of cgroup v2 by name.
func TestUnified(t *testing.T) {
	b := open(t)
	p := b.pod()
	if b.node != nil {
		for _, key := range []string{"memory", "../memory.max", "/memory.max", "cgroup.procs", "a b.c", ""} {
			p.refuses(sh("true"), unified(key, "1"), "unified")
		}
	}
	if !node.Unified() {
		if b.node != nil {
			p.refuses(sh("true"), unified("memory.high", "33554432"), "unified", "cgroup v2")
		}
		return
	}
	high := limit{"memory", "", "memory.high"}
	c := p.run(sh("sleep 300"), unified("memory.high", "33554432"))
	if got := c.limitOf(high); got != "33554432" {
		t.Errorf("memory.high is %s", got)
	}
	if got := c.status().GetResources().GetLinux().GetUnified()["memory.high"]; got != "33554432" {
		t.Errorf("status tells %q", got)
	}
	_, err := b.client.UpdateContainerResources(b.ctx, &runtime.UpdateContainerResourcesRequest{ContainerId: c.id,
		Linux: &runtime.LinuxContainerResources{Unified: map[string]string{"memory.high": "16777216"}}})
	b.must(err)
	if got := c.limitOf(high); got != "16777216" {
		t.Errorf("memory.high is %s after an update", got)
	}
	p.refuses(sh("true"), unified("memory.nosuch", "1"), "memory.nosuch")
}

// TestCPUSet: a list that cannot be had is an error, and one that can is seen by the
// container's processes.
func TestCPUSet(t *testing.T) {
	b := open(t)
	p := b.pod()
	set := func(cpus, mems string) edit {
		return resources(func(r *runtime.LinuxContainerResources) { r.CpusetCpus, r.CpusetMems = cpus, mems })
	}
	if got := p.output(sh("grep -E 'Cpus_allowed_list|Mems_allowed_list' /proc/self/status"), set("0", "0")); got != "Cpus_allowed_list:\t0\nMems_allowed_list:\t0\n" {
		t.Errorf("processes see %q", got)
	}
	if b.node != nil {
		p.refuses(sh("true"), set("3-1", ""), "cpuset_cpus", "3-1")
		p.refuses(sh("true"), set("0,", ""), "cpuset_cpus", "0,")
		p.refuses(sh("true"), set("", "x"), "cpuset_mems", "x")
	}
	p.refuses(sh("true"), set("9999", ""), "9999")
}

// TestUpdateAllOrNothing: of an update that cannot be had nothing stays.
func TestUpdateAllOrNothing(t *testing.T) {
	b := open(t)
	b.ours()
	c := b.pod().run(sh("sleep 300"), resources(func(r *runtime.LinuxContainerResources) {
		r.MemoryLimitInBytes, r.CpuQuota, r.CpuPeriod, r.CpuShares = 64*mib, 20000, 100000, 512
	}))
	shares := c.limitOf(cpuShares)
	for name, bad := range map[string]*runtime.LinuxContainerResources{
		"CPU that is not there": {MemoryLimitInBytes: 128 * mib, CpuQuota: 50000, CpuShares: 2048, CpusetCpus: "9999"},
		"less memory than used": {MemoryLimitInBytes: 4096, CpuQuota: 50000, CpuShares: 2048},
		"swap below memory":     {MemoryLimitInBytes: 128 * mib, MemorySwapLimitInBytes: 32 * mib, CpuQuota: 50000, CpuShares: 2048},
		"unknown huge page":     {CpuShares: 2048, HugepageLimits: []*runtime.HugepageLimit{{PageSize: "7MB", Limit: 1}}},
	} {
		_, err := b.client.UpdateContainerResources(b.ctx, &runtime.UpdateContainerResourcesRequest{ContainerId: c.id, Linux: bad})
		if err == nil {
			t.Errorf("%s: accepted", name)
		} else if strings.Contains(err.Error(), "level=error") {
			t.Errorf("%s: a line of a log for an error: %v", name, err)
		}
		if got := c.limitOf(memoryLimit); got != strconv.Itoa(64*mib) {
			t.Errorf("%s: memory limit %s", name, got)
		}
		if got, want := c.limitOf(cpuQuota), byVersion("20000", "20000 100000"); got != want {
			t.Errorf("%s: CPU quota %s, want %s", name, got, want)
		}
		if got := c.limitOf(cpuShares); got != shares {
			t.Errorf("%s: CPU shares %s, want %s", name, got, shares)
		}
		if r := c.status().GetResources().GetLinux(); r.GetMemoryLimitInBytes() != 64*mib || r.GetCpuQuota() != 20000 || r.GetCpuShares() != 512 || r.GetCpusetCpus() != "" {
			t.Errorf("%s: status tells %v", name, r)
		}
	}
	c.exec("true") // it goes on
}

// TestPodOverhead: what the pod itself may cost is kept for who asks, and is no limit
// of a container.
func TestPodOverhead(t *testing.T) {
	b := open(t)
	p := b.pod(func(c *runtime.PodSandboxConfig) {
		c.Linux.Overhead = &runtime.LinuxContainerResources{MemoryLimitInBytes: 7711 * 4096, CpuShares: 77}
		c.Linux.Resources = &runtime.LinuxContainerResources{MemoryLimitInBytes: 64 * mib}
	})
	c := p.run(sh("sleep 300"), resources(func(r *runtime.LinuxContainerResources) { r.MemoryLimitInBytes = 32 * mib }))
	if got := c.limitOf(memoryLimit); got != strconv.Itoa(32*mib) {
		t.Errorf("memory limit of the container %s", got)
	}
	if b.node == nil {
		return
	}
	r, err := b.client.PodSandboxStatus(b.ctx, &runtime.PodSandboxStatusRequest{PodSandboxId: p.id, Verbose: true})
	b.must(err)
	if text := r.Info["info"]; !strings.Contains(text, strconv.Itoa(7711*4096)) {
		t.Errorf("the overhead is not in %s", text)
	}
	_, err = b.client.Run(b.ctx, b.podConfig(func(c *runtime.PodSandboxConfig) {
		c.Linux.Overhead = &runtime.LinuxContainerResources{MemoryLimitInBytes: -9}
	}))
	b.refused(err, codes.InvalidArgument, "linux.overhead.memory_limit_in_bytes", "-9")
}
