package sandbox

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Events are what the commits of the book mean to whoever follows pods and
// containers: created, started, stopped, deleted. They are made from two views,
// the ones before and after a commit, and carry what Status shows in the second; so
// an event can neither be forgotten at some place of the code nor tell of a
// state that Status does not show yet.
//
// A pod that is ready was created and started, in this order. It has stopped
// when it is not ready and none of its containers lives, so that the stop of a
// pod comes after those of its containers. An object is deleted when its row
// goes. What never became visible has no events.

// Bounds of following: how many events may wait for a follower, and how many
// followers there may be.
const (
	maxWaiting   = 1024
	maxFollowers = 64
)

// Errors of FollowEvents.
var (
	// ErrBehind: more events happened than the follower has taken. It has to
	// list anew.
	ErrBehind = errors.New("follower is too slow")
	// ErrFollowers: there are too many followers already.
	ErrFollowers = errors.New("too many followers of events")
)

// event is one change, with the parts of the view that it was published with.
type event struct {
	kind       runtime.ContainerEventType
	id         string // of the container or pod
	at         int64  // ns since 1970, later than that of every earlier event
	pod        *pod   // nil if nobody knows it
	containers []*container
}

// clock tells times that only grow, also when the machine's clock is set back: the
// kubelet takes the later one of a pod's events and statuses for the newer one.
type clock struct{ last atomic.Int64 } // ns since 1970

func (c *clock) next() int64 {
	for {
		last := c.last.Load()
		if now := after(last); c.last.CompareAndSwap(last, now) {
			return now
		}
	}
}

// atLeast makes the next time later than t.
func (c *clock) atLeast(t int64) {
	for last := c.last.Load(); last < t && !c.last.CompareAndSwap(last, t); last = c.last.Load() {
	}
}

// hub hands events to followers. It never waits for one.
type hub struct {
	mu        sync.Mutex
	followers map[*follower]bool
	clock     clock
	closed    bool
}

func newHub() *hub { return &hub{followers: map[*follower]bool{}} }

// publish queues events in their order. Callers are ordered by the book's lock.
func (h *hub) publish(events []event) {
	if len(events) == 0 {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	for i := range events {
		events[i].at = h.clock.next()
		for f := range h.followers {
			select {
			case f.queue <- events[i]:
			default:
				h.cutLocked(f, fmt.Errorf("%w: %d events wait for it", ErrBehind, maxWaiting))
			}
		}
	}
}

func (h *hub) cutLocked(f *follower, why error) {
	if h.followers[f] {
		delete(h.followers, f)
		f.why = why
		close(f.cut)
	}
}

func (h *hub) close() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.closed = true
	for f := range h.followers {
		h.cutLocked(f, errClosing)
	}
}

// follower is somebody's place in the stream of events.
type follower struct {
	queue chan event
	cut   chan struct{} // closed when no more events come
	why   error         // set before cut is closed
}

func (h *hub) add() (*follower, error) {
	f := &follower{queue: make(chan event, maxWaiting), cut: make(chan struct{})}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		return nil, errClosing
	}
	if len(h.followers) >= maxFollowers {
		return nil, fmt.Errorf("%w: limit %d", ErrFollowers, maxFollowers)
	}
	h.followers[f] = true
	return f, nil
}

func (h *hub) remove(f *follower) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.cutLocked(f, context.Canceled)
}

