package shimd

import (
	"time"

	"golang.org/x/sys/unix"

	"github.com/berthd/berth/shim/wire"
)

const (
	deleteTimeout   = 30 * time.Second
	shutdownTimeout = 15 * time.Second
	recordRetry     = 2 * time.Second
	sendTimeout     = 500 * time.Millisecond // for the last words to clients
)

// initEnded is called when the container's init was reaped. What follows:
//
//	OOM count read -> rest of the container killed -> output drained
//	-> exit record renamed into place, or else tried again -> clients told
//	-> runtime delete -> socket removed -> end
//
// A crash between two steps leaves either no record and a runtime state, which
// berthd takes for a killed shim, or a record and a runtime state to delete.
func (s *shim) initEnded(ws unix.WaitStatus) {
	point("exit")
	s.status = wire.StatusExited
	s.exit = wire.Exit{Code: exitCode(ws), At: now()}
	if ws.Signaled() {
		s.exit.Signal = int(ws.Signal())
	}
	// A shell passes on in its code that its child was killed.
	s.exit.OOMKilled = s.oom.killed(s.exit.Code == 128+int(unix.SIGKILL)) && s.exit.Code != 0
	switch {
	case s.exit.OOMKilled:
		s.exit.Reason = "out of memory"
	case len(s.shutdown) > 0:
		s.exit.Reason = "shut down"
	}
	unix.Close(s.initFD)
	s.initFD = -1
	s.filter.untrace()
	s.dropFilter()
	if !s.l.PrivatePID {
		s.killRest(0)
	}
	for _, x := range s.execs {
		x.kill()
	}
	s.closeStdin()
	s.endInputs()
	s.loop.after(s.l.DrainTimeout, s.closeStreams)
	for _, st := range s.streams {
		if st != nil {
			st.read(turn)
		}
	}
	s.drained()
}

// killRest kills what the init leaves behind in a PID namespace that it shared,
// until nothing is left or it is to be believed that nothing helps.
func (s *shim) killRest(try int) {
	if killCgroups(s.l.CgroupKill, s.pid) && try < 200 && !s.loop.done {
		s.loop.after(10*time.Millisecond, func() { s.killRest(try + 1) })
	}
}

// closeStreams ends the draining: something that is not the container's any
// more holds its output open.
func (s *shim) closeStreams() {
	for _, a := range s.attached {
		if a.waits() {
			a.cut() // the streams are not held any more
		}
	}
	for _, st := range s.streams {
		if st != nil {
			st.read(4 * turn)
			st.close()
		}
	}
}

// drained goes on to the exit record when the init and all output have ended.
func (s *shim) drained() {
	if s.status != wire.StatusExited || s.told {
		return
	}
	for _, st := range s.streams {
		if st != nil && st.fd >= 0 {
			return
		}
	}
	s.record()
}

// record writes the exit record and tells the clients. When it cannot be
// written, the exit is told all the same, and it is tried again: who was told may
// be killed before it has written it down, and then this process alone knows.
func (s *shim) record() {
	if s.recorded || s.ending {
		return
	}
	var err error = unix.EIO
	if point("record") == nil {
		err = replaceFile(s.l.ExitFile, wire.AppendExitFile(nil, s.exit))
	}
	s.recorded = err == nil
	if err != nil {
		s.loop.after(recordRetry, s.record)
		if len(s.conns) == 0 {
			return
		}
	}
	if !s.told {
		s.log.close()
		point("tell")
		s.told = true
		exit := s.exit
		if err != nil {
			exit.Reason = "exit record not written: " + err.Error()
		}
		for _, c := range append([]*conn(nil), s.conns...) {
			if c.hello {
				pending{c, 0}.answer(exit)
			}
		}
	}
	s.endIfOver()
}

