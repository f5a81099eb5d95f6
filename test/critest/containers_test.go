package critest

import (
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berthd/berth/test/images"
)

const (
	created = runtime.ContainerState_CONTAINER_CREATED
	running = runtime.ContainerState_CONTAINER_RUNNING
	exited  = runtime.ContainerState_CONTAINER_EXITED
)

func TestContainerLife(t *testing.T) {
	b := open(t)
	p := b.pod()
	begin := time.Now()
	c := p.create(sh("sleep 300"), func(cfg *runtime.ContainerConfig) {
		cfg.Labels = map[string]string{"app": "life"}
		cfg.Annotations = map[string]string{"example.org/note": "kept"}
		cfg.Metadata.Attempt = 2
	})
	within := func(what string, ns int64) {
		t.Helper()
		if at := time.Unix(0, ns); at.Before(begin.Add(-time.Second)) || at.After(time.Now()) {
			t.Errorf("%s %v, created after %v", what, at, begin)
		}
	}
	st := c.status()
	if st.Id != c.id || st.State != created || !proto.Equal(st.Metadata, c.cfg.Metadata) || st.StartedAt != 0 || st.FinishedAt != 0 {
		t.Errorf("created container: %v", st)
	}
	within("created at", st.CreatedAt)
	if st.Labels["app"] != "life" || st.Annotations["example.org/note"] != "kept" {
		t.Errorf("labels %v, annotations %v", st.Labels, st.Annotations)
	}
	if id := b.images[images.Busybox].ConfigID; st.ImageId != id && st.ImageRef != id {
		t.Errorf("image_id %q, image_ref %q, want %q", st.ImageId, st.ImageRef, id)
	}
	if st.GetImage().GetImage() != b.ref(images.Busybox) {
		t.Errorf("image %q, want %q", st.GetImage().GetImage(), b.ref(images.Busybox))
	}
	if st.LogPath != c.log {
		t.Errorf("log path %q, want %q", st.LogPath, c.log)
	}
	c.start()
	st = c.status()
	if st.State != running || st.FinishedAt != 0 {
		t.Errorf("started container: %v", st)
	}
	within("started at", st.StartedAt)
	c.stop(0)
	st = c.status()
	if st.State != exited || st.ExitCode != 137 {
		t.Errorf("stopped container: %v, exit code %d, want 137", st.State, st.ExitCode)
	}
	within("finished at", st.FinishedAt)
	if st.CreatedAt > st.StartedAt || st.StartedAt > st.FinishedAt {
		t.Errorf("times out of order: created %d, started %d, finished %d", st.CreatedAt, st.StartedAt, st.FinishedAt)
	}
	c.remove()
	c.remove() // idempotent
	_, err := b.client.ContainerState(b.ctx, c.id)
	b.refused(err, codes.NotFound, c.id[:12])
}

func TestContainerExit(t *testing.T) {
	b := open(t)
	// With the host's PID namespace: process 1 of a namespace of its own does
	// not get the signals that it sends itself.
	host := security(func(s *runtime.LinuxContainerSecurityContext) { s.NamespaceOptions.Pid = runtime.NamespaceMode_NODE })
	p := b.pod(func(cfg *runtime.PodSandboxConfig) {
		cfg.Linux.SecurityContext.NamespaceOptions.Pid = runtime.NamespaceMode_NODE
	})
	for _, c := range []struct {
		name, script string
		code         int32
		reason       string
	}{
		{"success", "exit 0", 0, "Completed"},
		{"error", "exit 3", 3, "Error"},
		{"highest", "exit 255", 255, "Error"},
		{"not executable", "exec /etc/passwd", 126, "Error"},
		{"not there", "exec /no/such/program", 127, "Error"},
		{"segmentation fault", "kill -SEGV $$; sleep 9", 139, "Error"},
		{"termination", "kill -TERM $$; sleep 9", 143, "Error"},
	} {
		t.Run(c.name, func(t *testing.T) {
			st := p.with(t).run(sh(c.script), host).wait()
			if st.ExitCode != c.code || st.Reason != c.reason {
				t.Errorf("exit code %d, reason %q; want %d, %q", st.ExitCode, st.Reason, c.code, c.reason)
			}
		})
	}
}

