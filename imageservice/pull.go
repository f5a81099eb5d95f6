package imageservice

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"github.com/containers/image/v5/docker/reference"
	"k8s.io/klog/v2"

	"github.com/berthd/berth/snapshotter"
)

// errOrphaned ends a pull for which nobody waits.
var errOrphaned = errors.New("nobody waits for the pull any more")

// pullKey tells pulls apart: callers with other credentials must not profit from, or fail
// with, those of the first.
type pullKey struct {
	ref  string
	auth [sha256.Size]byte
}

// pull is a flight: one pull and all who wait for it.
type pull struct {
	ref    string // as the first caller wrote it
	done   chan struct{}
	cancel context.CancelCauseFunc
	began  time.Time

	// Valid once done is closed.
	image Image
	err   error

	// Guarded by Service.mu.
	waiters int
	orphan  *time.Timer

	mu      sync.Mutex
	named   string // the full name that is being tried
	stage   string
	stageAt time.Time
	problem string // the last that was got over
	records []*layerRecord
	shared  []bool // the layer's record is another pull's
}

// reach is enter for a stage that tests can make fail.
func (p *pull) reach(ctx context.Context, stage string) error {
	p.enter(stage)
	return failpoint(ctx, verbPull, stage)
}

func (p *pull) enter(stage string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.stage, p.stageAt = stage, time.Now()
}

// begin notes that a name is tried; what was noted about the one before is forgotten.
func (p *pull) begin(name string) {
	p.enter(stageManifest)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.named, p.records, p.shared = name, nil, nil
}

func (p *pull) trouble(what string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.problem = what
}

// track lists the layers, of which nothing is known yet.
func (p *pull) track(layers []layerRow) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.records, p.shared = make([]*layerRecord, len(layers)), make([]bool, len(layers))
	for i, l := range layers {
		p.records[i] = newLayerRecord(l.Digest, l.Size)
	}
}

// follow names who makes a layer.
func (p *pull) follow(i int, r *layerRecord, shared bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.records[i], p.shared[i] = r, shared
}

// The operations whose steps are failpoints.
const (
	verbPull   = "pull image"
	verbLayer  = "pull layer"
	verbRemove = "remove image"
)

// The stages of a pull.
const (
	stageManifest = "manifest"
	stagePolicy   = "policy"
	stageConfig   = "config"
	stageLayers   = "layers"
	stageSync     = "sync"
	stageCommit   = "commit"
)

// Pull fetches the image that ref names and returns it once it is complete and durable.
// A pull with the same reference and credentials that runs already is joined. The pull
// does not end with ctx: a caller whose ctx ends gets an error that wraps the cause and
// names the stage and its age, while the pull goes on for as long as somebody waits and
// for OrphanTimeout longer, within PullTimeout. auth may be nil.
func (s *Service) Pull(ctx context.Context, ref string, auth *Auth) (Image, error) {
	s.refresh(ctx)
	names, err := s.search.Load().toPull(ref)
	if err != nil {
		return Image{}, err
	}
	p, err := s.join(ctx, ref, names, auth)
	if err != nil {
		return Image{}, err
	}
	select {
	case <-p.done:
		return p.image, p.err
	case <-ctx.Done():
		s.leave(p)
		return Image{}, fmt.Errorf("pull of image %q goes on without its caller, %s: %w", ref, p.progress().where(), context.Cause(ctx))
	}
}

// join finds the running pull or starts one.
func (s *Service) join(ctx context.Context, ref string, names []candidate, auth *Auth) (*pull, error) {
	key := pullKey{ref: names[0].named.String()}
	if auth != nil {
		b, err := json.Marshal(auth)
		if err != nil {
			return nil, err
		}
		key.auth = sha256.Sum256(b)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, ErrClosed
	}
	p := s.pulls[key]
	if p == nil {
		p = &pull{ref: ref, done: make(chan struct{}), began: time.Now()}
		p.begin(key.ref)
		own, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
		p.cancel = cancel
		s.pulls[key] = p
		s.wg.Add(1)
		go s.fly(own, key, p, names, auth)
	}
	p.waiters++
	if p.orphan != nil {
		p.orphan.Stop()
		p.orphan = nil
	}
	return p, nil
}

