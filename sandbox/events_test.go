package sandbox

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berthd/berth/sandbox/cgroup"
	"github.com/berthd/berth/store"
)

// story plays commits against a book and tells what a follower hears.
type story struct {
	t *testing.T
	s *Service
	f *follower
}

func newStory(t *testing.T) *story {
	t.Helper()
	s := &Service{book: mustBook(t), cfg: Config{CgroupDriver: cgroup.Cgroupfs}}
	f, err := s.book.events.add()
	if err != nil {
		t.Fatal(err)
	}
	return &story{t: t, s: s, f: f}
}

func (y *story) must(err error) {
	y.t.Helper()
	if err != nil {
		y.t.Fatal(err)
	}
}

func (y *story) podIs(id string, state State, removing bool) {
	y.t.Helper()
	b := y.s.book
	if b.view().pods[id] == nil {
		_, err := b.insertPod(podRow{ID: id, State: StateCreating, Created: after(0)})
		y.must(err)
	}
	_, err := b.updatePod(id, func(r *podRow) error { r.State, r.Removing = state, removing; return nil })
	y.must(err)
}

func (y *story) containerIs(id, pod string, state State, started bool) {
	y.t.Helper()
	b := y.s.book
	if b.view().containers[id] == nil {
		_, err := b.insertContainer(containerRow{ID: id, PodID: pod, State: StateCreating, Created: after(0)})
		y.must(err)
	}
	_, err := b.updateContainer(id, func(_ *store.Tx, r *containerRow) error {
		r.State = state
		if started {
			r.Started = 1
		}
		return nil
	})
	y.must(err)
}

var words = map[runtime.ContainerEventType]string{created: "created", started: "started", stopped: "stopped", deleted: "deleted"}

// hears returns the events since the last call as "id word", with the states that
// each one carries.
func (y *story) hears() (words1, shown []string) {
	y.t.Helper()
	var last int64
	for {
		select {
		case e := <-y.f.queue:
			r := y.s.eventResponse(e)
			words1 = append(words1, r.ContainerId+" "+words[r.ContainerEventType])
			show := strings.ToLower(strings.TrimPrefix(r.GetPodSandboxStatus().GetState().String(), "SANDBOX_"))
			for _, c := range r.ContainersStatuses {
				show += " " + c.Id + ":" + strings.ToLower(strings.TrimPrefix(c.State.String(), "CONTAINER_"))
			}
			shown = append(shown, show)
			if r.CreatedAt <= last {
				y.t.Errorf("%s at %d, not after %d", words1[len(words1)-1], r.CreatedAt, last)
			}
			last = r.CreatedAt
		default:
			return words1, shown
		}
	}
}

func (y *story) expect(what string, want ...string) {
	y.t.Helper()
	if got, _ := y.hears(); !slices.Equal(got, want) {
		y.t.Errorf("%s: heard %q, want %q", what, got, want)
	}
}

func TestEventsOfALife(t *testing.T) {
	y := newStory(t)
	y.podIs("p", StateCreating, false)
	y.expect("pod half made")
	y.podIs("p", StateReady, false)
	y.expect("pod ready", "p created", "p started")
	y.podIs("p", StateReady, false)
	y.expect("no change")
	y.containerIs("c", "p", StateCreating, false)
	y.expect("container half made")
	y.containerIs("c", "p", StateCreated, false)
	y.containerIs("c", "p", StateRunning, true)
	got, shown := y.hears()
	if !slices.Equal(got, []string{"c created", "c started"}) || !slices.Equal(shown, []string{"ready c:created", "ready c:running"}) {
		t.Errorf("container: heard %q with %q", got, shown)
	}
	y.podIs("p", StateNotReady, false)
	y.expect("pod stopped with a live container")
	y.containerIs("c", "p", StateExited, true)
	got, shown = y.hears()
	if !slices.Equal(got, []string{"c stopped", "p stopped"}) || !slices.Equal(shown, []string{"notready c:exited", "notready c:exited"}) {
		t.Errorf("container ended: heard %q with %q", got, shown)
	}
	y.must(y.s.book.deleteContainer("c"))
	y.must(y.s.book.deletePod("p"))
	got, shown = y.hears()
	if !slices.Equal(got, []string{"c deleted", "p deleted"}) || !slices.Equal(shown, []string{"notready", "notready"}) {
		t.Errorf("removal: heard %q with %q", got, shown)
	}
	y.must(y.s.book.deletePod("p"))
	y.must(y.s.book.deleteContainer("c"))
	y.expect("removal of what is gone")
}

