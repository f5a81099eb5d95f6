package shimd

import (
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A loop waits for descriptors and deadlines and calls what belongs to them,
// all on one goroutine. Nothing that is called may block.
type loop struct {
	ep     int
	watch  []watch // by descriptor, as these are small numbers
	timers []*timer
	done   bool
	idle   func() // called before a wait of unknown length
}

type watch struct {
	mask  uint32
	ready func(events uint32) // nil when the descriptor is not watched
}

// A timer is set and stopped any number of times. It belongs to who has it.
type timer struct {
	at   int64 // nanoseconds since start
	fire func()
}

var start = time.Now()

func monotonic() int64 { return int64(time.Since(start)) }

// settle is how long the loop waits for more work before it gives memory back,
// so that a busy container does not pay for it again and again.
const settle = time.Second

func newLoop() (*loop, error) {
	ep, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, err
	}
	return &loop{ep: ep}, nil
}

// add watches fd, which must be non-blocking, for events.
func (l *loop) add(fd int, events uint32, ready func(uint32)) error {
	ev := unix.EpollEvent{Events: events, Fd: int32(fd)}
	if err := unix.EpollCtl(l.ep, unix.EPOLL_CTL_ADD, fd, &ev); err != nil {
		return err
	}
	for fd >= len(l.watch) {
		l.watch = append(l.watch, watch{})
	}
	l.watch[fd] = watch{events, ready}
	return nil
}

// find returns the watch of fd, or nil.
func (l *loop) find(fd int) *watch {
	if fd < 0 || fd >= len(l.watch) || l.watch[fd].ready == nil {
		return nil
	}
	return &l.watch[fd]
}

// set changes what fd is watched for. With no events it is not watched at all,
// as a hang-up cannot be masked otherwise.
func (l *loop) set(fd int, events uint32) {
	w := l.find(fd)
	if w == nil || w.mask == events {
		return
	}
	op := unix.EPOLL_CTL_MOD
	if w.mask == 0 {
		op = unix.EPOLL_CTL_ADD
	} else if events == 0 {
		op = unix.EPOLL_CTL_DEL
	}
	w.mask = events
	unix.EpollCtl(l.ep, op, fd, &unix.EpollEvent{Events: events, Fd: int32(fd)})
}

// close forgets fd and closes it. It is a no-op for -1.
func (l *loop) close(fd int) {
	if fd < 0 {
		return
	}
	if w := l.find(fd); w != nil {
		l.set(fd, 0)
		*w = watch{}
	}
	unix.Close(fd)
}

// after calls fire once after d, unless it is stopped by what is returned.
func (l *loop) after(d time.Duration, fire func()) *timer {
	t := &timer{fire: fire}
	l.arm(t, d)
	return t
}

// arm sets t to fire once after d, counted from now.
func (l *loop) arm(t *timer, d time.Duration) {
	l.stop(t)
	t.at = monotonic() + int64(d)
	l.timers = append(l.timers, t)
}

func (l *loop) stop(t *timer) {
	for i, other := range l.timers {
		if other == t {
			l.timers = append(l.timers[:i], l.timers[i+1:]...)
			return
		}
	}
}

// next returns the timer that is due first, or nil.
func (l *loop) next() *timer {
	var first *timer
	for _, t := range l.timers {
		if first == nil || t.at < first.at {
			first = t
		}
	}
	return first
}

// timeout returns what epoll_wait takes: milliseconds, -1 for no end.
func (l *loop) timeout() int {
	t := l.next()
	if t == nil {
		return -1
	}
	return int(max(0, (t.at-monotonic()+999999)/1000000))
}

func (l *loop) run() {
	events := make([]unix.EpollEvent, 16)
	for !l.done {
		wait := l.timeout()
		if dirty() && (wait < 0 || wait > int(settle/time.Millisecond)) {
			n, _ := unix.EpollWait(l.ep, events, int(settle/time.Millisecond))
			if n == 0 {
				l.idle()
			}
			l.call(events[:max(n, 0)])
			continue
		}
		n, _ := unix.EpollWait(l.ep, events, wait) // EINTR comes as n < 0
		l.call(events[:max(n, 0)])
		l.fire()
	}
}

func (l *loop) call(events []unix.EpollEvent) {
	for i := range events {
		// A handler may have closed the descriptor of a later event.
		if w := l.find(int(events[i].Fd)); w != nil && !l.done {
			w.ready(events[i].Events)
		}
	}
}

func (l *loop) fire() {
	for !l.done {
		t := l.next()
		if t == nil || t.at > monotonic() {
			return
		}
		l.stop(t)
		t.fire()
	}
}

// The buffers are one anonymous mapping: a page of it costs nothing until it is
// used, and is given back when the loop settles. One goroutine uses them, each
// for no longer than a call.
const (
	inSize  = 64 << 10
	outSize = 256 << 10
	keep    = 8 << 10 // bytes of a buffer that are not worth giving back
)

var (
	inBuf, outBuf   []byte
	inHigh, outHigh int // bytes touched since they were last given back
)

func mapBuffers() error {
	b, err := unix.Mmap(-1, 0, inSize+outSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return err
	}
	inBuf, outBuf = b[:inSize:inSize], b[inSize:]
	return nil
}

func dirty() bool { return inHigh > keep || outHigh > keep }

func giveBack() {
	if dirty() {
		unix.Madvise(unsafe.Slice(&inBuf[0], inSize+outSize), unix.MADV_DONTNEED)
		inHigh, outHigh = 0, 0
	}
}

// readIn reads from fd into the shared buffer.
func readIn(fd, limit int) ([]byte, error) {
	for {
		n, err := unix.Read(fd, inBuf[:min(limit, inSize)])
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return nil, err
		}
		inHigh = max(inHigh, n)
		return inBuf[:n], nil
	}
}
