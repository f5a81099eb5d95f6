package imageservice

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/berthd/berth/test/registry"
)

// hostsFor writes a hosts.toml for a registry of the node.
func (n *node) hostsFor(host, text string) {
	n.t.Helper()
	dir := filepath.Join(n.mustMkdir("hosts.d"), strings.ReplaceAll(host, ":", "_")+"_")
	if !strings.Contains(host, ":") {
		dir = strings.TrimSuffix(dir, "_")
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		n.t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "hosts.toml"), []byte(text), 0o600); err != nil {
		n.t.Fatal(err)
	}
}

func (n *node) mustExplain(ref string, probe bool) Plan {
	n.t.Helper()
	p, err := n.Explain(context.Background(), ref, probe)
	if err != nil {
		n.t.Fatal(err)
	}
	return p
}

// shape is what of a plan decides where a pull goes.
func shape(c Candidate) string {
	var b strings.Builder
	source, _, _ := strings.Cut(c.Source, ",")
	fmt.Fprintf(&b, "%s (%s) %s", c.Image, strings.TrimPrefix(filepath.Base(source), "."), c.Error)
	for _, e := range c.Endpoints {
		fmt.Fprintf(&b, "\n  %s %s", e.URL, e.Repository)
		for _, f := range []struct {
			set  bool
			name string
		}{{e.Mirror, "mirror"}, {e.Resolve, "resolve"}, {e.Pull, "pull"}, {e.SkipVerify, "insecure"}} {
			if f.set {
				b.WriteString(" " + f.name)
			}
		}
		if e.Credentials != "" {
			fmt.Fprintf(&b, " %s@%s", e.Username, filepath.Base(e.Credentials))
		}
	}
	return b.String()
}

func TestExplain(t *testing.T) {
	n := newNode(t, func(c *Config) { c.InsecureRegistries = []string{"lax.example"} })
	n.mustWrite("registries.conf", `
unqualified-search-registries = ["one.example", "docker.io"]
[aliases]
"tool" = "three.example/x/tool"
[[registry]]
prefix = "two.example/team"
location = "two.example/moved"
[[registry.mirror]]
location = "mirror.example/two"
pull-from-mirror = "digest-only"
[[registry.mirror]]
location = "127.0.0.1:1/two"
insecure = true
[[registry]]
location = "bad.example"
blocked = true
`)
	n.mustWrite("auth.json", `{"auths":{
"four.example":{"auth":"aG9zdDpwdw=="},
"four.example/deep/one":{"auth":"cGF0aDpwdw=="},
"cache.example:8443":{"auth":"Y2FjaGU6cHc="}}}`)
	n.hostsFor("four.example", `
[host."https://cache.example:8443"]
[host."http://dumb.example/v2/all"]
capabilities = ["pull"]
override_path = true
`)
	n.hostsFor("two.example", `[host."https://not.example"]`)
	n.hostsFor("broken.example", `host = 5`)
	for _, tc := range []struct {
		ref  string
		want []string
	}{
		{"plain.example/a:b", []string{"plain.example/a:b () \n  https://plain.example/v2 a resolve pull"}},
		{"lax.example/a", []string{"lax.example/a:latest () \n  lax.example/v2 a resolve pull insecure"}},
		{"localhost:5000/a", []string{"localhost:5000/a:latest () \n  localhost:5000/v2 a resolve pull insecure"}},
		{"docker.io/busybox", []string{"docker.io/library/busybox:latest () \n  https://registry-1.docker.io/v2 library/busybox resolve pull"}},
		{"short", []string{
			"one.example/short:latest () \n  https://one.example/v2 short resolve pull",
			"docker.io/library/short:latest () \n  https://registry-1.docker.io/v2 library/short resolve pull",
		}},
		{"tool:9", []string{"three.example/x/tool:9 () \n  https://three.example/v2 x/tool resolve pull"}},
		{"two.example/team/a", []string{"two.example/team/a:latest (registries.conf) " +
			"\n  127.0.0.1:1/v2 two/a mirror resolve pull insecure\n  https://two.example/v2 moved/a resolve pull"}},
		{"two.example/other/a", []string{"two.example/other/a:latest (hosts.toml) " +
			"\n  https://not.example/v2 other/a mirror resolve pull\n  https://two.example/v2 other/a resolve pull"}},
		{"four.example/deep/one", []string{"four.example/deep/one:latest (hosts.toml) " +
			"\n  https://cache.example:8443/v2 deep/one mirror resolve pull cache@auth.json" +
			"\n  http://dumb.example/v2/all deep/one mirror pull" +
			"\n  https://four.example/v2 deep/one resolve pull path@auth.json"}},
		{"four.example/other", []string{"four.example/other:latest (hosts.toml) " +
			"\n  https://cache.example:8443/v2 other mirror resolve pull cache@auth.json" +
			"\n  http://dumb.example/v2/all other mirror pull" +
			"\n  https://four.example/v2 other resolve pull host@auth.json"}},
	} {
		p := n.mustExplain(tc.ref, false)
		var got []string
		for _, c := range p.Candidates {
			got = append(got, shape(c))
		}
		if fmt.Sprint(got) != fmt.Sprint(tc.want) {
			t.Errorf("%s:\n%s\nwant\n%s", tc.ref, strings.Join(got, "\n"), strings.Join(tc.want, "\n"))
		}
	}
	// What is for all registries leaves those on loopback addresses what they are.
	n.hostsFor("_default", `[host."https://any.example"]`)
	if got := shape(n.mustExplain("localhost:5000/a", false).Candidates[0]); got != "localhost:5000/a:latest (hosts.toml) "+
		"\n  https://any.example/v2 a mirror resolve pull\n  localhost:5000/v2 a resolve pull insecure" {
		t.Errorf("loopback with _default: %s", got)
	}
	n.hostsFor("docker.io", `server = "https://docker.io"`)
	if got := shape(n.mustExplain("docker.io/library/a", false).Candidates[0]); got != "docker.io/library/a:latest (hosts.toml) "+
		"\n  https://registry-1.docker.io/v2 library/a resolve pull" {
		t.Errorf("docker.io as a server: %s", got)
	}
	for ref, want := range map[string]string{"bad.example/x": "blocked", "broken.example/x": "broken.example/hosts.toml"} {
		if c := n.mustExplain(ref, false).Candidates[0]; !strings.Contains(c.Error, want) || len(c.Endpoints) != 0 {
			t.Errorf("%s: %+v, want an error with %q", ref, c, want)
		}
	}
	if p := n.mustExplain("two.example/team/a", false); !strings.HasSuffix(p.Candidates[0].Ignored, "two.example/hosts.toml") {
		t.Errorf("a hosts.toml that does not count is not named: %+v", p.Candidates[0])
	}
	if _, err := n.Explain(context.Background(), "UPPER/x", false); !errors.Is(err, ErrInvalidReference) {
		t.Errorf("malformed: %v", err)
	}
}

