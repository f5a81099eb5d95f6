package cri

import (
	"crypto/tls"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// stuckAfter is how long a write may wait before reading ahead begins.
	stuckAfter = 300 * time.Millisecond
	// minAhead is how much is read ahead at least, in bytes, if there is as
	// much. It takes that much memory only then. A command that makes very much
	// of what it reads could be stuck a second time before it has read that.
	minAhead = 4 << 20
	// maxAhead bounds what is read ahead for all sessions together, in bytes:
	// clients that send and do not read could have each session hold minAhead.
	maxAhead = 256 << 20
	// aheadBlock is how much is read at once.
	aheadBlock = 64 << 10
)

// An aheadReader reads a connection, and reads it ahead while a write to it is
// stuck and nobody reads.
//
// A session with much going in and out can stand still for good without that.
// The command does not read because it waits to write; the kernel's receive
// queue fills up and, as packets take more memory than was reckoned, a few bytes
// that it had promised to take are dropped. Then the other side's
// acknowledgements, which are numbered behind these bytes, are outside of the
// window, which is zero by now; they are dropped, too (TcpExtBeyondWindow in
// /proc/net/netstat), and what is to be written stays unacknowledged. Taking
// something out of the queue opens the window again.
type aheadReader struct {
	conn net.Conn
	from io.Reader // conn, after what came before it was taken over
	all  *atomic.Int64

	mu    sync.Mutex
	done  *sync.Cond // busy went false
	busy  bool       // somebody reads from
	ahead []byte
	err   error       // after ahead
	stuck bool        // a write waits
	ended bool        // no more is read ahead
	timer *time.Timer // runs readAhead; set anew by each write and, during one, each read
}

// newAheadReader reads from, which ends with conn. What is ahead at any time is
// counted in all.
func newAheadReader(conn net.Conn, from io.Reader, all *atomic.Int64) *aheadReader {
	r := &aheadReader{conn: conn, from: from, all: all}
	r.done = sync.NewCond(&r.mu)
	r.timer = time.AfterFunc(time.Hour, r.readAhead)
	r.timer.Stop()
	return r
}

// Read is for one goroutine.
func (r *aheadReader) Read(p []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	// This may be the last read for long: the write that waits is looked after
	// from now on.
	defer r.lookLaterLocked()
	for r.busy && len(r.ahead) == 0 {
		r.done.Wait()
	}
	if len(r.ahead) > 0 {
		n := copy(p, r.ahead)
		r.all.Add(-int64(n))
		if r.ahead = r.ahead[n:]; len(r.ahead) == 0 {
			r.ahead = nil
		}
		return n, nil
	}
	if r.err != nil {
		return 0, r.err
	}
	return r.readLocked(p)
}

// readLocked gives the lock up while it reads.
func (r *aheadReader) readLocked(p []byte) (int, error) {
	r.busy = true
	r.mu.Unlock()
	n, err := r.from.Read(p)
	r.mu.Lock()
	r.busy = false
	r.done.Broadcast()
	return n, err
}

// writing is called before a write, and the function that it returns after it.
// Writes do not overlap.
func (r *aheadReader) writing() (written func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.stuck = true
	r.lookLaterLocked()
	return func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.stuck = false
		r.timer.Stop()
	}
}

func (r *aheadReader) lookLaterLocked() {
	if r.stuck && !r.ended && r.err == nil {
		r.timer.Reset(stuckAfter)
	}
}

// readAhead takes in what there is, within bounds, while the write waits.
func (r *aheadReader) readAhead() {
	limit := max(minAhead, receiveBuffer(r.conn)/8)
	r.mu.Lock()
	defer r.mu.Unlock()
	var buf []byte
	for r.stuck && !r.busy && !r.ended && r.err == nil && len(r.ahead)+aheadBlock <= limit {
		if r.all.Add(aheadBlock) > maxAhead {
			r.all.Add(-aheadBlock)
			r.lookLaterLocked() // others may have given back their share by then
			return
		}
		if buf == nil {
			buf = make([]byte, aheadBlock)
		}
		n, err := r.readLocked(buf)
		r.all.Add(int64(n) - aheadBlock)
		if r.ended {
			r.all.Add(-int64(n))
			return
		}
		r.ahead = append(r.ahead, buf[:n]...)
		r.err = err
	}
}

// end drops what is ahead. The connection is closed by then.
func (r *aheadReader) end() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.ended = true
	r.timer.Stop()
	r.all.Add(-int64(len(r.ahead)))
	r.ahead = nil
	if r.err == nil {
		r.err = net.ErrClosed
	}
}

// receiveBuffer is the size of the kernel's buffer in bytes, 0 if unknown. Of
// that a 16th has to be free before the window opens.
func receiveBuffer(c net.Conn) (size int) {
	if tcp := tcpOf(c); tcp != nil {
		if raw, err := tcp.SyscallConn(); err == nil {
			_ = raw.Control(func(fd uintptr) {
				size, _ = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF)
			})
		}
	}
	return size
}

// tcpOf is the TCP connection under c, nil if there is none.
func tcpOf(c net.Conn) *net.TCPConn {
	if secure, ok := c.(*tls.Conn); ok {
		c = secure.NetConn()
	}
	tcp, _ := c.(*net.TCPConn)
	return tcp
}
