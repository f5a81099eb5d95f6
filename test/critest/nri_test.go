package critest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/nri/pkg/api"
	"github.com/containerd/nri/pkg/stub"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestPluginEvents: a plugin hears of everything once and in order, whoever
// begins it, and what it hears is right.
func TestPluginEvents(t *testing.T) {
	b := open(t).own("")
	plug := b.plug("10", &plugin{})
	p := b.pod(func(c *runtime.PodSandboxConfig) { c.Labels = map[string]string{"l": "v"} })
	c := p.create(sh("trap 'exit 3' TERM; while :; do sleep 0.1; done"), func(c *runtime.ContainerConfig) {
		c.Envs = []*runtime.KeyValue{{Key: "GREETING", Value: []byte("hello")}}
		c.Annotations = map[string]string{"note": "x"}
	})
	m := plug.last(c.id)
	if m.GetName() != c.cfg.Metadata.Name || m.GetPodSandboxId() != p.id || m.GetAnnotations()["note"] != "x" || !slices.Contains(m.GetEnv(), "GREETING=hello") ||
		len(m.GetArgs()) != 3 || len(m.GetMounts()) < 5 || m.GetState() != api.ContainerState_CONTAINER_CREATED || m.GetLinux().GetCgroupsPath() == "" || m.GetImage().GetName() == "" {
		t.Errorf("created container as the plugin was told of it: %v", m)
	}
	c.start()
	b.must(b.limit(c, 64*mib))
	_, err := b.client.UpdatePodSandboxResources(b.ctx, &runtime.UpdatePodSandboxResourcesRequest{PodSandboxId: p.id, Resources: &runtime.LinuxContainerResources{CpuShares: 100}})
	b.must(err)
	c.stop(10)
	if st := c.status(); st.ExitCode != 3 {
		t.Errorf("exit code %d", st.ExitCode)
	}
	if m := plug.last(c.id); m.GetState() != api.ContainerState_CONTAINER_STOPPED || m.GetExitCode() != 3 || m.GetFinishedAt() == 0 {
		t.Errorf("stopped container as the plugin was told of it: %v", m)
	}
	c.stop(0)
	c.remove()
	c.remove()
	b.hears(plug, c.id, "create", "postcreate", "start", "poststart", "update", "postupdate", "stop", "remove")

	alone := p.run(sh("exit 1"))
	b.hears(plug, alone.id, "create", "postcreate", "start", "poststart", "stop")
	running := p.run(sh("sleep 300"))
	p.stop()
	b.hears(plug, running.id, "create", "postcreate", "start", "poststart", "stop")
	p.stop()
	b.hears(plug, p.id, "run", "update", "postupdate", "stop")
	_, err = b.client.RemovePodSandbox(b.ctx, &runtime.RemovePodSandboxRequest{PodSandboxId: p.id})
	b.must(err)
	b.hears(plug, running.id, "create", "postcreate", "start", "poststart", "stop", "remove")
	b.hears(plug, alone.id, "create", "postcreate", "start", "poststart", "stop", "remove")
	b.hears(plug, p.id, "run", "update", "postupdate", "stop", "remove")
}

// limit sets a container's memory limit through the CRI.
func (b *box) limit(c *container, bytes int64) error {
	_, err := b.client.UpdateContainerResources(b.ctx, &runtime.UpdateContainerResourcesRequest{ContainerId: c.id, Linux: &runtime.LinuxContainerResources{MemoryLimitInBytes: bytes}})
	return err
}

// adjusts makes a plugin adjust every container.
func adjusts(fn func(*api.ContainerAdjustment)) *plugin {
	return &plugin{onCreate: func(context.Context, *api.PodSandbox, *api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate, error) {
		a := &api.ContainerAdjustment{}
		fn(a)
		return a, nil, nil
	}}
}

