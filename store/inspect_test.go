package store

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// A book that is only looked at stays as it is to the last byte, damage included, and
// nobody else can have it meanwhile.
func TestInspect(t *testing.T) {
	path := filepath.Join(t.TempDir(), "book.db")
	if _, err := Inspect(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no book: %v", err)
	}
	s, err := Open(path) // what becomes of it is not for the check at the end of mustOpen
	if err != nil {
		t.Fatal(err)
	}
	mustPut(t, s, "good", pod{})
	if err := s.Update(func(tx *Tx) error {
		return pods.bucket(tx).Put([]byte("bad"), []byte("nonsense"))
	}); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(s.Check(), s.Close()); err != nil {
		t.Fatal(err)
	}
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if s, err = Inspect(path); err != nil {
		t.Fatal(err)
	}
	var seen []string
	err = s.View(func(tx *Tx) error {
		return pods.Each(tx, func(k string, _ pod) error { seen = append(seen, k); return nil })
	})
	if err != nil || !slices.Equal(seen, []string{"good"}) || len(s.Quarantined()) != 1 {
		t.Errorf("read: %v, %q, quarantine %v", err, seen, s.Quarantined())
	}
	if err := s.SetMeta("x", "y"); err == nil {
		t.Error("a book that is only looked at was written")
	}
	if err := s.Check(); err != nil {
		t.Error(err)
	}
	old := lockTimeout
	lockTimeout = 50 * time.Millisecond
	_, err = Open(path)
	lockTimeout = old
	if !errors.Is(err, ErrLocked) {
		t.Errorf("a daemon beside it: %v, want ErrLocked", err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if after, err := os.ReadFile(path); err != nil || string(after) != string(before) {
		t.Errorf("the file has changed: %v", err)
	}
	if err := os.WriteFile(path, []byte(strings.Repeat("x", 1<<16)), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Inspect(path); !errors.Is(err, ErrCorrupt) {
		t.Errorf("rubbish: %v, want ErrCorrupt", err)
	}
	if left, err := filepath.Glob(path + ".*"); err != nil || len(left) > 0 {
		t.Errorf("set aside: %v, %v", left, err)
	}
}

// A row that has rotted since it was read is told, and left as it is; one that is in
// the quarantine is not told again.
func TestUnreadable(t *testing.T) {
	s := mustBook(t)
	mustPut(t, s, "good", pod{})
	mustPut(t, s, "rotten", pod{})
	if bad := s.Unreadable(); len(bad) != 0 {
		t.Errorf("a healthy book: %v", bad)
	}
	if err := s.Update(func(tx *Tx) error {
		b := pods.bucket(tx)
		v := bytes.Clone(b.Get([]byte("rotten")))
		v[len(v)-1] ^= 1
		return b.Put([]byte("rotten"), v)
	}); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		bad := s.Unreadable()
		if len(bad) != 1 || bad[0].Table != "pods" || bad[0].Key != "rotten" || !strings.Contains(bad[0].Reason, "checksum") {
			t.Fatalf("unreadable: %+v", bad)
		}
	}
	if err := s.View(func(tx *Tx) error { return pods.Each(tx, func(string, pod) error { return nil }) }); err != nil {
		t.Fatal(err)
	}
	if bad := s.Unreadable(); len(bad) != 0 || len(s.Quarantined()) != 1 {
		t.Errorf("after it was put aside: %v, %v", bad, s.Quarantined())
	}
}

// Rows are dropped from the quarantine only with a copy, and only those asked for.
func TestForgetWithCopy(t *testing.T) {
	dir := t.TempDir()
	s := mustOpen(t, filepath.Join(dir, "book.db"))
	others := NewTable[pod]("others", 1)
	mustPut(t, s, "a", pod{})
	if err := s.Update(func(tx *Tx) error { return others.Put(tx, "b", pod{}) }); err != nil {
		t.Fatal(err)
	}
	if err := s.Update(func(tx *Tx) error {
		pods.Reject(tx, "a", errors.New("senseless"))
		others.Reject(tx, "b", errors.New("senseless"))
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	isPod := func(q Quarantine) bool { return q.Table == "pods" }
	if n, err := s.ForgetWithCopy(filepath.Join(dir, "none", "copy"), isPod); err == nil || n != 0 || len(s.Quarantined()) != 2 {
		t.Errorf("without a place for the copy: %d, %v, %v", n, err, s.Quarantined())
	}
	path := filepath.Join(dir, "copy")
	if n, err := s.ForgetWithCopy(path, isPod); err != nil || n != 1 {
		t.Fatalf("forgotten: %d, %v", n, err)
	}
	if q := s.Quarantined(); len(q) != 1 || q[0].Table != "others" {
		t.Errorf("left: %v", q)
	}
	text, err := os.ReadFile(path)
	if err != nil || !strings.Contains(string(text), `"Key":"a"`) || !strings.Contains(string(text), `"Raw":"`) {
		t.Errorf("copy: %v: %s", err, text)
	}
	if n, err := s.ForgetWithCopy(path+"2", isPod); err != nil || n != 0 {
		t.Errorf("nothing to forget: %d, %v", n, err)
	}
	if _, err := os.Stat(path + "2"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("an empty copy: %v", err)
	}
}

func TestConfirmAndTell(t *testing.T) {
	looks := [][]Finding{
		{{Kind: "a", ID: "1"}, {Kind: "a", ID: "2", Why: "then"}},
		{{Kind: "a", ID: "2", Why: "now"}, {Kind: "a", ID: "3"}},
	}
	n := 0
	look := func(context.Context) ([]Finding, error) { n++; return looks[n-1], nil }
	both, err := Confirm(t.Context(), time.Millisecond, look)
	if err != nil || len(both) != 1 || both[0].Why != "now" {
		t.Errorf("both have %v, %v", both, err)
	}
	looks, n = [][]Finding{nil}, 0
	if both, err = Confirm(t.Context(), time.Hour, look); err != nil || both != nil || n != 1 {
		t.Errorf("nothing: %v, %v, %d looks", both, err, n)
	}
	broken := errors.New("broken")
	found := []Finding{
		{ID: "mended", Mend: func(context.Context) error { return nil }},
		{ID: "broken", Mend: func(context.Context) error { return broken }},
		{ID: "by hand"},
	}
	for _, mend := range []bool{true, false} {
		var told []string
		err := Tell(t.Context(), found, mend, func(f Finding, mended bool, err error) {
			if mended != (mend && f.ID == "mended") || (err != nil) != (mend && f.ID == "broken") {
				t.Errorf("mend %v: %s: %v, %v", mend, f.ID, mended, err)
			}
			told = append(told, f.ID)
		})
		if err != nil || len(told) != len(found) {
			t.Errorf("mend %v: told %q, %v", mend, told, err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := Tell(ctx, found, true, func(Finding, bool, error) { t.Error("told after the end") }); !errors.Is(err, context.Canceled) {
		t.Errorf("after the end: %v", err)
	}
}
