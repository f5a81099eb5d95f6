package shimd

import (
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/berthd/berth/shim/wire"
)

// The runtime is started by fork and execve of the shim's own, which, other than
// package syscall's, leaves no garbage and can mount in between.
//
// The runtime's create runs in a mount namespace of its own, in which the root
// is mounted. The namespace is made by a plain fork rather than by a thread of
// the shim: it ends with the runtime in any case, and the shim keeps no thread
// for it. Nothing in it is made private, so that it stays a peer of the host's
// and a volume with Bidirectional propagation works; what is mounted below
// berth's run directory does not propagate because that is a private mount.

// A forkPlan is all that the child needs, made before the fork: the child of a
// process with several threads may only make system calls.
type forkPlan struct {
	unshare bool // the mount namespace
	mounts  []mountCall
	stdio   [3]int // descriptors above 2, or -1 to keep the shim's
	argv    []*byte
	envv    []*byte
	native  *nativeStart // instead of all above but stdio
	report  *report
	mask    uint64
	parent  int // this process
}

// mountCall is one mount(2), preceded by a chdir when dir is not nil. With attr
// it is a copy of source, with those attributes, that is moved to target. It is
// made in the name of uid and gid, see mountAs.
type mountCall struct {
	dir, source, target, fstype, data *byte
	flags                             uintptr
	attr                              *unix.MountAttr
	uid, gid                          uint32
}

// A report, in memory shared with the child, tells where the child failed:
// which mount, or one of the numbers below.
type report struct {
	at    int32
	errno int32 // 0 while nothing has failed
	pid   int32 // of the second child of a native start
}

const (
	atUnshare int32 = -1
	atStdio   int32 = -2
	atExec    int32 = -3
	atFork    int32 = -4
)

// failed is the status of a child that has left a report.
const failed = 127

// mountFlag returns the flag of an option of mount(8) and whether the option
// clears it. It is a switch, as a map would be built in every shim.
func mountFlag(o string) (flag uintptr, clear, ok bool) {
	switch o {
	case "defaults":
		return 0, false, true
	case "ro", "rw":
		return unix.MS_RDONLY, o == "rw", true
	case "nosuid", "suid":
		return unix.MS_NOSUID, o == "suid", true
	case "nodev", "dev":
		return unix.MS_NODEV, o == "dev", true
	case "noexec", "exec":
		return unix.MS_NOEXEC, o == "exec", true
	case "noatime", "atime":
		return unix.MS_NOATIME, o == "atime", true
	case "nodiratime", "diratime":
		return unix.MS_NODIRATIME, o == "diratime", true
	case "relatime", "norelatime":
		return unix.MS_RELATIME, o == "norelatime", true
	case "strictatime", "nostrictatime":
		return unix.MS_STRICTATIME, o == "nostrictatime", true
	case "sync", "async":
		return unix.MS_SYNCHRONOUS, o == "async", true
	case "dirsync":
		return unix.MS_DIRSYNC, false, true
	case "bind":
		return unix.MS_BIND, false, true
	case "rbind":
		return unix.MS_BIND | unix.MS_REC, false, true
	}
	return 0, false, false
}

// mountPlan turns mounts as data into calls. A read-only bind takes two, as the
// kernel ignores all other flags when it binds. userNS is a descriptor of the user
// namespace for ID-mapped mounts, -1 for none.
func mountPlan(l *wire.Launch, userNS int) ([]mountCall, error) {
	var calls []mountCall
	for i := range l.Mounts {
		m := &l.Mounts[i]
		target := targetOf(m, l.Rootfs, l.Bundle)
		flags, data := mountOptions(m.Options)
		if len(data) >= unix.Getpagesize() {
			return nil, unix.E2BIG
		}
		ptr, err := cstrings(m.Source, target, m.Type, data)
		if err != nil {
			return nil, err
		}
		c := mountCall{source: ptr[0], target: ptr[1], fstype: ptr[2], data: ptr[3], flags: flags}
		dir := m.Dir
		if m.IDMap != "" {
			copied, err := idMapCall(m, c, userNS)
			if err != nil {
				return nil, err
			}
			calls = append(calls, copied)
			if flags&unix.MS_BIND != 0 {
				continue
			}
			dir, c.uid, c.gid = target+"/"+m.Dir, l.RootUID, l.RootGID
		}
		if dir != "" {
			if c.dir, err = unix.BytePtrFromString(dir); err != nil {
				return nil, err
			}
		}
		calls = append(calls, c)
		if more := flags &^ (unix.MS_BIND | unix.MS_REC); flags&unix.MS_BIND != 0 && more != 0 {
			c.dir, c.flags = nil, unix.MS_REMOUNT|unix.MS_BIND|more
			calls = append(calls, c)
		}
	}
	return calls, nil
}

