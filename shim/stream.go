package shim

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/berthd/berth/shim/wire"
)

// StreamRequest is a process to run in a container with streams of the caller's.
type StreamRequest struct {
	// Process is as in ExecRequest. Its terminal is true when Console is set.
	Process []byte
	// Image is as in ExecRequest, and not used with Console.
	Image *ExecImage
	// Stdio are its stdin, stdout and stderr, all set unless Console is. They
	// are the process's own from then on: the shim neither reads nor writes
	// them. ExecStream closes them.
	Stdio [3]*os.File
	// Console is the path of a unix socket on which the caller listens, to
	// which the OCI runtime sends the descriptor of the process's pty.
	Console string
}

// ExecStream runs a process in the container and returns its exit code, 0 to
// 255, when it has ended, whoever holds its output open still. started is
// called, if not nil, when the process runs; it must not block. Errors are
// those of Exec. When ctx ends first or the connection is lost, the process and
// its descendants are killed.
func (c *Client) ExecStream(ctx context.Context, r StreamRequest, started func()) (int, error) {
	var files []*os.File
	if r.Console == "" {
		files = r.Stdio[:]
	}
	if len(r.Process) == 0 || len(r.Process) > maxExecProcess {
		closeFiles(files)
		return 0, fmt.Errorf("shim exec: process of %d bytes, limit %d: %w", len(r.Process), maxExecProcess, ErrInvalid)
	}
	var id uint32
	body, err := c.ask(ctx, "exec", wire.TypeExecResult, whenStarted(started), func(b *wire.Builder, n uint32) error {
		id = n
		if err := c.appendProcess(b, n, r.Process, r.Image); err != nil {
			return err
		}
		return wire.Exec{Stream: true, Console: r.Console}.Append(b, n)
	}, files...)
	if err != nil {
		c.cancelIfEnded(ctx, err, id)
		return 0, err
	}
	var w wire.ExecResult
	if err := w.Decode(body); err != nil {
		return 0, fmt.Errorf("shim exec: %w", err)
	}
	return w.ExitCode, nil
}

// AttachRequest is what a caller wants of a running container's streams.
type AttachRequest struct {
	// Stdin says that the caller is going to use WriteStdin. At the end of
	// the attachment the input is ended, if Launch said StdinOnce.
	Stdin bool
	// Stdout and Stderr are the write ends of pipes, nil for what is not
	// wanted. Attach closes them.
	Stdout, Stderr *os.File
}

// Attach has the shim copy the container's output, from now on, into pipes. It
// returns when the output has ended, with the container as a rule, or when the
// reader closed the pipes; without output, when the container has ended.
// attached is called, if not nil, when it has begun; it must not block.
//
// The reader has to keep up: a pipe that stays full for 200 ms ends the
// attachment with ErrSlow, as the container must not be held up for long.
// ErrState: the container does not run or has no such stream.
func (c *Client) Attach(ctx context.Context, r AttachRequest, attached func()) error {
	var files []*os.File
	for _, f := range []*os.File{r.Stdout, r.Stderr} {
		if f != nil {
			files = append(files, f)
		}
	}
	var id uint32
	_, err := c.ask(ctx, "attach", wire.TypeOK, whenStarted(attached), func(b *wire.Builder, n uint32) error {
		id = n
		return wire.Attach{Stdin: r.Stdin, Stdout: r.Stdout != nil, Stderr: r.Stderr != nil}.Append(b, n)
	}, files...)
	c.cancelIfEnded(ctx, err, id)
	return err
}

// Resize sets the size of the container's terminal in characters. ErrState when
// it has none.
func (c *Client) Resize(ctx context.Context, width, height uint16) error {
	_, err := c.ask(ctx, "resize", wire.TypeOK, nil, func(b *wire.Builder, id uint32) error {
		return wire.Resize{Width: width, Height: height}.Append(b, id)
	})
	return err
}

// WriteStdin writes p to the container's stdin and returns when the pipe or pty
// took all of it. With eof it then ends the input, if Launch said StdinOnce. One
// write runs at a time: a second one gets ErrBusy. ErrState when the container
// has no stdin. When ctx ends, what was not taken yet is dropped.
func (c *Client) WriteStdin(ctx context.Context, p []byte, eof bool) error {
	for {
		n := min(len(p), wire.MaxChunk)
		last := n == len(p)
		var call uint32
		_, err := c.ask(ctx, "stdin", wire.TypeOK, nil, func(b *wire.Builder, id uint32) error {
			call = id
			return wire.Stdin{Data: p[:n], EOF: eof && last}.Append(b, id)
		})
		c.cancelIfEnded(ctx, err, call)
		if err != nil || last {
			return err
		}
		p = p[n:]
	}
}

// whenStarted handles the frames that come before the answer.
func whenStarted(started func()) func(wire.Frame) error {
	return func(f wire.Frame) error {
		if f.Type != wire.TypeStarted {
			return wire.ErrFrame
		}
		if started != nil {
			started()
		}
		return nil
	}
}

// cancelIfEnded has the shim end a call whose context has ended.
func (c *Client) cancelIfEnded(ctx context.Context, err error, id uint32) {
	if err != nil && id != 0 && ctx.Err() != nil && errors.Is(err, ctx.Err()) {
		c.cancel(context.WithoutCancel(ctx), id)
	}
}

func closeFiles(files []*os.File) {
	for _, f := range files {
		if f != nil {
			f.Close()
		}
	}
}
