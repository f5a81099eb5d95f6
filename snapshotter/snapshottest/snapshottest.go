// Package snapshottest says in tests what a snapshotter.Snapshotter must do. Run
// it from the tests of each backend.
package snapshottest

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/berthd/berth/snapshotter"
)

// Factory returns an empty snapshotter for one test and registers its clean-up.
type Factory func(t *testing.T) snapshotter.Snapshotter

// Run runs the suite. What has to mount is skipped without root.
func Run(t *testing.T, factory Factory) {
	tests := []struct {
		name string
		root bool
		run  func(*testing.T, snapshotter.Snapshotter)
	}{
		{"Absent", false, testAbsent},
		{"BadName", false, testBadName},
		{"PrepareCommitRemove", false, testLifecycle},
		{"KeyTaken", false, testKeyTaken},
		{"ParentKind", false, testParentKind},
		{"ParentAbsent", false, testParentAbsent},
		{"CommitKind", false, testCommitKind},
		{"CommitNameTaken", false, testCommitNameTaken},
		{"CommitRebase", false, testCommitRebase},
		{"CommitUsage", false, testCommitUsage},
		{"RemoveWithChildren", false, testRemoveWithChildren},
		{"MountsAreStable", false, testMountsAreStable},
		{"Labels", false, testLabels},
		{"UpdateFields", false, testUpdateFields},
		{"Walk", false, testWalk},
		{"WalkMayChange", false, testWalkMayChange},
		{"Usage", false, testUsage},
		{"Concurrent", false, testConcurrent},
		{"ConcurrentSameKey", false, testConcurrentSameKey},
		{"Cleanup", false, testCleanup},
		{"Sync", false, testSync},
		{"RemoveAll", false, testRemoveAll},
		{"Replace", false, testReplace},
		{"ContentOfChain", true, testContent},
		{"DeletedFiles", true, testDeleted},
		{"SiblingsAreApart", true, testSiblings},
		{"ViewIsReadOnly", true, testViewReadOnly},
		{"ViewOfNothing", true, testViewOfNothing},
		{"OpenRootIsReadOnly", true, testOpenRootReadOnly},
		{"RootIsReadable", true, testRootMode},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if tt.root && os.Geteuid() != 0 {
				t.Skip("needs root: mounts snapshots")
			}
			s := factory(t)
			tt.run(t, s)
			if err := s.Close(); err != nil {
				t.Errorf("Close: %v", err)
			}
		})
	}
}

var ctx = context.Background()

// MustLayer commits a layer with the files, given as path and content, on parent
// ("" for none). The files are written without mounting anything.
func MustLayer(t testing.TB, s snapshotter.Snapshotter, name, parent string, files map[string]string) {
	t.Helper()
	key := "extract " + name
	m, err := s.Prepare(ctx, key, "")
	if err != nil {
		t.Fatal(err)
	}
	if len(m) != 1 || m[0].Type != "bind" {
		t.Fatalf("mounts of a parentless snapshot: %+v, want one bind", m)
	}
	for path, content := range files {
		mustWrite(t, filepath.Join(m[0].Source, path), content)
	}
	var opts []snapshotter.Opt
	if parent != "" {
		opts = append(opts, snapshotter.WithParent(parent))
	}
	if err := s.Commit(ctx, name, key, opts...); err != nil {
		t.Fatal(err)
	}
}

// MustMounted runs fn with the mounts on root, in a mount namespace of its own.
func MustMounted(t testing.TB, m []snapshotter.Mount, fn func(root string) error) {
	t.Helper()
	root := t.TempDir()
	if err := snapshotter.WithMounted(m, root, func() error { return fn(root) }); err != nil {
		t.Fatal(err)
	}
}

