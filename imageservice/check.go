package imageservice

import (
	"context"
	"fmt"
	"slices"

	"github.com/berthd/berth/snapshotter"
	"github.com/berthd/berth/store"
)

// Check compares the images of the book with the layers, manifests and blobs that
// they need, and snapshots with each other and with their directories, and tells of
// what differs; with repair it is put right where that is safe. What is in layers is
// for Verify to read, and to make anew.
func (s *Service) Check(ctx context.Context, repair bool, report store.Report) error {
	if err := store.Examine(ctx, s.check, repair, report); err != nil {
		return fmt.Errorf("image check: %w", err)
	}
	return nil
}

func (s *Service) check(ctx context.Context) ([]store.Finding, error) {
	var found []store.Finding
	// A snapshotter that keeps rows has more to tell.
	if c, ok := s.sn.(interface {
		Check(context.Context) ([]store.Finding, error)
	}); ok {
		var err error
		if found, err = c.Check(ctx); err != nil {
			return nil, err
		}
	}
	blobs, err := s.blobs()
	if err != nil {
		return nil, err
	}
	v := s.view.Load()
	for id, r := range v.rows {
		found = append(found, s.checkImage(ctx, id, r, blobs)...)
	}
	for id := range s.used() {
		if v.rows[id] == nil {
			found = append(found, store.Finding{Kind: "image", ID: id, What: "row", Why: "containers were made from it, and the book does not know it",
				Consequence: "they go on; no other can be made from it", Remedy: "pull it again"})
		}
	}
	return found, ctx.Err()
}

// checkImage looks at what one image needs.
func (s *Service) checkImage(ctx context.Context, id string, r *imageRow, blobs []string) (found []store.Finding) {
	add := func(what, why, consequence string) {
		found = append(found, store.Finding{Kind: "image", ID: id, What: what, Why: why, Consequence: consequence,
			Remedy: "berth image verify --repair " + nameOf(id, r)})
	}
	if r.Damaged {
		add("row", "it is hidden, because a layer is damaged", "no container can be made from it")
		return found
	}
	locator, ok := s.sn.(snapshotter.Locator)
	for i, l := range r.Layers {
		if !ok {
			break
		}
		if err := s.checkLayer(ctx, locator, l.ChainID); err != nil && ctx.Err() == nil {
			add(fmt.Sprintf("layer %d of %d, %s", i+1, len(r.Layers), l.ChainID), err.Error(), "containers of it see wrong files or cannot be made")
		}
	}
	for _, blob := range []string{id, r.Manifest} {
		if blob != "" && !r.Dropped && !slices.Contains(blobs, blob) {
			add("blob "+blob, "this part of its description is not in the book", "it cannot be exported with its own digests")
		}
	}
	return found
}
