package overlay

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/berthd/berth/snapshotter"
	"github.com/berthd/berth/snapshotter/snapshottest"
	"github.com/berthd/berth/store"
)

var ctx = context.Background()

func mustNew(t *testing.T, root string, st *store.Store) *Snapshotter {
	t.Helper()
	s, err := New(root, st)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func mustBook(t *testing.T, path string) *store.Store {
	t.Helper()
	st, err := store.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { st.Close() })
	return st
}

// mustOverlay returns a snapshotter, whose tables are checked at the end: every
// entry among the children must have its row, and the other way round.
func mustOverlay(t *testing.T) *Snapshotter {
	t.Helper()
	dir := t.TempDir()
	s := mustNew(t, filepath.Join(dir, "root"), mustBook(t, filepath.Join(dir, "book.db")))
	t.Cleanup(func() { checkTables(t, s) })
	return s
}

func checkTables(t *testing.T, s *Snapshotter) {
	t.Helper()
	want, got := []string{}, []string{}
	err := s.book.View(func(tx *store.Tx) error {
		return errors.Join(
			rows.Each(tx, func(key string, r row) error {
				if r.Parent != "" {
					want = append(want, r.Parent+"\x00"+key)
				}
				return nil
			}),
			children.Each(tx, func(key string, _ struct{}) error {
				got = append(got, key)
				return nil
			}))
	})
	slices.Sort(want)
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("children %q, %v, want %q", got, err, want)
	}
}

