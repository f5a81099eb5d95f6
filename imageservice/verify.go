package imageservice

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"k8s.io/klog/v2"

	"github.com/berthd/berth/imageservice/layer"
)

// VerifyOptions say what Verify looks at and what it does.
type VerifyOptions struct {
	// Quick leaves out what is in files.
	Quick bool
	// Repair makes damaged layers anew.
	Repair bool
	// Report is told of each layer as soon as it is known, and once more when it has been
	// repaired; may be nil.
	Report func(LayerReport)
}

// LayerReport is what was found out about one layer.
type LayerReport struct {
	Image     string // ID of an image that needs it
	Name      string // of that image
	Number    int    // of the layer in it, from 1
	Of        int    // layers that it has
	Digest    string // of the blob
	ChainID   string
	Entries   int64 // that were compared
	Bytes     int64 // of files that were read
	Damaged   bool
	Count     int64    // of deviations
	Deviating []string // the first of them, in words
	// Repaired: it has been made anew. Err: why not, or why it could not be compared.
	Repaired bool
	Err      error
}

// maxDeviations is how many deviations of a layer are told.
const maxDeviations = 20

// VerifyResult sums up.
type VerifyResult struct {
	Images, Layers    int
	Bytes             int64
	Damaged, Repaired int // layers
}

// Verify compares layers with the manifests that were written when they were unpacked: those
// of the images that refs mean, or of all. A layer without a usable manifest counts as
// damaged. With Repair each damaged layer, and no other, is fetched again under a repo
// digest of its image and takes the place of the old one: new containers get it, those that
// run keep what they have until they are removed. What could not be repaired is noted, and made
// anew by the next pull or import that needs it.
//
// The error is about the verification, not about damage.
func (s *Service) Verify(ctx context.Context, refs []string, o VerifyOptions) (VerifyResult, error) {
	if o.Report == nil {
		o.Report = func(LayerReport) {}
	}
	var res VerifyResult
	ids, err := s.toVerify(refs)
	if err != nil {
		return res, err
	}
	seen := map[string]bool{}
	bad := map[string][]LayerReport{} // by image
	var order []string
	for _, id := range ids {
		r := s.view.Load().rows[id]
		if r == nil {
			continue // removed meanwhile
		}
		res.Images++
		for i, l := range r.Layers {
			if seen[l.ChainID] {
				continue
			}
			seen[l.ChainID] = true
			rep := LayerReport{Image: id, Name: nameOf(id, r), Number: i + 1, Of: len(r.Layers), Digest: l.Digest, ChainID: l.ChainID}
			if err := s.verifyOne(ctx, &rep, o.Quick); err != nil {
				return res, err
			}
			res.Layers++
			res.Bytes += rep.Bytes
			if rep.Damaged {
				res.Damaged++
				if len(bad[id]) == 0 {
					order = append(order, id)
				}
				bad[id] = append(bad[id], rep)
			}
			o.Report(rep)
		}
	}
	if !o.Repair {
		return res, nil
	}
	for _, id := range order {
		n, err := s.repair(ctx, id, bad[id], o)
		res.Repaired += n
		if err != nil {
			return res, err
		}
	}
	return res, nil
}

// toVerify lists image IDs. Hidden ones are verified with all others: that is how they
// come back.
func (s *Service) toVerify(refs []string) (ids []string, err error) {
	v := s.view.Load()
	for _, ref := range refs {
		id, err := s.findAny(ref)
		if err != nil {
			return nil, err
		}
		if !slices.Contains(ids, id) {
			ids = append(ids, id)
		}
	}
	if len(refs) > 0 {
		return ids, nil
	}
	for id, r := range v.rows {
		if !r.Dropped {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	return ids, nil
}

func nameOf(id string, r *imageRow) string {
	if names := r.names(); len(names) > 0 {
		return names[0]
	}
	return id
}

// verifyOne fills a report. Its error ends the whole verification.
func (s *Service) verifyOne(ctx context.Context, rep *LayerReport, quick bool) error {
	checked, err := s.VerifyLayer(ctx, rep.ChainID, layer.VerifyOptions{Contents: !quick}, func(d layer.Deviation) {
		if len(rep.Deviating) < maxDeviations {
			rep.Deviating = append(rep.Deviating, d.String())
		}
	})
	rep.Entries, rep.Bytes, rep.Count = checked.Entries, checked.Bytes, checked.Deviations
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case errors.Is(err, ErrUnsupported):
		return err
	case err != nil: // no manifest, no directory, or it cannot be read
		rep.Damaged, rep.Err = true, err
	default:
		rep.Damaged = checked.Deviations > 0 || s.isDamaged(rep.ChainID)
	}
	return nil
}

// repair makes the damaged layers of one image anew and reports each.
func (s *Service) repair(ctx context.Context, id string, reports []LayerReport, o VerifyOptions) (repaired int, err error) {
	reasons := map[string]string{}
	for _, rep := range reports {
		reasons[rep.ChainID] = fmt.Sprintf("%d deviations from its manifest", rep.Count)
		if rep.Err != nil {
			reasons[rep.ChainID] = rep.Err.Error()
		}
	}
	if err := s.setDamaged(reasons); err != nil {
		return 0, err
	}
	failed := s.fetchAgain(ctx, id)
	if ctx.Err() != nil {
		return repaired, context.Cause(ctx)
	}
	for _, rep := range reports {
		if rep.Err = failed; failed == nil {
			rep.Deviating, rep.Damaged, rep.Err = nil, false, nil
			if err := s.verifyOne(ctx, &rep, o.Quick); err != nil {
				return repaired, err
			}
			rep.Repaired = !rep.Damaged
		}
		if rep.Repaired {
			repaired++
		}
		o.Report(rep)
	}
	return repaired, nil
}

// fetchAgain pulls an image under one of its repo digests, whatever else the tags mean now.
func (s *Service) fetchAgain(ctx context.Context, id string) error {
	r := s.view.Load().rows[id]
	if r == nil {
		return fmt.Errorf("%w: removed meanwhile", ErrNotFound)
	}
	if len(r.Digests) == 0 {
		return fmt.Errorf("image has no repo digest to fetch the layer by, import it again: %w", ErrUnsupported)
	}
	var errs []error
	for _, ref := range r.Digests {
		img, err := s.Pull(ctx, ref, nil)
		if err == nil && img.ID == id {
			klog.FromContext(ctx).V(2).Info("Image repaired", "image", id, "from", ref)
			return nil
		}
		if err == nil {
			err = fmt.Errorf("%s is image %s now, not %s: %w", ref, img.ID, id, ErrDigestMismatch)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}
