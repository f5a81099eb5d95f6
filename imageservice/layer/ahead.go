package layer

import (
	"fmt"
	"hash"
	"io"
	"sync"
)

// hashed hashes and counts what is read through it, and fails with over when it is more
// than limit bytes; -1 is no limit.
type hashed struct {
	r     io.Reader
	h     hash.Hash
	n     int64
	limit int64
	over  error
}

func (h *hashed) Read(p []byte) (int, error) {
	n, err := h.r.Read(p)
	h.n += int64(n)
	if h.limit >= 0 && h.n > h.limit {
		return 0, h.over
	}
	h.h.Write(p[:n])
	return n, err
}

// ahead reads a source in a goroutine of its own, some full buffers ahead of its reader.
//
//	goroutine: buffer from free -> fill -> full
//	Read:      buffer from full -> copy out -> free
type ahead struct {
	full    chan chunk
	free    chan *[]byte
	quit    chan struct{}
	done    chan struct{}
	quitOne sync.Once
	cur     chunk
	off     int
}

// chunk is a buffer of n bytes, with the error that came after them.
type chunk struct {
	buf *[]byte
	n   int
	err error
}

func newAhead(r io.Reader, buffers int) *ahead {
	a := &ahead{
		full: make(chan chunk, buffers), free: make(chan *[]byte, buffers),
		quit: make(chan struct{}), done: make(chan struct{}),
	}
	for range buffers {
		a.free <- nil // allocated when first used: most layers are small
	}
	go a.fill(r)
	return a
}

func (a *ahead) fill(r io.Reader) {
	defer close(a.done)
	for {
		var b *[]byte
		select {
		case b = <-a.free:
		case <-a.quit:
			return
		}
		if b == nil {
			b = buffers.Get().(*[]byte)
		}
		c := chunk{buf: b}
		for c.n < aheadBuffer && c.err == nil {
			var n int
			n, c.err = readSafely(r, (*b)[c.n:aheadBuffer])
			c.n += n
		}
		err := c.err
		select {
		case a.full <- c:
		case <-a.quit:
			return
		}
		if err != nil {
			return
		}
	}
}

// readSafely turns a panic of a decoder into an error: it would end the daemon, and again
// at each retry of whoever wants the image.
func readSafely(r io.Reader, p []byte) (n int, err error) {
	defer func() {
		if v := recover(); v != nil {
			n, err = 0, fmt.Errorf("decoder panic: %v: %w", v, ErrCorrupt)
		}
	}()
	return r.Read(p)
}

// Read implements io.Reader. It must not be called after stop.
func (a *ahead) Read(p []byte) (int, error) {
	for a.off == a.cur.n {
		if a.cur.err != nil {
			return 0, a.cur.err
		}
		if a.cur.buf != nil {
			a.free <- a.cur.buf
			a.cur = chunk{}
		}
		select {
		case a.cur = <-a.full:
		case <-a.quit:
			return 0, io.ErrClosedPipe
		}
		a.off = 0
	}
	n := copy(p, (*a.cur.buf)[a.off:a.cur.n])
	a.off += n
	return n, nil
}

func (a *ahead) stop() { a.quitOne.Do(func() { close(a.quit) }) }

// release gives the idle buffers to the next stream, after done.
func (a *ahead) release() {
	for {
		select {
		case b := <-a.free:
			if b != nil {
				buffers.Put(b)
			}
		default:
			return
		}
	}
}
