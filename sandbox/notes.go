package sandbox

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
)

// A note is a copy of a row beside the effects of its object, in the run
// directory. It is written when the object has become usable, and for a pod again
// when it gets an init, and read only if the row is lost: it is not a second
// truth but a message to whoever has to start again without the first one.

const noteFile = "note.json"

func (s *Service) writePodNote(id string) error {
	p, ok := s.book.view().pods[id]
	if !ok {
		return ErrNotFound
	}
	r := p.podRow
	r.State = StateReady
	return writeNote(s.podDir(id), r)
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
		path := filepath.Join(dir, e.Name(), noteFile)
		text, err := readBounded(path, 2*maxConfig)
		if err == nil && len(text) == 0 {
			continue // half made, or an init's bundle
		}
		var r T
		if err == nil {
			err = json.Unmarshal(text, &r)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("note %s: %w", path, err))
			continue
		}
		rows = append(rows, r)
	}
	return rows, errs
}
