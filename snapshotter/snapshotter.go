// Package snapshotter defines how berth keeps file system trees: image layers
// that never change, and the writable or read-only views that containers get
// of a chain of them.
//
// # Vocabulary
//
// A snapshot is known by a key or, once committed, by a name; both live in one
// flat set of strings. Its kind says what may be done with it:
//
//   - active: writable, made by Prepare on a parent or on nothing;
//   - view: read-only, made by View;
//   - committed: immutable, made by Commit out of an active snapshot, and the
//     only kind that may be a parent.
//
// A layer is committed under its chain ID, the digest of the diff IDs from the
// base up to it (OCI image-spec, config.md, "Layer ChainID").
//
// # A layer and a container
//
//	m, _ := s.Prepare(ctx, "extract-1", "")             // an empty directory
//	// unpack into m[0].Source …
//	s.Commit(ctx, chainID, "extract-1", WithParent(p))  // parent named late
//	m, _ = s.Prepare(ctx, containerID, chainID)         // its writable layer
//	// hand m to the shim, which mounts it
//	s.Remove(ctx, containerID)
//
// Because the parent may be named as late as in Commit, layers of one image
// unpack at the same time into directories of their own.
//
// Nothing here mounts on the host: mounts are returned as data (Mount), and the
// shim mounts them in a namespace that lives as long as the container.
package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// Errors of a Snapshotter, tested with errors.Is.
var (
	// ErrNotFound: no snapshot has that key or name.
	ErrNotFound = errors.New("snapshot not found")
	// ErrExists: the key or name is taken.
	ErrExists = errors.New("snapshot exists")
	// ErrInUse: the snapshot has children, so it cannot be removed.
	ErrInUse = errors.New("snapshot has children")
	// ErrKind: the snapshot is of the wrong kind for the call, such as a
	// parent that is not committed.
	ErrKind = errors.New("snapshot kind does not allow this")
)

// Kind tells what may be done with a snapshot.
type Kind uint8

// The kinds. The numbers are stored; they never change.
const (
	KindUnknown Kind = iota
	KindView
	KindActive
	KindCommitted
)

func (k Kind) String() string {
	switch k {
	case KindView:
		return "view"
	case KindActive:
		return "active"
	case KindCommitted:
		return "committed"
	}
	return fmt.Sprintf("kind(%d)", uint8(k))
}

// Info describes a snapshot.
type Info struct {
	Kind    Kind
	Name    string            // key or name
	Parent  string            // "" for none
	Labels  map[string]string // the caller's own; nil for none
	Created time.Time
	Updated time.Time
	// Usage is set by WithUsage for a backend to read in Commit. Stat and Walk
	// leave it nil: ask Snapshotter.Usage.
	Usage *Usage
}

// Usage is what a snapshot itself takes on disk, its parents left out.
type Usage struct {
	Size   int64 // bytes allocated
	Inodes int64 // files, directories and links; one for all names of a file
}

// Mount is one mount(2) call as data. The order of a list matters.
type Mount struct {
	Type    string   // file system type, or "bind"
	Source  string   // device, directory, or a word such as "overlay"
	Target  string   // path below the root to mount on; "" is the root itself
	Options []string // as mount(8) takes them with -o
}

// Opt changes the Info with which a snapshot is made or committed.
type Opt func(*Info) error

// WithLabels sets the labels of a snapshot.
func WithLabels(labels map[string]string) Opt {
	return func(i *Info) error {
		i.Labels = labels
		return nil
	}
}

// WithParent, given to Commit, sets the parent of a snapshot that was prepared
// without one. The parent must be committed by then.
func WithParent(name string) Opt {
	return func(i *Info) error {
		i.Parent = name
		return nil
	}
}

// WithUsage, given to Commit, tells what the snapshot takes, so that it need not
// be walked: who has just unpacked a layer knows. The caller is believed.
func WithUsage(u Usage) Opt {
	return func(i *Info) error {
		if u.Size < 0 || u.Inodes < 0 {
			return fmt.Errorf("usage: size %d, inodes %d, limit 0 or more", u.Size, u.Inodes)
		}
		i.Usage = &u
		return nil
	}
}

