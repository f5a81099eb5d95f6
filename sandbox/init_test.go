package sandbox

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// initService is a service with a run directory and the bundle of an init.
func initService(t *testing.T) (s *Service, podID string) {
	t.Helper()
	s = &Service{book: mustBook(t), live: newLive(), cfg: Config{RunDir: t.TempDir()}}
	podID = newID()
	for _, d := range []string{"s", "c/" + podID} {
		if err := os.MkdirAll(filepath.Join(s.cfg.RunDir, d), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	return s, podID
}

func TestInitLives(t *testing.T) {
	s, id := initService(t)
	if err := s.initLives(id); err == nil || !strings.Contains(err.Error(), "shim") {
		t.Errorf("neither a record nor a shim: got %v, want an error about the shim", err)
	}
	for text, want := range map[string]string{
		"berth-exit 1\ncode 3\nsignal 0\nat 1.000000000\nend\n": "code 3",
		"berth-exit 1\ncode 3\n":                                "exit record",
	} {
		if err := os.WriteFile(s.initExit(id), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := s.initLives(id); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("record %q: got %v, want %q", text, err, want)
		}
	}
}

// What is left of other versions goes, unless a pod still runs it.
func TestSweepInits(t *testing.T) {
	s, id := initService(t)
	inits := filepath.Join(s.cfg.RunDir, "init")
	s.initDir = filepath.Join(inits, "now")
	for _, d := range []string{"now", "used", "old/proc", ".new-123/dev"} {
		if err := os.MkdirAll(filepath.Join(inits, d), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	for _, r := range []podRow{{ID: id, Init: true}, {ID: newID(), Init: true}, {ID: newID()}} {
		if _, err := s.book.insertPod(r); err != nil {
			t.Fatal(err)
		}
	}
	s.noted = map[string]bool{newID(): true} // a pod that may run any of them
	if dirs, err := s.staleInits(); len(dirs) > 0 || err != nil {
		t.Errorf("with a pod that only its note tells of: %q, %v", dirs, err)
	}
	s.noted = nil
	config := filepath.Join(s.bundleDir(id), "config.json")
	for _, tc := range []struct {
		text, want string
		ok         bool
	}{
		{`{`, ".new-123 now old used", false}, // not known: nothing is touched
		{`{"process":{},"root":{"path":"` + inits + `/used"}}`, "now used", true},
	} {
		if err := os.WriteFile(config, []byte(tc.text), 0o600); err != nil {
			t.Fatal(err)
		}
		err := s.sweepInits()
		if got := strings.Join(names(inits), " "); got != tc.want || (err == nil) != tc.ok {
			t.Errorf("got %q, %v; want %q, ok %v", got, err, tc.want, tc.ok)
		}
	}
}