func (s *Service) leave(p *pull) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if p.waiters--; p.waiters == 0 {
		p.orphan = time.AfterFunc(s.cfg.OrphanTimeout, func() { p.cancel(errOrphaned) })
	}
}

// fly runs a pull to its end and tells all who wait.
func (s *Service) fly(ctx context.Context, key pullKey, p *pull, names []candidate, auth *Auth) {
	defer s.wg.Done()
	ctx, stop := context.WithTimeoutCause(ctx, s.cfg.PullTimeout,
		fmt.Errorf("pull took longer than %s: %w", s.cfg.PullTimeout, context.DeadlineExceeded))
	log := klog.FromContext(ctx).WithValues("reference", p.ref)
	ctx = klog.NewContext(ctx, log)
	log.V(2).Info("Pull begins")
	p.image, p.err = s.tryAll(ctx, p, names, auth)
	if p.err == nil {
		p.err = failpoint(ctx, verbPull, "answer")
	}
	stop()
	p.cancel(nil)
	if p.err != nil {
		log.V(2).Info("Pull ends with an error", "took", time.Since(p.began), "err", p.err)
	} else {
		log.V(2).Info("Pull done", "took", time.Since(p.began), "image", p.image.ID)
	}
	s.mu.Lock()
	s.forgetPullLocked(key)
	if p.orphan != nil {
		p.orphan.Stop()
	}
	s.mu.Unlock()
	close(p.done)
}

// tryAll goes through the registries that a short name may be at. What counts as the
// failure is that of the first registry that has the image or refuses to tell.
func (s *Service) tryAll(ctx context.Context, p *pull, names []candidate, auth *Auth) (img Image, err error) {
	defer func() {
		if v := recover(); v != nil {
			klog.FromContext(ctx).Error(nil, "Panic in a pull", "panic", v, "stack", string(debug.Stack()))
			err = fmt.Errorf("image %q: panic: %v: %w", p.ref, v, ErrInvalidImage)
		}
	}()
	var errs []error
	for _, c := range names {
		named := c.named
		p.begin(named.String())
		img, err := s.pullFrom(ctx, p, named, auth)
		if err == nil {
			return img, nil
		}
		errs = append(errs, fmt.Errorf("image %q: registry %s: %w", named.String(), reference.Domain(named), classify(because(ctx, err))))
		if ctx.Err() != nil {
			break
		}
	}
	return Image{}, errors.Join(errs...)
}

// pullFrom is the pull of one full reference: its stages in order.
func (s *Service) pullFrom(ctx context.Context, p *pull, named reference.Named, auth *Auth) (Image, error) {
	plan, err := s.resolve(ctx, p, named, auth)
	if err != nil {
		return Image{}, err
	}
	defer plan.src.Close()
	return s.complete(ctx, p, plan)
}

// complete makes the layers of a plan and then the image visible.
func (s *Service) complete(ctx context.Context, p *pull, plan *plan) (Image, error) {
	release, err := s.chains.hold(ctx, plan.chainIDs())
	if err != nil {
		return Image{}, err
	}
	defer release()
	// Layers that a visible image has are durable. Others may come from a pull that
	// has not synced yet, so that finding them here is not enough.
	damaged := s.damagedOf(plan.chainIDs())
	durable := len(damaged) == 0
	for _, c := range plan.chainIDs() {
		durable = durable && s.view.Load().chains[c]
	}
	if err := s.makeDurable(ctx, p, plan, durable, damaged); err != nil {
		return Image{}, err
	}
	if len(damaged) > 0 {
		if err := errors.Join(s.clearDamaged(damaged), s.unhide(ctx)); err != nil {
			return Image{}, err
		}
	}
	if err := p.reach(ctx, stageCommit); err != nil {
		return Image{}, err
	}
	return s.makeVisible(ctx, plan)
}

