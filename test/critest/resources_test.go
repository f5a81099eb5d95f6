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
