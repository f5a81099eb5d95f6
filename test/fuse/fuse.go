// Package fuse gives tests a file system that stops to answer, as one of a network
// does whose server has gone. It speaks just enough of the kernel's protocol
// (linux/fuse.h) for a directory "volume" with an empty file "file" in it.
//
// The nouns:
//
//   - FS: the mounted file system, with its server in this process.
//   - waiting: a request that the server has taken and does not answer. Whoever
//     made it does not even die of SIGKILL, which makes this the hardest case of its
//     kind; of NFS the kernel says it can be killed.
//
// Caveat: whatever looks at the mount point waits too, while nothing is answered.
// A test that ends without Close, by a crash say, ends the server and so all waiting.
package fuse

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// ErrNone tells that this machine has no FUSE.
var ErrNone = errors.New("no FUSE")

// FS is a mounted file system. Make it with New.
type FS struct {
	Dir string // where it is mounted

	fd   int
	over chan struct{} // closed when the server has ended

	mu      sync.Mutex
	hung    bool
	waiting [][]byte // requests without an answer, oldest first
}

// Volume is the one directory, and File the one file in it.
func (f *FS) Volume() string { return filepath.Join(f.Dir, "volume") }

// File is the path of the file.
func (f *FS) File() string { return filepath.Join(f.Volume(), "file") }

// New makes dir and mounts the file system there. It needs root. The error is
// ErrNone where the kernel lacks what it takes.
func New(dir string) (*FS, error) {
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("%w: /dev/fuse: %w", ErrNone, err)
	}
	if err := os.Mkdir(dir, 0o755); err != nil {
		return nil, errors.Join(err, unix.Close(fd))
	}
	options := fmt.Sprintf("fd=%d,rootmode=40755,user_id=0,group_id=0,allow_other", fd)
	if err := unix.Mount("test", dir, "fuse", unix.MS_NOSUID|unix.MS_NODEV, options); err != nil {
		return nil, errors.Join(fmt.Errorf("%w: mount: %w", ErrNone, err), unix.Close(fd))
	}
	f := &FS{Dir: dir, fd: fd, over: make(chan struct{})}
	go f.serve()
	return f, nil
}

// Hang makes the server take requests and answer none.
func (f *FS) Hang() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.hung = true
}

// Waiting tells how many requests are without an answer.
func (f *FS) Waiting() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.waiting)
}

// Resume answers all that wait, and goes on to answer.
func (f *FS) Resume() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.hung = false
	for _, req := range f.waiting {
		f.answer(req)
	}
	f.waiting = nil
}

// Close ends the server: all that wait get an error. Then it unmounts.
func (f *FS) Close() error {
	// Forced, it ends the connection, also when the mount itself is in use.
	err := unix.Unmount(f.Dir, unix.MNT_FORCE)
	if errors.Is(err, unix.EBUSY) {
		err = unix.Unmount(f.Dir, unix.MNT_DETACH)
	}
	if err != nil {
		return fmt.Errorf("unmount %s: %w", f.Dir, err)
	}
	<-f.over
	return unix.Close(f.fd)
}

// The requests that have an answer of their own.
const (
	opLookup      = 1
	opForget      = 2 // has none, like the next two that say so
	opGetattr     = 3
	opOpen        = 14
	opRead        = 15
	opStatfs      = 17
	opRelease     = 18
	opFlush       = 25
	opInit        = 26
	opOpendir     = 27
	opReaddir     = 28
	opReleasedir  = 29
	opInterrupt   = 36 // none
	opBatchForget = 42 // none
)

// Nodes. The root's number is the kernel's choice.
const (
	root = iota + 1
	volume
	file
)

// Sizes in bytes: the headers, and what is read at a time, at least maxWrite and
// a page of header.
const (
	inHeader  = 40
	outHeader = 16
	maxWrite  = 4 << 10
	readSize  = 64 << 10
)

func (f *FS) serve() {
	defer close(f.over)
	buf := make([]byte, readSize)
	for {
		n, err := unix.Read(f.fd, buf)
		switch {
		case err == unix.EINTR || err == unix.ENOENT: // a request was given up meanwhile
		case err != nil || n < inHeader: // ENODEV: unmounted
			return
		default:
			f.take(bytes.Clone(buf[:n]))
		}
	}
}

func (f *FS) take(req []byte) {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch opcode(req) {
	case opForget, opBatchForget, opInterrupt:
		return
	}
	if f.hung {
		f.waiting = append(f.waiting, req)
		return
	}
	f.answer(req)
}

func opcode(req []byte) uint32 { return binary.NativeEndian.Uint32(req[4:]) }

// answer writes the answer to a request. One that was given up has nobody to
// take it, which is no error.
func (f *FS) answer(req []byte) {
	body, errno := reply(opcode(req), binary.NativeEndian.Uint64(req[16:]), req[inHeader:])
	out := make([]byte, outHeader, outHeader+len(body))
	binary.NativeEndian.PutUint32(out, uint32(outHeader+len(body)))
	binary.NativeEndian.PutUint32(out[4:], uint32(-int32(errno)))
	copy(out[8:], req[8:16]) // the request's number
	_, _ = unix.Write(f.fd, append(out, body...))
}

// reply is the content of an answer.
func reply(op uint32, node uint64, body []byte) ([]byte, unix.Errno) {
	switch op {
	case opInit:
		// fuse_init_out: version, then max_readahead, flags, max_background and
		// congestion_threshold in one word, max_write, time_gran.
		return pad(words(7, 31, 0, 0, 12<<16|16, maxWrite, 1), 64), 0
	case opLookup:
		name := strings.TrimRight(string(body), "\x00")
		switch {
		case node == root && name == "volume":
			return entry(volume), 0
		case node == volume && name == "file":
			return entry(file), 0
		}
		return nil, unix.ENOENT
	case opGetattr:
		return append(make([]byte, 16), attr(node)...), 0 // valid for no time at all
	case opOpen, opOpendir:
		return make([]byte, 16), 0
	case opRead, opReaddir, opRelease, opReleasedir, opFlush:
		return nil, 0
	case opStatfs:
		return make([]byte, 80), 0
	}
	return nil, unix.ENOSYS
}

// entry is fuse_entry_out: the node, then no time for which it is valid.
func entry(node uint64) []byte {
	out := binary.NativeEndian.AppendUint64(nil, node)
	return append(pad(out, 40), attr(node)...)
}

// attr is fuse_attr: six words of 64 bits, of which the first is the inode, then
// ten of 32 bits: three parts of times, mode, links, user, group, device, block size.
func attr(node uint64) []byte {
	mode := uint32(unix.S_IFDIR | 0o755)
	if node == file {
		mode = unix.S_IFREG | 0o644
	}
	out := pad(binary.NativeEndian.AppendUint64(nil, node), 48)
	return append(out, words(0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)...)
}

func words(list ...uint32) (out []byte) {
	for _, w := range list {
		out = binary.NativeEndian.AppendUint32(out, w)
	}
	return out
}

func pad(b []byte, n int) []byte { return append(b, make([]byte, n-len(b))...) }
