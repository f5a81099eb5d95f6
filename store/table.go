package store

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"math"
	"runtime"
	"runtime/debug"
	"sync"
	"sync/atomic"

	"go.etcd.io/bbolt"
)

// Limits of a row. They keep a damaged or mistaken length from taking the
// memory of the node; nothing that berth stores comes near them.
const (
	MaxKey = 4096     // bytes
	MaxRow = 16 << 20 // bytes of the encoded value
)

// A row in the file:
//
//	+---------+----------------+----------------------------+
//	| version | CRC-32C        | JSON of the value          |
//	| u16 BE  | u32 BE         |                            |
//	+---------+----------------+----------------------------+
//
// The sum covers table, key, version and JSON, so that a row that ended up
// under another key is noticed too.
const headerSize = 6

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// tablesBucket holds one bucket for each table.
var tablesBucket = []byte("tables")

// Table is a set of rows of type T. The zero Table is not usable.
type Table[T any] struct {
	name     string
	version  uint16
	upgrades map[uint16]func([]byte) ([]byte, error)
}

// Upgrade turns the JSON of a row of version From into that of From+1.
type Upgrade struct {
	From uint16
	Func func(json []byte) ([]byte, error)
}

// NewTable names a table whose rows are written with the given version, which
// is at least 1 and grows whenever older code could misread the rows. Rows of
// older versions go through the upgrades, one version at a time, when they are
// read, several rows at once; they are written anew only by Put. It panics when
// name is empty, the version is 0, or an upgrade does not lead to the version:
// those are mistakes in the program.
func NewTable[T any](name string, version uint16, upgrades ...Upgrade) Table[T] {
	t := Table[T]{name: name, version: version, upgrades: make(map[uint16]func([]byte) ([]byte, error))}
	if name == "" || version == 0 {
		panic(fmt.Sprintf("store: table %q version %d: need a name and a version of at least 1", name, version))
	}
	for _, u := range upgrades {
		if u.From == 0 || u.From >= version || u.Func == nil {
			panic(fmt.Sprintf("store: table %q version %d: upgrade from %d", name, version, u.From))
		}
		t.upgrades[u.From] = u.Func
	}
	return t
}

// Name is the table's name, as a [Quarantine] has it.
func (t Table[T]) Name() string { return t.name }

// Get returns the row under key. ErrNotFound when there is none; ErrCorrupt
// when it is unreadable, after which it is in the quarantine and no longer
// found; ErrNewer when a newer berth wrote it.
func (t Table[T]) Get(tx *Tx, key string) (T, error) {
	var zero T
	b := t.bucket(tx)
	if b == nil || len(key) == 0 {
		return zero, fmt.Errorf("%s %q: %w", t.name, key, ErrNotFound)
	}
	raw := b.Get([]byte(key))
	if raw == nil {
		return zero, fmt.Errorf("%s %q: %w", t.name, key, ErrNotFound)
	}
	v, err := t.decode(key, raw)
	if err != nil {
		t.note(tx, key, raw, err)
		return zero, fmt.Errorf("%s %q: %w", t.name, key, err)
	}
	return v, nil
}

// Put writes the row under key, replacing what was there. ErrTooLarge for a
// key outside 1..MaxKey bytes or a value above MaxRow bytes of JSON; other
// errors say that the value has no JSON or that tx is read-only.
func (t Table[T]) Put(tx *Tx, key string, v T) error {
	if len(key) == 0 || len(key) > MaxKey {
		return fmt.Errorf("%s: key of %d bytes, limit 1 to %d: %w", t.name, len(key), MaxKey, ErrTooLarge)
	}
	payload, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("%s %q: %w", t.name, key, err)
	}
	if len(payload) > MaxRow {
		return fmt.Errorf("%s %q: row of %d bytes, limit %d: %w", t.name, key, len(payload), MaxRow, ErrTooLarge)
	}
	b, err := t.writable(tx)
	if err != nil {
		return err
	}
	if err := b.Put([]byte(key), frame(t.name, key, t.version, payload)); err != nil {
		return fmt.Errorf("%s %q: %w", t.name, key, err)
	}
	return nil
}

// Delete removes the row under key; that there is none is no error.
func (t Table[T]) Delete(tx *Tx, key string) error {
	if !tx.tx.Writable() {
		return fmt.Errorf("%s %q: %w", t.name, key, ErrReadOnly)
	}
	b := t.bucket(tx)
	if b == nil || len(key) == 0 {
		return nil
	}
	if err := b.Delete([]byte(key)); err != nil {
		return fmt.Errorf("%s %q: %w", t.name, key, err)
	}
	return nil
}

