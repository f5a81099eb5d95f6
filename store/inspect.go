package store

import (
	"errors"
	"fmt"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.etcd.io/bbolt"
)

// Inspect opens a book that exists to look at it, and changes nothing: a file that
// Open would set aside gives ErrCorrupt, and rows that cannot be read stay where
// they are, listed by Quarantined. While it is open no berthd can start on the
// book, and Inspect waits for one that runs as Open does. os.ErrNotExist if there
// is no book.
func Inspect(path string) (*Store, error) {
	db, err := openDB(path, true)
	if err != nil {
		return nil, fmt.Errorf("book %s: %w", path, err)
	}
	s := &Store{path: path, db: db}
	err = s.checkReading()
	if err == nil {
		_ = db.View(func(tx *bbolt.Tx) error {
			s.loadQuarantined(tx)
			return nil
		})
		_, err = s.schemaKnown()
	}
	if err != nil {
		return nil, fmt.Errorf("book %s: %w", path, errors.Join(err, db.Close()))
	}
	return s, nil
}

// Path is the file.
func (s *Store) Path() string { return s.path }

// Check compares the pages of the book with each other, as Open does, and returns
// ErrCorrupt with what it found, with EIO if a page is not readable. No commit is
// made meanwhile. It must not be called by the functions of Update and View.
func (s *Store) Check() error {
	if s.db.IsReadOnly() {
		if err := s.checkReading(); err != nil {
			return fmt.Errorf("book %s: %w", s.path, err)
		}
		return nil
	}
	return s.unchanged(func(tx *Tx) error {
		if err := check(tx.tx); err != nil {
			return fmt.Errorf("book %s: %w", s.path, err)
		}
		return nil
	})
}

// Unreadable lists the rows of all tables whose checksums are wrong and that are not
// in the quarantine: what has become of the file since they were read. It changes
// nothing. It ends early at a page that is not readable, of which Check tells.
func (s *Store) Unreadable() (bad []Quarantine) {
	known := s.Quarantined()
	_ = s.View(func(tx *Tx) (err error) { // after a close there is nothing to tell
		defer func() {
			if p := recover(); p != nil {
				err = panicked(p)
			}
		}()
		tables := tx.tx.Bucket(tablesBucket)
		if tables == nil {
			return nil
		}
		return tables.ForEachBucket(func(name []byte) error {
			return tables.Bucket(name).ForEach(func(k, v []byte) error {
				_, _, err := unframe(string(name), string(k), v)
				q := Quarantine{Table: string(name), Key: string(k), At: time.Now()}
				if err == nil || slices.ContainsFunc(known, func(o Quarantine) bool { return o.Table == q.Table && o.Key == q.Key }) {
					return nil
				}
				q.Reason = err.Error()
				bad = append(bad, q)
				return nil
			})
		})
	})
	return bad
}

// checkReading is check while nobody can write: nobody else has the book yet, or it is
// only looked at.
func (s *Store) checkReading() error {
	tx, err := s.db.Begin(false)
	if err != nil {
		return err
	}
	defer func() { _ = tx.Rollback() }() // its only error is that the transaction has ended
	return check(tx)
}

// check reads every page, so that damage is met here and not later in the
// middle of an operation. Reading a truncated file faults, and bbolt panics on
// pages that contradict each other; both become ErrCorrupt, the former with EIO.
// bbolt's check needs the list of free pages to stand still.
func check(tx *bbolt.Tx) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			if err = panicked(p); !errors.Is(err, ErrCorrupt) {
				err = fmt.Errorf("%w: %w", ErrCorrupt, err)
			}
		}
	}()
	// bbolt's own check runs on a goroutine of its own, where a fault
	// cannot be caught, and trusts the sizes of pages: so these two first.
	if err := checkPages(tx); err != nil {
		return err
	}
	if err := tx.ForEach(walkBucket); err != nil {
		return err
	}
	var problems []string
	for err := range tx.Check() {
		if len(problems) < 3 {
			problems = append(problems, err.Error())
		}
	}
	if len(problems) > 0 {
		return fmt.Errorf("%w: %s", ErrCorrupt, strings.Join(problems, "; "))
	}
	return nil
}

// schemaKnown tells whether the book says the version of its layout, with ErrNewer
// for one that this program does not know. An unreadable mark says none.
func (s *Store) schemaKnown() (said bool, err error) {
	v, err := s.Meta(MetaSchema)
	if err != nil && !errors.Is(err, ErrCorrupt) {
		return false, fmt.Errorf("meta: %w", err)
	}
	n, err := strconv.ParseUint(v, 10, 32)
	if err != nil {
		return false, nil
	}
	if n > schema {
		return true, fmt.Errorf("schema %d, known up to %d: %w", n, schema, ErrNewer)
	}
	return true, nil
}
