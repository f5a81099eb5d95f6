package cri

import (
	"fmt"
	"strings"
	"sync"
	"time"
)

// Call is a request, or a session, that is being worked on.
type Call struct {
	Method  string // of the CRI; of a session "exec", "attach" or "portforward"
	Number  string // as in the log; "" of a session
	ID      string // of the container, or else the pod, that it is about; "" for none
	About   string // what else it names: the pod to make, the image
	Session bool   // on a connection of its own
	Began   time.Time
	Age     time.Duration // since Began, whatever was done to the clock
}

// calls are those under way. They are a list through the calls themselves, so that one
// costs two short turns at the lock and nothing that grows.
type calls struct {
	mu    sync.Mutex
	first *underWay
}

// underWay is one of them. Its fields do not change, but for the list's.
type underWay struct {
	method, number string
	about          []any // keys and values, as for the log
	session        bool
	began          time.Time

	prev, next *underWay // guarded by calls.mu
}

func (l *calls) begin(c *underWay) {
	l.mu.Lock()
	c.next = l.first
	if c.next != nil {
		c.next.prev = c
	}
	l.first = c
	l.mu.Unlock()
}

func (l *calls) end(c *underWay) {
	l.mu.Lock()
	if c.prev != nil {
		c.prev.next = c.next
	} else {
		l.first = c.next
	}
	if c.next != nil {
		c.next.prev = c.prev
	}
	l.mu.Unlock()
}

// list has the newest first.
func (l *calls) list() []Call {
	var running []*underWay
	l.mu.Lock()
	for c := l.first; c != nil; c = c.next {
		running = append(running, c)
	}
	l.mu.Unlock()
	out := make([]Call, len(running))
	for i, c := range running {
		out[i] = c.describe()
	}
	return out
}

func (c *underWay) describe() Call {
	d := Call{Method: c.method, Number: c.number, Session: c.session, Began: c.began, Age: time.Since(c.began)}
	pod := ""
	var about []string
	for i := 0; i+1 < len(c.about); i += 2 {
		switch value := fmt.Sprint(c.about[i+1]); c.about[i] {
		case "containerID":
			d.ID = value
		case "sandboxID":
			pod = value
		case "pod", "container", "image":
			about = append(about, value)
		}
	}
	if d.ID == "" {
		d.ID = pod
	}
	d.About = strings.Join(about, "/")
	return d
}

// Calls lists the requests and sessions that are being worked on, the newest first.
func (s *Server) Calls() []Call { return s.calls.list() }
