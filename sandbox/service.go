package sandbox

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"k8s.io/klog/v2"
	"tags.cncf.io/container-device-interface/pkg/cdi"

	"github.com/berthd/berth/sandbox/cgroup"
	"github.com/berthd/berth/sandbox/spec"
)

// Service runs pods and containers. Its methods may be called concurrently.
type Service struct {
	cfg      Config
	deps     Deps
	book     *book
	ops      *ops
	live     *live
	runtimes map[string]ociRuntime
	hier     cgroup.Hierarchy
	host     spec.Host
	oomFloor int
	initDir  string // root file system of the pods' init containers
	appArmor *appArmor
	userNS   userNSSupport
	cdi      *cdi.Cache // nil when it is off
	stats    *statsCache
	forwards *forwards

	// ctx is the life of background work; closing ends it.
	ctx    context.Context
	cancel context.CancelFunc
	bg     sync.WaitGroup
	wake   chan struct{} // the janitor has something to do

	missed  sync.Map    // IDs of containers that ended while no daemon ran
	undo    sync.Map    // IDs of objects whose destroy failed
	resweep atomic.Bool // a shim was killed in the middle of its work
	updates turns       // by ID: updates of one container take turns
}

// New reads the book, finds out what has become of everything in it and takes
// charge of what runs. When it returns, lists and states are right; what is left
// of half-made objects is being removed in the background. ctx carries the
// logger and bounds New itself.
func New(ctx context.Context, cfg Config, deps Deps) (*Service, error) {
	if cfg.BootID == "" {
		id, err := bootID()
		if err != nil {
			return nil, fmt.Errorf("sandbox: %w", err)
		}
		cfg.BootID = id
	}
	if err := cfg.complete(); err != nil {
		return nil, fmt.Errorf("sandbox: %w", err)
	}
	s := &Service{cfg: cfg, deps: deps, book: newBook(deps.Store), ops: newOps(), live: newLive(),
		runtimes: map[string]ociRuntime{}, stats: newStatsCache(), forwards: newForwards(), appArmor: newAppArmor(), wake: make(chan struct{}, 1)}
	s.ctx, s.cancel = context.WithCancel(context.WithoutCancel(ctx))
	if err := s.prepare(); err != nil {
		s.cancel()
		return nil, fmt.Errorf("sandbox: %w", err)
	}
	if err := s.recover(ctx); err != nil {
		s.cancel()
		return nil, fmt.Errorf("sandbox: recovery: %w", err)
	}
	s.firstVerdicts(ctx)
	if deps.Plugins != nil {
		s.bg.Go(func() { deps.Plugins.Serve(s.ctx, pluginNode{s}) })
	}
	s.bg.Go(func() { s.janitor(s.ctx) })
	return s, nil
}

// prepare makes the directories and looks at the machine.
func (s *Service) prepare() error {
	probes, err := filepath.Glob(filepath.Join(s.cfg.StateDir, "probe-*"))
	if err != nil {
		return err
	}
	for _, d := range append(probes, s.consoleDir()) { // of a daemon that was killed
		if err := os.RemoveAll(d); err != nil {
			return err
		}
	}
	for _, d := range []string{
		filepath.Join(s.cfg.StateDir, "containers"), s.cfg.RunDir, s.consoleDir(),
		filepath.Join(s.cfg.RunDir, "pods"), filepath.Join(s.cfg.RunDir, "c"), filepath.Join(s.cfg.RunDir, "s"),
	} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return err
		}
	}
	for name, r := range s.cfg.Runtimes {
		root := r.Root
		if root == "" {
			root = filepath.Join(s.cfg.RunDir, "oci", name)
		}
		if err := os.MkdirAll(root, 0o700); err != nil {
			return err
		}
		s.runtimes[name] = ociRuntime{prober: newProber(s.ctx, name, r.Path), root: root, driver: cmp.Or(r.CgroupDriver, s.cfg.CgroupDriver)}
		s.runtimes[name].refresh()
	}
	if s.hier, err = cgroup.Detect(); err != nil {
		return err
	}
	if s.host, err = hostFacts(s.hier); err != nil {
		return err
	}
	s.oomFloor = oomScoreFloor()
	if s.cdi, err = newCDI(s.cfg.CDISpecDirs); err != nil {
		return err
	}
	s.initDir, err = installInit(filepath.Join(s.cfg.RunDir, "init"), s.cfg.InitBinary)
	return err
}

// Close ends the service. Pods and containers stay as they are: nothing is
// stopped, and shims go on. Operations under way are waited for until ctx ends.
func (s *Service) Close(ctx context.Context) error {
	err := s.ops.close(ctx)
	s.cancel()
	s.book.events.close()
	s.live.closeAll()
	s.bg.Wait()
	return err
}

// Ops lists the operations under way, the oldest first.
func (s *Service) Ops() []Op { return s.ops.list() }

// CgroupDriver is "cgroupfs" or "systemd".
func (s *Service) CgroupDriver() string { return s.cfg.CgroupDriver }

// ImagesInUse is the set of the IDs of images that containers were made from.
func (s *Service) ImagesInUse() map[string]bool {
	used := map[string]bool{}
	for _, c := range s.book.view().containers {
		for _, id := range c.images() {
			used[id] = true
		}
	}
	return used
}

// cleanup returns a context for undoing something after ctx may have ended.
func cleanup(ctx context.Context, limit time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), limit)
}

func logFor(ctx context.Context, kv ...any) (klog.Logger, context.Context) {
	log := klog.FromContext(ctx).WithValues(kv...)
	return log, klog.NewContext(ctx, log)
}

func stack() string { return string(debug.Stack()) }

// bootID reads the kernel's identifier of this boot.
func bootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("boot ID: %w", err)
	}
	if len(b) < 36 {
		return "", fmt.Errorf("boot ID: %q is too short", b)
	}
	return string(b[:36]), nil
}
