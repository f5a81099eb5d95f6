//go:build failpoint

package sandbox

import (
	"context"
	"strings"

	points "github.com/berthd/berth/test/failpoint"
)

func failpoint(ctx context.Context, verb, step string) error {
	verb, _, _ = strings.Cut(verb, " within ") // the time that a stop was given is no part of the point
	return points.Hit(ctx, verb+"."+step)
}
