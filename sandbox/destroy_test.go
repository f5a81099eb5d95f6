package sandbox

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/berthd/berth/sandbox/cgroup"
	"github.com/berthd/berth/snapshotter"
	"github.com/berthd/berth/store"
)

// layers is a snapshotter that only removes.
type layers struct {
	snapshotter.Snapshotter
	removed []string
}

func (l *layers) Remove(_ context.Context, key string) error {
	l.removed = append(l.removed, key)
	return nil
}

// A book that cannot be written is no reason to leave a container as it is; what
// is asked for once is done when it can.
func TestDestroyWithoutAMark(t *testing.T) {
	l := &layers{}
	st, err := store.Open(filepath.Join(t.TempDir(), "book.db"))
	if err != nil {
		t.Fatal(err)
	}
	s := &Service{book: newBook(st), ops: newOps(), live: newLive(), stats: newStatsCache(), forwards: newForwards(),
		wake: make(chan struct{}, 1), ctx: t.Context(), runtimes: map[string]ociRuntime{}, deps: Deps{Store: st, Snapshots: l},
		cfg: Config{RunDir: t.TempDir(), StateDir: t.TempDir(), PodTimeout: time.Minute, ContainerTimeout: time.Minute, CgroupDriver: cgroup.Cgroupfs}}
	if err := s.book.load(); err != nil {
		t.Fatal(err)
	}
	pod, id := newID(), newID()
	if _, err := s.book.insertPod(podRow{ID: pod, State: StateReady, Created: after(0)}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.book.insertContainer(containerRow{ID: id, PodID: pod, State: StateExited, Created: after(0)}); err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{s.bundleDir(id), s.stateDir(id), filepath.Dir(s.socket(id))} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	st.Close()
	err = s.RemovePod(t.Context(), pod)
	if err == nil {
		t.Error("the pod is gone without a book")
	}
	if exists(s.bundleDir(id)) || exists(s.stateDir(id)) || !slices.Equal(l.removed, []string{id}) {
		t.Errorf("bundle there: %v, state there: %v, snapshots removed: %v; want all of it gone",
			exists(s.bundleDir(id)), exists(s.stateDir(id)), l.removed)
	}
	v := s.book.view()
	for _, id := range []string{pod, id} {
		if !s.due(id, false) {
			t.Errorf("the janitor does not know that %s is to go", id)
		}
	}
	if v.pods[pod] == nil || v.containers[id] == nil {
		t.Error("readers are told what is not in the book")
	}
	if err := s.RemovePod(t.Context(), newID()); err != nil && !errors.Is(err, ErrNotFound) {
		t.Errorf("a pod that there is not: %v", err)
	}
}
