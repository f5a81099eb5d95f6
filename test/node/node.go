// Package node runs a real berthd for a test: built binaries, private state
// and run directories, a network of its own, its own socket. Several nodes
// can live beside one another and beside a berthd or a peer in production.
//
// The nouns:
//
//   - Node: the daemon and its directories. It can be killed, stopped and
//     started again; its containers live on, as they would on a machine.
//   - Client: a plain CRI client that remembers the IDs it was given.
//   - Marks: everything that a node has left on the machine at one moment, by
//     kind. The difference of two is a list of leaks.
//
// Caveats: a node needs root. Close removes what the node owns by force, also
// what it leaked; look for leaks before.
package node

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/berthd/berth/shim"
)

// NeedsRoot is the message with which a test that needs a node skips itself
// when it is not root.
const NeedsRoot = "needs root: starts berthd, namespaces and containers"

// Options say how a node differs from the usual one. Only Bin is needed.
type Options struct {
	Bin        string   // directory of berthd, berth-shim, berth-init
	Registries []string // host:port of registries that speak plain HTTP
	// RegistriesConf replaces the registries.conf that New makes for them.
	RegistriesConf string
	Config         string   // TOML that is put in front of the node's own configuration
	Without        []string // keys of the node's own configuration to leave out
	// Runtimes are further handlers, the program by the name. For "runc" the
	// environment's BERTH_RUNC stands in place of the one on PATH.
	Runtimes   map[string]string
	CNI        string   // a conflist; "": one bridge with host-local and portmap; NoCNI: none
	CNIAfter   string   // a plugin's configuration, put at the end of the usual conflist
	Subnet     string   // of the usual conflist's bridge, as CIDR; "": a /24 that no other node has
	CNIBinDirs []string // replaces the variable of that name
	Env        []string // environment of berthd, in addition to that of the test
	Args       []string // arguments of berthd, in addition to --config
}

// CNIBinDirs are where plugins are looked for.
var CNIBinDirs = []string{"/usr/lib/cni", "/opt/cni/bin"}

// NoCNI as Options.CNI leaves the configuration directory empty.
const NoCNI = "none"

// Node is one berthd with all that belongs to it. Create with New.
type Node struct {
	Name     string // at most 12 bytes: also the bridge, the network and the top cgroup
	Dir      string // holds everything of the node but the run directory
	StateDir string
	RunDir   string
	Socket   string
	NRI      string // socket for plugins
	Plugins  string // directory of plugins that berthd starts
	Config   string // path of the configuration file
	LogDir   string // for pods' logs
	CNIDir   string
	Subnet   string // of the bridge, as CIDR
	LogFile  string // berthd's standard error, of all its runs
	Parent   string // the cgroup under which tests put pods

	opts   Options
	cmd    *exec.Cmd
	exited chan error
	client *Client
	ids    idSet
}

// LogsEnv names a directory in which the logs of all berthds are kept after
// the tests, one file per node.
const LogsEnv = "BERTH_TEST_LOGS"

var nodes atomic.Int32

// New lays out a node's directories and its configuration and starts nothing.
func New(opts Options) (*Node, error) {
	i := int(nodes.Add(1))
	name := fmt.Sprintf("bt%d", os.Getpid())
	if i > 1 {
		name += fmt.Sprintf("n%d", i)
	}
	// On disk rather than on a tmpfs: layers are to be on what users have.
	dir, err := os.MkdirTemp("/var/tmp", "berth-"+name+"-")
	if err != nil {
		return nil, fmt.Errorf("node: %w", err)
	}
	n := &Node{
		Name: name, Dir: dir, StateDir: filepath.Join(dir, "state"), RunDir: "/run/" + name,
		Config: filepath.Join(dir, "berth.toml"), LogDir: filepath.Join(dir, "pods"),
		CNIDir: filepath.Join(dir, "cni"), LogFile: filepath.Join(dir, "berthd.log"), Parent: "/" + name, opts: opts,
		// The subnets of nodes that run at the same time differ.
		Subnet: fmt.Sprintf("10.%d.%d.0/24", 100+os.Getpid()/250%100, (os.Getpid()%250+i*7)%250),
	}
	if opts.Subnet != "" {
		n.Subnet = opts.Subnet
	}
	n.Socket, n.NRI, n.Plugins = filepath.Join(n.RunDir, "berth.sock"), filepath.Join(n.RunDir, "nri.sock"), filepath.Join(n.Dir, "plugins")
	if logs := os.Getenv(LogsEnv); logs != "" {
		n.LogFile = filepath.Join(logs, name+".log")
	}
	for _, d := range []string{n.StateDir, n.RunDir, n.LogDir, n.CNIDir, n.addressDir()} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return nil, fmt.Errorf("node: %w", err)
		}
	}
	if err := n.configure(); err != nil {
		return nil, fmt.Errorf("node: %w", err)
	}
	live.Store(n, nil)
	return n, nil
}

