package cri

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/cri-streaming/pkg/streaming/portforward"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
	"k8s.io/klog/v2"

	"github.com/berthd/berth/sandbox"
)

// Streams run sessions with clients.
type Streams interface {
	Exec(ctx context.Context, id string, cmd []string, s sandbox.Streams) (int, error)
	Attach(ctx context.Context, id string, s sandbox.Streams) error
	PortForward(ctx context.Context, podID string, port int32, stream io.ReadWriteCloser) error
	// CheckExec and CheckAttach answer from memory whether the call would be
	// possible.
	CheckExec(id string) error
	CheckAttach(id string, stdin, tty bool) error
}

// StreamConfig is about the sessions of Exec, Attach and PortForward.
type StreamConfig struct {
	// IdleTimeout ends a session on which nothing was sent either way; 0 is
	// 4 h, as in the kubelet.
	IdleTimeout time.Duration
	// CreationTimeout bounds the time in which a SPDY client opens its
	// streams; 0 is 30 s.
	CreationTimeout time.Duration
}

const (
	// maxSessions bounds the sessions at once.
	maxSessions = 4096
	// watchEvery is how often sessions are looked at.
	watchEvery = 5 * time.Second
	// cutTimeout is how long a client that was cut off may take to learn why.
	cutTimeout = 30 * time.Second
	// endTimeout is how long sessions may take to end when the server does.
	endTimeout = 3 * time.Second
)

// streamServer is the HTTP server for the URLs of Exec, Attach and PortForward.
// Protocols are those of k8s.io/cri-streaming, v5.channel.k8s.io (ws5.go), and
// SPDY through a WebSocket for PortForward (tunnel.go).
//
// What it adds to that is the end of sessions: the context of one ends as soon
// as its client is gone, which the library does not see while nothing is to be
// written; and a client that neither reads nor closes is found in time.
type streamServer struct {
	s        *Server
	cfg      StreamConfig
	base     atomic.Pointer[url.URL] // nil while nothing is served
	tickets  tickets
	mu       sync.Mutex
	sessions map[*session]bool
	all      sync.WaitGroup
	ahead    atomic.Int64 // bytes that aheadReaders hold
}

func newStreamServer(s *Server, cfg StreamConfig) *streamServer {
	if cfg.IdleTimeout == 0 {
		cfg.IdleTimeout = 4 * time.Hour
	}
	if cfg.CreationTimeout == 0 {
		cfg.CreationTimeout = remotecommand.DefaultStreamCreationTimeout
	}
	return &streamServer{s: s, cfg: cfg, sessions: map[*session]bool{}}
}

// url is where the client of a request is to go.
func (t *streamServer) url(kind string, req any) (string, error) {
	base := t.base.Load()
	if base == nil {
		return "", status.Error(codes.Unavailable, "streaming is switched off, or does not serve yet")
	}
	key, err := t.tickets.issue(kind, req, time.Now())
	if err != nil {
		return "", err
	}
	return base.JoinPath(kind, key).String(), nil
}

// StreamsAt has URLs given out for a listener at addr, which ServeStreams is
// going to serve: with that address, or the loopback address if it is that of no
// interface in particular.
func (s *Server) StreamsAt(addr net.Addr, secure bool) error {
	tcp, ok := addr.(*net.TCPAddr)
	if !ok {
		return fmt.Errorf("streams at %s: not a TCP address", addr)
	}
	if tcp.IP.IsUnspecified() { // a socket on :: serves IPv4, too
		tcp = &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: tcp.Port}
	}
	base := &url.URL{Scheme: "http", Host: tcp.String()}
	if secure {
		base.Scheme = "https"
	}
	s.streams.base.Store(base)
	return nil
}

// StreamURL is what the URLs of sessions begin with, "" if there are none.
func (s *Server) StreamURL() string {
	if base := s.streams.base.Load(); base != nil {
		return base.String()
	}
	return ""
}

// ServeStreams serves the sessions of Exec, Attach and PortForward on l, over
// TLS if secure is not nil, until ctx ends. Then sessions are cut off. StreamsAt
// is called before.
func (s *Server) ServeStreams(ctx context.Context, l net.Listener, secure *tls.Config) error {
	t := s.streams
	if secure != nil {
		l = tls.NewListener(l, secure)
	}
	srv := &http.Server{
		Handler: t, ReadHeaderTimeout: handshakeTimeout, IdleTimeout: time.Minute, MaxHeaderBytes: 64 << 10,
		BaseContext: func(net.Listener) context.Context { return ctx },
		// Connections are taken over, which HTTP/2 does not know.
		TLSNextProto: map[string]func(*http.Server, *tls.Conn, http.Handler){},
		ErrorLog:     log.New(io.Discard, "", 0), // what a client does wrong is no news
	}
	stopWatch := make(chan struct{})
	t.all.Go(func() { t.watch(stopWatch) })
	defer context.AfterFunc(ctx, func() { _ = srv.Close() })()
	err := srv.Serve(l)
	t.base.Store(nil)
	close(stopWatch)
	t.cut()
	if ctx.Err() != nil && errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return fmt.Errorf("serve streams: %w", err)
}

// cut ends all sessions and waits for them for a while.
func (t *streamServer) cut() {
	t.mu.Lock()
	for x := range t.sessions {
		x.close()
	}
	t.mu.Unlock()
	done := make(chan struct{})
	go func() { t.all.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(endTimeout):
	}
}

