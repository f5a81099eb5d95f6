package sandbox

import (
	"errors"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/berthd/berth/cni/netns"
)

// awaitAnswer waits until a path of the host can be looked at, which may be on a
// file system that does not answer. Whoever waits for one may not even die of
// SIGKILL, and what it has open stays open for as long: this daemon's sockets, so
// that no client would notice its end, and its locks, so that no other one could
// start. So a thread of its own waits, which has next to no descriptors. What it
// finds is for the caller to see.
func awaitAnswer(path string) {
	if answersAtOnce(path) {
		return
	}
	keep := runtimeFiles()
	_ = netns.OnThread(func() error {
		if len(keep) > 0 {
			closeAllBut(keep)
		}
		var st unix.Stat_t
		return unix.Stat(path, &st)
	})
}

// resolveCached is RESOLVE_CACHED (openat2(2), Linux 5.12).
const resolveCached = 0x20

// answersAtOnce tells whether a look at a path needs nothing but the kernel's
// caches.
func answersAtOnce(path string) bool {
	fd, err := unix.Openat2(unix.AT_FDCWD, path, &unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: resolveCached})
	if err == nil {
		unix.Close(fd)
		return true
	}
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP)
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
		if to := uint(fd) - 1; fd > 2 && from <= to {
			if unix.CloseRange(from, to, unix.CLOSE_RANGE_UNSHARE) != nil {
				return
			}
			from = to + 2
		} else {
			from = max(from, uint(fd)+1)
		}
	}
}