// Reject puts the row under key into the quarantine when the transaction is over:
// it could be read here, but why says that its value makes no sense.
func (t Table[T]) Reject(tx *Tx, key string, why error) {
	if b := t.bucket(tx); b != nil && len(key) > 0 {
		if raw := b.Get([]byte(key)); raw != nil {
			t.note(tx, key, raw, fmt.Errorf("%w: %w", why, ErrCorrupt))
		}
	}
}

// Each calls fn with every row in the order of keys until it returns an error,
// which is returned. fn may change the table. Unreadable rows are left out and
// put into the quarantine; a row by a newer berth ends the loop with ErrNewer.
func (t Table[T]) Each(tx *Tx, fn func(key string, v T) error) error {
	return t.EachPrefix(tx, "", fn)
}

// EachPrefix is Each for the keys that begin with prefix.
func (t Table[T]) EachPrefix(tx *Tx, prefix string, fn func(key string, v T) error) error {
	b := t.bucket(tx)
	if b == nil {
		return nil
	}
	c := b.Cursor()
	k, raw := c.Seek([]byte(prefix))
	if !tx.tx.Writable() {
		return t.eachOf(tx, c, k, raw, prefix, fn)
	}
	for k != nil && bytes.HasPrefix(k, []byte(prefix)) {
		r := row[T]{key: string(k), raw: raw}
		r.v, r.err = t.decode(r.key, raw)
		if err := t.deliver(tx, r, fn); err != nil {
			return err
		}
		k, raw = next(tx, c, r.key)
	}
	return nil
}

// Keys calls fn with the key of every row, in order, until it returns an error, which is
// returned. The rows are not read: those are among them that Each would leave out, or end
// at. fn may change the table.
func (t Table[T]) Keys(tx *Tx, fn func(key string) error) error {
	b := t.bucket(tx)
	if b == nil {
		return nil
	}
	c := b.Cursor()
	for k, _ := c.First(); k != nil; {
		key := string(k)
		if err := fn(key); err != nil {
			return err
		}
		k, _ = next(tx, c, key)
	}
	return nil
}

// row is one that is read: raw is what is in the file.
type row[T any] struct {
	key string
	raw []byte
	v   T
	err error
}

// deliver gives a row to fn, unless it is unreadable.
func (t Table[T]) deliver(tx *Tx, r row[T], fn func(key string, v T) error) error {
	switch {
	case r.err == nil:
		return fn(r.key, r.v)
	case errors.Is(r.err, ErrCorrupt):
		t.note(tx, r.key, r.raw, r.err)
		return nil
	}
	return fmt.Errorf("%s %q: %w", t.name, r.key, r.err)
}

// Rows are decoded many at a time, by all processors: JSON takes most of the time of
// reading a table, and so of the start of a full node.
const (
	batchRows  = 256
	batchBytes = 8 << 20 // of the rows in the file; the last one may exceed it
)

// eachOf is EachPrefix where nothing can change meanwhile.
func (t Table[T]) eachOf(tx *Tx, c *bbolt.Cursor, k, raw []byte, prefix string, fn func(key string, v T) error) error {
	for k != nil && bytes.HasPrefix(k, []byte(prefix)) {
		var batch []row[T]
		size := 0
		for ; k != nil && bytes.HasPrefix(k, []byte(prefix)) && len(batch) < batchRows && size < batchBytes; k, raw = c.Next() {
			batch = append(batch, row[T]{key: string(k), raw: raw})
			size += len(raw)
		}
		t.decodeAll(batch)
		for _, r := range batch {
			if err := t.deliver(tx, r, fn); err != nil {
				return err
			}
		}
	}
	return nil
}

// decodeAll panics when decoding one of them did, as on a page that cannot be read: that
// is for the one who wants the rows, and only once nobody reads the file any more.
func (t Table[T]) decodeAll(batch []row[T]) {
	var next atomic.Int64
	var broken atomic.Pointer[any]
	work := func() {
		defer debug.SetPanicOnFault(debug.SetPanicOnFault(true)) // which is by goroutine
		defer func() {
			if p := recover(); p != nil {
				broken.CompareAndSwap(nil, &p)
			}
		}()
		for i := next.Add(1) - 1; i < int64(len(batch)); i = next.Add(1) - 1 {
			batch[i].v, batch[i].err = t.decode(batch[i].key, batch[i].raw)
		}
	}
	var wg sync.WaitGroup
	for range min(runtime.GOMAXPROCS(0), len(batch)) - 1 {
		wg.Go(work)
	}
	work()
	wg.Wait()
	if p := broken.Load(); p != nil {
		panic(*p)
	}
}

