package nri

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/nri/pkg/api"
	"github.com/containerd/nri/pkg/stub"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// TestMain is also the plugin that tests have the host start.
func TestMain(m *testing.M) {
	if os.Getenv(api.PluginNameEnvVar) != "" {
		st, err := stub.New(&testPlugin{})
		if err == nil {
			err = st.Run(context.Background())
		}
		if err != nil {
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// testNode is a node with what it is given, which makes every update but those of
// containers called "bad".
type testNode struct {
	mu         sync.Mutex
	pods       []Pod
	containers []Container
	updates    []Update
	undone     int
}

func (n *testNode) Snapshot() ([]Pod, []Container) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Clone(n.pods), slices.Clone(n.containers)
}

func (n *testNode) Apply(_ context.Context, updates []Update) (failed []Update, undo func(context.Context) error, err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, u := range updates {
		if u.ID == "bad" {
			failed = append(failed, u)
			if !u.IgnoreFailure {
				err = errors.New("update of bad")
			}
			continue
		}
		n.updates = append(n.updates, u)
	}
	return failed, func(context.Context) error { n.undone += len(updates); return nil }, err
}

func (n *testNode) add(c Container) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.containers = append(n.containers, c)
}

// testPlugin records what it is told. Its functions may be nil.
type testPlugin struct {
	mu       sync.Mutex
	events   []string
	onSync   func(ctx context.Context)
	onCreate func(ctx context.Context, c *api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate, error)
	onUpdate func(c *api.Container, res *api.LinuxResources) []*api.ContainerUpdate
	validate func(*api.ValidateContainerAdjustmentRequest) error
}

func (p *testPlugin) note(event, id string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.events = append(p.events, event+" "+id)
	return nil
}

func (p *testPlugin) heard() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.events)
}

func (p *testPlugin) Synchronize(ctx context.Context, pods []*api.PodSandbox, containers []*api.Container) ([]*api.ContainerUpdate, error) {
	for _, o := range pods {
		p.note("sync", o.GetId())
	}
	for _, o := range containers {
		p.note("sync", o.GetId())
	}
	if p.onSync != nil {
		p.onSync(ctx)
	}
	return nil, nil
}
func (p *testPlugin) RunPodSandbox(_ context.Context, o *api.PodSandbox) error {
	return p.note("run", o.GetId())
}
func (p *testPlugin) UpdatePodSandbox(_ context.Context, o *api.PodSandbox, overhead, res *api.LinuxResources) error {
	return p.note(fmt.Sprintf("updatepod %d %d", overhead.GetMemory().GetLimit().GetValue(), res.GetMemory().GetLimit().GetValue()), o.GetId())
}
func (p *testPlugin) PostUpdatePodSandbox(_ context.Context, o *api.PodSandbox) error {
	return p.note("postupdatepod", o.GetId())
}
func (p *testPlugin) StopPodSandbox(_ context.Context, o *api.PodSandbox) error {
	return p.note("stoppod", o.GetId())
}
func (p *testPlugin) RemovePodSandbox(_ context.Context, o *api.PodSandbox) error {
	return p.note("removepod", o.GetId())
}
func (p *testPlugin) CreateContainer(ctx context.Context, _ *api.PodSandbox, c *api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate, error) {
	p.note("create", c.GetId())
	if p.onCreate != nil {
		return p.onCreate(ctx, c)
	}
	return nil, nil, nil
}
func (p *testPlugin) PostCreateContainer(_ context.Context, _ *api.PodSandbox, c *api.Container) error {
	return p.note("postcreate", c.GetId())
}
func (p *testPlugin) StartContainer(_ context.Context, _ *api.PodSandbox, c *api.Container) error {
	return p.note("start", c.GetId())
}
func (p *testPlugin) PostStartContainer(_ context.Context, _ *api.PodSandbox, c *api.Container) error {
	return p.note("poststart", c.GetId())
}
func (p *testPlugin) UpdateContainer(_ context.Context, _ *api.PodSandbox, c *api.Container, res *api.LinuxResources) ([]*api.ContainerUpdate, error) {
	p.note("update", c.GetId())
	if p.onUpdate != nil {
		return p.onUpdate(c, res), nil
	}
	return nil, nil
}
func (p *testPlugin) PostUpdateContainer(_ context.Context, _ *api.PodSandbox, c *api.Container) error {
	return p.note("postupdate", c.GetId())
}
func (p *testPlugin) StopContainer(_ context.Context, _ *api.PodSandbox, c *api.Container) ([]*api.ContainerUpdate, error) {
	return nil, p.note("stop", c.GetId())
}
func (p *testPlugin) RemoveContainer(_ context.Context, _ *api.PodSandbox, c *api.Container) error {
	return p.note("remove", c.GetId())
}
func (p *testPlugin) ValidateContainerAdjustment(_ context.Context, req *api.ValidateContainerAdjustmentRequest) error {
	if p.validate != nil {
		return p.validate(req)
	}
	return nil
}

