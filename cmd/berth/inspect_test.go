package main

import (
	"encoding/json"
	"net/http"
	"strings"
	"testing"

	"github.com/berthd/berth/cri/admin/api"
)

// TestLeaks: findings are shown with what came of them, and what is left is an exit
// code.
func TestLeaks(t *testing.T) {
	for name, c := range map[string]struct {
		args     []string
		findings []api.Finding
		fail     bool
		code     int
		want     []string
		not      string
	}{
		"nothing": {code: 0, want: []string{"nothing without an owner"}},
		"some": {findings: []api.Finding{{Kind: "mount", ID: strings.Repeat("a", 64), What: "/m\x1b", Why: "odd", Mendable: true}, {Kind: "stranger", What: "/s", Remedy: "look"}},
			code: exitDamaged, want: []string{"2 without an owner", "aaaaaaaaaaaaa ", "/m?", "--fix", "by hand", "look", "still there: 2"}, not: "removed"},
		"mended": {args: []string{"--fix"}, findings: []api.Finding{{Kind: "mount", What: "/m", Why: "odd", Mendable: true, Mended: true}},
			code: 0, want: []string{"1 without an owner, 1 removed"}, not: "still"},
		"not mended": {args: []string{"--fix"}, findings: []api.Finding{{Kind: "mount", What: "/m", Mended: true}, {Kind: "mount", What: "/n", Error: "busy"}},
			code: exitDamaged, want: []string{"2 without an owner, 1 removed", "stays", "not removed: busy"}},
		"json":  {args: []string{"--json"}, findings: []api.Finding{{Kind: "mount", What: "/m"}}, code: exitDamaged, want: []string{`"left": 1`, `"daemon": true`, `"what": "/m"`}},
		"error": {fail: true, code: exitFailed, want: []string{"no way"}, not: "nothing"},
	} {
		sock := daemon(t, func(w http.ResponseWriter, r *http.Request) {
			var q api.InspectRequest
			if err := json.NewDecoder(r.Body).Decode(&q); err != nil || r.URL.Path != api.PathLeaks || q.Mend != strings.Contains(strings.Join(c.args, " "), "fix") {
				t.Errorf("%s: %s, %+v, %v", name, r.URL, q, err)
			}
			enc := json.NewEncoder(w)
			for i := range c.findings {
				enc.Encode(api.Record{Finding: &c.findings[i]})
			}
			last := api.Record{Done: true}
			if c.fail {
				last.Error = &api.Error{Code: api.CodeFailed, Text: "no way"}
			}
			enc.Encode(last)
		})
		out, errOut, code := command(t, "", append([]string{"leaks", "--socket", sock}, c.args...)...)
		if code != c.code {
			t.Errorf("%s: exit %d, want %d: %s%s", name, code, c.code, out, errOut)
		}
		for _, w := range c.want {
			if !strings.Contains(out+errOut, w) {
				t.Errorf("%s: %q %q, want %q", name, out, errOut, w)
			}
		}
		if c.not != "" && strings.Contains(out, c.not) {
			t.Errorf("%s: %q has %q", name, out, c.not)
		}
	}
}

// TestCheck: a deviation is shown with what comes of it, unless it is put right.
func TestCheck(t *testing.T) {
	all := []api.Finding{
		{Kind: "pod", ID: "p", What: "shm", Why: "nothing is mounted there", Consequence: "no shm", Remedy: "remove the pod"},
		{Kind: "container", ID: "c", What: "note", Why: "missing", Consequence: "quiet", Remedy: "--repair writes it", Mendable: true, Mended: true},
		{Kind: "row", ID: "r", Why: "rotten", Mendable: true, Error: "disk full"},
	}
	sock := daemon(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != api.PathCheck {
			t.Errorf("path %s", r.URL)
		}
		enc := json.NewEncoder(w)
		for i := range all {
			enc.Encode(api.Record{Finding: &all[i]})
		}
		enc.Encode(api.Record{Done: true})
	})
	out, errOut, code := command(t, "", "check", "--repair", "--socket", sock)
	want := `pod p shm: nothing is mounted there
  consequence: no shm
  remedy: remove the pod
container c note: missing
  put right
row r: rotten
  not put right: disk full
3 deviations, 1 put right
`
	if code != exitDamaged || out != want || !strings.Contains(errOut, "still there: 2") {
		t.Errorf("exit %d, %q: got\n%s\nwant\n%s", code, errOut, out, want)
	}
	all = nil
	if out, _, code := command(t, "", "check", "--socket", sock); code != 0 || out != "book and node agree\n" {
		t.Errorf("nothing: exit %d, %q", code, out)
	}
}