// idMapCall is the copy of m.IDMap. It is made private: mounts on it, such as the
// container's root, would else appear wherever its original is a peer, on the
// host to begin with.
func idMapCall(m *wire.Mount, c mountCall, userNS int) (mountCall, error) {
	if userNS < 0 {
		return mountCall{}, unix.EBADF
	}
	source, err := unix.BytePtrFromString(m.IDMap)
	if err != nil {
		return mountCall{}, err
	}
	attr := &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP, Propagation: unix.MS_PRIVATE, Userns_fd: uint64(userNS)}
	if c.flags&unix.MS_BIND != 0 {
		// These four have the same numbers in both interfaces.
		attr.Attr_set |= uint64(c.flags & (unix.MS_RDONLY | unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC))
	}
	return mountCall{source: source, target: c.target, attr: attr}, nil
}

func targetOf(m *wire.Mount, rootfs, bundle string) string {
	if m.Target != "" {
		return bundle + "/" + m.Target
	}
	return rootfs
}

// local tells whether a path stays below where it begins, as far as its text
// can tell.
func local(p string) bool {
	for rest := p; ; {
		name, more, found := strings.Cut(rest, "/")
		if name == "" || name == "." || name == ".." {
			return false
		}
		if !found {
			return true
		}
		rest = more
	}
}

func mountOptions(options []string) (flags uintptr, data string) {
	var rest []string
	for _, o := range options {
		switch flag, clear, ok := mountFlag(o); {
		case !ok:
			rest = append(rest, o)
		case clear:
			flags &^= flag
		default:
			flags |= flag
		}
	}
	return flags, strings.Join(rest, ",")
}

func cstrings(list ...string) ([]*byte, error) {
	out := make([]*byte, len(list))
	for i, s := range list {
		p, err := unix.BytePtrFromString(s)
		if err != nil {
			return nil, err
		}
		out[i] = p
	}
	return out, nil
}

var (
	rootDir = [2]byte{'/', 0}
	noPath  = [1]byte{0}
	allMask = ^uint64(0)
)

// fork starts p.argv in a process group of its own and returns in the parent
// only. What fails in the child before that ends it with the status failed and
// a report. It is a plain fork, as a child that shared the memory would need
// assembly code for each architecture, and the shim's memory is small. Signals are blocked around it: a handler of
// the Go runtime must not run in the child before execve.
//
//go:noinline
//go:norace
//go:nosplit
func fork(p *forkPlan) (uintptr, unix.Errno) {
	unix.RawSyscall6(unix.SYS_RT_SIGPROCMASK, unix.SIG_SETMASK, uintptr(unsafe.Pointer(&allMask)), uintptr(unsafe.Pointer(&p.mask)), 8, 0, 0)
	pid, _, errno := unix.RawSyscall6(unix.SYS_CLONE, uintptr(unix.SIGCHLD), 0, 0, 0, 0, 0)
	if errno != 0 || pid != 0 {
		unix.RawSyscall6(unix.SYS_RT_SIGPROCMASK, unix.SIG_SETMASK, uintptr(unsafe.Pointer(&p.mask)), 0, 8, 0, 0)
		return pid, errno
	}
	unix.RawSyscall(unix.SYS_SETPGID, 0, 0, 0)
	if p.native != nil {
		at, errno := join(p)
		if at == inSecond {
			at, errno = become(p)
		}
		p.report.at, p.report.errno = at, errno
	} else {
		p.report.at, p.report.errno = child(p)
	}
	for {
		unix.RawSyscall(unix.SYS_EXIT_GROUP, failed, 0, 0)
		// A seccomp filter may not let it.
		self, _, _ := unix.RawSyscall(unix.SYS_GETPID, 0, 0, 0)
		unix.RawSyscall(unix.SYS_KILL, self, uintptr(unix.SIGKILL), 0)
	}
}

// child runs in the forked process and returns only what failed.
//
//go:noinline
//go:norace
//go:nosplit
func child(p *forkPlan) (at, failure int32) {
	if e := dieWith(p.parent); e != 0 {
		return atFork, int32(e)
	}
	if p.unshare {
		if _, _, e := unix.RawSyscall(unix.SYS_UNSHARE, unix.CLONE_NEWNS, 0, 0); e != 0 {
			return atUnshare, int32(e)
		}
	}
	for i := range p.mounts {
		m := &p.mounts[i]
		if m.attr != nil {
			if e := copyMount(m); e != 0 {
				return int32(i), int32(e)
			}
			continue
		}
		if m.dir != nil {
			if _, _, e := unix.RawSyscall(unix.SYS_CHDIR, uintptr(unsafe.Pointer(m.dir)), 0, 0); e != 0 {
				return int32(i), int32(e)
			}
		}
		if e := mountAs(m); e != 0 {
			return int32(i), int32(e)
		}
		if m.uid == 0 {
			continue
		}
		// Who becomes another user is forgotten by its parent's end.
		if e := dieWith(p.parent); e != 0 {
			return atFork, int32(e)
		}
	}
	unix.RawSyscall(unix.SYS_CHDIR, uintptr(unsafe.Pointer(&rootDir)), 0, 0)
	if e := setStdio(p); e != 0 {
		return atStdio, int32(e)
	}
	unix.RawSyscall6(unix.SYS_RT_SIGPROCMASK, unix.SIG_SETMASK, uintptr(unsafe.Pointer(&p.mask)), 0, 8, 0, 0)
	_, _, e := unix.RawSyscall(unix.SYS_EXECVE, uintptr(unsafe.Pointer(p.argv[0])),
		uintptr(unsafe.Pointer(&p.argv[0])), uintptr(unsafe.Pointer(&p.envv[0])))
	return atExec, int32(e)
}

