package store

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"runtime/debug"
	"time"

	"go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"
	"golang.org/x/sys/unix"
)

const (
	// step is how much space the file gets at a time, in bytes.
	step = 16 << 20
	// headroom is how much of it is left when the next step is taken: more
	// than the pages of one transaction, a free list included.
	headroom = step / 4
	// mapSize is how much of the address space the file is mapped into. Up to
	// it the file never has to be mapped anew, which would make writers wait
	// for all readers. Costs no memory.
	mapSize = 256 << 20
)

// lockTimeout is how long Open waits for the process that has the book.
var lockTimeout = 5 * time.Second

// Open opens the book, or begins it with mode 0600 in a directory that exists.
// It waits 5 s for another process to let go of it, then fails with ErrLocked
// and the name of that process, unless that was killed and cannot end: then a copy
// takes the place of the file. A file that is not a consistent database is
// renamed to <path>.corrupt-<unixnano> and a new book is begun; see Rebuilt and
// Quarantined. A book by a newer berth gives ErrNewer.
func Open(path string) (*Store, error) {
	s, err := open(path)
	if errors.Is(err, ErrLocked) && abandoned(path) {
		if err = takeOver(path); err == nil {
			s, err = open(path)
		}
	}
	if errors.Is(err, ErrCorrupt) {
		var aside string
		if aside, err = setAside(path, err); err == nil {
			s, err = open(path)
		}
		if err != nil {
			err = fmt.Errorf("after setting aside %q: %w", aside, err)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("book %s: %w", path, err)
	}
	return s, nil
}

// open does one attempt. After ErrCorrupt the file is closed and in its place.
func open(path string) (*Store, error) {
	if err := create(path, nil); err != nil {
		return nil, err
	}
	db, err := openDB(path, false)
	if err != nil {
		return nil, err
	}
	s := &Store{path: path, db: db}
	if err := s.checkReading(); err != nil {
		return nil, errors.Join(err, db.Close())
	}
	_ = db.View(func(tx *bbolt.Tx) error {
		s.loadQuarantined(tx)
		return nil
	})
	if err := s.checkSchema(); err != nil {
		return nil, errors.Join(err, db.Close())
	}
	s.reserve()
	return s, nil
}

// openDB opens an existing file with bbolt, which panics on some damage.
func openDB(path string, readOnly bool) (db *bbolt.DB, err error) {
	var file *os.File
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			// bbolt had no chance to. The mapping is lost, and it alone would
			// keep the lock.
			_ = unix.Flock(int(file.Fd()), unix.LOCK_UN)
			file.Close()
			db, err = nil, fmt.Errorf("%w: %v", ErrCorrupt, p)
		}
	}()
	db, err = bbolt.Open(path, 0o600, &bbolt.Options{
		Timeout:         lockTimeout,
		ReadOnly:        readOnly,
		PreLoadFreelist: true, // also to read: check looks at it
		InitialMmapSize: mapSize,
		NoStatistics:    true,
		OpenFile: func(name string, flag int, perm os.FileMode) (*os.File, error) {
			var err error
			file, err = os.OpenFile(name, flag&^os.O_CREATE, perm)
			return file, err
		},
	})
	switch {
	case err == nil:
		return db, sameFile(db, file, path)
	case errors.Is(err, berrors.ErrTimeout):
		return nil, fmt.Errorf("%w%s", ErrLocked, holder(path))
	case errors.Is(err, berrors.ErrVersionMismatch):
		return nil, fmt.Errorf("file format: %w", ErrNewer)
	case errors.Is(err, berrors.ErrInvalid), errors.Is(err, berrors.ErrChecksum), isShort(path):
		return nil, fmt.Errorf("%w: %w", ErrCorrupt, err)
	}
	return nil, err
}

// sameFile makes sure that the file now locked is still the one at path: the
// process that had the lock before may have set it aside.
func sameFile(db *bbolt.DB, file *os.File, path string) error {
	locked, err1 := file.Stat()
	there, err2 := os.Stat(path)
	if err := errors.Join(err1, err2); err != nil {
		return errors.Join(err, db.Close())
	}
	if !os.SameFile(locked, there) {
		return errors.Join(fmt.Errorf("replaced while waiting for it: %w", ErrLocked), db.Close())
	}
	return nil
}

// isShort tells whether the file is too short for the four pages with which
// every database begins.
func isShort(path string) bool {
	fi, err := os.Stat(path)
	return err == nil && fi.Size() < 4*int64(os.Getpagesize())
}

// checkPages makes sure that no page claims to reach beyond the last one.
func checkPages(tx *bbolt.Tx) error {
	end := int(tx.Size() / int64(tx.DB().Info().PageSize))
	for id := 2; id < end; {
		p, err := tx.Page(id)
		if err != nil {
			return err
		}
		if p == nil {
			return nil
		}
		if p.Type == "free" {
			id++
			continue
		}
		if p.OverflowCount >= end-id {
			return fmt.Errorf("page %d spans %d pages of %d: %w", id, p.OverflowCount+1, end, ErrCorrupt)
		}
		id += 1 + p.OverflowCount
	}
	return nil
}

