package overlay

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/berthd/berth/snapshotter"
	"github.com/berthd/berth/store"
)

// Stat implements snapshotter.Snapshotter.
func (s *Snapshotter) Stat(ctx context.Context, key string) (snapshotter.Info, error) {
	r, err := s.find(key)
	return r.info(key), err
}

// Update implements snapshotter.Snapshotter.
func (s *Snapshotter) Update(ctx context.Context, info snapshotter.Info, fieldpaths ...string) (snapshotter.Info, error) {
	var updated snapshotter.Info
	err := s.book.Update(func(tx *store.Tx) error {
		r, err := get(tx, info.Name)
		if err != nil {
			return err
		}
		if err := r.setLabels(info.Labels, fieldpaths); err != nil {
			return fmt.Errorf("snapshot %q: %w", info.Name, err)
		}
		r.Updated = time.Now()
		updated = r.info(info.Name)
		return rows.Put(tx, info.Name, r)
	})
	return updated, err
}

func (r *row) setLabels(labels map[string]string, fieldpaths []string) error {
	if len(fieldpaths) == 0 {
		fieldpaths = []string{"labels"}
	}
	for _, p := range fieldpaths {
		if p == "labels" {
			r.Labels = maps.Clone(labels)
			continue
		}
		key, ok := strings.CutPrefix(p, "labels.")
		if !ok {
			return fmt.Errorf("field %q: only labels can be updated", p)
		}
		if v, ok := labels[key]; ok {
			if r.Labels == nil {
				r.Labels = make(map[string]string)
			}
			r.Labels[key] = v
		} else {
			delete(r.Labels, key)
		}
	}
	return nil
}

// Usage implements snapshotter.Snapshotter.
func (s *Snapshotter) Usage(ctx context.Context, key string) (snapshotter.Usage, error) {
	r, err := s.find(key)
	if err != nil {
		return snapshotter.Usage{}, err
	}
	switch r.Kind {
	case snapshotter.KindCommitted:
		return r.Usage, nil
	case snapshotter.KindView:
		return snapshotter.Usage{}, nil // has nothing of its own
	}
	u, err := usage(ctx, s.tree(r))
	if err != nil {
		return snapshotter.Usage{}, fmt.Errorf("snapshot %q: usage: %w", key, err)
	}
	return u, nil
}

// Locate implements snapshotter.Locator.
func (s *Snapshotter) Locate(_ context.Context, name string) (string, error) {
	r, err := s.find(name)
	if err == nil && r.Kind != snapshotter.KindCommitted {
		err = fmt.Errorf("snapshot %q: directory of %s: %w", name, r.Kind, snapshotter.ErrKind)
	}
	if err != nil {
		return "", err
	}
	return s.tree(r), nil
}

// Mounts implements snapshotter.Snapshotter.
func (s *Snapshotter) Mounts(ctx context.Context, key string) ([]snapshotter.Mount, error) {
	var m []snapshotter.Mount
	err := s.book.View(func(tx *store.Tx) error {
		r, err := get(tx, key)
		if err != nil {
			return err
		}
		if r.Kind == snapshotter.KindCommitted {
			return fmt.Errorf("snapshot %q: mounts of a %s one: %w", key, r.Kind, snapshotter.ErrKind)
		}
		m, err = s.mounts(tx, key, r)
		return err
	})
	return m, err
}

// Prepare implements snapshotter.Snapshotter. Without a parent the mount is a
// writable bind of the one directory.
func (s *Snapshotter) Prepare(ctx context.Context, key, parent string, opts ...snapshotter.Opt) ([]snapshotter.Mount, error) {
	return s.create(ctx, snapshotter.KindActive, key, parent, opts)
}

// View implements snapshotter.Snapshotter. Without a parent it shows an empty
// directory.
func (s *Snapshotter) View(ctx context.Context, key, parent string, opts ...snapshotter.Opt) ([]snapshotter.Mount, error) {
	return s.create(ctx, snapshotter.KindView, key, parent, opts)
}

