package overlay

import (
	"context"
	"fmt"
	"path/filepath"
	"time"

	"github.com/berthd/berth/snapshotter"
	"github.com/berthd/berth/store"
)

// Replace implements snapshotter.Replacer. The change is one transaction: a crash leaves
// the one tree or the other, and the one that is not named to Cleanup.
func (s *Snapshotter) Replace(ctx context.Context, name, key string, opts ...snapshotter.Opt) error {
	info, err := s.told(ctx, name, key, opts)
	if err != nil {
		return err
	}
	var unused string // directory that nobody shows any more
	err = s.book.Update(func(tx *store.Tx) (err error) {
		s.removing.Delete(unused) // it may be run again, and fail
		if unused, err = replace(tx, name, key, *info.Usage); unused != "" {
			s.removing.Store(unused, true)
		}
		return err
	})
	if err != nil {
		s.removing.Delete(unused)
	} else if unused != "" {
		s.removeDir(ctx, unused)
	}
	return err
}

func replace(tx *store.Tx, name, key string, u snapshotter.Usage) (unused string, err error) {
	old, err := get(tx, name)
	if err != nil {
		return "", err
	}
	from, err := get(tx, key)
	if err != nil {
		return "", err
	}
	if old.Kind != snapshotter.KindCommitted {
		return "", fmt.Errorf("snapshot %q: replace of a %s one: %w", name, old.Kind, snapshotter.ErrKind)
	}
	if from.Kind != snapshotter.KindActive || from.Parent != "" {
		return "", fmt.Errorf("snapshot %q: replace by a %s one with parent %q: %w", key, from.Kind, from.Parent, snapshotter.ErrKind)
	}
	users, err := usersOf(tx, name)
	if err != nil {
		return "", err
	}
	if err := remove(tx, key, from); err != nil {
		return "", err
	}
	changed, now := old, time.Now()
	changed.Dir, changed.Usage, changed.Updated = from.Dir, u, now
	if err := put(tx, name, changed); err != nil {
		return "", err
	}
	if len(users) == 0 {
		return old.Dir, nil
	}
	// A directory's number is used once, so this name is free.
	kept := row{Kind: snapshotter.KindCommitted, Created: old.Created, Updated: now, Dir: old.Dir, Usage: old.Usage, Users: users}
	return "", put(tx, "replaced-"+filepath.Base(old.Dir), kept)
}

// usersOf lists the snapshots that are not committed and on name, at any distance.
func usersOf(tx *store.Tx, name string) (users []string, err error) {
	parents, open := map[string]string{}, []string{}
	err = rows.Each(tx, func(key string, r row) error {
		parents[key] = r.Parent
		if r.Kind != snapshotter.KindCommitted {
			open = append(open, key)
		}
		return nil
	})
	for _, key := range open {
		for p, steps := parents[key], 0; p != "" && steps <= MaxLayers; p, steps = parents[p], steps+1 {
			if p == name {
				users = append(users, key)
				break
			}
		}
	}
	return users, err
}
