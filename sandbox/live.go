package sandbox

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/berthd/berth/shim"
)

// live holds the connections to shims, by the ID of the container or pod that
// the shim runs a process for.
type live struct {
	mu     sync.Mutex
	m      map[string]*handle
	closed bool // the daemon is stopping: no new connections
}

// handle is a shim that this daemon talks to.
type handle struct {
	client  *shim.Client
	spec    atomic.Pointer[specs.Spec] // see execSpec
	ended   chan struct{}              // closed when the exit is in the book
	dropped chan struct{}              // closed when this daemon has let go of it
}

func newLive() *live { return &live{m: map[string]*handle{}} }

func (l *live) get(id string) *handle {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.m[id]
}

// put takes charge of a connection in place of an older one. When the daemon is
// stopping the connection is closed, and nil returned.
func (l *live) put(id string, c *shim.Client) *handle { return l.take(id, c, false) }

// add is put, unless there is a connection that works: then the new one is closed,
// and nil returned.
func (l *live) add(id string, c *shim.Client) *handle { return l.take(id, c, true) }

func (l *live) take(id string, c *shim.Client, keep bool) *handle {
	h := &handle{client: c, ended: make(chan struct{}), dropped: make(chan struct{})}
	l.mu.Lock()
	old := l.m[id]
	refused := l.closed || keep && old != nil && old.alive()
	if !refused {
		l.m[id] = h
	}
	l.mu.Unlock()
	if refused {
		c.Close()
		return nil
	}
	if old != nil {
		old.close()
	}
	return h
}

// alive tells whether the connection has not ended.
func (h *handle) alive() bool {
	select {
	case <-h.client.Gone():
		return false
	default:
		return true
	}
}

// client returns the connection to a shim. If there is none, or it was lost, it
// is made anew, and followed.
func (s *Service) client(ctx context.Context, id string) (*shim.Client, error) {
	if h := s.live.get(id); h != nil && h.alive() {
		return h.client, nil
	}
	c, err := shim.Connect(ctx, s.socket(id))
	if err != nil {
		return nil, err
	}
	if err := s.follow(id, c); err != nil {
		return nil, err
	}
	return c, nil
}

// follow takes charge of a connection and waits for the exit in the background.
func (s *Service) follow(id string, c *shim.Client) error {
	h := s.live.put(id, c)
	if h == nil {
		return errClosing
	}
	s.watch(id, h)
	return nil
}

func (l *live) drop(id string) {
	l.mu.Lock()
	h := l.m[id]
	delete(l.m, id)
	l.mu.Unlock()
	if h != nil {
		h.close()
	}
}

func (h *handle) close() {
	close(h.dropped)
	h.client.Close()
}

func (l *live) isClosed() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.closed
}

func (l *live) closeAll() {
	l.mu.Lock()
	all := l.m
	l.m, l.closed = map[string]*handle{}, true
	l.mu.Unlock()
	for _, h := range all {
		h.close()
	}
}

// killPid kills one process; that it is gone is no error.
func killPid(pid int) error {
	if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
		return err
	}
	return nil
}
