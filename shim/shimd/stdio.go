package shimd

import (
	"time"

	"golang.org/x/sys/unix"

	"github.com/berthd/berth/shim/crilog"
	"github.com/berthd/berth/shim/wire"
)

// A stream is one output of the container. Each chunk that is read goes to all
// of its sinks, which must not keep it; a sink that cannot take it drops it.
type stream struct {
	s      *shim
	name   string
	fd     int // -1 after its end
	framer *crilog.Framer
	sinks  []sink
	held   int // how many of the sinks wait, so that it is not read
}

type sink interface {
	// chunk is given the stream's bytes in order, nil at its end. A sink
	// that needs time holds the stream.
	chunk(st *stream, p []byte)
}

// An input is the container's stdin.
type input struct {
	fd    int // -1 for none
	rest  []byte
	eof   bool
	asked pending
}

// turn bounds how much of one stream is read before others get their turn.
const turn = 8 * inSize

// openStdio makes the pipes, or the socket on which the runtime will pass a pty.
func (s *shim) openStdio() error {
	if s.l.Terminal {
		unix.Unlink(s.l.Bundle + "/" + ttyFile)
		fd, err := listenIn(fdPath(s.bundle), ttyFile)
		if err != nil {
			return err
		}
		s.create.tty = fd
		return s.loop.add(fd, unix.EPOLLIN, func(uint32) { s.acceptTTY() })
	}
	if s.l.Stdin {
		r, w, err := s.pipe(true)
		if err != nil {
			return err
		}
		s.create.stdio[0], s.stdin.fd = r, w
	}
	for i, name := range [2]string{"stdout", "stderr"} {
		r, w, err := s.pipe(false)
		if err != nil {
			return err
		}
		s.create.stdio[i+1] = w
		s.streams[i] = s.newStream(name, r)
	}
	return nil
}

// pipe returns a pipe for the container, of which only the shim's end is
// non-blocking. In a user namespace the OCI runtime cannot change its owner, and
// nobody in there could open it by its name in /proc, if it were the host's root.
func (s *shim) pipe(write bool) (r, w int, err error) {
	r, w, err = pipe(write)
	if err == nil && (s.l.RootUID != 0 || s.l.RootGID != 0) {
		if err = unix.Fchown(w, int(s.l.RootUID), int(s.l.RootGID)); err != nil {
			unix.Close(r)
			unix.Close(w)
			return -1, -1, err
		}
	}
	return r, w, err
}

// pipe returns a pipe of which only the shim's end is non-blocking.
func pipe(write bool) (r, w int, err error) {
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		return -1, -1, err
	}
	mine := p[0]
	if write {
		mine = p[1]
	}
	return p[0], p[1], unix.SetNonblock(mine, true)
}

func (s *shim) newStream(name string, fd int) *stream {
	st := &stream{s: s, name: name, fd: fd, framer: crilog.NewFramer(name, s.l.MaxLogLine)}
	if s.log != nil {
		st.sinks = append(st.sinks, s.log)
	}
	return st
}

// acceptTTY takes the connection on which the runtime sends the pty.
func (s *shim) acceptTTY() {
	if s.create == nil || s.create.tty < 0 || s.create.ttyConn >= 0 {
		return
	}
	fd, _, err := unix.Accept4(s.create.tty, unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK)
	if err != nil {
		return
	}
	s.create.ttyConn = fd
	s.loop.add(fd, unix.EPOLLIN, func(uint32) { s.receiveTTY() })
}

func (s *shim) receiveTTY() {
	if s.create == nil || s.create.ttyConn < 0 || s.streams[0] != nil {
		return
	}
	master := receiveFD(s.create.ttyConn)
	if master < 0 {
		return
	}
	if unix.SetNonblock(master, true) != nil {
		unix.Close(master)
		return
	}
	s.streams[0] = s.newStream("stdout", master)
	s.stdin.fd = -1
	if s.l.Stdin {
		s.stdin.fd = master
	}
}

// receiveFD returns the one descriptor that a message carries, or -1.
func receiveFD(socket int) int {
	text, oob := make([]byte, 256), make([]byte, 64)
	_, n, _, _, err := unix.Recvmsg(socket, text, oob, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		return -1
	}
	messages, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil {
		return -1
	}
	fd := -1
	for i := range messages {
		fds, err := unix.ParseUnixRights(&messages[i])
		if err != nil {
			continue
		}
		for _, got := range fds {
			if fd >= 0 {
				unix.Close(got)
				continue
			}
			fd = got
		}
	}
	return fd
}

// watchStreams begins to read. Before the container is created nothing of it
// can have written, only the runtime, whose words are not the container's.
func (s *shim) watchStreams() {
	for _, st := range s.streams {
		if st != nil {
			s.loop.add(st.fd, unix.EPOLLIN, st.ready)
		}
	}
}

