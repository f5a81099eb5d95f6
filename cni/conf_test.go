package cni

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

var update = flag.Bool("update", false, "rewrite the golden files")

const single = `{"cniVersion":"1.0.0","name":"single","type":"fake-a","ipam":{"type":"fake-b"}}`

// run runs the network's loop for as long as the test.
func run(t *testing.T, network *Network) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- network.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
}

func TestWhichFileServes(t *testing.T) {
	list := func(name string) string {
		return fmt.Sprintf(`{"cniVersion":"1.0.0","name":%q,"plugins":[{"type":"fake-a"}]}`, name)
	}
	type edit struct{ file, text string } // "" removes
	tests := []struct {
		name     string
		edits    [][]edit // each followed by a reload
		want     string   // network in use; "" none
		problems int
		fallback bool
	}{
		{"nothing", nil, "", 0, false},
		{"nothing, fallback", nil, fallbackName, 0, true},
		{"first in lexical order", [][]edit{{{"20-b.conflist", list("b")}, {"10-a.conf", list("a")}}}, "a", 0, true},
		{"single plugin", [][]edit{{{"10-a.conf", single}}}, "single", 0, false},
		{"json", [][]edit{{{"10-a.json", single}}}, "single", 0, false},
		{"other files", [][]edit{{{"05-x.conflist~", list("x")}, {"README", "x"}, {"10-a.conf", list("a")}}}, "a", 0, false},
		{"broken first", [][]edit{{{"05-x.conflist", "{"}, {"10-a.conf", list("a")}}}, "a", 1, false},
		{"broken alone", [][]edit{{{"05-x.conflist", "{"}}}, "", 1, false},
		{"broken alone, fallback", [][]edit{{{"05-x.conflist", "{"}}}, fallbackName, 1, true},
		{"broken added before", [][]edit{{{"10-a.conf", list("a")}}, {{"05-x.conf", "{"}}}, "a", 1, false},
		{"better added", [][]edit{{{"10-a.conf", list("a")}}, {{"05-x.conf", list("x")}}}, "x", 0, false},
		{"in use breaks", [][]edit{{{"10-a.conf", list("a")}}, {{"10-a.conf", "{"}}}, "a", 1, true},
		{"in use breaks, another there", [][]edit{{{"10-a.conf", list("a")}, {"20-b.conf", list("b")}}, {{"10-a.conf", "{"}}}, "a", 1, false},
		{"in use breaks and is mended", [][]edit{{{"10-a.conf", list("a")}}, {{"10-a.conf", "{"}}, {{"10-a.conf", list("c")}}}, "c", 0, false},
		{"in use breaks and goes", [][]edit{{{"10-a.conf", list("a")}}, {{"10-a.conf", "{"}}, {{"10-a.conf", ""}}}, "", 0, false},
		{"in use replaced by broken", [][]edit{{{"10-a.conf", list("a")}}, {{"10-a.conf", ""}, {"11-a.conf", "{"}}}, "a", 1, false},
		{"in use goes, another there", [][]edit{{{"10-a.conf", list("a")}, {"20-b.conf", list("b")}}, {{"10-a.conf", ""}}}, "b", 0, false},
		{"all go", [][]edit{{{"10-a.conf", list("a")}}, {{"10-a.conf", ""}}}, "", 0, false},
		{"all go, fallback", [][]edit{{{"10-a.conf", list("a")}}, {{"10-a.conf", ""}}}, fallbackName, 0, true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			node := newNode(t)
			if tt.fallback {
				node.cfg.FallbackSubnet, node.cfg.FallbackDataDir = "10.1.0.0/24", node.cfg.CacheDir
				for _, p := range []string{"bridge", "host-local", "portmap"} {
					node.plugin(p)
				}
			}
			network := node.start()
			for _, edits := range tt.edits {
				for _, e := range edits {
					node.conf(e.file, e.text)
				}
				network.Reload()
			}
			info := network.Info()
			if info.Network != tt.want || info.Fallback != (tt.want == fallbackName) {
				t.Errorf("in use: got %q, want %q", info.Network, tt.want)
			}
			if len(info.Problems) != tt.problems {
				t.Errorf("problems: got %q, want %d", info.Problems, tt.problems)
			}
			ready := network.Ready()
			if info.Ready != (tt.want != "") || (ready == nil) != info.Ready {
				t.Errorf("ready: %v, %v", info.Ready, ready)
			}
			if ready != nil && (!errors.Is(ready, ErrNotReady) || !strings.Contains(ready.Error(), node.cfg.ConfDir)) {
				t.Errorf("not ready: %v", ready)
			}
			if ready != nil && tt.problems > 0 && !strings.Contains(ready.Error(), "05-x.conflist") {
				t.Errorf("not ready: got %v, want the broken file in it", ready)
			}
			if _, err := json.Marshal(info); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestBadFiles(t *testing.T) {
	tests := []struct{ name, text, want string }{
		{"empty", "", "unexpected end"},
		{"no object", `[]`, "array"},
		{"no name", `{"cniVersion":"1.0.0","plugins":[{"type":"x"}]}`, "no name"},
		{"bad name", `{"name":"a/b","plugins":[{"type":"x"}]}`, `name: "a/b"`},
		{"long name", `{"name":"` + strings.Repeat("a", 101) + `","plugins":[{"type":"x"}]}`, "at most 100"},
		{"future version", `{"cniVersion":"9.0.0","name":"a","plugins":[{"type":"x"}]}`, `cniVersion: "9.0.0", want one of 0.1.0`},
		{"no plugins", `{"name":"a","plugins":[]}`, "no plugins"},
		{"plugins absent", `{"name":"a"}`, "0 of them, want 1 to 64"},
		{"too many plugins", `{"name":"a","plugins":[` + strings.Repeat(`{"type":"x"},`, 64) + `{"type":"x"}]}`, "65 of them"},
		{"no type", `{"name":"a","plugins":[{}]}`, "type"},
		{"type is a path", `{"name":"a","plugins":[{"type":"../x"}]}`, `plugins[0].type: "../x"`},
		{"ipam is a path", `{"name":"a","plugins":[{"type":"x","ipam":{"type":"a/b"}}]}`, `plugins[0].ipam.type: "a/b"`},
		{"too large", `{"name":"` + strings.Repeat("a", maxConfSize) + `"}`, "more than 1048576 bytes"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "x.conflist")
			if err := os.WriteFile(path, []byte(tt.text), 0o600); err != nil {
				t.Fatal(err)
			}
			if _, err := readNetwork(path); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %q in it", err, tt.want)
			}
		})
	}
	t.Run("named pipe", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "x.conflist")
		if err := unix.Mkfifo(path, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := readNetwork(path); err == nil || !strings.Contains(err.Error(), "not a regular file") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("too many files", func(t *testing.T) {
		dir := t.TempDir()
		for i := range maxConfFiles + 1 {
			if err := os.WriteFile(filepath.Join(dir, fmt.Sprintf("%04d.conf", i)), []byte(single), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		found, err := readConfDir(dir)
		if err == nil || len(found) != maxConfFiles {
			t.Errorf("got %d files, %v; want %d and an error", len(found), err, maxConfFiles)
		}
	})
}

// Other software adds plugins to a network by files beside it (CNI 1.1). They
// are part of what a record holds.
func TestDropIns(t *testing.T) {
	node := newNode(t)
	dropIn := filepath.Join(node.cfg.ConfDir, "pods")
	if err := os.Mkdir(dropIn, 0o700); err != nil {
		t.Fatal(err)
	}
	conf := fmt.Sprintf(`{"type":"fake-b","log":%q}`, node.log)
	if err := os.WriteFile(filepath.Join(dropIn, "x.conf"), []byte(conf), 0o600); err != nil {
		t.Fatal(err)
	}
	node.conf("10-net.conflist", node.list("pods", "1.0.0", fake{typ: "fake-a"}))
	if _, err := node.start().Attach(t.Context(), thePod("p1")); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(dropIn); err != nil {
		t.Fatal(err)
	}
	if err := node.start().Detach(t.Context(), thePod("p1")); err != nil {
		t.Fatal(err)
	}
	want := []string{"ADD fake-a p1", "ADD fake-b p1", "DEL fake-b p1", "DEL fake-a p1"}
	if got := node.verbs(); !slices.Equal(got, want) {
		t.Errorf("calls: got %v, want %v", got, want)
	}
}

func TestPluginsMissing(t *testing.T) {
	node := newNode(t)
	node.conf("10-net.conf", `{"cniVersion":"1.0.0","name":"x","type":"fake-a","ipam":{"type":"fake-ipam"}}`)
	network := node.start()
	run(t, network)
	err := network.Ready()
	if !errors.Is(err, ErrNotReady) || !errors.Is(err, ErrPluginMissing) {
		t.Fatalf("got %v, want ErrPluginMissing", err)
	}
	for _, part := range append([]string{"10-net.conf", `"fake-ipam"`}, node.cfg.BinDirs...) {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("got %v, want %q in it", err, part)
		}
	}
	node.plugin("fake-ipam")
	eventually(t, "ready once the plugin is there", func() bool { return network.Ready() == nil })
}

// The directory comes late, goes, and comes again.
func TestWatch(t *testing.T) {
	node := newNode(t)
	root := filepath.Dir(node.cfg.ConfDir)
	node.cfg.ConfDir = filepath.Join(root, "etc", "cni", "net.d")
	network := node.start()
	run(t, network)
	for i := range 2 {
		if err := network.Ready(); err == nil {
			t.Fatalf("round %d: ready without a directory", i)
		}
		if err := os.MkdirAll(node.cfg.ConfDir, 0o700); err != nil {
			t.Fatal(err)
		}
		node.conf("10-net.conf", single)
		eventually(t, "ready once the file is there", func() bool { return network.Ready() == nil })
		node.conf("10-net.conf", "{")
		eventually(t, "broken file reported", func() bool { return len(network.Info().Problems) == 1 })
		if err := network.Ready(); err != nil {
			t.Errorf("round %d: broken file: %v", i, err)
		}
		if err := os.RemoveAll(filepath.Join(root, "etc")); err != nil {
			t.Fatal(err)
		}
		eventually(t, "not ready once the directory is gone", func() bool { return network.Ready() != nil })
	}
}

func TestStatus(t *testing.T) {
	node := newNode(t)
	node.conf("10-net.conflist", node.list("pods", "1.1.0", fake{typ: "fake-a"}, fake{typ: "fake-b", do: "STATUS=error"}))
	network := node.start()
	if err := network.Ready(); err == nil || !strings.Contains(err.Error(), "not yet asked") {
		t.Errorf("before the first answer: got %v", err)
	}
	run(t, network)
	eventually(t, "the plugin's reason", func() bool {
		err := network.Ready()
		return err != nil && strings.Contains(err.Error(), "network pods: plugin fake-b: STATUS: ") && strings.Contains(err.Error(), "no free addresses")
	})
	if info := network.Info(); info.Ready || info.Reason == "" || info.StatusAt.IsZero() {
		t.Errorf("info: %+v", info)
	}
	node.conf("10-net.conflist", node.list("pods", "1.1.0", fake{typ: "fake-a"}))
	eventually(t, "ready", func() bool { return network.Ready() == nil })

	// A plugin that hangs in STATUS holds up neither readers nor the watching.
	node.conf("10-net.conflist", node.list("hangs", "1.1.0", fake{typ: "fake-a", do: "STATUS=hang"}))
	eventually(t, "asking the plugin that hangs", func() bool {
		calls := node.calls()
		return calls[len(calls)-1].Child != 0
	})
	node.conf("10-net.conflist", node.list("after", "1.0.0", fake{typ: "fake-a"}))
	eventually(t, "the next configuration", func() bool { return network.Info().Network == "after" && network.Ready() == nil })
}

func TestBadConfig(t *testing.T) {
	good := newNode(t).cfg
	tests := []struct {
		name string
		edit func(*Config)
		want string
	}{
		{"no ConfDir", func(c *Config) { c.ConfDir = "" }, "ConfDir"},
		{"no CacheDir", func(c *Config) { c.CacheDir = "" }, "CacheDir"},
		{"no BinDirs", func(c *Config) { c.BinDirs = nil }, "BinDirs: empty"},
		{"empty BinDirs", func(c *Config) { c.BinDirs = []string{"/a", ""} }, "BinDirs[1]"},
		{"Timeout", func(c *Config) { c.Timeout = -1 }, "Timeout: -1ns"},
		{"MaxConcurrent", func(c *Config) { c.MaxConcurrent = -1 }, "MaxConcurrent: -1"},
		{"subnet", func(c *Config) { c.FallbackSubnet = "10.0.0.0"; c.FallbackDataDir = "/x" }, `"10.0.0.0" is no CIDR`},
		{"subnet with host bits", func(c *Config) { c.FallbackSubnet = "10.0.0.1/24"; c.FallbackDataDir = "/x" }, "want 10.0.0.0/24"},
		{"subnet too small", func(c *Config) { c.FallbackSubnet = "10.0.0.0/31"; c.FallbackDataDir = "/x" }, "prefix length 31, want 1 to 30"},
		{"subnet of everything", func(c *Config) { c.FallbackSubnet = "::/0"; c.FallbackDataDir = "/x" }, "prefix length 0, want 1 to 126"},
		{"no data directory", func(c *Config) { c.FallbackSubnet = "10.0.0.0/24" }, "FallbackDataDir"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			cfg := good
			tt.edit(&cfg)
			if _, err := New(cfg); !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %q in it", err, tt.want)
			}
		})
	}
}

