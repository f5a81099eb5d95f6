package imageservice

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/berthd/berth/snapshotter"
	"github.com/berthd/berth/store"
)

// Leaks tells of what pulls and images have left behind and nobody needs: unfinished
// layers, layers and manifests without an image, rows; with fix it is removed. What
// pulls under way make is theirs. While the book may be missing rows nothing is
// anybody's for sure, and nothing is told.
func (s *Service) Leaks(ctx context.Context, fix bool, report store.Report) error {
	if s.book.Rebuilt() {
		return nil
	}
	if err := store.Examine(ctx, s.leaks, fix, report); err != nil {
		return fmt.Errorf("image leaks: %w", err)
	}
	return nil
}

// leaks looks at what is there first, and then at who needs it: what is needed is
// announced before it is made, and until it is gone.
func (s *Service) leaks(ctx context.Context) ([]store.Finding, error) {
	lists, err := s.manifests.all()
	if err != nil {
		return nil, err
	}
	blobs, err := s.blobs()
	if err != nil {
		return nil, err
	}
	infos := map[string]snapshotter.Info{}
	if err := s.sn.Walk(ctx, func(_ context.Context, i snapshotter.Info) error { infos[i.Name] = i; return nil }); err != nil {
		return nil, err
	}
	var found []store.Finding
	for _, i := range infos {
		if strings.HasPrefix(i.Name, extractPrefix) && i.Kind != snapshotter.KindCommitted && !s.isExtracting(i.Name) {
			found = append(found, store.Finding{Kind: "unfinished layer", What: i.Name, Why: "no pull is working on it", Since: i.Created,
				Mend: func(ctx context.Context) error { return ignoreGone(s.sn.Remove(ctx, i.Name)) }})
		}
	}
	v := s.view.Load()
	for _, name := range unneeded(infos, v.chains) {
		if !s.chains.busy(name) {
			found = append(found, store.Finding{Kind: "layer", What: name, Why: "no image, container or pull needs it", Since: infos[name].Created, Mend: s.collectAgain})
		}
	}
	for _, file := range lists {
		_, exists := infos[chainOf(file)]
		if !exists && !s.makes(file) {
			path := filepath.Join(s.manifests.dir, file)
			found = append(found, store.Finding{Kind: "layer manifest", What: path, Why: "its layer is not there, and no pull makes it", Since: modified(path),
				Mend: func(ctx context.Context) error { return s.dropManifest(ctx, file) }})
		}
	}
	used := s.used()
	for _, id := range s.dropped() {
		if !used[id] {
			found = append(found, store.Finding{Kind: "row", ID: id, What: "image", Why: "the image was removed, and no container uses it any more", Mend: s.collectAgain})
		}
	}
	for _, digest := range blobs {
		if !v.needsBlob(digest) {
			found = append(found, store.Finding{Kind: "row", ID: digest, What: "image blob", Why: "no image has this configuration or manifest",
				Mend: func(context.Context) error { return s.dropBlob(digest) }})
		}
	}
	return found, nil
}

// collectAgain is gc for those who wait until everything is gone: the process may end then.
func (s *Service) collectAgain(ctx context.Context) error {
	freed, err := s.gc(ctx)
	select {
	case <-freed:
		return err
	case <-ctx.Done():
		return errors.Join(err, context.Cause(ctx))
	}
}

// unneeded are layers that no image has, and that nothing which is needed or not
// committed is on. What replaced a damaged layer is kept by the snapshotter for
// those that show it. It is pure.
func unneeded(infos map[string]snapshotter.Info, images map[string]bool) []string {
	needed := map[string]bool{}
	for name, i := range infos {
		if i.Kind == snapshotter.KindCommitted && !images[name] {
			continue
		}
		for name != "" && !needed[name] {
			needed[name] = true
			name = infos[name].Parent
		}
	}
	var out []string
	for name, i := range infos {
		if i.Kind == snapshotter.KindCommitted && !needed[name] && !strings.HasPrefix(name, "replaced-") {
			out = append(out, name)
		}
	}
	slices.Sort(out)
	return out
}

// busy tells whether a pull counts on the layer, or it is being removed.
func (c *chains) busy(name string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.held[name] > 0 || c.condemned[name] != nil
}

// makes tells whether a pull is writing that manifest, or somebody removing it.
func (s *Service) makes(file string) bool {
	if key, ok := strings.CutSuffix(file, ".tmp"); ok {
		return s.isExtracting(key)
	}
	chain := chainOf(file)
	s.mu.Lock()
	flying := s.flights[chain] != nil
	s.mu.Unlock()
	return flying || s.chains.busy(chain)
}

func (v *view) needsBlob(digest string) bool {
	if v.rows[digest] != nil {
		return true
	}
	for _, r := range v.rows {
		if r.Manifest == digest {
			return true
		}
	}
	return false
}

// blobs lists the digests of all blobs in the book.
func (s *Service) blobs() (digests []string, err error) {
	err = s.book.View(func(tx *store.Tx) error {
		digests = nil
		return blobRows.Keys(tx, func(digest string) error {
			digests = append(digests, digest)
			return nil
		})
	})
	return digests, err
}

// dropBlob removes a blob unless an image has come to need it.
func (s *Service) dropBlob(digest string) error {
	s.commitMu.Lock()
	defer s.commitMu.Unlock()
	if s.view.Load().needsBlob(digest) {
		return nil
	}
	return s.book.Update(func(tx *store.Tx) error { return blobRows.Delete(tx, digest) })
}

// dropManifest removes a layer's manifest unless the layer has come since somebody
// looked. A pull that wants the layer waits, and one that is at it holds it.
func (s *Service) dropManifest(ctx context.Context, file string) error {
	s.gcMu.Lock() // who condemns layers
	defer s.gcMu.Unlock()
	chain := chainOf(file)
	if !s.chains.condemn(chain, func() bool { return s.view.Load().chains[chain] }) {
		return nil
	}
	defer s.chains.absolve(chain)
	_, err := s.sn.Stat(ctx, chain)
	if err == nil {
		return nil
	}
	if !errors.Is(err, snapshotter.ErrNotFound) {
		return fmt.Errorf("layer manifest %s: %w", file, err)
	}
	return os.RemoveAll(filepath.Join(s.manifests.dir, file))
}

func modified(path string) time.Time {
	fi, err := os.Lstat(path)
	if err != nil {
		return time.Time{}
	}
	return fi.ModTime()
}

// all lists the names of the files.
func (m manifests) all() ([]string, error) {
	if m.dir == "" {
		return nil, nil
	}
	entries, err := os.ReadDir(m.dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("layer manifests: %w", err)
	}
	names := make([]string, len(entries))
	for i, e := range entries {
		names[i] = e.Name()
	}
	return names, nil
}

// chainOf is the chain ID that a file is named by.
func chainOf(file string) string { return strings.Replace(file, "-", ":", 1) }
