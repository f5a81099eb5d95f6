package layer

import (
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"
)

// TestRemoveTreeUnderSignals: a directory is read to its end although signals interrupt the
// reading, as those do by which the runtime preempts goroutines.
func TestRemoveTreeUnderSignals(t *testing.T) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	pid, tid := unix.Getpid(), unix.Gettid()
	var stop atomic.Bool
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for !stop.Load() {
			unix.Tgkill(pid, tid, unix.SIGURG)
		}
	}()
	defer func() { stop.Store(true); <-ended }()
	parent := t.TempDir()
	dir := int(mustOpen(t, parent).Fd())
	for i := range 100 {
		name := strconv.Itoa(i)
		for j := range 4 {
			if err := os.MkdirAll(filepath.Join(parent, name, strconv.Itoa(j), "below"), 0o700); err != nil {
				t.Fatal(err)
			}
		}
		if err := removeTree(dir, name); err != nil {
			t.Fatalf("tree %d: %v", i, err)
		}
	}
}