func TestFallbackConf(t *testing.T) {
	for _, subnet := range []string{"10.88.0.0/16", "fd00:88::/64"} {
		got, err := fallbackConf(subnet, "/var/lib/berth/ipam")
		if err != nil {
			t.Fatal(err)
		}
		golden := filepath.Join("testdata", "fallback-"+map[bool]string{true: "6", false: "4"}[strings.Contains(subnet, ":")]+".conflist")
		if *update {
			if err := os.WriteFile(golden, append(got, '\n'), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(golden)
		if err != nil {
			t.Fatal(err)
		}
		if string(got)+"\n" != string(want) {
			t.Errorf("%s: got %s, want %s", subnet, got, want)
		}
		if _, err := parseNetwork(got); err != nil {
			t.Error(err)
		}
	}
}

// Whatever is accepted can be stored in a record and read back.
func FuzzParseNetwork(f *testing.F) {
	f.Add([]byte(single))
	f.Add([]byte(`{"cniVersion":"1.1.0","name":"a","plugins":[{"type":"x"},{"type":"y","ipam":{"type":"z"}}],"disableGC":true}`))
	f.Add([]byte(`{"name":"a","cniVersions":["1.0.0","1.1.0"],"loadOnlyInlinedPlugins":true,"plugins":[{"type":"x"}]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		n, err := parseNetwork(b)
		if err != nil || n.check() != nil {
			return
		}
		again, err := parseNetwork(n.list.Bytes)
		if err != nil {
			t.Fatalf("not read back: %v", err)
		}
		if again.list.Name != n.list.Name || again.list.CNIVersion != n.list.CNIVersion || len(again.list.Plugins) != len(n.list.Plugins) {
			t.Errorf("read back as %+v, was %+v", again.list, n.list)
		}
		for _, name := range n.binaries() {
			if name != filepath.Base(name) {
				t.Errorf("binary %q", name)
			}
		}
	})
}