func TestPluginAdjustments(t *testing.T) {
	b := open(t).own("")
	dir := t.TempDir()
	b.must(os.WriteFile(filepath.Join(dir, "file"), []byte("from the host"), 0o644))
	mark := filepath.Join(dir, "hook")
	b.plug("10", adjusts(func(a *api.ContainerAdjustment) {
		a.AddEnv("ADDED", "yes")
		a.RemoveEnv("GONE")
		a.AddAnnotation("plugin", "was here")
		a.AddMount(&api.Mount{Destination: "/from/plugin", Source: dir, Type: "bind", Options: []string{"rbind", "ro"}})
		a.AddDevice(&api.LinuxDevice{Path: "/dev/mynull", Type: "c", Major: 1, Minor: 3, FileMode: api.FileMode(os.FileMode(0o666))})
		a.AddRlimit("RLIMIT_NOFILE", 333, 222)
		a.AddHooks(&api.Hooks{CreateRuntime: []*api.Hook{{Path: "/bin/sh", Args: []string{"sh", "-c", "cat > " + mark}}}})
		a.SetLinuxMemoryLimit(48 * mib)
		a.SetLinuxCPUShares(300)
		a.SetLinuxCPUSetCPUs("0")
		a.SetLinuxSysctl("net.ipv4.ip_default_ttl", "77")
		score := 444
		a.SetLinuxOomScoreAdj(&score)
	}))
	other := b.plug("20", &plugin{})
	p := b.pod()
	c := p.run(sh("sleep 300"), func(c *runtime.ContainerConfig) { c.Envs = []*runtime.KeyValue{{Key: "GONE", Value: []byte("1")}} },
		resources(func(r *runtime.LinuxContainerResources) {
			r.MemoryLimitInBytes, r.CpuQuota, r.CpuPeriod = 96*mib, 50000, 100000
		}))
	for what, want := range map[string]string{
		"echo $ADDED-$GONE":                                  "yes-",
		"cat /from/plugin/file":                              "from the host",
		"echo x > /dev/mynull && echo fine":                  "fine",
		"grep files /proc/1/limits | tr -s ' '":              "Max open files 222 333 files",
		"cat /proc/sys/net/ipv4/ip_default_ttl":              "77",
		"cat /proc/self/oom_score_adj":                       "444",
		"touch /from/plugin/x 2>/dev/null || echo read-only": "read-only",
	} {
		if got := strings.TrimSpace(c.exec("/bin/sh", "-c", what)); got != want {
			t.Errorf("%s: %q, want %q", what, got, want)
		}
	}
	if got := c.limitOf(memoryLimit); got != strconv.Itoa(48*mib) {
		t.Errorf("memory limit %s, want the plugin's", got)
	}
	if got := c.limitOf(cpuSet); got != "0" {
		t.Errorf("CPU set %q, want the plugin's", got)
	}
	if got, want := c.limitOf(cpuQuota), byVersion("50000", "50000 100000"); got != want {
		t.Errorf("CPU quota %s, want %s, which no plugin changed", got, want)
	}
	r := c.status().GetResources().GetLinux()
	if r.GetMemoryLimitInBytes() != 48*mib || r.GetCpuShares() != 300 || r.GetCpusetCpus() != "0" || r.GetCpuQuota() != 50000 || r.GetOomScoreAdj() != 444 {
		t.Errorf("status tells %v", r)
	}
	var state struct {
		Annotations map[string]string `json:"annotations"`
	}
	raw, err := os.ReadFile(mark)
	b.must(err)
	b.must(json.Unmarshal(raw, &state))
	if state.Annotations["plugin"] != "was here" {
		t.Errorf("the hook saw annotations %v", state.Annotations)
	}
	if env := other.last(c.id).GetEnv(); !slices.Contains(env, "ADDED=yes") {
		t.Errorf("the second plugin was told of %q, without what the first one added", env)
	}

	// An update from the CRI leaves what it does not name, also when the daemon is another one.
	b.must(b.node.Restart(b.ctx))
	b.must(b.limit(c, 80*mib))
	r = c.status().GetResources().GetLinux()
	if got := c.limitOf(cpuSet); got != "0" || r.GetMemoryLimitInBytes() != 80*mib || r.GetCpuShares() != 300 {
		t.Errorf("after an update: CPU set %q, status %v", got, r)
	}
}

