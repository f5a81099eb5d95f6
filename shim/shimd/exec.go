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
	stepNative  = "exec"
	killedDrain = 100 * time.Millisecond // for output after a kill
)

// An exec is one process run in the container for a client. The runtime starts
// it and ends; the process is then the shim's child.
//
// An exec is used again for another process, with all that belongs to it: probes
// may run a million of them, and the Go runtime's collector alone, once it has
// run, keeps more memory than the rest of a shim.
type exec struct {
	s       *shim
	p       pending
	c       *conn
	job     *job   // runs when its pid is not 0
	pid     int    // of the process, 0 before it is known and after its end
	pidFile []byte // name in the bundle, with a NUL
	process int    // memory file, -1 when it is closed
	native  *job   // starts it without the runtime
	image   int    // memory file for that, -1 for none
	stream  bool   // its stdio is the client's, and the shim has no part in it
	stdio   [3]int // its ends, until it has them; -1 for none
	console string // if so, the socket for its pty
	out     [2]execStream
	max     int64
	drain   time.Duration

	limit, grace     timer
	byItself         bool // started without the runtime
	killed, timedOut bool
	ended            bool // the process was reaped
	over             bool // answered
	status           unix.WaitStatus
	onEnd            func(unix.WaitStatus)
}

type execStream struct {
	fd    int // -1 after its end
	sent  int64
	cut   bool
	ready func(uint32)
}

// newExec takes a spare exec or makes one.
func (s *shim) newExec() *exec {
	if n := len(s.spare); n > 0 {
		x := s.spare[n-1]
		s.spare = s.spare[:n-1]
		return x
	}
	s.execSeq++
	x := &exec{s: s, pidFile: []byte("exec-" + itoa(s.execSeq) + ".pid\x00")}
	x.job = s.newJob(stepExec, x.started)
	x.job.hands = true
	x.native = s.newJob(stepNative, x.startedNative)
	x.native.hands, x.native.log = true, -1
	x.onEnd = x.reaped
	x.limit.fire = func() {
		x.timedOut = true
		x.kill()
	}
	x.grace.fire = func() { x.finish(nil) }
	for i := range x.out {
		x.out[i].ready = func(uint32) { x.read(i) }
	}
	return x
}

// exec starts a process. The answer comes when it has ended.
func (s *shim) exec(p pending, body wire.Fields) *stepError {
	process, image := p.c.takeUpload(p.call, wire.TagData), p.c.takeUpload(p.call, wire.TagImage)
	var r wire.Exec
	var e *stepError
	err := r.Decode(body)
	stdio, ok := []int(nil), true
	if r.Stream && r.Console == "" {
		stdio, ok = p.c.takeFiles(3)
	}
	switch {
	case err != nil || process < 0 || r.Timeout < 0 || r.MaxOutput < 0 || r.Drain < 0 || r.Drain > maxDrain:
		e = fail(wire.CodeInvalid, "", "exec without a process, or with a limit out of bounds")
	case !ok || r.Stream && (r.Timeout != 0 || r.Drain != 0 || r.MaxOutput != 0) || !r.Stream && r.Console != "" || len(r.Console) >= unix.PathMax:
		e = fail(wire.CodeInvalid, "", "streaming exec without its three descriptors, or with limits")
	case s.status != wire.StatusRunning:
		e = fail(wire.CodeState, "", "container is "+s.status+", not running")
	case len(s.execs) >= maxExecs:
		e = fail(wire.CodeBusy, "", itoa(maxExecs)+" execs are running")
	default:
		e = point("exec")
	}
	if e != nil {
		closeFD(process)
		closeFD(image)
		closeFDs(stdio)
		return e
	}
	if r.Drain == 0 {
		r.Drain = defaultDrain
	}
	x := s.newExec()
	x.p, x.c, x.process, x.image, x.max, x.drain = p, p.c, process, image, r.MaxOutput, r.Drain
	x.killed, x.timedOut, x.ended, x.over, x.byItself, x.status = false, false, false, false, false, 0
	x.stream, x.console, x.stdio = r.Stream, r.Console, [3]int{-1, -1, -1}
	copy(x.stdio[:], stdio)
	if e := x.start(); e != nil {
		x.closeAll()
		x.over = true
		x.release()
		return e
	}
	s.execs = append(s.execs, x)
	if r.Timeout > 0 {
		s.loop.arm(&x.limit, r.Timeout)
	}
	return nil
}