func TestEventsOfShortLives(t *testing.T) {
	y := newStory(t)
	y.podIs("p", StateReady, false)
	y.podIs("q", StateReady, false)
	y.hears()
	y.containerIs("fast", "p", StateCreated, false)
	y.containerIs("fast", "p", StateExited, true)
	y.expect("ended before its start was recorded", "fast created", "fast started", "fast stopped")
	y.containerIs("never", "p", StateCreated, false)
	y.containerIs("never", "p", StateExited, false)
	y.expect("never started", "never created", "never stopped")
	y.containerIs("live", "p", StateRunning, true)
	y.hears()
	y.must(y.s.book.deleteContainer("live"))
	y.expect("removed while it runs", "live stopped", "live deleted")
	y.containerIs("half", "p", StateCreating, false)
	y.must(y.s.book.deleteContainer("half"))
	y.expect("undone before it was visible")

	y.podIs("q", StateNotReady, false)
	y.expect("empty pod stopped", "q stopped")
	y.podIs("q", StateNotReady, true)
	y.expect("pod being removed")
	y.must(y.s.book.deletePod("q"))
	y.expect("pod removed", "q deleted")
	y.podIs("r", StateReady, false)
	y.hears()
	y.must(y.s.book.deletePod("r"))
	got, shown := y.hears()
	if !slices.Equal(got, []string{"r stopped", "r deleted"}) || !slices.Equal(shown, []string{"notready", "notready"}) {
		t.Errorf("ready pod removed: heard %q with %q", got, shown)
	}
	y.podIs("s", StateCreating, false)
	y.must(y.s.book.deletePod("s"))
	y.expect("pod undone before it was visible")
}

// TestFollowerBehind: a follower that does not take its events is cut off, also
// while it blocks in send, and costs the others nothing.
func TestFollowerBehind(t *testing.T) {
	y := newStory(t)
	y.podIs("p", StateReady, false)
	stuck, got := make(chan struct{}), make(chan int, 1)
	result := make(chan error, 1)
	begun := make(chan struct{})
	go func() {
		n := 0
		result <- y.s.FollowEvents(context.Background(), func() error { close(begun); return nil }, func(*runtime.ContainerEventResponse) error {
			if n++; n == 1 {
				got <- n
				<-stuck
			}
			return nil
		})
	}()
	<-begun
	for i := range maxWaiting/2 + 5 {
		y.s.book.events.publish([]event{{kind: created, id: fmt.Sprint(i)}, {kind: deleted, id: fmt.Sprint(i)}})
		y.hears()
	}
	if err := <-result; !errors.Is(err, ErrBehind) {
		t.Errorf("slow follower: %v", err)
	}
	if n := <-got; n != 1 {
		t.Errorf("%d events sent", n)
	}
	close(stuck)
	y.podIs("p", StateNotReady, false)
	y.expect("the other follower", "p stopped")
}

func TestFollowers(t *testing.T) {
	y := newStory(t)
	ctx, cancel := context.WithCancel(t.Context())
	refused := errors.New("client gone")
	if err := y.s.FollowEvents(ctx, func() error { return refused }, nil); err != refused {
		t.Errorf("client gone at once: %v", err)
	}
	var all sync.WaitGroup
	for range maxFollowers - 1 { // the story has one
		ready := make(chan struct{})
		all.Go(func() {
			if err := y.s.FollowEvents(ctx, func() error { close(ready); return nil }, nil); !errors.Is(err, context.Canceled) {
				t.Errorf("client gone: %v", err)
			}
		})
		<-ready
	}
	if err := y.s.FollowEvents(ctx, func() error { return nil }, nil); !errors.Is(err, ErrFollowers) {
		t.Errorf("one too many: %v", err)
	}
	cancel()
	all.Wait()
	y.podIs("p", StateReady, false)
	fail := errors.New("broken pipe")
	err := y.s.FollowEvents(t.Context(), func() error {
		go y.s.book.events.publish([]event{{kind: created, id: "x"}})
		return nil
	}, func(*runtime.ContainerEventResponse) error { return fail })
	if err != fail {
		t.Errorf("send failed: %v", err)
	}
	y.s.book.events.close()
	if err := y.s.FollowEvents(t.Context(), func() error { return nil }, nil); !errors.Is(err, ErrBusy) {
		t.Errorf("daemon stopping: %v", err)
	}
	select {
	case <-y.f.cut:
	case <-time.After(10 * time.Second):
		t.Error("a follower outlives the daemon")
	}
}
