package store

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.etcd.io/bbolt"
	"golang.org/x/sys/unix"
)

type pod struct {
	Name  string
	Count int
}

var pods = NewTable[pod]("pods", 1)

// mustOpen opens the book at path; the test ends with a check of the file.
func mustOpen(t *testing.T, path string) *Store {
	t.Helper()
	s, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		s.Close() // a second time in tests that reopen
		checkFile(t, path)
	})
	return s
}

func mustBook(t *testing.T) *Store {
	t.Helper()
	return mustOpen(t, filepath.Join(t.TempDir(), "book.db"))
}

func checkFile(t *testing.T, path string) {
	t.Helper()
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{Timeout: time.Second})
	if err != nil {
		t.Errorf("consistency: %v", err)
		return
	}
	defer db.Close()
	db.View(func(tx *bbolt.Tx) error {
		for err := range tx.Check() {
			t.Errorf("consistency: %v", err)
		}
		return nil
	})
}

func mustPut(t *testing.T, s *Store, key string, p pod) {
	t.Helper()
	if err := s.Update(func(tx *Tx) error { return pods.Put(tx, key, p) }); err != nil {
		t.Fatal(err)
	}
}

func get(s *Store, key string) (p pod, err error) {
	err = s.View(func(tx *Tx) error {
		p, err = pods.Get(tx, key)
		return err
	})
	return p, err
}

