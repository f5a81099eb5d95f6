// Package overlay keeps snapshots for the kernel's overlay file system.
//
// # Layout
//
//	<root>/layers/<n>/                 a tree without a parent: an extraction, a layer
//	<root>/snapshots/<n>/{upper,work}  the writable layer over a parent
//
// n is a decimal number, used once while the directory exists, and short so that
// a chain of many layers fits into the options of a mount. Layers do not depend
// on each other on disk: which is on which is said only in the book.
//
// # Order and crashes
//
// A directory is made before the row that names it and removed after it, so a
// crash leaves one shape only: a directory without a row. Cleanup removes those.
// It removes nothing while the book is marked as rebuilt, or a snapshot is on one
// whose row was lost, because then a running container is on such a directory.
//
// # Mount options
//
// The kernel's defaults are kept, except where a distribution turned on what
// would bind a layer to one place or kernel setting: see options. Containers run
// as root of the initial user namespace as far as the mount is concerned, so
// userxattr is not used; volatile is not used, because a failed sync of the host
// would make the next mount of the same snapshot fail.
package overlay

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"k8s.io/klog/v2"

	"github.com/berthd/berth/snapshotter"
	"github.com/berthd/berth/store"
)

// Limits.
const (
	// MaxLayers is how many layers a snapshot can be on. The kernel takes 500
	// read-only ones (OVL_MAX_STACK in fs/overlayfs), and snapshotter.OpenRoot
	// shows the writable one as one of them.
	MaxLayers = 499
	// MaxName is the longest key or name, in bytes.
	MaxName = 1024
	// maxRoot leaves room below the 255 bytes that fsconfig(2) takes for the
	// path of a layer.
	maxRoot = 200
)

// row is a snapshot in the book.
type row struct {
	Kind    snapshotter.Kind
	Parent  string            `json:",omitempty"`
	Labels  map[string]string `json:",omitempty"`
	Created time.Time
	Updated time.Time
	Dir     string            // below the root: "layers/7" or "snapshots/8"
	Usage   snapshotter.Usage // of a committed one
	// Users are snapshots that may show this tree although it is not below them any
	// more: see Replace.
	Users []string `json:",omitempty"`
}

const tableName = "snapshots"

var (
	rows = store.NewTable[row](tableName, 1)
	// children is derived from rows, and written with them, so that Remove
	// need not read all: "<parent>\x00<child>".
	children = store.NewTable[struct{}]("snapshot-children", 1)
)

// Snapshotter implements snapshotter.Snapshotter, Cleaner and Syncer.
type Snapshotter struct {
	root    string
	book    *store.Store
	options []string
	last    atomic.Uint64 // highest number given to a directory

	// Held for reading from making a directory until its row is committed, and
	// for writing while Cleanup compares the two.
	making sync.RWMutex
	// removing are directories whose rows are gone, or going, and that somebody is
	// about to remove.
	removing sync.Map

	onLeft atomic.Pointer[func()]
	sweeps *sweeps
}

var (
	_ snapshotter.Snapshotter = (*Snapshotter)(nil)
	_ snapshotter.Cleaner     = (*Snapshotter)(nil)
	_ snapshotter.Syncer      = (*Snapshotter)(nil)
	_ snapshotter.Locator     = (*Snapshotter)(nil)

	_ snapshotter.BatchRemover = (*Snapshotter)(nil)
	_ snapshotter.Replacer     = (*Snapshotter)(nil)
)

// New returns the snapshotter that keeps its directories under root, which is
// made with mode 0700, and its rows in st. Root is an absolute, clean path of at
// most 200 bytes without the characters that mean something in the options of a
// mount: comma, colon, backslash, white space and control characters.
func New(root string, st *store.Store) (*Snapshotter, error) {
	if err := checkRoot(root); err != nil {
		return nil, err
	}
	for _, dir := range []string{root, filepath.Join(root, "layers"), filepath.Join(root, "snapshots")} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("overlay: %w", err)
		}
	}
	loadModule()
	s := &Snapshotter{root: root, book: st, options: options(), sweeps: newSweeps()}
	if err := s.findLast(); err != nil {
		return nil, fmt.Errorf("overlay: %w", err)
	}
	return s, nil
}

