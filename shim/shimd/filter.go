package shimd

import (
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A filter is the container's seccomp filter, as the runtime made and loaded it.
// That is taken down rather than made again: what a profile becomes depends on
// the runtime's library and its version, and a process that is started here must
// not have more than the container.
//
// The init is traced from before its start to its execve, where it stops for the
// moment that it takes to read the filter. Nothing of the image has run by then.
type filter struct {
	fd     int // memory file, -1 for none
	count  int // instructions
	flags  uint64
	traced int  // process, 0 for none
	drop   bool // at its next stop, with nothing read
}

func ptrace(request, pid int, addr, data uintptr) (int, unix.Errno) {
	n, _, e := unix.RawSyscall6(unix.SYS_PTRACE, uintptr(request), uintptr(pid), addr, data, 0, 0)
	return int(n), e
}

// watchFilter begins to trace the init, if that is wanted. The kernel takes
// requests from the thread that traces only.
func (s *shim) watchFilter() {
	f := &s.filter
	if !s.l.KeepFilter || f.traced != 0 || f.fd >= 0 {
		return
	}
	runtime.LockOSThread()
	if _, e := ptrace(unix.PTRACE_SEIZE, s.init, 0, unix.PTRACE_O_TRACEEXEC); e != 0 {
		runtime.UnlockOSThread()
		return
	}
	f.traced = s.init
}

// stopped is called when a traced process has stopped.
func (s *shim) stopped(pid int, ws unix.WaitStatus) {
	f := &s.filter
	switch {
	case pid != f.traced:
	case ws.StopSignal() == unix.SIGTRAP && ws.TrapCause() == unix.PTRACE_EVENT_EXEC:
		f.read()
		ptrace(unix.PTRACE_DETACH, pid, 0, 0)
		f.untrace()
	case f.drop:
		ptrace(unix.PTRACE_DETACH, pid, 0, 0)
		f.untrace()
	case int(ws)>>16 == unix.PTRACE_EVENT_STOP && ws.StopSignal() != unix.SIGTRAP:
		ptrace(unix.PTRACE_LISTEN, pid, 0, 0) // the whole group stays stopped
	case int(ws)>>16 == unix.PTRACE_EVENT_STOP:
		ptrace(unix.PTRACE_CONT, pid, 0, 0) // it was continued
	default:
		ptrace(unix.PTRACE_CONT, pid, 0, uintptr(ws.StopSignal()))
	}
}

// unwatch ends the tracing of an init that was not started. That takes a stop.
func (f *filter) unwatch() {
	if f.traced != 0 {
		f.drop = true
		ptrace(unix.PTRACE_INTERRUPT, f.traced, 0, 0)
	}
}

func (f *filter) untrace() {
	if f.traced != 0 {
		f.traced, f.drop = 0, false
		runtime.UnlockOSThread()
	}
}

func (s *shim) dropFilter() {
	if s.filter.fd >= 0 {
		unix.Close(s.filter.fd)
		s.filter.fd = -1
	}
}

// read keeps the filter if there is exactly one: more would be of somebody who
// filters the shim, too, and no process of the runtime's would differ.
func (f *filter) read() {
	count, e := ptrace(unix.PTRACE_SECCOMP_GET_FILTER, f.traced, 0, 0)
	if e != 0 || count < 1 || count > unix.BPF_MAXINSNS {
		return
	}
	if _, e := ptrace(unix.PTRACE_SECCOMP_GET_FILTER, f.traced, 1, 0); e != unix.ENOENT {
		return
	}
	var meta struct{ off, flags uint64 }
	if _, e := ptrace(unix.PTRACE_SECCOMP_GET_METADATA, f.traced, unsafe.Sizeof(meta), uintptr(unsafe.Pointer(&meta))); e != 0 {
		return
	}
	size := count * int(unsafe.Sizeof(unix.SockFilter{}))
	fd, err := unix.MemfdCreate("filter", unix.MFD_CLOEXEC)
	if err != nil {
		return
	}
	if unix.Ftruncate(fd, int64(size)) != nil || !f.into(fd, size) {
		unix.Close(fd)
		return
	}
	f.fd, f.count, f.flags = fd, count, meta.flags&unix.SECCOMP_FILTER_FLAG_LOG
}

func (f *filter) into(fd, size int) bool {
	b, err := unix.Mmap(fd, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return false
	}
	_, e := ptrace(unix.PTRACE_SECCOMP_GET_FILTER, f.traced, 0, uintptr(unsafe.Pointer(&b[0])))
	unix.Munmap(b)
	return e == 0
}