func TestPluginBadAdjustments(t *testing.T) {
	b := open(t).own("")
	var bad func(*api.ContainerAdjustment)
	plug := b.plug("10", adjusts(func(a *api.ContainerAdjustment) { bad(a) }))
	p := b.pod()
	tests := []struct {
		name  string
		edit  func(*api.ContainerAdjustment)
		parts []string
	}{
		{"missing source of a mount", func(a *api.ContainerAdjustment) {
			a.AddMount(&api.Mount{Destination: "/d", Source: "/no/such/dir", Type: "bind", Options: []string{"rbind"}})
		}, []string{"/d", "/no/such/dir"}},
		{"relative destination", func(a *api.ContainerAdjustment) { a.AddMount(&api.Mount{Destination: "d", Type: "tmpfs"}) }, []string{"mount", "destination"}},
		{"memory", func(a *api.ContainerAdjustment) { a.SetLinuxMemoryLimit(-7) }, []string{"memory", "-7"}},
		{"CPU set", func(a *api.ContainerAdjustment) { a.SetLinuxCPUSetCPUs("moon") }, []string{"cpuset_cpus", "moon"}},
		{"rlimit", func(a *api.ContainerAdjustment) { a.AddRlimit("RLIMIT_MOON", 1, 1) }, []string{"RLIMIT_MOON"}},
		{"device", func(a *api.ContainerAdjustment) { a.AddDevice(&api.LinuxDevice{Path: "dev", Type: "c"}) }, []string{"device", "dev"}},
		{"CDI device", func(a *api.ContainerAdjustment) { a.AddCDIDevice(&api.CDIDevice{Name: "vendor.example/no=such"}) }, []string{"vendor.example/no=such"}},
		{"control group", func(a *api.ContainerAdjustment) { a.SetLinuxCgroupsPath("../up") }, []string{"cgroups_path", "../up"}},
		{"control group without a parent", func(a *api.ContainerAdjustment) { a.SetLinuxCgroupsPath("/no/such/group") }, []string{"cgroups_path", "/no/such"}},
		{"class", func(a *api.ContainerAdjustment) { a.SetLinuxBlockIOClass("fast") }, []string{"blockio_class", "fast"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			bad = tt.edit
			_, err := p.with(t).tryCreate(sh("true"))
			p.with(t).refused(err, codes.FailedPrecondition, append(tt.parts, "NRI")...)
		})
	}
	bad = func(*api.ContainerAdjustment) {}
	c := p.run(sh("sleep 300"))
	_, err := b.client.ListContainers(b.ctx, &runtime.ListContainersRequest{})
	b.must(err)
	b.hears(plug, c.id, "create", "postcreate", "start", "poststart")
	for _, e := range plug.all() {
		// What a plugin heard of and was not made, it heard the end of.
		if id := strings.TrimPrefix(e, "create "); id != e && id != c.id {
			b.hears(plug, id, "create", "stop", "remove")
		}
	}
	bad = func(a *api.ContainerAdjustment) { a.SetLinuxCgroupsPath(b.parent + "/elsewhere") }
	moved := p.run(sh("sleep 300"))
	// From outside: on cgroup v2 a container has a cgroup namespace.
	if groups, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", moved.pid())); err != nil || !strings.Contains(string(groups), b.parent+"/elsewhere\n") {
		t.Errorf("control groups %s, %v; want %s", groups, err, b.parent+"/elsewhere")
	}
	moved.stop(0)
}

// all returns every event.
func (p *plugin) all() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.events)
}

// TestPluginRefuses: an error of a plugin fails the request, nothing is left, and
// the same request may come again.
func TestPluginRefuses(t *testing.T) {
	b := open(t).own("")
	var refuse bool
	no := errors.New("not today")
	plug := b.plug("10", &plugin{
		onRun: func(context.Context, *api.PodSandbox) error {
			if refuse {
				return no
			}
			return nil
		},
		onStart: func(*api.Container) error {
			if refuse {
				return no
			}
			return nil
		}})
	refuse = true
	cfg := b.podConfig()
	_, err := b.client.Run(b.ctx, cfg)
	if err == nil || !strings.Contains(err.Error(), "not today") {
		t.Errorf("pod: %v, want the plugin's error", err)
	}
	refuse = false
	id, err := b.client.Run(b.ctx, cfg)
	b.must(err)
	p := b.adopt(id, cfg)
	c := p.create(sh("sleep 300"))
	refuse = true
	_, err = b.client.StartContainer(b.ctx, &runtime.StartContainerRequest{ContainerId: c.id})
	if err == nil || !strings.Contains(err.Error(), "not today") {
		t.Errorf("start: %v, want the plugin's error", err)
	}
	if st := c.wait(); st.Reason != "StartError" || !strings.Contains(st.Message, "not today") {
		t.Errorf("container that was not started: %s: %s", st.Reason, st.Message)
	}
	b.hears(plug, c.id, "create", "postcreate", "start", "stop")
}