// TestContainerSameMetadata: creation is idempotent by name and attempt.
func TestContainerSameMetadata(t *testing.T) {
	b := open(t)
	b.ours()
	p := b.pod()
	cfg := p.config(sh("sleep 300"))
	ids, errs := make([]string, 8), make([]error, 8)
	var wg sync.WaitGroup
	create := func(cfg *runtime.ContainerConfig) (string, error) {
		r, err := b.client.CreateContainer(b.ctx, &runtime.CreateContainerRequest{PodSandboxId: p.id, Config: cfg, SandboxConfig: p.cfg})
		return r.GetContainerId(), err
	}
	for i := range ids {
		wg.Go(func() { ids[i], errs[i] = create(cfg) })
	}
	wg.Wait()
	for i := range ids {
		b.must(errs[i])
		if ids[i] != ids[0] {
			t.Errorf("call %d: container %.12s, want %.12s", i, ids[i], ids[0])
		}
	}
	next := proto.Clone(cfg).(*runtime.ContainerConfig)
	next.Metadata.Attempt++
	id, err := create(next)
	b.must(err)
	if id == ids[0] {
		t.Error("the next attempt got the same container")
	}
	r, err := b.client.ListContainers(b.ctx, &runtime.ListContainersRequest{Filter: &runtime.ContainerFilter{PodSandboxId: p.id}})
	b.must(err)
	if len(r.Containers) != 2 {
		t.Errorf("%d containers in the pod, want 2", len(r.Containers))
	}
	*p.all = append(*p.all, ids[0], id)
}

func TestContainerWrongState(t *testing.T) {
	b := open(t)
	p := b.pod()
	start := func(c *container) error {
		_, err := b.client.StartContainer(b.ctx, &runtime.StartContainerRequest{ContainerId: c.id})
		return err
	}
	c := p.run(sh("sleep 300"))
	if err := start(c); b.node != nil && err != nil {
		t.Errorf("a kubelet that asks again for a start that it has got: %v", err)
	}
	c.stop(0)
	if err := start(c); err == nil {
		t.Error("start of an exited container: no error")
	} else if b.node != nil {
		b.refused(err, codes.FailedPrecondition, c.id[:12], "exited")
	}
	_, err := b.client.ExecSync(b.ctx, &runtime.ExecSyncRequest{ContainerId: c.id, Cmd: []string{"true"}})
	if err == nil {
		t.Error("exec in an exited container: no error")
	} else if b.node != nil {
		b.refused(err, codes.FailedPrecondition, c.id[:12])
	}
	fresh := p.create(sh("sleep 300"))
	if _, err := b.client.ExecSync(b.ctx, &runtime.ExecSyncRequest{ContainerId: fresh.id, Cmd: []string{"true"}}); err == nil {
		t.Error("exec in a container that was never started: no error")
	}
	fresh.stop(0)
	fresh.remove()
}

func TestContainerRemoveRunning(t *testing.T) {
	b := open(t)
	p := b.pod()
	c := p.run([]string{"/guest", "stubborn"})
	c.sees("ready")
	begin := time.Now()
	c.remove()
	if d := time.Since(begin); d > 25*time.Second {
		t.Errorf("removal took %v: it has no grace to give", d)
	}
	_, err := b.client.ContainerState(b.ctx, c.id)
	b.refused(err, codes.NotFound)
	if ids := p.containerIDs(nil); len(ids) != 0 {
		t.Errorf("still listed: %v", ids)
	}
}

// containerIDs lists the pod's containers that match a filter.
func (p *pod) containerIDs(f *runtime.ContainerFilter) []string {
	p.Helper()
	if f == nil {
		f = &runtime.ContainerFilter{}
	}
	f.PodSandboxId = p.id
	r, err := p.client.ListContainers(p.ctx, &runtime.ListContainersRequest{Filter: f})
	p.must(err)
	var ids []string
	for _, c := range r.Containers {
		ids = append(ids, c.Id)
	}
	slices.Sort(ids)
	return ids
}

