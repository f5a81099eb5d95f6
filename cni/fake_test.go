package cni

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The test binary is also the plugin: it is linked into a directory under names
// that begin with "fake" and does what its network configuration says:
//
//	{"type": "fake-a", "log": "<file>", "do": {"ADD": "hang", "*": "ok"}}
func TestMain(m *testing.M) {
	if strings.HasPrefix(filepath.Base(os.Args[0]), "fake") {
		// Not os.Exit: under the race detector that sleeps for a second.
		unix.Exit(fakePlugin())
	}
	os.Exit(m.Run())
}

// call is a line of a fake plugin's log.
type call struct {
	Plugin, Verb, ID, NetNS, IfName, Args string
	Runtime                               map[string]any
	Prev                                  bool
	Valid                                 []map[string]string
	Env                                   []string
	PID, Child                            int
	Start, End                            time.Time
}

func fakePlugin() int {
	start := time.Now()
	stdin, _ := io.ReadAll(os.Stdin)
	var conf struct {
		Type, Log     string
		CNIVersion    string              `json:"cniVersion"`
		Do            map[string]string   `json:"do"`
		RuntimeConfig map[string]any      `json:"runtimeConfig"`
		PrevResult    json.RawMessage     `json:"prevResult"`
		Valid         []map[string]string `json:"cni.dev/valid-attachments"`
		Result        json.RawMessage     `json:"result"`
	}
	if err := json.Unmarshal(stdin, &conf); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	verb := os.Getenv("CNI_COMMAND")
	c := call{
		Plugin: conf.Type, Verb: verb, ID: os.Getenv("CNI_CONTAINERID"), NetNS: os.Getenv("CNI_NETNS"),
		IfName: os.Getenv("CNI_IFNAME"), Args: os.Getenv("CNI_ARGS"), Runtime: conf.RuntimeConfig,
		Prev: len(conf.PrevResult) > 0, Valid: conf.Valid, Env: os.Environ(), PID: os.Getpid(), Start: start,
	}
	do := conf.Do[verb]
	if do == "" {
		do = conf.Do["*"]
	}
	write := func() {
		c.End = time.Now()
		b, _ := json.Marshal(c)
		f, err := os.OpenFile(conf.Log, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
		if err == nil {
			f.Write(append(b, '\n'))
			f.Close()
		}
	}
	child := func(attr *unix.SysProcAttr) {
		cmd := exec.Command("sleep", "300")
		cmd.Stdout, cmd.Stderr, cmd.SysProcAttr = os.Stdout, os.Stderr, attr
		if cmd.Start() == nil {
			c.Child = cmd.Process.Pid
		}
	}
	switch do {
	case "hang":
		child(nil)
		write()
		time.Sleep(5 * time.Minute)
	case "daemon": // succeeds, and leaves a child of its own group with its pipes
		child(nil)
	case "session": // the same, out of reach
		child(&unix.SysProcAttr{Setsid: true})
	case "slow":
		time.Sleep(200 * time.Millisecond)
	}
	write()
	switch do {
	case "error":
		fmt.Print(`{"cniVersion":"1.0.0","code":11,"msg":"no free addresses","details":"of 10.1.0.0/24"}`)
		return 1
	case "stderr":
		fmt.Fprintln(os.Stderr, "panic: something\nwent wrong")
		return 2
	case "silent":
		return 3
	case "rubbish":
		fmt.Print("<html>no JSON</html>")
		return 0
	case "big":
		os.Stdout.Write(bytes.Repeat([]byte("x"), 10<<20))
		return 0
	case "bigerr":
		os.Stderr.Write(bytes.Repeat([]byte("y"), 10<<20))
		return 1
	case "signal":
		unix.Kill(os.Getpid(), unix.SIGKILL)
		time.Sleep(time.Minute)
	}
	if verb != "ADD" {
		return 0
	}
	switch {
	case len(conf.Result) > 0:
		os.Stdout.Write(conf.Result)
	case len(conf.PrevResult) > 0:
		os.Stdout.Write(conf.PrevResult)
	default:
		fmt.Printf(`{"cniVersion":%q,"interfaces":[{"name":"br0"},{"name":"eth0","sandbox":%q}],
			"ips":[{"interface":1,"address":"10.1.0.2/24"},{"interface":1,"address":"fd00::2/64"}]}`, conf.CNIVersion, c.NetNS)
	}
	return 0
}

// node is a node's directories with fake plugins.
type node struct {
	t   *testing.T
	cfg Config
	log string
}

func newNode(t *testing.T) *node {
	t.Helper()
	dir := t.TempDir()
	n := &node{t: t, log: filepath.Join(dir, "calls"), cfg: Config{
		ConfDir: filepath.Join(dir, "net.d"), BinDirs: []string{filepath.Join(dir, "empty"), filepath.Join(dir, "bin")},
		CacheDir: filepath.Join(dir, "cache"), Timeout: 30 * time.Second,
	}}
	for _, d := range []string{n.cfg.ConfDir, n.cfg.BinDirs[1]} {
		if err := os.Mkdir(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	n.plugin("fake-a")
	n.plugin("fake-b")
	return n
}

func (n *node) plugin(name string) {
	n.t.Helper()
	self, err := os.Executable()
	if err != nil {
		n.t.Fatal(err)
	}
	if err := os.Symlink(self, filepath.Join(n.cfg.BinDirs[1], name)); err != nil {
		n.t.Fatal(err)
	}
}

// do is a list of "VERB=behaviour" for one fake plugin.
type fake struct {
	typ    string
	do     string
	result string
}

// list renders a conflist of fake plugins, all with the usual capabilities.
func (n *node) list(name, version string, plugins ...fake) string {
	n.t.Helper()
	var ps []map[string]any
	for _, p := range plugins {
		do := map[string]string{}
		for kv := range strings.FieldsSeq(p.do) {
			verb, what, _ := strings.Cut(kv, "=")
			do[verb] = what
		}
		m := map[string]any{"type": p.typ, "log": n.log, "do": do, "capabilities": map[string]bool{
			"portMappings": true, "bandwidth": true, "dns": true, "cgroupPath": true,
		}}
		if p.result != "" {
			m["result"] = json.RawMessage(p.result)
		}
		ps = append(ps, m)
	}
	b, err := json.Marshal(map[string]any{"cniVersion": version, "name": name, "plugins": ps})
	if err != nil {
		n.t.Fatal(err)
	}
	return string(b)
}

// conf puts a file into the configuration directory the way an editor does, or
// with "" removes it.
func (n *node) conf(file, text string) {
	n.t.Helper()
	path := filepath.Join(n.cfg.ConfDir, file)
	err := removeIfThere(path)
	if text != "" {
		err = os.WriteFile(path, []byte(text), 0o600)
	}
	if err != nil {
		n.t.Fatal(err)
	}
}

func (n *node) start() *Network {
	n.t.Helper()
	network, err := New(n.cfg)
	if err != nil {
		n.t.Fatal(err)
	}
	return network
}

func (n *node) calls() []call {
	n.t.Helper()
	b, err := os.ReadFile(n.log)
	if err != nil && !os.IsNotExist(err) {
		n.t.Fatal(err)
	}
	var calls []call
	for line := range bytes.Lines(b) {
		var c call
		if err := json.Unmarshal(line, &c); err != nil {
			n.t.Fatalf("%v: %s", err, line)
		}
		calls = append(calls, c)
	}
	return calls
}

// verbs are the calls as "VERB plugin ID", and forgets them.
func (n *node) verbs() []string {
	n.t.Helper()
	var out []string
	for _, c := range n.calls() {
		out = append(out, strings.TrimSpace(c.Verb+" "+c.Plugin+" "+c.ID))
	}
	if err := removeIfThere(n.log); err != nil {
		n.t.Fatal(err)
	}
	return out
}

func gone(pid int) bool {
	state, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return true
	}
	// A zombie that nobody has reaped yet runs no more either.
	_, rest, _ := bytes.Cut(state, []byte(") "))
	return bytes.HasPrefix(rest, []byte("Z"))
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("after 30 s still not: %s", what)
		}
	}
}

// thePod is a pod on the network namespace of the test, which fake plugins do
// not touch.
func thePod(id string) Pod {
	return Pod{ID: id, Name: "web-0", Namespace: "shop", UID: "u-" + id, NetNS: "/proc/self/ns/net"}
}
