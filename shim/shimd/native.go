package shimd

import (
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/berthd/berth/shim/wire"
)

// A process is started in the container without the OCI runtime by two forks:
//
//	shim ── fork ──> joiner: cgroups, descriptors, setns(pidfd of the init)
//	                   └─ clone(CLONE_PARENT, CLONE_VFORK) ──> process: session,
//	                      limits, user, capabilities, seccomp, execve
//
// The second fork is needed as a PID namespace is entered by children only. With
// CLONE_PARENT the process is the shim's child at once; with CLONE_VFORK
// the joiner waits until execve has succeeded or failed, and its own end then
// tells which. What fails is reported as in any fork, and the runtime is asked
// instead: it is the one whose errors a user gets to see.
//
// While the two are on their way they run the shim's program among
// the container's processes (CVE-2019-5736, CVE-2024-21626). They are not
// dumpable, which keeps those from looking into /proc/<pid> unless they may trace
// the whole host, and have closed every descriptor but their stdio and the pidfd,
// which setns has used, before a path of the container is resolved.

// A nativeStart is what the children need; the words are of a wire.ExecImage.
type nativeStart struct {
	image  []byte // mapped, private
	filter []byte // mapped; nil for none
	words  *[wire.ImageWords]uint64
	init   int // pidfd
	prog   unix.SockFprog
}

// Where a native start can fail, besides those of every fork.
const (
	atAffinity int32 = -10 - iota
	atDumpable
	atOOMScore
	atCgroup
	atClose
	atSetns
	atClone
	atSession
	atKeyring
	atRlimit
	atNoNewPrivs
	atSeccomp
	atChdir
	atBounding
	atKeepCaps
	atStdioOwner
	atUser
	atOutside
	atCapabilities

	inSecond int32 = 1 // nothing failed, and this is the second child
)

// namespaces are those of the init that a process enters. A user namespace is
// for the runtime.
const namespaces = unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWNET | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS | unix.CLONE_NEWCGROUP

// mapNative maps an image and, if that wants it, the filter. The file is not
// changed by what happens in the mapping.
func (s *shim) mapNative(file int) (*nativeStart, error) {
	var st unix.Stat_t
	if err := unix.Fstat(file, &st); err != nil {
		return nil, err
	}
	n := &nativeStart{init: s.initFD}
	var err error
	if st.Size < wire.ImageWords*8 || st.Size > wire.MaxImage {
		return nil, wire.ErrFrame
	}
	size := int(st.Size)
	if n.image, err = unix.Mmap(file, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE); err != nil {
		return nil, err
	}
	at := unsafe.Pointer(&n.image[0])
	n.words = (*[wire.ImageWords]uint64)(at)
	err = wire.Relocate(unsafe.Slice((*uint64)(at), size/8), size, uintptr(at))
	if err == nil && n.image[size-1] != 0 {
		err = wire.ErrFrame
	}
	if err == nil && n.words[wire.WordFlags]&wire.ImageSeccomp != 0 {
		err = n.mapFilter(s.filter)
	}
	if err != nil {
		n.unmap()
		return nil, err
	}
	return n, nil
}

func (n *nativeStart) mapFilter(f filter) (err error) {
	if f.fd < 0 {
		return unix.ENOENT
	}
	size := f.count * int(unsafe.Sizeof(unix.SockFilter{}))
	if n.filter, err = unix.Mmap(f.fd, 0, size, unix.PROT_READ, unix.MAP_SHARED); err != nil {
		return err
	}
	n.prog = unix.SockFprog{Len: uint16(f.count), Filter: (*unix.SockFilter)(unsafe.Pointer(&n.filter[0]))}
	n.words[wire.WordSeccompFlags] |= f.flags
	return nil
}

func (n *nativeStart) unmap() {
	if n.filter != nil {
		unix.Munmap(n.filter)
	}
	unix.Munmap(n.image)
}

// What the children write to, which they have a copy of each.
var (
	childStat    unix.Stat_t
	childPath    [unix.PathMax]byte
	childCPUs    [1024 / 8]byte
	childCaps    [2]unix.CapUserData
	childAction  [4]uint64 // SIG_DFL
	childCapHead = unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
)

var (
	oomPath = [...]byte{'/', 'p', 'r', 'o', 'c', '/', 's', 'e', 'l', 'f', '/', 'o', 'o', 'm', '_', 's', 'c', 'o', 'r', 'e', '_', 'a', 'd', 'j', 0}
	zero    = [1]byte{'0'}
)

// pidFDAt is where the joiner has the init's pidfd.
const pidFDAt = 3

