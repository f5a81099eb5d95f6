package main

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/berthd/berth/cri/admin/api"
)

// command runs a command line and returns what it wrote and its exit code.
func command(t *testing.T, in string, args ...string) (out, errOut string, code int) {
	t.Helper()
	var o, e bytes.Buffer
	code = run(context.Background(), args, strings.NewReader(in), &o, &e)
	return o.String(), e.String(), code
}

// daemon answers on a socket in place of berthd and returns the socket's path.
func daemon(t *testing.T, h http.HandlerFunc) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "admin.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: h}
	go s.Serve(l) //nolint:errcheck // it ends with the test
	t.Cleanup(func() { s.Close() })
	return path
}

func TestCommandLines(t *testing.T) {
	for _, c := range []struct {
		args []string
		code int
		want string // in either output
	}{
		{nil, exitUsage, "Usage: berth COMMAND"},
		{[]string{"--help"}, 0, "image pull"},
		{[]string{"help"}, 0, "image pull"},
		{[]string{"help", "image", "rm"}, 0, "--force"},
		{[]string{"help", "config"}, 0, "config validate"},
		{[]string{"--version"}, 0, "berth "},
		{[]string{"image"}, exitUsage, "image unpin"},
		{[]string{"image", "eat"}, exitUsage, "image unpin"},
		{[]string{"eat"}, exitUsage, `unknown command "eat"`},
		{[]string{"image", "rm"}, exitUsage, "0 arguments, want IMAGE..."},
		{[]string{"image", "pulls", "x"}, exitUsage, `argument "x": want none`},
		{[]string{"image", "rm", "--no-such"}, exitUsage, "no-such"},
		{[]string{"image", "rm", "x", "--help"}, 0, "Examples:"},
		{[]string{"image", "pull", "--user", "u", "x"}, exitUsage, "--password-stdin"},
		{[]string{"config", "default", "--json"}, exitUsage, "--json"},
		{[]string{"completion", "csh"}, exitUsage, "only bash"},
		{[]string{"completion", "bash"}, 0, "complete -F _berth berth"},
		{[]string{"completion", "bash"}, 0, `"leaks") flags="--config --fix --json --socket"`},
		{[]string{"completion", "bash"}, 0, `"check") flags="--config --json --repair --socket"`},
		{[]string{"leaks", "x"}, exitUsage, "want none"},
		{[]string{"check", "--fix"}, exitUsage, "fix"},
		{[]string{"leaks", "--socket", "/no/such.sock"}, exitUnreachable, "is berthd running"},
		{[]string{"image", "ls", "--socket", "/no/such.sock"}, exitUnreachable, "is berthd running"},
		{[]string{"version", "--socket", "/no/such.sock"}, 0, "not reachable at /no/such.sock"},
	} {
		out, errOut, code := command(t, "", c.args...)
		if code != c.code || !strings.Contains(out+errOut, c.want) {
			t.Errorf("berth %s: exit %d, %q %q; want %d and %q", strings.Join(c.args, " "), code, out, errOut, c.code, c.want)
		}
	}
}