func (s *Snapshotter) create(ctx context.Context, kind snapshotter.Kind, key, parent string, opts []snapshotter.Opt) ([]snapshotter.Mount, error) {
	info := snapshotter.Info{Parent: parent}
	if err := apply(key, &info, opts); err != nil {
		return nil, err
	}
	if info.Parent != parent {
		return nil, fmt.Errorf("snapshot %q: WithParent belongs to Commit: %w", key, snapshotter.ErrKind)
	}
	s.making.RLock()
	defer s.making.RUnlock()
	if err := failpoint(ctx, "snapshot", "make"); err != nil {
		return nil, fmt.Errorf("snapshot %q: %w", key, err)
	}
	dir, err := s.makeDir(kind, parent)
	if err != nil {
		return nil, fmt.Errorf("snapshot %q: %w", key, err)
	}
	now := time.Now()
	r := row{Kind: kind, Parent: parent, Labels: info.Labels, Created: now, Updated: now, Dir: dir}
	var m []snapshotter.Mount
	err = s.record(ctx, "row", func(tx *store.Tx) (err error) {
		if err := absent(tx, key); err != nil {
			return err
		}
		if err := checkParent(tx, key, parent); err != nil {
			return err
		}
		if m, err = s.mounts(tx, key, r); err != nil {
			return err
		}
		return put(tx, key, r)
	})
	if err != nil {
		return nil, errors.Join(err, removeTree(s.path(dir), nil))
	}
	return m, nil
}

// record is a change of the book, with its failpoint.
func (s *Snapshotter) record(ctx context.Context, step string, fn func(*store.Tx) error) error {
	if err := failpoint(ctx, "snapshot", step); err != nil {
		return err
	}
	return s.book.Update(fn)
}

// makeDir makes the directory of a snapshot under the next free number. Views
// of a parent get an empty one, so that every row has a directory of its own.
func (s *Snapshotter) makeDir(kind snapshotter.Kind, parent string) (string, error) {
	class := "snapshots"
	if parent == "" {
		class = "layers"
	}
	for {
		dir := fmt.Sprintf("%s/%d", class, s.last.Add(1))
		err := os.Mkdir(s.path(dir), 0o755)
		if errors.Is(err, fs.ErrExist) {
			continue
		}
		if err != nil {
			return "", err
		}
		// The root of what a container sees: readable by every user of it,
		// whatever the umask. The directories above are closed to others.
		err = os.Chmod(s.path(dir), 0o755)
		if parent != "" && kind == snapshotter.KindActive {
			err = errors.Join(err, os.Mkdir(s.path(dir)+"/upper", 0o755), os.Chmod(s.path(dir)+"/upper", 0o755),
				os.Mkdir(s.path(dir)+"/work", 0o700))
		}
		if err != nil {
			return "", errors.Join(err, removeTree(s.path(dir), nil))
		}
		return dir, nil
	}
}

// Commit implements snapshotter.Snapshotter. The tree stays where it is. The
// labels are those given here. Usage is walked unless WithUsage tells it.
func (s *Snapshotter) Commit(ctx context.Context, name, key string, opts ...snapshotter.Opt) error {
	info, err := s.told(ctx, name, key, opts)
	if err != nil {
		return err
	}
	return s.record(ctx, "commit", func(tx *store.Tx) error {
		r, err := get(tx, key)
		if err != nil {
			return err
		}
		if r.Kind != snapshotter.KindActive {
			return fmt.Errorf("snapshot %q: commit of a %s one: %w", key, r.Kind, snapshotter.ErrKind)
		}
		if info.Parent != "" && r.Parent != "" && info.Parent != r.Parent {
			return fmt.Errorf("snapshot %q: parent %q, has %q already: %w", key, info.Parent, r.Parent, snapshotter.ErrKind)
		}
		if err := absent(tx, name); err != nil {
			return err
		}
		if err := remove(tx, key, r); err != nil {
			return err
		}
		if info.Parent != "" {
			r.Parent = info.Parent
		}
		if err := checkParent(tx, name, r.Parent); err != nil {
			return err
		}
		r.Kind, r.Labels, r.Usage, r.Updated = snapshotter.KindCommitted, info.Labels, *info.Usage, time.Now()
		return put(tx, name, r)
	})
}

