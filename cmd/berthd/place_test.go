package main

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// A process in other namespaces than the daemon's changes nothing in the same boot.
func TestPlace(t *testing.T) {
	c := &config{RunDir: t.TempDir()}
	if err := c.checkPlace(); err != nil {
		t.Errorf("nothing is noted: %v", err)
	}
	if err := c.notePlace(); err != nil {
		t.Fatal(err)
	}
	if err := c.checkPlace(); err != nil {
		t.Errorf("in the same namespaces: %v", err)
	}
	path := filepath.Join(c.RunDir, placeFile)
	now, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	p, err := here()
	if err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		from, to string
		want     error
	}{
		"mounts":         {p.Mounts, "mnt:[1]", errElsewhere},
		"processes":      {p.Processes, "pid:[1]", errElsewhere},
		"boot":           {p.Boot, "another", nil},
		"boot and place": {p.Mounts + `","pid":"` + p.Processes + `","boot":"` + p.Boot, `mnt:[1]","pid":"pid:[1]","boot":"another`, nil},
	} {
		text := strings.Replace(string(now), tc.from, tc.to, 1)
		if text == string(now) {
			t.Fatalf("%s: %s has no %s", name, now, tc.from)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		err := c.checkPlace()
		if !errors.Is(err, tc.want) || tc.want != nil && !strings.Contains(err.Error(), "nsenter -t 1 -m -p") {
			t.Errorf("other %s: %v, want %v", name, err, tc.want)
		}
	}
	if err := os.WriteFile(path, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := c.checkPlace(); err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("a file that is torn: %v, want an error that names it", err)
	}
}
