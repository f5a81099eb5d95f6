package stream

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"sync/atomic"
	"syscall"

	"golang.org/x/net/websocket"
	"k8s.io/streaming/pkg/httpstream"
	"k8s.io/streaming/pkg/httpstream/spdy"
)

func upgrade(ctx context.Context, url, protocol string) (httpstream.Connection, error) {
	rt, err := spdy.NewRoundTripper(&tls.Config{InsecureSkipVerify: true}) //nolint:gosec // as the kubelet does
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, url, nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set(httpstream.HeaderProtocolVersion, protocol)
	resp, err := rt.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	conn, err := rt.NewConnection(resp)
	if err != nil {
		return nil, fmt.Errorf("HTTP status %d: %w", resp.StatusCode, err)
	}
	return conn, nil
}

func dialSPDY(ctx context.Context, url string, o Options) (*Session, error) {
	conn, err := upgrade(ctx, url, "v4.channel.k8s.io")
	if err != nil {
		return nil, err
	}
	s := &Session{close: func() error { return ignoreGone(conn.Close()) }}
	open := func(kind string, wanted bool) httpstream.Stream {
		if !wanted || err != nil {
			return nil
		}
		var st httpstream.Stream
		st, err = conn.CreateStream(http.Header{"streamType": []string{kind}})
		return st
	}
	status := open("error", true)
	in, out, errs, resize := open("stdin", o.Stdin), open("stdout", o.Stdout), open("stderr", o.Stderr), open("resize", o.TTY)
	if err != nil {
		conn.Close()
		return nil, err
	}
	if in != nil {
		s.In = input{in}
	}
	if out != nil {
		s.Out = out
	}
	if errs != nil {
		s.Err = errs
	}
	if resize != nil {
		s.resize = resize
	}
	return s.follow(status), nil
}

// Forward is a connection for PortForward over SPDY.
type Forward struct {
	conn httpstream.Connection
	last atomic.Int64
}

// DialForward opens one.
func DialForward(ctx context.Context, url string) (*Forward, error) {
	conn, err := upgrade(ctx, url, "portforward.k8s.io")
	if err != nil {
		return nil, err
	}
	return &Forward{conn: conn}, nil
}

// DialTunnel opens one that goes through a WebSocket.
func DialTunnel(ctx context.Context, url string) (*Forward, error) {
	ws, err := dialWS(ctx, url, "SPDY/3.1+portforward.k8s.io")
	if err != nil {
		return nil, err
	}
	ws.PayloadType = websocket.BinaryFrame
	conn, err := spdy.NewClientConnection(ws)
	if err != nil {
		return nil, err
	}
	return &Forward{conn: conn}, nil
}

// Close drops the connection with all that go through it.
func (f *Forward) Close() error { return ignoreGone(f.conn.Close()) }

// input is a stream whose end may be that of the session.
type input struct{ httpstream.Stream }

func (s input) Close() error { return ignoreGone(s.Stream.Close()) }

// ignoreGone is for the end of a connection or of a stream: SPDY tells of it in several
// writes, and after the first one the other side may have closed.
func ignoreGone(err error) error {
	if errors.Is(err, net.ErrClosed) || errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNRESET) {
		return nil
	}
	return err
}

// Open connects to a port. Close of data ends what is sent; fault is what the
// other side has to say when that fails, to be read to its end.
func (f *Forward) Open(port int) (data io.ReadWriteCloser, fault io.Reader, err error) {
	h := http.Header{}
	h.Set("streamType", "error")
	h.Set("port", strconv.Itoa(port))
	h.Set("requestID", strconv.FormatInt(f.last.Add(1), 10))
	e, err := f.conn.CreateStream(h)
	if err != nil {
		return nil, nil, err
	}
	if err := e.Close(); err != nil {
		return nil, nil, err
	}
	h.Set("streamType", "data")
	d, err := f.conn.CreateStream(h)
	if err != nil {
		return nil, nil, err
	}
	return d, e, nil
}

// DialPort opens a connection for one port over a WebSocket. Close drops it.
func DialPort(ctx context.Context, url string) (data io.ReadWriteCloser, fault io.Reader, err error) {
	c, out, err := dialChannels(ctx, url, WebSocketV4, 2)
	if err != nil {
		return nil, nil, err
	}
	// Each channel begins with the number of the port.
	var port [2]byte
	for _, r := range out {
		if _, err := io.ReadFull(r, port[:]); err != nil {
			c.ws.Close()
			return nil, nil, err
		}
	}
	return &portConn{Reader: out[0], Writer: channel{c, 0}, close: c.ws.Close}, out[1], nil
}

type portConn struct {
	io.Reader
	io.Writer
	close func() error
}

func (p *portConn) Close() error { return p.close() }