// serve runs a host for n.
func serve(t *testing.T, n Node, cfg Config) *Host {
	t.Helper()
	if cfg.Socket == "" {
		cfg.Socket = filepath.Join(t.TempDir(), "nri.sock")
	}
	h := New(cfg)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { h.Serve(ctx, n); close(done) }()
	t.Cleanup(func() { cancel(); <-done })
	must(t, h.take(t.Context(), "", "")) // plugins have been started
	h.give()
	return h
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// connect connects a plugin and waits until it gets events.
func connect(t *testing.T, h *Host, p *testPlugin, index string, opts ...stub.Option) stub.Stub {
	t.Helper()
	before := h.plugins.Load()
	st, err := stub.New(p, append([]stub.Option{stub.WithPluginName("test"), stub.WithPluginIdx(index), stub.WithSocketPath(h.cfg.Socket)}, opts...)...)
	must(t, err)
	must(t, st.Start(t.Context()))
	t.Cleanup(st.Stop)
	until(t, "plugin connected", func() bool { return h.plugins.Load() > before })
	return st
}

func until(t *testing.T, what string, fn func() bool) {
	t.Helper()
	for end := time.Now().Add(15 * time.Second); !fn(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("after 15 s still not: %s", what)
		}
	}
}

func draft(s *specs.Spec) Draft {
	return Draft{Spec: s, Inject: func(*specs.Spec, []string) error { return nil }, Accept: func() error { return nil }}
}

func blank() *specs.Spec { return &specs.Spec{Process: &specs.Process{}, Linux: &specs.Linux{}} }

// TestLife: every event arrives once and in order, also when it is told again.
func TestLife(t *testing.T) {
	h := serve(t, &testNode{}, Config{})
	p := &testPlugin{}
	connect(t, h, p, "10")
	ctx, pod, c := t.Context(), Pod{ID: "p"}, Container{ID: "c", PodID: "p"}
	done, err := h.Run(ctx, pod)
	must(t, err)
	done()
	pod.Overhead, pod.Resources = memory(1), memory(2)
	must(t, h.Tell(ctx, UpdatePodSandbox, pod, Container{}))
	must(t, h.Tell(ctx, PostUpdatePodSandbox, pod, Container{}))
	done, err = h.Create(ctx, pod, c, draft(blank()))
	must(t, err)
	done()
	for _, e := range []Event{PostCreateContainer, StartContainer, PostStartContainer} {
		must(t, h.Tell(ctx, e, pod, c))
	}
	said, err := h.Update(ctx, pod, c, memory(3))
	must(t, err)
	if said.Own != nil {
		t.Errorf("update: plugins that say nothing want %+v", said.Own)
	}
	for _, e := range []Event{PostUpdateContainer, StopContainer, StopContainer, RemoveContainer, RemoveContainer, StopContainer} {
		must(t, h.Tell(ctx, e, pod, c))
	}
	for _, e := range []Event{StopPodSandbox, StopPodSandbox, RemovePodSandbox, RemovePodSandbox} {
		must(t, h.Tell(ctx, e, pod, Container{}))
	}
	want := []string{"run p", "updatepod 1 2 p", "postupdatepod p", "create c", "postcreate c", "start c", "poststart c", "update c", "postupdate c",
		"stop c", "remove c", "stoppod p", "removepod p"}
	if got := p.heard(); !slices.Equal(got, want) {
		t.Errorf("plugin heard\n%q, want\n%q", got, want)
	}
	if len(h.told)+len(h.passing) != 0 {
		t.Errorf("left: %v, %v", h.told, h.passing)
	}
}

