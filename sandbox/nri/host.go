package nri

import (
	"context"
	"fmt"
	"maps"
	"net"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/nri/pkg/adaptation"
	"github.com/containerd/nri/pkg/api"
	"k8s.io/klog/v2"
)

// runtimeName is how plugins know this runtime.
const runtimeName = "berth"

// Host talks to plugins. Its methods may be called concurrently.
type Host struct {
	cfg  Config
	turn chan struct{} // holds one token while nobody has the turn
	at   atomic.Pointer[activity]

	// Set by Serve before the first turn is given.
	ctx    context.Context
	node   Node
	lib    *adaptation.Adaptation
	failed error // why there are no plugins

	endSync func() // gives back the turn of the last synchronisation; of the library's goroutine

	plugins atomic.Int64 // connected

	mu      sync.Mutex
	passing map[string]passing // announced, and not yet in the node's snapshot
	told    map[string]phase   // what plugins know of
}

// passing is a pod, or a container of it, on its way into the node's snapshot.
type passing struct {
	pod       Pod
	container *Container
}

// phase is how far plugins know something: it is there, or it has stopped.
type phase int

const (
	live phase = iota + 1
	stopped
)

// activity is what the turn is used for, for error texts.
type activity struct {
	what  string
	since time.Time
}

// New returns a host whose first turn is [Host.Serve]'s: callers of its other
// methods wait until plugins have been started.
func New(cfg Config) *Host {
	cfg.complete()
	h := &Host{cfg: cfg, turn: make(chan struct{}, 1), passing: map[string]passing{}, told: map[string]phase{}}
	h.at.Store(&activity{"start of plugins", time.Now()})
	return h
}

// Serve starts the plugins in the plugin directory and accepts those that
// connect, until ctx ends. What keeps it from that is logged, told by
// [Host.Info], and costs plugins and not the node.
func (h *Host) Serve(ctx context.Context, node Node) {
	h.ctx, h.node = ctx, node
	log := klog.FromContext(ctx)
	setLogger()
	adaptation.SetPluginRegistrationTimeout(h.cfg.RegistrationTimeout)
	adaptation.SetPluginRequestTimeout(h.cfg.RequestTimeout)
	lib, err := h.start(h.cfg.PluginDir)
	if err != nil && h.cfg.PluginDir != "" {
		log.Error(err, "NRI: plugins of the plugin directory are left out", "dir", h.cfg.PluginDir)
		h.failed = err
		lib, err = h.start("")
	}
	if err != nil {
		log.Error(err, "NRI is off")
		h.failed = err
	}
	h.lib = lib
	h.give()
	h.tellMissed()
	<-ctx.Done()
	if lib != nil {
		lib.Stop()
	}
}

// start makes the library's object and has it start plugins and listen.
func (h *Host) start(dir string) (*adaptation.Adaptation, error) {
	opts := []adaptation.Option{adaptation.WithPluginPath(dir), adaptation.WithPluginConfigPath(h.cfg.PluginConfigDir),
		adaptation.WithMetrics(counter{h})}
	if h.cfg.Socket == "" {
		opts = append(opts, adaptation.WithDisabledExternalConnections())
	} else {
		if err := checkSocket(h.cfg.Socket); err != nil {
			return nil, err
		}
		opts = append(opts, adaptation.WithSocketPath(h.cfg.Socket))
	}
	var lib *adaptation.Adaptation
	first := true // the library begins with one for all plugins that it started
	lib, err := adaptation.New(runtimeName, h.cfg.Version, func(ctx context.Context, cb adaptation.SyncCB) error {
		if first {
			first = false
			return h.sync(ctx, cb) // in Serve's turn
		}
		return h.syncLate(ctx, lib, cb)
	}, h.unsolicited, opts...)
	if err == nil {
		err = lib.Start()
	}
	if err == nil && h.cfg.Socket != "" {
		err = os.Chmod(h.cfg.Socket, 0o600)
	}
	if err != nil {
		if lib != nil {
			lib.Stop() // with the plugins that it has started
		}
		return nil, fmt.Errorf("NRI: %w", err)
	}
	return lib, nil
}

