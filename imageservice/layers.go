package imageservice

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	"k8s.io/klog/v2"

	"github.com/berthd/berth/imageservice/layer"
	"github.com/berthd/berth/snapshotter"
)

const (
	// extractPrefix begins the keys of snapshots that layers are unpacked into.
	extractPrefix = "extract-"
	// undoTimeout is for how long an extraction that failed may be removed.
	undoTimeout = 5 * time.Minute
)

// flight is the making of one layer, for all pulls that want it.
type flight struct {
	done   chan struct{}
	record *layerRecord
	err    error // valid once done is closed
}

// fetchLayers makes all layers that are missing, side by side. The first error ends the others.
func (s *Service) fetchLayers(ctx context.Context, p *pull, pl *plan) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	p.track(pl.layers)
	var wg sync.WaitGroup
	last := make(chan struct{}) // closed when the layer below the next one is committed
	close(last)
	for i := range pl.layers {
		ready, below := make(chan struct{}), last
		wg.Go(func() {
			err := s.ensureLayer(ctx, p, pl, i, below)
			if err != nil {
				cancel(fmt.Errorf("layer %d of %d (%s): %w", i+1, len(pl.layers), pl.layers[i].Digest, err))
				return
			}
			close(ready)
		})
		last = ready
	}
	wg.Wait()
	return context.Cause(ctx) // the first one's
}

