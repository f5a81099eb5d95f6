package imageservice

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	"k8s.io/klog/v2"

	"github.com/berthd/berth/snapshotter"
	"github.com/berthd/berth/store"
)

// damagedRows are layers that are not as they were made, by chain ID, with the reason. A
// pull or an import that needs one makes it anew and puts it in the place of the old one.
var damagedRows = store.NewTable[string]("image-damaged", 1)

// metaClean is, in the book, the boot ID at the end of a service that was closed; it is
// taken away while one runs.
const metaClean = "images-clean"

// wasClosed tells whether the last service was closed in this boot, and begins a run that
// is not closed yet.
func (s *Service) wasClosed() (bool, error) {
	mark, err := s.book.Meta(metaClean)
	if err != nil && !errors.Is(err, store.ErrCorrupt) {
		return false, fmt.Errorf("images: %w", err)
	}
	if mark != "" {
		if err := s.book.SetMeta(metaClean, ""); err != nil {
			return false, fmt.Errorf("images: %w", err)
		}
	}
	return mark != "" && mark == s.bootID(), nil
}

// noteClosed is the opposite.
func (s *Service) noteClosed() error { return s.book.SetMeta(metaClean, s.bootID()) }

func (s *Service) bootID() string {
	if s.cfg.BootID != "" {
		return s.cfg.BootID
	}
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "" // then every start is one after a crash
	}
	return strings.TrimSpace(string(b))
}

// loadDamaged reads what is known to be damaged; of layers that are gone it is forgotten.
func (s *Service) loadDamaged(exists func(chain string) bool) error {
	known := map[string]string{}
	var gone []string
	err := s.book.View(func(tx *store.Tx) error {
		clear(known)
		gone = nil
		return damagedRows.Each(tx, func(chain, why string) error {
			if exists(chain) {
				known[chain] = why
			} else {
				gone = append(gone, chain)
			}
			return nil
		})
	})
	if err != nil {
		return fmt.Errorf("images: damaged layers: %w", err)
	}
	s.mu.Lock()
	s.damaged = known
	s.mu.Unlock()
	return s.clearDamaged(gone)
}

func (s *Service) isDamaged(chain string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, ok := s.damaged[chain]
	return ok
}

func (s *Service) damagedOf(chains []string) []string {
	return slices.DeleteFunc(slices.Clone(chains), func(c string) bool { return !s.isDamaged(c) })
}

