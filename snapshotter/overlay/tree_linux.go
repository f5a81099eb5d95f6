package overlay

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/berthd/berth/snapshotter"
)

// maxDepth is how many directories deep the walks here go with one descriptor
// open for each. A container can nest directories without limit, and must not
// be able to use up the descriptors of the daemon.
const maxDepth = 1000

// inode tells files apart that are linked more than once.
type inode struct{ dev, ino uint64 }

// walker adds up what a tree takes. It goes by descriptors and never follows a
// link: a container may be changing the tree meanwhile.
type walker struct {
	ctx   context.Context
	usage snapshotter.Usage
	seen  map[inode]bool
}

// usage adds up the tree at dir. One that is not there takes nothing: a power
// cut can lose a directory that the book already names.
func usage(ctx context.Context, dir string) (snapshotter.Usage, error) {
	w := walker{ctx: ctx, seen: make(map[inode]bool)}
	var st unix.Stat_t
	err := unix.Lstat(dir, &st)
	if err == nil {
		w.count(&st)
		err = w.walk(unix.AT_FDCWD, dir, 0)
	}
	if errors.Is(err, fs.ErrNotExist) {
		return w.usage, nil
	}
	return w.usage, err
}

func (w *walker) count(st *unix.Stat_t) {
	if st.Nlink > 1 && st.Mode&unix.S_IFMT != unix.S_IFDIR {
		id := inode{uint64(st.Dev), st.Ino}
		if w.seen[id] {
			return
		}
		w.seen[id] = true
	}
	w.usage.Size += st.Blocks * 512 // the unit of st_blocks, whatever the file system
	w.usage.Inodes++
}

func (w *walker) walk(at int, name string, depth int) error {
	if depth > maxDepth {
		return fmt.Errorf("directories nested deeper than %d", maxDepth)
	}
	d, err := openDir(at, name)
	if err != nil {
		return err
	}
	defer d.Close()
	for {
		if err := w.ctx.Err(); err != nil {
			return err
		}
		names, err := d.Readdirnames(1024)
		for _, n := range names {
			if err := w.entry(int(d.Fd()), n, depth); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func (w *walker) entry(at int, name string, depth int) error {
	var st unix.Stat_t
	err := unix.Fstatat(at, name, &st, unix.AT_SYMLINK_NOFOLLOW)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // removed meanwhile
	}
	if err != nil {
		return &fs.PathError{Op: "stat", Path: name, Err: err}
	}
	w.count(&st)
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return nil
	}
	err = w.walk(at, name, depth+1)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) || errors.Is(err, syscall.ELOOP) {
		return nil // removed or replaced meanwhile
	}
	return err
}

func openDir(at int, name string) (*os.File, error) {
	fd, err := unix.Openat(at, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: name, Err: err}
	}
	return os.NewFile(uintptr(fd), name), nil
}

// errStopped: a removal was ended by who asked for it.
var errStopped = errors.New("stopped")

// remover removes one tree. A directory that is nested too deep is moved up to
// the top and removed from there, so that depth costs time and not descriptors.
type remover struct {
	top   *os.File
	stop  <-chan struct{}
	moved int
}

// removeTree removes dir and all in it; that it is not there is no error. It
// goes by descriptors and follows no link. Closing stop, which may be nil, ends it with
// errStopped.
func removeTree(dir string, stop <-chan struct{}) error {
	top, err := openDir(unix.AT_FDCWD, dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if errors.Is(err, syscall.ENOTDIR) || errors.Is(err, syscall.ELOOP) {
		return os.Remove(dir)
	}
	if err != nil {
		return err
	}
	defer top.Close()
	r := remover{top: top, stop: stop}
	if err := r.empty(top, 0); err != nil {
		return fmt.Errorf("remove %s: %w", dir, err)
	}
	if err := unix.Rmdir(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return &fs.PathError{Op: "rmdir", Path: dir, Err: err}
	}
	return nil
}

// empty removes what is in d. Removing entries while reading a directory may hide others
// from the reading, so it is read again until nothing is left; but only from its end, as
// each new beginning goes through all that the removed ones left.
func (r *remover) empty(d *os.File, depth int) error {
	for found := false; ; {
		select {
		case <-r.stop:
			return errStopped
		default:
		}
		names, err := d.Readdirnames(1024)
		// A directory that somebody else has removed meanwhile (Cleanup beside
		// Remove) cannot be read any more: it is empty.
		switch {
		case errors.Is(err, fs.ErrNotExist), errors.Is(err, io.EOF) && !found:
			return nil
		case errors.Is(err, io.EOF):
			if _, err := d.Seek(0, io.SeekStart); err != nil {
				return err
			}
			found = false
			continue
		case err != nil:
			return err
		}
		found = true
		for _, n := range names {
			if err := r.entry(int(d.Fd()), n, depth); err != nil {
				return err
			}
		}
	}
}

func (r *remover) entry(at int, name string, depth int) error {
	err := unix.Unlinkat(at, name, 0)
	if err == nil || errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	// EISDIR on Linux, EPERM by POSIX; anything else is final.
	if !errors.Is(err, syscall.EISDIR) && !errors.Is(err, syscall.EPERM) {
		return &fs.PathError{Op: "unlink", Path: name, Err: err}
	}
	if depth >= maxDepth {
		r.moved++
		to := ".deep-" + strconv.Itoa(r.moved)
		if err := unix.Renameat2(at, name, int(r.top.Fd()), to, unix.RENAME_NOREPLACE); err != nil && !errors.Is(err, fs.ErrExist) {
			return &fs.PathError{Op: "rename", Path: name, Err: err}
		}
		return nil
	}
	sub, err := openDir(at, name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	err = r.empty(sub, depth+1)
	sub.Close()
	if err != nil {
		return fmt.Errorf("%s: %w", filepath.Base(name), err)
	}
	if err := unix.Unlinkat(at, name, unix.AT_REMOVEDIR); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return &fs.PathError{Op: "rmdir", Path: name, Err: err}
	}
	return nil
}
