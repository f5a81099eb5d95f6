package imageservice

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/berthd/berth/imageservice/registry"
)

// goodProgress is how many bytes make up for the connections that broke before.
const goodProgress = 1 << 20

var errSilent = errors.New("connection silent")

// blobReader reads one blob over as many connections, to as many endpoints, as it takes. A
// new connection goes on where the last one ended; where a server does not know ranges,
// what was read already is skipped. The stages behind it notice nothing, and their digest
// is over all of it, so that it tells if the second server sends something else.
//
// It measures the time spent waiting for a server, which excludes the time in which
// nobody reads because the disk is slow.
type blobReader struct {
	ctx    context.Context
	cancel context.CancelCauseFunc
	src    *source
	blob   string // digest
	size   int64  // as the manifest states
	end    int64  // of what is to be read; size for all of it
	record *layerRecord
	// untimed: somebody else measures what the wait for these bytes costs.
	untimed bool
	partial bool // the endpoint answered with a range

	// The connection, if there is one.
	body    *registry.Blob
	conn    context.Context
	connEnd context.CancelCauseFunc
	from    *remote
	waited  time.Duration // for it, and
	got     int64         // bytes from it, since it was last fast enough

	off     int64 // of the blob
	senders []*remote
	etags   map[*remote]string

	// Since the last goodProgress.
	failedAt int64 // off at the first failure
	failures int
	stalls   int
	tried    map[*remote]bool // in this round
	said     answers
	refused  map[*remote]bool // for good, for this blob

	notBefore time.Time // when servers wish to be asked again
}

func newBlobReader(ctx context.Context, src *source, blob string, size int64, record *layerRecord) *blobReader {
	ctx, cancel := context.WithCancelCause(ctx)
	return &blobReader{
		ctx: ctx, cancel: cancel, src: src, blob: blob, size: size, end: size, record: record,
		etags: map[*remote]string{}, tried: map[*remote]bool{}, refused: map[*remote]bool{},
	}
}

// fork is a reader of another part of the same blob.
func (b *blobReader) fork(from, end int64) *blobReader {
	f := newBlobReader(b.ctx, b.src, b.blob, b.size, b.record)
	f.off, f.failedAt, f.end, f.untimed = from, from, end, true
	return f
}

// Close ends a Read that waits, and all that follow. It may be called at any time.
func (b *blobReader) Close() error {
	b.cancel(io.ErrClosedPipe)
	return nil
}

// distrust is to be called when what was read is not what its digest says, after Close and
// when no Read runs. It tells if another try may bring something else.
func (b *blobReader) distrust() bool { return b.src.distrust(b.blob, b.senders...) }

// Read implements io.Reader.
func (b *blobReader) Read(p []byte) (int, error) {
	for len(p) > 0 {
		if b.ctx.Err() != nil {
			b.disconnect()
			return 0, context.Cause(b.ctx)
		}
		if b.off >= b.end {
			b.disconnect()
			return 0, io.EOF
		}
		var n int
		var err error
		if b.body == nil {
			err = b.connect()
		}
		if err == nil {
			n, err = b.receive(p[:min(int64(len(p)), b.end-b.off)])
			b.off += int64(n)
		}
		if err != nil {
			if err := b.fail(err); err != nil {
				return n, err
			}
		}
		if n > 0 {
			return n, nil
		}
	}
	return 0, nil
}

// connect asks the next endpoint for the rest of the blob, and skips what it sends too
// much of.
func (b *blobReader) connect() error {
	if err := b.next(); err != nil {
		return err
	}
	b.conn, b.connEnd = context.WithCancelCause(b.ctx)
	b.waited, b.got = 0, 0
	to := b.end
	if to == b.size {
		to = -1
	}
	err := b.watch(func() (int, error) {
		var err error
		b.body, err = b.from.client.Blob(b.conn, b.blob, b.off, to, b.etags[b.from])
		return 0, err
	})
	if err != nil {
		return err
	}
	if b.body.Size >= 0 && b.body.Size != b.size {
		return fmt.Errorf("it has %d bytes there, the manifest says %d: %w", b.body.Size, b.size, ErrDigestMismatch)
	}
	b.etags[b.from], b.partial = b.body.ETag, b.body.Partial
	b.record.change(func(l *LayerProgress) { l.Endpoint = b.from.Host })
	skip := make([]byte, 64<<10)
	for at := b.body.Offset; at < b.off; {
		n, err := b.receive(skip[:min(int64(len(skip)), b.off-at)])
		at += int64(n)
		if err != nil {
			return err
		}
	}
	if !slices.Contains(b.senders, b.from) {
		b.senders = append(b.senders, b.from)
	}
	return nil
}

