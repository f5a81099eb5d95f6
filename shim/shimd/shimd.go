// Package shimd is the shim: the process that stays with one container. Package
// shim describes its life and speaks to it.
//
// Nouns: the loop waits for everything, on one goroutine; a job is a run of the
// OCI runtime; a stream is an output of the container, with the log as its
// first reader; an exec is one process run inside the container for a client.
//
// It is written for size, as there is one of it for each container on a node:
// raw system calls, no package os, net, fmt or encoding/json, one thread for
// the loop, no thread for signals, buffers that are given back. A collection of
// garbage is asked for after a number of execs, and never runs on a timer.
//
// Caveat: nothing here may block, except on the file system that holds the log.
package shimd

import (
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/berthd/berth/shim/crilog"
	"github.com/berthd/berth/shim/wire"
)

// launchFD is the descriptor of the connection that a shim is started with.
const launchFD = 3

// harmless are the signals that would end a process and shall not end a shim.
var harmless = [...]unix.Signal{unix.SIGTERM, unix.SIGINT, unix.SIGHUP, unix.SIGQUIT, unix.SIGUSR1, unix.SIGUSR2, unix.SIGPIPE, unix.SIGALRM}

// A shim is the whole state of the process.
type shim struct {
	loop *loop
	pid  int
	env  []*byte // for the runtime
	cmd  command // what is being started
	l    wire.Launch
	b    wire.Builder // for short answers

	listener int // -1 before Launch
	conns    []*conn

	status   string // wire.Status…; "" before Launch
	create   *create
	starting bool
	init     int // process ID, 0 before it is created
	initFD   int // pidfd of it, -1 for none
	exit     wire.Exit
	told     bool // clients were told of the exit
	recorded bool // exit record written
	ending   bool // the runtime's delete was begun
	shutdown []pending

	children []expected
	jobs     []*job // running
	starts   int    // of these, the ones that may leave a child to the shim

	bundle   int // descriptor of the bundle directory
	stdin    input
	streams  [2]*stream // stdout, stderr; nil when the container has none
	attached []*attachment
	log      *logFile
	oom      oomWatch
	filter   filter
	noNative bool // the kernel lacks something that native starts need, or they fail
	failures int  // of native starts, in a row
	execs    []*exec
	spare    []*exec // to be used again
	execSeq  int
	garbage  int // bytes, about, since the last collection
}

// pending is a call that is to be answered later.
type pending struct {
	c    *conn
	call uint32
}

// Main runs the shim until its container has ended, and does not return.
func Main() {
	s := &shim{pid: unix.Getpid(), listener: -1, initFD: -1, bundle: -1}
	s.stdin.fd, s.filter.fd = -1, -1
	if err := s.setup(); err != nil {
		syscall.Exit(1)
	}
	s.loop.run()
	syscall.Exit(0)
}

func (s *shim) setup() (err error) {
	if runtime.GOMAXPROCS(0) != 1 {
		runtime.GOMAXPROCS(1)
	}
	closeStrays()
	// It is called by the number of the descriptor that it was started from.
	name := [...]byte{'b', 'e', 'r', 't', 'h', '-', 's', 'h', 'i', 'm', 0}
	unix.Prctl(unix.PR_SET_NAME, uintptr(unsafe.Pointer(&name)), 0, 0, 0)
	s.noNative = !onReadOnlyMount("/proc/self/exe")
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return err
	}
	unix.Chdir("/")
	if path, ok := syscall.Getenv("PATH"); ok {
		if s.env, err = cstrings("PATH=" + path); err != nil {
			return err
		}
	}
	s.env = append(s.env, nil)
	if err := mapBuffers(); err != nil {
		return err
	}
	if err := mapReports(); err != nil {
		return err
	}
	if s.loop, err = newLoop(); err != nil {
		return err
	}
	s.loop.idle = s.giveBack
	wake, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return err
	}
	if err := watchSignals(wake); err != nil {
		return err
	}
	err = s.loop.add(wake, unix.EPOLLIN, func(uint32) {
		var n [8]byte
		unix.Read(wake, n[:])
		s.reap()
	})
	if err != nil {
		return err
	}
	if err := unix.SetNonblock(launchFD, true); err != nil {
		return err
	}
	return s.accepted(launchFD)
}

// onReadOnlyMount tells whether the file cannot be written to through the mount
// that it is reached by.
func onReadOnlyMount(file string) bool {
	var st unix.Statfs_t
	return unix.Statfs(file, &st) == nil && st.Flags&unix.ST_RDONLY != 0
}

