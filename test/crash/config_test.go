package crash

import (
	"os"
	"strings"
	"testing"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berthd/berth/test/node"
)

// reconfigure replaces text in the configuration of a node and restarts it.
func (r *rig) reconfigure(pairs ...string) {
	r.Helper()
	b, err := os.ReadFile(r.Config)
	r.must(err)
	text := strings.NewReplacer(pairs...).Replace(string(b))
	if text == string(b) {
		r.Fatalf("nothing of %q in the configuration", pairs)
	}
	r.must(os.WriteFile(r.Config, []byte(text), 0o600))
	r.must(r.Stop(r.ctx))
	r.must(r.Start(r.ctx))
}

// TestDriverChange: pods that were made under another cgroup driver are what
// they were: counted, limited, executed in, given containers, and removed.
func TestDriverChange(t *testing.T) {
	t.Parallel()
	r := startNode(t, node.Options{})
	cfg := r.podConfig("driver")
	cfg.Linux.SecurityContext.NamespaceOptions.Pid = runtime.NamespaceMode_POD // has an init
	pod, err := r.client.Run(r.ctx, cfg)
	r.must(err)
	id := r.launch(pod, cfg, "old", "sleep", "300")
	removed, removedCfg := r.pod("removed")
	r.launch(removed, removedCfg, "old", "sleep", "300")

	r.reconfigure(`"cgroupfs"`, `"systemd"`)
	rc, err := r.client.RuntimeConfig(r.ctx, &runtime.RuntimeConfigRequest{})
	r.must(err)
	if d := rc.GetLinux().GetCgroupDriver(); d != runtime.CgroupDriver_SYSTEMD {
		t.Errorf("driver %v, want the configured one", d)
	}
	stats, err := r.client.ContainerStats(r.ctx, &runtime.ContainerStatsRequest{ContainerId: id})
	r.must(err)
	if stats.Stats.GetMemory().GetWorkingSetBytes().GetValue() == 0 {
		t.Errorf("no memory in the stats: %v", stats.Stats)
	}
	ps, err := r.client.PodSandboxStats(r.ctx, &runtime.PodSandboxStatsRequest{PodSandboxId: pod})
	r.must(err)
	if n := ps.Stats.GetLinux().GetProcess().GetProcessCount().GetValue(); n < 2 {
		t.Errorf("%d processes in the pod, want the container's and the init's", n)
	}
	_, err = r.client.UpdateContainerResources(r.ctx, &runtime.UpdateContainerResourcesRequest{ContainerId: id,
		Linux: &runtime.LinuxContainerResources{MemoryLimitInBytes: 100 << 20}})
	r.must(err)
	if got := r.state(id).GetResources().GetLinux().GetMemoryLimitInBytes(); got != 100<<20 {
		t.Errorf("memory limit %d after the update, want %d", got, 100<<20)
	}
	if got := r.exec(id, "echo alive"); got != "alive\n" {
		t.Errorf("exec: %q", got)
	}
	added := r.launch(pod, cfg, "new", "sleep", "300")
	dir, err := node.FindCgroup("memory", added)
	if err != nil || !strings.Contains(dir, r.Parent) {
		t.Errorf("a new container of the old pod is in cgroup %q (%v), want it below %s", dir, err, r.Parent)
	}
	// One of each is removed under the new driver, the rest under the old one.
	r.must(r.client.Destroy(r.ctx, removed))
	_, err = r.client.StopContainer(r.ctx, &runtime.StopContainerRequest{ContainerId: id})
	r.must(err)
	_, err = r.client.RemoveContainer(r.ctx, &runtime.RemoveContainerRequest{ContainerId: id})
	r.must(err)
	r.reconfigure(`"systemd"`, `"cgroupfs"`)
	if st := r.state(added); st.State != running {
		t.Errorf("container %v, want it to run on", st.State)
	}
	r.must(r.client.Destroy(r.ctx, pod))
}