func TestContainerFilters(t *testing.T) {
	b := open(t)
	p, other := b.pod(), b.pod()
	label := func(v string) edit {
		return func(c *runtime.ContainerConfig) { c.Labels = map[string]string{"v": v, "all": "x"} }
	}
	one, two, three := p.create(sh("true"), label("1")), p.run(sh("sleep 300"), label("2")), p.run(sh("true"), label("3"))
	foreign := other.create(sh("true"), label("1"))
	three.wait()
	state := func(s runtime.ContainerState) *runtime.ContainerStateValue {
		return &runtime.ContainerStateValue{State: s}
	}
	for _, c := range []struct {
		name   string
		filter *runtime.ContainerFilter
		want   []string
	}{
		{"pod", &runtime.ContainerFilter{}, []string{one.id, two.id, three.id}},
		{"created", &runtime.ContainerFilter{State: state(created)}, []string{one.id}},
		{"running", &runtime.ContainerFilter{State: state(running)}, []string{two.id}},
		{"exited", &runtime.ContainerFilter{State: state(exited)}, []string{three.id}},
		{"label", &runtime.ContainerFilter{LabelSelector: map[string]string{"v": "1"}}, []string{one.id}},
		{"two labels", &runtime.ContainerFilter{LabelSelector: map[string]string{"v": "2", "all": "x"}}, []string{two.id}},
		{"labels that exclude each other", &runtime.ContainerFilter{LabelSelector: map[string]string{"v": "2", "all": "y"}}, nil},
		{"ID", &runtime.ContainerFilter{Id: two.id}, []string{two.id}},
		{"ID of another pod", &runtime.ContainerFilter{Id: foreign.id}, nil},
		{"ID and state that exclude each other", &runtime.ContainerFilter{Id: two.id, State: state(exited)}, nil},
	} {
		slices.Sort(c.want)
		if got := p.containerIDs(c.filter); !slices.Equal(got, c.want) {
			t.Errorf("%s: got %.12q, want %.12q", c.name, got, c.want)
		}
	}
	r, err := b.client.ListContainers(b.ctx, &runtime.ListContainersRequest{Filter: &runtime.ContainerFilter{Id: two.id}})
	b.must(err)
	if len(r.Containers) != 1 {
		t.Fatalf("list by ID has %d entries", len(r.Containers))
	}
	if got, st := r.Containers[0], two.status(); got.PodSandboxId != p.id || got.State != running || got.CreatedAt != st.CreatedAt ||
		!proto.Equal(got.Metadata, st.Metadata) || got.ImageId != st.ImageId || got.Labels["v"] != "2" {
		t.Errorf("list has %v, status has %v", got, st)
	}
}