func memory(limit int64) *specs.LinuxResources {
	return &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &limit}}
}

// TestRemoveBeforeStop: a removal that comes first is told after a stop, and the
// end of what no plugin knows is not told at all.
func TestRemoveBeforeStop(t *testing.T) {
	h := serve(t, &testNode{}, Config{})
	ctx := t.Context()
	done, err := h.Create(ctx, Pod{ID: "p"}, Container{ID: "before"}, draft(blank()))
	must(t, err)
	done()
	p := &testPlugin{}
	connect(t, h, p, "10") // the node's snapshot is empty: it never hears of "before"
	must(t, h.Tell(ctx, RemoveContainer, Pod{}, Container{ID: "before"}))
	done, err = h.Create(ctx, Pod{ID: "p"}, Container{ID: "c"}, draft(blank()))
	must(t, err)
	defer done()
	must(t, h.Tell(ctx, RemoveContainer, Pod{}, Container{ID: "c"}))
	if got, want := p.heard(), []string{"create c", "stop c", "remove c"}; !slices.Equal(got, want) {
		t.Errorf("plugin heard %q, want %q", got, want)
	}
}

// TestOnTheWay: what is between its announcement and the snapshot is part of a
// synchronisation, unless it was undone.
func TestOnTheWay(t *testing.T) {
	n := &testNode{}
	h := serve(t, n, Config{})
	ctx := t.Context()
	for _, id := range []string{"a", "b", "undone"} {
		done, err := h.Create(ctx, Pod{ID: "p"}, Container{ID: id}, draft(blank()))
		must(t, err)
		defer done()
	}
	done, err := h.Run(ctx, Pod{ID: "p"})
	must(t, err)
	defer done()
	must(t, h.Tell(ctx, RemoveContainer, Pod{}, Container{ID: "undone"}))
	n.add(Container{ID: "b", State: Created}) // in the snapshot, and not yet taken off the list
	p := &testPlugin{}
	connect(t, h, p, "10")
	got := p.heard()
	slices.Sort(got)
	if want := []string{"sync a", "sync b", "sync p"}; !slices.Equal(got, want) {
		t.Errorf("plugin heard %q, want %q", got, want)
	}
	must(t, h.Tell(ctx, RemoveContainer, Pod{}, Container{ID: "a"}))
	if got := p.heard(); !slices.Contains(got, "remove a") {
		t.Errorf("plugin heard %q, and not of the end of what it was synchronised with", got)
	}
}

// TestMissedEnds: of what had stopped before a plugin came, as the node says, it
// hears the end once, and a second plugin does not.
func TestMissedEnds(t *testing.T) {
	n := &testNode{pods: []Pod{{ID: "p"}}, containers: []Container{{ID: "c", PodID: "p", State: Stopped}, {ID: "lives", PodID: "p", State: Running}}}
	h := serve(t, n, Config{})
	p, q := &testPlugin{}, &testPlugin{}
	connect(t, h, p, "10")
	until(t, "stop told", func() bool { return slices.Contains(p.heard(), "stop c") })
	connect(t, h, q, "20")
	if got, want := p.heard(), []string{"sync p", "sync c", "sync lives", "stop c"}; !slices.Equal(got, want) {
		t.Errorf("first plugin heard %q, want %q", got, want)
	}
	if got, want := q.heard(), []string{"sync p", "sync lives"}; !slices.Equal(got, want) {
		t.Errorf("second plugin heard %q, want %q", got, want)
	}
}

