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

// mountCall is one mount(2), preceded by a chdir when dir is not nil.
type mountCall struct {
	dir, source, target, fstype, data *byte
	flags                             uintptr
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
// kernel ignores all other flags when it binds.
func mountPlan(mounts []wire.Mount, rootfs, bundle string) ([]mountCall, error) {
	var calls []mountCall
	for i := range mounts {
		m := &mounts[i]
		target := targetOf(m, rootfs, bundle)
		flags, data := mountOptions(m.Options)
		if len(data) >= unix.Getpagesize() {
			return nil, unix.E2BIG
		}
		ptr, err := cstrings(m.Source, target, m.Type, data)
		if err != nil {
			return nil, err
		}
		c := mountCall{source: ptr[0], target: ptr[1], fstype: ptr[2], data: ptr[3], flags: flags}
		if m.Dir != "" {
			if c.dir, err = unix.BytePtrFromString(m.Dir); err != nil {
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
	}
}

// child runs in the forked process and returns only what failed.
//
//go:noinline
//go:norace
//go:nosplit
func child(p *forkPlan) (at, failure int32) {
	unix.RawSyscall(unix.SYS_SETPGID, 0, 0, 0)
	// A runtime dies with its shim: one that hangs would stay for ever, and
	// nobody would know whose it is. The threads of a shim end with it only.
	unix.RawSyscall(unix.SYS_PRCTL, unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0)
	if ppid, _, _ := unix.RawSyscall(unix.SYS_GETPPID, 0, 0, 0); int(ppid) != p.parent {
		return atFork, int32(unix.ECHILD)
	}
	if p.unshare {
		if _, _, e := unix.RawSyscall(unix.SYS_UNSHARE, unix.CLONE_NEWNS, 0, 0); e != 0 {
			return atUnshare, int32(e)
		}
	}
	for i := range p.mounts {
		m := &p.mounts[i]
		if m.dir != nil {
			if _, _, e := unix.RawSyscall(unix.SYS_CHDIR, uintptr(unsafe.Pointer(m.dir)), 0, 0); e != 0 {
				return int32(i), int32(e)
			}
		}
		_, _, e := unix.RawSyscall6(unix.SYS_MOUNT, uintptr(unsafe.Pointer(m.source)), uintptr(unsafe.Pointer(m.target)),
			uintptr(unsafe.Pointer(m.fstype)), m.flags, uintptr(unsafe.Pointer(m.data)), 0)
		if e != 0 {
			return int32(i), int32(e)
		}
	}
	unix.RawSyscall(unix.SYS_CHDIR, uintptr(unsafe.Pointer(&rootDir)), 0, 0)
	for i := range p.stdio {
		if p.stdio[i] >= 0 {
			if _, _, e := unix.RawSyscall(unix.SYS_DUP3, uintptr(p.stdio[i]), uintptr(i), 0); e != 0 {
				return atStdio, int32(e)
			}
		}
	}
	unix.RawSyscall6(unix.SYS_RT_SIGPROCMASK, unix.SIG_SETMASK, uintptr(unsafe.Pointer(&p.mask)), 0, 8, 0, 0)
	_, _, e := unix.RawSyscall(unix.SYS_EXECVE, uintptr(unsafe.Pointer(p.argv[0])),
		uintptr(unsafe.Pointer(&p.argv[0])), uintptr(unsafe.Pointer(&p.envv[0])))
	return atExec, int32(e)
}