// closeStrays closes what berthd's process may have leaked, so that the shim
// does not hold it and no container gets it. With containermaxprocs=0 the Go
// runtime has opened nothing by now; else its files are only kept from execve.
func closeStrays() {
	first, flags := uint(launchFD+1), uint(0)
	if env, _ := syscall.Getenv("GODEBUG"); !strings.Contains(env, "containermaxprocs=0") {
		flags = unix.CLOSE_RANGE_CLOEXEC
	}
	if unix.CloseRange(first, ^uint(0)>>32, flags) != nil { // before Linux 5.9
		for fd := launchFD + 1; fd < 1024; fd++ {
			unix.CloseOnExec(fd)
		}
	}
	unix.CloseOnExec(launchFD)
}

// giveBack is called when nothing has happened for a while.
func (s *shim) giveBack() {
	giveBack()
	for _, st := range s.streams {
		if st != nil {
			st.framer.Shrink()
		}
	}
}

// stepError is an answer that is an error. It is not a Go error: nil is none.
type stepError = wire.Error

func fail(code wire.Code, step, message string) *stepError {
	return &stepError{Code: code, Step: step, Message: message}
}

func failErr(step string, err error) *stepError {
	return fail(wire.CodeInternal, step, err.Error())
}

// Limits of a Launch.
const (
	minLogLine     = 64
	maxLogLine     = 64 << 10
	defaultDrain   = 2 * time.Second
	maxDrain       = time.Minute
	defaultCreate  = 2 * time.Minute
	maxCreate      = time.Hour
	maxIDLen       = 128
	maxSocketEntry = 80 // bytes of the socket's file name
)

// check fills in what was left out and refuses what is out of bounds.
func check(l *wire.Launch) *stepError {
	bad := func(field, why string) *stepError { return fail(wire.CodeInvalid, field, why) }
	if l.ID == "" || len(l.ID) > maxIDLen {
		return bad("ID", "is "+strconv.Itoa(len(l.ID))+" bytes, limit 1 to "+strconv.Itoa(maxIDLen))
	}
	paths := [...]struct{ name, path string }{
		{"Bundle", l.Bundle}, {"Runtime", l.Runtime}, {"Socket", l.Socket}, {"ExitFile", l.ExitFile},
	}
	for _, p := range paths {
		if p.path == "" || p.path[0] != '/' || len(p.path) >= unix.PathMax {
			return bad(p.name, "is not an absolute path: "+clip(p.path))
		}
	}
	for i := range l.Mounts {
		m := &l.Mounts[i]
		if m.Target == "" && (l.Rootfs == "" || l.Rootfs[0] != '/') {
			return bad("Rootfs", "is not an absolute path: "+clip(l.Rootfs))
		}
		if m.Target != "" && !local(m.Target) {
			return bad("Mounts", "target is not a local path: "+clip(m.Target))
		}
		if m.IDMap != "" && (m.IDMap[0] != '/' || l.UserNS == "") {
			return bad("Mounts", "IDMap is not an absolute path, or without UserNS: "+clip(m.IDMap))
		}
	}
	if l.MaxLogLine == 0 {
		l.MaxLogLine = crilog.MaxLine
	}
	if l.MaxLogLine < minLogLine || l.MaxLogLine > maxLogLine {
		return bad("MaxLogLine", "is "+strconv.Itoa(l.MaxLogLine)+", limit "+strconv.Itoa(minLogLine)+" to "+strconv.Itoa(maxLogLine))
	}
	if l.DrainTimeout == 0 {
		l.DrainTimeout = defaultDrain
	}
	if l.DrainTimeout < 0 || l.DrainTimeout > maxDrain {
		return bad("DrainTimeout", "is not within 0 and 1 min")
	}
	if l.CreateTimeout == 0 {
		l.CreateTimeout = defaultCreate
	}
	if l.CreateTimeout < 0 || l.CreateTimeout > maxCreate {
		return bad("CreateTimeout", "is not within 0 and 1 h")
	}
	if l.OOMScoreAdj != nil && (*l.OOMScoreAdj < -1000 || *l.OOMScoreAdj > 1000) {
		return bad("OOMScoreAdj", "is "+strconv.Itoa(*l.OOMScoreAdj)+", limit -1000 to 1000")
	}
	return nil
}
