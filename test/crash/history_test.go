package crash

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// history is what clients have been told, and the sequential model that each
// answer is held against. An object is known to it from the answer to the call
// that made it. The model of one object:
//
//	made -> (started) -> ended -> removal asked for -> removal answered
//
// No answer goes back behind one that was given before the call began, times and
// exit codes stay what they were, and a list holds all that was there while it
// was made and nothing that had been removed before.
type history struct {
	mu         sync.Mutex
	objects    map[string]*object
	killed     map[string]bool // IDs of the shims that were killed
	violations []string
	answers    int // that were held against the model
}

// object is a pod or container in the model.
type object struct {
	pod      string // of a container; "" for a pod
	born     time.Time
	stopping bool // somebody has asked for its end, or its pod's
	starting bool // somebody has asked for its start
	doomed   time.Time
	gone     time.Time
	ip       string
	code     int32 // with which a container ends by itself or on SIGTERM

	state                      runtime.ContainerState
	created, started, finished int64
	exit                       int32
}

func newHistory() *history {
	return &history{objects: map[string]*object{}, killed: map[string]bool{}}
}

func (h *history) violateLocked(format string, args ...any) {
	if len(h.violations) < 100 {
		h.violations = append(h.violations, time.Now().Format("15:04:05.000 ")+fmt.Sprintf(format, args...))
	}
}

// bear enters an object whose making was answered. The same one may be told
// twice, to callers who joined, as long as it is the same in all.
func (h *history) bear(id string, o object) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.answers++
	if old := h.objects[id]; old != nil {
		if !old.doomed.IsZero() {
			h.violateLocked("%.12s was told as made after its removal was asked for", id)
		}
		return
	}
	o.born, o.exit = time.Now(), -1
	h.objects[id] = &o
}

// note changes what the model knows of an object.
func (h *history) note(id string, fn func(o *object)) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if o := h.objects[id]; o != nil {
		fn(o)
	}
}

// stop notes that the end of an object was asked for, and that of what is in it.
func (h *history) stop(id string) {
	h.each(id, func(o *object) { o.stopping = true })
}

// doom notes that the removal of an object was asked for, and bury that it was
// answered; with a pod goes what is in it.
func (h *history) doom(id string) {
	h.each(id, func(o *object) {
		o.stopping = true
		if o.doomed.IsZero() {
			o.doomed = time.Now()
		}
	})
}

func (h *history) bury(id string) {
	h.each(id, func(o *object) {
		if o.gone.IsZero() {
			o.gone = time.Now()
		}
	})
}

// each changes an object and what is in it.
func (h *history) each(id string, fn func(o *object)) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for k, o := range h.objects {
		if k == id || o.pod == id {
			fn(o)
		}
	}
}

// container holds a status against the model. The answer was to a call that
// began at from.
func (h *history) container(id string, st *runtime.ContainerStatus, from time.Time) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.answers++
	o := h.objects[id]
	if o == nil {
		return
	}
	if !o.gone.IsZero() && o.gone.Before(from) {
		h.violateLocked("container %.12s: %v after its removal", id, st.State)
	}
	if st.State < o.state {
		h.violateLocked("container %.12s: went back from %v to %v", id, o.state, st.State)
	}
	for _, t := range []struct {
		name string
		was  *int64
		now  int64
	}{{"created", &o.created, st.CreatedAt}, {"started", &o.started, st.StartedAt}, {"finished", &o.finished, st.FinishedAt}} {
		if *t.was != 0 && t.now != *t.was {
			h.violateLocked("container %.12s: was %s at %d, now at %d", id, t.name, *t.was, t.now)
		}
		*t.was = t.now
	}
	if st.State == exited && (st.FinishedAt < st.StartedAt || st.FinishedAt < st.CreatedAt) || st.State == running && st.StartedAt < st.CreatedAt {
		h.violateLocked("container %.12s: created at %d, started at %d, finished at %d", id, st.CreatedAt, st.StartedAt, st.FinishedAt)
	}
	if st.State == exited {
		if o.state == exited && st.ExitCode != o.exit {
			h.violateLocked("container %.12s: exit code %d became %d", id, o.exit, st.ExitCode)
		}
		h.judgeLocked(id, o, st)
		o.exit = st.ExitCode
	}
	o.state = st.State
}

// judgeLocked says whether a container may have ended in this way.
func (h *history) judgeLocked(id string, o *object, st *runtime.ContainerStatus) {
	byShim := h.killed[id] && st.ExitCode == 255 && strings.Contains(st.Message, "shim")
	switch {
	case byShim, st.ExitCode == o.code && o.starting:
	case st.ExitCode == 137 && o.stopping:
	case st.ExitCode == 2 && o.stopping && o.starting:
		// The stop signal came before the program: the OCI runtime's init, a
		// Go program with process ID 1, ends with 2 then.
	case st.ExitCode == 128 && st.Reason == "StartError" && o.starting:
	default:
		h.violateLocked("container %.12s: exit code %d, reason %q, message %q; its own is %d, stop asked for: %v, shim killed: %v",
			id, st.ExitCode, st.Reason, st.Message, o.code, o.stopping, h.killed[id])
	}
}

// alive notes a call that only a running container answers.
func (h *history) alive(id string, from time.Time) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.answers++
	if o := h.objects[id]; o != nil && o.state == exited && o.finished < from.UnixNano() && o.finished != 0 {
		h.violateLocked("container %.12s: ran a command after it had ended", id)
	}
}

// podIs holds the status of a pod against the model.
func (h *history) podIs(id, ip string, isReady bool, from time.Time) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.answers++
	o := h.objects[id]
	if o == nil {
		return
	}
	if !o.gone.IsZero() && o.gone.Before(from) {
		h.violateLocked("pod %.12s is told after its removal", id)
	}
	if !isReady {
		if !o.stopping {
			h.violateLocked("pod %.12s is not ready, and nobody has stopped it", id)
		}
		return
	}
	if ip == "" || o.ip != "" && o.ip != ip {
		h.violateLocked("pod %.12s: address %q, was %q", id, ip, o.ip)
	}
	o.ip = ip
	for other, p := range h.objects {
		if other != id && p.ip == ip && !p.stopping && !o.stopping {
			h.violateLocked("pods %.12s and %.12s: both have the address %s", id, other, ip)
		}
	}
}

// list holds a list of pods or containers against the model.
func (h *history) list(pods bool, ids []string, from, to time.Time) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.answers++
	for id, o := range h.objects {
		if (o.pod == "") != pods {
			continue
		}
		there := slices.Contains(ids, id)
		if !there && o.born.Before(from) && (o.doomed.IsZero() || o.doomed.After(to)) {
			h.violateLocked("%.12s is missing in a list", id)
		}
		if there && !o.gone.IsZero() && o.gone.Before(from) {
			h.violateLocked("%.12s is listed after its removal", id)
		}
	}
	if c := slices.Compact(slices.Sorted(slices.Values(ids))); len(c) != len(ids) {
		h.violateLocked("a list names an object twice: %q", ids)
	}
}

// forget drops what was removed a while ago, so that a long soak does not slow
// down.
func (h *history) forget(before time.Time) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for id, o := range h.objects {
		if !o.gone.IsZero() && o.gone.Before(before) {
			delete(h.objects, id)
			delete(h.killed, id)
		}
	}
}

func (h *history) kill(id string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.killed[id] = true
}

func (h *history) wasKilled(id string) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.killed[id]
}
