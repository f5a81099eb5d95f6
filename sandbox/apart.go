package sandbox

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berthd/berth/cni/netns"
)

// awaitAnswer waits until a path of the host can be looked at, which may be on a
// file system that does not answer. Whoever waits for one may not even die of
// SIGKILL, and what it has open stays open for as long: this daemon's sockets, so
// that no client would notice its end, and its locks, so that no other one could
// start. So a thread of its own waits, which has next to no descriptors. What it
// finds is for the caller to see; the error is that too many wait already. A kernel
// that cannot tell which looks wait (before Linux 5.12) has none taken apart.
func awaitAnswer(path string) error {
	if !tellsCached() || answersAtOnce(path) {
		return nil
	}
	done, err := lookers.enter()
	if err != nil {
		return err
	}
	defer done()
	keep := runtimeFiles()
	_ = netns.OnThread(func() error {
		if len(keep) > 0 {
			closeAllBut(keep)
		}
		var st unix.Stat_t
		return unix.Stat(path, &st)
	})
	return nil
}

// maxLookers bounds the threads that wait for answers, lookerPatience how long one
// more look waits for another one to end.
const (
	maxLookers     = 64
	lookerPatience = 10 * time.Second
)

var lookers = crowd{make(chan struct{}, maxLookers), lookerPatience}

// crowd is those who wait for volumes that may never answer.
type crowd struct {
	in       chan struct{}
	patience time.Duration
}

func (c crowd) enter() (done func(), err error) {
	done = func() { <-c.in }
	select {
	case c.in <- struct{}{}:
		return done, nil
	default: // so that a place that is free is taken, however late this goroutine is
	}
	timeout := time.NewTimer(c.patience)
	defer timeout.Stop()
	select {
	case c.in <- struct{}{}:
		return done, nil
	case <-timeout.C:
		return nil, fmt.Errorf("%w: %d looks, the limit, wait for volumes that do not answer", ErrBusy, cap(c.in))
	}
}

// resolveCached is RESOLVE_CACHED (openat2(2), Linux 5.12).
const resolveCached = 0x20

// tellsCached tells whether the kernel knows of it and nothing filters the call.
var tellsCached = sync.OnceValue(func() bool {
	err := openCached("/")
	return !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOSYS) && !errors.Is(err, unix.EPERM)
})

// answersAtOnce tells whether a look at a path needs nothing but the kernel's
// caches.
func answersAtOnce(path string) bool {
	err := openCached(path)
	return err == nil || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP)
}

func openCached(path string) error {
	fd, err := unix.Openat2(unix.AT_FDCWD, path, &unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: resolveCached})
	if err == nil {
		unix.Close(fd)
	}
	return err
}

// runtimeFiles are the descriptors that Go's scheduler may use on any thread: those
// by which it waits, and by which it wakes who waits. None if it has none yet.
func runtimeFiles() (keep []int) {
	for _, name := range names("/proc/self/fd") {
		to, err := os.Readlink("/proc/self/fd/" + name)
		if fd, e := strconv.Atoi(name); err == nil && e == nil && (strings.Contains(to, "[eventpoll]") || strings.Contains(to, "[eventfd]")) {
			keep = append(keep, fd)
		}
	}
	slices.Sort(keep)
	return keep
}

// closeAllBut gives the calling thread a table of descriptors of its own, with
// those for messages and the ones to keep, in their order.
func closeAllBut(keep []int) {
	from := uint(3)
	for _, fd := range append(keep, 1<<31-1) {
		// Before Linux 5.9 there is no such call, and nothing is closed.
		if from < uint(fd) && unix.CloseRange(from, uint(fd)-1, unix.CLOSE_RANGE_UNSHARE) != nil {
			return
		}
		from = max(from, uint(fd)+1)
	}
}
