package shim_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berthd/berth/shim"
)

// These tests run real containers. They need root, an OCI runtime (RUNTIME in
// the environment, or runc on PATH) and a static busybox (/bin/busybox).

const busybox = "/bin/busybox"

const cgroupParent = "/berth-shim-test"

var builtShim = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "berth-shim-bin-")
	if err != nil {
		return "", err
	}
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", dir, "../cmd/berth-shim")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("go build: %w\n%s", err, out)
	}
	return filepath.Join(dir, "berth-shim"), nil
})

func TestMain(m *testing.M) {
	code := m.Run()
	if bin, err := builtShim(); err == nil {
		os.RemoveAll(filepath.Dir(bin))
	}
	// The runtime removes a container's cgroup, not the parent that it made.
	parents, _ := filepath.Glob("/sys/fs/cgroup/*" + cgroupParent)
	for _, dir := range append(parents, "/sys/fs/cgroup"+cgroupParent) {
		unix.Rmdir(dir)
	}
	os.Exit(code)
}

func runtimePath(t testing.TB) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: runs containers")
	}
	if _, err := os.Stat(busybox); err != nil {
		t.Skip("needs a static busybox at " + busybox + " (package busybox-static)")
	}
	name := os.Getenv("RUNTIME")
	if name == "" {
		name = "runc"
	}
	path, err := exec.LookPath(name)
	if err != nil {
		t.Skipf("needs an OCI runtime: %v", err)
	}
	return path
}

// A container is one test's: its directories, its Launch and its shim.
type container struct {
	t       testing.TB
	id      string
	dir     string // a private mount, as berth's run directory is
	spec    map[string]any
	process map[string]any
	l       shim.Launch
	c       *shim.Client
	up      shim.Launched
}

func ctxFor(t testing.TB, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	t.Cleanup(cancel)
	return ctx
}

// newContainer prepares a container that runs args.
func newContainer(t testing.TB, args ...string) *container {
	t.Helper()
	rt := runtimePath(t)
	var id [32]byte
	rand.Read(id[:])
	c := &container{t: t, id: hex.EncodeToString(id[:])}
	c.dir = privateDir(t)
	for _, d := range []string{"lower/bin", "lower/proc", "lower/sys", "lower/dev", "lower/tmp", "upper", "work", "bundle/rootfs", "logs"} {
		mustT(t, os.MkdirAll(filepath.Join(c.dir, d), 0o755))
	}
	copyFile(t, busybox, filepath.Join(c.dir, "lower/bin/busybox"))
	for _, name := range []string{"sh", "sleep", "cat", "echo", "true", "ps", "dd", "seq", "yes", "head", "tail", "tty", "stty", "ls", "tr", "kill"} {
		mustT(t, os.Symlink("busybox", filepath.Join(c.dir, "lower/bin", name)))
	}
	c.process = processOf(args...)
	c.spec = specOf(c.id, c.process)
	c.l = shim.Launch{
		ID: c.id, Bundle: c.path("bundle"), Runtime: rt, RuntimeRoot: c.path("runtime"),
		Socket: c.path(c.id + ".sock"), ExitFile: c.path("exit"), LogPath: c.path("logs/0.log"),
		Rootfs: c.path("bundle/rootfs"), PrivatePID: true, CreateTimeout: 60 * time.Second,
		Mounts: []shim.Mount{{Type: "overlay", Source: "overlay", Options: []string{
			"lowerdir=" + c.path("lower"), "upperdir=" + c.path("upper"), "workdir=" + c.path("work")}}},
	}
	return c
}

// fakeRuntime puts a shell script before the runtime. It is not below c.dir, since
// /run is often mounted noexec.
func (c *container) fakeRuntime(script string) {
	c.t.Helper()
	real := c.l.Runtime
	c.l.Runtime = filepath.Join(c.t.TempDir(), "runtime.sh")
	mustT(c.t, os.WriteFile(c.l.Runtime, []byte("#!/bin/sh\n"+script+"\nexec "+real+" \"$@\"\n"), 0o755))
}

func (c *container) path(name string) string { return filepath.Join(c.dir, name) }

func privateDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/run", "berth-shim-test-")
	mustT(t, err)
	mustT(t, unix.Mount(dir, dir, "", unix.MS_BIND, ""))
	mustT(t, unix.Mount("", dir, "", unix.MS_PRIVATE, ""))
	t.Cleanup(func() {
		unix.Unmount(dir, unix.MNT_DETACH)
		if err := os.RemoveAll(dir); err != nil {
			t.Errorf("left behind: %v", err)
		}
	})
	return dir
}

