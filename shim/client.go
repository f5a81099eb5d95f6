package shim

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berthd/berth/shim/wire"
)

// maxExecProcess bounds the OCI process description of an exec, in bytes. It
// holds the arguments and the environment, to which execve sets limits of this
// order.
const maxExecProcess = 8 << 20

// writeTimeout bounds how long one frame may take to be written. A shim reads
// promptly or is broken.
const writeTimeout = 20 * time.Second

// A Client is a connection to one shim. Its methods may be called concurrently.
// They return an error that is ErrGone once the connection is lost, and the
// context's error, wrapped, when that ends first; the shim may then still do
// what was asked.
type Client struct {
	conn   *net.UnixConn
	hello  wire.Hello
	exited chan Exit
	gone   chan struct{}

	wmu sync.Mutex // one frame is written at a time

	mu    sync.Mutex
	calls map[uint32]*call
	last  uint32
	err   error // why the connection ended; set before gone is closed
}

// A call waits for its answer. Frames that come before the last one go to
// part, on the reader's goroutine.
type call struct {
	part func(wire.Frame) error
	done chan answer // buffered: the reader never waits
}

type answer struct {
	typ  uint16
	body wire.Fields
}

// Connect opens a connection to the shim that listens on socket. The error is
// ErrGone if there is none, ErrUnsupported if it speaks no common version.
func Connect(ctx context.Context, socket string) (*Client, error) {
	r, err := Reach(socket)
	if err != nil {
		return nil, err
	}
	return r.Client(ctx)
}

// Reached is a connection to a shim that has not said anything yet. That there is
// one tells that the shim's process lives, and costs neither side more than a
// system call: the kernel accepts in the shim's name. Client or Close has to follow.
type Reached struct {
	socket string
	fd     int
}

// Reach connects to the shim that listens on socket, at once or not at all. The
// error is ErrGone if there is none; any other one leaves open whether there is.
func Reach(socket string) (*Reached, error) {
	fd, err := reach(socket)
	switch {
	case err == nil:
		return &Reached{socket: socket, fd: fd}, nil
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ECONNREFUSED):
		err = ErrGone
	}
	return nil, fmt.Errorf("shim socket %s: %w", socket, err)
}

func reach(socket string) (int, error) {
	path, done, err := dialPath(socket)
	if err != nil {
		return -1, err
	}
	defer done()
	// The net package would take part in each step, for a thousand shims at a start.
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return -1, err
	}
	if err := unix.Connect(fd, &unix.SockaddrUnix{Name: path}); err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// Close drops the connection.
func (r *Reached) Close() error { return unix.Close(r.fd) }

// Client makes a Client of the connection, with the errors of Connect. The
// connection is not r's any more, also after an error.
func (r *Reached) Client(ctx context.Context) (*Client, error) {
	f := os.NewFile(uintptr(r.fd), r.socket)
	conn, err := net.FileConn(f)
	f.Close()
	if err != nil {
		return nil, fmt.Errorf("shim socket %s: %w", r.socket, err)
	}
	c, err := newClient(ctx, conn.(*net.UnixConn))
	if err != nil {
		return nil, fmt.Errorf("shim socket %s: %w", r.socket, err)
	}
	return c, nil
}

// dialPath returns a path of the socket that fits into a socket address, which
// is 108 bytes, by way of a descriptor of its directory where it must.
func dialPath(socket string) (path string, done func(), err error) {
	if len(socket) < 108 {
		return socket, func() {}, nil
	}
	fd, err := unix.Open(filepath.Dir(socket), unix.O_PATH|unix.O_CLOEXEC|unix.O_DIRECTORY, 0)
	if err != nil {
		return "", nil, err
	}
	path = "/proc/self/fd/" + strconv.Itoa(fd) + "/" + filepath.Base(socket)
	return path, func() { unix.Close(fd) }, nil
}

