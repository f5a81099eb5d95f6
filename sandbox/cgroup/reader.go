package cgroup

import (
	"bytes"
	"errors"
	"fmt"
	"strconv"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// Reader reads the usage of one group again and again. It keeps the files open
// that Stats needs, about ten: to read an open file costs the kernel an eighth of
// what it costs to open it. They do not keep the group: it can be removed
// meanwhile, and is ErrGone then. One goroutine at a time; Close it in the end.
type Reader struct {
	g     Group
	held  map[string]int // descriptors by file name, absent for a file that is not there
	keep  bool           // whether what is opened now stays open
	dirs  map[string]string
	seen  map[string][]byte // what this call has read so far, nil unless it may ask again
	buf   []byte            // during a call
	found int               // files read in this call
	err   error             // the first one that is not the absence of a file
}

// absent is in the place of the descriptor of a file that does not exist.
const absent = -1

// maxFile is the size up to which files are read, in bytes.
const maxFile = 16 << 10

var buffers = sync.Pool{New: func() any { b := make([]byte, maxFile); return &b }}

// Reader returns a reader of the group, which opens nothing yet.
func (g Group) Reader() *Reader {
	return &Reader{g: g, held: map[string]int{}, dirs: map[string]string{}}
}

// Close closes the files. The reader can be used again, and opens them anew.
func (r *Reader) Close() {
	for name, fd := range r.held {
		if fd != absent {
			unix.Close(fd)
			heldFiles.Add(-1)
		}
		delete(r.held, name)
	}
}

// read runs one call's reading and turns what it found into an error.
func (r *Reader) read(keep bool, fn func()) error {
	b := buffers.Get().(*[]byte)
	defer buffers.Put(b)
	r.buf, r.keep, r.found, r.err = *b, keep, 0, nil
	fn()
	r.buf = nil
	switch {
	case r.err != nil:
		r.Close()
		return fmt.Errorf("control group %s: %w", r.g.path, r.err)
	case r.found == 0:
		r.Close() // it may be made later, with files that are not there now
		return fmt.Errorf("control group %s: %w", r.g.path, ErrGone)
	}
	return nil
}

// The files that readers of this process hold open, and the most that they may.
// Beyond that files are opened for each reading: slower, and still right.
var (
	heldFiles atomic.Int64
	mostHeld  = sync.OnceValue(func() int64 {
		var l unix.Rlimit
		if unix.Getrlimit(unix.RLIMIT_NOFILE, &l) != nil {
			return 0
		}
		return int64(min(l.Cur/4, 8192))
	})
)

// file returns the content until the next call, and false if there is none. The
// file must show all that it has as one record, as all but lists of processes do.
func (r *Reader) file(dir, name string) ([]byte, bool) {
	if r.err != nil || dir == "" {
		return nil, false
	}
	if b, again := r.seen[name]; again {
		if b != nil {
			r.found++
		}
		return b, b != nil
	}
	b, ok := r.readFile(dir, name)
	if r.seen != nil {
		b = bytes.Clone(b)
		r.seen[name] = b
	}
	return b, ok
}

func (r *Reader) readFile(dir, name string) ([]byte, bool) {
	fd, err := r.open(dir, name)
	if err == nil {
		var n int
		if n, err = readAt(fd, r.buf); err == nil {
			r.done(name, fd)
			r.found++
			return r.buf[:n], true
		}
		r.forget(name, fd)
	}
	if !missing(err) {
		r.err = fmt.Errorf("%s: %w", name, err)
	}
	return nil, false
}

// dir is Group.dir, which is asked for at each file, with a memory.
func (r *Reader) dir(controller string) string {
	d, ok := r.dirs[controller]
	if !ok {
		d = r.g.dir(controller)
		r.dirs[controller] = d
	}
	return d
}

// missing tells whether an error means that there is no such file, or not any
// more, or that what it tells is turned off in the kernel.
func missing(err error) bool {
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.EOPNOTSUPP)
}

func (r *Reader) open(dir, name string) (int, error) {
	fd, known := r.held[name]
	if known {
		if fd == absent {
			return 0, unix.ENOENT
		}
		return fd, nil
	}
	fd, err := unix.Open(dir+"/"+name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) && r.keep {
		r.held[name] = absent
	}
	return fd, err
}

// done keeps a file for the next time, or closes it.
func (r *Reader) done(name string, fd int) {
	if _, known := r.held[name]; known {
		return
	}
	if r.keep && heldFiles.Add(1) <= mostHeld() {
		r.held[name] = fd
		return
	}
	if r.keep {
		heldFiles.Add(-1)
	}
	unix.Close(fd)
}

// forget closes a file that cannot be read.
func (r *Reader) forget(name string, fd int) {
	if _, known := r.held[name]; known {
		delete(r.held, name)
		heldFiles.Add(-1)
	}
	unix.Close(fd)
}

// readAt reads a file from its beginning. A short read is all there is: the
// kernel shows one record at once if it fits.
func readAt(fd int, buf []byte) (int, error) {
	for {
		n, err := unix.Pread(fd, buf, 0)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return 0, err
		case n == len(buf):
			return 0, fmt.Errorf("over %d bytes", len(buf)-1)
		default:
			return n, nil
		}
	}
}

// number reads a file with one number, or "max".
func (r *Reader) number(dir, name string) (uint64, bool) {
	b, ok := r.file(dir, name)
	if !ok {
		return 0, false
	}
	b = bytes.TrimSpace(b)
	if string(b) == "max" {
		return NoLimit, true
	}
	v, err := strconv.ParseUint(string(b), 10, 64)
	if err != nil {
		r.err = fmt.Errorf("%s: %q is no number", name, clip(string(b)))
	}
	return v, err == nil
}

// numberOr reads a file with one number; if there is none, or no file, the
// result is other.
func (r *Reader) numberOr(dir, name string, other uint64) uint64 {
	if v, ok := r.number(dir, name); ok {
		return v
	}
	return other
}

// keys returns the values of "key value" lines, 0 for a key that is missing.
func keys(b []byte, want ...string) []uint64 {
	values := make([]uint64, len(want))
	for line := range bytes.Lines(b) {
		key, value, _ := bytes.Cut(bytes.TrimSpace(line), []byte(" "))
		for i, w := range want {
			if string(key) == w {
				values[i], _ = strconv.ParseUint(string(value), 10, 64)
			}
		}
	}
	return values
}