func keys(t *testing.T, s *Store) (all []string) {
	t.Helper()
	err := s.View(func(tx *Tx) error {
		all = nil
		return pods.Each(tx, func(k string, _ pod) error {
			all = append(all, k)
			return nil
		})
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// edit changes the closed file through bbolt itself.
func edit(t *testing.T, path string, fn func(table *bbolt.Bucket) error) {
	t.Helper()
	db, err := bbolt.Open(path, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	if err := db.Update(func(tx *bbolt.Tx) error {
		return fn(tx.Bucket(tablesBucket))
	}); err != nil {
		t.Fatal(err)
	}
}

func TestRowsRoundTrip(t *testing.T) {
	s := mustBook(t)
	want := pod{"a", 7}
	mustPut(t, s, "k1", want)
	mustPut(t, s, "k2", pod{"b", 8})
	if got, err := get(s, "k1"); err != nil || got != want {
		t.Fatalf("Get = %v, %v, want %v", got, err, want)
	}
	if _, err := get(s, "none"); !errors.Is(err, ErrNotFound) {
		t.Fatalf("Get of an absent row: %v, want ErrNotFound", err)
	}
	if err := s.Update(func(tx *Tx) error {
		return errors.Join(pods.Delete(tx, "k1"), pods.Delete(tx, "never"))
	}); err != nil {
		t.Fatal(err)
	}
	if got := keys(t, s); !slices.Equal(got, []string{"k2"}) {
		t.Fatalf("keys = %q, want k2", got)
	}
	fi, err := os.Stat(s.path)
	if err != nil || fi.Mode().Perm() != 0o600 {
		t.Fatalf("mode %v, %v, want 0600", fi.Mode(), err)
	}
}

func TestRowsSurviveReopen(t *testing.T) {
	path := filepath.Join(t.TempDir(), "book.db")
	s := mustOpen(t, path)
	mustPut(t, s, "k", pod{"a", 1})
	if err := s.SetMeta("boot", "b1"); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = mustOpen(t, path)
	if got, err := get(s, "k"); err != nil || got.Name != "a" {
		t.Fatalf("after reopening: %v, %v", got, err)
	}
	if v, err := s.Meta("boot"); v != "b1" || err != nil {
		t.Fatalf("Meta = %q, %v, want b1", v, err)
	}
	if v, err := s.Meta("other"); v != "" || err != nil {
		t.Fatalf("Meta of an absent key = %q, %v, want nothing", v, err)
	}
	if s.Rebuilt() || len(s.Quarantined()) != 0 {
		t.Fatal("a healthy book says it was rebuilt or has quarantined rows")
	}
}

func TestLimits(t *testing.T) {
	s := mustBook(t)
	long := strings.Repeat("k", MaxKey+1)
	for _, key := range []string{"", long} {
		err := s.Update(func(tx *Tx) error { return pods.Put(tx, key, pod{}) })
		if !errors.Is(err, ErrTooLarge) {
			t.Errorf("key of %d bytes: %v, want ErrTooLarge", len(key), err)
		}
	}
	err := s.Update(func(tx *Tx) error { return pods.Put(tx, "k", pod{Name: strings.Repeat("x", MaxRow)}) })
	if !errors.Is(err, ErrTooLarge) {
		t.Errorf("large row: %v, want ErrTooLarge", err)
	}
	err = s.View(func(tx *Tx) error { return pods.Put(tx, "k", pod{}) })
	if !errors.Is(err, ErrReadOnly) {
		t.Errorf("Put in a View: %v, want ErrReadOnly", err)
	}
	err = s.View(func(tx *Tx) error { return pods.Delete(tx, "k") })
	if !errors.Is(err, ErrReadOnly) {
		t.Errorf("Delete in a View: %v, want ErrReadOnly", err)
	}
}

func TestEachWhileChanging(t *testing.T) {
	s := mustBook(t)
	for i := range 500 {
		mustPutNoSync(t, s, fmt.Sprintf("k%03d", i))
	}
	var seen int
	err := s.Update(func(tx *Tx) error {
		seen = 0
		return pods.Each(tx, func(k string, _ pod) error {
			seen++
			return pods.Delete(tx, k)
		})
	})
	if err != nil || seen != 500 {
		t.Fatalf("saw %d rows, %v, want 500", seen, err)
	}
	if left := keys(t, s); len(left) != 0 {
		t.Fatalf("left: %q", left)
	}
}

// mustPutNoSync spares the fsync where the test is not about durability.
func mustPutNoSync(t *testing.T, s *Store, key string) {
	t.Helper()
	s.db.NoSync = true
	defer func() { s.db.NoSync = false }()
	mustPut(t, s, key, pod{Name: key})
}

func TestEachPrefix(t *testing.T) {
	s := mustBook(t)
	for _, k := range []string{"a", "b", "b1", "b2", "c"} {
		mustPutNoSync(t, s, k)
	}
	var got []string
	err := s.View(func(tx *Tx) error {
		return pods.EachPrefix(tx, "b", func(k string, _ pod) error {
			got = append(got, k)
			return nil
		})
	})
	if want := []string{"b", "b1", "b2"}; err != nil || !slices.Equal(got, want) {
		t.Fatalf("got %q, %v, want %q", got, err, want)
	}
}

func TestNextSequence(t *testing.T) {
	s := mustBook(t)
	var got []uint64
	for i := range 3 {
		err := s.Update(func(tx *Tx) error {
			n, err := pods.NextSequence(tx)
			if i == 1 {
				return errors.New("given up")
			}
			got = append(got, n)
			return err
		})
		if (err != nil) != (i == 1) {
			t.Fatal(err)
		}
	}
	if !slices.Equal(got, []uint64{1, 2}) {
		t.Fatalf("sequence %v, want 1 2", got)
	}
}

// blocked runs Updates that all wait for one commit: it holds the leader inside
// its function until the others are queued.
func blocked(t *testing.T, s *Store, fns ...func(*Tx) error) []error {
	t.Helper()
	entered, release := make(chan struct{}), make(chan struct{})
	var once sync.Once
	first := make(chan error, 1)
	go func() {
		first <- s.Update(func(*Tx) error {
			once.Do(func() { close(entered) })
			<-release
			return nil
		})
	}()
	<-entered
	errs := make([]error, len(fns))
	var wg sync.WaitGroup
	for i, fn := range fns {
		wg.Go(func() { errs[i] = s.Update(fn) })
		for queued := 0; queued <= i; time.Sleep(100 * time.Microsecond) {
			s.group.mu.Lock()
			queued = len(s.group.waiting)
			s.group.mu.Unlock()
		}
	}
	close(release)
	wg.Wait()
	if err := <-first; err != nil {
		t.Fatal(err)
	}
	return errs
}

func TestGroupCommitIsOneTransactionInOrder(t *testing.T) {
	s := mustBook(t)
	var order, published []int
	ids := make(map[int]bool)
	var fns []func(*Tx) error
	for i := range 20 {
		fns = append(fns, func(tx *Tx) error {
			order = append(order, i)
			ids[tx.tx.ID()] = true
			tx.OnCommit(func() { published = append(published, i) })
			return pods.Put(tx, fmt.Sprintf("k%02d", i), pod{Count: i})
		})
	}
	for i, err := range blocked(t, s, fns...) {
		if err != nil {
			t.Errorf("update %d: %v", i, err)
		}
	}
	want := make([]int, 20)
	for i := range want {
		want[i] = i
	}
	if !slices.Equal(order, want) || !slices.Equal(published, want) {
		t.Errorf("ran %v, published %v, want %v", order, published, want)
	}
	if len(ids) != 1 {
		t.Errorf("%d transactions for 20 waiting updates, want 1", len(ids))
	}
	if got := keys(t, s); len(got) != 20 {
		t.Errorf("%d rows, want 20", len(got))
	}
}

func TestGroupCommitFailingFunction(t *testing.T) {
	s := mustBook(t)
	boom := errors.New("boom")
	errs := blocked(t, s,
		func(tx *Tx) error { return pods.Put(tx, "a", pod{}) },
		func(tx *Tx) error { return errors.Join(pods.Put(tx, "spoiled", pod{}), boom) },
		func(tx *Tx) error { return pods.Put(tx, "b", pod{}) },
		// Fails only because of a neighbour: the error must be about the book
		// on disk, where the neighbour is by then.
		func(tx *Tx) error {
			if _, err := pods.Get(tx, "a"); err == nil {
				return errors.New("a exists")
			}
			return nil
		},
	)
	if errs[0] != nil || errs[2] != nil || !errors.Is(errs[1], boom) || errs[3] == nil {
		t.Fatalf("errors %v", errs)
	}
	if got := keys(t, s); !slices.Equal(got, []string{"a", "b"}) {
		t.Fatalf("rows %q, want a b", got)
	}
}

func TestGroupCommitPanicStaysWithItsCaller(t *testing.T) {
	s := mustBook(t)
	var caught any
	errs := blocked(t, s,
		func(tx *Tx) error { return pods.Put(tx, "a", pod{}) },
	)
	func() {
		defer func() { caught = recover() }()
		s.Update(func(tx *Tx) error {
			pods.Put(tx, "b", pod{})
			panic("mine")
		})
	}()
	if errs[0] != nil || caught != "mine" {
		t.Fatalf("errors %v, panic %v", errs, caught)
	}
	mustPut(t, s, "c", pod{}) // the book still works
	if got := keys(t, s); !slices.Equal(got, []string{"a", "c"}) {
		t.Fatalf("rows %q, want a c", got)
	}
}

func TestConcurrentUpdates(t *testing.T) {
	s := mustBook(t)
	s.db.NoSync = true
	const callers, each = 16, 25
	var wg sync.WaitGroup
	for i := range callers {
		wg.Go(func() {
			for j := range each {
				err := s.Update(func(tx *Tx) error {
					if j%5 == 4 {
						return errors.New("given up")
					}
					c, err := pods.Get(tx, "counter")
					if err != nil && !errors.Is(err, ErrNotFound) {
						return err
					}
					c.Count++
					return pods.Put(tx, "counter", c)
				})
				if (err != nil) != (j%5 == 4) {
					t.Errorf("caller %d update %d: %v", i, j, err)
				}
			}
		})
	}
	wg.Wait()
	if c, err := get(s, "counter"); err != nil || c.Count != callers*each*4/5 {
		t.Fatalf("counter %d, %v, want %d", c.Count, err, callers*each*4/5)
	}
}

func TestCorruptRowIsQuarantined(t *testing.T) {
	tests := map[string]func(row []byte) []byte{
		"flipped payload byte": func(r []byte) []byte { r[len(r)-2] ^= 1; return r },
		"flipped version":      func(r []byte) []byte { r[0] ^= 1; return r },
		"flipped checksum":     func(r []byte) []byte { r[3] ^= 1; return r },
		"short":                func(r []byte) []byte { return r[:3] },
		"empty":                func(r []byte) []byte { return nil },
		"not JSON":             func([]byte) []byte { return frame("pods", "bad", 1, []byte("{")) },
		"other type":           func([]byte) []byte { return frame("pods", "bad", 1, []byte(`{"Count":"x"}`)) },
		"of another key":       func([]byte) []byte { return frame("pods", "good", 1, []byte(`{}`)) },
	}
	for name, damage := range tests {
		for _, inUpdate := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/update=%v", name, inUpdate), func(t *testing.T) {
				path := filepath.Join(t.TempDir(), "book.db")
				s := mustOpen(t, path)
				mustPut(t, s, "good", pod{"good", 1})
				mustPut(t, s, "bad", pod{"bad", 1})
				s.Close()
				edit(t, path, func(b *bbolt.Bucket) error {
					b = b.Bucket([]byte("pods"))
					return b.Put([]byte("bad"), damage(bytes.Clone(b.Get([]byte("bad")))))
				})
				s = mustOpen(t, path)
				do := s.View
				if inUpdate {
					do = s.Update
				}
				var seen []string
				if err := do(func(tx *Tx) error {
					seen = nil
					return pods.Each(tx, func(k string, _ pod) error {
						seen = append(seen, k)
						return nil
					})
				}); err != nil || !slices.Equal(seen, []string{"good"}) {
					t.Fatalf("Each saw %q, %v, want good", seen, err)
				}
				check := func(s *Store) {
					t.Helper()
					q := s.Quarantined()
					if len(q) != 1 || q[0].Table != "pods" || q[0].Key != "bad" || q[0].Reason == "" {
						t.Fatalf("quarantine %+v, want the bad row", q)
					}
					if _, err := get(s, "bad"); !errors.Is(err, ErrNotFound) {
						t.Fatalf("Get of the quarantined row: %v, want ErrNotFound", err)
					}
				}
				check(s)
				s.Close()
				s = mustOpen(t, path)
				check(s)
				if err := s.ForgetQuarantined(); err != nil || len(s.Quarantined()) != 0 {
					t.Fatalf("after forgetting: %v, %v", err, s.Quarantined())
				}
				s.Close()
				if s = mustOpen(t, path); len(s.Quarantined()) != 0 {
					t.Fatalf("after forgetting and reopening: %v", s.Quarantined())
				}
			})
		}
	}
}

// A row that can be read and makes no sense to its user is put aside by it; the
// rows of one table can be forgotten without the others.
func TestRejectAndForgetTable(t *testing.T) {
	path := filepath.Join(t.TempDir(), "book.db")
	s := mustOpen(t, path)
	others := NewTable[pod]("others", 1)
	mustPut(t, s, "good", pod{})
	mustPut(t, s, "bad", pod{})
	why := errors.New("makes no sense")
	err := s.Update(func(tx *Tx) error { return others.Put(tx, "x", pod{}) })
	if err == nil {
		err = s.View(func(tx *Tx) error {
			pods.Reject(tx, "bad", why)
			pods.Reject(tx, "absent", why)
			others.Reject(tx, "x", why)
			return nil
		})
	}
	if err != nil {
		t.Fatal(err)
	}
	if q := s.Quarantined(); len(q) != 2 || !strings.Contains(q[0].Reason, why.Error()) {
		t.Fatalf("quarantine %+v, want bad and x", q)
	}
	if _, err := get(s, "bad"); !errors.Is(err, ErrNotFound) {
		t.Errorf("Get of the rejected row: %v, want ErrNotFound", err)
	}
	if _, err := get(s, "good"); err != nil {
		t.Errorf("Get of another row: %v", err)
	}
	if err := s.ForgetTable("pods"); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if q := s.Quarantined(); len(q) != 1 || q[0].Table != "others" {
			t.Errorf("quarantine %+v, want x only", q)
		}
		s.Close()
		s = mustOpen(t, path)
	}
}

