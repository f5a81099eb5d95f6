package imageservice

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/berthd/berth/snapshotter"
)

// Remove takes from an image the names that ref means (see namesMeant), and with the last
// one, or if ref is its ID, removes the image and frees the layers that nothing else
// needs. ErrNotFound when there is none. A layer that cannot be removed now is tried again
// until it can. What the layers took on disk is freed in the background,
// and Remove waits for that only where the disk is short: see settle.
func (s *Service) Remove(ctx context.Context, ref string) error {
	used := s.used()
	if err := failpoint(ctx, verbRemove, "drop"); err != nil {
		return err
	}
	id, left, err := s.dropImage(ref, used)
	if err != nil {
		return err
	}
	log := klog.FromContext(ctx).WithValues("image", id, "reference", ref)
	if len(left) > 0 {
		log.V(2).Info("Name of image removed", "left", left)
		return failpoint(ctx, verbRemove, "answer")
	}
	log.V(2).Info("Image removed", "inUse", used[id])
	// The caller's deadline is no reason to leave layers behind.
	freed, err := s.gcOrRetry(context.WithoutCancel(ctx))
	if err != nil {
		log.Error(err, "Layers of a removed image left for the next sweep")
	}
	s.settle(ctx, freed)
	return failpoint(ctx, verbRemove, "answer")
}

// shortOf is the part of blocks, or of inodes, below which a disk is short. The kubelet
// looks at the disk as soon as a removal is answered, and evicts pods if that has not
// helped; it does so from 15 % downwards unless told otherwise.
const shortOf = 0.25

// settle waits until what was removed is free again, if the disk is short, for as long as
// a caller in a hurry gets an answer: the image is gone in any case.
func (s *Service) settle(ctx context.Context, freed <-chan struct{}) {
	if !s.short(s.cfg.LayersDir) {
		return
	}
	if deadline, ok := ctx.Deadline(); ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, time.Until(deadline)*3/4)
		defer cancel()
	}
	select {
	case <-freed:
	case <-ctx.Done():
	}
}

// short tells whether the file system of dir is; one that cannot be asked is.
func short(dir string) bool {
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		return true
	}
	return isCrowded(&fs)
}

// isCrowded: a file system that counts no inodes, such as btrfs, says 0.
func isCrowded(fs *unix.Statfs_t) bool {
	return float64(fs.Bavail) < shortOf*float64(fs.Blocks) || float64(fs.Ffree) < shortOf*float64(fs.Files)
}

// dropImage returns the names that the image has left; with none it is gone.
func (s *Service) dropImage(ref string, used map[string]bool) (id string, left []string, err error) {
	s.commitMu.Lock()
	defer s.commitMu.Unlock()
	if id, err = s.findAny(ref); err != nil {
		return "", nil, err
	}
	meant := s.namesMeant(ref, s.view.Load().rows[id])
	return id, left, s.commitLocked([]string{id}, func(_ string, old *imageRow) *imageRow {
		r := *old
		r.Tags, r.Digests = without(old.Tags, meant), without(old.Digests, meant)
		left = r.names()
		switch {
		case len(left) > 0:
		case !used[id]:
			return nil
		default:
			r.Dropped, r.Pinned = true, false
		}
		return &r
	}, nil)
}

// namesMeant are the names of an image that go with ref: all if that is its ID; of a tag
// itself, and with the repository's last tag its repo digests as well; of a repo digest all
// names in its repository.
func (s *Service) namesMeant(ref string, r *imageRow) []string {
	names, err := candidates(ref, *s.search.Load())
	if err != nil || wholeID.MatchString(ref) {
		return r.names()
	}
	for _, n := range names {
		name := n.String()
		ofRepository := func(full string) bool { return repository(full) == n.Name() }
		tags := without(r.Tags, []string{name})
		switch {
		case slices.Contains(r.Digests, name), len(tags) < len(r.Tags) && !slices.ContainsFunc(tags, ofRepository):
			return slices.DeleteFunc(r.names(), func(full string) bool { return !ofRepository(full) })
		case len(tags) < len(r.Tags):
			return []string{name}
		}
	}
	return r.names()
}

// repository is that of a full name, "host/repo:tag" or "host/repo@sha256:…".
func repository(name string) string {
	if repo, _, ok := strings.Cut(name, "@"); ok {
		return repo
	}
	return name[:max(strings.LastIndexByte(name, ':'), 0)]
}

// GC removes layers that no image needs, images that were removed while in use and are
// no longer, and extractions that nobody works on. Layers below a container's snapshot
// stay. While the book may be missing rows no layer is removed. What could not be removed
// is tried again after a while, until Close. It waits for room on the disk as Remove does.
func (s *Service) GC(ctx context.Context) error {
	freed, err := s.gcOrRetry(ctx)
	s.settle(ctx, freed)
	return err
}

