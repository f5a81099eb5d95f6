package sandbox

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
)

// A pod that was stopped does not come back as ready when its row is lost, also if
// it had nothing but the host's namespaces.
func TestNoteOfAStop(t *testing.T) {
	for _, tc := range []struct {
		name      string
		state     State
		unwritten bool // the note cannot be written
		want      podVerdict
		none      bool
	}{
		{name: "ready", state: StateReady, want: podVerdict{teardown: true, notReady: "stopped"}},
		{name: "not ready", state: StateNotReady, want: podVerdict{teardown: true, notReady: "stopped"}},
		{name: "note cannot be written", state: StateReady, unwritten: true, none: true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := &Service{book: mustBook(t), cfg: Config{RunDir: t.TempDir()}}
			id := newID()
			dir := s.podDir(id)
			if err := os.MkdirAll(dir, 0o700); err != nil {
				t.Fatal(err)
			}
			p, err := s.book.insertPod(podRow{ID: id, State: StateCreating, HostNetwork: true, Created: after(0)})
			if err != nil {
				t.Fatal(err)
			}
			if err := s.noteStop(p); err != nil || exists(filepath.Join(dir, noteFile)) {
				t.Errorf("pod half made: %v; want no note", err)
			}
			if err := s.writePodNote(id); err != nil {
				t.Fatal(err)
			}
			if r, err := readNote[podRow](dir); err != nil || r.State != StateReady || r.Stopping {
				t.Fatalf("first note: %s, stopping %v, %v; want ready", r.State, r.Stopping, err)
			}
			if tc.unwritten {
				if err := os.Mkdir(filepath.Join(dir, noteFile+".new"), 0o700); err != nil {
					t.Fatal(err)
				}
			}
			if p, err = s.book.updatePod(id, func(r *podRow) error { r.State = tc.state; return nil }); err != nil {
				t.Fatal(err)
			}
			if err := s.noteStop(p); err != nil {
				t.Fatal(err)
			}
			r, err := readNote[podRow](dir)
			if tc.none {
				if !errors.Is(err, os.ErrNotExist) {
					t.Errorf("note: %+v, %v; want none rather than one of a ready pod", r, err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if got := decidePod(r, podObserved{sameBoot: true, pinned: true}); got != tc.want {
				t.Errorf("pod restored from its note: %+v, want %+v", got, tc.want)
			}
		})
	}
}
