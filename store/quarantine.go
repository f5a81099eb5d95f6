package store

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"go.etcd.io/bbolt"
)

// Quarantine tells of something unreadable that was put aside: a row (Table
// and Key), or the whole book before this one (File).
type Quarantine struct {
	Table  string
	Key    string
	Reason string
	File   string // path of the file set aside
	At     time.Time
}

// unreadable is a row still at its place.
type unreadable struct {
	table, key string
	raw        []byte
	reason     string
}

// quarantined is a Quarantine in the file, with the bytes as they were found,
// for whoever wants to look at them.
type quarantined struct {
	Quarantine
	Raw []byte `json:",omitempty"`
}

// quarantineBucket holds the quarantined rows under numbers.
var quarantineBucket = []byte("quarantine")

// Quarantined lists what was put aside, oldest first, in this run and in
// earlier ones, until ForgetQuarantined.
func (s *Store) Quarantined() []Quarantine {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.quarantined)
}

// ForgetQuarantined drops the quarantined rows and the list of them. A file
// that was set aside stays on disk.
func (s *Store) ForgetQuarantined() error {
	return s.Update(func(tx *Tx) error {
		if tx.tx.Bucket(quarantineBucket) != nil {
			if err := tx.tx.DeleteBucket(quarantineBucket); err != nil {
				return fmt.Errorf("quarantine: %w", err)
			}
		}
		tx.OnCommit(func() {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.quarantined = nil
		})
		return nil
	})
}

// ForgetTable drops the quarantined rows of one table, when what they were about
// is gone or is known again.
func (s *Store) ForgetTable(table string) error {
	return s.forget(func(q Quarantine) bool { return q.Table == table })
}

// ForgetWithCopy drops entries of the quarantine after it has written them, with the
// bytes as they were found, to a new file with mode 0600: one line of JSON each. It
// returns how many; with none to drop no file is made.
func (s *Store) ForgetWithCopy(path string, which func(Quarantine) bool) (n int, err error) {
	var lines []byte
	begun, wanted := time.Now(), which
	which = func(q Quarantine) bool { return !q.At.After(begun) && wanted(q) } // what comes later has no copy
	err = s.View(func(tx *Tx) error {
		b := tx.tx.Bucket(quarantineBucket)
		if b == nil {
			return nil
		}
		return b.ForEach(func(_, v []byte) error {
			var q quarantined
			if json.Unmarshal(v, &q) == nil && which(q.Quarantine) {
				lines, n = append(append(lines, v...), '\n'), n+1
			}
			return nil
		})
	})
	if err != nil || n == 0 {
		return 0, err
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return 0, fmt.Errorf("quarantine: copy: %w", err)
	}
	_, err = f.Write(lines)
	if err := errors.Join(err, f.Sync(), f.Close(), syncDir(filepath.Dir(path))); err != nil {
		return 0, fmt.Errorf("quarantine: copy: %w", err)
	}
	return n, s.forget(which)
}

func (s *Store) forget(which func(Quarantine) bool) error {
	return s.Update(func(tx *Tx) error {
		b := tx.tx.Bucket(quarantineBucket)
		if b == nil {
			return nil
		}
		var keys [][]byte
		c := b.Cursor()
		for k, v := c.First(); k != nil; k, v = c.Next() {
			var q quarantined
			if json.Unmarshal(v, &q) == nil && which(q.Quarantine) {
				keys = append(keys, bytes.Clone(k))
			}
		}
		for _, k := range keys {
			if err := b.Delete(k); err != nil {
				return fmt.Errorf("quarantine: %w", err)
			}
		}
		tx.OnCommit(func() {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.quarantined = slices.DeleteFunc(slices.Clone(s.quarantined), which)
		})
		return nil
	})
}

// putAside moves rows to the quarantine, unless they were replaced since. When
// that cannot be written, they are listed all the same: the rows stay where
// they are, unreadable, and the next reader tries again.
func (s *Store) putAside(rows []unreadable) {
	if len(rows) == 0 {
		return
	}
	var moved []Quarantine
	err := s.Update(func(tx *Tx) error {
		moved = nil
		for _, r := range rows {
			q, ok, err := r.move(tx.tx)
			if err != nil {
				return err
			}
			if ok {
				moved = append(moved, q)
			}
		}
		return nil
	})
	if err != nil {
		moved = nil
		for _, r := range rows {
			moved = append(moved, r.entry())
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, q := range moved {
		known := func(o Quarantine) bool { return o.Table == q.Table && o.Key == q.Key && o.Reason == q.Reason }
		if !slices.ContainsFunc(s.quarantined, known) {
			s.quarantined = append(s.quarantined, q)
		}
	}
}

func (r unreadable) entry() Quarantine {
	return Quarantine{Table: r.table, Key: r.key, Reason: r.reason, At: time.Now()}
}

// move does the work of putAside for one row; ok is false when the row is no
// longer the one that was found.
func (r unreadable) move(tx *bbolt.Tx) (q Quarantine, ok bool, err error) {
	tables := tx.Bucket(tablesBucket)
	if tables == nil {
		return q, false, nil
	}
	b := tables.Bucket([]byte(r.table))
	if b == nil || !bytes.Equal(b.Get([]byte(r.key)), r.raw) {
		return q, false, nil
	}
	q = r.entry()
	if err := putQuarantined(tx, quarantined{q, r.raw}); err != nil {
		return q, false, err
	}
	if err := b.Delete([]byte(r.key)); err != nil {
		return q, false, fmt.Errorf("quarantine: %s %q: %w", r.table, r.key, err)
	}
	return q, true, nil
}

func putQuarantined(tx *bbolt.Tx, q quarantined) error {
	b, err := tx.CreateBucketIfNotExists(quarantineBucket)
	if err != nil {
		return fmt.Errorf("quarantine: %w", err)
	}
	n, err := b.NextSequence()
	if err != nil {
		return fmt.Errorf("quarantine: %w", err)
	}
	v, err := json.Marshal(q)
	if err != nil {
		return fmt.Errorf("quarantine: %w", err)
	}
	if err := b.Put(binary.BigEndian.AppendUint64(nil, n), v); err != nil {
		return fmt.Errorf("quarantine: %w", err)
	}
	return nil
}

// loadQuarantined reads the list at start. An entry that is itself unreadable
// tells nothing any more and is passed over.
func (s *Store) loadQuarantined(tx *bbolt.Tx) {
	b := tx.Bucket(quarantineBucket)
	if b == nil {
		return
	}
	c := b.Cursor()
	for k, v := c.First(); k != nil; k, v = c.Next() {
		var q quarantined
		if json.Unmarshal(v, &q) == nil {
			s.quarantined = append(s.quarantined, q.Quarantine)
		}
	}
}
