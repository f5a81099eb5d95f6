package overlay

import (
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/berthd/berth/store"
)

// mustDeviate checks the rows and wants deviations, each as "key what".
func mustDeviate(t *testing.T, s *Snapshotter, want ...string) []store.Finding {
	t.Helper()
	found, err := s.Check(ctx)
	var got []string
	for _, f := range found {
		if f.Why == "" || f.Consequence == "" || f.Remedy == "" {
			t.Errorf("says too little: %+v", f)
		}
		got = append(got, f.ID+" "+strings.TrimPrefix(f.What, s.root+"/"))
	}
	slices.Sort(got)
	slices.Sort(want)
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("deviations %q, %v; want %q", got, err, want)
	}
	return found
}

func TestCheck(t *testing.T) {
	s := mustOverlay(t)
	mustPrepare(t, s, "x", "")
	if err := s.Commit(ctx, "base", "x"); err != nil {
		t.Fatal(err)
	}
	mustPrepare(t, s, "c", "base")
	if _, err := s.View(ctx, "v", "base"); err != nil {
		t.Fatal(err)
	}
	mustDeviate(t, s)

	// The index of children, in both directions, can be mended.
	if err := s.book.Update(func(tx *store.Tx) error {
		if err := children.Delete(tx, "base\x00c"); err != nil {
			return err
		}
		return children.Put(tx, "base\x00gone", struct{}{})
	}); err != nil {
		t.Fatal(err)
	}
	for _, f := range mustDeviate(t, s, "c index of children", "gone index of children") {
		if f.Mend == nil {
			t.Fatalf("cannot be mended: %+v", f)
		}
		if err := f.Mend(ctx); err != nil {
			t.Error(err)
		}
	}
	mustDeviate(t, s)

	// Directories and layers cannot.
	r, err := s.find("c")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(s.path(r.Dir) + "/work"); err != nil {
		t.Fatal(err)
	}
	mustDeviate(t, s, "c "+r.Dir+"/work")
	if err := os.RemoveAll(s.path(r.Dir)); err != nil {
		t.Fatal(err)
	}
	mustDeviate(t, s, "c "+r.Dir+"/work", "c "+r.Dir+"/upper")
	if err := s.book.Update(func(tx *store.Tx) error { return rows.Delete(tx, "base") }); err != nil {
		t.Fatal(err)
	}
	for _, f := range mustDeviate(t, s, "c "+r.Dir+"/work", "c "+r.Dir+"/upper", "c parent base", "v parent base") {
		if f.Mend != nil {
			t.Errorf("to be mended: %+v", f)
		}
	}
}
