package imageservice

import (
	"runtime"
	"runtime/debug"
	"time"
)

// trimDelay is for how long no pull must have run before the memory of pulls is given back.
const trimDelay = time.Second

// forgetPullLocked ends the registration of a pull. What pulls needed, some tens of MiB that
// idle buffers and the collector's reserve make up, would otherwise stay for minutes: a
// node pulls seldom, and its memory belongs to the pods.
func (s *Service) forgetPullLocked(key pullKey) {
	delete(s.pulls, key)
	if len(s.pulls) > 0 || s.closed {
		return
	}
	if s.trim == nil {
		s.trim = time.AfterFunc(trimDelay, s.trimNow)
	} else {
		s.trim.Reset(trimDelay)
	}
}

func (s *Service) trimNow() {
	s.mu.Lock()
	busy := len(s.pulls) > 0 || s.closed
	s.mu.Unlock()
	if busy {
		return
	}
	// Pools let go of what they hold at the second collection; the latter call is one.
	runtime.GC()
	debug.FreeOSMemory()
}
