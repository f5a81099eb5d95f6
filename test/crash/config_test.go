package crash

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berthd/berth/test/images"
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

// addConfig puts TOML at the end of the configuration of a node that is laid out.
func (r *rig) addConfig(text string) {
	r.Helper()
	f, err := os.OpenFile(r.Config, os.O_APPEND|os.O_WRONLY, 0)
	r.must(err)
	_, err = f.WriteString("\n" + text)
	r.must(errors.Join(err, f.Close()))
}

// handlerNode is a node with the handlers runc and second, which is runc as well
// but keeps its state in a directory of its own, and more.
func handlerNode(t *testing.T, more string) (r *rig, root string) {
	t.Helper()
	r = newNode(t, node.Options{Config: `default_runtime = "runc"`})
	runc, err := exec.LookPath("runc")
	r.must(err)
	root = filepath.Join(t.TempDir(), "root")
	r.addConfig(fmt.Sprintf("[runtimes.second]\npath = %q\nroot = %q\npod_annotations = [\"keep.example/*\", \"both\"]\ncontainer_annotations = [\"both\"]\n%s",
		runc, root, more))
	r.begin()
	return r, root
}

// runWith runs a pod of a handler with one container.
func (r *rig) runWith(handler, name string, edits ...func(*runtime.PodSandboxConfig)) (pod, container string) {
	r.Helper()
	cfg := r.podConfig(name)
	for _, e := range edits {
		e(cfg)
	}
	p, err := r.client.RunPodSandbox(r.ctx, &runtime.RunPodSandboxRequest{Config: cfg, RuntimeHandler: handler})
	r.must(err)
	c := node.ContainerConfig("c", refs[images.Busybox], "sleep", "300")
	c.Annotations = map[string]string{"both": "container", "other": "1"}
	id, err := r.client.Launch(r.ctx, p.PodSandboxId, c, cfg)
	r.must(err)
	return p.PodSandboxId, id
}

// stateOf counts what OCI runtimes keep of a container in a directory.
func (r *rig) stateOf(root, id string) int {
	r.Helper()
	found, err := filepath.Glob(filepath.Join(root, id+"*"))
	r.must(err)
	return len(found)
}

// TestHandlers: a pod has the handler that it asked for, whatever becomes of the
// configuration.
func TestHandlers(t *testing.T) {
	t.Parallel()
	r, root := handlerNode(t, "")
	notes := func(c *runtime.PodSandboxConfig) {
		c.Annotations = map[string]string{"keep.example/a": "1", "both": "pod", "org.systemd.property.MemoryMax": "1"}
	}
	first := filepath.Join(r.RunDir, "oci", "runc")
	podA, a := r.runWith("", "a", notes)
	podB, b := r.runWith("second", "b", notes)
	podC, c := r.runWith("second", "c")
	for _, tc := range []struct {
		id, handler, root string
		notes             map[string]string
	}{{a, "", first, nil}, {b, "second", root, map[string]string{"keep.example/a": "1", "both": "container"}}} {
		st, err := r.client.ContainerStatus(r.ctx, &runtime.ContainerStatusRequest{ContainerId: tc.id, Verbose: true})
		r.must(err)
		var info struct {
			RuntimeHandler string
			RuntimeSpec    struct{ Annotations map[string]string }
		}
		r.must(json.Unmarshal([]byte(st.Info["info"]), &info))
		if info.RuntimeHandler != tc.handler || !maps.Equal(info.RuntimeSpec.Annotations, tc.notes) {
			t.Errorf("handler %q was told %v, want %q and %v", info.RuntimeHandler, info.RuntimeSpec.Annotations, tc.handler, tc.notes)
		}
		if r.stateOf(tc.root, tc.id) != 1 {
			t.Errorf("handler %q: no state of container %s in %s", tc.handler, tc.id, tc.root)
		}
	}
	_, err := r.client.RunPodSandbox(r.ctx, &runtime.RunPodSandboxRequest{Config: r.podConfig("x"), RuntimeHandler: "third"})
	r.wants(err, codes.InvalidArgument, "third", "runc", "second")

	// Another default, another root, and a directory that others use as well.
	moved := root + "-moved"
	r.reconfigure(`default_runtime = "runc"`, `default_runtime = "second"`, fmt.Sprintf("root = %q", root), fmt.Sprintf("root = %q", moved))
	foreign := filepath.Join(moved, strings.Repeat("ab", 32))
	r.must(os.MkdirAll(foreign, 0o700))
	r.must(os.WriteFile(filepath.Join(foreign, "state.json"), []byte(`{"bundle":"/run/else/c"}`), 0o600))
	r.must(r.Kill())
	r.must(r.Start(r.ctx))
	for _, id := range []string{a, b} {
		if got := r.exec(id, "echo alive"); got != "alive\n" {
			t.Errorf("exec: %q", got)
		}
	}
	_, err = r.client.UpdateContainerResources(r.ctx, &runtime.UpdateContainerResourcesRequest{ContainerId: b,
		Linux: &runtime.LinuxContainerResources{MemoryLimitInBytes: 100 << 20}})
	r.must(err)
	podD, d := r.runWith("", "d")
	if r.stateOf(moved, d) != 1 {
		t.Errorf("the new default is not used: nothing in %s", moved)
	}
	r.must(r.client.Destroy(r.ctx, podA))
	r.must(r.client.Destroy(r.ctx, podB))
	if n := r.stateOf(first, a) + r.stateOf(root, b); n != 0 {
		t.Errorf("%d states are left of removed containers", n)
	}

	// The handler goes.
	r.reconfigure(`default_runtime = "second"`, `default_runtime = "runc"`, "[runtimes.second]", "[runtimes.renamed]")
	if st := r.state(c); st.State != running {
		t.Errorf("container of a handler that has gone is %v", st.State)
	}
	r.must(r.client.Destroy(r.ctx, podC))
	r.must(r.client.Destroy(r.ctx, podD))
	if n := r.stateOf(root, c) + r.stateOf(moved, d); n != 0 {
		t.Errorf("%d states are left of removed containers", n)
	}
	if _, err := os.Stat(foreign); err != nil {
		t.Errorf("state of somebody else: %v", err)
	}
}

