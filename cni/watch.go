package cni

import (
	"context"
	"path/filepath"
	"sync"
	"time"

	"github.com/fsnotify/fsnotify"
	"k8s.io/klog/v2"
)

const (
	// interval is how often directory and plugins are looked at without cause:
	// it finds what file events do not tell (a network file system, a plugin's
	// own change of mind).
	interval = 10 * time.Second
	// settle is how long events have to pause before the directory is read, so
	// that a file is seldom read half-written.
	settle = 100 * time.Millisecond
	// settleMost is how long steady events may put that off.
	settleMost = time.Second
)

// Run watches the configuration and plugin directories and asks the plugins for
// their status, until ctx ends. It returns nil then. Without file events (the
// kernel's limit on watches is reached) it looks every 10 s.
func (n *Network) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	// Apart from the watching, which a plugin that hangs must not hold up.
	wg.Go(func() { n.askRegularly(ctx) })

	w := newWatch(ctx, append([]string{n.cfg.ConfDir}, n.cfg.BinDirs...))
	defer w.close()
	n.load(ctx)
	n.askSoon()
	tick := time.NewTicker(interval)
	defer tick.Stop()
	var due <-chan time.Time
	var latest time.Time
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-w.events:
			now := time.Now()
			if due == nil {
				latest = now.Add(settleMost)
			}
			due = time.After(max(0, min(settle, latest.Sub(now))))
			continue
		case <-tick.C:
		case <-due:
		}
		due = nil
		// Watch first, read then: a file that comes in between is not lost.
		w.arm()
		if n.load(ctx) {
			n.askSoon()
		}
	}
}

func (n *Network) askRegularly(ctx context.Context) {
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-n.recheck:
		case <-tick.C:
		}
		n.askStatus(ctx)
	}
}

// watch follows directories that need not exist: for an absent one it watches
// the nearest ancestor that does.
type watch struct {
	dirs   []string
	w      *fsnotify.Watcher // nil: no file events on this node
	events chan struct{}
	log    klog.Logger
}

func newWatch(ctx context.Context, dirs []string) *watch {
	out := &watch{dirs: dirs, events: make(chan struct{}, 1), log: klog.FromContext(ctx)}
	w, err := fsnotify.NewWatcher()
	if err != nil {
		out.log.Info("No file events; looking at the CNI configuration from time to time", "interval", interval, "reason", err.Error())
		return out
	}
	out.w = w
	go out.pump()
	out.arm()
	return out
}

// pump turns the watcher's two channels into one signal, so that neither fills.
func (w *watch) pump() {
	for {
		select {
		case _, ok := <-w.w.Events:
			if !ok {
				return
			}
		case err, ok := <-w.w.Errors:
			if !ok {
				return
			}
			w.log.V(4).Info("File events lost", "reason", err.Error())
		}
		select {
		case w.events <- struct{}{}:
		default:
		}
	}
}

// arm watches what exists now. Watching a directory twice is no harm, and one
// that was removed and made again needs a new watch. Ancestors that are no
// longer needed are let go.
func (w *watch) arm() {
	if w.w == nil {
		return
	}
	wanted := map[string]bool{}
	// Twice, for a directory that is made between the look for it and the watch
	// on its parent.
	for range 2 {
		for _, dir := range w.dirs {
			if at, err := w.nearest(dir); err == nil {
				wanted[at] = true
			} else {
				w.log.V(4).Info("No file events for a CNI directory", "dir", dir, "reason", err.Error())
			}
		}
	}
	for _, dir := range w.w.WatchList() {
		if !wanted[dir] {
			_ = w.w.Remove(dir) // gone meanwhile is as good
		}
	}
}

// nearest watches dir or else its closest ancestor, and returns which.
func (w *watch) nearest(dir string) (string, error) {
	for {
		err := w.w.Add(dir)
		parent := filepath.Dir(dir)
		if err == nil || parent == dir {
			return dir, err
		}
		dir = parent
	}
}

func (w *watch) close() {
	if w.w != nil {
		_ = w.w.Close()
	}
}