// gcOrRetry is gc, and sees to another one if it fails.
func (s *Service) gcOrRetry(ctx context.Context) (freed <-chan struct{}, err error) {
	freed, err = s.gc(ctx)
	if err != nil {
		s.retryGC(ctx)
	}
	return freed, err
}

// gcPause is the time until a collection that failed is tried again, twice as long each
// time up to gcPauseMax.
var gcPause, gcPauseMax = time.Second, time.Minute

// retryGC collects again in the background until it succeeds.
func (s *Service) retryGC(ctx context.Context) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed || s.retrying {
		return
	}
	s.retrying = true
	ctx = context.WithoutCancel(ctx)
	s.wg.Go(func() {
		for pause := gcPause; ; pause = min(2*pause, gcPauseMax) {
			select {
			case <-s.done:
				return
			case <-time.After(pause):
			}
			// Before the try: what fails from here on is for the next one to see.
			s.mu.Lock()
			s.retrying = false
			s.mu.Unlock()
			_, err := s.gc(ctx)
			if err == nil {
				return
			}
			klog.FromContext(ctx).Error(err, "Image garbage not collected yet", "again", min(2*pause, gcPauseMax))
			s.mu.Lock()
			other := s.retrying
			s.retrying = true
			s.mu.Unlock()
			if other {
				return
			}
		}
	})
}

// nothing is the channel of a removal that had nothing to free.
var nothing = func() <-chan struct{} { c := make(chan struct{}); close(c); return c }()

// gc returns the channel that is closed when what it removed is free on disk.
func (s *Service) gc(ctx context.Context) (freed <-chan struct{}, err error) {
	s.gcMu.Lock()
	defer s.gcMu.Unlock()
	freed = nothing
	errs := []error{s.forgetDropped()}
	found, err := s.walk(ctx)
	if err != nil {
		return freed, errors.Join(append(errs, err)...)
	}
	for _, key := range found.extractions {
		if s.isExtracting(key) {
			continue
		}
		errs = append(errs, ignoreGone(s.sn.Remove(ctx, key)))
	}
	if !s.book.Rebuilt() {
		freed, err = s.collect(ctx, found.childrenFirst())
		errs = append(errs, err)
	}
	s.remeasure(ctx)
	if err := errors.Join(errs...); err != nil {
		return freed, fmt.Errorf("image garbage: %w", err)
	}
	return freed, nil
}

// collect removes those of the layers that no image and no pull needs, in one transaction
// if the snapshotter can. Names come children first.
func (s *Service) collect(ctx context.Context, names []string) (freed <-chan struct{}, err error) {
	var doomed, removed []string
	for _, name := range names {
		if s.chains.condemn(name, func() bool { return s.view.Load().chains[name] }) {
			doomed = append(doomed, name)
		}
	}
	defer func() {
		for _, name := range doomed {
			s.chains.absolve(name)
		}
	}()
	freed = nothing
	if len(doomed) == 0 {
		return freed, nil
	}
	if err := failpoint(ctx, verbRemove, "layers"); err != nil {
		return freed, err
	}
	// What is in use is a container's, or below a layer that is held.
	if b, ok := s.sn.(snapshotter.BatchRemover); ok {
		removed, freed, err = b.RemoveAll(ctx, doomed)
	} else {
		removed, err = s.removeEach(ctx, doomed)
	}
	err = errors.Join(err, s.manifests.remove(removed...))
	if len(removed) > 0 {
		klog.FromContext(ctx).V(2).Info("Layers removed", "count", len(removed))
	}
	return freed, err
}

// removeEach is RemoveAll for a snapshotter that has none.
func (s *Service) removeEach(ctx context.Context, names []string) (removed []string, err error) {
	var errs []error
	for _, name := range names {
		err := s.sn.Remove(ctx, name)
		if err == nil {
			removed = append(removed, name)
		} else if !errors.Is(err, snapshotter.ErrInUse) {
			errs = append(errs, ignoreGone(err))
		}
	}
	return removed, errors.Join(errs...)
}

func ignoreGone(err error) error {
	if errors.Is(err, snapshotter.ErrNotFound) {
		return nil
	}
	return err
}

// forgetDropped removes the rows of images that were removed while in use and are no
// longer.
func (s *Service) forgetDropped() error {
	if len(s.dropped()) == 0 {
		return nil
	}
	used := s.used() // before the lock: it is someone else's function
	s.commitMu.Lock()
	defer s.commitMu.Unlock()
	ids := slices.DeleteFunc(s.dropped(), func(id string) bool { return used[id] })
	if len(ids) == 0 {
		return nil
	}
	return s.commitLocked(ids, func(string, *imageRow) *imageRow { return nil }, nil)
}