// addressDir holds one file per address that host-local gave out.
func (n *Node) addressDir() string { return filepath.Join(n.Dir, "addresses") }

func (n *Node) configure() error {
	conf := n.opts.CNI
	if conf == "" {
		conf = n.Conflist()
	}
	if conf != NoCNI {
		if err := os.WriteFile(filepath.Join(n.CNIDir, "10-test.conflist"), []byte(conf), 0o600); err != nil {
			return err
		}
	}
	var b strings.Builder
	for _, r := range n.opts.Registries {
		fmt.Fprintf(&b, "[[registry]]\nlocation = %q\ninsecure = true\n", r)
	}
	registries := filepath.Join(n.Dir, "registries.conf")
	if err := os.WriteFile(registries, []byte(b.String()), 0o600); err != nil {
		return err
	}
	if n.opts.RegistriesConf != "" {
		registries = n.opts.RegistriesConf
	}
	policy := filepath.Join(n.Dir, "policy.json")
	if err := os.WriteFile(policy, []byte(`{"default":[{"type":"insecureAcceptAnything"}]}`), 0o600); err != nil {
		return err
	}
	return os.WriteFile(n.Config, []byte(n.toml(registries, policy)), 0o600)
}

func (n *Node) toml(registries, policy string) string {
	var b strings.Builder
	b.WriteString(n.opts.Config)
	b.WriteByte('\n')
	for _, kv := range n.keys(registries, policy) {
		left := false
		for _, k := range n.opts.Without {
			left = left || k == kv[0]
		}
		if !left {
			fmt.Fprintf(&b, "%s = %s\n", kv[0], kv[1])
		}
	}
	runtimes := map[string]string{}
	if runc := os.Getenv("BERTH_RUNC"); runc != "" {
		runtimes["runc"] = runc
	}
	maps.Copy(runtimes, n.opts.Runtimes)
	for name, path := range runtimes {
		fmt.Fprintf(&b, "[runtimes.%s]\npath = %q\n", name, path)
	}
	return b.String()
}

// keys returns the node's own configuration in TOML's syntax.
func (n *Node) keys(registries, policy string) [][2]string {
	q := func(s string) string { return fmt.Sprintf("%q", s) }
	bins := n.opts.CNIBinDirs
	if bins == nil {
		bins = CNIBinDirs
	}
	return [][2]string{
		{"state_dir", q(n.StateDir)},
		{"run_dir", q(n.RunDir)},
		{"socket", q(n.Socket)},
		{"nri_socket_path", q(n.NRI)},
		{"nri_plugin_path", q(n.Plugins)},
		{"nri_plugin_config_path", q(filepath.Join(n.Plugins, "conf.d"))},
		{"cgroup_driver", q("cgroupfs")},
		{"shim_path", q(filepath.Join(n.opts.Bin, "berth-shim"))},
		{"init_path", q(filepath.Join(n.opts.Bin, "berth-init"))},
		{"cni_conf_dir", q(n.CNIDir)},
		{"cni_bin_dirs", `["` + strings.Join(bins, `", "`) + `"]`},
		{"registries_conf", q(registries)},
		{"policy_path", q(policy)},
	}
}

// Conflist returns the node's own network as a CNI configuration list: a
// bridge named like the node with addresses and port mappings.
func (n *Node) Conflist() string {
	after := ""
	if n.opts.CNIAfter != "" {
		after = ", " + n.opts.CNIAfter
	}
	return fmt.Sprintf(`{"cniVersion": "1.0.0", "name": %q, "plugins": [
  {"type": "bridge", "bridge": %q, "isGateway": true, "ipMasq": true, "hairpinMode": true,
   "ipam": {"type": "host-local", "dataDir": %q, "ranges": [[{"subnet": %q}]], "routes": [{"dst": "0.0.0.0/0"}]}},
  {"type": "portmap", "capabilities": {"portMappings": true}}%s]}
`, n.Name, n.Name, n.addressDir(), n.Subnet, after)
}

// Start runs berthd and returns when it said that it is ready (sd_notify), or
// with its last words if it ends before.
func (n *Node) Start(ctx context.Context) error {
	if n.cmd != nil || ending.Load() {
		return errors.New("node: berthd already runs, or the test is being ended")
	}
	notify, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(n.Dir, "notify.sock"), Net: "unixgram"})
	if err != nil {
		return fmt.Errorf("node: %w", err)
	}
	defer notify.Close()
	defer os.Remove(filepath.Join(n.Dir, "notify.sock"))
	log, err := os.OpenFile(n.LogFile, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("node: %w", err)
	}
	defer log.Close()
	from, err := log.Seek(0, 2)
	if err != nil {
		return fmt.Errorf("node: %w", err)
	}
	cmd := exec.Command(filepath.Join(n.opts.Bin, "berthd"), append([]string{"--config", n.Config}, n.opts.Args...)...)
	cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+notify.LocalAddr().String())
	cmd.Env = append(cmd.Env, n.opts.Env...)
	cmd.Stdout, cmd.Stderr = log, log
	// A session of its own, so that Ctrl-C in a terminal reaches the test only.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("node: %w", err)
	}
	n.cmd, n.exited = cmd, make(chan error, 1)
	go func(exited chan<- error) { exited <- cmd.Wait() }(n.exited)
	return n.ready(ctx, notify, from)
}