// update is a change that a plugin wants.
func update(id string, fn func(*api.ContainerUpdate)) *api.ContainerUpdate {
	u := &api.ContainerUpdate{ContainerId: id}
	fn(u)
	return u
}

// TestPluginUpdates: what plugins want of other containers is made, all or
// nothing, and what is asked for through the CRI as they want it.
func TestPluginUpdates(t *testing.T) {
	b := open(t).own("")
	var wants []*api.ContainerUpdate
	plug := b.plug("10", &plugin{
		onCreate: func(context.Context, *api.PodSandbox, *api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate, error) {
			return nil, wants, nil
		},
		onStop: func(context.Context, *api.Container) []*api.ContainerUpdate { return wants },
		onUpdate: func(c *api.Container, res *api.LinuxResources) []*api.ContainerUpdate {
			return append(wants, update(c.GetId(), func(u *api.ContainerUpdate) { u.SetLinuxMemoryLimit(res.GetMemory().GetLimit().GetValue() / 2) }))
		},
	})
	p := b.pod()
	shares := func(n uint64) func(*api.ContainerUpdate) {
		return func(u *api.ContainerUpdate) { u.SetLinuxCPUShares(n) }
	}
	memory := func(n int64) func(*api.ContainerUpdate) {
		return func(u *api.ContainerUpdate) { u.SetLinuxMemoryLimit(n) }
	}
	one, two := p.run(sh("sleep 300")), p.run(sh("sleep 300"), resources(func(r *runtime.LinuxContainerResources) { r.MemoryLimitInBytes = 64 * mib }))
	is := func(when string, c *container, bytes int64) {
		t.Helper()
		if got := c.limitOf(memoryLimit); got != strconv.FormatInt(bytes, 10) {
			t.Errorf("%s: memory limit %s, want %d", when, got, bytes)
		}
	}
	unlimited := one.limitOf(memoryLimit)

	wants = []*api.ContainerUpdate{update(one.id, memory(32*mib)), update(two.id, memory(40*mib))}
	made := p.run(sh("sleep 300"))
	is("with a creation", one, 32*mib)
	is("with a creation", two, 40*mib)
	if got := one.status().GetResources().GetLinux().GetMemoryLimitInBytes(); got != 32*mib {
		t.Errorf("status tells a limit of %d", got)
	}
	wants = []*api.ContainerUpdate{update(one.id, memory(36*mib))}
	made.stop(0)
	is("with a stop", one, 36*mib)

	wants = []*api.ContainerUpdate{update(one.id, memory(28*mib))}
	b.must(b.limit(two, 100*mib))
	is("as the plugin wants what was asked for", two, 50*mib)
	is("with an update of another one", one, 28*mib)

	// All or nothing.
	fresh := p.run(sh("sleep 300"))
	wants = []*api.ContainerUpdate{update(fresh.id, memory(30*mib)), update(two.id, memory(44*mib)), update(one.id, func(u *api.ContainerUpdate) { u.SetLinuxCPUSetCPUs("9999") })}
	if _, err := p.tryCreate(sh("true")); err == nil || !strings.Contains(err.Error(), one.id) {
		t.Errorf("creation with an update that cannot be: %v, want an error that names %s", err, one.id)
	}
	is("after an update that was taken back", two, 50*mib)
	if got := fresh.limitOf(memoryLimit); got != unlimited {
		t.Errorf("after an update that was taken back: memory limit %s, want %s", got, unlimited)
	}
	if r := fresh.status().GetResources().GetLinux().GetMemoryLimitInBytes(); r != 0 {
		t.Errorf("status tells a limit of %d", r)
	}
	wants[2].IgnoreFailure = true
	ok := p.run(sh("sleep 300"))
	is("beside one that may fail", two, 44*mib)
	wants = []*api.ContainerUpdate{update("0123456789abcdef", shares(7)), update(two.id, memory(45*mib))}
	ok2 := p.run(sh("sleep 300"))
	is("beside one of a container that is gone", two, 45*mib)
	ok.stop(0)
	ok2.stop(0)

	// Unsolicited.
	wants = nil
	failed, err := plug.stub.UpdateContainers([]*api.ContainerUpdate{update(one.id, memory(33*mib)), update("gone", shares(9))})
	if err != nil || len(failed) != 1 || failed[0].GetContainerId() != "gone" {
		t.Errorf("unsolicited updates: %v, %v; want the one of a container that does not exist to fail", failed, err)
	}
	is("unsolicited", one, 33*mib)
	failed, err = plug.stub.UpdateContainers([]*api.ContainerUpdate{update(one.id, memory(34*mib)), update(two.id, func(u *api.ContainerUpdate) { u.SetLinuxCPUSetCPUs("9999") })})
	if err != nil || len(failed) != 2 {
		t.Errorf("unsolicited updates with one that cannot be: %v, %v; want none in force", failed, err)
	}
	is("unsolicited and taken back", one, 33*mib)
}

