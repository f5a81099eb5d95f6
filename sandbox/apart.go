package sandbox

import (
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/berthd/berth/cni/netns"
)

// apart runs fn, which looks at a path that may be on a file system that does not
// answer, on a thread of its own that has no descriptors. Whoever waits for such a
// file system may not even die of SIGKILL, and what it has open stays open for as
// long: the sockets of this daemon, so that no client would notice its end, and
// its locks, so that no other one could start. fn has to do without files.
func apart(fn func() error) error {
	return netns.OnThread(func() error {
		// Before Linux 5.9 there is no such call, and fn runs all the same.
		_ = unix.CloseRange(0, ^uint(0)>>32, unix.CLOSE_RANGE_UNSHARE)
		return fn()
	})
}

// resolve follows the symbolic links of a path of the host.
func resolve(path string) (resolved string, err error) {
	err = apart(func() (err error) { resolved, err = filepath.EvalSymlinks(path); return err })
	return resolved, err
}
