package sandbox

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"runtime/debug"
	"strings"
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
	ids      idKey
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

	missed  sync.Map        // IDs of containers that ended while no daemon ran
	undo    sync.Map        // IDs of objects whose destroy failed
	resweep atomic.Bool     // a shim was killed in the middle of its work
	sweepMu sync.Mutex      // one sweep at a time
	swept   chan struct{}   // closed after the first try to sweep
	noted   map[string]bool // see observeBook; does not change
	updates turns           // by ID: updates of one container take turns
	reached reached         // shims that were there at the start
	probed  firstVerdicts   // nil if nothing is probed
}

// New reads the book, finds out what has become of everything in it and takes
// charge of what runs. When it returns, lists and states are right; what is left
// of half-made objects is being removed in the background. ctx carries the
// logger and bounds New itself.
func New(ctx context.Context, cfg Config, deps Deps) (*Service, error) {
	if cfg.BootID == "" {
		id, err := BootID()
		if err != nil {
			return nil, fmt.Errorf("sandbox: %w", err)
		}
		cfg.BootID = id
	}
	if err := cfg.complete(); err != nil {
		return nil, fmt.Errorf("sandbox: %w", err)
	}
	s := &Service{cfg: cfg, deps: deps, book: newBook(deps.Store), ops: newOps(), live: newLive(),
		runtimes: map[string]ociRuntime{}, stats: newStatsCache(), forwards: newForwards(), appArmor: newAppArmor(), wake: make(chan struct{}, 1), swept: make(chan struct{})}
	s.ctx, s.cancel = context.WithCancel(context.WithoutCancel(ctx))
	prepare := s.prepare
	if cfg.Observe {
		prepare = s.observeBook
	}
	if err := prepare(); err != nil {
		s.cancel()
		return nil, fmt.Errorf("sandbox: %w", err)
	}
	if cfg.Observe {
		return s, nil
	}
	s.probed = make(firstVerdicts)
	s.bg.Go(func() { s.probe(s.ctx) })
	if err := s.recover(ctx); err != nil {
		s.cancel()
		return nil, fmt.Errorf("sandbox: recovery: %w", err)
	}
	if deps.Plugins != nil {
		s.bg.Go(func() { deps.Plugins.Serve(s.ctx, pluginNode{s}) })
	}
	s.bg.Go(s.greetAll)
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
	if s.ids, err = openIDKey(s.deps.Store, s.cfg.StateDir); err != nil {
		klog.FromContext(s.ctx).Error(err, "What bears IDs of this run will not be recognized by the next one")
	}
	if err := s.look(); err != nil {
		return err
	}
	for _, r := range s.runtimes {
		if err := os.MkdirAll(r.root, 0o700); err != nil {
			return err
		}
		r.refresh()
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

// look finds the OCI runtimes' state and the control groups.
func (s *Service) look() (err error) {
	for name, r := range s.cfg.Runtimes {
		root := cmp.Or(r.Root, filepath.Join(s.cfg.RunDir, "oci", name))
		s.runtimes[name] = ociRuntime{prober: newProber(s.ctx, name, r.Path), root: root, driver: cmp.Or(r.CgroupDriver, s.cfg.CgroupDriver)}
	}
	s.hier, err = cgroup.Detect()
	return err
}

// observeBook is prepare and recover for Config.Observe. IDs of rows that cannot be
// read and whose notes can are noted: the next daemon will restore them.
func (s *Service) observeBook() (err error) {
	// A key cannot be made in a book that is only read: then no ID is recognized.
	s.ids, _ = openIDKey(s.deps.Store, s.cfg.StateDir)
	if err := s.look(); err != nil {
		return err
	}
	if s.initDir, err = initDirOf(filepath.Join(s.cfg.RunDir, "init"), s.cfg.InitBinary); err != nil {
		return err
	}
	if err := s.book.load(); err != nil {
		return err
	}
	s.noted = map[string]bool{}
	for _, q := range s.deps.Store.Quarantined() {
		if validID(q.Key) && (exists(s.podFile(q.Key, noteFile)) || exists(filepath.Join(s.bundleDir(q.Key), noteFile))) {
			s.noted[q.Key] = true
		}
	}
	return nil
}

// Settle waits until the first sweep after the start was tried, or ctx has ended.
func (s *Service) Settle(ctx context.Context) error {
	select {
	case <-s.swept:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("first sweep: %w", ctx.Err())
	}
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

// Ops lists the operations and the background work under way, the oldest first.
func (s *Service) Ops() []Op {
	list := s.ops.list()
	for i := range list {
		list[i].Object, list[i].Name = s.describe(list[i].Object)
	}
	return list
}

// describe takes the key of an operation's object apart: an ID; what podKey or
// containerKey made; an ID and what an update asks for.
func (s *Service) describe(key string) (object, name string) {
	key, _, _ = strings.Cut(key, " ")
	parts := strings.Split(key, "/")
	switch {
	case len(parts) == 1:
		return key, s.NameOf(key)
	case validID(parts[0]):
		return key, path.Join(s.NameOf(parts[0]), parts[1])
	}
	return key, path.Join(parts[0], parts[1])
}

// NameOf is the name by which people know a pod ("namespace/name") or a container
// ("namespace/pod/name"), "" if the ID is not in the book.
func (s *Service) NameOf(id string) string { return s.book.view().nameOf(id) }

func (v *view) nameOf(id string) string {
	if p := v.pods[id]; p != nil {
		return p.fullName()
	}
	c := v.containers[id]
	if c == nil {
		return ""
	}
	name := c.config.GetMetadata().GetName()
	if p := v.pods[c.PodID]; p != nil {
		name = p.fullName() + "/" + name
	}
	return name
}

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

// BootID reads the kernel's identifier of this boot.
func BootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("boot ID: %w", err)
	}
	if len(b) < 36 {
		return "", fmt.Errorf("boot ID: %q is too short", b)
	}
	return string(b[:36]), nil
}