// checkSocket makes sure that nobody listens there: the library would take the
// path away from another runtime, and with it all plugins to come.
func checkSocket(path string) error {
	c, err := net.DialTimeout("unix", path, time.Second)
	if err == nil {
		c.Close()
		return fmt.Errorf("NRI: socket %q: another runtime listens there", path)
	}
	return nil
}

// counter keeps count of the plugins for the library.
type counter struct{ h *Host }

func (c counter) UpdatePluginCount(n int) {
	if old := c.h.plugins.Swap(int64(n)); old != int64(n) && c.h.ctx != nil {
		klog.FromContext(c.h.ctx).V(2).Info("NRI plugins", "connected", n, "before", old)
	}
}

func (counter) RecordPluginInvocation(string, string, error)      {}
func (counter) RecordPluginLatency(string, string, time.Duration) {}
func (counter) RecordPluginAdjustments(string, string, *api.ContainerAdjustment, int, int) {
}

// take waits for the turn.
func (h *Host) take(ctx context.Context, what, id string) error {
	select {
	case <-h.turn:
	default:
		select {
		case <-h.turn:
		case <-ctx.Done():
			a := h.at.Load()
			return fmt.Errorf("%w: %s, for %s: %w", ErrWait, a.what, time.Since(a.since).Round(time.Millisecond), ctx.Err())
		}
	}
	if h.plugins.Load() > 0 {
		h.at.Store(&activity{what + " of " + id, time.Now()})
	}
	return nil
}

func (h *Host) give() { h.turn <- struct{}{} }

// idle tells whether there is nobody to talk to.
func (h *Host) idle() bool { return h.lib == nil || h.plugins.Load() == 0 }

// Run tells plugins of a pod that is about to become ready. done is to be called
// when the pod is in the node's snapshot, or undone; it is never nil. With an
// error, some plugins may know of the pod: its end is to be told.
func (h *Host) Run(ctx context.Context, p Pod) (done func(), err error) {
	done = func() { h.forget(p.ID) }
	if err := h.take(ctx, "RunPodSandbox", p.ID); err != nil {
		return done, err
	}
	defer h.give()
	h.announce(p.ID, passing{pod: p})
	if h.idle() {
		return done, nil
	}
	h.know(p.ID)
	return done, named("RunPodSandbox", h.lib.RunPodSandbox(ctx, &api.RunPodSandboxRequest{Pod: podMessage(p)}))
}

func (h *Host) announce(id string, p passing) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.passing[id] = p
}

func (h *Host) know(id string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.told[id] = live
}

func (h *Host) forget(id string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.passing, id)
}

// syncLate synchronises a plugin that has connected. It is called by the library,
// one at a time.
func (h *Host) syncLate(ctx context.Context, lib *adaptation.Adaptation, cb adaptation.SyncCB) error {
	if h.endSync != nil {
		h.endSync() // the one before has been dealt with, or this would not be called
	}
	if err := h.take(h.ctx, "", ""); err != nil {
		return err
	}
	h.at.Store(&activity{"synchronisation of a plugin", time.Now()})
	end := sync.OnceFunc(h.give)
	h.endSync = end
	go func() {
		// The library holds this lock until the plugin is among those that get
		// events, or has been turned away. By then it may have it again, for the
		// next one, which must not wait for this turn then.
		lib.BlockPluginSync().Unblock()
		end()
		h.tellMissed()
	}()
	return h.sync(ctx, cb)
}

// sync tells one plugin, or all that were started, of all there is.
func (h *Host) sync(ctx context.Context, cb adaptation.SyncCB) error {
	h.mu.Lock()
	onTheWay := maps.Clone(h.passing) // before the snapshot: what has left it is in there
	h.mu.Unlock()
	pods, containers := h.node.Snapshot()
	pods, containers = h.merge(pods, containers, onTheWay)
	// Nobody else talks to plugins now, so the limit is for this alone.
	adaptation.SetPluginRequestTimeout(h.cfg.SyncTimeout)
	updates, err := cb(ctx, podMessages(pods), containerMessages(containers))
	adaptation.SetPluginRequestTimeout(h.cfg.RequestTimeout)
	if err != nil {
		return err
	}
	if _, err := h.apply(h.ctx, updates); err != nil {
		klog.FromContext(h.ctx).Error(err, "NRI: updates after a synchronisation not made")
	}
	return nil
}

