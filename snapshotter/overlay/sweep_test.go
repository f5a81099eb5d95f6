package overlay

import (
	"context"
	"errors"
	"os"
	"slices"
	"testing"

	"github.com/berthd/berth/snapshotter/snapshottest"
)

// full lets no sweep begin with a directory, until the function that it returns is called.
func full(s *Snapshotter) (release func()) {
	for range maxRemovers {
		s.sweeps.slots <- struct{}{}
	}
	return func() {
		for range maxRemovers {
			<-s.sweeps.slots
		}
	}
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// Names are free as soon as RemoveAll returns, whatever is left to do on disk.
func TestSweepGoesOnBehind(t *testing.T) {
	s := mustOverlay(t)
	snapshottest.MustLayer(t, s, "l1", "", map[string]string{"f": "old"})
	release := full(s)
	removed, freed, err := s.RemoveAll(ctx, []string{"l1"})
	if err != nil || !slices.Equal(removed, []string{"l1"}) {
		t.Fatalf("removed %q, %v", removed, err)
	}
	if isClosed(freed) {
		t.Error("freed, while nothing can have been removed")
	}
	snapshottest.MustLayer(t, s, "l1", "", map[string]string{"f": "new"})
	dir, err := s.Locate(ctx, "l1")
	if err != nil {
		t.Fatal(err)
	}
	// A clean-up leaves to the sweep what it is at, and waits for it.
	stopped, cancel := context.WithCancel(ctx)
	cancel()
	if err := s.Cleanup(stopped); !errors.Is(err, context.Canceled) {
		t.Errorf("clean-up by somebody who does not wait: %v", err)
	}
	done := make(chan error, 1)
	go func() { done <- s.Cleanup(ctx) }()
	release()
	<-freed
	if err := <-done; err != nil {
		t.Error(err)
	}
	if got, want := mustDirs(t, s), []string{"layers/2"}; !slices.Equal(got, want) {
		t.Errorf("directories %q, want %q", got, want)
	}
	if b, err := os.ReadFile(dir + "/f"); err != nil || string(b) != "new" {
		t.Errorf("the layer that took the name: %q, %v", b, err)
	}
}

// What Close ends is removed by the clean-up of the next start.
func TestSweepEndsWithClose(t *testing.T) {
	dir := t.TempDir()
	st := mustBook(t, dir+"/book.db")
	s := mustNew(t, dir+"/root", st)
	for _, name := range []string{"l1", "l2"} {
		snapshottest.MustLayer(t, s, name, "", map[string]string{"f": "x"})
	}
	full(s)
	_, during, err := s.RemoveAll(ctx, []string{"l1"})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(s.Close(), s.Close()); err != nil {
		t.Fatal(err)
	}
	if !isClosed(during) {
		t.Error("a sweep outlived Close")
	}
	_, after, err := s.RemoveAll(ctx, []string{"l2"})
	if err != nil || !isClosed(after) {
		t.Errorf("removal after Close: %v, freed %v", err, isClosed(after))
	}
	if got, want := mustDirs(t, s), []string{"layers/1", "layers/2"}; !slices.Equal(got, want) {
		t.Errorf("directories %q, want %q", got, want)
	}
	if err := removeTree(s.path("layers/1"), s.sweeps.stop); !errors.Is(err, errStopped) {
		t.Errorf("removal after Close: %v, want errStopped", err)
	}
	s = mustNew(t, dir+"/root", st)
	if err := s.Cleanup(ctx); err != nil {
		t.Fatal(err)
	}
	if got := mustDirs(t, s); len(got) != 0 {
		t.Errorf("left by the clean-up: %q", got)
	}
}
