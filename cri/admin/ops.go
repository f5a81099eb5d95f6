package admin

import (
	"cmp"
	"slices"
	"strings"
	"time"

	"github.com/berthd/berth/cri/admin/api"
)

// ops lists what is under way, pulls among it, the oldest first.
func (s *Server) ops() []api.Op {
	out := append([]api.Op{}, s.deps.Ops()...) // never null in JSON
	for _, p := range s.deps.Puller.Pulls() {
		step := p.Stage
		if p.Last != "" {
			step += "; " + strings.Join(strings.Fields(p.Last), " ")
		}
		out = append(out, api.Op{Kind: api.KindPull, What: "pull", Object: p.Reference, Step: step,
			Began: p.Began, Age: time.Since(p.Began), StepAge: time.Since(p.StageAt), Waiters: p.Waiters})
	}
	slices.SortStableFunc(out, func(a, b api.Op) int { return cmp.Compare(b.Age, a.Age) })
	return out
}
