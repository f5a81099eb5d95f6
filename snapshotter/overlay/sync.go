package overlay

import (
	"context"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/berthd/berth/snapshotter"
)

// watch is one open directory of each file system that snapshots are on. For each open
// file the kernel notes which failed write it was told of last, beginning with open(2), or
// before if nobody has been told yet (errseq_t, Linux 5.8); so one that is opened only to
// sync would miss what another's sync was told of meanwhile.
type watch struct {
	dirs []*os.File
}

// Watch implements snapshotter.Syncer. Layers may be on a file system of their own.
func (s *Snapshotter) Watch() (snapshotter.Watch, error) {
	w := &watch{}
	seen := map[uint64]bool{} // by device
	for _, dir := range []string{"layers", "snapshots", "."} {
		if err := w.add(s.path(dir), seen); err != nil {
			return nil, errors.Join(fmt.Errorf("overlay: sync: %w", err), w.Close())
		}
	}
	return w, nil
}

// add opens dir, unless its file system is watched already.
func (w *watch) add(dir string, seen map[uint64]bool) error {
	f, err := os.OpenFile(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return errors.Join(&os.PathError{Op: "stat", Path: dir, Err: err}, f.Close())
	}
	if seen[uint64(st.Dev)] {
		return f.Close()
	}
	seen[uint64(st.Dev)] = true
	w.dirs = append(w.dirs, f)
	return nil
}

// Sync implements snapshotter.Watch with syncfs(2): one flush for all files, which also
// writes what others left dirty on the same file system.
func (w *watch) Sync(ctx context.Context) error {
	var errs []error
	for _, f := range w.dirs {
		if err := ctx.Err(); err != nil && len(errs) == 0 { // what is told only once goes first
			return fmt.Errorf("overlay: sync: %w", err)
		}
		if err := unix.Syncfs(int(f.Fd())); err != nil {
			errs = append(errs, fmt.Errorf("overlay: %w", &os.PathError{Op: "sync", Path: f.Name(), Err: err}))
		}
	}
	return errors.Join(errs...)
}

// Close ends the watch.
func (w *watch) Close() error {
	var errs []error
	for _, f := range w.dirs {
		errs = append(errs, f.Close())
	}
	return errors.Join(errs...)
}
