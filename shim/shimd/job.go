package shimd

import (
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berthd/berth/shim/wire"
)

// A job is one run of the OCI runtime.
type job struct {
	s     *shim
	step  string // "runtime start", …
	pid   int
	log   int // its log and, where it has no other, its stderr
	limit *timer
	why   *stepError // set when the shim ended it
	done  func(*stepError)
	hands bool // may leave a child to the shim
}

// killWait is how long a killed process is waited for before the shim gives it
// up: it may be stuck in the kernel.
const killWait = 5 * time.Second

// command returns the runtime's argument list for a verb.
func (s *shim) command(logPath string, verb ...string) []string {
	argv := make([]string, 0, 8+len(s.l.RuntimeArgs)+len(verb))
	argv = append(argv, s.l.Runtime)
	if s.l.RuntimeRoot != "" {
		argv = append(argv, "--root", s.l.RuntimeRoot)
	}
	argv = append(argv, "--log", logPath, "--log-format", "json")
	argv = append(argv, s.l.RuntimeArgs...)
	if s.l.SystemdCgroup {
		argv = append(argv, "--systemd-cgroup")
	}
	return append(argv, verb...)
}

// run starts the runtime, in a process group of its own, and calls done when it
// has ended. Descriptors below 3 in stdio leave the shim's; with no stderr that
// goes to the job's log.
func (s *shim) run(step string, limit time.Duration, hands bool, stdio [3]int, done func(*stepError), verb ...string) (*job, *stepError) {
	log, path, err := memfd("log")
	if err != nil {
		return nil, failErr(step, err)
	}
	if stdio[2] < 0 {
		stdio[2] = log
	}
	files := make([]uintptr, 3)
	for i, fd := range stdio {
		files[i] = uintptr(max(fd, 0))
	}
	pid, err := syscall.ForkExec(s.l.Runtime, s.command(path, verb...), &syscall.ProcAttr{
		Env:   s.env,
		Files: files,
		Sys:   &syscall.SysProcAttr{Setpgid: true},
	})
	if err != nil {
		unix.Close(log)
		return nil, fail(wire.CodeRuntime, step, s.l.Runtime+": "+err.Error())
	}
	j := &job{s: s, step: step, pid: pid, log: log, done: done, hands: hands}
	j.watch(limit)
	return j, nil
}

// watch waits for the job's end, for at most limit when that is not 0.
func (j *job) watch(limit time.Duration) {
	j.s.jobs++
	if j.hands {
		j.s.starts++
	}
	j.s.children[j.pid] = j.ended
	if limit > 0 {
		j.limit = j.s.loop.after(limit, func() { j.stop(wire.CodeTimeout, "took longer than "+limit.String()) })
	}
}

// stop kills a job, with all that it started. It ends with the error given.
func (j *job) stop(code wire.Code, why string) {
	if j.why != nil || j.pid == 0 {
		return
	}
	j.why = fail(code, j.step, why)
	j.s.loop.stop(j.limit)
	killTree(j.pid)
	j.limit = j.s.loop.after(killWait, func() {
		// It cannot be killed. The shim goes on without it.
		delete(j.s.children, j.pid)
		j.why.Message += ", and cannot be killed"
		j.finish(j.why)
	})
}

func (j *job) ended(ws unix.WaitStatus) {
	switch {
	case j.why != nil:
		j.finish(j.why)
	case ws.Exited() && ws.ExitStatus() == 0:
		j.finish(nil)
	default:
		text := j.message()
		if text == "" {
			text = "ended with " + statusText(ws)
		}
		j.finish(fail(wire.CodeRuntime, j.step, text))
	}
}

func (j *job) message() string {
	var st unix.Stat_t
	if unix.Fstat(j.log, &st) != nil {
		return ""
	}
	b, err := readAt(j.log, max(0, st.Size-4*maxMessage), 4*maxMessage)
	if err != nil {
		return ""
	}
	return runtimeMessage(b)
}

func (j *job) finish(e *stepError) {
	j.pid = 0
	j.s.loop.stop(j.limit)
	unix.Close(j.log)
	done := j.done
	j.s.jobs--
	if j.hands {
		j.s.starts--
	}
	done(e)
	j.s.endIfOver()
}

func statusText(ws unix.WaitStatus) string {
	if ws.Signaled() {
		return "signal " + itoa(int(ws.Signal()))
	}
	return "status " + itoa(ws.ExitStatus())
}

// exitCode is what a shell would call the status.
func exitCode(ws unix.WaitStatus) int {
	if ws.Signaled() {
		return 128 + int(ws.Signal())
	}
	return ws.ExitStatus()
}

// reap collects children: those that somebody waits for first, then strangers,
// which become the shim's when their parents end. A runtime leaves such a child
// when it starts a process for an exec or the init; its number is not known
// before the runtime has ended and its pid file is read. Therefore strangers are
// left as zombies while a runtime of that kind is running. (The kernel may show
// the orphan before it shows the end of its parent, so the order of two zombies
// proves nothing.)
func (s *shim) reap() {
	for again := true; again; {
		again = s.reapKnown()
	}
	for s.starts == 0 && !s.loop.done {
		var ws unix.WaitStatus
		pid, err := unix.Wait4(-1, &ws, unix.WNOHANG, nil)
		if err == unix.EINTR {
			continue
		}
		if pid <= 0 {
			return
		}
		s.reaped(pid, ws)
	}
}

// reapKnown returns whether it found one. What is called may add children.
func (s *shim) reapKnown() bool {
	for pid := range s.children {
		var ws unix.WaitStatus
		got, err := unix.Wait4(pid, &ws, unix.WNOHANG, nil)
		if got == pid && err == nil {
			s.reaped(pid, ws)
			return true
		}
	}
	return false
}

func (s *shim) reaped(pid int, ws unix.WaitStatus) {
	if fn := s.children[pid]; fn != nil {
		delete(s.children, pid)
		fn(ws)
	}
}

// adopt waits for a process that a runtime left. It returns false when it is
// not the shim's child.
func (s *shim) adopt(pid int, fn func(unix.WaitStatus)) bool {
	var info unix.Siginfo
	err := unix.Waitid(unix.P_PID, pid, &info, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT, nil)
	if err != nil && err != unix.EINTR {
		return false
	}
	s.children[pid] = fn
	return true
}
