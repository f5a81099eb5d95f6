package shimd

import (
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/berthd/berth/shim/wire"
)

// Limits that keep one client from filling the shim's memory.
const (
	maxConns   = 64
	maxOut     = 1 << 20   // bytes not yet taken by a client, above which it is dropped
	pauseOut   = 128 << 10 // above which execs of it are not read
	maxUploads = 64        // process files under way
)

// A conn is one client.
type conn struct {
	s       *shim
	fd      int // -1 when it has ended
	hello   bool
	in      []byte // a frame that has not fully arrived
	out     []byte // what the client has not taken yet
	uploads []upload
	files   []int // descriptors that came, for frames that come
}

// upload is the process file of an exec, before the exec itself.
type upload struct {
	call uint32
	tag  byte // wire.TagData, wire.TagImage
	fd   int
	size int
}

// listen makes the socket, in the end of a directory's descriptor as a path may
// be longer than a socket address.
func (s *shim) listen(path string) *stepError {
	i := strings.LastIndexByte(path, '/')
	dir, name := path[:i+1], path[i+1:]
	if name == "" || len(name) > maxSocketEntry {
		return fail(wire.CodeInvalid, "Socket", "file name is "+strconv.Itoa(len(name))+" bytes, limit "+strconv.Itoa(maxSocketEntry))
	}
	fd, err := listenIn(dir, name)
	if err != nil {
		return failErr("socket", err)
	}
	s.listener = fd
	if err := s.loop.add(fd, unix.EPOLLIN, func(uint32) { s.accept() }); err != nil {
		return failErr("socket", err)
	}
	return nil
}

// listenIn listens on dir/name, for root only.
func listenIn(dir, name string) (int, error) {
	dirFD, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	defer unix.Close(dirFD)
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return -1, err
	}
	unix.Unlinkat(dirFD, name, 0)
	// The mask goes back to what it was at once: the container inherits it.
	old := unix.Umask(0o177)
	err = unix.Bind(fd, &unix.SockaddrUnix{Name: "/proc/self/fd/" + strconv.Itoa(dirFD) + "/" + name})
	unix.Umask(old)
	if err == nil {
		err = unix.Listen(fd, 16)
	}
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

func (s *shim) accept() {
	for {
		fd, _, err := unix.Accept4(s.listener, unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return
		}
		if len(s.conns) >= maxConns || s.accepted(fd) != nil {
			unix.Close(fd)
		}
	}
}

func (s *shim) accepted(fd int) error {
	c := &conn{s: s, fd: fd}
	if err := s.loop.add(fd, unix.EPOLLIN, c.ready); err != nil {
		return err
	}
	s.conns = append(s.conns, c)
	return nil
}

// close ends a client. Its execs end with it: nobody would get their result.
func (c *conn) close() {
	if c.fd < 0 {
		return
	}
	c.s.loop.close(c.fd)
	c.fd = -1
	c.in, c.out = nil, nil
	for i, other := range c.s.conns {
		if other == c {
			c.s.conns = append(c.s.conns[:i], c.s.conns[i+1:]...)
			break
		}
	}
	for _, u := range c.uploads {
		unix.Close(u.fd)
	}
	c.uploads = nil
	closeFDs(c.files)
	c.files = nil
	for _, x := range c.s.execs {
		if x.c == c {
			x.kill()
		}
	}
	for _, a := range c.s.attached {
		if a.p.c == c {
			a.end()
		}
	}
	if c.s.status == "" { // nobody is left who could say what to create
		c.s.loop.done = true
	}
}

func (c *conn) ready(events uint32) {
	if events&unix.EPOLLOUT != 0 {
		c.flush()
	}
	if events&(unix.EPOLLIN|unix.EPOLLHUP|unix.EPOLLERR) != 0 && c.fd >= 0 {
		c.read()
	}
}

func (c *conn) read() {
	p, err := c.receive()
	if err == unix.EAGAIN {
		return
	}
	if err != nil || len(p) == 0 {
		c.close()
		return
	}
	// The frames are worked on in a copy: handling one may use the buffer.
	c.in = append(c.in, p...)
	b := c.in
	for c.fd >= 0 {
		f, n, err := wire.ParseFrame(b)
		if err != nil || n > 0 && !c.frame(f) {
			c.close()
			return
		}
		if n == 0 {
			break
		}
		b = b[n:]
	}
	if c.fd < 0 {
		return
	}
	if c.in = c.in[:copy(c.in, b)]; len(b) == 0 && cap(c.in) > keepIn {
		c.in = nil
	}
}

// keepIn is how large a buffer of a client is kept while nothing is in it.
const keepIn = 8 << 10