// FollowEvents gives every event from now on to send, in order and one at a time.
// begun is called first, when nothing can be missed any more. It returns when ctx
// ends, when one of the two fails, and with ErrBehind when more events have
// happened than send has taken; then the last call of send may still be under way,
// and what it blocks on is the caller's to end.
func (s *Service) FollowEvents(ctx context.Context, begun func() error, send func(*runtime.ContainerEventResponse) error) error {
	f, err := s.book.events.add()
	if err != nil {
		return err
	}
	defer s.book.events.remove(f)
	if err := begun(); err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() { ended <- s.forward(ctx, f, send) }()
	select {
	case err := <-ended:
		return err
	case <-f.cut:
		return f.why
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (s *Service) forward(ctx context.Context, f *follower, send func(*runtime.ContainerEventResponse) error) error {
	for {
		select {
		case <-f.cut:
			return f.why
		case <-ctx.Done():
			return ctx.Err()
		case e := <-f.queue:
			if err := send(s.eventResponse(e)); err != nil {
				return err
			}
		}
	}
}

func (s *Service) eventResponse(e event) *runtime.ContainerEventResponse {
	out := &runtime.ContainerEventResponse{ContainerId: e.id, ContainerEventType: e.kind, CreatedAt: e.at}
	if e.pod != nil {
		st := s.podStatus(e.pod, e.containers, e.at)
		out.PodSandboxStatus, out.ContainersStatuses = st.Status, st.ContainersStatuses
	}
	return out
}

const (
	created = runtime.ContainerEventType_CONTAINER_CREATED_EVENT
	started = runtime.ContainerEventType_CONTAINER_STARTED_EVENT
	stopped = runtime.ContainerEventType_CONTAINER_STOPPED_EVENT
	deleted = runtime.ContainerEventType_CONTAINER_DELETED_EVENT
)

// podEvents are the events of a commit that changed the row of a pod.
func podEvents(id string, old, now *view) []event {
	was, is := old.pods[id], now.pods[id]
	var kinds []runtime.ContainerEventType
	switch {
	case is == nil && was.known():
		if !stoppedPod(old, id) {
			kinds = append(kinds, stopped)
		}
		kinds = append(kinds, deleted)
	case is != nil && is.known():
		if !was.known() {
			kinds = append(kinds, created, started)
		}
		if !stoppedPod(old, id) && stoppedPod(now, id) {
			kinds = append(kinds, stopped)
		}
	}
	show, containers := is, now.byPod[id]
	if is == nil {
		show = was
	}
	out := make([]event, 0, len(kinds))
	for _, k := range kinds {
		out = append(out, event{kind: k, id: id, pod: gone(show, k), containers: containers})
	}
	return out
}

// gone is the pod as an event shows it: one that was deleted or stopped is not
// ready, whatever its last row says.
func gone(p *pod, kind runtime.ContainerEventType) *pod {
	if (kind != stopped && kind != deleted) || p.State == StateNotReady {
		return p
	}
	c := *p
	c.State = StateNotReady
	return &c
}

// containerEvents are the events of a commit that changed the row of a container,
// and of its pod if that has stopped with it.
func containerEvents(id string, old, now *view) []event {
	was, is := old.containers[id], now.containers[id]
	podID := ""
	var kinds []runtime.ContainerEventType
	switch {
	case is != nil:
		podID = is.PodID
		for _, s := range []struct {
			rank int
			kind runtime.ContainerEventType
		}{{1, created}, {2, started}, {3, stopped}} {
			if was.rank() < s.rank && s.rank <= is.rank() && (s.kind != started || is.Started != 0) {
				kinds = append(kinds, s.kind)
			}
		}
	case was != nil:
		podID = was.PodID
		if was.rank() > 0 && was.rank() < 3 {
			kinds = append(kinds, stopped)
		}
		if was.rank() > 0 {
			kinds = append(kinds, deleted)
		}
	}
	p, containers := now.pods[podID], now.byPod[podID]
	out := make([]event, 0, len(kinds)+1)
	for _, k := range kinds {
		out = append(out, event{kind: k, id: id, pod: p, containers: containers})
	}
	if p.known() && !stoppedPod(old, podID) && stoppedPod(now, podID) {
		out = append(out, event{kind: stopped, id: podID, pod: p, containers: containers})
	}
	return out
}

// known tells whether the pod was ever visible.
func (p *pod) known() bool { return p != nil && p.State != StateCreating }

// rank is how far a container has come in its life; 0 is not visible yet.
func (c *container) rank() int {
	if c == nil {
		return 0
	}
	return map[State]int{StateCreated: 1, StateRunning: 2, StateExited: 3}[c.State]
}

// stoppedPod tells whether a pod is not ready and none of its containers lives.
func stoppedPod(v *view, id string) bool {
	p := v.pods[id]
	if !p.known() || p.State == StateReady {
		return false
	}
	for _, c := range v.byPod[id] {
		if r := c.rank(); r == 1 || r == 2 {
			return false
		}
	}
	return true
}
