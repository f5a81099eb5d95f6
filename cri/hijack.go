package cri

import (
	"bufio"
	"bytes"
	"io"
	"net"
	"net/http"
	"sync"
)

// hijacker is a ResponseWriter whose connection, once it is taken over, belongs
// to a session.
type hijacker struct {
	http.ResponseWriter
	x *session
}

// Hijack gives out a connection that tells the session of its end.
func (h hijacker) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	conn, rw, err := http.NewResponseController(h.ResponseWriter).Hijack()
	if err != nil {
		return nil, nil, err
	}
	early, err := rw.Reader.Peek(rw.Reader.Buffered())
	if err != nil {
		conn.Close()
		return nil, nil, err
	}
	h.x.last.Store(int64(uptime()))
	from := io.Reader(conn)
	if len(early) > 0 {
		from = io.MultiReader(bytes.NewReader(bytes.Clone(early)), conn)
	}
	c := &sessionConn{Conn: conn, x: h.x, from: newAheadReader(conn, from, h.x.ahead)}
	h.x.mu.Lock()
	h.x.conn, h.x.from = conn, c.from
	closed := h.x.closed
	h.x.mu.Unlock()
	if closed {
		conn.Close()
	}
	return c, bufio.NewReadWriter(bufio.NewReaderSize(c, 32<<10), bufio.NewWriter(c)), nil
}

// sessionConn is the connection of a session. When it fails, the session ends.
type sessionConn struct {
	net.Conn
	x    *session
	from *aheadReader
	wmu  sync.Mutex // one write at a time
}

func (c *sessionConn) Read(p []byte) (int, error) {
	n, err := c.from.Read(p)
	if err != nil && c.x.ended() {
		err = io.EOF // by this side, which is no error to be logged
	}
	c.done(n, err)
	return n, err
}

func (c *sessionConn) Write(p []byte) (int, error) {
	c.wmu.Lock()
	written := c.from.writing()
	n, err := c.Conn.Write(p)
	written()
	c.wmu.Unlock()
	c.done(n, err)
	return n, err
}

func (c *sessionConn) done(n int, err error) {
	if n > 0 {
		c.x.last.Store(int64(uptime()))
	}
	if err != nil {
		c.x.close()
	}
}

// Close ends the session.
func (c *sessionConn) Close() error {
	c.x.close()
	return nil
}