func mustPrepare(t *testing.T, s *Snapshotter, key, parent string) []snapshotter.Mount {
	t.Helper()
	m, err := s.Prepare(ctx, key, parent)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func mustDirs(t *testing.T, s *Snapshotter) []string {
	t.Helper()
	dirs, err := s.directories()
	if err != nil {
		t.Fatal(err)
	}
	return dirs
}

func TestConformance(t *testing.T) {
	snapshottest.Run(t, func(t *testing.T) snapshotter.Snapshotter {
		s := mustOverlay(t)
		t.Cleanup(func() { // nothing on disk without a row
			if leaked, err := s.leaked(); err != nil || len(leaked) > 0 {
				t.Errorf("directories without a row: %q, %v", leaked, err)
			}
		})
		return s
	})
}

func TestRootIsChecked(t *testing.T) {
	st := mustBook(t, filepath.Join(t.TempDir(), "book.db"))
	dir := t.TempDir()
	for _, root := range []string{"", "relative", dir + "/", dir + "/a,b", dir + "/a:b", dir + `/a\b`, dir + "/a b", dir + "/a\nb", dir + "/" + strings.Repeat("x", 201)} {
		if _, err := New(root, st); err == nil {
			t.Errorf("root %q was taken", root)
		} else if !strings.Contains(err.Error(), "root ") {
			t.Errorf("error %q does not name the field", err)
		}
	}
	s := mustNew(t, filepath.Join(dir, "good/root"), st)
	if fi, err := os.Stat(s.root); err != nil || fi.Mode().Perm() != 0o700 {
		t.Errorf("mode of the root %v, %v, want 0700", fi.Mode(), err)
	}
}

func TestLayout(t *testing.T) {
	s := mustOverlay(t)
	snapshottest.MustLayer(t, s, "l1", "", nil)
	snapshottest.MustLayer(t, s, "l2", "l1", nil)
	m := mustPrepare(t, s, "c", "l2")
	want := append(slices.Clone(s.options),
		"workdir="+s.root+"/snapshots/3/work",
		"upperdir="+s.root+"/snapshots/3/upper",
		"lowerdir="+s.root+"/layers/2:"+s.root+"/layers/1")
	if len(m) != 1 || m[0].Type != "overlay" || !slices.Equal(m[0].Options, want) {
		t.Errorf("mounts %+v, want options %q", m, want)
	}
	m = mustPrepare(t, s, "a", "")
	if len(m) != 1 || m[0].Type != "bind" || m[0].Source != s.root+"/layers/4" || !slices.Equal(m[0].Options, []string{"rw", "rbind"}) {
		t.Errorf("mounts of a parentless snapshot: %+v", m)
	}
}

func TestStateSurvivesRestart(t *testing.T) {
	dir := t.TempDir()
	st := mustBook(t, dir+"/book.db")
	s := mustNew(t, dir+"/root", st)
	snapshottest.MustLayer(t, s, "l1", "", map[string]string{"f": "x"})
	before := mustPrepare(t, s, "c", "l1")
	usage, err := s.Usage(ctx, "l1")
	if err != nil {
		t.Fatal(err)
	}
	st.Close()

	s = mustNew(t, dir+"/root", mustBook(t, dir+"/book.db"))
	after, err := s.Mounts(ctx, "c")
	if err != nil || len(after) != 1 || !slices.Equal(after[0].Options, before[0].Options) {
		t.Errorf("mounts %+v, %v, want %+v", after, err, before)
	}
	if got, err := s.Usage(ctx, "l1"); err != nil || got != usage || got.Inodes != 2 {
		t.Errorf("usage %+v, %v, want %+v", got, err, usage)
	}
	if err := s.Remove(ctx, "l1"); !errors.Is(err, snapshotter.ErrInUse) {
		t.Errorf("Remove of a parent after a restart: %v, want ErrInUse", err)
	}
}

// A crash between making a directory and committing its row, or between removing
// a row and the directory, leaves a directory without a row.
func TestCleanupAfterCrash(t *testing.T) {
	dir := t.TempDir()
	st := mustBook(t, dir+"/book.db")
	s := mustNew(t, dir+"/root", st)
	snapshottest.MustLayer(t, s, "l1", "", map[string]string{"f": "x"})
	mustPrepare(t, s, "c", "l1")
	mustPrepare(t, s, "crashed", "l1")
	if err := st.Update(func(tx *store.Tx) error { // the first half of Remove
		r, err := get(tx, "crashed")
		return errors.Join(err, remove(tx, "crashed", r))
	}); err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{"layers/77/deep/er", "snapshots/78/upper", "snapshots/other"} {
		if err := os.MkdirAll(s.path(d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	st.Close()

	s = mustNew(t, dir+"/root", mustBook(t, dir+"/book.db"))
	leaked, err := s.Leaked(ctx)
	if err != nil || len(leaked) < 3 || !slices.Contains(leaked, s.path("layers/77")) || slices.Contains(leaked, s.path("layers/1")) {
		t.Errorf("leaked: %q, %v", leaked, err)
	}
	if err := s.Cleanup(ctx); err != nil {
		t.Fatal(err)
	}
	if leaked, err := s.Leaked(ctx); err != nil || len(leaked) != 0 {
		t.Errorf("leaked after the sweep: %q, %v", leaked, err)
	}
	if got, want := mustDirs(t, s), []string{"layers/1", "snapshots/2"}; !slices.Equal(got, want) {
		t.Errorf("directories %q, want %q", got, want)
	}
}

func TestWhatRemoveLeavesIsTold(t *testing.T) {
	s := mustOverlay(t)
	mustPrepare(t, s, "busy", "")
	dir := s.path("layers/1/mount")
	if err := errors.Join(os.Mkdir(dir, 0o755), unix.Mount("none", dir, "tmpfs", 0, "")); err != nil {
		t.Fatal(err)
	}
	var told atomic.Int32
	s.OnLeft(func() { told.Add(1) })
	if err := s.Remove(ctx, "busy"); err != nil || told.Load() != 1 {
		t.Errorf("removal of a tree with a mount in it: %v, told %d times, want once", err, told.Load())
	}
	if leaked, err := s.Leaked(ctx); err != nil || !slices.Equal(leaked, []string{s.path("layers/1")}) {
		t.Errorf("leaked: %q, %v", leaked, err)
	}
	s.removing.Store("layers/1", true) // as while somebody is removing it
	if leaked, err := s.Leaked(ctx); err != nil || len(leaked) != 0 {
		t.Errorf("leaked while it is removed: %q, %v", leaked, err)
	}
	if err := errors.Join(unix.Unmount(dir, 0), s.Cleanup(ctx)); err != nil {
		t.Fatal(err)
	}
	if got := mustDirs(t, s); len(got) != 0 {
		t.Errorf("left: %q", got)
	}
}

func TestRebuiltBookKeepsDirectories(t *testing.T) {
	dir := t.TempDir()
	st := mustBook(t, dir+"/book.db")
	s := mustNew(t, dir+"/root", st)
	snapshottest.MustLayer(t, s, "l1", "", map[string]string{"f": "x"})
	mustPrepare(t, s, "c", "l1")
	st.Close()
	if err := os.WriteFile(dir+"/book.db", []byte(strings.Repeat("rubbish", 10000)), 0o600); err != nil {
		t.Fatal(err)
	}

	st = mustBook(t, dir+"/book.db")
	if !st.Rebuilt() {
		t.Fatal("the book does not say that it was rebuilt")
	}
	s = mustNew(t, dir+"/root", st)
	if err := s.Cleanup(ctx); err != nil {
		t.Fatal(err)
	}
	old := []string{"layers/1", "snapshots/2"}
	if got := mustDirs(t, s); !slices.Equal(got, old) {
		t.Fatalf("directories %q, want all kept: %q", got, old)
	}
	// New ones must not land in old directories.
	m := mustPrepare(t, s, "new", "")
	if want := s.path("layers/3"); m[0].Source != want {
		t.Errorf("new directory %s, want %s", m[0].Source, want)
	}
	if err := st.ClearRebuilt(); err != nil {
		t.Fatal(err)
	}
	if err := s.Cleanup(ctx); err != nil {
		t.Fatal(err)
	}
	if got, want := mustDirs(t, s), []string{"layers/3"}; !slices.Equal(got, want) {
		t.Errorf("directories after ClearRebuilt %q, want %q", got, want)
	}
}

// mustLose makes the row of a snapshot unreadable.
func mustLose(t *testing.T, s *Snapshotter, key string) {
	t.Helper()
	// The same table written with another row type is unreadable as a row.
	wrong := store.NewTable[map[string]string](tableName, 1)
	if err := s.book.Update(func(tx *store.Tx) error {
		return wrong.Put(tx, key, map[string]string{"Kind": "?"})
	}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Stat(ctx, key); !errors.Is(err, store.ErrCorrupt) {
		t.Fatalf("Stat: %v, want ErrCorrupt", err)
	}
}

// A layer whose row was lost stays for as long as something is on it, also when
// it has been pulled again.
func TestLostLayerStaysWhileInUse(t *testing.T) {
	s := mustNew(t, t.TempDir(), mustBook(t, filepath.Join(t.TempDir(), "book.db")))
	dirs := func(what string, want ...string) {
		t.Helper()
		if err := s.Cleanup(ctx); err != nil {
			t.Fatal(err)
		}
		if got := mustDirs(t, s); !slices.Equal(got, want) {
			t.Errorf("%s: directories %q, want %q", what, got, want)
		}
	}
	snapshottest.MustLayer(t, s, "l1", "", nil)
	snapshottest.MustLayer(t, s, "unused", "", nil)
	mustPrepare(t, s, "c", "l1")
	mustLose(t, s, "l1")
	dirs("lost", "layers/1", "layers/2", "snapshots/3")
	snapshottest.MustLayer(t, s, "l1", "", nil)
	dirs("pulled again", "layers/1", "layers/2", "layers/4", "snapshots/3")
	mustPrepare(t, s, "d", "l1")
	if err := s.Remove(ctx, "c"); err != nil {
		t.Fatal(err)
	}
	dirs("out of use", "layers/2", "layers/4", "snapshots/5")
	mustLose(t, s, "unused")
	dirs("lost, never in use", "layers/4", "snapshots/5")
	if q := s.book.Quarantined(); len(q) != 0 {
		t.Errorf("still in quarantine: %v", q)
	}
}

// The row of a writable layer is lost: what it is on stays until its owner has it
// removed and cleans up.
func TestLostSnapshotKeepsItsParent(t *testing.T) {
	s := mustNew(t, t.TempDir(), mustBook(t, filepath.Join(t.TempDir(), "book.db")))
	snapshottest.MustLayer(t, s, "l1", "", nil)
	mustPrepare(t, s, "c", "l1")
	mustLose(t, s, "c")
	if err := s.Remove(ctx, "l1"); !errors.Is(err, snapshotter.ErrInUse) {
		t.Errorf("Remove of the parent: %v, want ErrInUse", err)
	}
	if err := s.Remove(ctx, "c"); err != nil && !errors.Is(err, snapshotter.ErrNotFound) {
		t.Fatal(err)
	}
	if err := errors.Join(s.Cleanup(ctx), s.Remove(ctx, "l1")); err != nil {
		t.Errorf("after the sweep: %v", err)
	}
	if err := s.book.View(func(tx *store.Tx) error {
		return children.Each(tx, func(key string, _ struct{}) error { return fmt.Errorf("left over: %q", key) })
	}); err != nil {
		t.Error(err)
	}
	if got := mustDirs(t, s); len(got) != 0 {
		t.Errorf("directories %q, want none", got)
	}
}

func TestCleanupSparesWhatIsBeingMade(t *testing.T) {
	s := mustOverlay(t)
	s.making.RLock() // as create holds it between directory and row
	dir, err := s.makeDir(snapshotter.KindActive, "")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	go func() { done <- s.Cleanup(ctx) }()
	err = s.book.Update(func(tx *store.Tx) error {
		return put(tx, "k", row{Kind: snapshotter.KindActive, Dir: dir})
	})
	s.making.RUnlock()
	if err := errors.Join(err, <-done); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(s.path(dir)); err != nil {
		t.Errorf("directory: %v, want it kept", err)
	}
}

func TestRowWithoutDirectory(t *testing.T) {
	s := mustOverlay(t)
	m := mustPrepare(t, s, "k", "")
	if err := os.Remove(m[0].Source); err != nil { // as a power cut can
		t.Fatal(err)
	}
	if u, err := s.Usage(ctx, "k"); err != nil || u != (snapshotter.Usage{}) {
		t.Errorf("usage %+v, %v, want nothing", u, err)
	}
	if err := s.Remove(ctx, "k"); err != nil {
		t.Error(err)
	}
}

// mustChain commits n layers, each with a file of its own and one that all have.
func mustChain(t *testing.T, s *Snapshotter, n int) (top string, want map[string]string) {
	t.Helper()
	want = make(map[string]string)
	for i := range n {
		name := fmt.Sprint("layer", i)
		files := map[string]string{fmt.Sprint("f", i): fmt.Sprint(i), "same": fmt.Sprint(i)}
		for k, v := range files {
			want[k] = v
		}
		snapshottest.MustLayer(t, s, name, top, files)
		top = name
	}
	return top, want
}

func TestManyLayers(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: mounts snapshots")
	}
	s := mustOverlay(t)
	top, want := mustChain(t, s, 130)
	m := mustPrepare(t, s, "c", top)
	got := snapshottest.MustFiles(t, m)
	if len(got) != len(want) || got["same"] != "129" || got["f0"] != "0" || got["f129"] != "129" {
		t.Errorf("OpenRoot shows %d files, same=%q, want %d, 129", len(got), got["same"], len(want))
	}
	// mount(2) takes a page of options, so this goes through Compact.
	if dir, _ := snapshotter.Compact(m); dir != s.root+"/layers" {
		t.Errorf("Compact to %q, want the directory of the layers", dir)
	}
	snapshottest.MustMounted(t, m, func(root string) error {
		entries, err := os.ReadDir(root)
		if err == nil && len(entries) != len(want) {
			err = fmt.Errorf("%d entries, want %d", len(entries), len(want))
		}
		return errors.Join(err, os.Remove(root+"/f0"), os.WriteFile(root+"/new", nil, 0o644))
	})
	if got := snapshottest.MustFiles(t, m); got["f0"] != "" || len(got) != len(want) {
		t.Errorf("after the change: %d files, f0=%q", len(got), got["f0"])
	}
}

func mustMkdir(t *testing.T, dir string) string {
	t.Helper()
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestTooManyLayers(t *testing.T) {
	s := mustOverlay(t)
	err := s.book.Update(func(tx *store.Tx) error {
		parent := ""
		for i := range MaxLayers + 1 {
			name := fmt.Sprint("l", i)
			if err := put(tx, name, row{Kind: snapshotter.KindCommitted, Parent: parent, Dir: fmt.Sprint("layers/", i+1)}); err != nil {
				return err
			}
			parent = name
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	m := mustPrepare(t, s, "fits", fmt.Sprint("l", MaxLayers-1))
	if os.Geteuid() == 0 { // and the kernel agrees
		for i := range MaxLayers {
			if err := os.WriteFile(mustMkdir(t, s.path(fmt.Sprint("layers/", i+1)))+fmt.Sprint("/f", i), nil, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		if got := snapshottest.MustFiles(t, m); len(got) != MaxLayers {
			t.Errorf("OpenRoot shows %d files, want %d", len(got), MaxLayers)
		}
		snapshottest.MustMounted(t, m, func(root string) error {
			entries, err := os.ReadDir(root)
			if len(entries) != MaxLayers {
				err = errors.Join(err, fmt.Errorf("%d entries, want %d", len(entries), MaxLayers))
			}
			return err
		})
	}
	if _, c := snapshotter.Compact(m); len(strings.Join(c[0].Options, ",")) >= os.Getpagesize() {
		t.Error("as many layers as the kernel takes do not fit into a page")
	}
	if _, err := s.Prepare(ctx, "over", fmt.Sprint("l", MaxLayers)); err == nil || !strings.Contains(err.Error(), fmt.Sprint(MaxLayers)) {
		t.Errorf("Prepare on %d layers: %v, want an error with the limit", MaxLayers+1, err)
	}
	if _, err := s.Stat(ctx, "over"); !errors.Is(err, snapshotter.ErrNotFound) {
		t.Errorf("after the error: %v, want ErrNotFound", err)
	}
}

// Layers unpacked by others hold whiteouts as the kernel writes them.
func TestWhiteoutsOfLayers(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes whiteouts and mounts snapshots")
	}
	s := mustOverlay(t)
	snapshottest.MustLayer(t, s, "l1", "", map[string]string{"gone": "1", "kept": "1", "opaque/old": "1", "back": "1"})
	dir := mustPrepare(t, s, "x2", "")[0].Source
	if err := errors.Join(
		unix.Mknod(dir+"/gone", unix.S_IFCHR, 0),
		unix.Mknod(dir+"/back", unix.S_IFCHR, 0),
		os.Mkdir(dir+"/opaque", 0o755),
		unix.Setxattr(dir+"/opaque", "trusted.overlay.opaque", []byte("y"), 0),
		os.WriteFile(dir+"/opaque/new", []byte("2"), 0o644),
		s.Commit(ctx, "l2", "x2", snapshotter.WithParent("l1")),
	); err != nil {
		t.Fatal(err)
	}
	snapshottest.MustLayer(t, s, "l3", "l2", map[string]string{"back": "3"})
	want := map[string]string{"kept": "1", "opaque/new": "2", "back": "3"}
	m := mustPrepare(t, s, "c", "l3")
	if got := snapshottest.MustFiles(t, m); fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("OpenRoot shows %v, want %v", got, want)
	}
	snapshottest.MustMounted(t, m, func(root string) error {
		if _, err := os.Lstat(root + "/gone"); !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("gone: %v, want it absent", err)
		}
		b, err := os.ReadFile(root + "/back")
		if err == nil && string(b) != "3" {
			err = fmt.Errorf("back is %q, want 3", b)
		}
		return err
	})
}

func TestDeepTree(t *testing.T) {
	dir := t.TempDir() + "/tree"
	if err := os.MkdirAll(dir+"/side/by", 0o755); err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Open(dir, unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	const depth = 3*maxDepth + 10
	for range depth {
		if err := unix.Mkdirat(fd, "d", 0o755); err != nil {
			t.Fatal(err)
		}
		next, err := unix.Openat(fd, "d", unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		unix.Close(fd)
		fd = next
	}
	unix.Close(fd)
	if _, err := usage(ctx, dir); err == nil || !strings.Contains(err.Error(), fmt.Sprint(maxDepth)) {
		t.Errorf("usage: %v, want an error with the limit", err)
	}
	if err := removeTree(dir, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("after removal: %v", err)
	}
}

func TestRemoveTree(t *testing.T) {
	dir := t.TempDir()
	outside := dir + "/outside"
	if err := errors.Join(os.MkdirAll(dir+"/tree/a/b", 0o755), os.Mkdir(outside, 0o755),
		os.WriteFile(outside+"/f", nil, 0o644), os.Symlink(outside, dir+"/tree/a/link"),
		os.Symlink("nowhere", dir+"/tree/dangling"), syscall.Mkfifo(dir+"/tree/a/b/fifo", 0o600)); err != nil {
		t.Fatal(err)
	}
	for i := range 3000 { // more than one reading of the directory
		if err := os.WriteFile(fmt.Sprintf("%s/tree/a/b/%d", dir, i), nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 { // the second time there is nothing
		if err := removeTree(dir+"/tree", nil); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := os.Lstat(dir + "/tree"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("tree: %v, want it gone", err)
	}
	if _, err := os.Stat(outside + "/f"); err != nil {
		t.Errorf("removal followed a link: %v", err)
	}
}

func TestUsageOfUpper(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: mounts snapshots")
	}
	s := mustOverlay(t)
	snapshottest.MustLayer(t, s, "l", "", map[string]string{"f": strings.Repeat("x", 1<<20)})
	m := mustPrepare(t, s, "c", "l")
	snapshottest.MustMounted(t, m, func(root string) error {
		return os.WriteFile(root+"/new", make([]byte, 64<<10), 0o644)
	})
	u, err := s.Usage(ctx, "c")
	if err != nil || u.Inodes != 2 || u.Size < 64<<10 || u.Size > 128<<10 {
		t.Errorf("usage %+v, %v, want the directory and one file of 64 KiB", u, err)
	}
	canceled, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := s.Usage(canceled, "c"); !errors.Is(err, context.Canceled) {
		t.Errorf("usage with a canceled context: %v", err)
	}
}

func TestSupported(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: asks the kernel for overlay mounts")
	}
	dir := t.TempDir()
	if err := Supported(dir); err != nil {
		t.Errorf("here: %v", err)
	}
	if left, _ := os.ReadDir(dir); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
	if err := Supported("/proc/self"); err == nil {
		t.Error("/proc is said to hold snapshots")
	}
	// Overlay on overlay: the case of a container without a volume.
	for _, d := range []string{"lower", "upper", "work"} {
		os.Mkdir(dir+"/"+d, 0o755)
	}
	m := snapshotter.Mount{Type: "overlay", Source: "overlay", Options: []string{
		"lowerdir=" + dir + "/lower", "upperdir=" + dir + "/upper", "workdir=" + dir + "/work"}}
	snapshottest.MustMounted(t, []snapshotter.Mount{m}, func(root string) error {
		if err := Supported(root); err == nil || !strings.Contains(err.Error(), root) {
			return fmt.Errorf("overlay on overlay: %v, want an error that names %s", err, root)
		}
		return nil
	})
}

func TestLocate(t *testing.T) {
	s := mustOverlay(t)
	snapshottest.MustLayer(t, s, "l1", "", map[string]string{"below": "1"})
	snapshottest.MustLayer(t, s, "l2", "l1", map[string]string{"f": "2"})
	dir, err := s.Locate(ctx, "l2")
	if err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(dir + "/f"); err != nil || string(b) != "2" {
		t.Errorf("file of the layer: %q, %v", b, err)
	}
	if _, err := os.Stat(dir + "/below"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("file of the parent: %v, want it not to be there", err)
	}
	mustPrepare(t, s, "c", "l2")
	if _, err := s.Locate(ctx, "c"); !errors.Is(err, snapshotter.ErrKind) {
		t.Errorf("active snapshot: %v, want ErrKind", err)
	}
	if _, err := s.Locate(ctx, "none"); !errors.Is(err, snapshotter.ErrNotFound) {
		t.Errorf("no snapshot: %v, want ErrNotFound", err)
	}
}