func TestGetOfCorruptRow(t *testing.T) {
	path := filepath.Join(t.TempDir(), "book.db")
	s := mustOpen(t, path)
	mustPut(t, s, "bad", pod{})
	s.Close()
	edit(t, path, func(b *bbolt.Bucket) error { return b.Bucket([]byte("pods")).Put([]byte("bad"), []byte("rubbish")) })
	s = mustOpen(t, path)
	if _, err := get(s, "bad"); !errors.Is(err, ErrCorrupt) {
		t.Fatalf("first Get: %v, want ErrCorrupt", err)
	}
	if _, err := get(s, "bad"); !errors.Is(err, ErrNotFound) || len(s.Quarantined()) != 1 {
		t.Fatalf("second Get: %v, want ErrNotFound and a quarantined row", err)
	}
}

func TestRowOfNewerVersion(t *testing.T) {
	s := mustBook(t)
	newer := NewTable[pod]("pods", 2)
	if err := s.Update(func(tx *Tx) error { return newer.Put(tx, "k", pod{"a", 1}) }); err != nil {
		t.Fatal(err)
	}
	if _, err := get(s, "k"); !errors.Is(err, ErrNewer) {
		t.Errorf("Get: %v, want ErrNewer", err)
	}
	err := s.View(func(tx *Tx) error { return pods.Each(tx, func(string, pod) error { return nil }) })
	if !errors.Is(err, ErrNewer) {
		t.Errorf("Each: %v, want ErrNewer", err)
	}
	if q := s.Quarantined(); len(q) != 0 {
		t.Errorf("a newer row was quarantined: %v", q)
	}
}

