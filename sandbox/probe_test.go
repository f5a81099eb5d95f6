package sandbox

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// program writes an OCI runtime that says it has that version, and returns its
// path; more is run before that.
func program(t *testing.T, path, version, more string) string {
	t.Helper()
	if path == "" {
		path = filepath.Join(t.TempDir(), "runtime")
	}
	text := fmt.Sprintf("#!/bin/sh\necho x >>%s.runs\n%s\n[ $1 = features ] && exit 1\necho %q\n", path, more, version)
	// By rename, as a package manager does it: a new inode.
	if err := os.WriteFile(path+".new", []byte(text), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
	return path
}

func runs(t *testing.T, path string) int {
	t.Helper()
	b, err := os.ReadFile(path + ".runs")
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	return strings.Count(string(b), "x")
}

func TestProbeIsKept(t *testing.T) {
	path := program(t, "", "runc version 1.9.1", "")
	p := newProber(t.Context(), "h", path)
	if _, err := p.known(); !errors.Is(err, ErrRuntime) {
		t.Errorf("before the first probe: got %v, want ErrRuntime", err)
	}
	for range 5 {
		f, err := p.now(t.Context())
		if err != nil || f.Version != "runc version 1.9.1" || f.Path != path || f.Features != nil {
			t.Fatalf("got %+v, %v", f, err)
		}
	}
	if n := runs(t, path); n != 2 { // --version and features
		t.Errorf("ran the program %d times, want twice", n)
	}
	program(t, path, "runc version 1.9.2", "")
	if f, err := p.now(t.Context()); err != nil || f.Version != "runc version 1.9.2" {
		t.Errorf("after an upgrade: got %+v, %v; want the new version", f, err)
	}
	program(t, path, "runc version 1.0.3", "")
	if _, err := p.now(t.Context()); !errors.Is(err, ErrRuntime) || !strings.Contains(err.Error(), "too old") {
		t.Errorf("after a downgrade: got %v, want ErrRuntime and too old", err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if _, err := p.now(t.Context()); !errors.Is(err, ErrRuntime) {
		t.Errorf("after its removal: got %v, want ErrRuntime", err)
	}
	program(t, path, "runc version 1.9.3", "")
	if f, err := p.now(t.Context()); err != nil || f.Version != "runc version 1.9.3" {
		t.Errorf("installed again: got %+v, %v; want the new version", f, err)
	}
}

// A program that hangs keeps nobody from the verdict about the one before it.
func TestProbeOfAHangingRuntime(t *testing.T) {
	life, end := context.WithCancel(t.Context())
	path := program(t, "", "runc version 1.9.1", "")
	p := newProber(life, "h", path)
	if _, err := p.now(t.Context()); err != nil {
		t.Fatal(err)
	}
	program(t, path, "runc version 1.9.2", "exec sleep 60")
	for range 3 {
		begun := time.Now()
		f, err := p.verdict()
		if err != nil || f.Version != "runc version 1.9.1" {
			t.Errorf("got %+v, %v; want the last verdict", f, err)
		}
		if d := time.Since(begun); d > time.Second {
			t.Errorf("took %v, want no waiting", d)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := p.now(ctx); !errors.Is(err, ErrRuntime) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v, want ErrRuntime and the deadline", err)
	}
	end() // as the end of the daemon does
	<-p.refresh()
	if _, err := p.known(); !errors.Is(err, ErrRuntime) {
		t.Errorf("a probe that was ended: got %v, want ErrRuntime", err)
	}
}

func TestCheckVersion(t *testing.T) {
	for line, ok := range map[string]bool{
		"runc version 1.1.0": true, "runc version 1.1.5+ds1": true, "runc version v2.0.0-rc.1": true,
		"runc version 1.0.3": false, "runc version 0.9.9": false,
		"crun version 1.8.1": true, "runsc version release-20240101.0": true, "youki version 0.5.0": true, "": true,
	} {
		if err := checkVersion(line); (err == nil) != ok {
			t.Errorf("%q: got %v, want ok %v", line, err, ok)
		}
	}
}

func TestLastLine(t *testing.T) {
	for in, want := range map[string]string{
		"":                    "",
		"one\ntwo\n\n":        "two",
		"level=error msg=\"x": "level=error msg=\"x", // no such line
		`time="2026-01-02T03:04:05Z" level=error msg="write \"99\": out of range"`:          `write "99": out of range`,
		"a\n" + `time="2026-01-02T03:04:05Z" level=error msg="no such thing" more="fields"`: "no such thing",
		`time="2026-01-02T03:04:05Z" level=error msg=plain`:                                 "plain",
		strings.Repeat("x", 5000): strings.Repeat("x", 2048),
	} {
		if got := lastLine([]byte(in)); got != want {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
}
