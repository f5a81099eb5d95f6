//go:build failpoint

package overlay

import (
	"context"

	points "github.com/berthd/berth/test/failpoint"
)

func failpoint(ctx context.Context, verb, step string) error {
	return points.Hit(ctx, verb+"."+step)
}
