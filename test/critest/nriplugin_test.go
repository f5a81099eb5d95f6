package critest

import (
	"context"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/nri/pkg/api"
	"github.com/containerd/nri/pkg/stub"

	"github.com/berthd/berth/test/images"
	"github.com/berthd/berth/test/node"
)

// own returns the box with a node of its own, so that plugins bother no other
// test. config is put in front of the node's configuration, without the keys.
func (b *box) own(config string, without ...string) *box {
	b.Helper()
	b.ours()
	own := b.ownNode(b.ctx, node.Options{Config: config, Without: without})
	own.pulled(images.Busybox)
	return own
}

// plugin is an NRI plugin of a test. It notes what it is told; its functions may
// be nil.
type plugin struct {
	stub       stub.Stub
	mu         sync.Mutex
	events     []string // "event ID"
	containers map[string]*api.Container
	synced     chan struct{} // closed by the first synchronisation

	onSync   func(ctx context.Context) []*api.ContainerUpdate
	onRun    func(ctx context.Context, p *api.PodSandbox) error
	onCreate func(ctx context.Context, p *api.PodSandbox, c *api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate, error)
	onUpdate func(c *api.Container, res *api.LinuxResources) []*api.ContainerUpdate
	onStart  func(c *api.Container) error
	onStop   func(ctx context.Context, c *api.Container) []*api.ContainerUpdate
	onRemove func(ctx context.Context, c *api.Container) error
}

// plug connects a plugin and waits until it gets events. It may have to try again:
// berthd takes plugins one after the other, and begins beside everything else.
func (b *box) plug(index string, p *plugin, opts ...stub.Option) *plugin {
	b.Helper()
	p.containers, p.synced = map[string]*api.Container{}, make(chan struct{})
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		st, err := stub.New(p, append([]stub.Option{stub.WithPluginName("critest"), stub.WithPluginIdx(index), stub.WithSocketPath(b.node.NRI), stub.WithOnClose(func() {})}, opts...)...)
		b.must(err)
		p.stub = st
		if err = st.Start(b.ctx); err == nil {
			b.Cleanup(st.Stop)
			break
		}
		if time.Now().After(end) {
			b.Fatal(err)
		}
	}
	select {
	case <-p.synced:
	case <-time.After(20 * time.Second):
		b.Fatal("plugin was not synchronised")
	}
	return p
}

func (p *plugin) note(event, id string, c *api.Container) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.events = append(p.events, event+" "+id)
	if c != nil {
		p.containers[id] = c
	}
}

// heard returns the events of an object in their order.
func (p *plugin) heard(id string) []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	var out []string
	for _, e := range p.events {
		if event, of, _ := strings.Cut(e, " "); of == id {
			out = append(out, event)
		}
	}
	return out
}

// last is a container as the plugin was told of it last.
func (p *plugin) last(id string) *api.Container {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.containers[id]
}

// hears waits until the events of an object are these.
func (b *box) hears(p *plugin, id string, want ...string) {
	b.Helper()
	for end := time.Now().Add(15 * time.Second); !slices.Equal(p.heard(id), want); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			b.Fatalf("plugin heard %q of %.12s, want %q", p.heard(id), id, want)
		}
	}
}

func (p *plugin) Synchronize(ctx context.Context, pods []*api.PodSandbox, containers []*api.Container) ([]*api.ContainerUpdate, error) {
	for _, o := range pods {
		p.note("sync", o.GetId(), nil)
	}
	for _, o := range containers {
		p.note("sync", o.GetId(), o)
	}
	p.mu.Lock()
	select {
	case <-p.synced:
	default:
		close(p.synced)
	}
	p.mu.Unlock()
	if p.onSync != nil {
		return p.onSync(ctx), nil
	}
	return nil, nil
}

func (p *plugin) RunPodSandbox(ctx context.Context, o *api.PodSandbox) error {
	p.note("run", o.GetId(), nil)
	if p.onRun != nil {
		return p.onRun(ctx, o)
	}
	return nil
}

func (p *plugin) UpdatePodSandbox(_ context.Context, o *api.PodSandbox, _, _ *api.LinuxResources) error {
	p.note("update", o.GetId(), nil)
	return nil
}

func (p *plugin) PostUpdatePodSandbox(_ context.Context, o *api.PodSandbox) error {
	p.note("postupdate", o.GetId(), nil)
	return nil
}

func (p *plugin) StopPodSandbox(_ context.Context, o *api.PodSandbox) error {
	p.note("stop", o.GetId(), nil)
	return nil
}

func (p *plugin) RemovePodSandbox(_ context.Context, o *api.PodSandbox) error {
	p.note("remove", o.GetId(), nil)
	return nil
}

func (p *plugin) CreateContainer(ctx context.Context, pod *api.PodSandbox, c *api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate, error) {
	p.note("create", c.GetId(), c)
	if p.onCreate != nil {
		return p.onCreate(ctx, pod, c)
	}
	return nil, nil, nil
}

func (p *plugin) PostCreateContainer(_ context.Context, _ *api.PodSandbox, c *api.Container) error {
	p.note("postcreate", c.GetId(), c)
	return nil
}

func (p *plugin) StartContainer(_ context.Context, _ *api.PodSandbox, c *api.Container) error {
	p.note("start", c.GetId(), c)
	if p.onStart != nil {
		return p.onStart(c)
	}
	return nil
}

func (p *plugin) PostStartContainer(_ context.Context, _ *api.PodSandbox, c *api.Container) error {
	p.note("poststart", c.GetId(), c)
	return nil
}

func (p *plugin) UpdateContainer(_ context.Context, _ *api.PodSandbox, c *api.Container, res *api.LinuxResources) ([]*api.ContainerUpdate, error) {
	p.note("update", c.GetId(), c)
	if p.onUpdate != nil {
		return p.onUpdate(c, res), nil
	}
	return nil, nil
}

func (p *plugin) PostUpdateContainer(_ context.Context, _ *api.PodSandbox, c *api.Container) error {
	p.note("postupdate", c.GetId(), c)
	return nil
}

func (p *plugin) StopContainer(ctx context.Context, _ *api.PodSandbox, c *api.Container) ([]*api.ContainerUpdate, error) {
	p.note("stop", c.GetId(), c)
	if p.onStop != nil {
		return p.onStop(ctx, c), nil
	}
	return nil, nil
}

func (p *plugin) RemoveContainer(ctx context.Context, _ *api.PodSandbox, c *api.Container) error {
	p.note("remove", c.GetId(), c)
	if p.onRemove != nil {
		return p.onRemove(ctx, c)
	}
	return nil
}