func TestUpgrade(t *testing.T) {
	s := mustBook(t)
	mustPut(t, s, "k", pod{"a", 1})
	v3 := NewTable[pod]("pods", 3,
		Upgrade{1, func(j []byte) ([]byte, error) { return bytes.ReplaceAll(j, []byte(`"a"`), []byte(`"b"`)), nil }},
		Upgrade{2, func(j []byte) ([]byte, error) { return bytes.ReplaceAll(j, []byte(`"b"`), []byte(`"c"`)), nil }},
	)
	var got pod
	err := s.View(func(tx *Tx) (err error) { got, err = v3.Get(tx, "k"); return err })
	if err != nil || got != (pod{"c", 1}) {
		t.Fatalf("upgraded row %v, %v, want {c 1}", got, err)
	}
	gap := NewTable[pod]("pods", 3, Upgrade{2, func(j []byte) ([]byte, error) { return j, nil }})
	err = s.View(func(tx *Tx) (err error) { _, err = gap.Get(tx, "k"); return err })
	if !errors.Is(err, ErrCorrupt) {
		t.Fatalf("row without an upgrade: %v, want ErrCorrupt", err)
	}
}

func TestNewerSchemaIsRefused(t *testing.T) {
	path := filepath.Join(t.TempDir(), "book.db")
	s := mustOpen(t, path)
	if err := s.SetMeta(MetaSchema, "99"); err != nil {
		t.Fatal(err)
	}
	s.Close()
	_, err := Open(path)
	if !errors.Is(err, ErrNewer) || !strings.Contains(err.Error(), "99") {
		t.Fatalf("Open of schema 99: %v, want ErrNewer naming it", err)
	}
	if found, _ := filepath.Glob(path + ".*"); len(found) != 0 {
		t.Fatalf("a newer book was set aside: %q", found)
	}
}