// setDamaged notes layers, with the reasons, as to be made anew.
func (s *Service) setDamaged(reasons map[string]string) error {
	if len(reasons) == 0 {
		return nil
	}
	err := s.book.Update(func(tx *store.Tx) error {
		for chain, why := range reasons {
			if err := damagedRows.Put(tx, chain, why); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("images: damaged layers: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	maps.Copy(s.damaged, reasons)
	return nil
}

// clearDamaged is told of layers that have been made anew and are durable.
func (s *Service) clearDamaged(chains []string) error {
	if len(chains) == 0 {
		return nil
	}
	err := s.book.Update(func(tx *store.Tx) error {
		for _, c := range chains {
			if err := damagedRows.Delete(tx, c); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("images: damaged layers: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range chains {
		delete(s.damaged, c)
	}
	return nil
}

// commitLayer gives an extraction its name. In the place of a damaged layer it comes without
// a change for what is on it, and containers that run go on with what they have.
func (s *Service) commitLayer(ctx context.Context, chain, key string, opts []snapshotter.Opt, usage snapshotter.Opt) error {
	r, ok := s.sn.(snapshotter.Replacer)
	if !ok || !s.isDamaged(chain) {
		return s.sn.Commit(ctx, chain, key, opts...)
	}
	err := r.Replace(ctx, chain, key, usage)
	if errors.Is(err, snapshotter.ErrNotFound) {
		return s.sn.Commit(ctx, chain, key, opts...) // removed meanwhile, or never there
	}
	if err == nil {
		klog.FromContext(ctx).Info("Damaged layer replaced", "layer", chain)
	}
	return err
}

// checkAll is the cheap check after a crash: each layer that an image needs has its
// directory, with something in it if there was, and a manifest that begins and weighs like
// one. What was not synced before a power cut is missing, or empty, or all zeros. Images with
// damaged layers are hidden, so that they are pulled again, which makes only those layers anew.
func (s *Service) checkAll(ctx context.Context) error {
	locator, ok := s.sn.(snapshotter.Locator)
	if !ok {
		return nil
	}
	began := time.Now()
	reasons := map[string]string{}
	for chain := range s.view.Load().chains {
		if err := s.checkLayer(ctx, locator, chain); err != nil {
			reasons[chain] = err.Error()
		}
	}
	log := klog.FromContext(ctx)
	log.V(2).Info("Layers checked after a stop that was not clean", "layers", len(s.view.Load().chains), "damaged", len(reasons), "took", time.Since(began))
	if len(reasons) == 0 {
		return nil
	}
	if err := s.setDamaged(reasons); err != nil {
		return err
	}
	var hidden []string
	for id, r := range s.view.Load().rows {
		for _, l := range r.Layers {
			if why, bad := reasons[l.ChainID]; bad && !r.Damaged && !r.Dropped {
				log.Info("Image hidden until it is pulled again, a layer is damaged", "image", id, "tags", r.Tags, "layer", l.ChainID, "reason", why)
				hidden = append(hidden, id)
				break
			}
		}
	}
	return s.commit(hidden, func(_ string, old *imageRow) *imageRow {
		r := *old
		r.Damaged = true
		return &r
	})
}

// checkLayer returns what is plainly wrong with a layer.
func (s *Service) checkLayer(ctx context.Context, locator snapshotter.Locator, chain string) error {
	dir, err := locator.Locate(ctx, chain)
	if err != nil {
		return err
	}
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	usage, err := s.sn.Usage(ctx, chain)
	if err != nil {
		return err
	}
	if _, err := f.Readdirnames(1); usage.Inodes > 0 && errors.Is(err, io.EOF) {
		return fmt.Errorf("directory %s is empty, %d files have been in it", dir, usage.Inodes)
	} else if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	return s.manifests.plausible(chain, usage.Inodes)
}

// unhide shows the images again that were hidden for layers that have been made anew since,
// by a pull of another image.
func (s *Service) unhide(ctx context.Context) error {
	var ids []string
	for id, r := range s.view.Load().rows {
		if r.Damaged && !slices.ContainsFunc(r.Layers, func(l layerRow) bool { return s.isDamaged(l.ChainID) }) {
			klog.FromContext(ctx).Info("Image shown again, its damaged layers have been replaced", "image", id, "tags", r.Tags)
			ids = append(ids, id)
		}
	}
	return s.commit(ids, func(_ string, old *imageRow) *imageRow {
		if old == nil {
			return nil // removed meanwhile
		}
		r := *old
		r.Damaged = false
		return &r
	})
}

// findHidden finds an image that a check after a crash has hidden, by its ID or a name.
func (s *Service) findHidden(ref string) (id string, ok bool) {
	names := []string{ref}
	if c, err := candidates(ref, *s.search.Load()); err == nil {
		for _, n := range c {
			names = append(names, n.String())
		}
	}
	for id, r := range s.view.Load().rows {
		if r.Damaged && (id == ref || strings.TrimPrefix(id, "sha256:") == ref ||
			slices.ContainsFunc(r.names(), func(n string) bool { return slices.Contains(names, n) })) {
			return id, true
		}
	}
	return "", false
}

// findAny is view.find that knows of hidden images as well.
func (s *Service) findAny(ref string) (string, error) {
	id, err := s.view.Load().find(ref, *s.search.Load())
	if errors.Is(err, ErrNotFound) {
		if id, ok := s.findHidden(ref); ok {
			return id, nil
		}
	}
	return id, err
}

// forgetHidden removes the rows of images that an earlier start hid and nobody pulled
// again, but for pinned ones, which somebody wants.
func (s *Service) forgetHidden(ctx context.Context) error {
	var ids []string
	for id, r := range s.view.Load().rows {
		if r.Damaged && !r.Pinned {
			klog.FromContext(ctx).Info("Image dropped, it was damaged and nobody pulled it again", "image", id, "tags", r.Tags)
			ids = append(ids, id)
		}
	}
	return s.commit(ids, func(string, *imageRow) *imageRow { return nil })
}
