package store

import (
	"errors"
	"strconv"
)

// schema is the version of the layout of the book as a whole. It grows when an
// older berth could not make sense of the tables, however their rows read.
const schema = 1

// Keys of Meta that the store itself uses.
const (
	// MetaSchema is the layout's version, a decimal number.
	MetaSchema = "schema"
	// MetaRebuilt is "1" in a book that replaced a corrupt one, until it is
	// cleared.
	MetaRebuilt = "rebuilt"
)

var meta = NewTable[string]("meta", 1)

// Meta returns what SetMeta wrote under key, or "" when nothing was.
func (s *Store) Meta(key string) (string, error) {
	var value string
	err := s.View(func(tx *Tx) (err error) {
		value, err = meta.Get(tx, key)
		return err
	})
	if errors.Is(err, ErrNotFound) {
		return "", nil
	}
	return value, err
}

// SetMeta writes value under key, durably; "" removes the key.
func (s *Store) SetMeta(key, value string) error {
	return s.Update(func(tx *Tx) error { return putMeta(tx, key, value) })
}

func putMeta(tx *Tx, key, value string) error {
	if value == "" {
		return meta.Delete(tx, key)
	}
	return meta.Put(tx, key, value)
}

// Rebuilt tells that this book was begun because the one before it was corrupt,
// so that what exists on the node may have no row. It stays true over restarts
// until ClearRebuilt. A flag that cannot be read counts as set.
func (s *Store) Rebuilt() bool {
	v, err := s.Meta(MetaRebuilt)
	return err != nil || v != ""
}

// ClearRebuilt ends Rebuilt: whatever was left over from the lost book has been
// taken over or removed.
func (s *Store) ClearRebuilt() error { return s.SetMeta(MetaRebuilt, "") }

// checkSchema refuses a book that this version cannot know. An unreadable mark
// is written anew: every row still says its own version.
func (s *Store) checkSchema() error {
	said, err := s.schemaKnown()
	if said || err != nil {
		return err
	}
	return s.SetMeta(MetaSchema, strconv.Itoa(schema))
}
