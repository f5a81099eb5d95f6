package cri

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"

	"github.com/berthd/berth/sandbox"
)

// process is what a session of Exec or Attach talks to, in the form in which
// the streaming library calls it.
type process struct {
	streams Streams
	x       *session
	req     any // *runtime.ExecRequest or *runtime.AttachRequest
}

// ExecInContainer is called for Exec.
func (p *process) ExecInContainer(ctx context.Context, _, _, _ string, _ []string, in io.Reader, out, err io.WriteCloser, _ bool, resize <-chan remotecommand.TerminalSize, _ time.Duration) error {
	return p.run(ctx, in, out, err, resize)
}

// AttachContainer is called for Attach.
func (p *process) AttachContainer(ctx context.Context, _, _, _ string, in io.Reader, out, err io.WriteCloser, _ bool, resize <-chan remotecommand.TerminalSize) error {
	return p.run(ctx, in, out, err, resize)
}

// run is the session itself. What was not asked for is left out: WebSockets
// have channels for it nevertheless.
func (p *process) run(ctx context.Context, in io.Reader, out, errs io.WriteCloser, resize <-chan remotecommand.TerminalSize) error {
	o := p.options()
	st := sandbox.Streams{TTY: o.TTY, Resize: sizes(ctx, resize)}
	if o.Stdin {
		st.In = in
	}
	if o.Stdout {
		st.Out = out
	}
	if o.Stderr {
		st.Err = errs
	}
	switch req := p.req.(type) {
	case *runtime.ExecRequest:
		code, err := p.streams.Exec(ctx, req.GetContainerId(), req.GetCmd(), st)
		if err == nil && code != 0 {
			err = exitError(code)
		}
		return err
	case *runtime.AttachRequest:
		err := p.streams.Attach(ctx, req.GetContainerId(), st)
		if errors.Is(err, sandbox.ErrSlow) {
			// It gets the reason, if it reads that.
			time.AfterFunc(cutTimeout, p.x.close)
		}
		return err
	}
	return fmt.Errorf("session of a %T", p.req)
}

func (p *process) options() *remotecommand.Options {
	switch req := p.req.(type) {
	case *runtime.ExecRequest:
		return options(req)
	case *runtime.AttachRequest:
		return options(req)
	}
	return &remotecommand.Options{}
}

func options(r interface {
	GetStdin() bool
	GetStdout() bool
	GetStderr() bool
	GetTty() bool
}) *remotecommand.Options {
	return &remotecommand.Options{Stdin: r.GetStdin(), Stdout: r.GetStdout(), Stderr: r.GetStderr(), TTY: r.GetTty()}
}

// sizes translates the sizes of a terminal until the session ends.
func sizes(ctx context.Context, in <-chan remotecommand.TerminalSize) <-chan sandbox.TermSize {
	if in == nil {
		return nil
	}
	out := make(chan sandbox.TermSize)
	go func() {
		defer close(out)
		for {
			select {
			case z, ok := <-in:
				if !ok {
					return
				}
				select {
				case out <- sandbox.TermSize{Width: z.Width, Height: z.Height}:
				case <-ctx.Done():
					return
				}
			case <-ctx.Done():
				return
			}
		}
	}()
	return out
}

// exitError is the end of a command with another code than 0, in the form of
// k8s.io/utils/exec.ExitError.
type exitError int

func (e exitError) Error() string   { return fmt.Sprintf("exit status %d", int(e)) }
func (e exitError) String() string  { return e.Error() }
func (e exitError) Exited() bool    { return true }
func (e exitError) ExitStatus() int { return int(e) }

// forwarder connects the streams of one PortForward. The library calls it
// without the session's context.
type forwarder struct {
	streams Streams
	ctx     context.Context
}

// PortForward is called for each connection.
func (f *forwarder) PortForward(_ context.Context, pod, _ string, port int32, stream io.ReadWriteCloser) error {
	return f.streams.PortForward(f.ctx, pod, port, stream)
}
