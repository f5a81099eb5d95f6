package sandbox

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/berthd/berth/store"
)

// A note is a copy of a row beside the effects of its object, in the run
// directory. It is written when the object has become usable, and for a pod again
// when it gets an init and when it is stopped, and read only if the row is lost: it
// is not a second truth but a message to whoever has to start again without the
// first one.

const noteFile = "note.json"

func (s *Service) writePodNote(id string) error {
	p, ok := s.book.view().pods[id]
	if !ok {
		return ErrNotFound
	}
	r := p.podRow
	if r.State == StateCreating {
		r.State = StateReady
	}
	return writeNote(s.podDir(id), r)
}

// noteStop has the note of a pod say that it is being stopped, which nothing else
// shows of a pod with the host's namespaces. Without a note a lost row makes a pod
// be swept, which is better than that it comes back as ready.
func (s *Service) noteStop(p *pod) error {
	if p.State == StateCreating {
		return nil
	}
	r := p.podRow
	r.State, r.Stopping = StateNotReady, true
	err := writeNote(s.podDir(p.ID), r)
	if err == nil {
		return nil
	}
	if e := os.Remove(filepath.Join(s.podDir(p.ID), noteFile)); e != nil && !errors.Is(e, os.ErrNotExist) {
		return errors.Join(err, e)
	}
	return nil
}

func writeNote(dir string, row any) error {
	text, err := json.Marshal(row)
	if err != nil {
		return fmt.Errorf("note: %w", err)
	}
	path := filepath.Join(dir, noteFile)
	if err := os.WriteFile(path+".new", text, 0o600); err != nil {
		return fmt.Errorf("note: %w", err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		return fmt.Errorf("note: %w", err)
	}
	return nil
}

// restoreRow puts the row of a note into a table. The error is os.ErrNotExist if
// there is no note.
func restoreRow[T interface{ key() string }](st *store.Store, table store.Table[T], id, dir string, check func(T) error) error {
	r, err := readNote[T](dir)
	if err == nil {
		err = check(r)
	}
	if err == nil && r.key() != id {
		err = errForeignRow
	}
	if err != nil {
		return fmt.Errorf("note in %s: %w", dir, err)
	}
	return st.Update(func(tx *store.Tx) error { return table.Put(tx, id, r) })
}

func (r podRow) key() string       { return r.ID }
func (r containerRow) key() string { return r.ID }

// readNote reads the note in a directory; os.ErrNotExist if there is none.
func readNote[T any](dir string) (r T, err error) {
	text, err := readBounded(filepath.Join(dir, noteFile), 2*maxConfig)
	if err == nil && len(text) == 0 {
		err = os.ErrNotExist
	}
	if err == nil {
		err = json.Unmarshal(text, &r)
	}
	return r, err
}

// readNotes reads the notes in the subdirectories of dir that are named by IDs.
func readNotes[T any](dir string) (rows []T, errs []error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, []error{err}
	}
	for _, e := range entries {
		if !validID(e.Name()) {
			continue
		}
		r, err := readNote[T](filepath.Join(dir, e.Name()))
		if errors.Is(err, os.ErrNotExist) {
			continue // half made, or an init's bundle
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("note of %s: %w", e.Name(), err))
			continue
		}
		rows = append(rows, r)
	}
	return rows, errs
}
