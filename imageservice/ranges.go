package imageservice

import (
	"context"
	"io"
	"sync"
	"time"
)

const (
	// rangeBytes is what one connection fetches at a time of a layer that comes over
	// several, and what is kept of it in memory until its turn.
	rangeBytes = 4 << 20
	// minRanges is how many ranges a layer must have to be worth more than one connection.
	minRanges = 8
)

// newLayerReader reads a layer over one connection at a time, or over several if the
// configuration wants that for one of its size.
func (s *Service) newLayerReader(ctx context.Context, src *source, l layerRow, record *layerRecord) layerBytes {
	one := newBlobReader(ctx, src, l.Digest, l.Size, record)
	if s.cfg.ParallelRanges < 2 || l.Size < minRanges*s.rangeBytes {
		return one
	}
	one.end = s.rangeBytes
	return &rangesReader{first: one, connections: s.cfg.ParallelRanges, step: s.rangeBytes}
}

// rangesReader reads a blob over several connections at once.
//
//	first:  bytes 0 to step; tells if the server knows ranges. If not, it goes on to the end.
//	fill:   buffer from free -> a goroutine that fetches one range -> its place in order
//	Read:   next place in order -> copy out -> free
//
// There are as many buffers as connections, so that a slow disk stops them all.
type rangesReader struct {
	first       *blobReader
	connections int
	step        int64

	order chan chan span // nil before the server is known to know ranges
	free  chan []byte
	wg    sync.WaitGroup
	cur   span
	at    int // of cur

	mu      sync.Mutex
	senders []*remote
}

// span is a range that was fetched, up to an error.
type span struct {
	buf []byte // to be given back
	n   int
	err error
}

// Close ends all reads. It may be called at any time.
func (r *rangesReader) Close() error { return r.first.Close() }

func (r *rangesReader) distrust() bool {
	r.wg.Wait()
	return r.first.src.distrust(r.first.blob, append(r.senders, r.first.senders...)...)
}

// Read implements io.Reader.
func (r *rangesReader) Read(p []byte) (int, error) {
	if r.first.off < r.first.end {
		n, err := r.first.Read(p)
		if r.order == nil && n > 0 && r.first.end < r.first.size {
			if r.first.partial {
				r.start()
			} else {
				r.first.end = r.first.size
			}
		}
		return n, err
	}
	if r.order == nil {
		return r.first.Read(p) // its end
	}
	for r.at == r.cur.n {
		if r.cur.err != nil {
			return 0, r.cur.err
		}
		if err := r.next(); err != nil {
			return 0, err
		}
	}
	n := copy(p, r.cur.buf[r.at:r.cur.n])
	r.at += n
	return n, nil
}

// next waits for the range whose turn it is.
func (r *rangesReader) next() error {
	if r.cur.buf != nil {
		r.free <- r.cur.buf
	}
	r.cur, r.at = span{}, 0
	began := time.Now()
	defer func() { r.first.record.received(0, time.Since(began)) }()
	select {
	case place, ok := <-r.order:
		if !ok {
			return io.EOF
		}
		select {
		case r.cur = <-place:
			return nil
		case <-r.first.ctx.Done():
		}
	case <-r.first.ctx.Done():
	}
	return context.Cause(r.first.ctx)
}

func (r *rangesReader) start() {
	r.order, r.free = make(chan chan span, r.connections), make(chan []byte, r.connections)
	for range r.connections {
		r.free <- nil // made when first used
	}
	r.wg.Go(r.fill)
}

func (r *rangesReader) fill() {
	defer close(r.order)
	for from := r.step; from < r.first.size; from += r.step {
		var buf []byte
		select {
		case buf = <-r.free:
		case <-r.first.ctx.Done():
			return
		}
		if buf == nil {
			buf = make([]byte, r.step)
		}
		place := make(chan span, 1)
		r.order <- place // there is room: it has as many places as there are buffers
		r.wg.Go(func() { place <- r.fetch(buf, from) })
	}
}

func (r *rangesReader) fetch(buf []byte, from int64) span {
	f := r.first
	b := f.fork(from, min(from+r.step, f.size))
	defer b.cancel(nil)
	n, err := io.ReadFull(b, buf[:b.end-from])
	b.disconnect()
	r.mu.Lock()
	defer r.mu.Unlock()
	r.senders = append(r.senders, b.senders...)
	return span{buf: buf, n: n, err: err}
}