func TestExplainProbe(t *testing.T) {
	n := newNode(t)
	img := sample(t, "x")
	n.reg.Push("r", "v1", img)
	n.reg.SetFault("r", registry.Fault{Username: "u", Password: "secret"})
	n.mustWrite("auth.json", fmt.Sprintf(`{"auths":{%q:{"auth":"dTpzZWNyZXQ="}}}`, n.reg.Addr()))
	n.hostsFor("fake.example", fmt.Sprintf("server = \"http://%s\"\n[host.\"http://127.0.0.1:1\"]", n.reg.Addr()))
	p := n.mustExplain("fake.example/r:v1", true)
	e := p.Candidates[0].Endpoints
	if len(e) != 2 || e[0].Probe == nil || e[0].Probe.OK || !strings.Contains(e[0].Probe.Error, "refused") {
		t.Errorf("nobody there: %+v", e[0].Probe)
	}
	if r := e[1].Probe; r == nil || !r.OK || r.Digest != img.Digest || r.Auth != "basic" || r.Scheme != "http" || r.Took <= 0 {
		t.Errorf("the registry: %+v", r)
	}
	b, err := json.Marshal(p)
	if err != nil || strings.Contains(string(b), "secret") || !strings.Contains(string(b), `"username":"u"`) {
		t.Errorf("as JSON: %s, %v", b, err)
	}
	if len(n.List()) != 0 || len(n.kept()) != 0 {
		t.Error("a probe left something behind")
	}
	t.Setenv("HTTP_PROXY", "http://user:pw@"+n.reg.Addr())
	p = n.mustExplain("fake.example/r:v1", false)
	if u, _ := url.Parse(p.Candidates[0].Endpoints[0].Proxy); u == nil || p.Candidates[0].Endpoints[0].Proxy != "" {
		t.Errorf("loopback through a proxy: %q", p.Candidates[0].Endpoints[0].Proxy)
	}
	n.hostsFor("plain.example", `server = "http://plain.example"`)
	if got := n.mustExplain("plain.example/r", false).Candidates[0].Endpoints[0].Proxy; got != "http://user:xxxxx@"+n.reg.Addr() {
		t.Errorf("proxy %q", got)
	}
}

