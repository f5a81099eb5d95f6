package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// berthdProgram puts a program berthd into PATH that prints text and ends.
func berthdProgram(t *testing.T, text string, code int) {
	t.Helper()
	dir := t.TempDir()
	script := fmt.Sprintf("#!/bin/sh\nexit %d\n", code)
	if text != "" {
		script = fmt.Sprintf("#!/bin/sh\ncat <<'END'\n%s\nEND\nexit %d\n", text, code)
	}
	if err := os.WriteFile(filepath.Join(dir, "berthd"), []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
}

// TestOpsDown: without a daemon it is said so, and shown what its book has.
func TestOpsDown(t *testing.T) {
	conf := filepath.Join(t.TempDir(), "berth.toml")
	if err := os.WriteFile(conf, []byte(fmt.Sprintf("run_dir = %q\n", t.TempDir())), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		answer string
		exit   int
		args   []string
		want   []string
		not    string
	}{
		"rows": {answer: `{"op":{"kind":"unfinished","what":"stop pod","name":"shop/web","age":0}}` + "\n" + `{"done":true}`,
			want: []string{"-     unfinished   stop pod   shop/web", "not reachable"}},
		"json":    {answer: `{"done":true}`, args: []string{"--json"}, want: []string{"[]", "not reachable"}, not: "nothing"},
		"nothing": {answer: `{"done":true}`, want: []string{"nothing was left unfinished", "not reachable"}, not: "under way"},
		"damage":  {answer: `{"done":true,"error":{"code":"failed","text":"book: corrupt"}}`, want: []string{"book: corrupt", "not reachable"}, not: "nothing"},
		"cut":     {answer: `{`, want: []string{"not reachable"}, not: "nothing"},
		"failed":  {exit: 1, want: []string{"not reachable"}, not: "nothing"},
	} {
		t.Run(name, func(t *testing.T) {
			berthdProgram(t, c.answer, c.exit)
			out, errOut, code := command(t, "", append([]string{"ops", "--config", conf}, c.args...)...)
			if code != exitUnreachable {
				t.Errorf("exit %d, want %d", code, exitUnreachable)
			}
			for _, w := range c.want {
				if !strings.Contains(out+errOut, w) {
					t.Errorf("%q %q, want %q", out, errOut, w)
				}
			}
			if c.not != "" && strings.Contains(out, c.not) {
				t.Errorf("%q has %q", out, c.not)
			}
		})
	}
}
