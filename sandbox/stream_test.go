package sandbox

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"
)

// client is the far end of a stream: each write waits for a token, if there are
// any to wait for.
type client struct {
	mu     sync.Mutex
	b      bytes.Buffer
	n      int  // bytes written
	count  bool // and not kept
	tokens chan struct{}
	closed bool
}

func (c *client) Write(p []byte) (int, error) {
	if c.tokens != nil {
		if _, ok := <-c.tokens; !ok {
			return 0, net.ErrClosed
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.n += len(p); c.count {
		return len(p), nil
	}
	return c.b.Write(p)
}

func (c *client) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	return nil
}

func (c *client) state() (string, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.b.String(), c.closed
}

// What a command wrote is passed on though its child holds the pipe open, and
// however late the client takes it.
func TestOutStreamKeepsTheTail(t *testing.T) {
	want := strings.Repeat("0123456789abcdef", 4<<10) // as much as a pipe holds
	for name, late := range map[string]bool{"prompt": false, "late": true} {
		t.Run(name, func(t *testing.T) {
			r, w, err := pipeFrom()
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			defer w.Close() // the child's
			c := &client{}
			if late {
				c.tokens = make(chan struct{}, 16)
			}
			o := &outStream{r, c}
			done := make(chan struct{})
			go func() { o.copy(); close(done) }()
			if _, err := w.WriteString("first"); err != nil {
				t.Fatal(err)
			}
			time.Sleep(20 * time.Millisecond)
			if _, err := w.WriteString(want); err != nil {
				t.Fatal(err)
			}
			begun := time.Now()
			o.finish(50 * time.Millisecond)
			if late {
				time.Sleep(200 * time.Millisecond) // the deadline passes meanwhile
				for range 16 {
					c.tokens <- struct{}{}
				}
			}
			<-done
			if got, closed := c.state(); got != "first"+want || !closed {
				t.Errorf("%d bytes, want %d; closed %t", len(got), len(want)+5, closed)
			}
			if d := time.Since(begun); d > 5*time.Second {
				t.Errorf("took %v", d)
			}
		})
	}
}

// A client that has gone is noticed by the command.
func TestOutStreamClientGone(t *testing.T) {
	r, w, err := pipeFrom()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	c := &client{tokens: make(chan struct{})}
	close(c.tokens)
	done := make(chan struct{})
	go func() { (&outStream{r, c}).copy(); close(done) }()
	if _, err := w.WriteString("x"); err != nil {
		t.Fatal(err)
	}
	<-done
	if _, err := w.WriteString("x"); err == nil {
		t.Error("the pipe is still open")
	}
}

// A relay takes what comes at once, and ends when too much of it waits.
func TestRelay(t *testing.T) {
	run := func(c *client, size int) (bool, error) {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		y := newRelay(r, c)
		ended := make(chan error, 1)
		ended <- nil
		result := make(chan error, 1)
		go func() { result <- relayAll(context.Background(), []*relay{y}, ended) }()
		_, werr := w.Write(make([]byte, size))
		w.Close()
		err = <-result
		return werr == nil, err
	}
	c := &client{count: true}
	if whole, err := run(c, 40<<20); !whole || err != nil {
		t.Errorf("client that reads: %v", err)
	}
	if _, closed := c.state(); c.n != 40<<20 || !closed {
		t.Errorf("%d bytes, closed %t", c.n, closed)
	}
	c = &client{tokens: make(chan struct{})}
	if _, err := run(c, maxBehind+1<<20); !errors.Is(err, ErrSlow) {
		t.Errorf("client that does not read: %v, want ErrSlow", err)
	}
	close(c.tokens)
}

func tcpPair(t *testing.T) (here, there *net.TCPConn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	a, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	b, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close(); b.Close() })
	return a.(*net.TCPConn), b.(*net.TCPConn)
}

// halfCloser is a client's stream that can be closed in one direction.
type halfCloser struct{ *net.TCPConn }

func (h halfCloser) Close() error { return h.CloseWrite() }

// Either side of a forwarded connection may end its direction first.
func TestSplice(t *testing.T) {
	for name, clientFirst := range map[string]bool{"client first": true, "pod first": false} {
		t.Run(name, func(t *testing.T) {
			conn, server := tcpPair(t)
			stream, user := tcpPair(t)
			done := make(chan struct{})
			go func() { splice(context.Background(), conn, halfCloser{stream}); close(done) }()
			first, second := user, server
			if !clientFirst {
				first, second = server, user
			}
			io.WriteString(first, "question")
			first.CloseWrite()
			if b, err := io.ReadAll(second); err != nil || string(b) != "question" {
				t.Errorf("one way: %q, %v", b, err)
			}
			io.WriteString(second, "answer")
			second.CloseWrite()
			if b, err := io.ReadAll(first); err != nil || string(b) != "answer" {
				t.Errorf("other way: %q, %v", b, err)
			}
			select {
			case <-done:
			case <-time.After(5 * time.Second):
				t.Error("goes on after both have ended")
			}
		})
	}
}