func TestCorruptFileIsSetAside(t *testing.T) {
	tests := map[string]func(t *testing.T, f *os.File){
		"rubbish":   func(t *testing.T, f *os.File) { mustWriteAt(t, f, bytes.Repeat([]byte("rubbish "), 4096), 0) },
		"short":     func(t *testing.T, f *os.File) { mustTruncate(t, f, 100) },
		"truncated": func(t *testing.T, f *os.File) { mustTruncate(t, f, 5*4096) },
		"zeroed data": func(t *testing.T, f *os.File) {
			mustWriteAt(t, f, make([]byte, 1<<20), 2*int64(os.Getpagesize()))
		},
		"rubbish data": func(t *testing.T, f *os.File) {
			mustWriteAt(t, f, bytes.Repeat([]byte{0xa5}, 1<<20), 2*int64(os.Getpagesize()))
		},
		"page sizes": func(t *testing.T, f *os.File) {
			for id := int64(2); id < 100; id++ { // overflow, the last of the page header
				mustWriteAt(t, f, []byte{0xff, 0xff, 0xff, 0x7f}, id*int64(os.Getpagesize())+12)
			}
		},
	}
	for name, damage := range tests {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "book.db")
			s := mustOpen(t, path)
			s.db.NoSync = true
			if err := s.Update(func(tx *Tx) error {
				for i := range 2000 {
					if err := pods.Put(tx, fmt.Sprint(i), pod{Name: strings.Repeat("x", 100)}); err != nil {
						return err
					}
				}
				return nil
			}); err != nil {
				t.Fatal(err)
			}
			s.Close()
			f, err := os.OpenFile(path, os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			damage(t, f)
			f.Close()

			s = mustOpen(t, path)
			aside, _ := filepath.Glob(path + ".corrupt-*")
			q := s.Quarantined()
			if !s.Rebuilt() || len(aside) != 1 || len(q) != 1 || q[0].File != aside[0] || q[0].Reason == "" {
				t.Fatalf("rebuilt %v, set aside %q, quarantine %+v", s.Rebuilt(), aside, q)
			}
			if got := keys(t, s); len(got) != 0 {
				t.Fatalf("new book has rows: %q", got)
			}
			mustPut(t, s, "k", pod{})
			s.Close()
			s = mustOpen(t, path)
			if !s.Rebuilt() || len(s.Quarantined()) != 1 {
				t.Fatal("the flag did not survive a restart")
			}
			if err := s.ClearRebuilt(); err != nil || s.Rebuilt() {
				t.Fatalf("ClearRebuilt: %v, still %v", err, s.Rebuilt())
			}
		})
	}
}

