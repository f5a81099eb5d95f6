package shimd

import (
	"runtime"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berthd/berth/shim/wire"
)

// Limits of an exec.
const (
	maxProcess  = 8 << 20 // bytes of the process file
	maxExecs    = 256     // at once
	stepExec    = "runtime exec"
	killedDrain = 100 * time.Millisecond // for output after a kill
)

// An exec is one process run in the container for a client. The runtime starts
// it and ends; the process is then the shim's child.
type exec struct {
	s       *shim
	p       pending
	c       *conn
	job     *job // nil when the runtime has ended
	pid     int  // 0 before it is known
	pidFile string
	process int // memory file, -1 when it is closed
	out     [2]execStream
	max     int64
	drain   time.Duration

	limit, grace     *timer
	killed, timedOut bool
	ended            bool // the process was reaped
	over             bool // answered
	status           unix.WaitStatus
}

type execStream struct {
	fd   int // -1 after its end
	sent int64
	cut  bool
}

// exec starts a process. The answer comes when it has ended.
func (s *shim) exec(p pending, body wire.Fields) *stepError {
	process := p.c.takeUpload(p.call)
	var r wire.Exec
	if r.Decode(body) != nil || process < 0 || r.Timeout < 0 || r.MaxOutput < 0 || r.Drain < 0 || r.Drain > maxDrain {
		unix.Close(process)
		return fail(wire.CodeInvalid, "", "exec without a process, or with a negative limit")
	}
	if s.status != wire.StatusRunning {
		unix.Close(process)
		return fail(wire.CodeState, "", "container is "+s.status+", not running")
	}
	if len(s.execs) >= maxExecs {
		unix.Close(process)
		return fail(wire.CodeBusy, "", itoa(maxExecs)+" execs are running")
	}
	if r.Drain == 0 {
		r.Drain = defaultDrain
	}
	s.execSeq++
	x := &exec{s: s, p: p, c: p.c, process: process, max: r.MaxOutput, drain: r.Drain,
		pidFile: s.l.Bundle + "/exec-" + itoa(s.execSeq) + ".pid"}
	if err := x.start(); err != nil {
		x.closeAll()
		return err
	}
	s.execs = append(s.execs, x)
	if r.Timeout > 0 {
		x.limit = s.loop.after(r.Timeout, func() {
			x.timedOut = true
			x.kill()
		})
	}
	return nil
}

func (x *exec) start() *stepError {
	x.out[0].fd, x.out[1].fd = -1, -1
	var ends [2]int
	for i := range x.out {
		r, w, err := pipe(false)
		if err != nil {
			if i == 1 {
				unix.Close(ends[0])
			}
			return failErr("stdio", err)
		}
		x.out[i].fd, ends[i] = r, w
	}
	j, e := x.s.run(stepExec, x.s.l.CreateTimeout, true, [3]int{-1, ends[0], ends[1]}, x.started,
		"exec", "--process", fdPath(x.process), "--pid-file", x.pidFile, "--detach", x.s.l.ID)
	unix.Close(ends[0])
	unix.Close(ends[1])
	if e != nil {
		return e
	}
	x.job = j
	for i := range x.out {
		x.s.loop.add(x.out[i].fd, unix.EPOLLIN, func(uint32) { x.read(i) })
	}
	return nil
}

// started is called when the runtime has ended.
func (x *exec) started(e *stepError) {
	x.job = nil
	unix.Close(x.process)
	x.process = -1
	if x.over {
		return
	}
	if e == nil {
		pid, err := readPid(x.pidFile)
		if err == nil && x.s.adopt(pid, x.reaped) {
			x.pid = pid
			if x.killed {
				killTree(pid)
			}
			return
		}
		e = fail(wire.CodeRuntime, stepExec, "did not leave a process with a pid file")
	}
	if x.killed {
		x.finish(nil)
		return
	}
	x.finish(e)
}

// reaped is called when the process has ended.
func (x *exec) reaped(ws unix.WaitStatus) {
	x.ended, x.status, x.pid = true, ws, 0
	if x.over {
		return
	}
	drain := x.drain
	if x.killed {
		drain = min(drain, killedDrain)
	}
	x.s.loop.stop(x.grace)
	x.grace = x.s.loop.after(drain, func() { x.finish(nil) })
	x.read(0)
	x.read(1)
	x.endIfOver()
}

