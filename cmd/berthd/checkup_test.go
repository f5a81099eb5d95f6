package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"github.com/berthd/berth/cri/admin/api"
)

// TestCheckup: the command line gives the list as records, whatever is wrong, with the
// configuration and the daemon at its head.
func TestCheckup(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("TMPDIR", t.TempDir())
	for text, want := range map[string]api.Level{
		fmt.Sprintf("state_dir = %q\nrun_dir = %q\n", filepath.Join(dir, "s"), "/run/berth-test-none"): api.LevelOK,
		"nonsense = 1\n": api.LevelError,
	} {
		file := mustWrite(t, map[string]string{"berth.toml": text}).file
		var out, errOut bytes.Buffer
		if code := command([]string{"--inspect", "doctor", "--config", file}, &out, &errOut); code != 0 {
			t.Fatalf("exit %d: %s", code, errOut.String())
		}
		levels := map[string]api.Level{}
		var last api.Record
		for dec := json.NewDecoder(&out); dec.More(); {
			last = api.Record{}
			if err := dec.Decode(&last); err != nil {
				t.Fatal(err)
			}
			if last.Check != nil {
				levels[last.Check.Name] = last.Check.Level
			}
		}
		if !last.Done || last.Error != nil {
			t.Errorf("%q: the last record is %+v", text, last)
		}
		if levels["configuration"] != want || levels["kernel version"] == "" || levels["clock"] == "" {
			t.Errorf("%q: %v", text, levels)
		}
		if strings.Contains(errOut.String(), "CNI") {
			t.Errorf("log lines beside the list: %s", errOut.String())
		}
	}
}

// TestCheckupHeld: a daemon that has the run directory and does not answer is an error.
func TestCheckupHeld(t *testing.T) {
	c := defaults()
	c.RunDir = t.TempDir()
	var got []api.Check
	d := &daemonCheck{config: c, tell: func(k api.Check) { got = append(got, k) }}
	if pid, held := d.admin(t.Context()); pid != 0 || held || got[0].Level != api.LevelNote {
		t.Errorf("nobody: process %d, held %v, %+v", pid, held, got)
	}
	lock, err := lockDir(context.Background(), c.RunDir)
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	if pid, held := d.admin(t.Context()); pid != 0 || !held || got[1].Level != api.LevelError {
		t.Errorf("held: process %d, held %v, %+v", pid, held, got)
	}
}
