package sandbox

import (
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"testing"

	"github.com/berthd/berth/store"
)

func mustBook(t *testing.T) *book {
	t.Helper()
	st, err := store.Open(filepath.Join(t.TempDir(), "book.db"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { st.Close() })
	b := newBook(st)
	if err := b.load(); err != nil {
		t.Fatal(err)
	}
	return b
}

func TestBookPublishesWhatItCommitted(t *testing.T) {
	b := mustBook(t)
	pod := podRow{ID: newID(), State: StateReady, Created: 1}
	if _, err := b.insertPod(pod); err != nil {
		t.Fatal(err)
	}
	before := b.view()
	var wg sync.WaitGroup
	const n = 50
	ids := make([]string, n)
	for i := range n {
		ids[i] = newID()
		wg.Go(func() {
			r := containerRow{ID: ids[i], PodID: pod.ID, State: StateCreating, Created: int64(i + 2)}
			if _, err := b.insertContainer(r); err != nil {
				t.Error(err)
			}
			for range 5 {
				if _, err := b.updateContainer(ids[i], func(_ *store.Tx, r *containerRow) error { r.Pid++; return nil }); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if len(before.containers) != 0 {
		t.Error("a view changed after it was handed out")
	}
	v := b.view()
	if len(v.byPod[pod.ID]) != n {
		t.Fatalf("got %d containers of the pod, want %d", len(v.byPod[pod.ID]), n)
	}
	for i, c := range v.byPod[pod.ID] {
		if c.Pid != 5 || c.Rev != 5 {
			t.Errorf("container %d: pid %d, rev %d; want 5, 5: an older state was published later", i, c.Pid, c.Rev)
		}
		if i > 0 && c.Created <= v.byPod[pod.ID][i-1].Created {
			t.Errorf("container %d is not newer than the one before", i)
		}
	}
	again := newBook(b.st)
	if err := again.load(); err != nil {
		t.Fatal(err)
	}
	if got, want := fmt.Sprint(len(again.view().containers)), fmt.Sprint(n); got != want {
		t.Errorf("loaded %s containers, want %s", got, want)
	}
}

func TestNoContainerInAStoppingPod(t *testing.T) {
	b := mustBook(t)
	for name, r := range map[string]podRow{
		"not ready": {ID: newID(), State: StateNotReady},
		"removing":  {ID: newID(), State: StateReady, Removing: true},
	} {
		if _, err := b.insertPod(r); err != nil {
			t.Fatal(err)
		}
		_, err := b.insertContainer(containerRow{ID: newID(), PodID: r.ID})
		if !errors.Is(err, ErrState) {
			t.Errorf("%s: got %v, want ErrState", name, err)
		}
	}
	if _, err := b.insertContainer(containerRow{ID: newID(), PodID: newID()}); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("no pod: got %v, want ErrNotFound", err)
	}
	if n := len(b.view().containers); n != 0 {
		t.Errorf("%d containers in the view, want none", n)
	}
}
