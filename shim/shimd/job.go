package shimd

import (
	"time"

	"golang.org/x/sys/unix"

	"github.com/berthd/berth/shim/wire"
)

// A job is one run of the OCI runtime. It may be used again after its end.
type job struct {
	s     *shim
	step  string // "runtime start", …
	pid   int    // 0 when it is not running
	log   int    // its log and, where it has no other, its stderr
	limit timer
	why   *stepError // set when the shim ended it
	slot  int        // of its report
	hands bool       // may leave a child to the shim
	done  func(*stepError)
	ended func(unix.WaitStatus)
}

// killWait is how long a killed process is waited for before the shim gives it
// up: it may be stuck in the kernel.
const killWait = 5 * time.Second

// newJob returns a job that calls done when the runtime has ended.
func (s *shim) newJob(step string, done func(*stepError)) *job {
	j := &job{s: s, step: step, done: done}
	j.limit.fire = j.expire
	j.ended = j.reaped
	return j
}

// begin starts a command for the runtime in s.cmd, with its global options. The
// verb is for the caller to add, before it calls run.
func (j *job) begin() *stepError {
	fd, err := unix.MemfdCreate("log", unix.MFD_CLOEXEC)
	if err == nil {
		_, err = unix.FcntlInt(uintptr(fd), unix.F_SETFL, unix.O_APPEND)
	}
	if err != nil {
		unix.Close(fd)
		return failErr(j.step, err)
	}
	j.log = fd
	l, c := &j.s.l, &j.s.cmd
	c.reset()
	c.add(l.Runtime)
	if l.RuntimeRoot != "" {
		c.add("--root", l.RuntimeRoot)
	}
	c.add("--log")
	c.begin().fd(fd).end()
	c.add("--log-format", "json")
	c.add(l.RuntimeArgs...)
	if l.SystemdCgroup {
		c.add("--systemd-cgroup")
	}
	return nil
}

// run starts the command, for at most limit when that is not 0. What the plan
// says of stdio counts; with no stderr that goes to the job's log.
func (j *job) run(p *forkPlan, limit time.Duration) *stepError {
	if p.stdio[2] < 0 {
		p.stdio[2] = j.log
	}
	p.argv, p.envv = j.s.cmd.pointers(), j.s.env
	return j.fork(p, limit)
}

func (j *job) fork(p *forkPlan, limit time.Duration) *stepError {
	s := j.s
	j.slot = s.freeSlot()
	if j.slot < 0 {
		unix.Close(j.log)
		return fail(wire.CodeBusy, j.step, "too many at once")
	}
	reports[j.slot] = report{}
	p.parent, p.report = s.pid, &reports[j.slot]
	pid, errno := fork(p)
	if errno != 0 {
		unix.Close(j.log)
		return failErr(j.step, errno)
	}
	j.pid, j.why = int(pid), nil
	s.jobs = append(s.jobs, j)
	if j.hands {
		s.starts++
	}
	s.expect(j.pid, j.ended)
	if limit > 0 {
		s.loop.arm(&j.limit, limit)
	}
	return nil
}

// verb runs the runtime with these arguments and no stdio.
func (s *shim) verb(step string, limit time.Duration, done func(*stepError), args ...string) *stepError {
	j := s.newJob(step, done)
	if e := j.begin(); e != nil {
		return e
	}
	s.cmd.add(args...)
	return j.run(&forkPlan{stdio: [3]int{-1, -1, -1}}, limit)
}

// freeSlot returns a report that no running job uses, or -1.
func (s *shim) freeSlot() int {
next:
	for i := range reports {
		for _, j := range s.jobs {
			if j.slot == i {
				continue next
			}
		}
		return i
	}
	return -1
}

func (j *job) expire() {
	if j.why == nil {
		j.stop(wire.CodeTimeout, "took too long")
		return
	}
	// It cannot be killed. The shim goes on without it.
	j.s.unexpect(j.pid)
	j.why.Message += ", and cannot be killed"
	j.finish(j.why)
}

// stop kills a job, with all that it started. It ends with the error given.
func (j *job) stop(code wire.Code, why string) {
	if j.why != nil || j.pid == 0 {
		return
	}
	j.why = fail(code, j.step, why)
	j.kill()
	j.s.loop.arm(&j.limit, killWait)
}

// kill kills a running job and what it may have left to the shim already.
func (j *job) kill() {
	killTree(j.pid)
	if pid := j.second(); pid > 0 {
		killTree(pid)
	}
}

// second is the process that a native start made, 0 for none.
func (j *job) second() int { return int(reports[j.slot].pid) }

func (j *job) reaped(ws unix.WaitStatus) {
	switch {
	case j.why != nil:
		j.finish(j.why)
	case ws.Exited() && ws.ExitStatus() == 0:
		j.finish(nil)
	case ws.Exited() && ws.ExitStatus() == failed && reports[j.slot].errno != 0:
		j.finish(reports[j.slot].explain(j))
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
	s := j.s
	j.pid = 0
	s.loop.stop(&j.limit)
	unix.Close(j.log)
	for i, other := range s.jobs {
		if other == j {
			s.jobs = append(s.jobs[:i], s.jobs[i+1:]...)
			break
		}
	}
	if j.hands {
		s.starts--
	}
	j.done(e)
	s.endIfOver()
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