// next moves to the key after the one given. In a writable transaction fn may
// have changed the tree under the cursor, so the place is looked up again.
func next(tx *Tx, c *bbolt.Cursor, key string) ([]byte, []byte) {
	if !tx.tx.Writable() {
		return c.Next()
	}
	k, raw := c.Seek([]byte(key))
	if k != nil && string(k) == key {
		return c.Next()
	}
	return k, raw
}

// NextSequence returns 1, 2, … for this table, each once for as long as the
// book is not rebuilt. A number drawn by a transaction that is given up is
// drawn again.
func (t Table[T]) NextSequence(tx *Tx) (uint64, error) {
	b, err := t.writable(tx)
	if err != nil {
		return 0, err
	}
	n, err := b.NextSequence()
	if err != nil {
		return 0, fmt.Errorf("%s: sequence: %w", t.name, err)
	}
	return n, nil
}

// bucket returns the bucket of the table, or nil when nothing was ever put.
func (t Table[T]) bucket(tx *Tx) *bbolt.Bucket {
	tables := tx.tx.Bucket(tablesBucket)
	if tables == nil {
		return nil
	}
	return tables.Bucket([]byte(t.name))
}

func (t Table[T]) writable(tx *Tx) (*bbolt.Bucket, error) {
	if !tx.tx.Writable() {
		return nil, fmt.Errorf("%s: %w", t.name, ErrReadOnly)
	}
	tables, err := tx.tx.CreateBucketIfNotExists(tablesBucket)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", t.name, err)
	}
	b, err := tables.CreateBucketIfNotExists([]byte(t.name))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", t.name, err)
	}
	return b, nil
}

// note remembers an unreadable row, to be moved after the transaction.
func (t Table[T]) note(tx *Tx, key string, raw []byte, err error) {
	if errors.Is(err, ErrCorrupt) {
		tx.unreadable = append(tx.unreadable, unreadable{t.name, key, bytes.Clone(raw), err.Error()})
	}
}

// decode returns the value of a row, ErrCorrupt with a reason, or ErrNewer.
func (t Table[T]) decode(key string, raw []byte) (T, error) {
	var v T
	version, payload, err := unframe(t.name, key, raw)
	if err != nil {
		return v, err
	}
	if version > t.version {
		return v, fmt.Errorf("row version %d, known up to %d: %w", version, t.version, ErrNewer)
	}
	for ; version < t.version; version++ {
		up := t.upgrades[version]
		if up == nil {
			return v, fmt.Errorf("row version %d: no upgrade: %w", version, ErrCorrupt)
		}
		if payload, err = up(bytes.Clone(payload)); err != nil {
			return v, fmt.Errorf("row version %d: upgrade: %w: %w", version, err, ErrCorrupt)
		}
	}
	if err := json.Unmarshal(payload, &v); err != nil {
		var zero T
		return zero, fmt.Errorf("%w: %w", err, ErrCorrupt)
	}
	return v, nil
}

// frame puts the header before the payload.
func frame(table, key string, version uint16, payload []byte) []byte {
	row := make([]byte, headerSize, headerSize+len(payload))
	binary.BigEndian.PutUint16(row, version)
	binary.BigEndian.PutUint32(row[2:], sum(table, key, version, payload))
	return append(row, payload...)
}

// unframe checks the header and returns what is behind it. payload is part of
// row.
func unframe(table, key string, row []byte) (version uint16, payload []byte, err error) {
	if len(row) < headerSize || len(row) > headerSize+MaxRow {
		return 0, nil, fmt.Errorf("row of %d bytes, limit %d to %d: %w", len(row), headerSize, headerSize+MaxRow, ErrCorrupt)
	}
	version, payload = binary.BigEndian.Uint16(row), row[headerSize:]
	if got, want := sum(table, key, version, payload), binary.BigEndian.Uint32(row[2:]); got != want {
		return 0, nil, fmt.Errorf("checksum %08x, want %08x: %w", got, want, ErrCorrupt)
	}
	if version == 0 {
		return 0, nil, fmt.Errorf("row version 0, limit 1 to %d: %w", math.MaxUint16, ErrCorrupt)
	}
	return version, payload, nil
}

// sum is the checksum of a row. The zero bytes keep table and key apart.
func sum(table, key string, version uint16, payload []byte) uint32 {
	head := append(make([]byte, 0, len(table)+len(key)+4), table...)
	head = append(append(head, 0), key...)
	head = append(head, 0)
	head = binary.BigEndian.AppendUint16(head, version)
	return crc32.Update(crc32.Checksum(head, castagnoli), castagnoli, payload)
}