// Snapshotter keeps snapshots. The method names and their meaning are those of
// containerd's interface of the same name, so that a snapshotter written for it
// can be adapted. All methods may be called concurrently; those that change
// something are durable in the book when they return, while the data inside a
// snapshot is durable only after Watch.Sync.
type Snapshotter interface {
	// Stat returns the Info of a key or name, or ErrNotFound.
	Stat(ctx context.Context, key string) (Info, error)
	// Update replaces the labels of info.Name. Of fieldpaths "labels" and
	// "labels.<key>" are known; none means all labels.
	Update(ctx context.Context, info Info, fieldpaths ...string) (Info, error)
	// Usage returns what the snapshot takes. For an active one it walks the
	// writable layer, which can take long; for a committed one it is stored.
	Usage(ctx context.Context, key string) (Usage, error)
	// Mounts returns the mounts of an active snapshot or a view, as Prepare
	// and View did.
	Mounts(ctx context.Context, key string) ([]Mount, error)
	// Prepare makes an active snapshot. ErrExists when the key is taken,
	// ErrNotFound or ErrKind for the parent.
	Prepare(ctx context.Context, key, parent string, opts ...Opt) ([]Mount, error)
	// View makes a read-only snapshot of parent; errors as with Prepare.
	View(ctx context.Context, key, parent string, opts ...Opt) ([]Mount, error)
	// Commit turns the active snapshot key into the committed snapshot name.
	// The key is gone afterwards. ErrExists when the name is taken: then the
	// active snapshot stays, for the caller to remove.
	Commit(ctx context.Context, name, key string, opts ...Opt) error
	// Remove removes a snapshot that has no children (else ErrInUse). After
	// ErrNotFound there is nothing left to do.
	Remove(ctx context.Context, key string) error
	// Walk calls fn for each snapshot until it returns an error. Filters are
	// not used by berth; a backend may refuse them.
	Walk(ctx context.Context, fn func(context.Context, Info) error, filters ...string) error
	// Close ends the use of the snapshotter, and what it does in the background;
	// snapshots stay.
	Close() error
}

// Cleaner is a Snapshotter that can sweep: remove what is on disk and has no
// snapshot that it belongs to, as a crash in the middle of Remove leaves it. The
// caller makes sure that every snapshot which is mounted somewhere exists, that
// is, that Stat finds it; what it is on is the Snapshotter's to know.
type Cleaner interface {
	Cleanup(ctx context.Context) error
	// Leaked returns the absolute paths of what Cleanup would remove now, what is
	// being made or removed by somebody left out.
	Leaked(ctx context.Context) ([]string, error)
	// Lost tells whether records of snapshots were lost and a Cleanup, when
	// nothing is on them any more, has not made up for that yet.
	Lost() bool
}

// Locator is a Snapshotter that keeps each committed snapshot as a directory of its own.
type Locator interface {
	// Locate returns the absolute path of what the committed snapshot name holds
	// itself, its parents left out: files, and whiteouts in the form of overlayfs.
	// Nothing may be changed there. ErrNotFound, ErrKind.
	Locate(ctx context.Context, name string) (string, error)
}

// BatchRemover is a Snapshotter that can remove many snapshots at the cost of one.
type BatchRemover interface {
	// RemoveAll removes those of keys that have no children, in one transaction. A
	// snapshot whose children are removed by the same call counts as having none, if they
	// stand before it. What is not there counts as removed. The result are the keys that
	// are gone, for all readers and for good; after an error none is. What they took on
	// disk is freed in the background; freed is closed when that has ended, be it because
	// something was left to Cleanup, or because of Close. It is never nil.
	RemoveAll(ctx context.Context, keys []string) (removed []string, freed <-chan struct{}, err error)
}

// Replacer is a Snapshotter that can exchange what a committed snapshot holds, for one that
// was damaged.
type Replacer interface {
	// Replace gives the committed snapshot name the tree of the active snapshot key, which
	// was prepared without a parent and whose key is gone afterwards. Parent, children and
	// labels of name stay; WithUsage tells what the new tree takes. Mounts that were made
	// before go on with the old tree: while snapshots that are not committed are on name,
	// it is kept under a name of its own that begins with "replaced-", and cannot be
	// removed (ErrInUse) before them. Errors: ErrNotFound, ErrKind.
	Replace(ctx context.Context, name, key string, opts ...Opt) error
}

// Syncer is a Snapshotter whose data can be made durable.
type Syncer interface {
	// Watch begins to look out for writes that the disk refuses: to be called before
	// what is to be made durable is written, as the kernel tells of each such write
	// only those who were watching. The caller closes what it gets.
	Watch() (Watch, error)
}

// Watch is the way from writing something to knowing that it is durable.
type Watch interface {
	// Sync makes durable all that was written into any snapshot before the call: when
	// it returns, that survives a power cut. An error means that something that was
	// written since Watch may be lost, by whomever; another call would not tell of it again.
	Sync(ctx context.Context) error
	Close() error
}
