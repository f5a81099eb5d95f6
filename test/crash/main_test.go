// Package crash tests what the conformance suite cannot: berthd that is
// killed, restarted, upgraded in place or misled; machines that reboot; shims
// that die; plugins and runtimes that fail or hang; broken configuration. Each
// test has a node of its own and ends with the leak invariant.
package crash

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berthd/berth/test/images"
	"github.com/berthd/berth/test/node"
	"github.com/berthd/berth/test/registry"
)

// What all tests share; bin is "" when not root.
var (
	bin     string
	scratch string // a directory for what is built
	reg     *registry.Server
	refs    = map[string]string{}
)

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	if os.Geteuid() != 0 {
		return m.Run() // each test skips itself and says why
	}
	node.CloseOnSignal()
	dir, err := os.MkdirTemp("", "crash-")
	if err != nil {
		fmt.Fprintln(os.Stderr, "crash:", err)
		return 1
	}
	defer os.RemoveAll(dir)
	scratch = dir
	if err := prepare(dir); err != nil {
		fmt.Fprintln(os.Stderr, "crash:", err)
		return 1
	}
	defer reg.Close()
	return m.Run()
}

func prepare(dir string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	root, err := node.Root()
	if err != nil {
		return err
	}
	guest, err := images.BuildGuest(ctx, root, dir)
	if err != nil {
		return err
	}
	all, err := images.Standard(ctx, guest)
	if err != nil {
		return err
	}
	if reg, err = registry.Start(); err != nil {
		return err
	}
	images.Push(reg, all)
	for name := range all {
		refs[name] = reg.Ref(name, images.Tag)
	}
	bin, err = node.Build(ctx, root, dir)
	return err
}

// rig is a node with a client in a test.
type rig struct {
	*testing.T
	*node.Node
	client *node.Client
	ctx    context.Context
	before node.Marks
}

// newNode lays out a node that is not started yet.
func newNode(t *testing.T, opts node.Options) *rig {
	t.Helper()
	if bin == "" {
		t.Skip(node.NeedsRoot)
	}
	if opts.Bin == "" {
		opts.Bin = bin
	}
	n, err := node.New(opts)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 90*time.Minute)
	t.Cleanup(func() {
		cancel()
		if err := n.Close(); err != nil {
			t.Errorf("clean-up: %v", err)
		}
	})
	r := &rig{T: t, Node: n, ctx: ctx}
	r.client, err = n.Client()
	r.must(err)
	return r
}

// startNode starts a node, pulls busybox, runs a first pod, and promises that
// at the end of the test nothing will be left.
func startNode(t *testing.T, opts node.Options) *rig {
	t.Helper()
	r := newNode(t, opts)
	r.begin()
	return r
}

// begin is startNode for a node that is laid out.
func (r *rig) begin() {
	r.Helper()
	r.warm()
	r.Cleanup(r.nothingLeft)
}

// warm starts a node that is laid out, pulls busybox, runs a first pod, and marks
// what is there then.
func (r *rig) warm() {
	r.Helper()
	r.must(r.Start(r.ctx))
	_, err := r.client.Pull(r.ctx, refs[images.Busybox])
	r.must(err)
	pod, _ := r.pod("first")
	r.must(r.client.Destroy(r.ctx, pod))
	r.before, err = r.Marks()
	r.must(err)
}

// nothingLeft removes all pods and reports what remains.
func (r *rig) nothingLeft() {
	r.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	left, err := r.Clean(ctx, r.before)
	for _, l := range left {
		r.Errorf("leak: %s", l)
	}
	if err != nil {
		r.Errorf("leak check: %v", err)
	}
}

// numberOf is the number from 1 that a variable of the environment has, or n.
func numberOf(t *testing.T, env string, n int) int {
	t.Helper()
	if s := os.Getenv(env); s != "" {
		var err error
		if n, err = strconv.Atoi(s); err != nil || n < 1 {
			t.Fatalf("%s=%q: want a number from 1", env, s)
		}
	}
	return n
}