// newClient shakes hands on conn, which it owns from here on.
func newClient(ctx context.Context, conn *net.UnixConn) (*Client, error) {
	c := &Client{
		conn:   conn,
		exited: make(chan Exit, 1),
		gone:   make(chan struct{}),
		calls:  map[uint32]*call{},
	}
	go c.read()
	a, err := c.do(ctx, nil, func(b *wire.Builder, id uint32) error {
		return wire.Hello{Version: wire.Version, Min: wire.MinVersion}.Append(b, id)
	})
	if err == nil && a.typ != wire.TypeHello {
		err = wire.ErrFrame
	}
	if err == nil {
		err = c.hello.Decode(a.body)
	}
	if err == nil && (c.hello.Version < wire.MinVersion || c.hello.Min > wire.Version) {
		err = fmt.Errorf("protocol %d to %d, this side %d to %d: %w",
			c.hello.Min, c.hello.Version, wire.MinVersion, wire.Version, ErrUnsupported)
	}
	if err != nil {
		c.Close()
		return nil, fmt.Errorf("handshake: %w", err)
	}
	return c, nil
}

// read runs until the connection ends and is its only reader.
func (c *Client) read() {
	r := bufio.NewReaderSize(c.conn, 1<<10)
	var err error
	for err == nil {
		err = c.readFrame(r)
	}
	if errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed) || errors.Is(err, unix.ECONNRESET) {
		err = ErrGone
	} else {
		err = fmt.Errorf("%w: %w", ErrGone, err)
	}
	c.conn.Close()
	c.mu.Lock()
	c.err = err
	c.mu.Unlock()
	close(c.gone)
}

func (c *Client) readFrame(r *bufio.Reader) error {
	head, err := r.Peek(4)
	if err != nil {
		return err
	}
	size, err := wire.FrameSize(head)
	if err != nil {
		return err
	}
	buf := make([]byte, size)
	if _, err := io.ReadFull(r, buf); err != nil {
		return err
	}
	f, _, err := wire.ParseFrame(buf)
	if err != nil {
		return err
	}
	return c.dispatch(f)
}

func (c *Client) dispatch(f wire.Frame) error {
	if f.Type == wire.TypeExit {
		var e Exit
		if err := e.Decode(f.Body); err != nil {
			return err
		}
		select {
		case c.exited <- e:
		default: // there is one exit; a second telling is dropped
		}
		return nil
	}
	c.mu.Lock()
	k := c.calls[f.Call]
	last := f.Type != wire.TypeExecOutput && f.Type != wire.TypeStarted
	if k != nil && last {
		delete(c.calls, f.Call)
	}
	c.mu.Unlock()
	switch {
	case k == nil: // nobody waits any more
		return nil
	case !last:
		if k.part == nil {
			return wire.ErrFrame
		}
		return k.part(f)
	}
	k.done <- answer{f.Type, f.Body}
	return nil
}

// begin registers a call.
func (c *Client) begin(part func(wire.Frame) error) (uint32, *call) {
	k := &call{part: part, done: make(chan answer, 1)}
	c.mu.Lock()
	defer c.mu.Unlock()
	for {
		c.last++
		if _, taken := c.calls[c.last]; !taken && c.last != 0 {
			c.calls[c.last] = k
			return c.last, k
		}
	}
}

func (c *Client) forget(id uint32) {
	c.mu.Lock()
	delete(c.calls, id)
	c.mu.Unlock()
}

func (c *Client) reason() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// send writes frames, with the descriptors that they are about. A write that
// does not finish in time leaves half a frame behind, so it costs the
// connection.
func (c *Client) send(ctx context.Context, b []byte, files ...*os.File) error {
	c.wmu.Lock()
	defer c.wmu.Unlock()
	if err := ctx.Err(); err != nil {
		return err
	}
	// Not ctx's deadline: half a frame costs all callers the connection.
	c.conn.SetWriteDeadline(time.Now().Add(writeTimeout))
	if err := c.write(b, files); err != nil {
		c.conn.Close()
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return fmt.Errorf("%w: %w", ErrGone, err)
		}
		return ErrGone
	}
	return nil
}

// write sends the descriptors with the first byte.
func (c *Client) write(b []byte, files []*os.File) error {
	if len(files) > 0 {
		fds := make([]int, len(files))
		for i, f := range files {
			fds[i] = int(f.Fd())
		}
		n, _, err := c.conn.WriteMsgUnix(b, unix.UnixRights(fds...), nil)
		if err != nil {
			return err
		}
		b = b[n:]
	}
	_, err := c.conn.Write(b)
	return err
}