func TestContainerBadInput(t *testing.T) {
	b := open(t)
	b.ours()
	p := b.pod()
	for _, c := range []struct {
		name  string
		edit  edit
		code  codes.Code
		parts []string
	}{
		{"no metadata", func(c *runtime.ContainerConfig) { c.Metadata = nil }, codes.InvalidArgument, []string{"metadata"}},
		{"no name", func(c *runtime.ContainerConfig) { c.Metadata.Name = "" }, codes.InvalidArgument, []string{"name"}},
		{"no image", func(c *runtime.ContainerConfig) { c.Image = nil }, codes.InvalidArgument, []string{"image"}},
		{"image that is not here", func(c *runtime.ContainerConfig) { c.Image.Image = "example.org/not/here:1" }, codes.NotFound, []string{"example.org/not/here:1"}},
		{"log path that climbs", func(c *runtime.ContainerConfig) { c.LogPath = "../../escape.log" }, codes.InvalidArgument, []string{"log", "../../escape.log"}},
		{"working directory not absolute", func(c *runtime.ContainerConfig) { c.WorkingDir = "a/b" }, codes.InvalidArgument, []string{"a/b"}},
		{"variable without a name", func(c *runtime.ContainerConfig) { c.Envs = []*runtime.KeyValue{{Value: []byte("x")}} }, codes.InvalidArgument, []string{"env"}},
		{"memory negative", func(c *runtime.ContainerConfig) { c.Linux.Resources.MemoryLimitInBytes = -5 }, codes.InvalidArgument, []string{"memory", "-5"}},
		{"OOM score out of range", func(c *runtime.ContainerConfig) { c.Linux.Resources.OomScoreAdj = 1001 }, codes.InvalidArgument, []string{"oom", "1001"}},
		{"CPU set of no kind", func(c *runtime.ContainerConfig) { c.Linux.Resources.CpusetCpus = "0-x" }, codes.InvalidArgument, []string{"cpuset", "0-x"}},
		{"mount without a target", func(c *runtime.ContainerConfig) { c.Mounts = []*runtime.Mount{{HostPath: "/tmp"}} }, codes.InvalidArgument, []string{"mount"}},
		{"mount without a source", func(c *runtime.ContainerConfig) { c.Mounts = []*runtime.Mount{{ContainerPath: "/x"}} }, codes.InvalidArgument, []string{"mount"}},
		{"recursive read-only, but writable", func(c *runtime.ContainerConfig) {
			c.Mounts = []*runtime.Mount{{HostPath: "/tmp", ContainerPath: "/x", RecursiveReadOnly: true}}
		}, codes.InvalidArgument, []string{"recursive"}},
		{"recursive read-only, but propagating", func(c *runtime.ContainerConfig) {
			c.Mounts = []*runtime.Mount{{HostPath: "/tmp", ContainerPath: "/x", Readonly: true, RecursiveReadOnly: true, Propagation: runtime.MountPropagation_PROPAGATION_HOST_TO_CONTAINER}}
		}, codes.InvalidArgument, []string{"recursive"}},
		{"unknown capability", security(func(s *runtime.LinuxContainerSecurityContext) {
			s.Capabilities = &runtime.Capability{AddCapabilities: []string{"MAKE_COFFEE"}}
		}), codes.InvalidArgument, []string{"MAKE_COFFEE"}},
		{"group without a user", security(func(s *runtime.LinuxContainerSecurityContext) { s.RunAsGroup = &runtime.Int64Value{Value: 5} }), codes.InvalidArgument, []string{"group"}},
		{"user out of range", security(func(s *runtime.LinuxContainerSecurityContext) { s.RunAsUser = &runtime.Int64Value{Value: 1 << 32} }), codes.InvalidArgument, []string{"4294967296"}},
		{"user negative", security(func(s *runtime.LinuxContainerSecurityContext) { s.RunAsUser = &runtime.Int64Value{Value: -1} }), codes.InvalidArgument, []string{"-1"}},
		{"seccomp profile that is not there", security(func(s *runtime.LinuxContainerSecurityContext) {
			s.Seccomp = &runtime.SecurityProfile{ProfileType: runtime.SecurityProfile_Localhost, LocalhostRef: "/no/such/profile.json"}
		}), codes.InvalidArgument, []string{"/no/such/profile.json"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			created, err := p.tryCreate(sh("true"), c.edit)
			if err == nil {
				created.remove()
			}
			b.with(t).refused(err, c.code, c.parts...)
		})
	}
	t.Run("no config", func(t *testing.T) {
		_, err := b.client.CreateContainer(b.ctx, &runtime.CreateContainerRequest{PodSandboxId: p.id, SandboxConfig: p.cfg})
		b.with(t).refused(err, codes.InvalidArgument, "config")
	})
	t.Run("command that is not there", func(t *testing.T) {
		p := p.with(t)
		p.refuses([]string{"/no/such/command"}, func(*runtime.ContainerConfig) {}, "/no/such/command")
	})
	t.Run("no command at all", func(t *testing.T) {
		p := p.with(t)
		b.pull(b.ref(images.Large))
		t.Cleanup(func() { b.dropImage(b.ref(images.Large)) })
		p.refuses(nil, b.image(images.Large), "command")
	})
	if ids := p.containerIDs(nil); len(ids) > 1 { // one refused at its start may stay as created
		t.Errorf("refused containers are listed: %.12q", ids)
	}
}