// TestRuntimeHangs: a runtime that does not answer takes no time from Status, but
// for those that are asked for just after the start, and is no harm to the others;
// when it is mended it is used.
func TestRuntimeHangs(t *testing.T) {
	t.Parallel()
	stuck := filepath.Join(t.TempDir(), "stuck")
	(&rig{T: t}).script(stuck, "exec sleep 600\n")
	r, _ := handlerNode(t, fmt.Sprintf("[runtimes.stuck]\npath = %q\n", stuck))
	_, err := r.client.Status(r.ctx, &runtime.StatusRequest{}) // waits until the first probe is given up
	r.must(err)
	const asked = 20
	slow := 0 // a busy machine makes some slow, a wait for the runtime all
	for range asked {
		begun := time.Now()
		st, err := r.client.Status(r.ctx, &runtime.StatusRequest{Verbose: true})
		r.must(err)
		if time.Since(begun) > time.Second {
			slow++
		}
		features := map[string]bool{}
		for _, h := range st.RuntimeHandlers {
			features[h.Name] = h.GetFeatures().GetRecursiveReadOnlyMounts()
		}
		if _, ok := features["stuck"]; !ok || len(features) != 4 || features["stuck"] || features["second"] != features["runc"] {
			t.Errorf("handlers %v", features)
		}
		if !strings.Contains(st.Info["sandbox"], "stuck") {
			t.Errorf("info %s", st.Info["sandbox"])
		}
	}
	if slow > asked/2 {
		t.Errorf("%d of %d calls of Status took more than a second", slow, asked)
	}
	r.runWith("second", "well")
	cfg := r.podConfig("stuck")
	p, err := r.client.RunPodSandbox(r.ctx, &runtime.RunPodSandboxRequest{Config: cfg, RuntimeHandler: "stuck"})
	r.must(err)
	_, err = r.client.Launch(r.ctx, p.PodSandboxId, node.ContainerConfig("c", refs[images.Busybox], "sleep", "300"), cfg)
	r.wants(err, codes.Unavailable, "stuck")
	runc, err := exec.LookPath("runc")
	r.must(err)
	r.script(stuck, fmt.Sprintf("exec %s \"$@\"\n", runc))
	_, err = r.client.Launch(r.ctx, p.PodSandboxId, node.ContainerConfig("c", refs[images.Busybox], "sleep", "300"), cfg)
	r.must(err)
}
