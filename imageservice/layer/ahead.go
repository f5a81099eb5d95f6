package layer

import (
	"fmt"
	"hash"
	"io"
	"sync"

	"github.com/berthd/berth/imageservice/layer/gunzip"
)

// buffers are those that the stages hand on: room for a window, and for the bytes.
var buffers = sync.Pool{New: func() any { b := make([]byte, gunzip.Window+aheadBuffer); return &b }}

// chunk is a buffer with n bytes behind the window, or an error after all bytes.
type chunk struct {
	buf *[]byte
	n   int
	err error
}

func (c chunk) bytes() []byte { return (*c.buf)[gunzip.Window : gunzip.Window+c.n] }

// stage runs a function in a goroutine of its own, some full buffers ahead of who takes
// them.
//
//	goroutine: buffer from free -> fill -> full
//	taker:     chunk from full -> use -> buffer to free
type stage struct {
	full    chan chunk
	free    chan *[]byte
	quit    chan struct{}
	done    chan struct{}
	quitOne sync.Once
}

// start begins to call fill, which is given a buffer and returns how many bytes it put
// behind the window, or an error without bytes.
func start(size int, fill func(b []byte) (int, error)) *stage {
	s := &stage{
		full: make(chan chunk, size), free: make(chan *[]byte, size+2),
		quit: make(chan struct{}), done: make(chan struct{}),
	}
	for range size {
		s.free <- nil // allocated when first used: most layers are small
	}
	go s.run(fill)
	return s
}

func (s *stage) run(fill func([]byte) (int, error)) {
	defer close(s.done)
	for {
		var b *[]byte
		select {
		case b = <-s.free:
		case <-s.quit:
			return
		}
		if b == nil {
			b = buffers.Get().(*[]byte)
		}
		n, err := safely(fill, *b)
		select {
		case s.full <- chunk{b, n, err}:
		case <-s.quit:
			return
		}
		if err != nil {
			return
		}
	}
}

// safely turns a panic of a decoder into an error: it would end the daemon, and again
// at each retry of whoever wants the image.
func safely(fill func([]byte) (int, error), b []byte) (n int, err error) {
	defer func() {
		if v := recover(); v != nil {
			n, err = 0, fmt.Errorf("decoder panic: %v: %w", v, ErrCorrupt)
		}
	}()
	return fill(b)
}

// take waits for a chunk, or for stop.
func (s *stage) take() chunk {
	select {
	case c := <-s.full:
		return c
	case <-s.quit:
		return chunk{err: io.ErrClosedPipe}
	}
}

// back gives the buffer of a chunk back.
func (s *stage) back(c chunk) {
	if c.buf != nil {
		s.free <- c.buf
	}
}

func (s *stage) stop() { s.quitOne.Do(func() { close(s.quit) }) }

// release waits for the goroutine and gives the idle buffers to the next stream.
func (s *stage) release() {
	<-s.done
	for {
		select {
		case b := <-s.free:
			if b != nil {
				buffers.Put(b)
			}
		case c := <-s.full:
			buffers.Put(c.buf)
		default:
			return
		}
	}
}

// reading is an io.Reader of the chunks of a stage. It must not be used after stop.
type reading struct {
	s   *stage
	cur chunk
	off int
}

// Read implements io.Reader.
func (r *reading) Read(p []byte) (int, error) {
	for r.off == r.cur.n {
		if r.cur.err != nil {
			return 0, r.cur.err
		}
		r.s.back(r.cur)
		r.cur = r.s.take()
		r.off = 0
	}
	n := copy(p, r.cur.bytes()[r.off:])
	r.off += n
	return n, nil
}

// hashing hashes and counts, and fails with over when it is more than limit bytes; -1 is
// no limit.
type hashing struct {
	h     hash.Hash
	n     int64
	limit int64
	over  error
}

func (h *hashing) add(b []byte) error {
	h.n += int64(len(b))
	if h.limit >= 0 && h.n > h.limit {
		return h.over
	}
	h.h.Write(b)
	return nil
}

// fillFrom reads until the buffer is full or the source has no more.
func fillFrom(r io.Reader, b []byte) (n int, err error) {
	b = b[gunzip.Window:]
	for n < len(b) && err == nil {
		var k int
		k, err = r.Read(b[n:])
		n += k
	}
	return n, err
}
