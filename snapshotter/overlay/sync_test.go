package overlay

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/berthd/berth/test/disk"
)

// A write that the disk refused is told to all who watched before it, whoever syncs first.
// The disk is a file that has no room for what its file system promises.
func TestWatchIsToldOfLostWrites(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: it mounts")
	}
	release, err := os.ReadFile("/proc/sys/kernel/osrelease")
	if err != nil {
		t.Fatal(err)
	}
	var major, minor int
	if n, err := fmt.Sscanf(string(release), "%d.%d", &major, &minor); n != 2 {
		t.Fatalf("kernel %q: %v", release, err)
	}
	if major < 5 || major == 5 && minor < 8 {
		t.Skipf("kernel %d.%d: syncfs(2) tells of lost writes since Linux 5.8", major, minor)
	}
	dir := t.TempDir()
	if err := unix.Mount("none", dir, "tmpfs", 0, "size=24m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	d, err := disk.New(dir, "ext2", 64<<20) // a journal would fail as a whole
	if errors.Is(err, disk.ErrNone) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	s := mustNew(t, filepath.Join(d.Dir, "root"), mustBook(t, filepath.Join(t.TempDir(), "book.db")))
	first, err := s.Watch()
	if err != nil {
		t.Fatal(err)
	}
	defer first.Close()
	second, err := s.Watch()
	if err != nil {
		t.Fatal(err)
	}
	defer second.Close()
	if err := errors.Join(first.Sync(ctx), second.Sync(ctx)); err != nil {
		t.Fatalf("sync of nothing: %v", err)
	}
	m := mustPrepare(t, s, "x", "")
	noise := rand.NewChaCha8([32]byte{1})
	b := make([]byte, 40<<20)
	noise.Read(b)
	if err := os.WriteFile(filepath.Join(m[0].Source, "f"), b, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := first.Sync(ctx); !errors.Is(err, unix.EIO) && !errors.Is(err, unix.ENOSPC) {
		t.Errorf("the first sync: %v, want an input/output error", err)
	}
	if err := second.Sync(ctx); !errors.Is(err, unix.EIO) && !errors.Is(err, unix.ENOSPC) {
		t.Errorf("the second sync: %v, want an input/output error", err)
	}
}