func (x *exec) endIfOver() {
	if x.ended && x.out[0].fd < 0 && x.out[1].fd < 0 {
		x.finish(nil)
	}
}

// read passes on what one of the streams has, within the limit, while the
// client takes it.
func (x *exec) read(i int) {
	o := &x.out[i]
	for n := 0; n < 8 && o.fd >= 0 && !x.over; n++ {
		if len(x.c.out) > pauseOut {
			x.s.loop.set(o.fd, 0)
			return
		}
		p, err := readIn(o.fd, wire.MaxChunk)
		if err == unix.EAGAIN {
			return
		}
		if err != nil || len(p) == 0 {
			x.s.loop.close(o.fd)
			o.fd = -1
			x.endIfOver()
			return
		}
		x.pass(i, p)
	}
}

func (x *exec) pass(i int, p []byte) {
	o := &x.out[i]
	if room := x.max - o.sent; int64(len(p)) > room {
		p, o.cut = p[:room], true
	}
	if len(p) == 0 {
		return
	}
	o.sent += int64(len(p))
	b := wire.Builder{Buf: outBuf[:0]}
	if (wire.ExecOutput{Stream: i + 1, Data: p}).Append(&b, x.p.call) == nil {
		outHigh = max(outHigh, len(b.Buf))
		x.c.send(b.Buf)
	}
}

// resume reads on after the client has taken what it was sent.
func (x *exec) resume() {
	for i := range x.out {
		if x.out[i].fd >= 0 {
			x.s.loop.set(x.out[i].fd, unix.EPOLLIN)
		}
	}
}

// kill ends the process and its descendants, or the runtime that is about to
// start it.
func (x *exec) kill() {
	if x.over || x.killed {
		return
	}
	x.killed = true
	x.s.loop.stop(x.limit)
	if !x.ended {
		x.s.loop.stop(x.grace)
		x.grace = x.s.loop.after(killWait, func() { x.finish(nil) })
	}
	switch {
	case x.pid > 0:
		killTree(x.pid)
	case x.job != nil:
		killTree(x.job.pid)
	}
}

func (s *shim) cancelExec(p pending) {
	for _, x := range s.execs {
		if x.p == p {
			x.kill()
			return
		}
	}
	if fd := p.c.takeUpload(p.call); fd >= 0 {
		unix.Close(fd)
	}
}

// finish answers, with e if that is not nil, and forgets the exec.
func (x *exec) finish(e *stepError) {
	if x.over {
		return
	}
	x.over = true
	s := x.s
	for i, other := range s.execs {
		if other == x {
			s.execs = append(s.execs[:i], s.execs[i+1:]...)
			break
		}
	}
	if e != nil && e.Code == wire.CodeRuntime && x.out[1].fd >= 0 && len(e.Message) < 40 {
		// Without a log the runtime's reason may be on stderr.
		if p, err := readIn(x.out[1].fd, maxMessage); err == nil && len(p) > 0 {
			e.Message += ": " + runtimeMessage(p)
		}
	}
	x.closeAll()
	if e != nil {
		x.p.error(e)
	} else {
		x.p.answer(wire.ExecResult{
			ExitCode:        exitCode(x.status),
			StdoutTruncated: x.out[0].cut,
			StderrTruncated: x.out[1].cut,
			TimedOut:        x.timedOut,
		})
	}
	s.garbage++
	s.collect()
	s.endIfOver()
}

func (x *exec) closeAll() {
	x.s.loop.stop(x.limit)
	x.s.loop.stop(x.grace)
	for i := range x.out {
		x.s.loop.close(x.out[i].fd)
		x.out[i].fd = -1
	}
	if x.job == nil { // else the runtime may still read it
		unix.Close(x.process)
		x.process = -1
	}
	unix.Unlink(x.pidFile)
}

// collectEvery is after how many execs garbage is collected: each leaves a few
// KiB.
const collectEvery = 16

// collect frees what finished execs have left, when none is running.
func (s *shim) collect() {
	if s.garbage >= collectEvery && len(s.execs) == 0 {
		s.garbage = 0
		runtime.GC()
	}
}
