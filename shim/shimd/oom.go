package shimd

import (
	"bytes"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// An oomWatch counts the processes that the kernel killed for the memory of the
// container's cgroup. The count is read while the file can be read: systemd
// removes the cgroup as soon as the last process has gone, so an event makes
// the shim read it in time, and the last value is kept.
type oomWatch struct {
	loop  *loop
	fd    int // of memory.events or memory.oom_control; 0 for none
	event int // eventfd of cgroup v1; 0 for none
	base  uint64
	last  uint64
	seen  bool // the kernel told of a shortage that no count was read after
}

// open begins to watch. A cgroup without the file is not watched.
func (o *oomWatch) open(l *loop, path string) {
	if path == "" {
		return
	}
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return
	}
	o.loop, o.fd = l, fd
	if !o.read() {
		return
	}
	o.base = o.last
	if dir, ok := strings.CutSuffix(path, "/memory.oom_control"); ok {
		o.watchV1(dir)
		return
	}
	l.add(fd, unix.EPOLLPRI, func(uint32) { o.read() })
}

// watchV1 has the kernel add to an eventfd when memory runs short.
func (o *oomWatch) watchV1(dir string) {
	event, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return
	}
	if writeFile(dir+"/cgroup.event_control", itoa(event)+" "+itoa(o.fd)) != nil {
		unix.Close(event)
		return
	}
	o.event = event
	o.loop.add(event, unix.EPOLLIN, func(uint32) {
		var n [8]byte
		unix.Read(event, n[:])
		// The event comes before the kill is counted, and also when the
		// cgroup is removed.
		o.seen = o.read()
	})
}

// read takes the count and returns whether there is one.
func (o *oomWatch) read() bool {
	if o.fd <= 0 {
		return false
	}
	b, err := readAt(o.fd, 0, 4096)
	if n, ok := oomKills(b); ok && err == nil {
		o.last = n
		return true
	}
	o.close()
	return false
}

func (o *oomWatch) close() {
	if o.fd > 0 {
		o.loop.close(o.fd)
		if o.event > 0 {
			o.loop.close(o.event)
		}
	}
	o.fd, o.event = 0, 0
}

// killed tells whether the kernel killed a process since open. When the cgroup
// has gone, a shortage followed by the init's death from SIGKILL counts as one.
func (o *oomWatch) killed(bySIGKILL bool) bool {
	if o.read() {
		o.seen = false
	}
	o.close()
	return o.last > o.base || o.seen && bySIGKILL
}

// oomKills finds the line "oom_kill N", which both versions of cgroup have.
func oomKills(b []byte) (uint64, bool) {
	for line := range bytes.Lines(b) {
		if v, ok := bytes.CutPrefix(line, []byte("oom_kill ")); ok {
			n, err := strconv.ParseUint(string(bytes.TrimSpace(v)), 10, 64)
			return n, err == nil
		}
	}
	return 0, false
}
