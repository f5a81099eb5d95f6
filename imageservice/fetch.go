package imageservice

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"
)

const (
	// minRate is the least that a registry must send, in bytes per second over
	// StallTimeout. Slower than that is a stall, not a slow network.
	minRate = 1 << 10
	// maxAttempts is how often in a row a connection may break without goodProgress.
	maxAttempts  = 5
	goodProgress = 1 << 20
)

var errSilent = errors.New("connection silent")

// blobReader reads one blob over as many connections as it takes. What was read already
// is skipped on a new connection: the stages behind it go on where they were, and
// their digests tell if the registry sends something else the second time.
//
// It measures the time spent waiting for the registry, which excludes the time in which
// nobody reads because the disk is slow.
type blobReader struct {
	ctx    context.Context
	cancel context.CancelCauseFunc
	open   func(context.Context) (io.ReadCloser, error)
	size   int64 // as the manifest states
	stall  time.Duration

	body     io.ReadCloser // nil between connections
	conn     context.Context
	connEnd  context.CancelCauseFunc
	off      int64 // of the blob
	failures int
	failedAt int64 // off at the last failure
	broken   error

	// Since the last time that enough had come.
	waited time.Duration
	got    int64
}

func newBlobReader(ctx context.Context, size int64, stall time.Duration, open func(context.Context) (io.ReadCloser, error)) *blobReader {
	ctx, cancel := context.WithCancelCause(ctx)
	return &blobReader{ctx: ctx, cancel: cancel, open: open, size: size, stall: stall, broken: io.ErrUnexpectedEOF}
}

// Close ends a Read that waits, and all that follow. It may be called at any time.
func (b *blobReader) Close() error {
	b.cancel(io.ErrClosedPipe)
	return nil
}

// Read implements io.Reader.
func (b *blobReader) Read(p []byte) (int, error) {
	for {
		if err := b.ctx.Err(); err != nil {
			b.disconnect()
			return 0, context.Cause(b.ctx)
		}
		if b.off >= b.size {
			b.disconnect()
			return 0, io.EOF
		}
		if b.body == nil {
			if err := b.connect(); err != nil {
				return 0, err
			}
		}
		n, err := b.receive(p[:min(int64(len(p)), b.size-b.off)])
		b.off += int64(n)
		if err != nil {
			b.disconnect()
			if err := b.fail(err); err != nil {
				return n, err
			}
		}
		if n > 0 {
			return n, nil
		}
	}
}

// connect opens the blob, again and again, and skips to where reading stopped.
func (b *blobReader) connect() error {
	for {
		if b.failures > 0 {
			began := time.Now()
			if err := pause(b.ctx, backoff(b.failures-1)); err != nil {
				return err
			}
			b.waited += time.Since(began)
		}
		err := b.connectOnce()
		if err == nil {
			return nil
		}
		b.disconnect()
		if err := b.fail(err); err != nil {
			return err
		}
	}
}

func (b *blobReader) connectOnce() error {
	b.conn, b.connEnd = context.WithCancelCause(b.ctx)
	err := b.watch(func() (int, error) {
		var err error
		b.body, err = b.open(b.conn)
		return 0, err
	})
	if err != nil {
		return err
	}
	skip := make([]byte, 64<<10)
	for at := int64(0); at < b.off; {
		n, err := b.receive(skip[:min(int64(len(skip)), b.off-at)])
		at += int64(n)
		if err != nil && at < b.off {
			return err
		}
	}
	return nil
}

func (b *blobReader) disconnect() {
	if b.body != nil {
		b.body.Close()
		b.body = nil
	}
	if b.connEnd != nil {
		b.connEnd(nil)
		b.connEnd = nil
	}
}

// receive is one read from the connection. An end before the blob's is an error.
func (b *blobReader) receive(p []byte) (n int, err error) {
	err = b.watch(func() (int, error) {
		n, err = b.body.Read(p)
		return n, err
	})
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
		if b.off+int64(n) >= b.size {
			err = nil
		}
	}
	return n, err
}

// watch runs one wait for the registry and ends it, through the connection's context, when
// it takes half of what is allowed: the other half is for another connection.
func (b *blobReader) watch(wait func() (int, error)) error {
	began := time.Now()
	end := b.connEnd
	timer := time.AfterFunc(max(min(b.stall/2, b.stall-b.waited), time.Millisecond), func() { end(errSilent) })
	n, err := wait()
	timer.Stop()
	b.waited += time.Since(began)
	if b.got += int64(n); b.got >= max(int64(b.stall.Seconds()*minRate), 1) {
		b.waited, b.got = 0, 0
	}
	if err != nil && err != io.EOF && errors.Is(context.Cause(b.conn), errSilent) {
		return errSilent
	}
	return err
}

// fail counts a broken connection and returns nil if another one is worth a try.
func (b *blobReader) fail(err error) error {
	if b.ctx.Err() != nil {
		return context.Cause(b.ctx)
	}
	if b.waited >= b.stall {
		return fmt.Errorf("%d bytes in %s at byte %d of %d: %w: %w", b.got, b.waited.Round(time.Millisecond), b.off, b.size, ErrRegistryUnavailable, ErrStalled)
	}
	classified := classify(err)
	// A server that was there a moment ago may be starting again: unlike for the
	// manifest, a refused connection is tried again.
	if errors.Is(classified, ErrUnauthorized) || errors.Is(classified, ErrNotFound) {
		return classified
	}
	if b.off-b.failedAt >= goodProgress {
		b.failures = 0
	}
	b.failures++
	b.failedAt = b.off
	if b.failures < maxAttempts {
		return nil
	}
	return fmt.Errorf("connection broken %d times, last at byte %d of %d: %w: %w", b.failures, b.off, b.size, ErrRegistryUnavailable, err)
}