// TestNothingLost creates containers from many sides while plugins connect: each
// plugin hears of each container, in its synchronisation or as an event, once.
func TestNothingLost(t *testing.T) {
	n := &testNode{}
	h := serve(t, n, Config{})
	ctx := t.Context()
	var all sync.WaitGroup
	for w := range 4 {
		all.Go(func() {
			for i := range 40 {
				c := Container{ID: fmt.Sprintf("c%d-%d", w, i), State: Created}
				done, err := h.Create(ctx, Pod{ID: "p"}, c, draft(blank()))
				if err != nil {
					t.Error(err)
				}
				time.Sleep(time.Millisecond) // the runtime's work
				n.add(c)
				done()
			}
		})
	}
	var plugins []*testPlugin
	for i := range 4 {
		time.Sleep(8 * time.Millisecond)
		p := &testPlugin{onSync: func(context.Context) { time.Sleep(5 * time.Millisecond) }}
		plugins = append(plugins, p)
		connect(t, h, p, fmt.Sprintf("%02d", i))
	}
	all.Wait()
	for i, p := range plugins {
		count := map[string]int{}
		for _, e := range p.heard() {
			_, id, _ := strings.Cut(e, " ")
			count[id]++
		}
		for w := range 4 {
			for k := range 40 {
				if id := fmt.Sprintf("c%d-%d", w, k); count[id] != 1 {
					t.Errorf("plugin %d heard of %s %d times", i, id, count[id])
				}
			}
		}
	}
}

// TestManyPlugins: plugins that come one right after the other, with creations in
// between, leave the turn free.
func TestManyPlugins(t *testing.T) {
	h := serve(t, &testNode{}, Config{})
	var all sync.WaitGroup
	for i := range 24 {
		all.Go(func() {
			st, err := stub.New(&testPlugin{}, stub.WithPluginName("many"), stub.WithPluginIdx(fmt.Sprintf("%02d", i)), stub.WithSocketPath(h.cfg.Socket))
			if err == nil {
				err = st.Start(t.Context())
			}
			if err != nil {
				t.Error(err)
				return
			}
			t.Cleanup(st.Stop)
			done, err := h.Create(t.Context(), Pod{ID: "p"}, Container{ID: fmt.Sprint(i)}, draft(blank()))
			if err != nil {
				t.Error(err)
			}
			done()
		})
	}
	all.Wait()
	until(t, "all connected and the turn free", func() bool {
		return h.plugins.Load() == 24 && h.Info()["busy"] == nil
	})
}

// TestHang: a plugin that does not answer costs its time limit once, and one that
// wants to stay costs it each time and may fail the request.
func TestHang(t *testing.T) {
	h := serve(t, &testNode{}, Config{RequestTimeout: 200 * time.Millisecond})
	hang := func(ctx context.Context, _ *api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate, error) {
		<-ctx.Done()
		time.Sleep(50 * time.Millisecond)
		return nil, nil, nil
	}
	connect(t, h, &testPlugin{onCreate: hang}, "10")
	other := &testPlugin{}
	connect(t, h, other, "20")
	create := func(id string) error {
		done, err := h.Create(t.Context(), Pod{ID: "p"}, Container{ID: id}, draft(blank()))
		done()
		return err
	}
	must(t, create("a"))
	must(t, create("b"))
	if got := other.heard(); !slices.Equal(got, []string{"create a", "create b"}) || h.plugins.Load() != 1 {
		t.Errorf("the other plugin heard %q, %d are connected; want both containers, and 1", got, h.plugins.Load())
	}
	connect(t, h, &testPlugin{onCreate: hang}, "30", stub.WithFailurePolicy(&api.FailurePolicy{FailRequest: true, KeepConnected: true}))
	for _, id := range []string{"c", "d"} {
		if err := create(id); err == nil || !strings.Contains(err.Error(), "30-test") {
			t.Errorf("create: %v, want an error that names the plugin", err)
		}
	}
}

