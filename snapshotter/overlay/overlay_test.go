package overlay

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/berthd/berth/snapshotter"
	"github.com/berthd/berth/snapshotter/snapshottest"
	"github.com/berthd/berth/store"
)

var ctx = context.Background()

func mustNew(t testing.TB, root string) (*Snapshotter, *store.Store) {
	t.Helper()
	st, err := store.Open(filepath.Join(root, "book.db"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { st.Close() })
	s, err := New(root, st)
	if err != nil {
		t.Fatal(err)
	}
	return s, st
}

func TestConformance(t *testing.T) {
	snapshottest.Run(t, func(t *testing.T) snapshotter.Snapshotter {
		s, _ := mustNew(t, t.TempDir())
		return s
	})
}

func TestBadRoot(t *testing.T) {
	for _, root := range []string{"relative", "/a/../b", "/with space", "/with,comma", "/with:colon", "/" + strings.Repeat("x", maxRoot)} {
		if _, err := New(root, nil); err == nil || !strings.Contains(err.Error(), strconv.Quote(root)) {
			t.Errorf("%.30q: got %v, want an error that names it", root, err)
		}
	}
}

// A crash leaves directories without a row, and nothing else.
func TestCleanupSweepsWhatACrashLeaves(t *testing.T) {
	root := t.TempDir()
	s, st := mustNew(t, root)
	snapshottest.MustLayer(t, s, "kept", "", map[string]string{"f": "1"})
	orphans := []string{filepath.Join(root, "layers", "4711"), filepath.Join(root, "snapshots", "4712")}
	for _, dir := range orphans {
		if err := os.MkdirAll(filepath.Join(dir, "upper", "deep"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	again, err := New(root, st)
	if err != nil {
		t.Fatal(err)
	}
	if err := again.Cleanup(ctx); err != nil {
		t.Fatal(err)
	}
	for _, dir := range orphans {
		if _, err := os.Lstat(dir); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is left: %v", dir, err)
		}
	}
	if _, err := again.Stat(ctx, "kept"); err != nil {
		t.Errorf("the layer that has a row: %v", err)
	}
	// A number is not used again while its directory exists.
	m, err := again.Prepare(ctx, "next", "")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(m[0].Source); err != nil {
		t.Error(err)
	}
}

// After the book was lost nothing is swept: containers may run on what is there.
func TestNoSweepAfterALostBook(t *testing.T) {
	root := t.TempDir()
	s, st := mustNew(t, root)
	snapshottest.MustLayer(t, s, "l", "", map[string]string{"f": "1"})
	info, err := s.Prepare(ctx, "probe", "")
	if err != nil {
		t.Fatal(err)
	}
	used := info[0].Source
	if err := st.Close(); err != nil {
		t.Fatal(err)
	}
	book := filepath.Join(root, "book.db")
	if err := os.WriteFile(book, []byte(strings.Repeat("rubbish ", 4096)), 0o600); err != nil {
		t.Fatal(err)
	}
	st, err = store.Open(book)
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	if !st.Rebuilt() {
		t.Fatal("the book is not marked as rebuilt")
	}
	s, err = New(root, st)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Cleanup(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(used); err != nil {
		t.Errorf("a directory was swept: %v", err)
	}
	m, err := s.Prepare(ctx, "new", "")
	if err != nil {
		t.Fatal(err)
	}
	if m[0].Source == used {
		t.Errorf("%s was given out again", used)
	}
	if err := st.ClearRebuilt(); err != nil {
		t.Fatal(err)
	}
	if err := s.Cleanup(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(used); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("not swept when it may be: %v", err)
	}
}

func TestWhiteoutsOfLayers(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes device nodes and mounts")
	}
	s, _ := mustNew(t, t.TempDir())
	snapshottest.MustLayer(t, s, "l1", "", map[string]string{"gone": "1", "dir/old": "1", "kept": "1"})
	m, err := s.Prepare(ctx, "x", "")
	if err != nil {
		t.Fatal(err)
	}
	up := m[0].Source
	if err := unix.Mknod(filepath.Join(up, "gone"), unix.S_IFCHR, 0); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(up, "dir"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Setxattr(filepath.Join(up, "dir"), "trusted.overlay.opaque", []byte("y"), 0); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(up, "dir", "new"), []byte("2"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := s.Commit(ctx, "l2", "x", snapshotter.WithParent("l1")); err != nil {
		t.Fatal(err)
	}
	m, err = s.Prepare(ctx, "c", "l2")
	if err != nil {
		t.Fatal(err)
	}
	got := fmt.Sprint(snapshottest.MustFiles(t, m))
	if want := "map[dir/new:2 kept:1]"; got != want {
		t.Errorf("files %s, want %s", got, want)
	}
}

// TestManyLayers mounts a chain whose options do not fit into a page, by both
// ways: as a detached mount and, made compact, by mount(2).
func TestManyLayers(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: mounts snapshots")
	}
	root := filepath.Join(t.TempDir(), strings.Repeat("long", 10))
	if err := os.MkdirAll(root, 0o700); err != nil {
		t.Fatal(err)
	}
	s, _ := mustNew(t, root)
	const n = 130
	parent := ""
	for i := range n {
		name := "l" + strconv.Itoa(i)
		snapshottest.MustLayer(t, s, name, parent, map[string]string{"f": strconv.Itoa(i), "only" + strconv.Itoa(i): ""})
		parent = name
	}
	m, err := s.Prepare(ctx, "c", parent)
	if err != nil {
		t.Fatal(err)
	}
	dir, compact := snapshotter.Compact(m)
	if dir == "" {
		t.Error("options of 130 layers were not made compact")
	}
	if l := len(strings.Join(compact[0].Options, ",")); l >= os.Getpagesize() {
		t.Errorf("compact options take %d bytes, a page is %d", l, os.Getpagesize())
	}
	f, err := snapshotter.OpenRoot(m)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	text, err := os.ReadFile(fmt.Sprintf("/proc/self/fd/%d/f", f.Fd()))
	if err != nil || string(text) != strconv.Itoa(n-1) {
		t.Errorf("OpenRoot: f is %q, %v; want that of the last layer", text, err)
	}
	files := snapshottest.MustFiles(t, m)
	if len(files) != n+1 || files["f"] != strconv.Itoa(n-1) {
		t.Errorf("mounted: %d files, f is %q; want %d and %d", len(files), files["f"], n+1, n-1)
	}
}

func TestTooManyLayers(t *testing.T) {
	s, _ := mustNew(t, t.TempDir())
	parent := ""
	var err error
	for i := 0; i <= MaxLayers && err == nil; i++ {
		name := "l" + strconv.Itoa(i)
		if _, err = s.Prepare(ctx, "x"+name, ""); err != nil {
			break
		}
		err = s.Commit(ctx, name, "x"+name, snapshotter.WithParent(parent))
		parent = name
	}
	if err == nil {
		_, err = s.Prepare(ctx, "c", parent)
	}
	if err == nil || !strings.Contains(err.Error(), strconv.Itoa(MaxLayers)) {
		t.Errorf("%d layers: got %v, want an error that names the limit", MaxLayers+1, err)
	}
}
