package cri

import (
	"crypto/tls"
	"io"
	"net"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// stuckAfter is how long a write may wait before reading ahead begins.
	stuckAfter = 300 * time.Millisecond
	// minAhead is how much is read ahead at least, in bytes, if there is as
	// much. It takes that much memory only then.
	minAhead = 4 << 20
)

// An aheadReader reads a connection, and reads it ahead while a write to it is
// stuck.
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

	mu    sync.Mutex
	done  *sync.Cond // busy went false
	busy  bool       // somebody reads from
	ahead []byte
	err   error // after ahead
	stuck bool  // a write waits
	timer *time.Timer
}

func newAheadReader(conn net.Conn, from io.Reader) *aheadReader {
	r := &aheadReader{conn: conn, from: from}
	r.done = sync.NewCond(&r.mu)
	r.timer = time.AfterFunc(time.Hour, r.readAhead)
	r.timer.Stop()
	return r
}

// Read is for one goroutine.
func (r *aheadReader) Read(p []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for r.busy && len(r.ahead) == 0 {
		r.done.Wait()
	}
	if len(r.ahead) > 0 {
		n := copy(p, r.ahead)
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
	r.setStuck(true)
	r.timer.Reset(stuckAfter)
	return func() {
		r.timer.Stop()
		r.setStuck(false)
	}
}

func (r *aheadReader) setStuck(v bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.stuck = v
}

// readAhead takes in what there is, within bounds, while the write waits.
func (r *aheadReader) readAhead() {
	limit := max(minAhead, receiveBuffer(r.conn)/8)
	buf := make([]byte, 64<<10)
	r.mu.Lock()
	defer r.mu.Unlock()
	for r.stuck && !r.busy && r.err == nil && len(r.ahead)+len(buf) <= limit {
		n, err := r.readLocked(buf)
		r.ahead = append(r.ahead, buf[:n]...)
		r.err = err
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
