package imageservice

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"
)

func TestParseHosts(t *testing.T) {
	const text = `
server = "https://origin.example"
ca = "origin.pem"

[host."https://z.example"]
  capabilities = ["pull", "resolve", "push"]
  ca = ["/abs/a.pem", "b.pem"]
  client = [["c.pem", "k.pem"], ["both.pem", ""]]
  dial_timeout = "3s"
  [host."https://z.example".header]
    x-one = "1"
    x-two = ["a", "b"]

[host."http://a.example:5000/proxy"]
  capabilities = ["pull"]
  skip_verify = true

[host."https://odd.example/api/docker/v2/all"]
  override_path = true
  client = "one.pem"
`
	f, err := parseHosts([]byte(text), "/d")
	if err != nil {
		t.Fatal(err)
	}
	want := []hostEntry{
		{
			scheme: "https", host: "z.example", path: "/v2", resolve: true, pull: true, ca: []string{"/abs/a.pem", "/d/b.pem"},
			client: [][2]string{{"/d/c.pem", "/d/k.pem"}, {"/d/both.pem", ""}}, dialTimeout: 3 * time.Second,
			header: map[string][]string{"X-One": {"1"}, "X-Two": {"a", "b"}},
		},
		{scheme: "http", host: "a.example:5000", path: "/proxy/v2", pull: true, skipVerify: true},
		{scheme: "https", host: "odd.example", path: "/api/docker/v2/all", resolve: true, pull: true, client: [][2]string{{"/d/one.pem", ""}}},
	}
	if !reflect.DeepEqual(f.hosts, want) {
		t.Errorf("hosts\n%+v\nwant\n%+v", f.hosts, want)
	}
	if server := (hostEntry{scheme: "https", host: "origin.example", path: "/v2", resolve: true, pull: true, ca: []string{"/d/origin.pem"}}); !reflect.DeepEqual(f.server, server) {
		t.Errorf("server\n%+v\nwant\n%+v", f.server, server)
	}
}

func TestParseHostsErrors(t *testing.T) {
	for _, tc := range []struct{ name, text, want string }{
		{"not TOML", "server = ", "line 1"},
		{"unknown key", `sever = "https://x"`, `"sever"`},
		{"unknown key of a host", "[host.\"https://x\"]\nskip_verfy = true", "skip_verfy"},
		{"scheme", `[host."ftp://x"]`, "ftp://x"},
		{"user in URL", `server = "https://u:p@x"`, "want [https"},
		{"no name", `[host.""]`, "no name"},
		{"capability", "[host.x]\ncapabilities = [\"pul\"]", `"pul"`},
		{"host is no table", "host = 5", "[host."},
		{"ca", "ca = 5", `ca: "5"`},
		{"client of three", `client = [["a","b","c"]]`, "certificate, key"},
		{"header", "[header]\nx = 1", `"x"`},
		{"header of two lines", "[header]\nx = \"a\\nb\"", `"x"`},
		{"dial timeout", `dial_timeout = "soon"`, `"soon"`},
		{"negative dial timeout", `dial_timeout = "-1s"`, `"-1s"`},
	} {
		if _, err := parseHosts([]byte(tc.text), "/d"); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v, want %q in it", tc.name, err, tc.want)
		}
	}
}

func TestFindHosts(t *testing.T) {
	root := t.TempDir()
	put := func(name, text string) {
		p := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	put("a.example_5000_/hosts.toml", `server = "https://first"`)
	put("a.example:5000/hosts.toml", `server = "https://second"`)
	put("b.example:5000/hosts.toml", `server = "https://third"`)
	put("certs.example/ca.crt", "")
	put("certs.example/me.cert", "")
	put("certs.example/me.key", "")
	put("big.example/hosts.toml", strings.Repeat("# ", maxHostsFile))
	for host, want := range map[string]string{"a.example:5000": "first", "b.example:5000": "third", "c.example": ""} {
		f, err := findHosts(root, host)
		if err != nil || (f == nil) != (want == "") || f != nil && f.server.host != want {
			t.Errorf("%s: %+v, %v, want server %q", host, f, err, want)
		}
	}
	f, err := findHosts(root, "certs.example")
	dir := filepath.Join(root, "certs.example")
	if err != nil || len(f.server.ca) != 1 || len(f.server.client) != 1 || f.server.client[0] != [2]string{dir + "/me.cert", dir + "/me.key"} {
		t.Errorf("certificates only: %+v, %v", f, err)
	}
	if _, err := findHosts(root, "big.example"); err == nil || !strings.Contains(err.Error(), "big.example/hosts.toml") {
		t.Errorf("too large: %v", err)
	}
	put("_default/hosts.toml", `[host."https://any"]`)
	if f, err := findHosts(root, "c.example"); err != nil || !f.fallback || f.hosts[0].host != "any" {
		t.Errorf("_default: %+v, %v", f, err)
	}
}

// FuzzHosts: whatever parses names hosts by URLs that can be asked.
func FuzzHosts(f *testing.F) {
	f.Add("server = \"x\"\n[host.\"https://a/b\"]\ncapabilities=[\"pull\"]\nclient=[[\"a\",\"b\"]]\nca=[\"c\"]\n[host.\"https://a/b\".header]\nx=[\"y\"]")
	f.Add("[host.\"http://[::1]:5000\"]\noverride_path=true")
	f.Fuzz(func(t *testing.T, text string) {
		hosts, err := parseHosts([]byte(text), "/d")
		if err != nil {
			return
		}
		for _, h := range hosts.hosts {
			if h.host == "" || h.scheme != "http" && h.scheme != "https" || strings.HasSuffix(h.path, "/") {
				t.Errorf("%q: %+v", text, h)
			}
			for _, ca := range h.ca {
				if !filepath.IsAbs(ca) {
					t.Errorf("%q: relative file %q", text, ca)
				}
			}
		}
	})
}