// walkBucket touches every page of memory that keys and values are on: those that
// cannot be read fault as a whole.
func walkBucket(_ []byte, b *bbolt.Bucket) error {
	var n byte
	touch := func(b []byte) {
		for i := 0; i < len(b); i += smallestPage {
			n ^= b[i]
		}
		if len(b) > 0 {
			n ^= b[len(b)-1]
		}
	}
	err := b.ForEach(func(k, v []byte) error {
		touch(k)
		touch(v)
		if v == nil {
			if nested := b.Bucket(k); nested != nil {
				return walkBucket(k, nested)
			}
		}
		return nil
	})
	touched = n
	return err
}

// smallestPage is the smallest page of memory of any machine.
const smallestPage = 4096

// touched keeps the compiler from dropping the reads of walkBucket.
//
//lint:ignore U1000 that it is written to is its use
var touched byte

// create begins a book at path unless there is a file. It is made complete
// under another name and then linked, so that a crash never leaves half a book
// and two processes cannot both begin one.
func create(path string, first func(*Tx) error) error {
	if fi, err := os.Lstat(path); err == nil && fi.Size() > 0 {
		return nil
	}
	// An empty file holds nothing; replacing it is the same as creating it.
	if fi, err := os.Lstat(path); err == nil && fi.Size() == 0 && fi.Mode().IsRegular() {
		if err := os.Remove(path); err != nil {
			return err
		}
	}
	tmp := path + ".new"
	if err := os.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	defer os.Remove(tmp)
	db, err := bbolt.Open(tmp, 0o600, &bbolt.Options{Timeout: lockTimeout, NoStatistics: true})
	if err != nil {
		return fmt.Errorf("new: %w", err)
	}
	s := &Store{path: tmp, db: db}
	if first != nil {
		err = s.Update(first)
	} else {
		s.reserve()
	}
	if err := errors.Join(err, db.Close()); err != nil {
		return fmt.Errorf("new: %w", err)
	}
	if err := os.Link(tmp, path); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("new: %w", err)
	}
	return syncDir(filepath.Dir(path))
}

// setAside renames the corrupt file and begins a new book that says why.
func setAside(path string, why error) (string, error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return "", err
	}
	defer f.Close()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return "", fmt.Errorf("%w%s", ErrLocked, holder(path))
	}
	now := time.Now()
	aside := fmt.Sprintf("%s.corrupt-%d", path, now.UnixNano())
	if err := os.Rename(path, aside); err != nil {
		return "", err
	}
	return aside, create(path, func(tx *Tx) error {
		if err := putMeta(tx, MetaRebuilt, "1"); err != nil {
			return err
		}
		return putQuarantined(tx.tx, quarantined{Quarantine: Quarantine{Reason: why.Error(), File: aside, At: now}})
	})
}

// takeOver puts a copy in the place of a book whose holder will never write again,
// and never unlock it either. It is as after a crash.
func takeOver(path string) (err error) {
	// One at a time. Who comes later finds a file that nobody has abandoned.
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return fmt.Errorf("%w%s", ErrLocked, holder(dir.Name()))
	}
	if !abandoned(path) {
		return nil
	}
	from, err := os.Open(path)
	if err != nil {
		return err
	}
	defer from.Close()
	tmp := path + ".copy"
	to, err := os.OpenFile(tmp, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer os.Remove(tmp)
	_, err = io.Copy(to, from)
	if err = errors.Join(err, to.Sync(), to.Close()); err == nil {
		err = os.Rename(tmp, path)
	}
	if err != nil {
		return fmt.Errorf("copy of one whose holder cannot end%s: %w", holder(path), err)
	}
	return dir.Sync()
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// reserve allocates the next step of the file when the pages in use come near
// the end of what is allocated. On a full disk it fails, and nothing is lost:
// it is tried again after the next commit, and there is headroom until then.
func (s *Store) reserve() {
	if s.db.IsReadOnly() {
		return
	}
	var used int64
	if err := s.db.View(func(tx *bbolt.Tx) error { used = tx.Size(); return nil }); err != nil {
		return
	}
	if used+headroom <= s.group.reserved {
		return
	}
	f, err := os.OpenFile(s.path, os.O_RDWR, 0)
	if err != nil {
		return
	}
	defer f.Close()
	size := (used + headroom + step - 1) / step * step
	before := blocks(f)
	err = unix.Fallocate(int(f.Fd()), 0, 0, size)
	switch {
	case err == nil && (before > 0 && blocks(f) == before || f.Sync() == nil): // it was there already, as at most starts, or is now
		s.group.reserved = size
	case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.ENOSYS):
		s.group.reserved = math.MaxInt64 // no file system for this: never again
	}
}

// blocks is how much of a file is allocated, in units of 512 bytes; 0 if that is not known.
func blocks(f *os.File) int64 {
	var st unix.Stat_t
	if unix.Fstat(int(f.Fd()), &st) != nil {
		return 0
	}
	return st.Blocks
}