// TestSlowSynchronisation: it has a limit of its own, and those who wait for it
// are told what for when their own time is up.
func TestSlowSynchronisation(t *testing.T) {
	h := serve(t, &testNode{}, Config{RequestTimeout: 50 * time.Millisecond, SyncTimeout: 5 * time.Second})
	begun, release := make(chan struct{}), make(chan struct{})
	p := &testPlugin{onSync: func(context.Context) { close(begun); <-release }}
	st, err := stub.New(p, stub.WithPluginName("slow"), stub.WithPluginIdx("10"), stub.WithSocketPath(h.cfg.Socket))
	must(t, err)
	must(t, st.Start(t.Context()))
	defer st.Stop()
	<-begun
	soon, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	done, err := h.Create(soon, Pod{ID: "p"}, Container{ID: "a"}, draft(blank()))
	done()
	if !errors.Is(err, ErrWait) || !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "synchronisation of a plugin") {
		t.Errorf("create while a plugin is synchronised: %v, want ErrWait that says so", err)
	}
	if busy, _ := h.Info()["busy"].(string); !strings.Contains(busy, "synchronisation") {
		t.Errorf("info %v does not tell of the synchronisation", h.Info())
	}
	close(release)
	done, err = h.Create(t.Context(), Pod{ID: "p"}, Container{ID: "b"}, draft(blank()))
	must(t, err)
	done()
	if got := p.heard(); !slices.Equal(got, []string{"create b"}) {
		t.Errorf("plugin heard %q, want only of the container that waited", got)
	}
}

// TestSynchronisationHangs: creation goes on when its limit is over.
func TestSynchronisationHangs(t *testing.T) {
	h := serve(t, &testNode{}, Config{SyncTimeout: 200 * time.Millisecond})
	begun := make(chan struct{})
	p := &testPlugin{onSync: func(ctx context.Context) { close(begun); <-ctx.Done(); time.Sleep(100 * time.Millisecond) }}
	st, err := stub.New(p, stub.WithPluginName("hangs"), stub.WithPluginIdx("10"), stub.WithSocketPath(h.cfg.Socket))
	must(t, err)
	must(t, st.Start(t.Context()))
	defer st.Stop()
	<-begun
	done, err := h.Create(t.Context(), Pod{ID: "p"}, Container{ID: "a"}, draft(blank()))
	must(t, err)
	done()
	if n := h.plugins.Load(); n != 0 {
		t.Errorf("%d plugins, want none", n)
	}
}

// TestUpdates: what plugins want of others is made in the turn, a failure that may
// be ignored is, and one that may not fails the request. A container's own update
// is left to who asked for it.
func TestUpdates(t *testing.T) {
	n := &testNode{}
	h := serve(t, n, Config{})
	var wants []*api.ContainerUpdate
	p := &testPlugin{
		onCreate: func(context.Context, *api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate, error) {
			return nil, wants, nil
		},
		onUpdate: func(c *api.Container, res *api.LinuxResources) []*api.ContainerUpdate {
			u := &api.ContainerUpdate{ContainerId: c.GetId()}
			u.SetLinuxCPUShares(77)
			return append(wants, u)
		}}
	st := connect(t, h, p, "10")
	update := func(id string, ignore bool) *api.ContainerUpdate {
		u := &api.ContainerUpdate{ContainerId: id, IgnoreFailure: ignore}
		u.SetLinuxMemoryLimit(4096)
		return u
	}
	create := func(id string) error {
		done, err := h.Create(t.Context(), Pod{ID: "p"}, Container{ID: id}, draft(blank()))
		done()
		return err
	}
	wants = []*api.ContainerUpdate{update("x", false), update("bad", true)}
	must(t, create("a"))
	if len(n.updates) != 1 || n.updates[0].ID != "x" || *n.updates[0].Resources.Memory.Limit != 4096 {
		t.Errorf("updates %+v, want x with 4096", n.updates)
	}
	n.updates = nil
	said, err := h.Update(t.Context(), Pod{ID: "p"}, Container{ID: "own"}, memory(8192))
	must(t, err)
	if said.Own == nil || *said.Own.Memory.Limit != 8192 || *said.Own.CPU.Shares != 77 {
		t.Errorf("own %+v, want what was asked for and what the plugin added", said.Own)
	}
	if len(n.updates) != 1 || n.updates[0].ID != "x" {
		t.Errorf("updates %+v, want that of x alone", n.updates)
	}
	if must(t, said.Undo(t.Context())); n.undone != 2 {
		t.Errorf("%d updates taken back, want the 2 that plugins wanted of others", n.undone)
	}
	wants = []*api.ContainerUpdate{update("bad", false)}
	if err := create("b"); err == nil || !strings.Contains(err.Error(), "update of bad") {
		t.Errorf("create: %v, want the failure", err)
	}
	if said, err := h.Update(t.Context(), Pod{ID: "p"}, Container{ID: "own"}, memory(8192)); err == nil || said.Undo == nil {
		t.Errorf("update: %v; want the failure, and an undo all the same", err)
	}
	failed, err := st.UpdateContainers([]*api.ContainerUpdate{update("y", false), update("bad", false)})
	if err != nil || len(failed) != 1 || failed[0].GetContainerId() != "bad" {
		t.Errorf("unsolicited: %v, %v; want bad among the failed", failed, err)
	}
}

