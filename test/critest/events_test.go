package critest

import (
	"context"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// follower collects the events of an endpoint.
type follower struct {
	*box
	mu     sync.Mutex
	events []*runtime.ContainerEventResponse
}

func (b *box) follow() *follower {
	b.Helper()
	ctx, cancel := context.WithCancel(b.ctx)
	b.Cleanup(cancel)
	st, err := b.client.GetContainerEvents(ctx, &runtime.GetEventsRequest{})
	b.must(err)
	if b.node != nil { // the headers tell that events are followed
		_, err = st.Header()
		b.must(err)
	} else {
		time.Sleep(time.Second)
	}
	f := &follower{box: b}
	go func() {
		for {
			e, err := st.Recv()
			if err != nil {
				return
			}
			f.mu.Lock()
			f.events = append(f.events, e)
			f.mu.Unlock()
		}
	}()
	return f
}

// of returns the events about IDs so far, and what each says: "C created".
func (f *follower) of(names map[string]string) (list []*runtime.ContainerEventResponse, words []string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, e := range f.events {
		if n, ok := names[e.ContainerId]; ok {
			kind := strings.ToLower(strings.TrimSuffix(strings.TrimPrefix(e.ContainerEventType.String(), "CONTAINER_"), "_EVENT"))
			list, words = append(list, e), append(words, n+" "+kind)
		}
	}
	return list, words
}

// expect waits for exactly these events.
func (f *follower) expect(names map[string]string, want ...string) []*runtime.ContainerEventResponse {
	f.Helper()
	f.until("events "+strings.Join(want, ", "), func() bool { _, w := f.of(names); return len(w) >= len(want) })
	list, got := f.of(names)
	if !slices.Equal(got, want) {
		f.Errorf("events %q, want %q", got, want)
	}
	return list
}

func TestEvents(t *testing.T) {
	b := open(t)
	f := b.follow()
	p := b.pod()
	c := p.create(sh("sleep 300"))
	names := map[string]string{p.id: "pod", c.id: "container"}
	f.expect(names, "pod created", "pod started", "container created")
	c.start()
	list := f.expect(names, "pod created", "pod started", "container created", "container started")
	// An event shows what the status shows.
	e, st := list[3], c.status()
	if len(e.ContainersStatuses) != 1 || !proto.Equal(e.ContainersStatuses[0], st) {
		t.Errorf("the start of the container shows %v, its status %v", e.ContainersStatuses, st)
	}
	if !proto.Equal(e.PodSandboxStatus, p.status()) {
		t.Errorf("the start of the container shows %v, the pod's status %v", e.PodSandboxStatus, p.status())
	}
	c.stop(0)
	p.stop()
	c.remove()
	_, err := b.client.RemovePodSandbox(b.ctx, &runtime.RemovePodSandboxRequest{PodSandboxId: p.id})
	b.must(err)
	list = f.expect(names, "pod created", "pod started", "container created", "container started",
		"container stopped", "pod stopped", "container deleted", "pod deleted")
	for i, e := range list {
		if i > 0 && e.CreatedAt <= list[i-1].CreatedAt {
			t.Errorf("event %d at %d, the one before at %d", i, e.CreatedAt, list[i-1].CreatedAt)
		}
		if e.GetPodSandboxStatus().GetMetadata().GetUid() != p.cfg.Metadata.Uid {
			t.Errorf("event %d: pod %v", i, e.PodSandboxStatus)
		}
	}
	if len(list) == 8 {
		if s := list[4].ContainersStatuses; len(s) != 1 || s[0].State != runtime.ContainerState_CONTAINER_EXITED || s[0].ExitCode != 137 {
			t.Errorf("the stop of the container shows %v", s)
		}
		if s := list[7].PodSandboxStatus; s.State != runtime.PodSandboxState_SANDBOX_NOTREADY || len(list[7].ContainersStatuses) != 0 {
			t.Errorf("the end of the pod shows %v with %v", s, list[7].ContainersStatuses)
		}
	}
}

// TestEventsOfShortLife: a container that ends at once has started all the same,
// and a pod that is removed while its containers run tells of all ends.
func TestEventsOfShortLife(t *testing.T) {
	b := open(t)
	b.ours()
	f := b.follow()
	p := b.pod()
	for range 5 {
		c := p.run([]string{"/bin/true"})
		c.wait()
		f.expect(map[string]string{c.id: "c"}, "c created", "c started", "c stopped")
	}
	never := p.create(sh("true"))
	never.remove()
	f.expect(map[string]string{never.id: "c"}, "c created", "c stopped", "c deleted")
	running := p.run(sh("sleep 300"))
	_, err := b.client.RemovePodSandbox(b.ctx, &runtime.RemovePodSandboxRequest{PodSandboxId: p.id})
	b.must(err)
	f.expect(map[string]string{running.id: "c", p.id: "pod"}, "pod created", "pod started", "c created", "c started", "c stopped", "pod stopped", "c deleted", "pod deleted")
}

// TestEventsOfFailure: what never became visible has no events.
func TestEventsOfFailure(t *testing.T) {
	b := open(t)
	b.ours()
	f := b.follow()
	p := b.pod()
	before := len(f.all())
	p.refuses([]string{"/no/such/program"}, func(*runtime.ContainerConfig) {}, "/no/such/program")
	c := p.run(sh("sleep 300"))
	f.expect(map[string]string{c.id: "c"}, "c created", "c started")
	for _, e := range f.all()[before:] {
		if e.PodSandboxStatus.GetId() == p.id && e.ContainerId != p.id && e.ContainerId != c.id && len(e.ContainersStatuses) == 0 {
			t.Errorf("an event of a container that was never there: %v", e)
		}
	}
}

func (f *follower) all() []*runtime.ContainerEventResponse {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.events)
}

// TestEventsTwoFollowers: each gets everything, and one that leaves costs the
// other nothing.
func TestEventsTwoFollowers(t *testing.T) {
	b := open(t)
	stays := b.follow()
	ctx, leave := context.WithCancel(b.ctx)
	st, err := b.client.GetContainerEvents(ctx, &runtime.GetEventsRequest{})
	b.must(err)
	go func() { _, _ = st.Recv() }()
	leave()
	p := b.pod()
	also := b.follow()
	c := p.run(sh("sleep 300"))
	names := map[string]string{c.id: "c"}
	stays.expect(names, "c created", "c started")
	also.expect(names, "c created", "c started")
	if _, w := also.of(map[string]string{p.id: "pod"}); len(w) != 0 {
		t.Errorf("events of the past: %q", w)
	}
}