// next chooses an endpoint: the first that was not tried since the last progress. When all
// were, it waits a little before it begins again.
func (b *blobReader) next() error {
	usable := slices.DeleteFunc(b.src.usable(b.blob, false), func(r *remote) bool { return b.refused[r] })
	if len(usable) == 0 {
		if len(b.said.order) == 0 {
			return fmt.Errorf("no endpoint with the capability to pull: %w", ErrRegistryUnavailable)
		}
		return b.said.error()
	}
	for round := 0; round < 2; round++ {
		for _, r := range usable {
			if !b.tried[r] {
				b.tried[r], b.from = true, r
				return nil
			}
		}
		clear(b.tried)
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
		if b.off+int64(n) >= b.end {
			err = nil
		}
	}
	return n, err
}

// patience is how long one connection may bring too little: half of what is allowed, as
// the other half is for another connection.
func (b *blobReader) patience() time.Duration { return max(b.src.cfg.StallTimeout/2, time.Millisecond) }

// watch runs one wait for the server and ends it, through the connection's context, when
// the connection was too slow for too long.
func (b *blobReader) watch(wait func() (int, error)) error {
	began := time.Now()
	end := b.connEnd
	timer := time.AfterFunc(max(b.patience()-b.waited, time.Millisecond), func() { end(errSilent) })
	n, err := wait()
	timer.Stop()
	took := time.Since(began)
	b.waited += took
	if b.untimed {
		took = 0
	}
	b.record.received(n, took)
	if b.got += int64(n); b.got >= max(int64(b.patience().Seconds()*float64(b.src.cfg.MinRate)), 1) {
		b.waited, b.got = 0, 0
		b.stalls = 0
	}
	if err != nil && err != io.EOF && errors.Is(context.Cause(b.conn), errSilent) {
		return errSilent
	}
	return err
}

// fail takes note of a connection that brought an error instead of all bytes, and returns
// nil if there is to be another one, for which it has waited long enough.
func (b *blobReader) fail(err error) error {
	if b.ctx.Err() != nil {
		b.disconnect()
		return context.Cause(b.ctx)
	}
	if b.connEnd == nil { // next found nobody
		return err
	}
	waited, got, from := b.waited, b.got, b.from
	b.disconnect()
	if b.off-b.failedAt >= goodProgress {
		b.failures, b.stalls = 0, 0
		clear(b.tried)
	}
	b.failures++
	b.failedAt = b.off
	usable := len(b.src.usable(b.blob, false)) - len(b.refused)
	var after time.Duration
	if errors.Is(err, errSilent) {
		b.stalls++
		err = fmt.Errorf("%d bytes in %s: %w: %w", got, waited.Round(time.Millisecond), ErrRegistryUnavailable, ErrStalled)
		from.bad.Add(1)
	} else {
		err = fromNetwork(b.ctx, err)
		var again bool
		if after, again = retryable(err); again {
			from.bad.Add(1)
		} else {
			b.refused[from] = true
			usable--
		}
	}
	b.said.add(from, fmt.Errorf("at byte %d of %d: %w", b.off, b.size, err))
	b.note(from, err)
	switch {
	case usable <= 0, b.stalls >= max(2, usable), b.failures >= max(b.src.cfg.Retries, usable):
		if b.failures > 1 {
			return fmt.Errorf("given up after %d connections: %w", b.failures, b.said.error())
		}
		return b.said.error()
	}
	began := time.Now()
	if wished := began.Add(after); wished.After(b.notBefore) {
		b.notBefore = wished
	}
	if b.failures < usable {
		return nil // somebody else is asked at once
	}
	defer func() {
		if !b.untimed {
			b.record.received(0, time.Since(began))
		}
	}()
	return pause(b.ctx, max(time.Until(b.notBefore), backoff(b.failures-usable)))
}

// note lets others see what went wrong and was got over.
func (b *blobReader) note(from *remote, err error) {
	text := from.Host + ": " + err.Error()
	b.record.change(func(l *LayerProgress) { l.Problem = text; l.Retries++ })
	if b.src.notice != nil {
		b.src.notice(text)
	}
}