// frame handles one message. It returns false when the connection must end.
func (c *conn) frame(f wire.Frame) bool {
	if f.Type == wire.TypeHello {
		return c.greet(f)
	}
	if !c.hello {
		return false
	}
	var bad *stepError
	s, p := c.s, pending{c, f.Call}
	if f.Type != wire.TypeExec && f.Type != wire.TypeExecData {
		s.collect(frameGarbage)
	}
	switch f.Type {
	case wire.TypeLaunch:
		bad = s.launch(p, f.Body)
	case wire.TypeStart:
		bad = s.start(p)
	case wire.TypeKill:
		bad = s.kill(p, f.Body)
	case wire.TypeExecData:
		return c.upload(f)
	case wire.TypeExec:
		bad = s.exec(p, f.Body)
	case wire.TypeCancel:
		s.cancel(p)
	case wire.TypeReopenLog:
		bad = s.reopenLog(p)
	case wire.TypeState:
		s.state(p)
	case wire.TypeStdin:
		bad = s.writeStdin(p, f.Body)
	case wire.TypeAttach:
		bad = s.attach(p, f.Body)
	case wire.TypeResize:
		bad = s.resize(p, f.Body)
	case wire.TypeShutdown:
		bad = s.shutDown(p)
	default:
		bad = fail(wire.CodeUnsupported, "", "request of type "+strconv.Itoa(int(f.Type)))
	}
	if bad != nil {
		p.error(bad)
	}
	return true
}

func (c *conn) greet(f wire.Frame) bool {
	var h wire.Hello
	if h.Decode(f.Body) != nil {
		return false
	}
	answer := wire.Hello{Version: wire.Version, Min: wire.MinVersion, ShimPID: c.s.pid, ID: c.s.l.ID}
	c.s.b.Buf = c.s.b.Buf[:0]
	answer.Append(&c.s.b, f.Call)
	c.send(c.s.b.Buf)
	if h.Version < wire.MinVersion || h.Min > wire.Version {
		return false
	}
	c.hello = true
	if c.s.told {
		pending{c, 0}.answer(c.s.exit)
	}
	return true
}

// message is a value that can be sent.
type message interface {
	Append(b *wire.Builder, call uint32) error
}

func (p pending) answer(m message) {
	b := &p.c.s.b
	b.Buf = b.Buf[:0]
	if m.Append(b, p.call) == nil {
		p.c.send(b.Buf)
	}
}

func (p pending) ok() {
	b := &p.c.s.b
	b.Buf = b.Buf[:0]
	b.Begin(wire.TypeOK, p.call)
	b.End()
	p.c.send(b.Buf)
}

// started says that what the call began is under way; its answer comes later.
func (p pending) started() {
	b := &p.c.s.b
	b.Buf = b.Buf[:0]
	b.Begin(wire.TypeStarted, p.call)
	b.End()
	p.c.send(b.Buf)
}

func (p pending) error(e *stepError) { p.answer(*e) }

// send writes b, or keeps what the socket does not take at once.
func (c *conn) send(b []byte) {
	if c.fd < 0 {
		return
	}
	if len(c.out) == 0 {
		n := c.write(b)
		if n < 0 {
			return
		}
		b = b[n:]
	}
	if len(b) == 0 {
		return
	}
	if len(c.out)+len(b) > maxOut {
		c.close()
		return
	}
	c.out = append(c.out, b...)
	c.s.loop.set(c.fd, unix.EPOLLIN|unix.EPOLLOUT)
}

// write returns how many bytes the socket took, -1 when the client has gone.
func (c *conn) write(b []byte) int {
	for {
		n, err := unix.Write(c.fd, b) // SIGPIPE is harmless
		switch err {
		case nil:
			return n
		case unix.EINTR:
		case unix.EAGAIN:
			return 0
		default:
			c.close()
			return -1
		}
	}
}

func (c *conn) flush() {
	n := c.write(c.out)
	if n < 0 {
		return
	}
	if c.out = c.out[n:]; len(c.out) == 0 {
		c.out = nil
		c.s.loop.set(c.fd, unix.EPOLLIN)
		for _, x := range c.s.execs {
			if x.c == c {
				x.resume()
			}
		}
	}
}

// upload collects the process file of an exec in memory that is not the heap.
func (c *conn) upload(f wire.Frame) bool {
	tag, data, err := f.Body.Next()
	if err != nil || tag != wire.TagData && tag != wire.TagImage {
		return false
	}
	u := c.uploadOf(f.Call, tag)
	if u == nil {
		fd, err := unix.MemfdCreate("process", unix.MFD_CLOEXEC)
		if err != nil || len(c.uploads) >= maxUploads {
			unix.Close(fd)
			return false
		}
		c.uploads = append(c.uploads, upload{call: f.Call, tag: tag, fd: fd})
		u = &c.uploads[len(c.uploads)-1]
	}
	u.size += len(data)
	return u.size <= maxProcess && writeAll(u.fd, data) == nil
}

func (c *conn) uploadOf(call uint32, tag byte) *upload {
	for i := range c.uploads {
		if c.uploads[i].call == call && c.uploads[i].tag == tag {
			return &c.uploads[i]
		}
	}
	return nil
}

// takeUpload hands a file of a call over, -1 if there is none.
func (c *conn) takeUpload(call uint32, tag byte) int {
	for i, u := range c.uploads {
		if u.call == call && u.tag == tag {
			c.uploads = append(c.uploads[:i], c.uploads[i+1:]...)
			return u.fd
		}
	}
	return -1
}
