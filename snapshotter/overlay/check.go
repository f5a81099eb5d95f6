package overlay

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/berthd/berth/snapshotter"
	"github.com/berthd/berth/store"
)

// Check compares the rows with each other and with the directories that they name,
// and returns what differs. What is in layers is not read.
func (s *Snapshotter) Check(ctx context.Context) (found []store.Finding, err error) {
	all := map[string]row{}
	below := map[string]bool{} // as children has it
	err = s.book.View(func(tx *store.Tx) error {
		clear(all)
		clear(below)
		return errors.Join(
			rows.Each(tx, func(key string, r row) error { all[key] = r; return nil }),
			children.Each(tx, func(key string, _ struct{}) error { below[key] = true; return nil }))
	})
	if err != nil {
		return nil, fmt.Errorf("overlay: check: %w", err)
	}
	for key, r := range all {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		found = append(found, s.checkRow(key, r, all, below)...)
	}
	for key := range below {
		parent, child, _ := strings.Cut(key, "\x00")
		if r, ok := all[child]; (!ok || r.Parent != parent) && !s.quarantined(child) {
			found = append(found, store.Finding{Kind: "snapshot", ID: child, What: "index of children", Why: "it is said to be on " + parent + ", and is not",
				Consequence: "none but a little room in the book", Remedy: "--repair removes the entry", Mend: func(context.Context) error { return s.dropChildren() }})
		}
	}
	return found, nil
}

func (s *Snapshotter) checkRow(key string, r row, all map[string]row, below map[string]bool) (found []store.Finding) {
	add := func(what, why, consequence, remedy string, mend func(context.Context) error) {
		found = append(found, store.Finding{Kind: "snapshot", ID: key, What: what, Why: why, Consequence: consequence, Remedy: remedy, Mend: mend})
	}
	const lostTree = "what is on it cannot be mounted"
	remedy := "remove the container that it is of"
	if r.Kind == snapshotter.KindCommitted {
		remedy = "berth image verify --repair, or pull the image again"
	}
	dirs := []string{s.tree(r)}
	if r.Kind == snapshotter.KindActive && r.Parent != "" {
		dirs = append(dirs, s.path(r.Dir)+"/work")
	}
	if r.Kind == snapshotter.KindView {
		dirs = []string{s.path(r.Dir)}
	}
	for _, d := range dirs {
		if fi, err := os.Stat(d); err != nil || !fi.IsDir() {
			add(d, "the directory is not there", lostTree, remedy, nil)
		}
	}
	if r.Parent == "" {
		return found
	}
	if p, ok := all[r.Parent]; !ok || p.Kind != snapshotter.KindCommitted {
		add("parent "+r.Parent, "the book has no such layer", lostTree, remedy, nil)
	} else if !below[r.Parent+"\x00"+key] {
		add("index of children", "it is on "+r.Parent+", which does not know", "that could be removed while it is in use", "--repair writes the entry",
			func(context.Context) error { return s.relist(key) })
	}
	return found
}

// relist writes what is said of a snapshot among its parent's children anew.
func (s *Snapshotter) relist(key string) error {
	return s.book.Update(func(tx *store.Tx) error {
		r, err := get(tx, key)
		if errors.Is(err, snapshotter.ErrNotFound) {
			return nil
		}
		if err != nil {
			return err
		}
		return put(tx, key, r)
	})
}
