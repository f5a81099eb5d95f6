package sandbox

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/berthd/berth/cni"
	"github.com/berthd/berth/sandbox/cgroup"
	"github.com/berthd/berth/snapshotter"
)

// The janitor tries again what did not succeed, with longer and longer pauses;
// it has no timer while there is nothing to do.
const (
	janitorFirst = time.Second
	janitorMax   = time.Minute
)

// resweepAfter is how long after the killing of a shim it is looked for what its
// runtime may have made since.
const resweepAfter = 2 * time.Second

// sweepLookLimit bounds the search for what there is to sweep, sweepNetworkLimit the
// sweep of the network, from the first thing that is the network's, and sweepLimit
// that of one thing: the janitor has other work.
const (
	sweepLookLimit    = 30 * time.Second
	sweepNetworkLimit = 20 * time.Second
	sweepLimit        = 30 * time.Second
)

// kick tells the janitor that there is something to do.
func (s *Service) kick() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// SweepSoon has the janitor look for what nobody owns, as at the start.
func (s *Service) SweepSoon() {
	s.resweep.Store(true)
	s.kick()
}

// retryUndo leaves the destroy of an object to the janitor. Its row may not say
// so, if the book could not be written.
func (s *Service) retryUndo(id string) {
	s.undo.Store(id, true)
	s.kick()
}

// due tells whether an object is to be destroyed.
func (s *Service) due(id string, removing bool) bool {
	_, undo := s.undo.Load(id)
	return removing || undo
}

// janitor finishes what was begun: destroys of hidden objects, stops of pods. It
// begins with a sweep, because only at the start can there be things that the
// book does not know.
func (s *Service) janitor(ctx context.Context) {
	log := klog.FromContext(ctx)
	swept := false
	var first sync.Once
	pause := janitorFirst
	for {
		left := s.finish(ctx)
		if s.resweep.Swap(false) {
			// A runtime whose shim was killed may be at work for a moment yet.
			swept = false
			select {
			case <-ctx.Done():
				return
			case <-time.After(resweepAfter):
			}
		}
		if !swept {
			if err := s.sweep(ctx); err != nil {
				log.Error(err, "Sweep not complete")
				left = true
			} else {
				swept = true
			}
			first.Do(func() { close(s.swept) })
		}
		if !left {
			pause = janitorFirst
			select {
			case <-ctx.Done():
				return
			case <-s.wake:
			}
			continue
		}
		// Not at once: whatever failed would most likely fail again.
		if !s.rest(ctx, pause) {
			return
		}
		pause = min(2*pause, janitorMax)
	}
}

// rest pauses the janitor, and ends early when there is something new to do, but not
// before janitorFirst. What failed has said so meanwhile, and must not wake it. It is
// false when ctx has ended.
func (s *Service) rest(ctx context.Context, pause time.Duration) bool {
	select {
	case <-s.wake:
	default:
	}
	select {
	case <-ctx.Done():
		return false
	case <-time.After(janitorFirst):
	}
	select {
	case <-ctx.Done():
		return false
	case <-s.wake:
	case <-time.After(pause - janitorFirst):
	}
	return true
}

// finish tries every destroy and stop that is due, and tells whether some are
// left.
func (s *Service) finish(ctx context.Context) (left bool) {
	log := klog.FromContext(ctx)
	v := s.book.view()
	var containers []*container
	for _, c := range v.containers {
		if s.due(c.ID, c.Removing) {
			containers = append(containers, c)
		}
	}
	var pods []*pod
	for _, p := range v.pods {
		if s.due(p.ID, p.Removing) || (p.Stopping && !p.Torn && p.State != StateCreating) {
			pods = append(pods, p)
		}
	}
	err := errors.Join(
		parallel(containers, 8, func(c *container) error { return s.destroyContainerOp(ctx, c.ID) }),
		// Few at a time: plugins that hang must not take all the room from others.
		parallel(pods, 2, func(p *pod) error {
			if s.due(p.ID, p.Removing) {
				return s.destroyPodOp(ctx, p.ID)
			}
			return s.StopPod(ctx, p.ID)
		}))
	if err != nil && ctx.Err() == nil {
		log.Error(err, "Janitor: some objects are left")
	}
	v = s.book.view()
	for _, c := range containers {
		if v.containers[c.ID] != nil {
			left = true
		} else {
			s.undo.Delete(c.ID)
		}
	}
	for _, p := range pods {
		if n := v.pods[p.ID]; n == nil {
			s.undo.Delete(p.ID)
		} else if n.Removing || !n.Torn {
			left = true
		}
	}
	s.forgetRebuild()
	return left
}

// layersKnown tells whether no container is left whose layers the book cannot name,
// because it was rebuilt or rows of it were unreadable.
func (s *Service) layersKnown(ctx context.Context) bool {
	for _, c := range s.book.view().containers {
		for _, key := range c.snapshots() {
			_, err := s.deps.Snapshots.Stat(ctx, key)
			if err != nil && (c.State != StateCreating || !errors.Is(err, snapshotter.ErrNotFound)) {
				return false
			}
		}
	}
	return true
}

// lostSnapshots tells whether somebody's layers may be unknown to the book.
func (s *Service) lostSnapshots() bool {
	c, ok := s.deps.Snapshots.(snapshotter.Cleaner)
	return s.deps.Store.Rebuilt() || ok && c.Lost()
}

