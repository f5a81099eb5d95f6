package overlay

import (
	"context"
	"errors"
	"sync"

	"k8s.io/klog/v2"

	"github.com/berthd/berth/snapshotter"
	"github.com/berthd/berth/store"
)

// maxRemovers is how many directories are removed side by side, in all sweeps together:
// the file system's own locks are by directory. One tree is one thread's work: several were
// no faster, as they wait for the file system's journal and for its list of orphans.
const maxRemovers = 4

// sweeps are the removals of directories that no row names any more, which go on after
// the snapshots are gone. What Close or a crash leaves of them is Cleanup's.
type sweeps struct {
	slots chan struct{} // one for each directory that may be removed now
	stop  chan struct{} // closed by Close
	wg    sync.WaitGroup

	mu      sync.Mutex
	closed  bool
	running map[string]<-chan struct{} // by directory
}

func newSweeps() *sweeps {
	return &sweeps{slots: make(chan struct{}, maxRemovers), stop: make(chan struct{}), running: map[string]<-chan struct{}{}}
}

// of is the channel that is closed when the sweep that removes dir has ended; nil if none
// does.
func (w *sweeps) of(dir string) <-chan struct{} {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.running[dir]
}

// begin notes a sweep, unless it is too late for one.
func (w *sweeps) begin(dirs []string, freed <-chan struct{}) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		return false
	}
	for _, d := range dirs {
		w.running[d] = freed
	}
	w.wg.Add(1)
	return true
}

func (w *sweeps) end(dirs []string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, d := range dirs {
		delete(w.running, d)
	}
	w.wg.Done()
}

// Close ends the sweeps that run and waits for them. The book is its owner's to close.
func (s *Snapshotter) Close() error {
	w := s.sweeps
	w.mu.Lock()
	if !w.closed {
		close(w.stop)
	}
	w.closed = true
	w.mu.Unlock()
	w.wg.Wait()
	return nil
}

// RemoveAll implements snapshotter.BatchRemover.
func (s *Snapshotter) RemoveAll(ctx context.Context, keys []string) (removed []string, freed <-chan struct{}, err error) {
	var dirs []string
	err = s.record(ctx, "remove", func(tx *store.Tx) error {
		s.spare(dirs) // it may be run again, and find others
		removed, dirs = nil, nil
		for _, key := range keys {
			dir, err := s.removeRow(tx, key)
			switch {
			case errors.Is(err, snapshotter.ErrInUse):
				continue
			case errors.Is(err, snapshotter.ErrNotFound):
			case err != nil:
				return err
			default:
				dirs = append(dirs, dir)
				s.removing.Store(dir, true)
			}
			removed = append(removed, key)
		}
		return nil
	})
	if err != nil {
		s.spare(dirs)
		removed, dirs = nil, nil
	}
	return removed, s.sweep(ctx, dirs), err
}

// sweep removes directories that no row names any more, in the background, and returns the
// channel that is closed at its end.
func (s *Snapshotter) sweep(ctx context.Context, dirs []string) <-chan struct{} {
	freed := make(chan struct{})
	if len(dirs) == 0 || !s.sweeps.begin(dirs, freed) {
		s.spare(dirs)
		close(freed)
		return freed
	}
	ctx = context.WithoutCancel(ctx)
	go func() {
		defer close(freed)
		defer s.sweeps.end(dirs)
		var wg sync.WaitGroup
		for _, dir := range dirs {
			select {
			case s.sweeps.slots <- struct{}{}:
			case <-s.sweeps.stop:
				s.spare([]string{dir})
				continue
			}
			wg.Go(func() {
				defer func() { <-s.sweeps.slots }()
				s.removeDir(ctx, dir)
			})
		}
		wg.Wait()
	}()
	return freed
}

// spare is told of directories that are not being removed after all.
func (s *Snapshotter) spare(dirs []string) {
	for _, dir := range dirs {
		s.removing.Delete(dir)
	}
}

// removeDir removes a directory that no row names any more. What fails is logged, and left
// to Cleanup, of which OnLeft's function is told; what Close ends is left to the next start's.
func (s *Snapshotter) removeDir(ctx context.Context, dir string) {
	defer s.removing.Delete(dir)
	err := failpoint(ctx, "snapshot", "delete")
	if err == nil {
		err = removeTree(s.path(dir), s.sweeps.stop)
	}
	switch {
	case err == nil:
	case errors.Is(err, errStopped):
		klog.FromContext(ctx).V(2).Info("Snapshot directory left to the next start", "dir", dir)
	default:
		klog.FromContext(ctx).Error(err, "Snapshot directory left behind", "dir", dir)
		if f := s.onLeft.Load(); f != nil {
			(*f)()
		}
	}
}
