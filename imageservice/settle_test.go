package imageservice

import (
	"context"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berthd/berth/snapshotter/overlay"
)

func TestIsCrowded(t *testing.T) {
	for _, tc := range []struct {
		name                        string
		blocks, avail, files, ffree uint64
		want                        bool
	}{
		{"empty", 1000, 1000, 1000, 1000, false},
		{"a quarter left", 1000, 250, 1000, 250, false},
		{"less room", 1000, 249, 1000, 1000, true},
		{"fewer inodes", 1000, 1000, 1000, 249, true},
		{"no inodes to count", 1000, 1000, 0, 0, false},
		{"full", 1000, 0, 1000, 0, true},
	} {
		fs := unix.Statfs_t{Blocks: tc.blocks, Bavail: tc.avail, Files: tc.files, Ffree: tc.ffree}
		if got := isCrowded(&fs); got != tc.want {
			t.Errorf("%s: %v, want %v", tc.name, got, tc.want)
		}
	}
	if !short("/nonexistent/directory") {
		t.Error("a file system that cannot be asked is not short")
	}
}

// behind is a snapshotter whose removals free nothing before it is told to.
type behind struct {
	*overlay.Snapshotter
	free chan struct{}
}

func (b *behind) RemoveAll(ctx context.Context, keys []string) ([]string, <-chan struct{}, error) {
	removed, freed, err := b.Snapshotter.RemoveAll(ctx, keys)
	late := make(chan struct{})
	go func() {
		<-b.free
		<-freed
		close(late)
	}()
	return removed, late, err
}

// TestRemoveWaits: a removal is answered when the disk has room again, if that is needed,
// or when its caller would not wait any longer; else at once.
func TestRemoveWaits(t *testing.T) {
	n := newNode(t)
	b := &behind{Snapshotter: n.sn, free: make(chan struct{})}
	n.Service.sn = b
	scarce := false
	n.Service.short = func(string) bool { return scarce }
	n.reg.Push("r", "v1", sample(t, "x"))
	ref := n.reg.Ref("r", "v1")
	pull := func() string {
		t.Helper()
		id := n.mustPull(ref).ID
		if u, err := n.FsUsage(); err != nil || u.Bytes == 0 {
			t.Errorf("usage after a pull: %+v, %v", u, err)
		}
		return id
	}
	gone := func() {
		t.Helper()
		if len(n.List()) != 0 {
			t.Error("the image is still there")
		}
		if u, err := n.FsUsage(); err != nil || u.Bytes != 0 || u.Inodes != 0 {
			t.Errorf("usage after the removal: %+v, %v", u, err)
		}
	}

	if err := n.Remove(context.Background(), pull()); err != nil { // or this test hangs
		t.Fatal(err)
	}
	gone()

	scarce = true
	id := pull() // right after the removal, before anything was freed
	hurried, cancel := context.WithTimeout(context.Background(), time.Minute)
	cancel()
	if err := n.Remove(hurried, id); err != nil {
		t.Errorf("removal for a caller that has gone: %v", err)
	}
	gone()

	id = pull()
	done := make(chan error, 1)
	go func() { done <- n.Remove(context.Background(), id) }()
	waitFor(t, "the image's end", func() bool { return len(n.List()) == 0 })
	select {
	case err := <-done:
		t.Errorf("answered before there was room: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	close(b.free)
	if err := <-done; err != nil {
		t.Error(err)
	}
	gone()
}
