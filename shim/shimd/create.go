package shimd

import (
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/berthd/berth/shim/wire"
)

// A create is a Launch that is under way.
type create struct {
	job    *job
	asked  pending
	pipe   int // where the forked child reports a failure, -1 when it is over
	report *report
	stdio  [3]int // the container's ends of its stdio
	tty    int    // console socket, -1 for none
	// ttyConn is the runtime's connection to it, -1 for none.
	ttyConn int
}

const (
	pidFile    = "init.pid"
	ttyFile    = "tty.sock"
	stepCreate = "runtime create"
)

func itoa(n int) string { return strconv.Itoa(n) }

// launch begins to create the container. The answer comes when that is done.
func (s *shim) launch(p pending, body wire.Fields) *stepError {
	if s.status != "" || s.listener >= 0 {
		return fail(wire.CodeState, "launch", "this shim has a container")
	}
	var l wire.Launch
	err := fail(wire.CodeInvalid, "launch", wire.ErrFrame.Error())
	if l.Decode(body) == nil {
		err = check(&l)
	}
	if err == nil {
		s.l, s.status = l, wire.StatusCreating
		s.create = &create{asked: p, pipe: -1, tty: -1, ttyConn: -1, stdio: [3]int{-1, -1, -1}}
		err = s.prepare()
	}
	if err != nil {
		p.error(err)
		s.quit()
	}
	return nil
}

// prepare makes what is the shim's own, then starts the runtime.
func (s *shim) prepare() *stepError {
	if s.l.OOMScoreAdj != nil {
		err := writeFile("/proc/self/oom_score_adj", itoa(*s.l.OOMScoreAdj))
		if err != nil && err != unix.EACCES && err != unix.EPERM {
			return failErr("OOM score", err)
		}
	}
	if err := s.listen(s.l.Socket); err != nil {
		return err
	}
	fd, err := unix.Open(s.l.Bundle, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return failErr("bundle", err)
	}
	s.bundle = fd
	if s.l.LogPath != "" {
		if s.log, err = openLog(s.l.LogPath); err != nil {
			return failErr("log "+s.l.LogPath, err)
		}
	}
	if err := s.openStdio(); err != nil {
		return failErr("stdio", err)
	}
	return s.runCreate()
}

func (s *shim) runCreate() *stepError {
	log, logPath, err := memfd("log")
	if err != nil {
		return failErr(stepCreate, err)
	}
	verb := []string{"create", "--bundle", s.l.Bundle, "--pid-file", s.l.Bundle + "/" + pidFile}
	if s.l.Terminal {
		verb = append(verb, "--console-socket", fdPath(s.bundle)+"/"+ttyFile)
	}
	argv := s.command(logPath, append(verb, s.l.ID)...)
	plan := &forkPlan{stdio: s.create.stdio}
	if plan.stdio[2] < 0 { // with a pty the runtime's own complaints go to the log
		plan.stdio[2] = log
	}
	if plan.mounts, err = mountPlan(s.l.Mounts, s.l.Rootfs); err != nil {
		unix.Close(log)
		return fail(wire.CodeInvalid, "Mounts", err.Error())
	}
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		unix.Close(log)
		return failErr(stepCreate, err)
	}
	plan.fail = pipe[1]
	pid, err := forkRuntime(plan, argv, s.env)
	unix.Close(pipe[1])
	if err != nil {
		unix.Close(log)
		unix.Close(pipe[0])
		return failErr(stepCreate, err)
	}
	s.create.pipe = pipe[0]
	s.loop.add(pipe[0], unix.EPOLLIN, func(uint32) { s.create.readReport(s.loop) })
	j := &job{s: s, step: stepCreate, pid: pid, log: log, done: s.createEnded, hands: true}
	s.create.job = j
	j.watch(s.l.CreateTimeout)
	return nil
}

// readReport takes what the forked child had to say, if it failed.
func (c *create) readReport(l *loop) {
	if c.pipe < 0 {
		return
	}
	var r report
	n, err := unix.Read(c.pipe, unsafe.Slice((*byte)(unsafe.Pointer(&r)), unsafe.Sizeof(r)))
	if err == unix.EAGAIN || err == unix.EINTR {
		return
	}
	if n == int(unsafe.Sizeof(r)) {
		c.report = &r
	}
	l.close(c.pipe)
	c.pipe = -1
}