func mustWriteAt(t *testing.T, f *os.File, b []byte, off int64) {
	t.Helper()
	if _, err := f.WriteAt(b, off); err != nil {
		t.Fatal(err)
	}
}

func mustTruncate(t *testing.T, f *os.File, size int64) {
	t.Helper()
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
}

func TestEmptyFileIsANewBook(t *testing.T) {
	path := filepath.Join(t.TempDir(), "book.db")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if s := mustOpen(t, path); s.Rebuilt() {
		t.Fatal("an empty file counts as a corrupt book")
	}
}

func TestHeldByAnotherProcess(t *testing.T) {
	if path := os.Getenv("STORE_TEST_HOLD"); path != "" {
		hold(path)
		return
	}
	path := filepath.Join(t.TempDir(), "book.db")
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe, "-test.run=^TestHeldByAnotherProcess$")
	cmd.Env = append(os.Environ(), "STORE_TEST_HOLD="+path)
	in, _ := cmd.StdinPipe()
	out, _ := cmd.StdoutPipe()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer in.Close()
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "held\n" {
		t.Fatalf("helper said %q, %v", line, err)
	}
	defer func(d time.Duration) { lockTimeout = d }(lockTimeout)
	lockTimeout = 200 * time.Millisecond

	_, err = Open(path)
	if !errors.Is(err, ErrLocked) {
		t.Fatalf("Open: %v, want ErrLocked", err)
	}
	if want := fmt.Sprintf("(pid %d, ", cmd.Process.Pid); !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), path) {
		t.Fatalf("error %q does not name the book and %q", err, want)
	}
}