// endIfOver has the runtime delete the container once nothing else is under
// way, then ends the shim. A shutdown does not wait for an exit record.
func (s *shim) endIfOver() {
	if !s.told || s.ending || !s.recorded && len(s.shutdown) == 0 || len(s.jobs) > 0 || len(s.execs) > 0 || len(s.attached) > 0 {
		return
	}
	point("delete")
	s.ending = true
	finish := func(e *stepError) {
		for _, p := range s.shutdown {
			if e != nil {
				p.error(e)
			} else {
				p.ok()
			}
		}
		s.quit()
	}
	force := func(*stepError) {
		if e := s.verb("runtime delete", deleteTimeout, finish, "delete", "--force", s.l.ID); e != nil {
			finish(e)
		}
	}
	gentle := func(e *stepError) {
		if e != nil {
			force(e)
			return
		}
		finish(nil)
	}
	// Without --force first: with it, runc sleeps for 100 ms before it looks
	// whether the container is dead.
	if e := s.verb("runtime delete", deleteTimeout, gentle, "delete", s.l.ID); e != nil {
		force(e)
	}
}

// shutDown ends the container in whatever state it is.
func (s *shim) shutDown(p pending) *stepError {
	s.shutdown = append(s.shutdown, p)
	switch {
	case s.status == "":
		p.ok()
		s.quit()
	case s.create != nil:
		s.create.job.stop(wire.CodeState, "ended by a shutdown")
	case s.status != wire.StatusExited:
		s.killAll()
	}
	if s.create == nil && !s.ending {
		// A runtime that hangs shall not keep the shim.
		for _, j := range append([]*job(nil), s.jobs...) {
			j.stop(wire.CodeState, "ended by a shutdown")
		}
	}
	s.endIfOver() // it may be there for its record only
	s.loop.after(shutdownTimeout, func() {
		if s.status == wire.StatusExited || s.ending {
			return
		}
		p.error(fail(wire.CodeTimeout, "kill", "process "+itoa(s.init)+" does not end"))
		for i, other := range s.shutdown {
			if other == p {
				s.shutdown = append(s.shutdown[:i], s.shutdown[i+1:]...)
				break
			}
		}
	})
	return nil
}

// killAll kills the container. Without a PID namespace of its own the rest is
// killed when the init has ended.
func (s *shim) killAll() {
	if s.initFD >= 0 {
		s.oom.read()
		unix.PidfdSendSignal(s.initFD, unix.SIGKILL, nil, 0)
	}
}

// kill sends a signal.
func (s *shim) kill(p pending, body wire.Fields) *stepError {
	var k wire.Kill
	if k.Decode(body) != nil || k.Signal < 1 || k.Signal > 64 {
		return fail(wire.CodeInvalid, "", "signal "+itoa(k.Signal)+", limit 1 to 64")
	}
	if s.initFD < 0 {
		return fail(wire.CodeState, "", "container is "+s.status)
	}
	if e := point("kill"); e != nil {
		return e
	}
	sig := unix.Signal(k.Signal)
	if sig == unix.SIGKILL {
		s.oom.read() // so that this death is not taken for the kernel's doing
	}
	switch {
	case !k.All || s.l.PrivatePID && sig == unix.SIGKILL:
		// The kernel kills a PID namespace with its init.
		if err := unix.PidfdSendSignal(s.initFD, sig, nil, 0); err == unix.ESRCH {
			return fail(wire.CodeState, "", "container has ended")
		} else if err != nil {
			return failErr("signal", err)
		}
	case len(s.l.CgroupKill) > 0:
		signalCgroups(s.l.CgroupKill, sig, s.pid)
	default:
		// In a PID namespace of its own, all that is not below the init
		// is below an exec.
		signalTree(s.init, sig)
		for _, x := range s.execs {
			if x.pid > 0 {
				signalTree(x.pid, sig)
			}
		}
	}
	p.ok()
	return nil
}

// quit ends the shim. Clients get a moment to take what was said last.
func (s *shim) quit() {
	if s.loop.done {
		return
	}
	point("end")
	s.loop.done = true
	if s.create != nil {
		s.create.closeEnds(s)
	}
	if s.listener >= 0 {
		unix.Unlink(s.l.Socket)
	}
	until := monotonic() + int64(sendTimeout)
	for _, c := range append([]*conn(nil), s.conns...) {
		for c.fd >= 0 && len(c.out) > 0 && monotonic() < until {
			unix.Poll([]unix.PollFd{{Fd: int32(c.fd), Events: unix.POLLOUT}}, 50)
			c.flush()
		}
	}
}