func processOf(args ...string) map[string]any {
	return map[string]any{
		"terminal": false,
		"user":     map[string]any{"uid": 0, "gid": 0},
		"args":     args,
		"env":      []string{"PATH=/bin", "HOME=/"},
		"cwd":      "/",
	}
}

func specOf(id string, process map[string]any) map[string]any {
	mount := func(dst, typ, src string, opts ...string) map[string]any {
		return map[string]any{"destination": dst, "type": typ, "source": src, "options": opts}
	}
	return map[string]any{
		"ociVersion": "1.0.2",
		"process":    process,
		"root":       map[string]any{"path": "rootfs"},
		"hostname":   "test",
		"mounts": []any{
			mount("/proc", "proc", "proc"),
			mount("/dev", "tmpfs", "tmpfs", "nosuid", "mode=755"),
			mount("/dev/pts", "devpts", "devpts", "nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"),
		},
		"linux": map[string]any{
			"cgroupsPath": cgroupParent + "/" + id,
			"namespaces": []any{
				map[string]any{"type": "pid"}, map[string]any{"type": "mount"}, map[string]any{"type": "ipc"},
				map[string]any{"type": "uts"}, map[string]any{"type": "network"},
			},
		},
	}
}

func (c *container) linux() map[string]any { return c.spec["linux"].(map[string]any) }

// sharePID takes the PID namespace out of the spec, as for a pod that shares one.
func (c *container) sharePID() {
	var keep []any
	for _, ns := range c.linux()["namespaces"].([]any) {
		if ns.(map[string]any)["type"] != "pid" {
			keep = append(keep, ns)
		}
	}
	c.linux()["namespaces"] = keep
	c.l.PrivatePID = false
	c.l.CgroupKill = []string{memoryCgroup(c.id)}
}

// memoryCgroup returns the directory that holds the container's memory files.
func memoryCgroup(id string) string {
	if _, err := os.Stat("/sys/fs/cgroup/cgroup.controllers"); err == nil {
		return "/sys/fs/cgroup" + cgroupParent + "/" + id
	}
	return "/sys/fs/cgroup/memory" + cgroupParent + "/" + id
}

func oomFile(id string) string {
	dir := memoryCgroup(id)
	if strings.HasPrefix(dir, "/sys/fs/cgroup/memory/") {
		return dir + "/memory.oom_control"
	}
	return dir + "/memory.events"
}

// create runs the shim up to the created container.
func (c *container) create() error {
	c.t.Helper()
	mustT(c.t, writeSpec(c))
	bin, err := builtShim()
	mustT(c.t, err)
	c.c, c.up, err = shim.Run(ctxFor(c.t, time.Minute), bin, c.l)
	if err != nil {
		return err
	}
	c.t.Cleanup(c.cleanup)
	return nil
}

func (c *container) run() *container {
	c.t.Helper()
	mustT(c.t, c.create())
	mustT(c.t, c.c.Start(ctxFor(c.t, time.Minute)))
	return c
}

// cleanup ends the shim and holds that it left nothing.
func (c *container) cleanup() {
	c.c.Close()
	again, err := shim.Connect(ctxFor(c.t, 10*time.Second), c.l.Socket)
	if err == nil {
		if err := again.Shutdown(ctxFor(c.t, time.Minute)); err != nil {
			c.t.Errorf("shutdown: %v", err)
		}
		again.Close()
	} else if !errors.Is(err, shim.ErrGone) {
		c.t.Errorf("connect: %v", err)
	}
	waitFor(c.t, "the shim's end", func() bool { return unix.Kill(c.up.ShimPID, 0) == unix.ESRCH })
	if _, err := os.Stat(c.l.Socket); err == nil && !c.t.Failed() {
		c.t.Errorf("socket is still there")
	}
	if names, _ := os.ReadDir(c.l.RuntimeRoot); len(names) > 0 {
		c.t.Errorf("runtime state is still there: %v", names)
	}
	for _, e := range mustReadDir(c.t, c.path("bundle")) {
		if n := e.Name(); n != "config.json" && n != "rootfs" {
			c.t.Errorf("left in the bundle: %s", n)
		}
	}
}

