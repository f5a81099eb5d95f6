package main

import (
	"strings"
	"testing"
)

// TestDoctor: what berthd's program tells is shown, and errors are an exit code.
func TestDoctor(t *testing.T) {
	const fine = `{"check":{"name":"openat2","level":"ok","seen":"there"}}` + "\n" + `{"check":{"name":"berthd","level":"note","seen":"does not run","remedy":"start it"}}` + "\n"
	const bad = `{"check":{"name":"network","level":"error","seen":"no\u001b[31m","want":"one","remedy":"make one"}}` + "\n"
	for name, c := range map[string]struct {
		answer string
		exit   int
		args   []string
		code   int
		want   []string
		not    string
	}{
		"fine":  {answer: fine + `{"done":true}`, want: []string{"ok       openat2  there", "note     berthd   does not run", "do: start it", "errors 0, warnings 0, notes 1, ok 1"}},
		"bad":   {answer: fine + bad + `{"done":true}`, code: exitDamaged, want: []string{"error    network  no?[31m", "want: one", "do: make one", "errors 1", "the node has errors"}, not: "\x1b"},
		"quiet": {answer: fine + bad + `{"done":true}`, args: []string{"--quiet"}, code: exitDamaged, want: []string{"network", "ok 1"}, not: "openat2"},
		"json":  {answer: fine + `{"done":true}`, args: []string{"--json"}, want: []string{`"level": "note"`, `"errors": 0`, `"ok": 1`}},
		"cut":   {answer: strings.TrimSpace(fine), code: exitUnreachable, want: []string{"openat2", "ended in the middle"}},
		"empty": {code: exitUnreachable, want: []string{"ended in the middle"}, not: "ok 0"},
		"fails": {exit: 1, code: exitFailed},
		"usage": {args: []string{"--socket", "/s"}, code: exitUsage, want: []string{"--config"}},
	} {
		t.Run(name, func(t *testing.T) {
			berthdProgram(t, c.answer, c.exit)
			out, errOut, code := command(t, "", append([]string{"doctor"}, c.args...)...)
			if code != c.code {
				t.Errorf("exit %d, want %d: %q %q", code, c.code, out, errOut)
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