// join runs in the first child. It returns what failed, or inSecond in the second
// child.
//
//go:noinline
//go:norace
//go:nosplit
func join(p *forkPlan) (at, failure int32) {
	n := p.native
	if _, _, e := unix.RawSyscall6(unix.SYS_PRCTL, unix.PR_SET_DUMPABLE, 0, 0, 0, 0, 0); e != 0 {
		return atDumpable, int32(e)
	}
	anyCPU()
	if at, failure = joinFiles(n); failure != 0 {
		return at, failure
	}
	if e := setStdio(p); e != 0 {
		return atStdio, int32(e)
	}
	if n.init != pidFDAt {
		if _, _, e := unix.RawSyscall(unix.SYS_DUP3, uintptr(n.init), pidFDAt, 0); e != 0 {
			return atStdio, int32(e)
		}
	}
	if _, _, e := unix.RawSyscall(unix.SYS_CLOSE_RANGE, pidFDAt+1, ^uintptr(0)>>32, 0); e != 0 {
		return atClose, int32(e)
	}
	if n.words[wire.WordFlags]&wire.ImageUmask != 0 {
		unix.RawSyscall(unix.SYS_UMASK, uintptr(n.words[wire.WordUmask]), 0, 0)
	}
	if _, _, e := unix.RawSyscall(unix.SYS_SETNS, pidFDAt, namespaces, 0); e != 0 {
		return atSetns, int32(e)
	}
	unix.RawSyscall(unix.SYS_CLOSE, pidFDAt, 0, 0)
	pid, _, e := unix.RawSyscall6(unix.SYS_CLONE, unix.CLONE_PARENT|unix.CLONE_VFORK|unix.CLONE_PARENT_SETTID|uintptr(unix.SIGCHLD),
		0, uintptr(unsafe.Pointer(&p.report.pid)), 0, 0, 0)
	if e != 0 {
		return atClone, int32(e)
	}
	if pid == 0 {
		return inSecond, 0
	}
	status := uintptr(0)
	if p.report.errno != 0 {
		status = failed
	}
	for {
		unix.RawSyscall(unix.SYS_EXIT_GROUP, status, 0, 0)
	}
}

// anyCPU takes back what the shim may have inherited: a container is held to its
// CPUs by its cgroup. Machines of more CPUs than the mask has keep it.
//
//go:noinline
//go:norace
//go:nosplit
func anyCPU() {
	mask := uintptr(unsafe.Pointer(&childCPUs))
	if _, _, e := unix.RawSyscall(unix.SYS_SCHED_GETAFFINITY, 0, unsafe.Sizeof(childCPUs), mask); e != 0 {
		return
	}
	for i := range childCPUs {
		childCPUs[i] = 0xff
	}
	unix.RawSyscall(unix.SYS_SCHED_SETAFFINITY, 0, unsafe.Sizeof(childCPUs), mask)
}

// joinFiles does what is done by writing to files of the host.
//
//go:noinline
//go:norace
//go:nosplit
func joinFiles(n *nativeStart) (at, failure int32) {
	if text := uintptr(n.words[wire.WordOOM]); text != 0 {
		length := uintptr(0)
		for *(*byte)(n.at(text + length)) != 0 {
			length++
		}
		if e := childWrite(uintptr(unsafe.Pointer(&oomPath)), text, length); e != 0 {
			return atOOMScore, int32(e)
		}
	}
	for p := uintptr(n.words[wire.WordCgroups]); ; p += 8 {
		path := uintptr(*(*uint64)(n.at(p)))
		if path == 0 {
			return 0, 0
		}
		if e := childWrite(path, uintptr(unsafe.Pointer(&zero)), 1); e != 0 {
			return atCgroup, int32(e)
		}
	}
}

// at is the address p, which is one in the image.
//
//go:nosplit
func (n *nativeStart) at(p uintptr) unsafe.Pointer {
	base := unsafe.Pointer(n.words)
	return unsafe.Add(base, p-uintptr(base))
}

//go:noinline
//go:norace
//go:nosplit
func childWrite(path, text, length uintptr) unix.Errno {
	at := unix.AT_FDCWD
	fd, _, e := unix.RawSyscall6(unix.SYS_OPENAT, uintptr(at), path, unix.O_WRONLY|unix.O_CLOEXEC, 0, 0, 0)
	if e != 0 {
		return e
	}
	_, _, e = unix.RawSyscall(unix.SYS_WRITE, fd, text, length)
	unix.RawSyscall(unix.SYS_CLOSE, fd, 0, 0)
	return e
}