// MustFiles returns the regular files that OpenRoot shows, path to content.
func MustFiles(t testing.TB, m []snapshotter.Mount) map[string]string {
	t.Helper()
	root, err := snapshotter.OpenRoot(m)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	dir := fmt.Sprintf("/proc/self/fd/%d/", root.Fd())
	files := make(map[string]string)
	err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		b, err := os.ReadFile(path)
		files[strings.TrimPrefix(path, dir)] = string(b)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

func mustWrite(t testing.TB, path, content string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

func mustPrepare(t testing.TB, s snapshotter.Snapshotter, key, parent string, opts ...snapshotter.Opt) []snapshotter.Mount {
	t.Helper()
	m, err := s.Prepare(ctx, key, parent, opts...)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func mustView(t testing.TB, s snapshotter.Snapshotter, key, parent string) []snapshotter.Mount {
	t.Helper()
	m, err := s.View(ctx, key, parent)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func mustStat(t testing.TB, s snapshotter.Snapshotter, key string) snapshotter.Info {
	t.Helper()
	i, err := s.Stat(ctx, key)
	if err != nil {
		t.Fatal(err)
	}
	return i
}

func wantErr(t testing.TB, what string, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("%s: error %v, want %v", what, err, want)
	}
}

func wantFiles(t testing.TB, m []snapshotter.Mount, want map[string]string) {
	t.Helper()
	if got := MustFiles(t, m); !maps.Equal(got, want) {
		t.Errorf("files %v, want %v", got, want)
	}
}

func names(t testing.TB, s snapshotter.Snapshotter) (all []string) {
	t.Helper()
	err := s.Walk(ctx, func(_ context.Context, i snapshotter.Info) error {
		all = append(all, i.Name)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(all)
	return all
}

func testAbsent(t *testing.T, s snapshotter.Snapshotter) {
	_, err := s.Stat(ctx, "none")
	wantErr(t, "Stat", err, snapshotter.ErrNotFound)
	_, err = s.Usage(ctx, "none")
	wantErr(t, "Usage", err, snapshotter.ErrNotFound)
	_, err = s.Mounts(ctx, "none")
	wantErr(t, "Mounts", err, snapshotter.ErrNotFound)
	_, err = s.Update(ctx, snapshotter.Info{Name: "none"})
	wantErr(t, "Update", err, snapshotter.ErrNotFound)
	wantErr(t, "Commit", s.Commit(ctx, "layer", "none"), snapshotter.ErrNotFound)
	wantErr(t, "Remove", s.Remove(ctx, "none"), snapshotter.ErrNotFound)
}

func testBadName(t *testing.T, s snapshotter.Snapshotter) {
	for _, key := range []string{"", strings.Repeat("k", 1<<16), "a\x00b"} {
		if _, err := s.Prepare(ctx, key, ""); err == nil {
			t.Errorf("Prepare took a key of %d bytes", len(key))
		}
		if _, err := s.View(ctx, key, ""); err == nil {
			t.Errorf("View took a key of %d bytes", len(key))
		}
		mustPrepare(t, s, "ok", "")
		if err := s.Commit(ctx, key, "ok"); err == nil {
			t.Errorf("Commit took a name of %d bytes", len(key))
		}
		if err := s.Remove(ctx, "ok"); err != nil {
			t.Error(err)
		}
	}
}

func testLifecycle(t *testing.T, s snapshotter.Snapshotter) {
	before := time.Now().Add(-time.Second)
	m := mustPrepare(t, s, "key", "")
	if fi, err := os.Stat(m[0].Source); err != nil || !fi.IsDir() {
		t.Fatalf("directory of a parentless snapshot: %v", err)
	}
	i := mustStat(t, s, "key")
	if i.Kind != snapshotter.KindActive || i.Name != "key" || i.Parent != "" || i.Created.Before(before) || i.Updated.Before(before) {
		t.Errorf("active: %+v", i)
	}
	if err := s.Commit(ctx, "layer", "key"); err != nil {
		t.Fatal(err)
	}
	_, err := s.Stat(ctx, "key")
	wantErr(t, "Stat of the key after Commit", err, snapshotter.ErrNotFound)
	if i := mustStat(t, s, "layer"); i.Kind != snapshotter.KindCommitted || i.Name != "layer" {
		t.Errorf("committed: %+v", i)
	}
	mustView(t, s, "view", "layer")
	if i := mustStat(t, s, "view"); i.Kind != snapshotter.KindView || i.Parent != "layer" {
		t.Errorf("view: %+v", i)
	}
	for _, k := range []string{"view", "layer"} {
		if err := s.Remove(ctx, k); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := os.Stat(m[0].Source); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("directory after Remove: %v, want it gone", err)
	}
	mustPrepare(t, s, "key", "") // the key is free again
}

func testKeyTaken(t *testing.T, s snapshotter.Snapshotter) {
	MustLayer(t, s, "layer", "", nil)
	mustPrepare(t, s, "key", "layer")
	for _, key := range []string{"key", "layer"} {
		_, err := s.Prepare(ctx, key, "layer")
		wantErr(t, "Prepare "+key, err, snapshotter.ErrExists)
		_, err = s.View(ctx, key, "layer")
		wantErr(t, "View "+key, err, snapshotter.ErrExists)
	}
	if i := mustStat(t, s, "key"); i.Kind != snapshotter.KindActive {
		t.Errorf("the snapshot that had the key became %+v", i)
	}
}

func testParentKind(t *testing.T, s snapshotter.Snapshotter) {
	mustPrepare(t, s, "active", "")
	mustView(t, s, "view", "")
	for _, parent := range []string{"active", "view"} {
		_, err := s.Prepare(ctx, "k", parent)
		wantErr(t, "Prepare on "+parent, err, snapshotter.ErrKind)
		_, err = s.View(ctx, "k", parent)
		wantErr(t, "View of "+parent, err, snapshotter.ErrKind)
		mustPrepare(t, s, "late", "")
		wantErr(t, "Commit on "+parent, s.Commit(ctx, "l", "late", snapshotter.WithParent(parent)), snapshotter.ErrKind)
		if err := s.Remove(ctx, "late"); err != nil {
			t.Error(err)
		}
	}
	_, err := s.Prepare(ctx, "k", "", snapshotter.WithParent("other"))
	wantErr(t, "Prepare with WithParent", err, snapshotter.ErrKind)
	if got := names(t, s); !slices.Equal(got, []string{"active", "view"}) {
		t.Errorf("snapshots after errors: %q", got)
	}
}

func testParentAbsent(t *testing.T, s snapshotter.Snapshotter) {
	_, err := s.Prepare(ctx, "k", "none")
	wantErr(t, "Prepare", err, snapshotter.ErrNotFound)
	_, err = s.View(ctx, "k", "none")
	wantErr(t, "View", err, snapshotter.ErrNotFound)
	mustPrepare(t, s, "late", "")
	for _, parent := range []string{"none", "late", "l"} {
		wantErr(t, "Commit on "+parent, s.Commit(ctx, "l", "late", snapshotter.WithParent(parent)), snapshotter.ErrNotFound)
	}
	if i := mustStat(t, s, "late"); i.Kind != snapshotter.KindActive || i.Parent != "" {
		t.Errorf("after failed commits: %+v", i)
	}
}

func testCommitKind(t *testing.T, s snapshotter.Snapshotter) {
	MustLayer(t, s, "layer", "", nil)
	mustView(t, s, "view", "layer")
	for _, key := range []string{"layer", "view"} {
		wantErr(t, "Commit of "+key, s.Commit(ctx, "other", key), snapshotter.ErrKind)
	}
	_, err := s.Mounts(ctx, "layer")
	wantErr(t, "Mounts of a committed snapshot", err, snapshotter.ErrKind)
}

func testCommitNameTaken(t *testing.T, s snapshotter.Snapshotter) {
	MustLayer(t, s, "layer", "", nil)
	mustPrepare(t, s, "again", "")
	wantErr(t, "Commit", s.Commit(ctx, "layer", "again"), snapshotter.ErrExists)
	if i := mustStat(t, s, "again"); i.Kind != snapshotter.KindActive {
		t.Errorf("the active snapshot became %+v", i)
	}
	if err := s.Remove(ctx, "again"); err != nil {
		t.Error(err)
	}
}

func testCommitRebase(t *testing.T, s snapshotter.Snapshotter) {
	mustPrepare(t, s, "x2", "") // both unpack before either has a parent
	mustPrepare(t, s, "x1", "")
	if err := s.Commit(ctx, "l1", "x1"); err != nil {
		t.Fatal(err)
	}
	if err := s.Commit(ctx, "l2", "x2", snapshotter.WithParent("l1")); err != nil {
		t.Fatal(err)
	}
	if i := mustStat(t, s, "l2"); i.Parent != "l1" {
		t.Errorf("parent %q, want l1", i.Parent)
	}
	wantErr(t, "Remove of the parent", s.Remove(ctx, "l1"), snapshotter.ErrInUse)

	mustPrepare(t, s, "c", "l2")
	wantErr(t, "Commit with another parent", s.Commit(ctx, "l3", "c", snapshotter.WithParent("l1")), snapshotter.ErrKind)
	if err := s.Commit(ctx, "l3", "c", snapshotter.WithParent("l2")); err != nil {
		t.Errorf("Commit with the parent it has: %v", err)
	}
	wantErr(t, "Remove of l2", s.Remove(ctx, "l2"), snapshotter.ErrInUse)
}

func testCommitUsage(t *testing.T, s snapshotter.Snapshotter) {
	mustPrepare(t, s, "x", "")
	if err := s.Commit(ctx, "bad", "x", snapshotter.WithUsage(snapshotter.Usage{Size: -1})); err == nil {
		t.Error("a negative usage was taken")
	}
	want := snapshotter.Usage{Size: 12345, Inodes: 6}
	if err := s.Commit(ctx, "l", "x", snapshotter.WithUsage(want)); err != nil {
		t.Fatal(err)
	}
	if got, err := s.Usage(ctx, "l"); err != nil || got != want {
		t.Errorf("usage %+v, %v, want the one given", got, err)
	}
}

func testRemoveWithChildren(t *testing.T, s snapshotter.Snapshotter) {
	MustLayer(t, s, "l1", "", nil)
	MustLayer(t, s, "l2", "l1", nil)
	mustPrepare(t, s, "c1", "l2")
	mustView(t, s, "v1", "l2")
	mustPrepare(t, s, "other", "")
	for _, k := range []string{"l1", "l2"} {
		wantErr(t, "Remove "+k, s.Remove(ctx, k), snapshotter.ErrInUse)
	}
	if err := s.Remove(ctx, "c1"); err != nil {
		t.Fatal(err)
	}
	wantErr(t, "Remove l2 with a view", s.Remove(ctx, "l2"), snapshotter.ErrInUse)
	for _, k := range []string{"v1", "l2", "l1"} {
		if err := s.Remove(ctx, k); err != nil {
			t.Fatalf("Remove %s: %v", k, err)
		}
	}
	if got := names(t, s); !slices.Equal(got, []string{"other"}) {
		t.Errorf("left: %q", got)
	}
}

func testMountsAreStable(t *testing.T, s snapshotter.Snapshotter) {
	MustLayer(t, s, "l1", "", nil)
	MustLayer(t, s, "l2", "l1", nil)
	want := map[string][]snapshotter.Mount{
		"a0": mustPrepare(t, s, "a0", ""),
		"a1": mustPrepare(t, s, "a1", "l1"),
		"a2": mustPrepare(t, s, "a2", "l2"),
		"v1": mustView(t, s, "v1", "l1"),
		"v2": mustView(t, s, "v2", "l2"),
	}
	for key, m := range want {
		got, err := s.Mounts(ctx, key)
		equal := func(a, b snapshotter.Mount) bool {
			return a.Type == b.Type && a.Source == b.Source && a.Target == b.Target && slices.Equal(a.Options, b.Options)
		}
		if err != nil || len(m) == 0 || !slices.EqualFunc(got, m, equal) {
			t.Errorf("%s: mounts %+v, %v, want %+v", key, got, err, m)
		}
	}
}

func testLabels(t *testing.T, s snapshotter.Snapshotter) {
	labels := map[string]string{"a": "1", "b": "2"}
	mustPrepare(t, s, "x", "", snapshotter.WithLabels(labels))
	if got := mustStat(t, s, "x").Labels; !maps.Equal(got, labels) {
		t.Errorf("labels %v, want %v", got, labels)
	}
	if err := s.Commit(ctx, "l", "x", snapshotter.WithLabels(map[string]string{"c": "3"})); err != nil {
		t.Fatal(err)
	}
	if got := mustStat(t, s, "l").Labels; !maps.Equal(got, map[string]string{"c": "3"}) {
		t.Errorf("labels after Commit %v, want those given to it", got)
	}
	bad := func(*snapshotter.Info) error { return errors.New("bad option") }
	if _, err := s.Prepare(ctx, "y", "", bad); err == nil {
		t.Error("the error of an option was lost")
	}
}

func testUpdateFields(t *testing.T, s snapshotter.Snapshotter) {
	tests := []struct {
		name   string
		labels map[string]string
		fields []string
		want   map[string]string
	}{
		{"all by default", map[string]string{"c": "3"}, nil, map[string]string{"c": "3"}},
		{"all by name", map[string]string{"c": "3"}, []string{"labels"}, map[string]string{"c": "3"}},
		{"one", map[string]string{"a": "x", "c": "3"}, []string{"labels.a"}, map[string]string{"a": "x", "b": "2"}},
		{"new", map[string]string{"c": "3"}, []string{"labels.c"}, map[string]string{"a": "1", "b": "2", "c": "3"}},
		{"dropped", nil, []string{"labels.a"}, map[string]string{"b": "2"}},
		{"all dropped", nil, nil, nil},
		{"key with dots", map[string]string{"x.y/z": "1"}, []string{"labels.x.y/z"}, map[string]string{"a": "1", "b": "2", "x.y/z": "1"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			mustPrepare(t, s, tt.name, "", snapshotter.WithLabels(map[string]string{"a": "1", "b": "2"}))
			i, err := s.Update(ctx, snapshotter.Info{Name: tt.name, Labels: tt.labels}, tt.fields...)
			if err != nil || !maps.Equal(i.Labels, tt.want) {
				t.Errorf("Update: %v, %v, want %v", i.Labels, err, tt.want)
			}
			if got := mustStat(t, s, tt.name); !maps.Equal(got.Labels, tt.want) || got.Kind != snapshotter.KindActive {
				t.Errorf("Stat: %+v, want labels %v", got, tt.want)
			}
		})
	}
	mustPrepare(t, s, "k", "")
	if _, err := s.Update(ctx, snapshotter.Info{Name: "k", Parent: "p"}, "parent"); err == nil {
		t.Error("Update of the parent was taken")
	}
}

func testWalk(t *testing.T, s snapshotter.Snapshotter) {
	MustLayer(t, s, "l", "", nil)
	mustPrepare(t, s, "a", "l")
	mustView(t, s, "v", "l")
	if got := names(t, s); !slices.Equal(got, []string{"a", "l", "v"}) {
		t.Errorf("walked %q, want a l v", got)
	}
	stop := errors.New("stop")
	calls := 0
	err := s.Walk(ctx, func(context.Context, snapshotter.Info) error { calls++; return stop })
	if !errors.Is(err, stop) || calls != 1 {
		t.Errorf("Walk ended with %v after %d calls, want the error of the first", err, calls)
	}
}

func testWalkMayChange(t *testing.T, s snapshotter.Snapshotter) {
	for i := range 5 {
		mustPrepare(t, s, fmt.Sprint(i), "")
	}
	err := s.Walk(ctx, func(ctx context.Context, i snapshotter.Info) error { return s.Remove(ctx, i.Name) })
	if got := names(t, s); err != nil || len(got) != 0 {
		t.Errorf("left %q, %v", got, err)
	}
}

func testUsage(t *testing.T, s snapshotter.Snapshotter) {
	m := mustPrepare(t, s, "x", "")
	dir := m[0].Source
	empty, err := s.Usage(ctx, "x")
	if err != nil {
		t.Fatal(err)
	}
	const size = 1 << 20
	mustWrite(t, filepath.Join(dir, "sub/file"), strings.Repeat("x", size))
	if err := os.Link(filepath.Join(dir, "sub/file"), filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/", filepath.Join(dir, "to-the-host")); err != nil {
		t.Fatal(err)
	}
	sparse, err := os.Create(filepath.Join(dir, "sparse"))
	if err != nil {
		t.Fatal(err)
	}
	sparse.Truncate(1 << 30)
	sparse.Close()
	full, err := s.Usage(ctx, "x")
	if err != nil {
		t.Fatal(err)
	}
	// sub, file (once for both names), symlink, sparse
	if got := full.Inodes - empty.Inodes; got != 4 {
		t.Errorf("%d inodes, want 4", got)
	}
	if got := full.Size - empty.Size; got < size || got > size+64<<10 {
		t.Errorf("size %d, want the allocated bytes, a little over %d", got, size)
	}
	if err := s.Commit(ctx, "l", "x"); err != nil {
		t.Fatal(err)
	}
	if got, err := s.Usage(ctx, "l"); err != nil || got != full {
		t.Errorf("committed usage %+v, %v, want %+v", got, err, full)
	}
	mustPrepare(t, s, "c", "l")
	if got, err := s.Usage(ctx, "c"); err != nil || got.Size >= size {
		t.Errorf("usage of an empty writable layer %+v, %v, want its own only", got, err)
	}
	mustView(t, s, "v", "l")
	if got, err := s.Usage(ctx, "v"); err != nil || got.Size >= size {
		t.Errorf("usage of a view %+v, %v", got, err)
	}
}

func testConcurrent(t *testing.T, s snapshotter.Snapshotter) {
	MustLayer(t, s, "base", "", nil)
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			x, l, c := fmt.Sprint("x", i), fmt.Sprint("l", i), fmt.Sprint("c", i)
			if _, err := s.Prepare(ctx, x, ""); err != nil {
				t.Error(err)
				return
			}
			if err := s.Commit(ctx, l, x, snapshotter.WithParent("base")); err != nil {
				t.Error(err)
				return
			}
			if _, err := s.Prepare(ctx, c, l); err != nil {
				t.Error(err)
				return
			}
			if cl, ok := s.(snapshotter.Cleaner); ok {
				if err := cl.Cleanup(ctx); err != nil {
					t.Error(err)
				}
			}
			if err := errors.Join(s.Remove(ctx, c), s.Remove(ctx, l)); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if got := names(t, s); !slices.Equal(got, []string{"base"}) {
		t.Errorf("left %q, want base", got)
	}
}

func testConcurrentSameKey(t *testing.T, s snapshotter.Snapshotter) {
	var wg sync.WaitGroup
	errs := make([]error, 8)
	for i := range errs {
		wg.Go(func() { _, errs[i] = s.Prepare(ctx, "k", "") })
	}
	wg.Wait()
	won := 0
	for _, err := range errs {
		if err == nil {
			won++
		} else {
			wantErr(t, "Prepare", err, snapshotter.ErrExists)
		}
	}
	if won != 1 {
		t.Errorf("%d of %d callers got the key, want 1", won, len(errs))
	}
	m, err := s.Mounts(ctx, "k")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(m[0].Source); err != nil {
		t.Errorf("directory of the winner: %v", err)
	}
}

func testCleanup(t *testing.T, s snapshotter.Snapshotter) {
	c, ok := s.(snapshotter.Cleaner)
	if !ok {
		t.Skip("not a snapshotter.Cleaner")
	}
	MustLayer(t, s, "l", "", map[string]string{"f": "x"})
	m := mustPrepare(t, s, "x", "")
	if err := c.Cleanup(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(m[0].Source); err != nil {
		t.Errorf("Cleanup took a directory in use: %v", err)
	}
	if got := names(t, s); !slices.Equal(got, []string{"l", "x"}) {
		t.Errorf("snapshots after Cleanup: %q", got)
	}
}

func testSync(t *testing.T, s snapshotter.Snapshotter) {
	sy, ok := s.(snapshotter.Syncer)
	if !ok {
		t.Skip("not a snapshotter.Syncer")
	}
	w, err := sy.Watch()
	if err != nil {
		t.Fatal(err)
	}
	MustLayer(t, s, "l", "", map[string]string{"f": "x"})
	for range 2 {
		if err := w.Sync(ctx); err != nil {
			t.Error(err)
		}
	}
	ended, cancel := context.WithCancel(ctx)
	cancel()
	if err := w.Sync(ended); !errors.Is(err, context.Canceled) {
		t.Errorf("sync for nobody: %v", err)
	}
	if err := w.Close(); err != nil {
		t.Error(err)
	}
	if err := w.Sync(ctx); err == nil {
		t.Error("sync of what was closed")
	}
}

func testContent(t *testing.T, s snapshotter.Snapshotter) {
	MustLayer(t, s, "l1", "", map[string]string{"a": "a1", "b": "b1", "d/x": "x1"})
	MustLayer(t, s, "l2", "l1", map[string]string{"b": "b2", "d/y": "y2"})
	MustLayer(t, s, "l3", "l2", map[string]string{"c": "c3"})
	want := map[string]string{"a": "a1", "b": "b2", "c": "c3", "d/x": "x1", "d/y": "y2"}
	wantFiles(t, mustView(t, s, "v", "l3"), want)

	m := mustPrepare(t, s, "c", "l3")
	wantFiles(t, m, want)
	MustMounted(t, m, func(root string) error {
		return os.WriteFile(filepath.Join(root, "a"), []byte("mine"), 0o644)
	})
	want["a"] = "mine"
	wantFiles(t, m, want) // what was written is in the snapshot
	if err := s.Commit(ctx, "l4", "c"); err != nil {
		t.Fatal(err)
	}
	wantFiles(t, mustPrepare(t, s, "c2", "l4"), want) // and in what is made from it
	wantFiles(t, mustView(t, s, "v1", "l1"), map[string]string{"a": "a1", "b": "b1", "d/x": "x1"})
}

func testDeleted(t *testing.T, s snapshotter.Snapshotter) {
	MustLayer(t, s, "l1", "", map[string]string{"gone": "1", "kept": "1", "dir/old": "1"})
	m := mustPrepare(t, s, "x", "l1")
	MustMounted(t, m, func(root string) error {
		if err := errors.Join(os.Remove(root+"/gone"), os.RemoveAll(root+"/dir"), os.Mkdir(root+"/dir", 0o755)); err != nil {
			return err
		}
		return os.WriteFile(root+"/dir/new", []byte("2"), 0o644)
	})
	want := map[string]string{"kept": "1", "dir/new": "2"}
	wantFiles(t, m, want)
	if err := s.Commit(ctx, "l2", "x"); err != nil {
		t.Fatal(err)
	}
	wantFiles(t, mustView(t, s, "v", "l2"), want)
	wantFiles(t, mustPrepare(t, s, "c", "l2"), want)
}

func testSiblings(t *testing.T, s snapshotter.Snapshotter) {
	MustLayer(t, s, "l", "", map[string]string{"f": "base"})
	a, b := mustPrepare(t, s, "a", "l"), mustPrepare(t, s, "b", "l")
	MustMounted(t, a, func(root string) error { return os.WriteFile(root+"/f", []byte("a"), 0o644) })
	wantFiles(t, a, map[string]string{"f": "a"})
	wantFiles(t, b, map[string]string{"f": "base"})
}

func testViewReadOnly(t *testing.T, s snapshotter.Snapshotter) {
	MustLayer(t, s, "l1", "", map[string]string{"f": "1"})
	MustLayer(t, s, "l2", "l1", map[string]string{"g": "2"})
	for _, parent := range []string{"l1", "l2"} {
		MustMounted(t, mustView(t, s, "v "+parent, parent), func(root string) error {
			if err := os.WriteFile(root+"/f", []byte("x"), 0o644); err == nil {
				return fmt.Errorf("view of %s can be written", parent)
			}
			return nil
		})
	}
}

func testViewOfNothing(t *testing.T, s snapshotter.Snapshotter) {
	wantFiles(t, mustView(t, s, "v", ""), map[string]string{})
}

func testOpenRootReadOnly(t *testing.T, s snapshotter.Snapshotter) {
	MustLayer(t, s, "l", "", map[string]string{"f": "1"})
	for name, m := range map[string][]snapshotter.Mount{
		"bind":    mustPrepare(t, s, "a0", ""),
		"overlay": mustPrepare(t, s, "a1", "l"),
	} {
		root, err := snapshotter.OpenRoot(m)
		if err != nil {
			t.Fatal(err)
		}
		defer root.Close()
		if f, err := os.Create(fmt.Sprintf("/proc/self/fd/%d/new", root.Fd())); err == nil {
			f.Close()
			t.Errorf("%s: the view of OpenRoot can be written", name)
		}
	}
}

func testRootMode(t *testing.T, s snapshotter.Snapshotter) {
	MustLayer(t, s, "l", "", map[string]string{"f": "1"})
	for _, m := range [][]snapshotter.Mount{mustPrepare(t, s, "a0", ""), mustPrepare(t, s, "a1", "l")} {
		MustMounted(t, m, func(root string) error {
			fi, err := os.Stat(root)
			if err == nil && fi.Mode().Perm() != 0o755 {
				err = fmt.Errorf("root has mode %v, want 0755, for users of the container", fi.Mode())
			}
			return err
		})
	}
}