// TestPluginHangs: a plugin that does not answer costs its time limit, and then
// the node goes on without it. What does not concern plugins does not wait.
func TestPluginHangs(t *testing.T) {
	b := open(t).own(`nri_plugin_request_timeout = "1s"`)
	p := b.pod()
	before := p.run(sh("sleep 300"))
	hang := make(chan struct{})
	b.plug("10", &plugin{onCreate: func(context.Context, *api.PodSandbox, *api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate, error) {
		<-hang
		return nil, nil, nil
	}})
	other := b.plug("20", &plugin{})
	defer close(hang)
	var c *container
	var all sync.WaitGroup
	begun := time.Now()
	all.Go(func() { c = p.run(sh("sleep 300")) })
	for range 10 { // these do not wait for plugins
		before.status()
		before.exec("true")
	}
	reads := time.Since(begun)
	all.Wait()
	if took := time.Since(begun); took < time.Second || reads > took {
		t.Errorf("creation took %s and ten reads meanwhile %s; want the limit of 1 s for the one", took, reads)
	}
	b.hears(other, c.id, "create", "postcreate", "start", "poststart")
	begun = time.Now()
	next := p.run(sh("sleep 300"))
	b.hears(other, next.id, "create", "postcreate", "start", "poststart")
	t.Logf("with the plugin that hangs: %s; the next container: %s", reads, time.Since(begun))

	// One that stays and hangs in each removal makes none impossible.
	b.plug("30", &plugin{onRemove: func(context.Context, *api.Container) error { <-hang; return nil }}, stub.WithFailurePolicy(&api.FailurePolicy{KeepConnected: true, FailRequest: true}))
	next.stop(0)
	next.remove()
	c.remove()
	if r, err := b.client.ListContainers(b.ctx, &runtime.ListContainersRequest{}); err != nil || len(r.Containers) != 1 {
		t.Errorf("containers left: %v, %v", r, err)
	}
}

// TestPluginDies: one that goes away in the middle of a request costs nothing.
func TestPluginDies(t *testing.T) {
	b := open(t).own("")
	var plug *plugin
	dead := make(chan struct{})
	plug = &plugin{onCreate: func(context.Context, *api.PodSandbox, *api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate, error) {
		close(dead)
		go plug.stub.Stop()
		time.Sleep(100 * time.Millisecond)
		return nil, nil, nil
	}}
	b.plug("10", plug)
	p := b.pod()
	c := p.run(sh("sleep 300"))
	<-dead
	c.stop(0)
	again := b.plug("10", &plugin{})
	if got := again.heard(c.id); len(got) != 0 {
		t.Errorf("a plugin that connects later heard %q of a container that has ended", got)
	}
	if got := again.heard(p.id); !slices.Equal(got, []string{"sync"}) {
		t.Errorf("a plugin that connects later heard %q of the pod", got)
	}
	// A client that connects and says nothing keeps others out for its limit only.
	conn, err := net.Dial("unix", b.node.NRI)
	b.must(err)
	defer conn.Close()
	fine := b.plug("20", &plugin{})
	d := p.run(sh("sleep 300"))
	b.hears(fine, d.id, "create", "postcreate", "start", "poststart")
}

