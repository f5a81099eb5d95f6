package sandbox

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/berthd/berth/cni/netns"
)

const (
	forwardDial = 10 * time.Second
	// A connection of which one side has ended may go on in the other
	// direction. When nothing goes that way for this long, it is over: many
	// programs close without saying so.
	podIdle    = 5 * time.Minute  // after the client ended its side
	clientIdle = 10 * time.Second // after the pod ended its side
)

// forwards are the connections into pods. They hold a pod's network namespace,
// so they are cut when it is stopped.
type forwards struct {
	mu sync.Mutex
	m  map[string]map[net.Conn]bool // by pod ID
}

func newForwards() *forwards { return &forwards{m: map[string]map[net.Conn]bool{}} }

func (f *forwards) add(pod string, c net.Conn) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.m[pod] == nil {
		f.m[pod] = map[net.Conn]bool{}
	}
	f.m[pod][c] = true
}

func (f *forwards) remove(pod string, c net.Conn) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.m[pod], c)
	if len(f.m[pod]) == 0 {
		delete(f.m, pod)
	}
}

// cut closes all connections into a pod.
func (f *forwards) cut(pod string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for c := range f.m[pod] {
		c.Close()
	}
}

// PortForward connects a client to a port, 1 to 65535, on the loopback address
// of a ready pod, IPv4 first, then IPv6; in the host's network namespace for a
// pod on the host's network. Either side may end its direction first. It returns
// when both have, when ctx ends, or when the pod is stopped.
func (s *Service) PortForward(ctx context.Context, podID string, port int32, stream io.ReadWriteCloser) error {
	p, err := s.book.view().pod(podID)
	if err != nil {
		return err
	}
	if port < 1 || port > 65535 {
		return fmt.Errorf("%w: port: %d, limit 1 to 65535", ErrInvalid, port)
	}
	conn, err := s.dialPod(ctx, p, port)
	if err != nil {
		return fmt.Errorf("pod %s: port %d: %w", p.ID, port, err)
	}
	defer conn.Close()
	s.forwards.add(p.ID, conn)
	defer s.forwards.remove(p.ID, conn)
	// After it is known, so that either this or the stop of the pod sees it.
	if p := s.book.view().pods[p.ID]; p == nil || p.State != StateReady {
		return fmt.Errorf("%w: pod %s is not ready", ErrState, podID)
	}
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	splice(ctx, conn, stream)
	return nil
}

// dialPod connects to the loopback address that the pod's processes see.
func (s *Service) dialPod(ctx context.Context, p *pod, port int32) (*net.TCPConn, error) {
	dial := func() (conn *net.TCPConn, err error) {
		var errs []error
		for _, a := range [2]struct{ network, host string }{{"tcp4", "127.0.0.1"}, {"tcp6", "::1"}} {
			d := net.Dialer{Timeout: forwardDial}
			// The socket is made by this goroutine, so on this thread:
			// the address needs no look-up and there is only one.
			c, err := d.DialContext(ctx, a.network, net.JoinHostPort(a.host, strconv.Itoa(int(port))))
			if err == nil {
				return c.(*net.TCPConn), nil
			}
			errs = append(errs, err)
		}
		return nil, errors.Join(errs...)
	}
	if p.HostNetwork {
		return dial()
	}
	var conn *net.TCPConn
	err := s.deps.Pins.Do(p.ID, netns.Net, func() (err error) { conn, err = dial(); return err })
	return conn, err
}

// splice copies in both directions until both have ended.
func splice(ctx context.Context, conn *net.TCPConn, stream io.ReadWriteCloser) {
	up, down := make(chan struct{}), make(chan struct{})
	// By a clock that nobody sets. What was never sent is long ago.
	begun := time.Now()
	var lastUp atomic.Int64
	lastUp.Store(int64(-clientIdle))
	quiet := func() time.Duration { return time.Since(begun) - time.Duration(lastUp.Load()) }
	var half atomic.Bool // the client has ended its side
	go func() {
		defer close(up)
		pump(conn, stream, func() { lastUp.Store(int64(time.Since(begun))) })
		conn.CloseWrite()
		half.Store(true)
		conn.SetReadDeadline(time.Now().Add(podIdle))
	}()
	go func() {
		defer close(down)
		pump(stream, conn, func() {
			if half.Load() {
				conn.SetReadDeadline(time.Now().Add(podIdle))
			}
		})
		stream.Close()
	}()
	<-down // also when ctx ends, as conn is closed then
	for ctx.Err() == nil {
		since := quiet()
		wait := clientIdle
		if since < clientIdle {
			wait = clientIdle - since
		}
		select {
		case <-up:
			return
		case <-ctx.Done():
		case <-time.After(wait):
			if quiet() >= clientIdle {
				// A SPDY stream is read on until it is reset.
				if r, ok := stream.(interface{ Reset() error }); ok {
					r.Reset()
				}
				return
			}
		}
	}
}

// pump copies, and calls beat for each piece.
func pump(dst io.Writer, src io.Reader, beat func()) {
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)
	for {
		n, err := src.Read(*buf)
		if n > 0 {
			beat()
			if _, err := dst.Write((*buf)[:n]); err != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}
