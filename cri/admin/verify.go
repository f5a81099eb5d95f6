package admin

import (
	"context"

	"github.com/berthd/berth/cri/admin/api"
	"github.com/berthd/berth/imageservice"
)

func (s *Server) verify(ctx context.Context, q *api.VerifyRequest, tell func(api.Record)) error {
	res, err := s.deps.Verifier.Verify(ctx, q.Refs, imageservice.VerifyOptions{Quick: q.Quick, Repair: q.Repair,
		Report: func(r imageservice.LayerReport) {
			rec := api.Record{Ref: r.Name, Layer: &api.LayerReport{
				Image: r.Image, Number: r.Number, Of: r.Of, Digest: r.Digest, ChainID: r.ChainID, Entries: r.Entries, Bytes: r.Bytes,
				Damaged: r.Damaged, Count: r.Count, Deviations: r.Deviating, Repaired: r.Repaired,
			}}
			if r.Err != nil {
				rec.Error, _ = toError(r.Err)
			}
			tell(rec)
		}})
	if err != nil {
		return err
	}
	tell(api.Record{Summary: &api.Summary{Images: res.Images, Layers: res.Layers, Bytes: res.Bytes, Damaged: res.Damaged, Repaired: res.Repaired}})
	return nil
}
