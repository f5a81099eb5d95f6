package shimd

import "golang.org/x/sys/unix"

// An expected child is a process whose end somebody waits for.
type expected struct {
	pid   int
	ended func(unix.WaitStatus)
}

// expect calls ended when the child pid has ended.
func (s *shim) expect(pid int, ended func(unix.WaitStatus)) {
	s.children = append(s.children, expected{pid, ended})
}

// unexpect forgets about a child, and returns what was to be called.
func (s *shim) unexpect(pid int) func(unix.WaitStatus) {
	for i, c := range s.children {
		if c.pid == pid {
			s.children = append(s.children[:i], s.children[i+1:]...)
			return c.ended
		}
	}
	return nil
}

// adopt waits for a process that a runtime left. It returns false when it is
// not the shim's child.
func (s *shim) adopt(pid int, ended func(unix.WaitStatus)) bool {
	var info unix.Siginfo
	err := unix.Waitid(unix.P_PID, pid, &info, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT, nil)
	if err != nil && err != unix.EINTR {
		return false
	}
	s.expect(pid, ended)
	return true
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

// reapKnown returns whether it found one. What is called may change the list.
func (s *shim) reapKnown() bool {
	for _, c := range s.children {
		var ws unix.WaitStatus
		got, err := unix.Wait4(c.pid, &ws, unix.WNOHANG, nil)
		if got == c.pid && err == nil {
			s.reaped(got, ws)
			return true
		}
	}
	return false
}

// reaped is called for what a wait has told. Who is traced may only have stopped.
func (s *shim) reaped(pid int, ws unix.WaitStatus) {
	if ws.Stopped() {
		s.stopped(pid, ws)
		return
	}
	if ended := s.unexpect(pid); ended != nil {
		ended(ws)
	}
}