// do makes one call and waits for its answer. The files are closed once they
// are sent, as the shim is to have the only ones.
func (c *Client) do(ctx context.Context, part func(wire.Frame) error, build func(*wire.Builder, uint32) error, files ...*os.File) (answer, error) {
	id, k := c.begin(part)
	var b wire.Builder
	err := build(&b, id)
	if err == nil {
		err = c.send(ctx, b.Buf, files...)
	}
	for _, f := range files {
		f.Close()
	}
	if err != nil {
		c.forget(id)
		return answer{}, err
	}
	select {
	case a := <-k.done:
		return a, nil
	case <-ctx.Done():
		c.forget(id)
		return answer{}, ctx.Err()
	case <-c.gone:
		c.forget(id)
		select { // the answer may have come just before the end
		case a := <-k.done:
			return a, nil
		default:
			return answer{}, c.reason()
		}
	}
}

// ask makes a call that is answered with want, or with an Error, which becomes
// an error.
func (c *Client) ask(ctx context.Context, name string, want uint16, part func(wire.Frame) error, build func(*wire.Builder, uint32) error, files ...*os.File) (wire.Fields, error) {
	a, err := c.do(ctx, part, build, files...)
	if err != nil {
		return nil, fmt.Errorf("shim %s: %w", name, err)
	}
	switch a.typ {
	case want:
		return a.body, nil
	case wire.TypeError:
		e := &answerError{call: name}
		if err := e.wire.Decode(a.body); err != nil {
			return nil, fmt.Errorf("shim %s: %w", name, err)
		}
		return nil, e
	}
	return nil, fmt.Errorf("shim %s: answer of type %d: %w", name, a.typ, wire.ErrFrame)
}

func empty(typ uint16) func(*wire.Builder, uint32) error {
	return func(b *wire.Builder, id uint32) error {
		b.Begin(typ, id)
		return b.End()
	}
}

// ID returns the container's ID as the shim gave it.
func (c *Client) ID() string { return c.hello.ID }

// Exited delivers one value when the container has exited and the exit record
// is written, also if that was before the connection. It is never closed; watch
// Gone as well.
func (c *Client) Exited() <-chan Exit { return c.exited }

// Gone is closed when the connection has ended: the shim has ended, in order or
// not, or Close was called. A value for Exited that came before is there by then.
func (c *Client) Gone() <-chan struct{} { return c.gone }

// Close ends the connection and waits for the client's goroutine. The shim and
// the container go on; execs of this connection are killed.
func (c *Client) Close() error {
	c.conn.Close()
	<-c.gone
	return nil
}

// Start starts the created container. The error is ErrState when it was started
// before, ErrRuntime with the runtime's message when it cannot be started.
func (c *Client) Start(ctx context.Context) error {
	_, err := c.ask(ctx, "start", wire.TypeOK, nil, empty(wire.TypeStart))
	return err
}

// Kill sends signal sig, 1 to 64, to the container's init or, with all, to
// every process of the container. The error is ErrState when it has exited.
func (c *Client) Kill(ctx context.Context, sig int, all bool) error {
	_, err := c.ask(ctx, "kill", wire.TypeOK, nil, func(b *wire.Builder, id uint32) error {
		return wire.Kill{Signal: sig, All: all}.Append(b, id)
	})
	return err
}

// ReopenLog closes the log file and opens its path anew, which makes a file
// when the old one was moved away. No output is lost or stopped. On an error
// the old file stays in use.
func (c *Client) ReopenLog(ctx context.Context) error {
	_, err := c.ask(ctx, "reopen log", wire.TypeOK, nil, empty(wire.TypeReopenLog))
	return err
}

// State asks what the container is doing.
func (c *Client) State(ctx context.Context) (State, error) {
	body, err := c.ask(ctx, "state", wire.TypeStateIs, nil, empty(wire.TypeState))
	if err != nil {
		return State{}, err
	}
	var s State
	if err := s.Decode(body); err != nil {
		return State{}, fmt.Errorf("shim state: %w", err)
	}
	return s, nil
}

// Shutdown kills the container in whatever state it is, also while it is being
// created, and returns when the exit record is written, the runtime's state is
// deleted and the shim has ended.
func (c *Client) Shutdown(ctx context.Context) error {
	_, err := c.ask(ctx, "shutdown", wire.TypeOK, nil, empty(wire.TypeShutdown))
	if err != nil && !errors.Is(err, ErrGone) {
		return err
	}
	select {
	case <-c.gone:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("shim shutdown: %w", ctx.Err())
	}
}
