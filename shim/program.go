package shim

import (
	"os"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"
)

// A shim that starts a process by itself is, until its execve, a process of the
// container that runs the shim's program; and an image may have a program that is a
// link to /proc/self/exe. Either way processes of the container get at that file,
// and might write to it when no shim runs it any more (CVE-2019-5736). Therefore
// shims run from a read-only mount of the file that is nowhere in the file system.
// A shim looks whether it does, and starts no process by itself otherwise.

// program is the file that shims are started from.
var program struct {
	mu   sync.Mutex
	of   unix.Stat_t // the file that fd is a mount of
	path string
	fd   int
}

// programFD is above all descriptors that the child of a fork moves about.
const programFD = 64

// readOnly returns the path of a binary on a read-only mount, or the one that it
// was given where the kernel (before 5.12) has no such mounts.
func readOnly(binary string) string {
	var st unix.Stat_t
	if unix.Stat(binary, &st) != nil {
		return binary
	}
	p := &program
	p.mu.Lock()
	defer p.mu.Unlock()
	same := p.path == binary && p.of.Dev == st.Dev && p.of.Ino == st.Ino && p.of.Ctim == st.Ctim && p.of.Size == st.Size
	if !same {
		fd, err := mountReadOnly(binary)
		if err != nil {
			return binary
		}
		if p.path != "" {
			unix.Close(p.fd)
		}
		p.of, p.path, p.fd = st, binary, fd
	}
	return "/proc/self/fd/" + strconv.Itoa(p.fd)
}

func mountReadOnly(file string) (int, error) {
	fd, err := unix.OpenTree(unix.AT_FDCWD, file, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return -1, os.NewSyscallError("open_tree", err)
	}
	defer unix.Close(fd)
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV, Propagation: unix.MS_PRIVATE}
	if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &attr); err != nil {
		return -1, os.NewSyscallError("mount_setattr", err)
	}
	high, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, programFD)
	return high, os.NewSyscallError("fcntl", err)
}