// merge adds to a snapshot what is on its way there, leaves out those whose end
// has been told, and notes what plugins know from now on.
func (h *Host) merge(pods []Pod, containers []Container, onTheWay map[string]passing) ([]Pod, []Container) {
	for _, id := range slices.Sorted(maps.Keys(onTheWay)) {
		p := onTheWay[id]
		switch {
		case p.container == nil && !slices.ContainsFunc(pods, func(o Pod) bool { return o.ID == id }):
			pods = append(pods, p.pod)
		case p.container != nil && !slices.ContainsFunc(containers, func(o Container) bool { return o.ID == id }):
			c := *p.container
			c.State = Created
			containers = append(containers, c)
		}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	containers = slices.DeleteFunc(containers, func(c Container) bool { return h.told[c.ID] == stopped })
	for _, p := range pods {
		if h.told[p.ID] == 0 {
			h.told[p.ID] = live
		}
	}
	for _, c := range containers {
		h.told[c.ID] = live
	}
	return pods, containers
}

// tellMissed tells plugins of the end of what stood as stopped in the snapshot
// that they were given.
func (h *Host) tellMissed() {
	if h.plugins.Load() == 0 {
		return
	}
	pods, containers := h.node.Snapshot()
	for _, c := range containers {
		if c.State != Stopped {
			continue
		}
		p := Pod{ID: c.PodID}
		if i := slices.IndexFunc(pods, func(p Pod) bool { return p.ID == c.PodID }); i >= 0 {
			p = pods[i]
		}
		if err := h.Tell(h.ctx, StopContainer, p, c); err != nil {
			klog.FromContext(h.ctx).Error(err, "NRI: end of a container not told", "containerID", c.ID)
		}
	}
}

// applyLimit bounds what plugins want of other containers, in one turn.
const applyLimit = 10 * time.Second

// apply has the node make changes that plugins want.
func (h *Host) apply(ctx context.Context, messages []*api.ContainerUpdate) (undo func(context.Context) error, err error) {
	if len(messages) == 0 {
		return nothingToUndo, nil
	}
	updates, err := updatesOf(messages)
	if err != nil {
		return nothingToUndo, err
	}
	ctx, cancel := context.WithTimeout(ctx, applyLimit)
	defer cancel()
	_, undo, err = h.node.Apply(ctx, updates)
	return undo, err
}

// unsolicited makes changes that a plugin wants by itself, and returns those that
// are not in force. It takes no turn: a plugin may ask for them in the middle of
// one.
func (h *Host) unsolicited(ctx context.Context, messages []*api.ContainerUpdate) ([]*api.ContainerUpdate, error) {
	updates, err := updatesOf(messages)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, applyLimit)
	defer cancel()
	failed, _, err := h.node.Apply(ctx, updates)
	if err != nil {
		klog.FromContext(h.ctx).Info("NRI: updates that a plugin wants not made", "err", err)
	}
	var out []*api.ContainerUpdate
	for _, m := range messages {
		if slices.ContainsFunc(failed, func(u Update) bool { return u.ID == m.GetContainerId() }) {
			out = append(out, m)
		}
	}
	return out, nil // with an error the answer would be lost
}

// Info is what there is to know about plugins, for people.
func (h *Host) Info() map[string]any {
	out := map[string]any{"socket": h.cfg.Socket, "plugins": h.plugins.Load()}
	select {
	case <-h.turn:
		if h.failed != nil {
			out["error"] = h.failed.Error()
		}
		h.give()
	default:
		a := h.at.Load()
		out["busy"] = a.what + ", for " + time.Since(a.since).Round(time.Millisecond).String()
	}
	return out
}

// named says which request an error came from.
func named(request string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("NRI %s: %w", request, err)
}