// TestPulls: what is told about a pull that runs.
func TestPulls(t *testing.T) {
	n := newNode(t)
	img := big(t, 1, 2)
	n.reg.Push("r", "v1", img)
	n.reg.SetFault("r", registry.Fault{Rate: 1 << 20})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		_, err := n.Pull(ctx, n.reg.Ref("r", "v1"), nil)
		done <- err
	}()
	var p PullProgress
	waitFor(t, "bytes", func() bool {
		if all := n.Pulls(); len(all) == 1 {
			p = all[0]
		}
		return p.DoneBytes > 300<<10 && p.Rate > 0
	})
	cancel()
	if err := <-done; !strings.Contains(err.Error(), "layers 0/2") || !strings.Contains(err.Error(), "mostly waiting for network") {
		t.Errorf("the caller that gave up is told: %v", err)
	}
	if p.Reference != n.reg.Ref("r", "v1") || p.Image != p.Reference || p.Waiters != 1 || p.Limit != "network" || len(p.Layers) != 2 ||
		p.TotalBytes < 6<<20 || p.DoneBytes >= p.TotalBytes {
		t.Errorf("progress: %+v", p)
	}
	for i, l := range p.Layers {
		if l.Digest != img.Layers[i].Digest || l.State != "pulling" || l.Endpoint != n.reg.Addr() || l.Network < l.CPU+l.Disk || l.DoneBytes == 0 {
			t.Errorf("layer %d: %+v", i, l)
		}
	}
	if b, err := json.Marshal(p); err != nil || !strings.Contains(string(b), `"totalBytes"`) {
		t.Errorf("as JSON: %s, %v", b, err)
	}
	n.reg.SetFault("r", registry.Fault{})
	n.mustPull(n.reg.Ref("r", "v1"))
	waitFor(t, "the end", func() bool { return len(n.Pulls()) == 0 })
}

// TestCredentialHelpers: those of auth.json and of registries.conf, and one that hangs.
func TestCredentialHelpers(t *testing.T) {
	n := newNode(t, func(c *Config) { c.StallTimeout = 700 * time.Millisecond })
	n.reg.Push("r", "v1", sample(t, "x"))
	n.reg.SetFault("r", registry.Fault{Username: "helped", Password: "pw"})
	bin := n.mustMkdir("bin")
	t.Setenv("PATH", bin+":"+os.Getenv("PATH"))
	helper := func(name, script string) {
		if err := os.WriteFile(filepath.Join(bin, "docker-credential-"+name), []byte("#!/bin/sh\n"+script), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	helper("good", `read host; echo "{\"ServerURL\":\"$host\",\"Username\":\"helped\",\"Secret\":\"pw\"}"`)
	helper("slow", "exec sleep 3")
	ref := n.reg.Ref("r", "v1")
	for name, tc := range map[string]struct{ auth, conf, from string }{
		"of auth.json":       {fmt.Sprintf(`{"credHelpers":{%q:"good"}}`, n.reg.Addr()), "#", "auth.json"},
		"of registries.conf": {`{}`, `credential-helpers = ["containers-auth.json", "good"]`, "credential helper"},
	} {
		n.mustWrite("auth.json", tc.auth)
		n.mustWrite("registries.conf", tc.conf)
		if _, err := n.Pull(context.Background(), ref, nil); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if e := n.mustExplain(ref, false).Candidates[0].Endpoints[0]; filepath.Base(e.Credentials) != tc.from || e.Username != "helped" {
			t.Errorf("%s: explained as %q of %q", name, e.Username, e.Credentials)
		}
	}
	n.mustWrite("registries.conf", `credential-helpers = ["slow"]`)
	began := time.Now()
	if _, err := n.Pull(context.Background(), ref, nil); err == nil || !strings.Contains(err.Error(), "credentials") || time.Since(began) > 2500*time.Millisecond {
		t.Errorf("helper that hangs: %v after %s", err, time.Since(began))
	}
}
