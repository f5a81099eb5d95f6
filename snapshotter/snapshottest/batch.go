package snapshottest

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/berthd/berth/snapshotter"
)

// chainOf commits layers a, b on a, … each with a file "file" that holds its name.
func chainOf(t *testing.T, s snapshotter.Snapshotter, names ...string) {
	t.Helper()
	parent := ""
	for _, n := range names {
		tree(t, s, "x-"+n, n)
		if err := s.Commit(context.Background(), n, "x-"+n, snapshotter.WithParent(parent)); err != nil {
			t.Fatal(err)
		}
		parent = n
	}
}

// tree prepares an active snapshot without a parent that has one file, and returns its
// directory.
func tree(t *testing.T, s snapshotter.Snapshotter, key, text string) string {
	t.Helper()
	m, err := s.Prepare(context.Background(), key, "")
	if err != nil {
		t.Fatal(err)
	}
	if len(m) != 1 || m[0].Type != "bind" {
		t.Skip("no directory to write into")
	}
	if err := os.WriteFile(filepath.Join(m[0].Source, "file"), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	return m[0].Source
}

func testRemoveAll(t *testing.T, s snapshotter.Snapshotter) {
	b, ok := s.(snapshotter.BatchRemover)
	if !ok {
		t.Skip("not a snapshotter.BatchRemover")
	}
	ctx := context.Background()
	chainOf(t, s, "a", "b", "c")
	chainOf(t, s, "d", "e")
	if _, err := s.Prepare(ctx, "container", "d"); err != nil {
		t.Fatal(err)
	}
	got, freed, err := b.RemoveAll(ctx, []string{"b", "c", "gone", "e", "d"})
	if err != nil || !slices.Equal(got, []string{"c", "gone", "e"}) {
		t.Errorf("removed %q, %v; want c, gone and e: b comes before its child, d has one that stays", got, err)
	}
	<-freed
	got, freed, err = b.RemoveAll(ctx, []string{"b", "a"})
	if err != nil || !slices.Equal(got, []string{"b", "a"}) {
		t.Errorf("removed %q, %v; want b and a", got, err)
	}
	<-freed
	if _, freed, err = b.RemoveAll(ctx, nil); err != nil || freed == nil {
		t.Errorf("removal of nothing: %v, channel %v", err, freed)
	}
	<-freed
	if err := errors.Join(s.Remove(ctx, "container"), s.Remove(ctx, "d")); err != nil {
		t.Error(err)
	}
}

func testReplace(t *testing.T, s snapshotter.Snapshotter) {
	r, ok := s.(snapshotter.Replacer)
	if !ok {
		t.Skip("not a snapshotter.Replacer")
	}
	ctx := context.Background()
	chainOf(t, s, "a", "b", "c")
	if _, err := s.Prepare(ctx, "container", "c"); err != nil {
		t.Fatal(err)
	}
	before, err := s.Stat(ctx, "b")
	if err != nil {
		t.Fatal(err)
	}
	dir := tree(t, s, "new", "better")
	if err := r.Replace(ctx, "b", "new", snapshotter.WithUsage(snapshotter.Usage{Size: 7, Inodes: 2})); err != nil {
		t.Fatal(err)
	}
	after, err := s.Stat(ctx, "b")
	if err != nil || after.Parent != before.Parent || after.Kind != snapshotter.KindCommitted {
		t.Errorf("replaced: %+v, %v; want what %+v was", after, err, before)
	}
	if u, err := s.Usage(ctx, "b"); err != nil || u.Size != 7 {
		t.Errorf("usage %+v, %v", u, err)
	}
	if _, err := s.Stat(ctx, "new"); !errors.Is(err, snapshotter.ErrNotFound) {
		t.Errorf("the key is still there: %v", err)
	}
	if b, err := os.ReadFile(filepath.Join(dir, "file")); err != nil || string(b) != "better" {
		t.Errorf("the new tree: %q, %v", b, err)
	}
	// The old tree stays as long as the container may show it.
	old := ""
	err = s.Walk(ctx, func(_ context.Context, i snapshotter.Info) error {
		if strings.HasPrefix(i.Name, "replaced-") {
			old = i.Name
		}
		return nil
	})
	if err != nil || old == "" {
		t.Fatalf("no old tree: %v", err)
	}
	if err := s.Remove(ctx, old); !errors.Is(err, snapshotter.ErrInUse) {
		t.Errorf("the old tree was removed under a container: %v", err)
	}
	if err := errors.Join(s.Remove(ctx, "container"), s.Remove(ctx, old)); err != nil {
		t.Error(err)
	}
	// Without users nothing is kept.
	tree(t, s, "newer", "best")
	if err := r.Replace(ctx, "b", "newer"); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the tree in between is still there: %v", err)
	}
	tree(t, s, "again", "x")
	for _, c := range []struct {
		name, key string
		want      error
	}{{"none", "again", snapshotter.ErrNotFound}, {"b", "none", snapshotter.ErrNotFound}, {"again", "again", snapshotter.ErrKind}, {"b", "a", snapshotter.ErrKind}} {
		if err := r.Replace(ctx, c.name, c.key); !errors.Is(err, c.want) {
			t.Errorf("replace %s by %s: %v, want %v", c.name, c.key, err, c.want)
		}
	}
}
