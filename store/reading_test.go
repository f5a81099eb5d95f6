package store

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// mustHide takes the page of memory in the middle of each row away, as a disk would that
// does not give it, until the test ends.
func mustHide(t *testing.T, s *Store) {
	t.Helper()
	var pages [][]byte
	err := s.View(func(tx *Tx) error {
		return pods.bucket(tx).ForEach(func(_, raw []byte) error {
			size := os.Getpagesize()
			skip := len(raw)/2 + size - (len(raw)/2+int(uintptr(unsafe.Pointer(&raw[0]))))%size
			pages = append(pages, raw[skip:skip+size:skip+size])
			return nil
		})
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range pages {
		if err := unix.Mprotect(p, unix.PROT_NONE); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := unix.Mprotect(p, unix.PROT_READ); err != nil {
				t.Error(err)
			}
		})
	}
}

// Pages of values are met by those who decode side by side, and by Check and who comes
// after it: errors all of them.
func TestUnreadableValues(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(4))
	s := mustBook(t)
	const rows = 8
	err := s.Update(func(tx *Tx) error {
		for i := range rows {
			if err := pods.Put(tx, fmt.Sprint(i), pod{Name: strings.Repeat("x", 16*os.Getpagesize())}); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	mustHide(t, s)
	err = s.View(func(tx *Tx) error { return pods.Each(tx, func(string, pod) error { return nil }) })
	if !errors.Is(err, unix.EIO) {
		t.Errorf("read: %v, want EIO", err)
	}
	if err := s.Check(); !errors.Is(err, unix.EIO) || !errors.Is(err, ErrCorrupt) {
		t.Errorf("check: %v, want EIO and ErrCorrupt", err)
	}
	if bad := s.Unreadable(); len(bad) != 0 {
		t.Errorf("rows of wrong checksums: %v", bad)
	}
	n := 0
	err = s.View(func(tx *Tx) error { return pods.Keys(tx, func(string) error { n++; return nil }) })
	if err != nil || n != rows {
		t.Errorf("keys: %d, %v, want %d", n, err, rows)
	}
}

type fragile struct{ Value string }

func (fragile) UnmarshalJSON([]byte) error { panic("does not decode") }

// A panic of a type's own decoding is for those who read, and for nobody else.
func TestPanicOfDecoding(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(4))
	s := mustBook(t)
	table := NewTable[fragile]("fragile", 1)
	err := s.Update(func(tx *Tx) error {
		for i := range 8 {
			if err := table.Put(tx, fmt.Sprint(i), fragile{}); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if p := recover(); p != "does not decode" {
			t.Errorf("panic %v, want that of the decoding", p)
		}
	}()
	err = s.View(func(tx *Tx) error { return table.Each(tx, func(string, fragile) error { return nil }) })
	t.Errorf("read: %v, want a panic", err)
}

// Rows that take more than a batch together come one by one and in order all the same.
func TestEachOfLargeRows(t *testing.T) {
	s := mustBook(t)
	large := strings.Repeat("x", batchBytes/2)
	s.db.NoSync = true
	for i := range 3 {
		mustPut(t, s, fmt.Sprint(i), pod{Name: large, Count: i})
	}
	n := 0
	err := s.View(func(tx *Tx) error {
		return pods.Each(tx, func(k string, p pod) error {
			if k != fmt.Sprint(n) || p.Count != n || p.Name != large {
				t.Errorf("row %d: %q with %d and %d bytes", n, k, p.Count, len(p.Name))
			}
			n++
			return nil
		})
	})
	if err != nil || n != 3 {
		t.Errorf("%d rows, %v", n, err)
	}
}

// Keys tells of unreadable rows too, and bears that they are removed meanwhile.
func TestKeys(t *testing.T) {
	s := mustBook(t)
	for _, k := range []string{"b", "a", "c"} {
		mustPut(t, s, k, pod{})
	}
	var got []string
	keys := func(tx *Tx, key string) error {
		got = append(got, key)
		return pods.Delete(tx, key)
	}
	if err := s.View(func(tx *Tx) error {
		return NewTable[pod]("none", 1).Keys(tx, func(k string) error { return keys(tx, k) })
	}); err != nil || got != nil {
		t.Errorf("no table: %q, %v", got, err)
	}
	err := s.Update(func(tx *Tx) error {
		got = nil
		if err := pods.bucket(tx).Put([]byte("bad"), []byte("nonsense")); err != nil {
			return err
		}
		return pods.Keys(tx, func(k string) error { return keys(tx, k) })
	})
	if want := []string{"a", "b", "bad", "c"}; err != nil || !slices.Equal(got, want) {
		t.Errorf("got %q, %v, want %q", got, err, want)
	}
	if left := s.Quarantined(); len(left) != 0 {
		t.Errorf("put aside: %v", left)
	}
	mustPut(t, s, "a", pod{})
	stop := errors.New("enough")
	if err := s.View(func(tx *Tx) error { return pods.Keys(tx, func(string) error { return stop }) }); !errors.Is(err, stop) {
		t.Errorf("end: %v", err)
	}
}

// Check has its turn among those who write, and changes nothing for them.
func TestCheckAmongUpdates(t *testing.T) {
	s := mustBook(t)
	var wg sync.WaitGroup
	for i := range 30 {
		wg.Go(func() {
			err := s.Update(func(tx *Tx) error { return pods.Put(tx, fmt.Sprintf("%02d", i), pod{Count: i}) })
			if err != nil {
				t.Error(err)
			}
		})
		if i%3 == 0 {
			wg.Go(func() {
				if err := s.Check(); err != nil {
					t.Error(err)
				}
			})
		}
	}
	wg.Wait()
	if got := keys(t, s); len(got) != 30 {
		t.Errorf("rows left: %q", got)
	}
}