// exit waits for the exit and checks that the record on disk is the same.
func (c *container) exit() shim.Exit {
	c.t.Helper()
	select {
	case e := <-c.c.Exited():
		got, err := shim.ReadExit(c.l.ExitFile)
		if err != nil || got.Code != e.Code || got.Signal != e.Signal || got.OOMKilled != e.OOMKilled || !got.At.Equal(e.At) || got.Reason != e.Reason {
			c.t.Errorf("record on disk %+v (%v), told %+v", got, err, e)
		}
		return e
	case <-time.After(time.Minute):
		c.t.Fatalf("no exit after a minute; log:\n%.2000s", c.log())
	}
	panic("not reached")
}

func (c *container) log() string {
	b, err := os.ReadFile(c.l.LogPath)
	if err != nil && !os.IsNotExist(err) {
		c.t.Error(err)
	}
	return string(b)
}

// output returns the text of one stream of the log, its parts put together.
func output(t testing.TB, log, stream string) string {
	t.Helper()
	var out strings.Builder
	for line := range strings.Lines(log) {
		f := strings.SplitN(line, " ", 4)
		if len(f) != 4 || (f[2] != "F" && f[2] != "P") {
			t.Fatalf("no log record: %.100q", line)
		}
		if _, err := time.Parse(time.RFC3339Nano, f[0]); err != nil {
			t.Fatalf("stamp of %.100q: %v", line, err)
		}
		if f[1] != stream {
			continue
		}
		if f[2] == "P" {
			f[3] = strings.TrimSuffix(f[3], "\n")
		}
		out.WriteString(f[3])
	}
	return out.String()
}

func (c *container) exec(r shim.ExecRequest, args ...string) (shim.ExecResult, error) {
	c.t.Helper()
	b, err := json.Marshal(processOf(args...))
	mustT(c.t, err)
	r.Process = b
	if r.MaxOutput == 0 {
		r.MaxOutput = 1 << 20
	}
	return c.c.Exec(ctxFor(c.t, time.Minute), r)
}

func mustT(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// mustEnd waits for the end of a client's shim.
func mustEnd(t testing.TB, c *shim.Client) {
	t.Helper()
	select {
	case <-c.Gone():
	case <-time.After(time.Minute):
		t.Fatal("the shim does not end")
	}
}

func mustReadDir(t testing.TB, dir string) []os.DirEntry {
	t.Helper()
	e, err := os.ReadDir(dir)
	mustT(t, err)
	return e
}

func copyFile(t testing.TB, from, to string) {
	t.Helper()
	b, err := os.ReadFile(from)
	mustT(t, err)
	mustT(t, os.WriteFile(to, b, 0o755))
}

func waitFor(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited 20 s in vain for %s", what)
		}
	}
}

// children returns the process IDs of a process's children, with zombies.
func children(t testing.TB, pid int) []string {
	t.Helper()
	var all []byte
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	mustT(t, err)
	for _, name := range tasks {
		b, _ := os.ReadFile(name)
		all = append(all, b...)
	}
	return strings.Fields(string(all))
}

func descriptors(t testing.TB, pid int) []string {
	t.Helper()
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	var list []string
	for _, e := range mustReadDir(t, dir) {
		to, _ := os.Readlink(filepath.Join(dir, e.Name()))
		list = append(list, e.Name()+" -> "+to)
	}
	return list
}

// rollup returns a value of smaps_rollup in KiB.
func rollup(t testing.TB, pid int, key string) int {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	mustT(t, err)
	for line := range bytes.Lines(b) {
		var n int
		if name, rest, ok := strings.Cut(string(line), ":"); ok && name == key {
			fmt.Sscan(rest, &n)
			return n
		}
	}
	t.Fatalf("no %s in smaps_rollup", key)
	return 0
}

func writeSpec(c *container) error {
	b, err := json.Marshal(c.spec)
	if err != nil {
		return err
	}
	return os.WriteFile(c.path("bundle/config.json"), b, 0o600)
}

// runtimeDelete does what is left to berthd when a shim was killed.
func (c *container) runtimeDelete() {
	c.t.Helper()
	out, err := exec.Command(c.l.Runtime, "--root", c.l.RuntimeRoot, "delete", "--force", c.id).CombinedOutput()
	if err != nil {
		c.t.Errorf("runtime delete: %v\n%s", err, out)
	}
	os.Remove(c.l.Socket)
}