// TestVerbs: each verb has what its help promises, and flags of its own may stand anywhere.
func TestVerbs(t *testing.T) {
	for _, v := range verbs {
		if v.short == "" || len(v.examples) == 0 || v.setup == nil || v.least > 0 && v.args == "" {
			t.Errorf("verb %q is not complete", v.name)
		}
		for _, e := range v.examples {
			if !strings.Contains(e, "berth "+v.name) {
				t.Errorf("verb %q: example %q is another's", v.name, e)
			}
		}
	}
	fs := flag.NewFlagSet("x", flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	b := fs.Bool("b", false, "")
	s := fs.String("s", "", "")
	got, err := parse(fs, []string{"one", "--b", "two", "--s", "v", "--", "--three"})
	if err != nil || !slices.Equal(got, []string{"one", "two", "--three"}) || !*b || *s != "v" {
		t.Errorf("operands %q, b %v, s %q, %v", got, *b, *s, err)
	}
}

func TestSocketPath(t *testing.T) {
	dir := t.TempDir()
	conf := filepath.Join(dir, "berth.toml")
	for _, f := range []struct{ name, text, want string }{
		{"", "", "/run/berth/admin.sock"},
		{"berth.toml", "state_dir = \"/s\"\n[runtimes.runc]\n", "/run/berth/admin.sock"},
		{"berth.toml", "run_dir = \"/run/a\"\n", "/run/a/admin.sock"},
		{"berth.toml.d/2.toml", "run_dir = \"/run/b\"\n", "/run/b/admin.sock"},
		{"berth.toml.d/1.toml", "run_dir = \"/run/c\"\n", "/run/b/admin.sock"},
	} {
		if f.name != "" {
			p := filepath.Join(dir, f.name)
			if err := os.MkdirAll(filepath.Dir(p), 0o700); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(p, []byte(f.text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		a := &app{config: conf}
		if got, err := a.socketPath(); err != nil || got != f.want {
			t.Errorf("with %s: %q, %v; want %q", f.name, got, err, f.want)
		}
	}
	if err := os.WriteFile(conf, []byte("run_dir = ["), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := (&app{config: conf}).socketPath(); err == nil || !strings.Contains(err.Error(), conf) {
		t.Errorf("a broken file: %v", err)
	}
	if got, err := (&app{config: conf, socket: "/s"}).socketPath(); err != nil || got != "/s" {
		t.Errorf("with --socket: %q, %v", got, err)
	}
}

// TestAnswers: what berthd says is shown, as a table, as JSON, or as an error with its code.
func TestAnswers(t *testing.T) {
	sock := daemon(t, func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.URL.Path == api.PathImages && r.URL.Query().Get("ref") == "":
			json.NewEncoder(w).Encode([]api.Image{{ID: "sha256:0123456789abcdef", Tags: []string{"h/a:1", "h/\x1b[31mb:2"}, Size: 3 << 20,
				Pinned: true, Pulled: time.Now().Add(-time.Hour)}, {ID: "sha256:fedcba9876543210"}})
		case r.URL.Path == api.PathImages:
			w.WriteHeader(http.StatusNotFound)
			json.NewEncoder(w).Encode(api.Error{Code: api.CodeNotFound, Text: "image not found: nothing"})
		case r.URL.Path == api.PathPull:
			var q api.PullRequest
			json.NewDecoder(r.Body).Decode(&q)
			enc := json.NewEncoder(w)
			enc.Encode(api.Record{Ref: q.Ref, Stage: "layers 1/2", Bytes: 1 << 20, Total: 2 << 20})
			switch q.Ref {
			case "good":
				enc.Encode(api.Record{Ref: q.Ref, Image: &api.Image{ID: "sha256:77", Tags: []string{q.Username + q.Password}}})
				enc.Encode(api.Record{Done: true})
			case "denied":
				enc.Encode(api.Record{Done: true, Error: &api.Error{Code: api.CodeUnauthorized, Text: "registry denied access"}})
			}
		case r.URL.Path == api.PathVerify:
			var q api.VerifyRequest
			json.NewDecoder(r.Body).Decode(&q)
			enc := json.NewEncoder(w)
			enc.Encode(api.Record{Ref: "h/a:1", Layer: &api.LayerReport{Number: 1, Of: 2}})
			enc.Encode(api.Record{Ref: "h/a:1", Layer: &api.LayerReport{Number: 2, Of: 2, Damaged: true, Count: 9, Deviations: []string{`"f": content`}}})
			sum := api.Summary{Images: 1, Layers: 2, Bytes: 1 << 20, Damaged: 1}
			if q.Repair {
				enc.Encode(api.Record{Ref: "h/a:1", Layer: &api.LayerReport{Number: 2, Of: 2, Repaired: true}})
				sum.Repaired = 1
			}
			enc.Encode(api.Record{Summary: &sum})
			enc.Encode(api.Record{Done: true})
		case r.URL.Path == api.PathOps:
			json.NewEncoder(w).Encode([]api.Op{
				{Kind: api.KindOperation, What: "run pod", Object: "0123456789abcdef", Name: "shop/web\x1b", Step: "network", Age: time.Minute, StepAge: 50 * time.Second, Waiters: 2},
				{Kind: api.KindCall, What: "RunPodSandbox", Object: "shop/web", Age: 3 * time.Second, StepAge: 3 * time.Second, Call: "77"}})
		default:
			http.Error(w, "what?", http.StatusTeapot)
		}
	})
	for _, c := range []struct {
		in   string
		args []string
		code int
		want []string
		not  string
	}{
		{"", []string{"image", "ls"}, 0, []string{"NAME", "h/a:1 ", "0123456789ab", "3.00 MiB", "60m", "yes", "<none>"}, "\x1b"},
		{"", []string{"image", "ls", "--json"}, 0, []string{`"id": "sha256:0123456789abcdef"`, `"pinned": true`}, "NAME"},
		{"", []string{"image", "ls", "--quiet"}, 0, []string{"sha256:0123456789abcdef\n", "sha256:fedcba9876543210\n"}, "NAME"},
		{"", []string{"image", "ls", "x"}, exitNotFound, []string{"image not found: nothing"}, ""},
		{"pw\n", []string{"image", "pull", "good", "--user", "me", "--password-stdin"}, 0, []string{"good: layers 1/2, 1.00 MiB of 2.00 MiB", "sha256:77 mepw"}, "\r"},
		{"", []string{"image", "pull", "--json", "good"}, 0, []string{`{"ref":"good","stage":"layers 1/2","bytes":1048576,"total":2097152}`, `{"done":true}`}, ""},
		{"", []string{"image", "pull", "denied"}, exitFailed, []string{"registry denied access"}, ""},
		{"", []string{"image", "pull", "cut"}, exitUnreachable, []string{"ended in the middle"}, ""},
		{"", []string{"image", "verify"}, exitDamaged, []string{"layer 2/2: damaged: 9 deviations", `"f": content`, "and 8 more", "1 images, 2 layers, 1.00 MiB read: 1 damaged"}, "1/2"},
		{"", []string{"image", "verify", "--repair"}, 0, []string{"layer 2/2: repaired", "1 of them repaired"}, ""},
		{"", []string{"ops"}, 0, []string{"60s    operation   run pod         shop/web? (0123456789ab)   network   50s   2", "3.0s   call        RunPodSandbox   shop/web"}, "\x1b"},
		{"", []string{"ops", "--json", "--calls=false"}, 0, []string{`"step": "network"`, `"age": 60000000000`, `"waiters": 2`}, "RunPodSandbox"},
		{"", []string{"ops", "--older", "1h"}, 0, []string{"nothing is under way"}, "web"},
		{"", []string{"ops", "--older", "1h", "--json"}, 0, []string{"[]"}, "web"},
		{"", []string{"ops", "--older", "soon"}, exitUsage, []string{"soon"}, ""},
		{"", []string{"image", "pulls"}, exitFailed, []string{"418", "as new as berth"}, ""},
	} {
		out, errOut, code := command(t, c.in, append(c.args, "--socket", sock)...)
		if code != c.code {
			t.Errorf("berth %s: exit %d, want %d: %q %q", strings.Join(c.args, " "), code, c.code, out, errOut)
		}
		for _, w := range c.want {
			if !strings.Contains(out+errOut, w) {
				t.Errorf("berth %s: %q %q, want %q", strings.Join(c.args, " "), out, errOut, w)
			}
		}
		if c.not != "" && strings.Contains(out+errOut, c.not) {
			t.Errorf("berth %s: %q %q has %q", strings.Join(c.args, " "), out, errOut, c.not)
		}
	}
}

// TestExport: a file appears only when berthd says that the archive is complete.
func TestExport(t *testing.T) {
	sock := daemon(t, func(w http.ResponseWriter, r *http.Request) {
		ref := r.URL.Query().Get("ref")
		if ref != "cut" {
			w.Header().Set("Trailer", api.TrailerError)
		}
		io.WriteString(w, "archive")
		w.(http.Flusher).Flush()
		switch ref {
		case "good":
			w.Header().Set(api.TrailerError, "")
		case "bad":
			w.Header().Set(api.TrailerError, `{"code":"damaged","text":"digest mismatch"}`)
		case "aborted":
			panic(http.ErrAbortHandler)
		}
	})
	for ref, want := range map[string]struct {
		code int
		text string
	}{"good": {0, "7 B written"}, "bad": {exitFailed, "digest mismatch"}, "cut": {exitUnreachable, "ended in the middle"}, "aborted": {exitUnreachable, "ended in the middle"}} {
		file := filepath.Join(t.TempDir(), "out.tar")
		_, errOut, code := command(t, "", "image", "export", "-o", file, ref, "--socket", sock)
		b, err := os.ReadFile(file)
		if code != want.code || !strings.Contains(errOut, want.text) || (err == nil) != (code == 0) || code == 0 && string(b) != "archive" {
			t.Errorf("%s: exit %d, %q, file %q %v; want %d and %q", ref, code, errOut, b, err, want.code, want.text)
		}
		if left, err := filepath.Glob(file + "*"); err != nil || len(left) > 1 || code != 0 && len(left) > 0 {
			t.Errorf("%s: left %q, %v", ref, left, err)
		}
	}
	if out, _, code := command(t, "", "image", "export", "good", "--socket", sock); code != 0 || out != "archive" {
		t.Errorf("to standard output: exit %d, %q", code, out)
	}
}

func TestShow(t *testing.T) {
	for n, want := range map[int64]string{0: "0 B", 999: "999 B", 1000: "0.98 KiB", 1 << 20: "1.00 MiB", 123 << 20: "123 MiB", 1 << 62: "4096 PiB"} {
		if got := showBytes(n); got != want {
			t.Errorf("%d bytes: %q, want %q", n, got, want)
		}
	}
	for d, want := range map[time.Duration]string{-time.Second: "-", 1500 * time.Millisecond: "1.5s", time.Minute: "60s", time.Hour: "60m", 30 * time.Hour: "30h", 100 * time.Hour: "4d"} {
		if got := showAge(d); got != want {
			t.Errorf("%v: %q, want %q", d, got, want)
		}
	}
}