// Remove implements snapshotter.Snapshotter. The snapshot is gone when its row
// is; a directory that could not be removed then is logged, and left to Cleanup,
// of which OnLeft's function is told.
func (s *Snapshotter) Remove(ctx context.Context, key string) error {
	var dir string
	err := s.record(ctx, "remove", func(tx *store.Tx) (err error) {
		s.removing.Delete(dir) // it may be run again, and fail
		if dir, err = s.removeRow(tx, key); err == nil {
			s.removing.Store(dir, true)
		}
		return err
	})
	if err != nil {
		s.removing.Delete(dir)
		return err
	}
	s.removeDir(ctx, dir)
	return nil
}

// removeRow removes the row of a snapshot without children and returns its directory.
func (s *Snapshotter) removeRow(tx *store.Tx, key string) (dir string, err error) {
	r, err := get(tx, key)
	if err != nil {
		return "", err
	}
	child, err := s.child(tx, key)
	if err != nil {
		return "", err
	}
	if child != "" {
		return "", fmt.Errorf("snapshot %q: %q is on it: %w", key, child, snapshotter.ErrInUse)
	}
	for _, user := range r.Users {
		if _, err := rows.Get(tx, user); err == nil || s.quarantined(user) {
			return "", fmt.Errorf("snapshot %q: %q shows it: %w", key, user, snapshotter.ErrInUse)
		}
	}
	return r.Dir, remove(tx, key, r)
}

// Walk implements snapshotter.Snapshotter. fn may use the snapshotter. Filters
// are refused.
func (s *Snapshotter) Walk(ctx context.Context, fn func(context.Context, snapshotter.Info) error, filters ...string) error {
	if len(filters) > 0 {
		return fmt.Errorf("overlay: walk: filter %q: filters are not supported", filters[0])
	}
	var all []snapshotter.Info
	err := s.book.View(func(tx *store.Tx) error {
		return rows.Each(tx, func(key string, r row) error {
			all = append(all, r.info(key))
			return nil
		})
	})
	if err != nil {
		return fmt.Errorf("overlay: walk: %w", err)
	}
	for _, info := range all {
		if err := fn(ctx, info); err != nil {
			return err
		}
	}
	return nil
}

// told is what the opts say about name, which is made of key: with the usage of that, which
// is walked unless WithUsage tells it.
func (s *Snapshotter) told(ctx context.Context, name, key string, opts []snapshotter.Opt) (snapshotter.Info, error) {
	var info snapshotter.Info
	if err := apply(name, &info, opts); err != nil {
		return info, err
	}
	if info.Usage == nil {
		u, err := s.Usage(ctx, key)
		if err != nil {
			return info, err
		}
		info.Usage = &u
	}
	return info, nil
}

// apply checks the key under which something is to be made, and runs the opts.
func apply(key string, info *snapshotter.Info, opts []snapshotter.Opt) error {
	if len(key) == 0 || len(key) > MaxName || strings.ContainsRune(key, 0) {
		return fmt.Errorf("snapshot %.64q: name of %d bytes, limit 1 to %d and no zero byte", key, len(key), MaxName)
	}
	for _, o := range opts {
		if err := o(info); err != nil {
			return fmt.Errorf("snapshot %q: %w", key, err)
		}
	}
	return nil
}

func (r row) info(name string) snapshotter.Info {
	return snapshotter.Info{Kind: r.Kind, Name: name, Parent: r.Parent, Labels: r.Labels, Created: r.Created, Updated: r.Updated}
}

// get returns the row of a snapshot or ErrNotFound.
func get(tx *store.Tx, key string) (row, error) {
	r, err := rows.Get(tx, key)
	if errors.Is(err, store.ErrNotFound) {
		return r, fmt.Errorf("snapshot %q: %w", key, snapshotter.ErrNotFound)
	}
	return r, err
}

// find is get in a transaction of its own.
func (s *Snapshotter) find(key string) (r row, err error) {
	err = s.book.View(func(tx *store.Tx) (err error) {
		r, err = get(tx, key)
		return err
	})
	return r, err
}

// absent returns ErrExists when the name is taken.
func absent(tx *store.Tx, name string) error {
	_, err := rows.Get(tx, name)
	switch {
	case err == nil:
		return fmt.Errorf("snapshot %q: %w", name, snapshotter.ErrExists)
	case errors.Is(err, store.ErrNotFound):
		return nil
	}
	return err
}