// TestPluginSynchronisation: of containers that are made while plugins connect,
// each plugin hears of each, once.
func TestPluginSynchronisation(t *testing.T) {
	b := open(t).own("")
	p := b.pod()
	var mu sync.Mutex
	var ids []string
	var all sync.WaitGroup
	for range 3 {
		all.Go(func() {
			for range 8 {
				c, err := p.tryCreateQuietly(sh("sleep 300"))
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				ids = append(ids, c)
				mu.Unlock()
			}
		})
	}
	var plugins []*plugin
	for i := range 6 {
		plugins = append(plugins, b.plug(fmt.Sprintf("%02d", i), &plugin{onSync: func(context.Context) []*api.ContainerUpdate { time.Sleep(50 * time.Millisecond); return nil }}))
	}
	all.Wait()
	*p.all = append(*p.all, ids...)
	for i, plug := range plugins {
		for _, id := range ids {
			var n int
			for _, e := range plug.heard(id) {
				if e == "sync" || e == "create" {
					n++
				}
			}
			if n != 1 {
				t.Errorf("plugin %d heard %q of container %.12s", i, plug.heard(id), id)
			}
		}
	}
	// One that takes long over it holds up creation, and nothing else.
	release := make(chan struct{})
	late := &plugin{onSync: func(context.Context) []*api.ContainerUpdate {
		<-release
		return []*api.ContainerUpdate{update(ids[0], func(u *api.ContainerUpdate) { u.SetLinuxMemoryLimit(64 * mib) })}
	}}
	b.plug("50", late)
	made := make(chan *container)
	go func() {
		c, err := p.tryCreate(sh("sleep 300"))
		if err != nil {
			t.Error(err)
		}
		made <- c
	}()
	first := &container{pod: p, id: ids[0]}
	select {
	case <-made:
		t.Error("a container was made while a plugin was being synchronised")
	case <-time.After(2500 * time.Millisecond): // longer than a request may take
		first.status()
	}
	close(release)
	c := <-made
	b.hears(late, c.id, "create", "postcreate")
	if got := first.limitOf(memoryLimit); got != strconv.Itoa(64*mib) {
		t.Errorf("memory limit %s, want what the plugin wanted when it was synchronised", got)
	}
}

// tryCreateQuietly creates a container and returns its ID; it may be called from
// any goroutine.
func (p *pod) tryCreateQuietly(command []string) (string, error) {
	r, err := p.client.CreateContainer(p.ctx, &runtime.CreateContainerRequest{PodSandboxId: p.id, Config: p.config(command), SandboxConfig: p.cfg})
	return r.GetContainerId(), err
}

// TestPluginRestart: a new daemon tells plugins of what there is, and of the end
// of what ended without it.
func TestPluginRestart(t *testing.T) {
	b := open(t).own("")
	first := b.plug("10", &plugin{})
	p := b.pod()
	lives, ends := p.run(sh("sleep 300")), p.run(sh("sleep 300"))
	gone := p.run(sh("true"))
	b.hears(first, gone.id, "create", "postcreate", "start", "poststart", "stop")
	pid := ends.pid()
	b.must(b.node.Kill())
	b.must(unix.Kill(pid, unix.SIGKILL))
	b.until("end of a container without a daemon", func() bool { return unix.Kill(pid, 0) != nil })
	b.must(b.node.Start(b.ctx))
	plug := b.plug("10", &plugin{})
	b.hears(plug, ends.id, "sync", "stop")
	b.hears(plug, p.id, "sync")
	b.hears(plug, lives.id, "sync")
	if m := plug.last(lives.id); m.GetState() != api.ContainerState_CONTAINER_RUNNING || len(m.GetArgs()) != 3 || m.GetPid() == 0 {
		t.Errorf("running container as the plugin was told of it: %v", m)
	}
	if got := plug.heard(gone.id); len(got) != 0 {
		t.Errorf("plugin heard %q of what it had heard the end of", got)
	}
	second := b.plug("20", &plugin{})
	lives.stop(0)
	b.hears(plug, lives.id, "sync", "stop")
	b.hears(second, lives.id, "sync", "stop")
	ends.remove()
	b.hears(plug, ends.id, "sync", "stop", "remove")
}

// TestNRIOff: without it there is no socket; and the socket of another runtime is
// left to that.
func TestNRIOff(t *testing.T) {
	o := open(t)
	b := o.own("nri = false")
	if _, err := os.Stat(b.node.NRI); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("socket: %v", err)
	}
	b.pod().run(sh("sleep 300"))

	taken := filepath.Join(t.TempDir(), "nri.sock")
	l, err := net.Listen("unix", taken)
	b.must(err)
	defer l.Close()
	b = o.own(fmt.Sprintf("nri_socket_path = %q", taken), "nri_socket_path")
	b.pod().run(sh("sleep 300"))
	r, err := b.client.Status(b.ctx, &runtime.StatusRequest{Verbose: true})
	b.must(err)
	if !strings.Contains(r.Info["nri"], "another runtime listens") {
		t.Errorf("verbose status tells %q of NRI", r.Info["nri"])
	}
}