// watch ends sessions whose client is not there any more.
func (t *streamServer) watch(stop <-chan struct{}) {
	tick := time.NewTicker(watchEvery)
	defer tick.Stop()
	for {
		select {
		case <-stop:
			return
		case <-tick.C:
		}
		t.mu.Lock()
		for x := range t.sessions {
			x.check(t.cfg.IdleTimeout)
		}
		t.mu.Unlock()
	}
}

// begin admits a session.
func (t *streamServer) begin(r *http.Request) (*session, *http.Request, bool) {
	ctx, cancel := context.WithCancel(r.Context())
	x := &session{cancel: cancel, ahead: &t.ahead}
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.sessions) >= maxSessions || t.base.Load() == nil {
		cancel()
		return nil, r, false
	}
	t.sessions[x] = true
	t.all.Add(1)
	return x, r.WithContext(ctx), true
}

func (t *streamServer) end(x *session) {
	x.close()
	x.mu.Lock()
	from := x.from
	x.mu.Unlock()
	if from != nil {
		from.end()
	}
	t.mu.Lock()
	delete(t.sessions, x)
	t.mu.Unlock()
	t.all.Done()
}

// ServeHTTP runs one session: /<kind>/<token>.
func (t *streamServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodGet && r.Method != http.MethodPost {
		http.Error(w, "want GET or POST", http.StatusMethodNotAllowed)
		return
	}
	kind, key, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/"), "/")
	req, ok := t.tickets.redeem(kind, key, time.Now())
	if !ok {
		http.Error(w, "no such token: it was used before, has expired, or never was", http.StatusNotFound)
		return
	}
	x, r, ok := t.begin(r)
	if !ok {
		http.Error(w, fmt.Sprintf("%d sessions are open", maxSessions), http.StatusServiceUnavailable)
		return
	}
	defer t.end(x)
	about, began := requestKeys(req), time.Now()
	logger := klog.FromContext(r.Context()).WithValues(append([]any{"stream", kind}, about...)...)
	r = r.WithContext(klog.NewContext(r.Context(), logger))
	gauge := t.s.metrics.sessions.WithLabelValues(kind)
	gauge.Inc()
	defer gauge.Dec()
	c := &underWay{method: kind, about: about, session: true, began: began}
	t.s.calls.begin(c)
	defer t.s.calls.end(c)
	t.run(hijacker{w, x}, r, x, req)
	logger.V(lifecycleV).Info("Session ended", "took", time.Since(began))
}

func (t *streamServer) run(w http.ResponseWriter, r *http.Request, x *session, req any) {
	idle, creation := t.cfg.IdleTimeout, t.cfg.CreationTimeout
	switch req := req.(type) {
	case *runtime.ExecRequest:
		p := &process{t.s.deps.Streams, x, req}
		if isV5(r) {
			serveV5(w, r, p, idle)
			return
		}
		remotecommand.ServeExec(w, r, p, "", "", req.GetContainerId(), req.GetCmd(), options(req), idle, creation, remotecommand.SupportedStreamingProtocols)
	case *runtime.AttachRequest:
		p := &process{t.s.deps.Streams, x, req}
		if isV5(r) {
			serveV5(w, r, p, idle)
			return
		}
		remotecommand.ServeAttach(w, r, p, "", "", req.GetContainerId(), options(req), idle, creation, remotecommand.SupportedStreamingProtocols)
	case *runtime.PortForwardRequest:
		f := &forwarder{t.s.deps.Streams, r.Context()}
		serve := func(w http.ResponseWriter, r *http.Request) {
			portforward.ServePortForward(w, r, f, req.GetPodSandboxId(), "", &portforward.V4Options{Ports: req.GetPort()}, idle, creation, portforward.SupportedProtocols)
		}
		if isTunnel(r) {
			serveTunnel(w, r, serve)
			return
		}
		serve(w, r)
	}
}

// uptime is a clock that nobody sets: a session is not idle because the machine's
// clock was a year behind.
func uptime() time.Duration { return time.Since(started) }

var started = time.Now()

// session is one client's connection.
type session struct {
	cancel context.CancelFunc
	mu     sync.Mutex
	conn   net.Conn     // nil before it is taken over
	from   *aheadReader // that reads conn
	ahead  *atomic.Int64
	closed bool
	last   atomic.Int64 // when something was sent either way, on uptime's clock
	shut   int          // how often in a row check found that the client has closed
}

// close ends the session, whatever it is waiting for.
func (x *session) close() {
	x.cancel()
	x.mu.Lock()
	defer x.mu.Unlock()
	x.closed = true
	if x.conn != nil {
		x.conn.Close()
	}
}

func (x *session) ended() bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.closed
}

// check closes the connection of a client that is gone or idle. That it is gone
// is not seen by reading while there is data that nobody takes, as when a
// process does not read its input.
func (x *session) check(idle time.Duration) {
	x.mu.Lock()
	conn := x.conn
	x.mu.Unlock()
	if conn == nil {
		return
	}
	if peerClosed(conn) {
		x.shut++
	} else {
		x.shut = 0
	}
	if x.shut >= 2 || uptime()-time.Duration(x.last.Load()) > idle {
		x.close()
	}
}

// closeWait is the kernel's TCP_CLOSE_WAIT: the other side has closed.
const closeWait = 8

func peerClosed(c net.Conn) bool {
	tcp := tcpOf(c)
	if tcp == nil {
		return false
	}
	raw, err := tcp.SyscallConn()
	if err != nil {
		return true
	}
	state := uint8(0)
	err = raw.Control(func(fd uintptr) {
		if info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO); err == nil {
			state = info.State
		}
	})
	return err != nil || state == closeWait
}
