package admin

import (
	"context"

	"github.com/berthd/berth/cri/admin/api"
)

// inspection serves a look at the node.
func inspection(look Inspection) func(context.Context, *api.InspectRequest, func(api.Record)) error {
	return func(ctx context.Context, q *api.InspectRequest, tell func(api.Record)) error {
		return look(ctx, q.Mend, func(f api.Finding) { tell(api.Record{Finding: &f}) })
	}
}