func (n *Node) ready(ctx context.Context, notify *net.UnixConn, from int64) error {
	buf := make([]byte, 4096)
	for {
		if err := notify.SetReadDeadline(time.Now().Add(20 * time.Millisecond)); err != nil {
			return fmt.Errorf("node: %w", err)
		}
		k, err := notify.Read(buf)
		if err == nil && bytes.Contains(buf[:k], []byte("READY=1")) {
			return nil
		}
		select {
		case err := <-n.exited:
			n.cmd = nil
			return fmt.Errorf("berthd ended before it was ready: %w: %s", orEOF(err), n.log(from))
		case <-ctx.Done():
			return fmt.Errorf("berthd not ready: %w: %s", ctx.Err(), n.log(from))
		default:
		}
	}
}

func orEOF(err error) error {
	if err == nil {
		return errors.New("exit status 0")
	}
	return err
}

// log returns what berthd has written since an offset, at most 8 KiB.
func (n *Node) log(from int64) string {
	b, err := os.ReadFile(n.LogFile)
	if err != nil || int64(len(b)) < from {
		return ""
	}
	b = b[from:]
	return strings.TrimSpace(string(b[max(0, len(b)-8192):]))
}

// Pid returns berthd's process ID, 0 when it is not running.
func (n *Node) Pid() int {
	if n.cmd == nil {
		return 0
	}
	return n.cmd.Process.Pid
}

// Kill ends berthd as a crash would, with SIGKILL, and waits for its end.
func (n *Node) Kill() error {
	if n.cmd == nil {
		return nil
	}
	if err := n.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("node: %w", err)
	}
	<-n.exited
	n.cmd = nil
	return nil
}

// Abandon kills berthd with SIGKILL and does not wait for its end, which may be
// long in coming when a file system does not answer. It may be started again.
func (n *Node) Abandon() error {
	err := n.Signal(syscall.SIGKILL)
	n.cmd = nil
	return err
}

// Ended tells whether berthd is not there, also when it ended by itself. It may
// be started then.
func (n *Node) Ended() bool {
	if n.cmd == nil {
		return true
	}
	select {
	case <-n.exited:
		n.cmd = nil
		return true
	default:
		return false
	}
}

// Shims returns the shims of the node that run, by container ID, with their
// process IDs.
func (n *Node) Shims() (map[string]int, error) {
	shims, err := shim.ListShims(filepath.Join(n.RunDir, "s"))
	if err != nil {
		return nil, fmt.Errorf("node: %w", err)
	}
	return shims, nil
}

// Stop ends berthd as a service manager would, with SIGTERM, and returns an
// error unless it ended with status 0 before ctx did.
func (n *Node) Stop(ctx context.Context) error {
	if n.cmd == nil {
		return nil
	}
	if err := n.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	select {
	case err := <-n.exited:
		n.cmd = nil
		if err != nil {
			return fmt.Errorf("berthd: end on SIGTERM: %w", err)
		}
		return nil
	case <-ctx.Done():
		return fmt.Errorf("berthd: still there after SIGTERM: %w", ctx.Err())
	}
}

// Signal sends a signal to berthd.
func (n *Node) Signal(sig os.Signal) error {
	if n.cmd == nil {
		return errors.New("node: berthd does not run")
	}
	if err := n.cmd.Process.Signal(sig); err != nil {
		return fmt.Errorf("node: %w", err)
	}
	return nil
}

// Second runs another berthd with the node's configuration to its end, which
// is to come soon, and returns what it wrote.
func (n *Node) Second(ctx context.Context) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, filepath.Join(n.opts.Bin, "berthd"), "--config", n.Config)
	cmd.Env = append(os.Environ(), n.opts.Env...)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// Restart kills berthd with SIGKILL and starts it again.
func (n *Node) Restart(ctx context.Context) error {
	if err := n.Kill(); err != nil {
		return err
	}
	return n.Start(ctx)
}

// Client returns the node's client. It outlives restarts of berthd.
func (n *Node) Client() (*Client, error) {
	if n.client == nil {
		c, err := Dial(n.Socket, &n.ids)
		if err != nil {
			return nil, err
		}
		n.client = c
	}
	return n.client, nil
}
