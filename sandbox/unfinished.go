package sandbox

import (
	"cmp"
	"slices"
	"strings"
	"time"

	"github.com/berthd/berth/store"
)

// Unfinished lists what the book has as begun and not as done, the oldest first: the
// operations of a daemon that has ended. The next one undoes what was being made, and
// carries on what was being stopped or removed. A Step is why the last try did not
// succeed; Began and Age are those of the object, zero where it is older than the
// operation. Of a daemon that runs, Service.Ops tells.
func Unfinished(st *store.Store) ([]Op, error) {
	b := newBook(st)
	if err := b.load(); err != nil {
		return nil, err
	}
	v, now := b.view(), time.Now()
	var out []Op
	add := func(verb, id, failure string, created int64) {
		o := Op{Verb: verb, Object: id, Name: v.nameOf(id), Step: failure}
		if created != 0 {
			o.Began = time.Unix(0, created)
			o.Age = max(now.Sub(o.Began), 0)
		}
		out = append(out, o)
	}
	for id, p := range v.pods {
		switch {
		case p.Removing:
			add("remove pod", id, p.Failure, 0)
		case p.State == StateCreating:
			add("run pod", id, p.Failure, p.Created)
		case p.Stopping && !p.Torn:
			add("stop pod", id, p.Failure, 0)
		}
	}
	for id, c := range v.containers {
		switch {
		case c.Removing:
			add("remove container", id, c.Failure, 0)
		case c.State == StateCreating:
			add("create container", id, c.Failure, c.Created)
		}
	}
	slices.SortFunc(out, func(a, b Op) int {
		return cmp.Or(cmp.Compare(b.Age, a.Age), strings.Compare(a.Object, b.Object))
	})
	return out, nil
}