// explain turns the child's report into an answer.
func (r *report) explain(l *wire.Launch) *stepError {
	msg := unix.Errno(r.errno).Error()
	switch r.at {
	case atUnshare:
		return fail(wire.CodeInternal, "mount namespace", msg)
	case atStdio:
		return fail(wire.CodeInternal, "stdio", msg)
	case atExec:
		return fail(wire.CodeRuntime, stepCreate, l.Runtime+": "+msg)
	}
	// A read-only bind is two calls, so the numbers are no indices.
	var what []string
	for _, m := range l.Mounts {
		what = append(what, m.Type+" "+m.Source)
	}
	return fail(wire.CodeInternal, "mount", clip("call "+itoa(int(r.at))+" of "+strings.Join(what, ", ")+" at "+l.Rootfs+": "+msg))
}

func (s *shim) createEnded(e *stepError) {
	c := s.create
	c.readReport(s.loop)
	if c.report != nil {
		e = c.report.explain(&s.l)
	}
	if e == nil {
		e = s.adoptInit()
	}
	if e == nil && s.l.Terminal && s.streams[0] == nil {
		// The runtime sends the pty before it ends, but the message may
		// not have been looked at yet.
		s.acceptTTY()
		s.receiveTTY()
		if s.streams[0] == nil {
			e = fail(wire.CodeRuntime, stepCreate, "no pty came on the console socket")
		}
	}
	if e != nil && e.Code == wire.CodeRuntime && s.streams[1] != nil && len(e.Message) < 40 {
		// Without a log the reason may be on the container's stderr.
		if p, err := readIn(s.streams[1].fd, maxMessage); err == nil && len(p) > 0 {
			e.Message += ": " + runtimeMessage(p)
		}
	}
	c.closeEnds(s)
	s.create = nil
	if e != nil {
		s.abandon(c.asked, e)
		return
	}
	s.status = wire.StatusCreated
	s.oom.open(s.loop, s.l.OOMFile)
	s.watchStreams()
	c.asked.answer(wire.Launched{ShimPID: s.pid, Pid: s.init})
	if len(s.shutdown) > 0 {
		s.killAll()
	}
	s.collect()
}

func (s *shim) adoptInit() *stepError {
	pid, err := readPid(s.l.Bundle + "/" + pidFile)
	if err != nil {
		return fail(wire.CodeRuntime, stepCreate, "pid file: "+err.Error())
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return failErr("pidfd of the init", err)
	}
	if !s.adopt(pid, s.initEnded) {
		unix.Close(fd)
		return fail(wire.CodeRuntime, stepCreate, "process "+itoa(pid)+" was not left to the shim")
	}
	s.init, s.initFD = pid, fd
	return nil
}

// closeEnds closes the container's ends of the stdio, so that the shim's show
// the end when the last process of the container has gone.
func (c *create) closeEnds(s *shim) {
	for i, fd := range c.stdio {
		if fd > 2 {
			unix.Close(fd)
		}
		c.stdio[i] = -1
	}
	s.loop.close(c.ttyConn)
	c.ttyConn = -1
	if c.tty >= 0 {
		s.loop.close(c.tty)
		unix.Unlink(s.l.Bundle + "/" + ttyFile)
		c.tty = -1
	}
}

// abandon ends a shim whose container could not be created. The runtime may
// have left a state or a process.
func (s *shim) abandon(p pending, e *stepError) {
	if s.init > 0 {
		unix.Kill(s.init, unix.SIGKILL)
	}
	finish := func(*stepError) {
		p.error(e)
		for _, q := range s.shutdown {
			q.ok()
		}
		s.quit()
	}
	s.ending = true
	_, err := s.run("runtime delete", deleteTimeout, false, [3]int{-1, -1, -1}, finish, "delete", "--force", s.l.ID)
	if err != nil {
		finish(nil)
	}
}

// start has the runtime start the created container.
func (s *shim) start(p pending) *stepError {
	if s.status != wire.StatusCreated || s.starting {
		return fail(wire.CodeState, "", "container is "+s.status+", not created")
	}
	s.starting = true
	done := func(e *stepError) {
		s.starting = false
		if e == nil && s.status == wire.StatusCreated {
			s.status = wire.StatusRunning
		}
		if e != nil {
			p.error(e)
		} else {
			p.ok()
		}
		s.collect()
	}
	_, e := s.run("runtime start", s.l.CreateTimeout, false, [3]int{-1, -1, -1}, done, "start", s.l.ID)
	if e != nil {
		s.starting = false
	}
	return e
}

func (s *shim) state(p pending) {
	st := wire.State{Pid: s.init, ShimPID: s.pid, Status: s.status}
	switch {
	case s.told:
		st.Exit = &s.exit
	case s.status == wire.StatusExited: // the record is not written yet
		st.Status = wire.StatusRunning
	}
	p.answer(st)
}