// checkParent returns nil when parent may be one.
func checkParent(tx *store.Tx, key, parent string) error {
	if parent == "" {
		return nil
	}
	p, err := get(tx, parent)
	if err != nil {
		return fmt.Errorf("snapshot %q: parent: %w", key, err)
	}
	if p.Kind != snapshotter.KindCommitted {
		return fmt.Errorf("snapshot %q: parent %q is %s: %w", key, parent, p.Kind, snapshotter.ErrKind)
	}
	return nil
}

// put and remove write a row together with its entry among the children.
func put(tx *store.Tx, key string, r row) error {
	if r.Parent != "" {
		if err := children.Put(tx, r.Parent+"\x00"+key, struct{}{}); err != nil {
			return err
		}
	}
	return rows.Put(tx, key, r)
}

func remove(tx *store.Tx, key string, r row) error {
	if r.Parent != "" {
		if err := children.Delete(tx, r.Parent+"\x00"+key); err != nil {
			return err
		}
	}
	return rows.Delete(tx, key)
}

// errFound ends a search.
var errFound = errors.New("found")

// child returns one snapshot that is on parent, or "". An entry whose row is
// gone counts for as long as that row may be one that was lost.
func (s *Snapshotter) child(tx *store.Tx, parent string) (child string, err error) {
	err = children.EachPrefix(tx, parent+"\x00", func(k string, _ struct{}) error {
		child = strings.TrimPrefix(k, parent+"\x00")
		if r, err := rows.Get(tx, child); err == nil && r.Parent == parent || s.quarantined(child) {
			return errFound
		}
		child = ""
		return nil
	})
	if errors.Is(err, errFound) {
		err = nil
	}
	return child, err
}

// quarantined tells whether the row of a snapshot was put aside as unreadable.
func (s *Snapshotter) quarantined(key string) bool {
	return slices.ContainsFunc(s.book.Quarantined(), func(q store.Quarantine) bool {
		return q.Table == tableName && q.Key == key
	})
}

// tree is the directory with the snapshot's own files.
func (s *Snapshotter) tree(r row) string {
	if strings.HasPrefix(r.Dir, "layers/") {
		return s.path(r.Dir)
	}
	return filepath.Join(s.path(r.Dir), "upper")
}

// mounts is what shows the snapshot, as described in the package's comment.
func (s *Snapshotter) mounts(tx *store.Tx, key string, r row) ([]snapshotter.Mount, error) {
	lowers, err := s.chain(tx, key, r.Parent)
	if err != nil {
		return nil, err
	}
	view := r.Kind == snapshotter.KindView
	switch {
	case view && len(lowers) == 0:
		return bind(s.path(r.Dir), "ro"), nil
	case view && len(lowers) == 1:
		return bind(lowers[0], "ro"), nil // overlay wants two layers at least
	case len(lowers) == 0:
		return bind(s.path(r.Dir), "rw"), nil
	}
	options := slices.Clone(s.options)
	if view {
		options = append(options, "ro")
	} else {
		options = append(options, "workdir="+filepath.Join(s.path(r.Dir), "work"), "upperdir="+s.tree(r))
	}
	options = append(options, "lowerdir="+strings.Join(lowers, ":"))
	return []snapshotter.Mount{{Type: "overlay", Source: "overlay", Options: options}}, nil
}

func bind(dir, mode string) []snapshotter.Mount {
	return []snapshotter.Mount{{Type: "bind", Source: dir, Options: []string{mode, "rbind"}}}
}

// chain returns the directories of parent and those below it, topmost first.
func (s *Snapshotter) chain(tx *store.Tx, key, parent string) ([]string, error) {
	var dirs []string
	for parent != "" {
		if len(dirs) == MaxLayers {
			return nil, fmt.Errorf("snapshot %q: more than %d layers, the limit of a mount", key, MaxLayers)
		}
		p, err := get(tx, parent)
		if err != nil {
			return nil, fmt.Errorf("snapshot %q: parent: %w", key, err)
		}
		dirs = append(dirs, s.tree(p))
		parent = p.Parent
	}
	return dirs, nil
}