func TestContainerStop(t *testing.T) {
	b := open(t)
	p := b.pod()
	t.Run("TERM is obeyed", func(t *testing.T) {
		c := p.with(t).run([]string{"/guest", "signals"})
		c.sees("ready")
		begin := time.Now()
		c.stop(30)
		if d := time.Since(begin); d > 25*time.Second {
			t.Errorf("took %v", d)
		}
		if st, text := c.status(), c.text(); st.ExitCode != 0 || st.Reason != "Completed" || !strings.Contains(text, "got SIGTERM") {
			t.Errorf("exit code %d, reason %q, log %q", st.ExitCode, st.Reason, text)
		}
		c.stop(30) // idempotent
	})
	t.Run("the image's signal", func(t *testing.T) {
		p := p.with(t)
		c := p.run([]string{"/guest", "signals"}, b.image(images.Settings))
		c.sees("ready")
		c.stop(1)
		if text := c.text(); !strings.Contains(text, "got SIGUSR1") || strings.Contains(text, "SIGTERM") {
			t.Errorf("log %q, want SIGUSR1", text)
		}
	})
	t.Run("grace, then KILL", func(t *testing.T) {
		c := p.with(t).run([]string{"/guest", "stubborn"})
		c.sees("ready")
		begin := time.Now()
		c.stop(2)
		if d := time.Since(begin); d < 1900*time.Millisecond || d > 25*time.Second {
			t.Errorf("took %v, want about the grace of 2 s", d)
		}
		if st := c.status(); st.ExitCode != 137 || st.Reason != "Error" {
			t.Errorf("exit code %d, reason %q", st.ExitCode, st.Reason)
		}
	})
	t.Run("no grace", func(t *testing.T) {
		c := p.with(t).run([]string{"/guest", "stubborn"})
		c.sees("ready")
		begin := time.Now()
		c.stop(0)
		if d := time.Since(begin); d > 25*time.Second {
			t.Errorf("took %v", d)
		}
	})
	t.Run("whole process tree", func(t *testing.T) {
		c := p.with(t).run(sh("/guest stubborn & /guest stubborn & wait"))
		c.sees("ready")
		c.stop(0)
		if st := c.status(); st.State != exited {
			t.Errorf("state %v", st.State)
		}
	})
}

// TestContainerStopShorterGraceWins: a second, more impatient stop is not
// queued behind the first.
func TestContainerStopShorterGraceWins(t *testing.T) {
	b := open(t)
	b.ours()
	c := b.pod().run([]string{"/guest", "stubborn"})
	c.sees("ready")
	begin, slow := time.Now(), make(chan error, 1)
	go func() {
		_, err := b.client.StopContainer(b.ctx, &runtime.StopContainerRequest{ContainerId: c.id, Timeout: 60})
		slow <- err
	}()
	time.Sleep(300 * time.Millisecond)
	c.stop(0)
	b.must(<-slow)
	if d := time.Since(begin); d > 50*time.Second {
		t.Errorf("took %v, want the shorter grace to win", d)
	}
}

// TestListDuringStop: reads do not wait for a slow operation.
func TestListDuringStop(t *testing.T) {
	b := open(t)
	p := b.pod()
	c := p.run([]string{"/guest", "stubborn"})
	c.sees("ready")
	done := make(chan error, 1)
	go func() {
		_, err := b.client.StopContainer(b.ctx, &runtime.StopContainerRequest{ContainerId: c.id, Timeout: 2})
		done <- err
	}()
	time.Sleep(200 * time.Millisecond)
	begin := time.Now()
	c.status()
	p.status()
	p.containerIDs(nil)
	if d := time.Since(begin); d > time.Second {
		t.Errorf("three reads took %v while a stop was under way", d)
	}
	b.must(<-done)
}
