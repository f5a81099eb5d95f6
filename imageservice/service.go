package imageservice

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containers/image/v5/signature"
	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/berthd/berth/snapshotter"
	"github.com/berthd/berth/store"
)

// Service keeps the images. All methods may be called at any time, until Close.
type Service struct {
	cfg  Config
	book *store.Store
	sn   snapshotter.Snapshotter

	view      atomic.Pointer[view]
	fs        atomic.Pointer[FsUsage]
	pinned    atomic.Pointer[[]string]
	search    atomic.Pointer[shortNames]
	policy    atomic.Pointer[signature.Policy]
	inUse     atomic.Pointer[func() map[string]bool]
	slots     chan struct{} // one for each layer that may be unpacked now
	chains    chains
	manifests manifests
	run       int64        // tells the extraction keys of this process from those of another
	sequence  atomic.Int64 // of extraction keys
	wg        sync.WaitGroup
	gcMu      sync.Mutex // one collection at a time
	reloadMu  sync.Mutex
	seen      string        // fingerprint of the files of the last reload; guarded by reloadMu
	done      chan struct{} // closed by Close

	rangeBytes int64                 // the constant, but for tests
	short      func(dir string) bool // the function, but for tests
	lookUps    chan struct{}         // one for each lookup of credentials that runs

	// commitMu orders changes to the book's image rows and the view with them.
	commitMu sync.Mutex

	// mu guards what follows.
	mu         sync.Mutex
	closed     bool
	retrying   bool // a collection that failed
	pulls      map[pullKey]*pull
	trim       *time.Timer        // runs trimNow; nil before the first pull
	flights    map[string]*flight // by chain ID
	extracting map[string]bool    // snapshot keys in use
	damaged    map[string]string  // chain ID -> reason; a copy of damagedRows
}

// New reads the images from the book. It removes what a crash left behind: unfinished
// extractions, layers that no image needs, and images whose layers are not all there.
// The book and the snapshotter stay the caller's; they must outlive Close.
func New(ctx context.Context, cfg Config, st *store.Store, sn snapshotter.Snapshotter) (*Service, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	s := &Service{
		cfg: cfg, book: st, sn: sn, slots: make(chan struct{}, cfg.MaxConcurrentLayers), run: time.Now().UnixNano(),
		done: make(chan struct{}), rangeBytes: rangeBytes, short: short, lookUps: make(chan struct{}, maxLookUps),
		pulls: map[pullKey]*pull{}, flights: map[string]*flight{}, extracting: map[string]bool{},
		chains: chains{held: map[string]int{}, condemned: map[string]chan struct{}{}},
	}
	if s.manifests, err = newManifests(cfg.ManifestsDir); err != nil {
		return nil, err
	}
	s.pinned.Store(&cfg.PinnedImages)
	if cfg.Observe {
		s.search.Store(&shortNames{})
	} else if err := s.Reload(); err != nil {
		return nil, err
	}
	rows, err := load(st)
	if err != nil {
		return nil, err
	}
	s.view.Store(newView(rows, cfg.PinnedImages))
	if cfg.Observe {
		return s, nil
	}
	if err := s.recover(ctx); err != nil {
		return nil, err
	}
	return s, s.measure(ctx)
}

// Close ends the pulls that run, waits until they have cleaned up, and refuses new ones.
func (s *Service) Close() error {
	s.mu.Lock()
	if !s.closed {
		close(s.done)
	}
	s.closed = true
	if s.trim != nil {
		s.trim.Stop()
	}
	for _, p := range s.pulls {
		p.cancel(ErrClosed)
	}
	s.mu.Unlock()
	s.wg.Wait()
	return s.noteClosed()
}

// Get returns the image that ref means: an ID ("sha256:<hex>", the hex alone, or a
// unique beginning of at least 12 digits), or a name in any form that Pull takes. Errors:
// ErrNotFound, ErrInvalidReference.
func (s *Service) Get(ref string) (Image, error) {
	v := s.view.Load()
	id, err := v.find(ref, *s.search.Load())
	if err != nil {
		return Image{}, err
	}
	return v.images[id], nil
}

