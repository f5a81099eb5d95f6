package stream

import (
	"context"
	"crypto/tls"
	"io"
	"strings"
	"sync"

	"golang.org/x/net/websocket"
)

// channelConn carries numbered channels over a WebSocket.
type channelConn struct {
	ws *websocket.Conn
	v5 bool
	mu sync.Mutex // one message is written at a time
	in []*io.PipeWriter
}

func dialWS(ctx context.Context, url, protocol string) (*websocket.Conn, error) {
	cfg, err := websocket.NewConfig("ws"+strings.TrimPrefix(url, "http"), "http://localhost")
	if err != nil {
		return nil, err
	}
	cfg.Protocol = []string{protocol}
	cfg.TlsConfig = &tls.Config{InsecureSkipVerify: true} //nolint:gosec // as the kubelet does
	return cfg.DialContext(ctx)
}

func dialChannels(ctx context.Context, url, protocol string, channels int) (*channelConn, []*io.PipeReader, error) {
	ws, err := dialWS(ctx, url, protocol)
	if err != nil {
		return nil, nil, err
	}
	c := &channelConn{ws: ws, v5: protocol == WebSocketV5}
	var out []*io.PipeReader
	for range channels {
		r, w := io.Pipe()
		out, c.in = append(out, r), append(c.in, w)
	}
	go c.read()
	return c, out, nil
}

func (c *channelConn) read() {
	for {
		var b []byte
		if err := websocket.Message.Receive(c.ws, &b); err != nil {
			for _, w := range c.in {
				w.Close()
			}
			return
		}
		if len(b) > 0 && int(b[0]) < len(c.in) {
			if _, err := c.in[b[0]].Write(b[1:]); err != nil {
				continue // nobody wants that one
			}
		}
	}
}

// channel writes to one channel.
type channel struct {
	c *channelConn
	n byte
}

func (ch channel) Write(p []byte) (int, error) {
	ch.c.mu.Lock()
	defer ch.c.mu.Unlock()
	if err := websocket.Message.Send(ch.c.ws, append([]byte{ch.n}, p...)); err != nil {
		return 0, err
	}
	return len(p), nil
}

// Close ends the channel, which version 4 cannot.
func (ch channel) Close() error {
	if !ch.c.v5 {
		return nil
	}
	ch.c.mu.Lock()
	defer ch.c.mu.Unlock()
	return websocket.Message.Send(ch.c.ws, []byte{255, ch.n})
}

func dialWebSocket(ctx context.Context, url, protocol string, o Options) (*Session, error) {
	c, out, err := dialChannels(ctx, url, protocol, 5)
	if err != nil {
		return nil, err
	}
	s := &Session{resize: channel{c, 4}, close: c.ws.Close}
	if o.Stdin {
		s.In = channel{c, 0}
	}
	if o.Stdout {
		s.Out = out[1]
	}
	if o.Stderr {
		s.Err = out[2]
	}
	return s.follow(out[3]), nil
}
