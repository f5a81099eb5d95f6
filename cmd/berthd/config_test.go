package main

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

var update = flag.Bool("update", false, "rewrite the generated part of the documentation")

// mustWrite writes files below a new directory and returns the source that
// reads its berth.toml.
func mustWrite(t *testing.T, files map[string]string) source {
	t.Helper()
	dir := t.TempDir()
	for name, body := range files {
		p := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(body), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return source{file: filepath.Join(dir, "berth.toml")}
}

// Errors of the configuration name the file, the line, the key, and the value
// or its limit.
func TestConfigErrors(t *testing.T) {
	for name, tc := range map[string]struct {
		body string
		line int
		want string // what follows "file:line: "
	}{
		"unknown key":                {"state_dir = \"/a\"\n\n# text\nstate_dirs = \"/b\"\n", 4, "state_dirs: unknown key, did you mean state_dir?"},
		"unknown, no neighbour":      {"\nfoo = 1\n", 2, "foo: unknown key"},
		"key in another case":        {"State_Dir = \"/a\"\n", 1, "State_Dir: unknown key, did you mean state_dir?"},
		"unknown table":              {"log_level = 1\n[cni]\nconf_dir = \"/a\"\n", 2, "cni: unknown key"},
		"unknown dotted table":       {"log_level = 1\n\n[cni.net]\na = 1\n", 3, "cni: unknown key"},
		"unknown dotted key":         {"log_level = 1\na.b.c = 1\n", 2, "a: unknown key"},
		"unknown runtime key":        {"[runtimes.runc]\npath = \"/a\"\npaths = \"/b\"\n", 3, "runtimes.runc.paths: unknown key, did you mean path?"},
		"unknown dotted runtime key": {"[runtimes]\nrunc.path = \"/a\"\nrunc.x = 1\n", 3, "runtimes.runc.x: unknown key"},
		"the first of two":           {"b = 1\na = 2\n", 1, "b: unknown key"},
		"bad handler":                {"[runtimes.Kata]\n", 1, "runtimes.Kata: want 1 to 63 lower-case letters"},
		"runtime not a table":        {"[runtimes]\nrunc = \"/usr/bin/runc\"\n", 2, "runtimes.runc: want a table, not a string"},
		"runtimes not a table":       {"runtimes = \"runc\"\n", 1, "runtimes: want a table, not a string"},
		"array of tables":            {"[[runtimes]]\npath = \"/a\"\n", 1, "runtimes: want a table, not a table"},
		"wrong type":                 {"\nlog_level = \"2\"\n", 2, "log_level: want a whole number, not a string"},
		"number for text":            {"socket = 3\n", 1, "socket: want a string, not a number"},
		"number for bool":            {"enable_unprivileged_ports = 1\n", 1, "enable_unprivileged_ports: want true or false, not a number"},
		"text for list":              {"cni_bin_dirs = \"/opt\"\n", 1, "cni_bin_dirs: want a list of strings, not a string"},
		"number in list":             {"cni_bin_dirs = [\"/opt\",\n 3]\n", 1, "cni_bin_dirs: entry 1: want a string, not a number"},
		"empty list":                 {"cni_bin_dirs = []\n", 1, "cni_bin_dirs: []: want one path at least"},
		"too small":                  {"log_level = -1\n", 1, "log_level: -1: want 0 to 10"},
		"too large":                  {"exec_output_limit = \"17MiB\"\n", 1, "exec_output_limit: 17MiB: want 4KiB to 16MiB"},
		"size without unit":          {"exec_output_limit = \"16M\"\n", 1, "exec_output_limit: \"16M\": want a size such as"},
		"size as a number":           {"exec_output_limit = 12\n", 1, "exec_output_limit: 12: want 4KiB to 16MiB"},
		"size overflows":             {"max_layer_bytes = \"99999999999TiB\"\n", 1, "max_layer_bytes: \"99999999999TiB\": want a size"},
		"duration":                   {"pod_timeout = \"5\"\n", 1, "pod_timeout: \"5\": want a duration such as \"90s\""},
		"duration too long":          {"pod_timeout = \"2h\"\n", 1, "pod_timeout: 2h: want 1s to 1h"},
		"relative path":              {"state_dir = \"berth\"\n", 1, "state_dir: \"berth\": want an absolute path"},
		"path with dots":             {"state_dir = \"/var/../etc\"\n", 1, "state_dir: \"/var/../etc\": want an absolute path"},
		"empty path":                 {"state_dir = \"\"\n", 1, "state_dir: \"\": want an absolute path"},
		"root directory":             {"state_dir = \"/\"\n", 1, "state_dir: \"/\": the root directory"},
		"run_dir too long":           {"run_dir = \"/run/" + strings.Repeat("x", 36) + "\"\n", 1, "run_dir: 41 bytes, limit 40"},
		"socket too long":            {"socket = \"/" + strings.Repeat("x", 107) + "\"\n", 1, "socket: 108 bytes, limit 107"},
		"driver":                     {"cgroup_driver = \"docker\"\n", 1, "cgroup_driver: \"docker\": want one of auto, systemd, cgroupfs"},
		"metrics to the world":       {"metrics_listen = \"0.0.0.0:9797\"\n", 1, "metrics_listen: \"0.0.0.0:9797\": want host:port with a loopback address"},
		"subnet":                     {"cni_fallback_subnet = \"10.85.1.0/16\"\n", 1, "cni_fallback_subnet: \"10.85.1.0/16\": want a subnet"},
		"pattern":                    {"pinned_images = [\"a[\"]\n", 1, "pinned_images: entry 0: \"a[\": want an image reference"},
		"annotation":                 {"[runtimes.runc]\npod_annotations = [\"a.*\", \"b[\"]\n", 2, "runtimes.runc.pod_annotations: entry 1: \"b[\": want the key of an annotation"},
		"empty annotation":           {"[runtimes.runc]\ncontainer_annotations = [\"\"]\n", 2, "runtimes.runc.container_annotations: entry 0: \"\": want the key of an annotation"},
		"driver of a runtime":        {"[runtimes.runc]\ncgroup_driver = \"auto\"\n", 2, "runtimes.runc.cgroup_driver: \"auto\": want systemd, cgroupfs or nothing"},
		"snapshotter":                {"[runtimes.kata]\npath = \"/a\"\nsnapshotter = \"devmapper\"\n", 3, "runtimes.kata.snapshotter: \"devmapper\": no such snapshotter, want one of: overlay"},
		"empty snapshotter":          {"[runtimes.runc]\nsnapshotter = \"\"\n", 2, "runtimes.runc.snapshotter: \"\": no such snapshotter, want one of: overlay"},
		"snapshotter of the node":    {"snapshotter = \"overlay\"\n", 1, "snapshotter: unknown key"},
		"syntax":                     {"log_level = 1\nstate_dir /a\n", 2, ""},
		"duplicate key":              {"log_level = 1\nlog_level = 2\n", 2, ""},
		"default runtime":            {"\n\ndefault_runtime = \"crun\"\n", 3, "default_runtime = \"crun\": there is no table [runtimes.crun], only runc"},
		"stream address":             {"stream_listen = \"localhost:0\"\n", 1, "stream_listen: \"localhost:0\": want an IP address and a port"},
		"streams to the world":       {"stream_listen = \"0.0.0.0:0\"\n", 1, "stream_listen = \"0.0.0.0:0\": not a loopback address, which needs stream_cert_file"},
		"certificate without key":    {"stream_cert_file = \"/a\"\nstream_key_file = \"\"\n", 2, "stream_key_file = \"\": stream_cert_file is \"/a\"; want both or neither"},
		"idle timeout":               {"stream_idle_timeout = \"0s\"\n", 1, "stream_idle_timeout: 0s: want 1s to 720h"},
		"same directories":           {"state_dir = \"/a\"\nrun_dir = \"/a\"\n", 2, "run_dir = \"/a\" is state_dir as well"},
	} {
		t.Run(name, func(t *testing.T) {
			src := mustWrite(t, map[string]string{"berth.toml": tc.body})
			_, err := src.load()
			want := fmt.Sprintf("%s:%d: %s", src.file, tc.line, tc.want)
			if err == nil || !strings.HasPrefix(err.Error(), want) {
				t.Errorf("got  %v\nwant %s", err, want)
			}
		})
	}
}

func TestConfigValues(t *testing.T) {
	src := mustWrite(t, map[string]string{
		"berth.toml": `
state_dir = "/srv/berth"
log_level = 4
exec_output_limit = "1MiB"
max_layer_bytes = 1048576
pod_timeout = "1m30s"
pinned_images = ["a", "b/*"]
default_runtime = "crun"
[runtimes.crun]
path = "/usr/bin/crun"
snapshotter = "overlay"
`,
		"berth.toml.d/20-b.toml":        "log_level = 6\npinned_images = [\"c\"]\n",
		"berth.toml.d/10-a.toml":        "log_level = 5\nrun_dir = \"/run/x\"\n[runtimes.runc]\npath = \"runc-1.3\"\n",
		"berth.toml.d/30-not.conf":      "nonsense",
		"berth.toml.d/.hidden.toml":     "nonsense",
		"berth.toml.d/dir.toml/ignored": "nonsense",
	})
	src.flags = []setting{{"--state-dir", "state_dir", "/flag"}}
	c, err := src.load()
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range []struct{ name, got, want string }{
		{"a flag counts most", c.StateDir, "/flag"},
		{"socket follows run_dir", c.Socket, "/run/x/berth.sock"},
		{"the last drop-in counts", fmt.Sprint(c.LogLevel), "6"},
		{"lists are replaced", fmt.Sprint(c.PinnedImages), "[c]"},
		{"tables are merged", c.Runtimes["crun"].Path + " " + c.Runtimes["runc"].Path, "/usr/bin/crun runc-1.3"},
		{"snapshotters", c.Runtimes["crun"].Snapshotter + " " + c.Runtimes["runc"].Snapshotter, "overlay overlay"},
		{"size", fmt.Sprint(c.ExecOutputLimit, c.MaxLayerBytes), "1048576 1048576"},
		{"duration", c.PodTimeout.String(), "1m30s"},
		{"untouched default", c.PullTimeout.String(), time.Hour.String()},
		{"origin", c.origin["log_level"], filepath.Join(src.file+".d", "20-b.toml") + ":1"},
	} {
		if v.got != v.want {
			t.Errorf("%s: got %s, want %s", v.name, v.got, v.want)
		}
	}
}

func TestConfigFiles(t *testing.T) {
	absent := source{file: filepath.Join(t.TempDir(), "absent.toml")}
	if _, err := absent.load(); err != nil {
		t.Errorf("the default file may be absent: %v", err)
	}
	absent.required = true
	if _, err := absent.load(); err == nil || !strings.Contains(err.Error(), absent.file) {
		t.Errorf("a file that was asked for may not: %v", err)
	}
	big := mustWrite(t, map[string]string{"berth.toml": "#" + strings.Repeat("x", maxConfigFile)})
	if _, err := big.load(); err == nil || !strings.Contains(err.Error(), "1048576") {
		t.Errorf("a huge file: %v", err)
	}
	drop := mustWrite(t, map[string]string{"berth.toml.d/a.toml": "log_level = 1\nnonsense = 2\n"})
	if _, err := drop.load(); err == nil || !strings.Contains(err.Error(), "a.toml:2: nonsense: unknown key") {
		t.Errorf("a bad drop-in: %v", err)
	}
	flags := source{file: absent.file, flags: []setting{{"--run-dir", "run_dir", "relative"}}}
	if _, err := flags.load(); err == nil || !strings.HasPrefix(err.Error(), "--run-dir: ") {
		t.Errorf("a bad flag: %v", err)
	}
}

// The default file, with its comment signs taken away, says exactly the
// defaults.
func TestPrintDefault(t *testing.T) {
	var b bytes.Buffer
	if err := printDefault(&b); err != nil {
		t.Fatal(err)
	}
	var active strings.Builder
	for line := range strings.Lines(b.String()) {
		if len(line) > 82 && strings.HasPrefix(line, "# ") {
			t.Errorf("long line %q", line)
		}
		if !strings.HasPrefix(line, "# ") {
			active.WriteString(strings.TrimPrefix(line, "#"))
		}
	}
	file := mustWrite(t, map[string]string{"berth.toml": active.String()})
	got, err := file.load()
	if err != nil {
		t.Fatalf("%v in\n%s", err, active.String())
	}
	want := defaults()
	if err := want.finish(); err != nil {
		t.Fatal(err)
	}
	if d := want.difference(got); len(d) > 0 {
		t.Errorf("keys that differ: %v", d)
	}
	if n, all := len(got.origin), len(want.fields())+len(newRuntime("runc").fields("runc")); n != all {
		t.Errorf("%d keys in the file, want %d", n, all)
	}
}

// docs/configuration.md has the table between two marks; -update renews it.
func TestDocumentation(t *testing.T) {
	const (
		file  = "../../docs/configuration.md"
		begin = "<!-- keys: made by go test ./cmd/berthd -update -->\n"
		end   = "<!-- end of keys -->\n"
	)
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	head, rest, ok := strings.Cut(string(b), begin)
	table, tail, ok2 := strings.Cut(rest, end)
	if !ok || !ok2 {
		t.Fatalf("%s lacks the marks %q and %q", file, begin, end)
	}
	var want bytes.Buffer
	if err := printMarkdown(&want); err != nil {
		t.Fatal(err)
	}
	if table == want.String() {
		return
	}
	if !*update {
		t.Fatalf("%s does not tell what config.go does; run go test ./cmd/berthd -run Documentation -update", file)
	}
	if err := os.WriteFile(file, []byte(head+begin+want.String()+end+tail), 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestDifference(t *testing.T) {
	a, b := defaults(), defaults()
	if d := a.difference(b); len(d) != 0 {
		t.Errorf("equal ones differ in %v", d)
	}
	b.LogLevel, b.CNIBinDirs, b.Runtimes["runc"].Path = 3, []string{"/x"}, "y"
	b.Runtimes["crun"] = newRuntime("crun")
	if got, want := fmt.Sprint(a.difference(b)), "[log_level cni_bin_dirs runtimes.crun runtimes.runc.path]"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

// The packaged example is a valid configuration.
func TestExample(t *testing.T) {
	if _, err := (source{file: "../../packaging/berth.toml", required: true}).load(); err != nil {
		t.Error(err)
	}
}

func TestSizes(t *testing.T) {
	for in, want := range map[string]int64{"0": 0, "4096": 4096, "4KiB": 4096, "1 MiB": 1 << 20, "8191PiB": -1, "8388607TiB": 8388607 << 40, "8388608TiB": -1, "": -1, "-1": -1, "1.5GiB": -1, "KiB": -1} {
		got, err := parseSize(in)
		if err != nil {
			got = -1
		}
		if got != want {
			t.Errorf("%q: %d, %v, want %d", in, got, err, want)
		}
		if err == nil {
			if again, err := parseSize(showSize(got)); err != nil || again != got {
				t.Errorf("%d is shown as %q", got, showSize(got))
			}
		}
	}
}

// Any file is either read or refused with its name and a line; it is never a
// panic, and what was read keeps its limits.
func FuzzConfig(f *testing.F) {
	var b bytes.Buffer
	_ = printDefault(&b)
	f.Add(strings.ReplaceAll(b.String(), "\n#", "\n"))
	f.Add("[runtimes.a]\npath = 1\n[[x]]\ny.z = [{a=1}]\n")
	f.Add("a.b.c = 2020-01-01\nlog_level = 0x5\n\"\" = 1\n")
	f.Fuzz(func(t *testing.T, body string) {
		c := defaults()
		err := c.apply("f.toml", body)
		if err != nil {
			var line int
			if n, _ := fmt.Sscanf(err.Error(), "f.toml:%d:", &line); n != 1 || line < 1 && body != "" {
				t.Errorf("no line in %q", err)
			}
			return
		}
		if c.LogLevel < 0 || c.LogLevel > 10 || len(c.RunDir) > maxRunDir || !filepath.IsAbs(c.StateDir) {
			t.Errorf("limits passed: %+v", c)
		}
	})
}
