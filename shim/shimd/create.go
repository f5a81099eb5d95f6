package shimd

import (
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/berthd/berth/shim/wire"
)

// A create is a Launch that is under way.
type create struct {
	job     *job
	asked   pending
	stdio   [3]int // the container's ends of its stdio
	tty     int    // console socket, -1 for none
	ttyConn int    // the runtime's connection to it, -1 for none
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
		s.create = &create{asked: p, tty: -1, ttyConn: -1, stdio: [3]int{-1, -1, -1}}
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
	if err := point("launch"); err != nil {
		return err
	}
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
	if err := point("create"); err != nil {
		return err
	}
	userNS := -1
	if s.l.UserNS != "" {
		fd, err := unix.Open(s.l.UserNS, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return failErr("user namespace", err)
		}
		defer unix.Close(fd) // the child that mounts has its own
		userNS = fd
	}
	mounts, err := mountPlan(&s.l, userNS)
	if err != nil {
		return fail(wire.CodeInvalid, "Mounts", err.Error())
	}
	j := s.newJob(stepCreate, s.createEnded)
	j.hands = true
	if e := j.begin(); e != nil {
		return e
	}
	s.cmd.add("create", "--bundle", s.l.Bundle, "--pid-file", s.l.Bundle+"/"+pidFile)
	if s.l.Terminal {
		s.cmd.add("--console-socket")
		s.cmd.begin().fd(s.bundle).str("/" + ttyFile).end()
	}
	s.cmd.add(s.l.ID)
	s.create.job = j
	return j.run(&forkPlan{unshare: true, mounts: mounts, stdio: s.create.stdio}, s.l.CreateTimeout)
}

// explain turns a forked child's report into an answer.
func (r *report) explain(j *job) *stepError {
	msg := unix.Errno(r.errno).Error()
	l := &j.s.l
	if r.at <= atAffinity {
		return fail(wire.CodeInternal, j.step, "native step "+itoa(int(atAffinity-r.at))+": "+msg)
	}
	switch r.at {
	case atUnshare:
		return fail(wire.CodeInternal, "mount namespace", msg)
	case atStdio:
		return fail(wire.CodeInternal, "stdio", msg)
	case atFork:
		return fail(wire.CodeInternal, "fork", msg)
	case atExec:
		return fail(wire.CodeRuntime, j.step, l.Runtime+": "+msg)
	}
	// A read-only bind is two calls, so the numbers are no indices.
	var what []string
	for _, m := range l.Mounts {
		if m.IDMap != "" {
			what = append(what, "ID-mapped copy of "+m.IDMap)
		}
		what = append(what, m.Type+" "+m.Source+" at "+targetOf(&m, l.Rootfs, l.Bundle))
	}
	return fail(wire.CodeInternal, "mount", clip("call "+itoa(int(r.at))+" of "+strings.Join(what, ", ")+": "+msg))
}

func (s *shim) createEnded(e *stepError) {
	c := s.create
	if e == nil {
		e = s.adoptInit()
	}
	if e == nil {
		e = point("created")
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
}

func (s *shim) adoptInit() *stepError {
	pid, err := readPid(s.bundle, []byte(pidFile+"\x00"))
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
	if s.verb("runtime delete", deleteTimeout, finish, "delete", "--force", s.l.ID) != nil {
		finish(nil)
	}
}

// start has the runtime start the created container.
func (s *shim) start(p pending) *stepError {
	if s.status != wire.StatusCreated || s.starting {
		return fail(wire.CodeState, "", "container is "+s.status+", not created")
	}
	if e := point("start"); e != nil {
		return e
	}
	s.starting = true
	s.watchFilter()
	done := func(e *stepError) {
		s.starting = false
		if e == nil {
			e = point("started")
		}
		if e == nil && s.status == wire.StatusCreated {
			s.status = wire.StatusRunning
		}
		if e != nil {
			s.filter.unwatch()
			p.error(e)
		} else {
			p.ok()
		}
	}
	e := s.verb("runtime start", s.l.CreateTimeout, done, "start", s.l.ID)
	if e != nil {
		s.starting = false
		s.filter.unwatch()
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
