// Package admin serves what an administrator asks of berthd and CRI has no verb
// for. Its language is that of package api; its client is the command berth.
//
// # Nouns
//
//   - Server: the HTTP handler, and the loop that serves it on a unix socket.
//   - work: a request that takes long. It streams records until it is done, ends
//     when its client goes away, and only a few run at the same time.
//
// # Safety
//
// The socket has mode 0600, and a peer that is not root is turned away by its
// credentials all the same. Bodies, the number of requests and the time in which
// a client has to send and to take are bounded.
package admin

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/berthd/berth/cri/admin/api"
	"github.com/berthd/berth/imageservice"
)

// Images are the images of the node.
type Images interface {
	Get(ref string) (imageservice.Image, error)
	List() []imageservice.Image
	Remove(ctx context.Context, ref string) error
	Pin(ref string, pinned bool) (imageservice.Image, error)
}

// Puller fetches images.
type Puller interface {
	Pull(ctx context.Context, ref string, auth *imageservice.Auth) (imageservice.Image, error)
	Pulls() []imageservice.PullProgress
	Explain(ctx context.Context, ref string, probe bool) (imageservice.Plan, error)
}

// Importer takes images from archives.
type Importer interface {
	Import(ctx context.Context, f *os.File, o imageservice.ImportOptions) ([]imageservice.Image, error)
	ImportStream(ctx context.Context, r io.Reader, o imageservice.ImportOptions) ([]imageservice.Image, error)
}

// Exporter writes images to archives.
type Exporter interface {
	Export(ctx context.Context, w io.Writer, refs []string, o imageservice.ExportOptions) error
}

// Verifier finds out whether images are whole.
type Verifier interface {
	Verify(ctx context.Context, refs []string, o imageservice.VerifyOptions) (imageservice.VerifyResult, error)
}

// Inspection is a look at the node. It tells of each finding as soon as it is known,
// and mended if it is to be; its error is about the look.
type Inspection func(ctx context.Context, mend bool, tell func(api.Finding)) error

// Deps is what the server asks. All are required.
type Deps struct {
	Images   Images
	Puller   Puller
	Importer Importer
	Exporter Exporter
	Verifier Verifier
	// Leaks tells of what nobody on the node owns, and with fix removes it.
	Leaks Inspection
	// Check tells of what is not as the book has it, and with repair puts it right.
	Check Inspection
	// Ops lists what is under way in the daemon, pulls left out.
	Ops func() []api.Op
	// Config returns the configuration in force: its values by key, and as a file.
	Config func() (values map[string]any, toml string)
	// Version is berth's own.
	Version string
}

const (
	maxRequests = 64 // at the same time, on as many connections
	maxWork     = 8  // of them long ones
	// sendTimeout is how long a client may take to accept what is written.
	sendTimeout = 30 * time.Second
	// askTimeout is how long a request that is not work may take.
	askTimeout = time.Minute
	// reportEvery is how often work tells of its progress.
	reportEvery = 200 * time.Millisecond
)

// Server answers requests. Make it with New.
type Server struct {
	deps Deps
	mux  *http.ServeMux
	work chan struct{} // one for each work that runs
}

// New returns a server; Serve makes it reachable.
func New(deps Deps) (*Server, error) {
	if deps.Images == nil || deps.Puller == nil || deps.Importer == nil || deps.Exporter == nil || deps.Verifier == nil || deps.Ops == nil || deps.Leaks == nil || deps.Check == nil || deps.Config == nil {
		return nil, errors.New("admin server: a service behind it is missing")
	}
	s := &Server{deps: deps, mux: http.NewServeMux(), work: make(chan struct{}, maxWork)}
	s.routes()
	return s, nil
}

// ServeHTTP implements http.Handler.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) { s.mux.ServeHTTP(w, r) }

// Serve answers on l until ctx ends, and closes l.
func (s *Server) Serve(ctx context.Context, l *net.UnixListener) error {
	hs := &http.Server{
		Handler: s, ReadHeaderTimeout: 10 * time.Second, IdleTimeout: time.Minute, MaxHeaderBytes: 16 << 10,
		BaseContext: func(net.Listener) context.Context { return ctx },
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			if c, ok := c.(*counted); ok {
				ctx = context.WithValue(ctx, peerKey{}, c.pid)
			}
			return ctx
		},
	}
	defer context.AfterFunc(ctx, func() { _ = hs.Close() })()
	err := hs.Serve(&rootOnly{UnixListener: l, ctx: ctx, slots: make(chan struct{}, maxRequests)})
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}

// peerKey is the key of a request's context under which the client's process ID is.
type peerKey struct{}

// rootOnly accepts root's connections, and as many at a time as there are slots.
type rootOnly struct {
	*net.UnixListener
	ctx   context.Context
	slots chan struct{}
}

// Accept implements net.Listener.
func (l *rootOnly) Accept() (net.Conn, error) {
	for {
		select {
		case l.slots <- struct{}{}:
		case <-l.ctx.Done():
			return nil, net.ErrClosed
		}
		c, err := l.AcceptUnix()
		if err != nil {
			<-l.slots
			return nil, err
		}
		peer, err := credentials(c)
		if err == nil && peer.Uid == 0 {
			return &counted{UnixConn: c, pid: int(peer.Pid), slots: l.slots}, nil
		}
		klog.FromContext(l.ctx).Info("Admin connection turned away", "err", err, "peer", peer)
		_ = c.Close()
		<-l.slots
	}
}

// credentials are those of the process that connected (unix(7), SO_PEERCRED).
func credentials(c *net.UnixConn) (*unix.Ucred, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	var peer *unix.Ucred
	var failed error
	err = raw.Control(func(fd uintptr) { peer, failed = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	return peer, errors.Join(err, failed)
}

// counted is a connection that gives its slot back when it is closed.
type counted struct {
	*net.UnixConn
	pid   int
	slots chan struct{}
	once  sync.Once
}

// Close implements net.Conn.
func (c *counted) Close() error {
	err := c.UnixConn.Close()
	c.once.Do(func() { <-c.slots })
	return err
}
