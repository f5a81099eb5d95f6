// Package store keeps the book: the one database file in which berth writes
// down what exists and what it was about to do.
//
// # Nouns
//
//   - Store: the open file. One process holds it at a time.
//   - Tx: a view of the book at one moment, writable inside Update.
//   - Table: rows of one Go type under string keys. A row is framed with the
//     version of its layout and a checksum, so that damage is noticed when a
//     row is read and never believed.
//   - Meta: a few named strings about the book itself.
//   - Quarantine: what was unreadable and has been put aside.
//
// # A row's life
//
//	var pods = store.NewTable[Pod]("pods", 1)
//
//	err := book.Update(func(tx *store.Tx) error {
//		return pods.Put(tx, pod.ID, pod)
//	})
//
// # Durability
//
// When Update returns nil, its effect survives a power cut. Callers that arrive
// while a commit is being written share the next one, so that a hundred pods
// starting at once cost a few fsyncs and not a hundred.
//
// # Damage
//
// A damaged book never keeps a node from starting. A file that is no longer a
// consistent database is renamed to <path>.corrupt-<unixnano> and a new one is
// begun, which says so (Rebuilt) until its owner has come to terms with the
// loss (ClearRebuilt). A single unreadable row is moved to the quarantine.
// Only a book written by a newer berth is refused (ErrNewer), because reading
// it wrongly would lose what it says.
//
// # Caveats
//
//   - The function given to Update may run more than once, possibly on another
//     goroutine: it must not have effects outside the transaction, nor call
//     Update, nor leave by runtime.Goexit (t.Fatal in a test).
//   - The function given to View should be short: pages that it sees cannot be
//     reused meanwhile. It must not call Update.
//   - Values are decoded copies; nothing returned points into the file.
//
// # Full disks
//
// The file is created with 16 MiB allocated, and grown in such steps ahead of
// need. As bbolt writes changed pages into free ones, removing rows works on a
// full disk, and so does adding some. On file systems that write every block
// anew (btrfs, or loop files on one) the allocation cannot promise this.
//
// # Broken disks
//
// A page that the disk does not give is an error with EIO in it, of the View or
// Update that wanted it. When bbolt itself cannot go on after it, each later Update
// fails with that error, until the book is opened again.
package store

import (
	"errors"
	"fmt"
	"runtime/debug"
	"sync"

	"go.etcd.io/bbolt"
)

// Errors of the book, tested with errors.Is.
var (
	// ErrNotFound: the table has no row under the key.
	ErrNotFound = errors.New("row not found")
	// ErrCorrupt: the row or file is not as it was written.
	ErrCorrupt = errors.New("corrupt")
	// ErrNewer: the book or row was written by a newer version of berth.
	ErrNewer = errors.New("written by a newer version")
	// ErrLocked: another process has the book open.
	ErrLocked = errors.New("held by another process")
	// ErrReadOnly: a change was tried outside of Update.
	ErrReadOnly = errors.New("transaction is read-only")
	// ErrTooLarge: a key or row exceeds its limit.
	ErrTooLarge = errors.New("too large")
)

// Store is an open book. All methods may be called concurrently.
type Store struct {
	path  string
	db    *bbolt.DB
	group group

	mu          sync.Mutex // guards quarantined
	quarantined []Quarantine
}

// Tx is the book at one moment. It must not be used after the function that it
// was given to has returned.
type Tx struct {
	tx         *bbolt.Tx
	unreadable []unreadable // found by this transaction, put aside after it
}

// OnCommit registers fn to run once the transaction is durable, before the
// next one begins, in the order in which transactions were committed. It does
// not run when the transaction is given up. Immutable views of the book are
// published from here, so that the newest one wins. fn must be quick and must
// not use the Store.
func (tx *Tx) OnCommit(fn func()) { tx.tx.OnCommit(fn) }

// View runs fn on the book as of the last commit. It neither waits for a commit
// in progress nor delays one. The error is that of fn.
func (s *Store) View(fn func(*Tx) error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			if err = fault(p); err == nil {
				panic(p)
			}
			err = fmt.Errorf("book %s: %w", s.path, err)
		}
	}()
	var t *Tx
	err = s.db.View(func(b *bbolt.Tx) error {
		t = &Tx{tx: b}
		return fn(t)
	})
	if t == nil && err != nil {
		return fmt.Errorf("book %s: %w", s.path, err)
	}
	if t != nil && len(t.unreadable) > 0 {
		s.putAside(t.unreadable)
	}
	return err
}

// Close waits for transactions that are running and closes the file. The Store
// must not be used afterwards; what is tried gets an error.
func (s *Store) Close() error {
	if err := s.db.Close(); err != nil {
		return fmt.Errorf("book %s: close: %w", s.path, err)
	}
	return nil
}