// ready is called for what the loop sees of a stream. A pty takes input, too.
func (st *stream) ready(events uint32) {
	if events&unix.EPOLLOUT != 0 && st.s.stdin.fd == st.fd {
		st.s.feed()
	}
	if events&^unix.EPOLLOUT != 0 {
		st.read(turn)
	}
}

// hold adds to the number of those that the stream waits for.
func (st *stream) hold(n int) {
	st.held += n
	st.rewatch()
}

// rewatch has the loop look for what the stream waits for.
func (st *stream) rewatch() {
	events := uint32(0)
	if st.held == 0 {
		events |= unix.EPOLLIN
	}
	if st.s.stdin.fd == st.fd && st.s.stdin.asked.c != nil {
		events |= unix.EPOLLOUT
	}
	st.s.loop.set(st.fd, events)
}

// read passes on what is there, up to limit bytes, and returns whether the
// stream has ended.
func (st *stream) read(limit int) bool {
	for limit > 0 && st.fd >= 0 && st.held == 0 {
		p, err := readIn(st.fd, inSize)
		if err == unix.EAGAIN {
			return false
		}
		if err != nil || len(p) == 0 { // a pty ends with EIO
			st.close()
			break
		}
		for _, k := range st.sinks {
			k.chunk(st, p)
		}
		limit -= len(p)
		if len(p) < 4096 {
			break // most likely all; the loop tells if not
		}
	}
	return st.fd < 0
}

// close ends a stream: what is incomplete is passed on as it is.
func (st *stream) close() {
	if st.fd < 0 {
		return
	}
	for _, k := range st.sinks {
		k.chunk(st, nil)
	}
	if st.s.stdin.fd == st.fd { // a pty is both
		st.s.closeStdin()
		st.s.stdin.fd = -1
	}
	st.s.loop.close(st.fd)
	st.fd = -1
	st.s.drained()
}

// writeStdin passes input on. The answer comes when all of it is written.
func (s *shim) writeStdin(p pending, body wire.Fields) *stepError {
	var in wire.Stdin
	if in.Decode(body) != nil {
		return fail(wire.CodeInvalid, "", wire.ErrFrame.Error())
	}
	switch {
	case s.stdin.fd < 0:
		return fail(wire.CodeState, "", "container has no stdin, or it was closed")
	case s.stdin.asked.c != nil:
		return fail(wire.CodeBusy, "", "another write is under way")
	}
	s.stdin.rest = append([]byte(nil), in.Data...)
	s.stdin.eof, s.stdin.asked = in.EOF, p
	s.feed()
	return nil
}

// feed writes what the container takes, and waits for it to take more.
func (s *shim) feed() {
	in := &s.stdin
	if in.asked.c == nil {
		return // given up meanwhile
	}
	for len(in.rest) > 0 {
		n, err := unix.Write(in.fd, in.rest)
		switch {
		case err == unix.EINTR:
		case err == unix.EAGAIN:
			s.waitStdin()
			return
		case err != nil:
			s.closeStdin()
			return
		default:
			in.rest = in.rest[n:]
		}
	}
	p, eof := in.asked, in.eof
	in.rest, in.asked, in.eof = nil, pending{}, false
	s.stopWaitStdin()
	if eof {
		s.stdinOnce()
	}
	p.ok()
}

func (s *shim) waitStdin() {
	fd := s.stdin.fd
	if s.l.Terminal {
		s.streams[0].rewatch()
		return
	}
	if s.loop.find(fd) == nil {
		s.loop.add(fd, unix.EPOLLOUT, func(uint32) { s.feed() })
		return
	}
	s.loop.set(fd, unix.EPOLLOUT)
}

func (s *shim) stopWaitStdin() {
	if s.l.Terminal {
		s.streams[0].rewatch()
		return
	}
	s.loop.set(s.stdin.fd, 0)
}

// stdinOnce ends the input for good after a client that had it has gone, if
// that is how the container was configured; first it gets what is under way.
func (s *shim) stdinOnce() {
	in := &s.stdin
	switch {
	case !s.l.StdinOnce || s.l.Terminal || in.fd < 0:
	case in.asked.c != nil:
		in.eof = true
	default:
		s.loop.close(in.fd)
		in.fd = -1
	}
}

// dropStdin gives up a write whose client does not wait for it any more.
func (s *shim) dropStdin() {
	in := &s.stdin
	eof := in.eof
	in.rest, in.asked, in.eof = nil, pending{}, false
	s.stopWaitStdin()
	if eof {
		s.stdinOnce()
	}
}

// closeStdin gives the input up, because nobody reads it any more.
func (s *shim) closeStdin() {
	in := &s.stdin
	if p := in.asked; p.c != nil {
		in.rest, in.asked = nil, pending{}
		s.stopWaitStdin()
		p.error(fail(wire.CodeState, "", "container closed its stdin"))
	}
	if !s.l.Terminal {
		s.loop.close(in.fd)
		in.fd = -1
	}
}

// now is the time that a chunk is stamped with: that of its reading.
func now() time.Time { return time.Now() }