// hold opens the book in a process of its own until its stdin ends.
func hold(path string) {
	s, err := Open(path)
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	fmt.Println("held")
	os.Stdin.Read(make([]byte, 1))
	s.Close()
}

func TestParseLock(t *testing.T) {
	tests := []struct {
		line  string
		pid   int
		inode uint64
		ok    bool
	}{
		{"1: FLOCK  ADVISORY  WRITE 708 08:01:1835 0 EOF", 708, 1835, true},
		{"1: -> FLOCK  ADVISORY  WRITE 709 08:01:1835 0 EOF", 0, 0, false},
		{"2: POSIX  ADVISORY  WRITE 708 08:01:1835 0 EOF", 0, 0, false},
		{"3: FLOCK  ADVISORY  WRITE -1 08:01:1835 0 EOF", 0, 0, false},
		{"4: FLOCK  ADVISORY  WRITE 708 1835 0 EOF", 708, 1835, false},
		{"", 0, 0, false},
	}
	for _, tt := range tests {
		pid, inode, ok := parseLock(tt.line)
		if ok != tt.ok || ok && (pid != tt.pid || inode != tt.inode) {
			t.Errorf("%q: %d %d %v", tt.line, pid, inode, ok)
		}
	}
}

// TestFullDisk fills the file system that the book is on to the last byte: rows
// can still be removed, and small ones added.
func TestFullDisk(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: mounts a small tmpfs")
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=24m"); err != nil {
		t.Skipf("needs root: mount of a tmpfs: %v", err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	s := mustOpen(t, filepath.Join(dir, "book.db"))
	const rows = 3000
	if err := s.Update(func(tx *Tx) error {
		for i := range rows {
			if err := pods.Put(tx, fmt.Sprintf("k%04d", i), pod{Name: strings.Repeat("x", 1000)}); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	fill(t, filepath.Join(dir, "ballast"))

	for i := range rows { // many commits, each of which needs new pages
		if i%100 != 0 {
			continue
		}
		err := s.Update(func(tx *Tx) error {
			for j := i; j < i+100; j++ {
				if err := pods.Delete(tx, fmt.Sprintf("k%04d", j)); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			t.Fatalf("delete on a full disk: %v", err)
		}
	}
	mustPut(t, s, "small", pod{})
	if got := keys(t, s); !slices.Equal(got, []string{"small"}) {
		t.Fatalf("rows %q, want small", got)
	}

	// One that cannot fit is refused, and takes nothing else down with it.
	huge := pod{Name: strings.Repeat("y", 14<<20)}
	errs := blocked(t, s,
		func(tx *Tx) error { return pods.Put(tx, "huge", huge) },
		func(tx *Tx) error {
			if err := pods.Put(tx, "huge2", huge); err != nil {
				return err
			}
			return pods.Put(tx, "huge3", huge)
		},
		func(tx *Tx) error { return pods.Delete(tx, "small") },
	)
	if errs[1] == nil || errs[2] != nil {
		t.Fatalf("errors %v, want the second alone to fail", errs)
	}
	if _, err := get(s, "small"); !errors.Is(err, ErrNotFound) {
		t.Fatalf("the delete beside it was lost: %v", err)
	}
}

// TestUnreadablePages: pages that the disk does not give, as beyond the end of a
// file that somebody has cut off, are errors and neither the end of the process nor
// of those that come later.
func TestUnreadablePages(t *testing.T) {
	path := filepath.Join(t.TempDir(), "book.db")
	s, err := Open(path) // not mustOpen, which wants it whole at the end
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	key := func(i int) string { return fmt.Sprintf("k%04d", i) }
	const rows = 3000
	err = s.Update(func(tx *Tx) error {
		for i := range rows {
			if err := pods.Put(tx, key(i), pod{Name: strings.Repeat("x", 1000)}); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, 64<<10); err != nil {
		t.Fatal(err)
	}
	if err := s.View(func(tx *Tx) error { return pods.Each(tx, func(string, pod) error { return nil }) }); !errors.Is(err, unix.EIO) {
		t.Errorf("read: %v, want EIO", err)
	}
	for i := 0; i < rows; i += 500 { // among them the first and last ones, and each on a page of its own or with neighbours
		for name, fn := range map[string]func(*Tx) error{
			"put":    func(tx *Tx) error { return pods.Put(tx, key(i), pod{Name: "y"}) },
			"delete": func(tx *Tx) error { return pods.Delete(tx, key(i)) },
			"get":    func(tx *Tx) error { _, err := pods.Get(tx, key(i)); return err },
		} {
			if err := s.Update(fn); !errors.Is(err, unix.EIO) {
				t.Errorf("%s of row %d: %v, want EIO", name, i, err)
			}
		}
	}
}

// A fault in the middle of bbolt's own bookkeeping leaves its lock taken.
func TestBrokenForGood(t *testing.T) {
	s := mustOpen(t, filepath.Join(t.TempDir(), "book.db"))
	s.group.broken = unix.EIO
	for range 2 {
		if err := s.Update(func(*Tx) error { return nil }); !errors.Is(err, unix.EIO) || !strings.Contains(err.Error(), s.path) {
			t.Errorf("update: %v, want EIO and the book's path", err)
		}
		if err := s.Check(); !errors.Is(err, unix.EIO) || !strings.Contains(err.Error(), s.path) {
			t.Errorf("check: %v, want EIO and the book's path", err)
		}
	}
}

func TestDoomed(t *testing.T) {
	for _, tc := range []struct {
		name, status string
		want         bool
	}{
		{"zombie", "Name:\tberthd\nState:\tZ (zombie)\nSigPnd:\t0000000000000000\nShdPnd:\t0000000000000100\n", true},
		{"killed, and waiting", "Name:\tberthd\nState:\tD (disk sleep)\nSigPnd:\t0000000000000100\nShdPnd:\t0000000000000100\n", true},
		{"waiting", "Name:\tberthd\nState:\tD (disk sleep)\nSigPnd:\t0000000000000000\n", false},
		{"SIGTERM and SIGHUP", "State:\tS (sleeping)\nSigPnd:\t0000000000004001\n", false},
		{"a name that looks like it", "Name:\tState:\tZ\nState:\tR (running)\nSigPnd:\t0000000000000000\n", false},
		{"no number", "State:\tS (sleeping)\nSigPnd:\t?\n", false},
		{"nothing", "", false},
	} {
		if got := doomed(tc.status); got != tc.want {
			t.Errorf("%s: %v, want %v", tc.name, got, tc.want)
		}
	}
	if dying(os.Getpid()) || dying(1) || dying(1<<30) {
		t.Error("a process that lives, or none, is taken for one that was killed")
	}
}

// fill writes until the file system has no byte left.
func fill(t *testing.T, path string) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for size := 1 << 20; size > 0; {
		if _, err := f.Write(make([]byte, size)); err != nil {
			if !errors.Is(err, unix.ENOSPC) {
				t.Fatal(err)
			}
			size /= 2
		}
	}
}

func FuzzUnframe(f *testing.F) {
	f.Add(frame("pods", "k", 1, []byte(`{"Name":"a"}`)))
	f.Add([]byte{})
	f.Add([]byte{0, 0, 0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, row []byte) {
		version, payload, err := unframe("pods", "k", row)
		if err != nil {
			if !errors.Is(err, ErrCorrupt) {
				t.Fatalf("error %v is not ErrCorrupt", err)
			}
			return
		}
		if !bytes.Equal(frame("pods", "k", version, payload), row) {
			t.Fatal("a row that was accepted does not round-trip")
		}
	})
}