func (x *exec) start() *stepError {
	var err error
	for i := range x.out {
		o := &x.out[i]
		o.fd, o.sent, o.cut = -1, 0, false
		if err == nil && !x.stream {
			o.fd, x.stdio[i+1], err = x.s.pipe(false)
		}
	}
	if err != nil {
		return failErr("stdio", err)
	}
	if !x.startNative() {
		if e := x.startRuntime(); e != nil {
			return e
		}
	}
	for i := range x.out {
		if !x.stream {
			x.s.loop.add(x.out[i].fd, unix.EPOLLIN, x.out[i].ready)
		}
	}
	return nil
}

// startNative begins to start the process without the runtime. It returns false
// when the runtime is to do it.
func (x *exec) startNative() bool {
	s := x.s
	if x.image < 0 || s.noNative || x.console != "" {
		return false
	}
	n, err := s.mapNative(x.image)
	if err != nil {
		return false
	}
	e := x.native.fork(&forkPlan{stdio: x.stdio, native: n}, s.l.CreateTimeout)
	n.unmap()
	return e == nil
}

// startedNative is called when the process runs or could not be started. Then
// nothing of it has run, so that the runtime can be asked, and say why.
func (x *exec) startedNative(e *stepError) {
	pid := x.native.second()
	if e != nil && pid > 0 {
		x.s.expect(pid, forget)
	}
	// Only a report proves that nothing of the command has run: its starter may
	// have been killed by somebody else, when the command was on its way.
	r := &reports[x.native.slot]
	if e == nil || x.over || x.killed || x.native.why != nil || r.errno == 0 {
		if e != nil && pid > 0 {
			killTree(pid)
		}
		x.closeStdio()
		if x.byItself = e == nil; x.byItself {
			x.s.failures = 0
		}
		x.begun(e, pid)
		return
	}
	switch {
	case r.errno == int32(unix.ENOSYS) || r.at == atSetns && r.errno == int32(unix.EINVAL):
		x.s.noNative = true
	case r.at != atExec && r.at != atChdir: // which are the command's own
		x.s.failures++
		x.s.noNative = x.s.failures >= maxFailures
	}
	if e := x.startRuntime(); e != nil {
		x.finish(e)
	}
}

// maxFailures is how often in a row the shim tries in vain what lies in the
// container and not in the command, such as a cgroup that takes no processes.
const maxFailures = 3

func forget(unix.WaitStatus) {}

func (x *exec) startRuntime() *stepError {
	if e := x.job.begin(); e != nil {
		return e
	}
	s, c := x.s, &x.s.cmd
	c.add("exec", "--process")
	c.begin().fd(x.process).end()
	c.add("--pid-file")
	c.begin().str(s.l.Bundle).str("/").str(string(x.pidFile[:len(x.pidFile)-1])).end()
	if x.console != "" {
		c.add("--console-socket", x.console)
	}
	c.add("--detach", s.l.ID)
	e := x.job.run(&forkPlan{stdio: x.stdio}, s.l.CreateTimeout)
	if e == nil {
		x.closeStdio()
	}
	return e
}

// closeStdio closes the process's ends, which it has by now or will never get.
func (x *exec) closeStdio() {
	for i, fd := range x.stdio {
		closeFD(fd)
		x.stdio[i] = -1
	}
}

// started is called when the runtime has ended.
func (x *exec) started(e *stepError) {
	pid := 0
	if e == nil {
		pid, _ = readPid(x.s.bundle, x.pidFile)
	} else {
		// The name is used again, and a runtime that was killed while it wrote
		// the file has left what runc writes first, which it refuses to find.
		unlinkAt(x.s.bundle, x.pidFile)
		unlinkAt(x.s.bundle, append([]byte("."), x.pidFile...))
	}
	x.begun(e, pid)
}

