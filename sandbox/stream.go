package sandbox

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/berthd/berth/shim"
)

// Streams are the far ends of a session with a process: what a client sends
// and gets. Nil is what it does not want. The session closes Out and Err when
// it has written all; whoever made In ends it after the session.
type Streams struct {
	In       io.Reader
	Out, Err io.WriteCloser
	// TTY gives the process a terminal; Err is nil then. Resize brings its
	// sizes, and may be nil.
	TTY    bool
	Resize <-chan TermSize
}

// TermSize is the size of a terminal in characters.
type TermSize struct{ Width, Height uint16 }

const (
	// streamDrain is how long output is waited for after a command has ended
	// whose children still hold it open. What the command itself wrote is
	// passed on in any case.
	streamDrain = 200 * time.Millisecond
	// hangupGrace is how long a command may go on after its client has gone
	// and its streams are closed, before it is killed.
	hangupGrace = 2 * time.Second
	// firstSize is how long a command with a terminal waits for its size.
	firstSize = 20 * time.Millisecond
)

// ErrSlow: the client of an Attach was cut off as it read too slowly.
var ErrSlow = errors.New("client reads too slowly")

// CheckExec tells whether Exec would be possible now.
func (s *Service) CheckExec(id string) error {
	_, err := s.running(id)
	return err
}

// Exec runs a command in a running container with the client's streams, which
// are the command's own pipes or pty: no other process copies in between, and a
// client that does not read stops this command and nothing else. It returns the
// exit code, 0 to 255, when the command has ended and its output is written.
//
// When ctx ends, which is to say that the client has gone, the command's streams
// are closed (a terminal hangs up), and if that does not end it, it is killed
// with its descendants. The same happens at once when this daemon ends.
func (s *Service) Exec(ctx context.Context, id string, cmd []string, st Streams) (int, error) {
	c, err := s.running(id)
	if err != nil {
		return 0, err
	}
	if len(cmd) == 0 {
		return 0, fmt.Errorf("%w: cmd: must not be empty", ErrInvalid)
	}
	client, err := s.client(ctx, c.ID)
	if err != nil {
		return 0, fmt.Errorf("container %s: exec: %w", c.ID, err)
	}
	var code int
	if st.TTY {
		code, err = s.execTerminal(ctx, client, c, cmd, st)
	} else {
		code, err = s.execPipes(ctx, client, c, cmd, st)
	}
	if err != nil {
		return 0, fmt.Errorf("container %s: %w", c.ID, err)
	}
	return code, nil
}

func (s *Service) execPipes(ctx context.Context, client *shim.Client, c *container, cmd []string, st Streams) (int, error) {
	what, err := s.command(c, cmd, nil)
	if err != nil {
		return 0, err
	}
	p, err := openStdio(st, s.userNSOfPod(c.PodID))
	if err != nil {
		return 0, err
	}
	defer p.close()
	run := begin(ctx, func(ctx context.Context, started func()) (int, error) {
		return client.ExecStream(ctx, shim.StreamRequest{Process: what.process, Image: what.image, Stdio: p.theirs}, started)
	})
	// Before the process runs, what comes is the runtime's and no output: if
	// it fails, that is in the error.
	select {
	case <-run.started:
	case <-run.ended:
		if run.err != nil {
			return 0, run.err
		}
	case <-ctx.Done():
		p.close()
		return run.hangUp(ctx)
	}
	if p.in != nil {
		go feed(p.in, st.In, true)
	}
	return run.follow(ctx, p)
}

// execution is a streaming exec under way.
type execution struct {
	started, ended chan struct{}
	code           int
	err            error
	kill           context.CancelFunc
}

// begin runs exec beyond the end of ctx.
func begin(ctx context.Context, exec func(ctx context.Context, started func()) (int, error)) *execution {
	ctx, kill := context.WithCancel(context.WithoutCancel(ctx))
	e := &execution{started: make(chan struct{}), ended: make(chan struct{}), kill: kill}
	go func() {
		defer kill()
		e.code, e.err = exec(ctx, func() { close(e.started) })
		close(e.ended)
	}()
	return e
}

// follow copies output until the command has ended and all is written.
func (e *execution) follow(ctx context.Context, p *stdio) (int, error) {
	var copies sync.WaitGroup
	for _, o := range p.outs {
		copies.Go(o.copy)
	}
	select {
	case <-e.ended:
	case <-ctx.Done():
		p.close()
		return e.hangUp(ctx)
	}
	for _, o := range p.outs {
		o.finish(streamDrain)
	}
	copies.Wait() // no longer than the client is there
	return e.code, e.err
}

// hangUp is for a command whose client has gone and whose streams are closed.
func (e *execution) hangUp(ctx context.Context) (int, error) {
	t := time.NewTimer(hangupGrace)
	defer t.Stop()
	select {
	case <-e.ended:
	case <-t.C:
		e.kill()
		<-e.ended
	}
	return 0, fmt.Errorf("exec: client gone: %w", ctx.Err())
}

// feed copies what a client sends, and ends it when the client does. Input that
// the process does not take any more is dropped, as behind it on the connection
// may come what matters.
func feed(dst io.WriteCloser, src io.Reader, end bool) {
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)
	_, err := io.CopyBuffer(writerOnly{dst}, readerOnly{src}, *buf)
	if end {
		dst.Close()
	}
	if err != nil {
		io.CopyBuffer(writerOnly{io.Discard}, readerOnly{src}, *buf)
	}
}

// readerOnly and writerOnly hide other methods, which would bring buffers of
// their own.
type (
	readerOnly struct{ io.Reader }
	writerOnly struct{ io.Writer }
)

// buffers are as large as a pipe.
var buffers = sync.Pool{New: func() any { b := make([]byte, 64<<10); return &b }}
