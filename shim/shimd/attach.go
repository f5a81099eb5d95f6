package shimd

import (
	"time"

	"golang.org/x/sys/unix"

	"github.com/berthd/berth/shim/wire"
)

const (
	maxAttached = 64 // at once
	// holdLimit is how long a container's output waits for a client whose pipe
	// is full, before that client is cut off. berthd empties the pipe as fast
	// as it can, whatever its own client does, so it is only its scheduling
	// that is waited for; and each client can be waited for in vain once.
	holdLimit = 200 * time.Millisecond
)

// An attachment is a client that gets what the container writes.
type attachment struct {
	s     *shim
	p     pending // answered at its end
	stdin bool
	taps  []*tap
	limit timer
}

// A tap passes one stream on to a pipe.
type tap struct {
	a    *attachment
	st   *stream
	fd   int    // -1 after its end
	rest []byte // what the pipe has not taken yet; the stream is held until it has
	last bool   // nothing more will come
}

// attach begins an attachment. The answer comes when all that it gets has ended.
func (s *shim) attach(p pending, body wire.Fields) *stepError {
	var r wire.Attach
	want := []*stream(nil)
	err := r.Decode(body)
	if r.Stdout {
		want = append(want, s.streams[0])
	}
	if r.Stderr {
		want = append(want, s.streams[1])
	}
	fds, ok := p.c.takeFiles(len(want))
	var e *stepError
	switch {
	case err != nil || !ok || len(want) == 0 && !r.Stdin:
		e = fail(wire.CodeInvalid, "", "attach without a stream, or without its descriptors")
	case s.status != wire.StatusCreated && s.status != wire.StatusRunning:
		e = fail(wire.CodeState, "", "container is "+s.status)
	case r.Stderr && s.l.Terminal:
		e = fail(wire.CodeInvalid, "", "container has a terminal, and no stderr of its own")
	case r.Stdin && s.stdin.fd < 0:
		e = fail(wire.CodeState, "", "container has no stdin, or it was closed")
	case len(s.attached) >= maxAttached:
		e = fail(wire.CodeBusy, "", itoa(maxAttached)+" clients are attached")
	}
	if e != nil {
		closeFDs(fds)
		return e
	}
	a := &attachment{s: s, p: p, stdin: r.Stdin}
	a.limit.fire = a.cut
	s.attached = append(s.attached, a)
	for i, st := range want {
		t := &tap{a: a, st: st, fd: fds[i]}
		unix.SetNonblock(t.fd, true)
		a.taps = append(a.taps, t)
		st.sinks = append(st.sinks[:len(st.sinks):len(st.sinks)], t)
	}
	p.started()
	for _, t := range a.taps {
		if t.st.fd < 0 {
			t.chunk(t.st, nil)
		}
	}
	return nil
}

// chunk passes p on, or holds the stream when the pipe is full.
func (t *tap) chunk(_ *stream, p []byte) {
	switch {
	case t.fd < 0:
	case p == nil:
		if t.last = true; len(t.rest) == 0 {
			t.done()
		}
	case len(t.rest) > 0: // another one held the stream, and it was read all the same
		t.a.cut()
	default:
		n := t.write(p)
		if n < 0 || n == len(p) {
			return
		}
		if !t.a.waits() {
			t.a.s.loop.arm(&t.a.limit, holdLimit)
		}
		t.rest = append([]byte(nil), p[n:]...)
		t.st.hold(1)
		if t.a.s.loop.find(t.fd) == nil {
			t.a.s.loop.add(t.fd, unix.EPOLLOUT, func(uint32) { t.flush() })
			return
		}
		t.a.s.loop.set(t.fd, unix.EPOLLOUT)
	}
}

// write returns how much of p the pipe took, -1 when its reader has gone and
// with it the attachment.
func (t *tap) write(p []byte) (n int) {
	for n < len(p) {
		m, err := unix.Write(t.fd, p[n:])
		switch err {
		case nil:
			n += m
		case unix.EINTR:
		case unix.EAGAIN:
			return n
		default:
			t.a.end()
			return -1
		}
	}
	return n
}

// flush goes on with what the pipe had no room for.
func (t *tap) flush() {
	n := t.write(t.rest)
	if n < 0 {
		return
	}
	if t.rest = t.rest[n:]; len(t.rest) > 0 {
		return
	}
	t.release()
	if t.last {
		t.done()
	}
}

// release lets the stream go on.
func (t *tap) release() {
	t.rest = nil
	t.a.s.loop.set(t.fd, 0)
	t.st.hold(-1)
	if !t.a.waits() {
		t.a.s.loop.stop(&t.a.limit)
	}
}

// waits tells whether a stream is held for a.
func (a *attachment) waits() bool {
	for _, t := range a.taps {
		if len(t.rest) > 0 {
			return true
		}
	}
	return false
}

// close ends one tap. What the pipe has not taken is dropped.
func (t *tap) close() {
	if t.fd < 0 {
		return
	}
	if len(t.rest) > 0 {
		t.release()
	}
	t.a.s.loop.close(t.fd)
	t.fd = -1
	// A copy: the list may be being gone through.
	var keep []sink
	for _, k := range t.st.sinks {
		if k != sink(t) {
			keep = append(keep, k)
		}
	}
	t.st.sinks = keep
}

// done ends a tap whose stream has ended, and the attachment with its last one.
func (t *tap) done() {
	t.close()
	for _, other := range t.a.taps {
		if other.fd >= 0 {
			return
		}
	}
	t.a.end()
}

// end ends an attachment in order.
func (a *attachment) end() { a.finish(nil) }

// cut ends one whose client does not read.
func (a *attachment) cut() {
	a.finish(fail(wire.CodeSlow, "", "output was not read for "+holdLimit.String()))
}

func (a *attachment) finish(e *stepError) {
	s, found := a.s, false
	var keep []*attachment
	for _, other := range s.attached {
		if other == a {
			found = true
			continue
		}
		keep = append(keep, other)
	}
	if !found {
		return
	}
	s.attached = keep
	s.loop.stop(&a.limit)
	for _, t := range a.taps {
		t.close()
	}
	if a.stdin {
		s.stdinOnce()
	}
	if e != nil {
		a.p.error(e)
	} else {
		a.p.ok()
	}
	s.endIfOver()
}

// endInputs ends the attachments that get no output, when the container's
// input has ended; the others end with the output.
func (s *shim) endInputs() {
	for _, a := range s.attached {
		if len(a.taps) == 0 {
			a.end()
		}
	}
}

// resize sets the size of the terminal.
func (s *shim) resize(p pending, body wire.Fields) *stepError {
	var r wire.Resize
	if r.Decode(body) != nil {
		return fail(wire.CodeInvalid, "", wire.ErrFrame.Error())
	}
	if !s.l.Terminal || s.streams[0] == nil || s.streams[0].fd < 0 {
		return fail(wire.CodeState, "", "container has no terminal, or it was closed")
	}
	size := unix.Winsize{Row: r.Height, Col: r.Width}
	if err := unix.IoctlSetWinsize(s.streams[0].fd, unix.TIOCSWINSZ, &size); err != nil {
		return failErr("terminal", err)
	}
	p.ok()
	return nil
}