// ensureLayer makes layer i unless it is there or another pull is making it. A flight
// that failed is no reason to fail: it may have been cancelled, or have had worse
// credentials; then this pull flies itself.
func (s *Service) ensureLayer(ctx context.Context, p *pull, pl *plan, i int, below <-chan struct{}) error {
	chain := pl.layers[i].ChainID
	for {
		f, own := s.flightOf(pl.layers[i])
		p.follow(i, f.record, !own)
		if own {
			f.err = s.makeLayer(ctx, pl, i, below, f.record)
			s.mu.Lock()
			delete(s.flights, chain)
			s.mu.Unlock()
			close(f.done)
			return f.err
		}
		select {
		case <-f.done:
			if f.err == nil {
				return nil
			}
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

func (s *Service) flightOf(l layerRow) (f *flight, own bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if f := s.flights[l.ChainID]; f != nil {
		return f, false
	}
	f = &flight{done: make(chan struct{}), record: newLayerRecord(l.Digest, l.Size)}
	s.flights[l.ChainID] = f
	return f, true
}

// makeLayer makes a layer that is not there. When somebody sent other bytes than the
// digest says, somebody else is asked.
func (s *Service) makeLayer(ctx context.Context, pl *plan, i int, below <-chan struct{}, record *layerRecord) error {
	switch _, err := s.sn.Stat(ctx, pl.layers[i].ChainID); {
	case err == nil && !s.isDamaged(pl.layers[i].ChainID):
		record.enter(layerPresent)
		return nil
	case err == nil:
	case !errors.Is(err, snapshotter.ErrNotFound):
		return err
	}
	for {
		again, err := s.tryLayer(ctx, pl, i, below, record)
		if err == nil {
			record.enter(layerDone)
		}
		if !again {
			return err
		}
		record.restart()
	}
}

// tryLayer unpacks a layer into a snapshot of its own and, when the layer below is there,
// commits it on that. again tells that another try would be made of other bytes.
func (s *Service) tryLayer(ctx context.Context, pl *plan, i int, below <-chan struct{}, record *layerRecord) (again bool, err error) {
	key, done := s.newExtraction()
	defer done()
	defer func() {
		if err != nil {
			s.manifests.drop(key)
			s.undo(ctx, key)
		}
	}()
	if err := failpoint(ctx, verbLayer, "unpack"); err != nil {
		return false, err
	}
	l := pl.layers[i]
	r, err := s.openLayer(ctx, pl, l, record)
	if err != nil {
		return false, err
	}
	res, root, err := s.unpack(ctx, l, key, r, record)
	if err != nil {
		return errors.Is(err, ErrDigestMismatch) && r.distrust(), err
	}
	record.enter(layerCommitting)
	select {
	case <-below:
	case <-ctx.Done():
		return false, context.Cause(ctx)
	}
	usage := snapshotter.WithUsage(snapshotter.Usage{Size: res.Size, Inodes: res.Inodes})
	opts := []snapshotter.Opt{usage}
	// Overlay does not know opaque roots, but a layer may do without the ones below.
	if i > 0 && !res.OpaqueRoot {
		parent := pl.layers[i-1].ChainID
		opts = append(opts, snapshotter.WithParent(parent))
		if err := s.adopt(ctx, key, parent, root, res.Implied); err != nil {
			return false, err
		}
	}
	if err := failpoint(ctx, verbLayer, "commit"); err != nil {
		return false, err
	}
	if err := s.manifests.keep(key, l.ChainID); err != nil {
		return false, err
	}
	return false, s.commitLayer(ctx, l.ChainID, key, opts, usage)
}

// newExtraction returns a key that no other extraction has, and marks it as in use until
// done is called.
func (s *Service) newExtraction() (key string, done func()) {
	key = fmt.Sprintf("%s%d-%d", extractPrefix, s.run, s.sequence.Add(1))
	s.mu.Lock()
	defer s.mu.Unlock()
	s.extracting[key] = true
	return key, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.extracting, key)
	}
}

func (s *Service) isExtracting(key string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.extracting[key]
}

// undo removes an extraction, also when the pull was cancelled. What it cannot remove
// a GC tries again a little later.
func (s *Service) undo(ctx context.Context, key string) {
	ctx, stop := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
	defer stop()
	if err := ignoreGone(s.sn.Remove(ctx, key)); err != nil {
		klog.FromContext(ctx).Error(err, "Unfinished layer left for the next sweep", "snapshot", key)
		s.retryGC(ctx)
	}
}

// unpack reads a layer from r, which it closes, into a new snapshot, as soon as there is a
// slot.
func (s *Service) unpack(ctx context.Context, l layerRow, key string, r layerBytes, record *layerRecord) (res layer.Result, root string, err error) {
	defer r.Close()
	select {
	case s.slots <- struct{}{}:
		defer func() { <-s.slots }()
	case <-ctx.Done():
		return res, "", context.Cause(ctx)
	}
	mounts, err := s.sn.Prepare(ctx, key, "")
	if err != nil {
		return res, "", err
	}
	if len(mounts) != 1 || mounts[0].Type != "bind" || mounts[0].Target != "" {
		return res, "", fmt.Errorf("snapshotter gave %d mounts to unpack into, want one directory: %w", len(mounts), ErrUnsupported)
	}
	root = mounts[0].Source
	record.enter(layerPulling)
	st, err := layer.Open(r, layer.Blob{
		MediaType: l.MediaType, Digest: digest.Digest(l.Digest), DiffID: digest.Digest(l.DiffID), Size: l.Size, MaxBytes: s.cfg.MaxLayerBytes,
		PlainGzip: s.cfg.Gunzip == gunzipKlauspost,
	})
	if err != nil {
		return res, "", classify(err)
	}
	began := time.Now()
	if res, err = s.apply(ctx, root, key, record.unpacking(st)); err != nil {
		err = st.Blame(err)
	}
	st.Close()
	if err != nil {
		return res, "", classify(because(ctx, err))
	}
	klog.FromContext(ctx).V(4).Info("Layer unpacked", "digest", l.Digest, "bytes", l.Size, "size", res.Size,
		"entries", res.Entries, "took", time.Since(began))
	return res, root, nil
}

// apply unpacks an archive and writes the layer's manifest.
func (s *Service) apply(ctx context.Context, root, key string, archive layer.Chunks) (layer.Result, error) {
	opts := layer.Options{MaxBytes: s.cfg.MaxLayerBytes, MaxEntries: s.cfg.MaxLayerEntries}
	list, err := s.manifests.create(key)
	if err != nil {
		return layer.Result{}, err
	}
	if list != nil {
		defer list.Close()
		opts.Manifest = list
	}
	return layer.ApplyDir(ctx, root, archive, opts)
}

// adopt gives the directories that the archive did not list the metadata that they have
// in the layers below. Few images need it.
func (s *Service) adopt(ctx context.Context, key, parent, root string, implied []string) (err error) {
	if len(implied) == 0 {
		return nil
	}
	viewKey := key + "-below"
	s.mu.Lock()
	s.extracting[viewKey] = true
	s.mu.Unlock()
	defer func() {
		s.undo(ctx, viewKey)
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.extracting, viewKey)
	}()
	mounts, err := s.sn.View(ctx, viewKey, parent)
	if err != nil {
		return err
	}
	below, err := snapshotter.OpenRoot(mounts)
	if err != nil {
		return err
	}
	defer below.Close()
	dir, err := os.Open(root)
	if err != nil {
		return err
	}
	defer dir.Close()
	return layer.AdoptDirs(below, dir, implied)
}

// layerBytes is where the bytes of a layer come from.
type layerBytes interface {
	io.ReadCloser
	// distrust is told that they were not what the digest says. It tells if another try
	// may bring others.
	distrust() bool
}

// openLayer is the stream of a layer, from a registry or an archive.
func (s *Service) openLayer(ctx context.Context, pl *plan, l layerRow, record *layerRecord) (layerBytes, error) {
	if pl.local == nil {
		return s.newLayerReader(ctx, pl.src, l, record), nil
	}
	r, err := pl.local(digest.Digest(l.Digest))
	if err != nil {
		return nil, err
	}
	return &localBytes{r, record}, nil
}