// begun is called when what starts the process has ended.
func (x *exec) begun(e *stepError, pid int) {
	x.closeFiles()
	if e == nil {
		if pid > 0 && x.s.adopt(pid, x.onEnd) {
			x.pid = pid
			if x.killed {
				killTree(pid)
			} else if x.stream {
				x.p.started()
			}
			return
		}
		e = fail(wire.CodeRuntime, stepExec, "did not leave a process with a pid")
	}
	if x.over {
		x.release()
		return
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
		x.release()
		return
	}
	drain := x.drain
	if x.killed {
		drain = min(drain, killedDrain)
	}
	x.s.loop.arm(&x.grace, drain)
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
	x.s.loop.stop(&x.limit)
	if x.ended {
		return // it is draining
	}
	x.s.loop.arm(&x.grace, killWait)
	switch {
	case x.pid > 0:
		killTree(x.pid)
	case x.native.pid > 0:
		x.native.kill()
	case x.job.pid > 0:
		x.job.kill()
	}
}

// cancel ends what the call asked for.
func (s *shim) cancel(p pending) {
	for _, x := range s.execs {
		if x.p == p {
			x.kill()
			return
		}
	}
	for _, a := range s.attached {
		if a.p == p {
			a.end()
			return
		}
	}
	if s.stdin.asked == p {
		s.dropStdin()
		return
	}
	closeFD(p.c.takeUpload(p.call, wire.TagData))
	closeFD(p.c.takeUpload(p.call, wire.TagImage))
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
		s.collect(frameGarbage)
	} else {
		b := &s.b
		b.Buf = b.Buf[:0]
		code := exitCode(x.status)
		if x.killed && !x.ended {
			// Killed with its runtime, before it ran, or not dead yet.
			code = 128 + int(unix.SIGKILL)
		}
		r := wire.ExecResult{
			ExitCode:        code,
			StdoutTruncated: x.out[0].cut,
			StderrTruncated: x.out[1].cut,
			TimedOut:        x.timedOut,
			Native:          x.byItself,
		}
		r.Append(b, x.p.call)
		x.c.send(b.Buf)
	}
	if x.stream || x.byItself {
		s.garbage += streamGarbage
	}
	x.release()
	s.collect(execGarbage)
	s.endIfOver()
}

func (x *exec) closeAll() {
	x.s.loop.stop(&x.limit)
	x.s.loop.stop(&x.grace)
	for i := range x.out {
		x.s.loop.close(x.out[i].fd)
		x.out[i].fd = -1
	}
	x.closeStdio()
	if x.job.pid == 0 { // else the runtime may still read it
		x.closeFiles()
		unlinkAt(x.s.bundle, x.pidFile)
	}
}

// closeFiles closes the descriptions of the process.
func (x *exec) closeFiles() {
	closeFD(x.process)
	closeFD(x.image)
	x.process, x.image = -1, -1
}

// release makes x available again once nothing of it is left: one that was
// given up comes here when its process ends at last, or never.
func (x *exec) release() {
	if !x.over || x.native.pid > 0 || x.job.pid > 0 || x.pid > 0 {
		return
	}
	x.p, x.c = pending{}, nil
	if len(x.s.spare) < maxSpare {
		x.s.spare = append(x.s.spare, x)
	}
}

const maxSpare = 8

// What is left for the collector, about, in bytes.
const (
	frameGarbage  = 512  // by a request or an error
	execGarbage   = 16   // by an exec: next to nothing
	streamGarbage = 1024 // by one on a client's descriptors
	maxGarbage    = 256 << 10
)

// collect counts garbage and has it collected from time to time.
func (s *shim) collect(garbage int) {
	if s.garbage += garbage; s.garbage >= maxGarbage && len(s.execs) == 0 {
		s.garbage = 0
		runtime.GC()
	}
}