// become runs in the second child, in the container's namespaces. It returns only
// what failed. The order is the runtime's: what needs privileges before the
// user is set, the filter as late as they allow.
//
//go:noinline
//go:norace
//go:nosplit
func become(p *forkPlan) (at, failure int32) {
	n := p.native
	flags := n.words[wire.WordFlags]
	// A handler of the Go runtime, or one of the shim's that does nothing, must not
	// get a signal that is meant for the command.
	for sig := uintptr(1); sig <= 64; sig++ {
		unix.RawSyscall6(unix.SYS_RT_SIGACTION, sig, uintptr(unsafe.Pointer(&childAction)), 0, 8, 0, 0)
	}
	if at, failure = settle1(n, flags); failure != 0 {
		return at, failure
	}
	again := false // once the user is set, who may be allowed what root is not
	if e := chdir(n); e == unix.EACCES || e == unix.EPERM {
		again = true
	} else if e != 0 {
		return atChdir, int32(e)
	}
	if at, failure = setUser(n); failure != 0 {
		return at, failure
	}
	if again {
		if e := chdir(n); e != 0 {
			return atChdir, int32(e)
		}
	}
	if at, failure = setCapabilities(n); failure != 0 {
		return at, failure
	}
	unix.RawSyscall6(unix.SYS_RT_SIGPROCMASK, unix.SIG_SETMASK, uintptr(unsafe.Pointer(&p.mask)), 0, 8, 0, 0)
	if flags&wire.ImageSeccomp != 0 && flags&wire.ImageNoNewPrivs != 0 {
		if e := n.load(); e != 0 {
			return atSeccomp, int32(e)
		}
	}
	return atExec, execute(n)
}

// settle1 does what comes before anything of the container's is looked at.
//
//go:noinline
//go:norace
//go:nosplit
func settle1(n *nativeStart, flags uint64) (at, failure int32) {
	if _, _, e := unix.RawSyscall(unix.SYS_SETSID, 0, 0, 0); e != 0 {
		return atSession, int32(e)
	}
	if ring := uintptr(n.words[wire.WordKeyring]); ring != 0 {
		_, _, e := unix.RawSyscall6(unix.SYS_KEYCTL, unix.KEYCTL_JOIN_SESSION_KEYRING, ring, 0, 0, 0, 0)
		if e != 0 && e != unix.ENOSYS {
			return atKeyring, int32(e)
		}
	}
	limit := uintptr(n.words[wire.WordRlimits])
	for i := uint64(0); i < n.words[wire.WordRlimitCount]; i++ {
		_, _, e := unix.RawSyscall6(unix.SYS_PRLIMIT64, 0, uintptr(*(*uint64)(n.at(limit))), limit+8, 0, 0, 0)
		if e != 0 {
			return atRlimit, int32(e)
		}
		limit += 24
	}
	if flags&wire.ImageNoNewPrivs != 0 {
		if _, _, e := unix.RawSyscall6(unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0, 0); e != 0 {
			return atNoNewPrivs, int32(e)
		}
	} else if flags&wire.ImageSeccomp != 0 {
		// Without no_new_privs it takes CAP_SYS_ADMIN.
		if e := n.load(); e != 0 {
			return atSeccomp, int32(e)
		}
	}
	return 0, 0
}

//go:noinline
//go:norace
//go:nosplit
func (n *nativeStart) load() unix.Errno {
	_, _, e := unix.RawSyscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, uintptr(n.words[wire.WordSeccompFlags]), uintptr(unsafe.Pointer(&n.prog)))
	return e
}

//go:noinline
//go:norace
//go:nosplit
func chdir(n *nativeStart) unix.Errno {
	_, _, e := unix.RawSyscall(unix.SYS_CHDIR, uintptr(n.words[wire.WordDir]), 0, 0)
	return e
}

// setUser takes the bounding set down while it may, hands stdio to the user, and
// becomes that.
//
//go:noinline
//go:norace
//go:nosplit
func setUser(n *nativeStart) (at, failure int32) {
	for c := uint64(0); c < 64; c++ {
		if n.words[wire.WordBounding]&(1<<c) != 0 {
			continue
		}
		_, _, e := unix.RawSyscall6(unix.SYS_PRCTL, unix.PR_CAPBSET_DROP, uintptr(c), 0, 0, 0, 0)
		if e == unix.EINVAL {
			break // above the kernel's last one
		}
		if e != 0 {
			return atBounding, int32(e)
		}
	}
	if _, _, e := unix.RawSyscall6(unix.SYS_PRCTL, unix.PR_SET_KEEPCAPS, 1, 0, 0, 0, 0); e != 0 {
		return atKeepCaps, int32(e)
	}
	uid := uintptr(n.words[wire.WordUID])
	for fd := uintptr(0); fd < 3; fd++ {
		if e := own(fd, uid); e != 0 {
			return atStdioOwner, int32(e)
		}
	}
	if _, _, e := unix.RawSyscall(unix.SYS_SETGROUPS, uintptr(n.words[wire.WordGroupCount]), uintptr(n.words[wire.WordGroups]), 0); e != 0 {
		return atUser, int32(e)
	}
	if _, _, e := unix.RawSyscall(unix.SYS_SETGID, uintptr(n.words[wire.WordGID]), 0, 0); e != 0 {
		return atUser, int32(e)
	}
	if _, _, e := unix.RawSyscall(unix.SYS_SETUID, uid, 0, 0); e != 0 {
		return atUser, int32(e)
	}
	return 0, 0
}