// forgetRebuild ends the special care for a book that lost rows when no container
// is left that they may be about.
func (s *Service) forgetRebuild() {
	if !s.lostSnapshots() || !s.layersKnown(s.ctx) {
		return
	}
	log := klog.FromContext(s.ctx)
	if s.deps.Store.Rebuilt() {
		if err := s.deps.Store.ClearRebuilt(); err != nil {
			log.Error(err, "Mark of the rebuilt book not removed")
			return
		}
	}
	if err := s.cleanSnapshots(s.ctx); err != nil {
		log.Error(err, "Snapshots not swept")
	}
}

// sweep removes what is there and is not in the book, has the network plugins do so,
// and removes what else nobody needs. The error is about what could not be removed;
// what could not be looked at is only logged, as it would not look different soon.
func (s *Service) sweep(ctx context.Context) error {
	o, end := s.ops.show("sweep", "")
	defer end()
	s.sweepMu.Lock()
	defer s.sweepMu.Unlock()
	o.enter("look")
	log := klog.FromContext(ctx)
	look, looked := context.WithTimeout(ctx, sweepLookLimit)
	found, err := s.leftovers(look)
	looked()
	if err != nil && ctx.Err() == nil {
		log.Error(err, "Sweep: not everything could be looked at")
	}
	var errs []error
	done := func() {}
	defer func() { done() }()
	network := sync.OnceValue(func() (c context.Context) {
		c, done = context.WithTimeout(ctx, sweepNetworkLimit)
		return c
	})
	for _, f := range found {
		log.Info("Sweeping what nobody owns", "kind", f.Kind, "id", f.ID, "what", f.What)
		o.enter(f.Kind + " " + f.ID)
		of := ctx
		if slices.Contains(networkKinds, f.Kind) {
			of = network()
		}
		one, cancel := context.WithTimeout(of, sweepLimit)
		errs = append(errs, f.Mend(one))
		cancel()
	}
	// What is attached from here on the network keeps by itself (cni.Network.GC).
	o.enter("network plugins")
	errs = append(errs, s.collectNetwork(network()))
	o.enter("files")
	if !s.lostSnapshots() || s.layersKnown(ctx) { // else forgetRebuild will
		errs = append(errs, s.cleanSnapshots(ctx))
	}
	s.sweepCgroups()
	return errors.Join(append(errs, s.sweepInits())...)
}

// cleanSnapshots removes directories that belong to no snapshot.
func (s *Service) cleanSnapshots(ctx context.Context) error {
	if c, ok := s.deps.Snapshots.(snapshotter.Cleaner); ok {
		return c.Cleanup(ctx)
	}
	return nil
}

// collectNetwork tells the network plugins which pods there are.
func (s *Service) collectNetwork(ctx context.Context) error {
	var keep []cni.Pod
	for _, p := range s.book.view().pods {
		if p.Attached {
			keep = append(keep, s.cniPod(p))
		}
	}
	return s.deps.Network.GC(ctx, keep)
}

// ownState tells whether a runtime's state was made by this daemon. A root outside
// of the run directory may be shared with another one, whose IDs look the same;
// so it has to name the bundle, as runc, crun and youki write it down.
func (s *Service) ownState(rt ociRuntime, id string) bool {
	if filepath.Dir(rt.root) == filepath.Join(s.cfg.RunDir, "oci") {
		return true
	}
	for _, name := range names(filepath.Join(rt.root, id)) {
		path := filepath.Join(rt.root, id, name)
		if fi, err := os.Lstat(path); err != nil || !fi.Mode().IsRegular() {
			continue // the runtime's fifo
		}
		text, err := readBounded(path, maxConfig)
		if err == nil && bytes.Contains(text, []byte(s.bundleDir(id)+`"`)) {
			return true
		}
	}
	return false
}

// sweepInits removes the root file systems of inits of other versions that no pod
// has any more, and what is left of making one.
func (s *Service) sweepInits() error {
	stale, err := s.staleInits()
	errs := []error{err}
	for _, dir := range stale {
		errs = append(errs, os.RemoveAll(dir))
	}
	return errors.Join(errs...)
}

// staleInits are none while pods are known by their notes only: those do not name
// their inits.
func (s *Service) staleInits() (dirs []string, err error) {
	if len(s.noted) > 0 {
		return nil, nil
	}
	dir := filepath.Dir(s.initDir)
	all := names(dir) // before the rows: a daemon makes one for itself, and pods use it
	used := map[string]bool{filepath.Base(s.initDir): true}
	for _, p := range s.book.view().pods {
		if !p.Init {
			continue
		}
		sp, err := s.readSpec(p.ID)
		if errors.Is(err, os.ErrNotExist) {
			continue // not made yet, or not any more
		}
		if err != nil || sp.Root == nil {
			return nil, fmt.Errorf("pod %s: init of an unknown version: %w", p.ID, err)
		}
		used[filepath.Base(sp.Root.Path)] = true
	}
	for _, name := range all {
		if !used[name] {
			dirs = append(dirs, filepath.Join(dir, name))
		}
	}
	return dirs, nil
}

// sweepCgroups removes empty groups below berth's own parent whose IDs it does not
// recognize: those of a berthd before IDs could be; systemd removes its scopes
// itself. What is not empty is not touched: another berthd, with another state
// directory, may own it.
func (s *Service) sweepCgroups() {
	for _, dir := range s.hier.Parent(cgroup.Cgroupfs, "").Dirs() {
		for _, id := range names(dir) {
			if validID(id) && !s.known(id) {
				unix.Rmdir(filepath.Join(dir, id)) // busy: not ours
			}
		}
	}
}

func names(dir string) []string {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil
	}
	out := make([]string, 0, len(entries))
	for _, e := range entries {
		out = append(out, e.Name())
	}
	return out
}
