package shim

import (
	"context"
	"fmt"
	"time"

	"github.com/berthd/berth/shim/wire"
)

// ExecRequest is one process to run in a container.
type ExecRequest struct {
	// Process is the process object of the OCI runtime-spec as JSON, at
	// most 8 MiB. Its terminal must be false.
	Process []byte
	// Image says the same for a shim that can start it by itself; nil leaves
	// it to the OCI runtime, as a shim of an older version does in any case.
	Image *ExecImage
	// Timeout, counted from the shim's receipt, after which the process and
	// all of its descendants are killed; 0 is none.
	Timeout time.Duration
	// MaxOutput bounds stdout and stderr, each, in bytes. What is beyond it
	// is read and dropped, and the result says so.
	MaxOutput int64
	// Drain bounds how long output is awaited after the process ended, as a
	// background child may hold the pipe; 0 is 2 s, at most 1 min.
	Drain time.Duration
}

// ExecResult is how an exec ended. TimedOut excludes a meaningful ExitCode.
type ExecResult struct {
	ExitCode                         int // 0 … 255; 128+n when signal n ended it
	Stdout, Stderr                   []byte
	StdoutTruncated, StderrTruncated bool
	TimedOut                         bool
	// Native says that the shim started the process without the OCI runtime.
	Native bool
}

// cancelTimeout bounds the sending of a cancel for a caller that has gone.
const cancelTimeout = 2 * time.Second

// Exec runs a process in the container and returns when it ended. An error is
// ErrRuntime when the runtime could not start it (no such executable, …), and
// ErrState when the container is not running. When ctx ends first, the process
// and its descendants are killed.
func (c *Client) Exec(ctx context.Context, r ExecRequest) (ExecResult, error) {
	if len(r.Process) == 0 || len(r.Process) > maxExecProcess {
		return ExecResult{}, fmt.Errorf("shim exec: process of %d bytes, limit %d: %w", len(r.Process), maxExecProcess, ErrInvalid)
	}
	var res ExecResult
	part := func(f wire.Frame) error {
		var o wire.ExecOutput
		if err := o.Decode(f.Body); err != nil {
			return err
		}
		if o.Stream == 1 {
			res.Stdout, res.StdoutTruncated = appendBounded(res.Stdout, o.Data, r.MaxOutput, res.StdoutTruncated)
		} else {
			res.Stderr, res.StderrTruncated = appendBounded(res.Stderr, o.Data, r.MaxOutput, res.StderrTruncated)
		}
		return nil
	}
	var id uint32
	body, err := c.ask(ctx, "exec", wire.TypeExecResult, part, func(b *wire.Builder, n uint32) error {
		id = n
		return c.appendExec(b, n, r)
	})
	if err != nil {
		c.cancelIfEnded(ctx, err, id)
		// The reader may still be appending to res: it is not handed out.
		return ExecResult{}, err
	}
	var w wire.ExecResult
	if err := w.Decode(body); err != nil {
		return ExecResult{}, fmt.Errorf("shim exec: %w", err)
	}
	res.ExitCode, res.TimedOut, res.Native = w.ExitCode, w.TimedOut, w.Native
	res.StdoutTruncated = res.StdoutTruncated || w.StdoutTruncated
	res.StderrTruncated = res.StderrTruncated || w.StderrTruncated
	return res, nil
}

func (c *Client) appendExec(b *wire.Builder, id uint32, r ExecRequest) error {
	if err := c.appendProcess(b, id, r.Process, r.Image); err != nil {
		return err
	}
	return wire.Exec{Timeout: r.Timeout, Drain: r.Drain, MaxOutput: r.MaxOutput}.Append(b, id)
}

// appendProcess appends the process file of an exec and what else is said of it.
func (c *Client) appendProcess(b *wire.Builder, id uint32, p []byte, m *ExecImage) error {
	if m != nil && c.hello.Version >= versionImage {
		// One that cannot be made is left to the runtime, which says why.
		if image, err := m.Append(nil); err == nil {
			if err := appendData(b, id, wire.TagImage, image); err != nil {
				return err
			}
		}
	}
	return appendData(b, id, wire.TagData, p)
}

// versionImage is the protocol that has images.
const versionImage = 2

// appendData appends a file of an exec, in pieces.
func appendData(b *wire.Builder, id uint32, tag byte, p []byte) error {
	for len(p) > 0 {
		n := min(len(p), wire.MaxChunk)
		b.Begin(wire.TypeExecData, id)
		b.Bytes(tag, p[:n])
		if err := b.End(); err != nil {
			return err
		}
		p = p[n:]
	}
	return nil
}

// appendBounded holds the limit against the shim, too.
func appendBounded(dst, p []byte, limit int64, cut bool) ([]byte, bool) {
	if room := max(limit-int64(len(dst)), 0); int64(len(p)) > room {
		p, cut = p[:room], true
	}
	return append(dst, p...), cut
}

func (c *Client) cancel(ctx context.Context, id uint32) {
	ctx, stop := context.WithTimeout(ctx, cancelTimeout)
	defer stop()
	var b wire.Builder
	b.Begin(wire.TypeCancel, id)
	if b.End() == nil {
		c.send(ctx, b.Buf) // an error is the connection's end, which kills the exec too
	}
}