// own makes uid the owner of a descriptor, so that the process can open it again
// by its name in /proc, but for /dev/null and where the file system refuses.
//
//go:noinline
//go:norace
//go:nosplit
func own(fd, uid uintptr) unix.Errno {
	if _, _, e := unix.RawSyscall(unix.SYS_FSTAT, fd, uintptr(unsafe.Pointer(&childStat)), 0); e != 0 {
		return e
	}
	const null = 1<<8 | 3
	if uintptr(childStat.Uid) == uid || childStat.Mode&unix.S_IFMT == unix.S_IFCHR && childStat.Rdev == null {
		return 0
	}
	_, _, e := unix.RawSyscall(unix.SYS_FCHOWN, fd, uid, ^uintptr(0))
	if e == unix.EPERM || e == unix.EROFS {
		return 0
	}
	return e
}

// setCapabilities also looks where the process is: a working directory outside
// of the container's root has no path (CVE-2024-21626).
//
//go:noinline
//go:norace
//go:nosplit
func setCapabilities(n *nativeStart) (at, failure int32) {
	_, _, e := unix.RawSyscall(unix.SYS_GETCWD, uintptr(unsafe.Pointer(&childPath)), unsafe.Sizeof(childPath), 0)
	if e != 0 {
		return atOutside, int32(e)
	}
	if childPath[0] != '/' {
		return atOutside, int32(unix.ENOENT)
	}
	unix.RawSyscall6(unix.SYS_PRCTL, unix.PR_SET_KEEPCAPS, 0, 0, 0, 0, 0)
	eff, perm, inh := n.words[wire.WordEffective], n.words[wire.WordPermitted], n.words[wire.WordInheritable]
	childCaps[0].Effective, childCaps[1].Effective = uint32(eff), uint32(eff>>32)
	childCaps[0].Permitted, childCaps[1].Permitted = uint32(perm), uint32(perm>>32)
	childCaps[0].Inheritable, childCaps[1].Inheritable = uint32(inh), uint32(inh>>32)
	_, _, e = unix.RawSyscall(unix.SYS_CAPSET, uintptr(unsafe.Pointer(&childCapHead)), uintptr(unsafe.Pointer(&childCaps)), 0)
	if e != 0 {
		return atCapabilities, int32(e)
	}
	_, _, e = unix.RawSyscall6(unix.SYS_PRCTL, unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0, 0)
	if e != 0 {
		return atCapabilities, int32(e)
	}
	for c := uint64(0); c < 64; c++ {
		if n.words[wire.WordAmbient]&(1<<c) != 0 {
			_, _, e = unix.RawSyscall6(unix.SYS_PRCTL, unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_RAISE, uintptr(c), 0, 0, 0)
			if e != 0 {
				return atCapabilities, int32(e)
			}
		}
	}
	return 0, 0
}

// execute tries one file after the other.
//
//go:noinline
//go:norace
//go:nosplit
func execute(n *nativeStart) (failure int32) {
	for p := uintptr(n.words[wire.WordFiles]); ; p += 8 {
		path := uintptr(*(*uint64)(n.at(p)))
		if path == 0 {
			return failure
		}
		_, _, e := unix.RawSyscall(unix.SYS_EXECVE, path, uintptr(n.words[wire.WordArgs]), uintptr(n.words[wire.WordEnv]))
		failure = int32(e)
		if e != unix.ENOENT && e != unix.ENOTDIR && e != unix.EACCES {
			return failure
		}
		if e == unix.ENOENT {
			// It is there, but its interpreter is not.
			at := unix.AT_FDCWD
			if _, _, e := unix.RawSyscall6(unix.SYS_FACCESSAT, uintptr(at), path, unix.F_OK, 0, 0, 0); e == 0 {
				return failure
			}
		}
	}
}