// List returns all images, sorted by ID. The slice is the caller's.
func (s *Service) List() []Image { return slices.Clone(s.view.Load().list) }

// FsUsage returns what the layers take, as of the last change.
func (s *Service) FsUsage() (FsUsage, error) {
	u := *s.fs.Load()
	u.At = time.Now() // nothing changed since, or it would have been measured
	var err error
	u.Writable, err = s.writable()
	return u, err
}

// writable is the file system of writable layers, nil if it is that of the layers.
func (s *Service) writable() (*FsUsage, error) {
	if s.cfg.SnapshotsDir == "" {
		return nil, nil
	}
	var layers, snapshots unix.Stat_t
	if err := unix.Stat(s.cfg.LayersDir, &layers); err != nil {
		return nil, fmt.Errorf("images: usage: %w", &os.PathError{Op: "stat", Path: s.cfg.LayersDir, Err: err})
	}
	if err := unix.Stat(s.cfg.SnapshotsDir, &snapshots); err != nil {
		return nil, fmt.Errorf("images: usage: %w", &os.PathError{Op: "stat", Path: s.cfg.SnapshotsDir, Err: err})
	}
	if layers.Dev == snapshots.Dev {
		return nil, nil
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(s.cfg.SnapshotsDir, &fs); err != nil {
		return nil, fmt.Errorf("images: usage: %w", &os.PathError{Op: "statfs", Path: s.cfg.SnapshotsDir, Err: err})
	}
	return &FsUsage{
		Mountpoint: s.cfg.SnapshotsDir, At: time.Now(),
		Bytes: (fs.Blocks - fs.Bfree) * uint64(fs.Frsize), Inodes: fs.Files - fs.Ffree,
	}, nil
}

// SetInUse names the function that tells which images containers use, by ID. Removing
// such an image drops its names, and its layers stay for as long as it is in use. The
// function is called without locks held that its caller could want.
func (s *Service) SetInUse(f func() map[string]bool) { s.inUse.Store(&f) }

func (s *Service) used() map[string]bool {
	if f := s.inUse.Load(); f != nil {
		return (*f)()
	}
	return nil
}

// SetPinned replaces Config.PinnedImages.
func (s *Service) SetPinned(patterns []string) error {
	cfg := s.cfg
	cfg.PinnedImages = slices.Clone(patterns)
	if err := cfg.validate(); err != nil {
		return err
	}
	s.commitMu.Lock()
	defer s.commitMu.Unlock()
	s.pinned.Store(&cfg.PinnedImages)
	s.view.Store(newView(s.view.Load().rows, cfg.PinnedImages))
	return nil
}

// measure adds up what the snapshotter stored about each layer.
func (s *Service) measure(ctx context.Context) error {
	u := FsUsage{Mountpoint: s.cfg.LayersDir, At: time.Now()}
	var names []string
	err := s.sn.Walk(ctx, func(_ context.Context, i snapshotter.Info) error {
		if i.Kind == snapshotter.KindCommitted {
			names = append(names, i.Name)
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("images: usage: %w", err)
	}
	for _, n := range names {
		l, err := s.sn.Usage(ctx, n)
		if errors.Is(err, snapshotter.ErrNotFound) {
			continue // removed meanwhile
		}
		if err != nil {
			return fmt.Errorf("images: usage: %w", err)
		}
		u.Bytes += uint64(max(l.Size, 0))
		u.Inodes += uint64(max(l.Inodes, 0))
	}
	s.fs.Store(&u)
	return nil
}

// remeasure is measure after a change that succeeded: an error here changes nothing of that.
func (s *Service) remeasure(ctx context.Context) {
	if err := s.measure(ctx); err != nil {
		klog.FromContext(ctx).Error(err, "Image file system usage not updated")
	}
}