func (r *rig) must(err error) {
	r.Helper()
	if err != nil {
		r.Fatal(err)
	}
}

func (r *rig) podConfig(name string) *runtime.PodSandboxConfig {
	r.Helper()
	cfg := node.PodConfig(name, r.LogDir, r.Parent)
	r.must(os.MkdirAll(cfg.LogDirectory, 0o755))
	return cfg
}

// pod runs a pod.
func (r *rig) pod(name string) (string, *runtime.PodSandboxConfig) {
	r.Helper()
	cfg := r.podConfig(name)
	id, err := r.client.Run(r.ctx, cfg)
	r.must(err)
	return id, cfg
}

// launch starts a container of busybox.
func (r *rig) launch(pod string, podCfg *runtime.PodSandboxConfig, name string, command ...string) string {
	r.Helper()
	id, err := r.client.Launch(r.ctx, pod, node.ContainerConfig(name, refs[images.Busybox], command...), podCfg)
	r.must(err)
	return id
}

func (r *rig) state(id string) *runtime.ContainerStatus {
	r.Helper()
	st, err := r.client.ContainerState(r.ctx, id)
	r.must(err)
	return st
}

// exec runs a shell command in a container and returns its output.
func (r *rig) exec(id, script string) string {
	r.Helper()
	res, err := r.client.ExecSync(r.ctx, &runtime.ExecSyncRequest{ContainerId: id, Cmd: []string{"sh", "-c", script}, Timeout: 20})
	r.must(err)
	if res.ExitCode != 0 {
		r.Fatalf("exec %q: exit code %d: %s", script, res.ExitCode, res.Stderr)
	}
	return string(res.Stdout)
}

// until polls a condition for 20 s.
func (r *rig) until(what string, fn func() bool) {
	r.Helper()
	for end := time.Now().Add(20 * time.Second); !fn(); {
		if time.Now().After(end) {
			r.Fatalf("after 20 s still no %s", what)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// processes returns the IDs of the processes in a container's cgroup.
func (r *rig) processes(id string) []int {
	r.Helper()
	dir, err := node.FindCgroup("memory", id)
	if err != nil {
		return nil
	}
	b, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
	if err != nil {
		return nil
	}
	var pids []int
	for _, f := range strings.Fields(string(b)) {
		pid, err := strconv.Atoi(f)
		r.must(err)
		pids = append(pids, pid)
	}
	return pids
}

// shimPid finds the shim of a container.
func (r *rig) shimPid(id string) int {
	r.Helper()
	m, err := r.Marks()
	r.must(err)
	for k := range m {
		f := strings.Fields(k)
		if f[0] == "process:" && strings.Contains(k, "berth-shim") && strings.Contains(k, id) {
			pid, err := strconv.Atoi(f[1])
			r.must(err)
			return pid
		}
	}
	r.Fatalf("container %.12s has no shim", id)
	return 0
}

// lines reads a container's log, in the CRI's format, and returns its text.
func (r *rig) lines(path string) []string {
	r.Helper()
	b, err := os.ReadFile(path)
	r.must(err)
	var out []string
	for _, l := range strings.Split(strings.TrimSuffix(string(b), "\n"), "\n") {
		f := strings.SplitN(l, " ", 4)
		if len(f) != 4 {
			r.Fatalf("%s: record %q", path, l)
		}
		out = append(out, f[3])
	}
	return out
}

// continuous checks that a log holds "line 1", "line 2" and so on, none lost
// and none twice, and returns how many.
func (r *rig) continuous(path string) int {
	r.Helper()
	lines := r.lines(path)
	for i, l := range lines {
		if want := fmt.Sprintf("line %d", i+1); l != want {
			r.Fatalf("log has %q where %q should be", l, want)
		}
	}
	return len(lines)
}