func (s *Service) dropped() (ids []string) {
	for id, r := range s.view.Load().rows {
		if r.Dropped {
			ids = append(ids, id)
		}
	}
	return ids
}

// found is what the snapshotter holds that belongs to images.
type found struct {
	parents     map[string]string // layer -> parent
	extractions []string
}

func (s *Service) walk(ctx context.Context) (found, error) {
	f := found{parents: map[string]string{}}
	err := s.sn.Walk(ctx, func(_ context.Context, i snapshotter.Info) error {
		switch {
		case i.Kind == snapshotter.KindCommitted:
			f.parents[i.Name] = i.Parent
		case strings.HasPrefix(i.Name, extractPrefix):
			f.extractions = append(f.extractions, i.Name)
		}
		return nil
	})
	if err != nil {
		return f, fmt.Errorf("images: snapshots: %w", err)
	}
	return f, nil
}

// childrenFirst orders layers so that each comes before its parent.
func (f found) childrenFirst() []string {
	depth := make(map[string]int, len(f.parents))
	names := make([]string, 0, len(f.parents))
	for n := range f.parents {
		names = append(names, n)
		for p := f.parents[n]; p != "" && depth[n] <= len(f.parents); p = f.parents[p] {
			depth[n]++
		}
	}
	slices.SortFunc(names, func(a, b string) int {
		if d := depth[b] - depth[a]; d != 0 {
			return d
		}
		return strings.Compare(a, b)
	})
	return names
}

// recover is what New does about an earlier process: images that are not whole are
// dropped, so that they are pulled again instead of failing each container, and all that
// nobody needs is collected.
func (s *Service) recover(ctx context.Context) error {
	f, err := s.walk(ctx)
	if err != nil {
		return err
	}
	clean, err := s.wasClosed()
	if err != nil {
		return err
	}
	if err := s.loadDamaged(func(chain string) bool { _, ok := f.parents[chain]; return ok }); err != nil {
		return err
	}
	if err := s.forgetHidden(ctx); err != nil {
		return err
	}
	if err := s.dropIncomplete(ctx, f); err != nil {
		return err
	}
	log := klog.FromContext(ctx)
	// While the book may be missing rows, a layer that it does not name may be needed.
	if !s.book.Rebuilt() {
		err := s.manifests.sweep(func(chain string) bool { _, ok := f.parents[chain]; return ok })
		if err != nil {
			log.Error(err, "Manifests of layers that are gone stay until the next start")
		}
	}
	if !clean {
		if err := s.checkAll(ctx); err != nil {
			return err
		}
	}
	// What containers use is not known yet; their snapshots protect the layers.
	if _, err := s.gcOrRetry(ctx); err != nil {
		log.Error(err, "Left over from an earlier run, for the next sweep")
	}
	return nil
}

// dropIncomplete removes images of whose layers the snapshotter has not all.
func (s *Service) dropIncomplete(ctx context.Context, f found) error {
	log := klog.FromContext(ctx)
	var broken []string
	for id, r := range s.view.Load().rows {
		for _, l := range r.Layers {
			if _, ok := f.parents[l.ChainID]; !ok {
				log.Info("Image dropped, a layer is missing", "image", id, "tags", r.Tags, "layer", l.ChainID)
				broken = append(broken, id)
				break
			}
		}
	}
	return s.commit(broken, func(string, *imageRow) *imageRow { return nil })
}

// chains says which layers must stay because a pull counts on them, and which are being
// removed. A pull that wants one of the latter waits for its removal and makes it anew.
type chains struct {
	mu        sync.Mutex
	held      map[string]int
	condemned map[string]chan struct{}
}

// hold keeps the layers from being removed until release.
func (c *chains) hold(ctx context.Context, names []string) (release func(), err error) {
	done := 0
	release = func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		for _, n := range names[:done] {
			if c.held[n]--; c.held[n] == 0 {
				delete(c.held, n)
			}
		}
	}
	for done < len(names) {
		c.mu.Lock()
		going := c.condemned[names[done]]
		if going == nil {
			c.held[names[done]]++
			done++
		}
		c.mu.Unlock()
		if going == nil {
			continue
		}
		select {
		case <-going:
		case <-ctx.Done():
			release()
			return nil, context.Cause(ctx)
		}
	}
	return release, nil
}

// condemn announces the removal of a layer, unless it is held or needed.
func (c *chains) condemn(name string, needed func() bool) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.held[name] > 0 || needed() {
		return false
	}
	c.condemned[name] = make(chan struct{})
	return true
}

// absolve ends what condemn began.
func (c *chains) absolve(name string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	close(c.condemned[name])
	delete(c.condemned, name)
}