// TestValidation: a plugin may refuse what another one wants.
func TestValidation(t *testing.T) {
	h := serve(t, &testNode{}, Config{})
	connect(t, h, &testPlugin{onCreate: func(context.Context, *api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate, error) {
		a := &api.ContainerAdjustment{}
		a.AddEnv("FORBIDDEN", "1")
		return a, nil, nil
	}}, "10")
	connect(t, h, &testPlugin{validate: func(r *api.ValidateContainerAdjustmentRequest) error {
		for _, e := range r.GetAdjust().GetEnv() {
			if e.GetKey() == "FORBIDDEN" {
				return errors.New("FORBIDDEN is forbidden")
			}
		}
		return nil
	}}, "20")
	s := blank()
	done, err := h.Create(t.Context(), Pod{ID: "p"}, Container{ID: "a"}, draft(s))
	done()
	if err == nil || !strings.Contains(err.Error(), "FORBIDDEN is forbidden") || len(s.Process.Env) != 0 {
		t.Errorf("create: %v, environment %q; want a refusal with its reason", err, s.Process.Env)
	}
}

// TestSocketOfAnother: a runtime that listens there keeps its socket.
func TestSocketOfAnother(t *testing.T) {
	path := filepath.Join(t.TempDir(), "nri.sock")
	l, err := net.Listen("unix", path)
	must(t, err)
	defer l.Close()
	h := serve(t, &testNode{}, Config{Socket: path})
	if text, _ := h.Info()["error"].(string); !strings.Contains(text, "another runtime listens") {
		t.Errorf("info %v, want it to say that the socket is taken", h.Info())
	}
	done, err := h.Create(t.Context(), Pod{ID: "p"}, Container{ID: "a"}, draft(blank()))
	must(t, err)
	done()
	if c, err := net.Dial("unix", path); err != nil {
		t.Errorf("the other one's socket: %v", err)
	} else {
		c.Close()
	}
}

// TestStartedPlugins: programs in the directory are started, with what cannot be
// used left out.
func TestStartedPlugins(t *testing.T) {
	self, err := os.Executable()
	must(t, err)
	dir := t.TempDir()
	must(t, os.Symlink(self, filepath.Join(dir, "10-unit")))
	must(t, os.WriteFile(filepath.Join(dir, "20-dies"), []byte("#!/bin/sh\nexit 1\n"), 0o755))
	h := serve(t, &testNode{}, Config{PluginDir: dir, RegistrationTimeout: 5 * time.Second})
	if n := h.plugins.Load(); n != 1 {
		t.Errorf("%d plugins, want the one that works; info %v", n, h.Info())
	}
	must(t, os.WriteFile(filepath.Join(dir, "misnamed"), nil, 0o755))
	h = serve(t, &testNode{}, Config{PluginDir: dir})
	if text, _ := h.Info()["error"].(string); !strings.Contains(text, "misnamed") {
		t.Errorf("info %v, want it to name the file", h.Info())
	}
	connect(t, h, &testPlugin{}, "30")
}

// BenchmarkNoPlugin is what the announcement and the end of a container cost
// where there are no plugins.
func BenchmarkNoPlugin(b *testing.B) {
	h := New(Config{})
	h.give()
	s, c := blank(), Container{ID: "c"}
	b.ReportAllocs()
	for b.Loop() {
		done, err := h.Create(b.Context(), Pod{ID: "p"}, c, draft(s))
		if err != nil {
			b.Fatal(err)
		}
		done()
		for _, e := range []Event{PostCreateContainer, StartContainer, PostStartContainer, StopContainer, RemoveContainer} {
			if err := h.Tell(b.Context(), e, Pod{ID: "p"}, c); err != nil {
				b.Fatal(err)
			}
		}
	}
}
