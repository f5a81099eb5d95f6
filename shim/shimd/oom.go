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
//
// In time is not always: the kernel holds events back for up to 10 ms when it
// had one just before, and systemd may be faster. What the cgroup above counts
// on v2 includes the cgroups below it and stays, so that it tells what was
// missed, but not whose it was; see killed.
type oomWatch struct {
	loop  *loop
	fd    int // of memory.events or memory.oom_control; 0 for none
	event int // eventfd of cgroup v1; 0 for none
	base  uint64
	last  uint64
	seen  bool // the kernel told of a shortage that no count was read after

	above     int    // fd of memory.events of the cgroup above on v2; 0 for none
	aboveLast uint64 // its count just before last was read
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
	dir, v1 := strings.CutSuffix(path, "/memory.oom_control")
	if name := "/memory.events"; !v1 && strings.HasSuffix(path, name) {
		above, err := unix.Open(strings.TrimSuffix(path, name)+"/.."+name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err == nil { // else that is the root
			o.above = above
		}
	}
	if !o.read() {
		o.close()
		return
	}
	o.base = o.last
	if v1 {
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
	// The cgroup above first: what comes between the two is in the own count.
	above, ok := readKills(o.above)
	if !ok {
		o.closeAbove()
	}
	if n, ok := readKills(o.fd); ok {
		o.last, o.aboveLast = n, above
		return true
	}
	o.closeOwn()
	return false
}

func readKills(fd int) (uint64, bool) {
	if fd <= 0 {
		return 0, false
	}
	b, err := readAt(fd, 0, 4096)
	if err != nil {
		return 0, false
	}
	return oomKills(b)
}

func (o *oomWatch) close() {
	o.closeOwn()
	o.closeAbove()
}

func (o *oomWatch) closeOwn() {
	if o.fd > 0 {
		o.loop.close(o.fd)
		if o.event > 0 {
			o.loop.close(o.event)
		}
	}
	o.fd, o.event = 0, 0
}

func (o *oomWatch) closeAbove() {
	if o.above > 0 {
		unix.Close(o.above)
	}
	o.above = 0
}

// killed tells whether the kernel killed a process since open, and ends the
// watch. When the cgroup has gone before its count was read, an end by SIGKILL
// together with a shortage (v1) or with a kill in the cgroup above since the
// last look (v2) counts as one.
func (o *oomWatch) killed(bySIGKILL bool) bool {
	if o.read() {
		o.seen = false
	} else if n, ok := readKills(o.above); ok && n > o.aboveLast {
		o.seen = true
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