// setStdio is run by both kinds of child.
//
//go:noinline
//go:norace
//go:nosplit
func setStdio(p *forkPlan) unix.Errno {
	for i := range p.stdio {
		if p.stdio[i] >= 0 {
			if _, _, e := unix.RawSyscall(unix.SYS_DUP3, uintptr(p.stdio[i]), uintptr(i), 0); e != 0 {
				return e
			}
		}
	}
	return 0
}

// dieWith is run by child. A runtime dies with its shim: one that hangs would stay
// for ever, and nobody would know whose it is. The threads of a shim end with it
// only.
//
//go:noinline
//go:norace
//go:nosplit
func dieWith(parent int) unix.Errno {
	unix.RawSyscall(unix.SYS_PRCTL, unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0)
	if ppid, _, _ := unix.RawSyscall(unix.SYS_GETPPID, 0, 0, 0); int(ppid) != parent {
		return unix.ECHILD
	}
	return 0
}

// mountAs is run by child. An overlay does what it does to its layers with the
// credentials of who mounted it. On an ID-mapped layer the host's root does not
// exist and can make no file (EOVERFLOW; the kernel would then mount the overlay
// read-only), so it has to be a user who does, but with all of root's
// capabilities, which the kernel is told to leave.
//
//go:noinline
//go:norace
//go:nosplit
func mountAs(m *mountCall) unix.Errno {
	var bits uintptr
	if m.uid != 0 {
		var e unix.Errno
		if bits, _, e = unix.RawSyscall(unix.SYS_PRCTL, unix.PR_GET_SECUREBITS, 0, 0); e != 0 {
			return e
		}
		if _, _, e = unix.RawSyscall(unix.SYS_PRCTL, unix.PR_SET_SECUREBITS, bits|noSetuidFixup, 0); e != 0 {
			return e
		}
		unix.RawSyscall(unix.SYS_SETFSGID, uintptr(m.gid), 0, 0)
		unix.RawSyscall(unix.SYS_SETFSUID, uintptr(m.uid), 0, 0)
	}
	_, _, e := unix.RawSyscall6(unix.SYS_MOUNT, uintptr(unsafe.Pointer(m.source)), uintptr(unsafe.Pointer(m.target)),
		uintptr(unsafe.Pointer(m.fstype)), m.flags, uintptr(unsafe.Pointer(m.data)), 0)
	if m.uid != 0 {
		unix.RawSyscall(unix.SYS_SETFSUID, 0, 0, 0)
		unix.RawSyscall(unix.SYS_SETFSGID, 0, 0, 0)
		if _, _, e2 := unix.RawSyscall(unix.SYS_PRCTL, unix.PR_SET_SECUREBITS, bits, 0); e == 0 {
			e = e2
		}
	}
	return e
}

// noSetuidFixup is SECBIT_NO_SETUID_FIXUP (capabilities(7)).
const noSetuidFixup = 1 << 2

// copyMount is run by child.
//
//go:noinline
//go:norace
//go:nosplit
func copyMount(m *mountCall) unix.Errno {
	cwd := unix.AT_FDCWD
	at, none := uintptr(cwd), uintptr(unsafe.Pointer(&noPath))
	fd, _, e := unix.RawSyscall(unix.SYS_OPEN_TREE, at, uintptr(unsafe.Pointer(m.source)),
		unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_RECURSIVE)
	if e != 0 {
		return e
	}
	_, _, e = unix.RawSyscall6(unix.SYS_MOUNT_SETATTR, fd, none, unix.AT_EMPTY_PATH|unix.AT_RECURSIVE,
		uintptr(unsafe.Pointer(m.attr)), unsafe.Sizeof(unix.MountAttr{}), 0)
	if e != 0 {
		return e
	}
	_, _, e = unix.RawSyscall6(unix.SYS_MOVE_MOUNT, fd, none, at, uintptr(unsafe.Pointer(m.target)), unix.MOVE_MOUNT_F_EMPTY_PATH, 0)
	unix.RawSyscall(unix.SYS_CLOSE, fd, 0, 0)
	return e
}