func checkRoot(root string) error {
	if !filepath.IsAbs(root) || filepath.Clean(root) != root {
		return fmt.Errorf("overlay: root %q: not an absolute, clean path", root)
	}
	if len(root) > maxRoot {
		return fmt.Errorf("overlay: root %q: %d bytes, limit %d", root, len(root), maxRoot)
	}
	if i := strings.IndexFunc(root, func(r rune) bool { return r <= ' ' || r == 0x7f || strings.ContainsRune(`,:\`, r) }); i >= 0 {
		return fmt.Errorf("overlay: root %q: character %q cannot be used in mount options", root, root[i])
	}
	return nil
}

// options turns off what the kernel, by its configuration, would do unasked:
//
//   - index: would refuse to mount a snapshot while an earlier mount of it is
//     still going away, and tie it to the identity of the layers below;
//   - metacopy: files that hold no data, only a reference to the layer below,
//     would make a committed snapshot depend on this setting, and the kernel's
//     documentation warns of it where layers come from strangers;
//   - redirect_dir: the same for renamed directories.
//
// What is off anyway is not mentioned: options stay short, and a kernel that
// does not know the word is not asked to.
func options() []string {
	var off []string
	for _, name := range []string{"index", "metacopy", "redirect_dir"} {
		v, err := os.ReadFile("/sys/module/overlay/parameters/" + name)
		if err == nil && strings.TrimSpace(string(v)) == "Y" {
			off = append(off, name+"=off")
		}
	}
	return off
}

// findLast starts the numbers above all that a directory or a row has. Numbers
// are not drawn from the book, because a rebuilt one would begin at 1 again,
// among directories that containers may be using.
func (s *Snapshotter) findLast() error {
	dirs, err := s.directories()
	if err != nil {
		return err
	}
	err = s.book.View(func(tx *store.Tx) error {
		return rows.Each(tx, func(_ string, r row) error {
			dirs = append(dirs, r.Dir)
			return nil
		})
	})
	if err != nil {
		return err
	}
	var last uint64
	for _, d := range dirs {
		if n, err := strconv.ParseUint(filepath.Base(d), 10, 63); err == nil {
			last = max(last, n)
		}
	}
	s.last.Store(last)
	return nil
}

// directories lists what is on disk, in the form of row.Dir.
func (s *Snapshotter) directories() ([]string, error) {
	var dirs []string
	for _, kind := range []string{"layers", "snapshots"} {
		entries, err := os.ReadDir(filepath.Join(s.root, kind))
		if err != nil {
			return nil, err
		}
		for _, e := range entries {
			dirs = append(dirs, kind+"/"+e.Name())
		}
	}
	return dirs, nil
}

// OnLeft names the function that is called when Remove had to leave a directory
// behind, perhaps by several goroutines at once. It is to see to it that Cleanup is
// called some time later, and does not block.
func (s *Snapshotter) OnLeft(f func()) { s.onLeft.Store(&f) }

// Cleanup implements snapshotter.Cleaner. When every snapshot is on layers that the
// book knows, it also ends the care for rows that were lost.
func (s *Snapshotter) Cleanup(ctx context.Context) error {
	leaked, err := s.leaked()
	if errors.Is(err, errIncomplete) {
		klog.FromContext(ctx).Info("Snapshot directories not swept", "root", s.root, "reason", err)
		return nil
	}
	if err != nil {
		return fmt.Errorf("overlay: cleanup: %w", err)
	}
	var errs []error
	for _, dir := range leaked {
		if err := ctx.Err(); err != nil {
			errs = append(errs, err)
			break
		}
		if freed := s.sweeps.of(dir); freed == nil {
			klog.FromContext(ctx).V(2).Info("Removing snapshot directory without a row", "dir", dir)
		} else {
			select {
			case <-freed:
			case <-ctx.Done():
			}
		}
		errs = append(errs, removeTree(s.path(dir), ctx.Done()))
	}
	err = errors.Join(errs...)
	if err == nil && s.Lost() {
		err = errors.Join(s.dropChildren(), s.book.ForgetTable(tableName))
	}
	if err != nil {
		return fmt.Errorf("overlay: cleanup: %w", err)
	}
	return nil
}

// Leaked implements snapshotter.Cleaner.
func (s *Snapshotter) Leaked(context.Context) ([]string, error) {
	leaked, err := s.leaked()
	if errors.Is(err, errIncomplete) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("overlay: leaked: %w", err)
	}
	var paths []string
	for _, dir := range leaked {
		if _, going := s.removing.Load(dir); going {
			continue
		}
		if _, err := os.Lstat(s.path(dir)); err == nil { // it may have gone just now
			paths = append(paths, s.path(dir))
		}
	}
	return paths, nil
}

// dropChildren removes what is said of children whose rows were lost.
func (s *Snapshotter) dropChildren() error {
	return s.book.Update(func(tx *store.Tx) error {
		return children.Each(tx, func(key string, _ struct{}) error {
			parent, child, _ := strings.Cut(key, "\x00")
			r, err := rows.Get(tx, child)
			if errors.Is(err, store.ErrNotFound) || err == nil && r.Parent != parent {
				return children.Delete(tx, key)
			}
			return nil
		})
	})
}

// errIncomplete: a snapshot may be on a directory that the book does not know.
var errIncomplete = errors.New("the book may be missing rows")

// Lost implements snapshotter.Cleaner: rows were put aside as unreadable.
func (s *Snapshotter) Lost() bool {
	return slices.ContainsFunc(s.book.Quarantined(), func(q store.Quarantine) bool { return q.Table == tableName })
}

// leaked is what is there minus what the book knows. A directory in it is
// nobody's for good, as its number is not given out again. The error is
// errIncomplete if it cannot be told.
func (s *Snapshotter) leaked() ([]string, error) {
	if s.book.Rebuilt() {
		return nil, fmt.Errorf("%w: it was rebuilt", errIncomplete)
	}
	s.making.Lock()
	defer s.making.Unlock()
	dirs, err := s.directories()
	if err != nil {
		return nil, err
	}
	all := make(map[string]row)
	known := make(map[string]bool)
	err = s.book.View(func(tx *store.Tx) error {
		return rows.Each(tx, func(key string, r row) error {
			all[key] = r
			known[r.Dir] = true
			return nil
		})
	})
	if err != nil {
		return nil, err
	}
	if s.Lost() { // found out only now, by reading
		if err := checkChains(all); err != nil {
			return nil, err
		}
	}
	return slices.DeleteFunc(dirs, func(d string) bool { return known[d] }), nil
}

// checkChains makes sure that each writable layer is on layers that the book
// knows. A layer whose row was lost, and which was pulled again since, is another
// directory than the one that is mounted: it has a higher number than what was
// put on the lost one.
func checkChains(all map[string]row) error {
	for key, r := range all {
		if !strings.HasPrefix(r.Dir, "snapshots/") {
			continue
		}
		for name := r.Parent; name != ""; {
			p, ok := all[name]
			if !ok || number(p.Dir) == 0 || number(p.Dir) >= number(r.Dir) {
				return fmt.Errorf("%w: snapshot %q is on %q, which was lost", errIncomplete, key, name)
			}
			name = p.Parent
		}
	}
	return nil
}

// number is the number of a directory, 0 if it has none.
func number(dir string) uint64 {
	n, err := strconv.ParseUint(filepath.Base(dir), 10, 64)
	if err != nil {
		return 0
	}
	return n
}

func (s *Snapshotter) path(dir string) string { return filepath.Join(s.root, dir) }