// makeDurable makes the layers of a plan, of which those that are damaged anew, and syncs
// unless they were durable before.
func (s *Service) makeDurable(ctx context.Context, p *pull, plan *plan, durable bool, damaged []string) error {
	var watch snapshotter.Watch
	if syncer, ok := s.sn.(snapshotter.Syncer); ok && !durable {
		w, err := syncer.Watch()
		if err != nil {
			return err
		}
		defer w.Close()
		watch = w
	}
	if err := p.reach(ctx, stageLayers); err != nil {
		return err
	}
	if err := s.fetchLayers(ctx, p, plan); err != nil {
		return err
	}
	if watch == nil {
		return nil
	}
	if err := p.reach(ctx, stageSync); err != nil {
		return err
	}
	if err := watch.Sync(ctx); err != nil {
		if !errors.Is(err, ctx.Err()) {
			err = errors.Join(err, s.distrustLayers(context.WithoutCancel(ctx), plan.chainIDs()))
		}
		return err
	}
	for _, c := range s.damagedOf(plan.chainIDs()) {
		if !slices.Contains(damaged, c) {
			return fmt.Errorf("layer %s: %w", c, errLost)
		}
	}
	return nil
}

// errLost: the sync of another pull, which shares a layer, was told of an error.
var errLost = errors.New("some of it may not have reached the disk")

// distrustLayers sees to it that layers that no image has are made anew by the next pull,
// as what was written of them may be lost: those of a plan, and those that other pulls make
// or have left behind, as the kernel does not tell whose write failed and tells only once.
// Nothing of that need be in the book: the next start removes such layers.
func (s *Service) distrustLayers(ctx context.Context, chains []string) error {
	chains = slices.Clone(chains)
	s.mu.Lock()
	for c := range s.flights { // before the walk, which does not see what is not committed
		chains = append(chains, c)
	}
	s.mu.Unlock()
	err := s.sn.Walk(ctx, func(_ context.Context, i snapshotter.Info) error {
		if i.Kind == snapshotter.KindCommitted {
			chains = append(chains, i.Name)
		}
		return nil
	})
	durable := s.view.Load().chains
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range chains {
		if !durable[c] {
			s.damaged[c] = "a sync failed"
		}
	}
	return err
}

// makeVisible writes the image's row and takes its names away from other images, all in
// one transaction.
func (s *Service) makeVisible(ctx context.Context, plan *plan) (Image, error) {
	size, err := s.sizeOf(ctx, plan.chainIDs())
	if err != nil {
		return Image{}, err
	}
	tags, digests := plan.names()
	s.commitMu.Lock()
	defer s.commitMu.Unlock()
	v := s.view.Load()
	ids := []string{plan.id}
	for id, r := range v.rows { // hidden ones as well
		if id != plan.id && slices.ContainsFunc(r.names(), func(n string) bool { return slices.Contains(tags, n) || slices.Contains(digests, n) }) {
			ids = append(ids, id)
		}
	}
	err = s.commitLocked(ids, func(id string, old *imageRow) *imageRow {
		if id != plan.id {
			r := *old
			r.Tags, r.Digests = without(old.Tags, tags), without(old.Digests, digests)
			return &r
		}
		r := plan.row()
		r.Size, r.Pulled = size, time.Now()
		if old != nil {
			r.Tags, r.Digests, r.Pinned = old.Tags, old.Digests, old.Pinned
			if !old.Dropped {
				r.Pulled = old.Pulled
			}
		}
		r.Pinned = r.Pinned || plan.pin
		r.Tags, r.Digests = union(r.Tags, tags), union(r.Digests, digests)
		return r
	}, plan.blobs())
	if err != nil {
		return Image{}, err
	}
	s.remeasure(ctx)
	return s.view.Load().images[plan.id], nil
}

// sizeOf adds up what the layers take on disk. The kubelet reports and frees by this
// number; as no compressed blob is kept, it is all that an image takes.
func (s *Service) sizeOf(ctx context.Context, chainIDs []string) (uint64, error) {
	var size uint64
	for _, c := range chainIDs {
		u, err := s.sn.Usage(ctx, c)
		if err != nil {
			return 0, err
		}
		size += uint64(max(u.Size, 0))
	}
	return size, nil
}

func union(a, b []string) []string {
	out := slices.Concat(a, b)
	slices.Sort(out)
	return slices.Compact(out)
}

func without(a, b []string) []string {
	return slices.DeleteFunc(slices.Clone(a), func(s string) bool { return slices.Contains(b, s) })
}
