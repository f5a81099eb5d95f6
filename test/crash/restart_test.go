package crash

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berthd/berth/test/images"
	"github.com/berthd/berth/test/node"
)

const (
	running  = runtime.ContainerState_CONTAINER_RUNNING
	exited   = runtime.ContainerState_CONTAINER_EXITED
	ready    = runtime.PodSandboxState_SANDBOX_READY
	notReady = runtime.PodSandboxState_SANDBOX_NOTREADY
)

// TestRestart: what runs does not notice that berthd is killed or stopped.
func TestRestart(t *testing.T) {
	t.Parallel()
	r := startNode(t, node.Options{})
	pod, cfg := r.pod("restart")
	id := r.launch(pod, cfg, "talker", "/guest", "lines", "0", "2000")
	log := filepath.Join(cfg.LogDirectory, "talker.log")
	pids, before := r.processes(id), r.state(id)
	for i, down := range []func() error{
		r.Kill,
		func() error { return r.Stop(r.ctx) },
		func() error { return r.Signal(syscall.SIGKILL) },
	} {
		r.must(down())
		r.must(r.Kill()) // reaps it, where the signal was sent by hand
		time.Sleep(300 * time.Millisecond)
		begin := time.Now()
		r.must(r.Start(r.ctx))
		t.Logf("start %d: ready after %v", i, time.Since(begin).Round(time.Millisecond))
		st := r.state(id)
		if st.State != running || st.StartedAt != before.StartedAt || st.CreatedAt != before.CreatedAt {
			t.Errorf("after the restart: %v, started at %d, was %d", st.State, st.StartedAt, before.StartedAt)
		}
		if now := r.processes(id); !slices.Equal(now, pids) {
			t.Errorf("processes %v, were %v", now, pids)
		}
		if got := r.exec(id, "echo alive"); got != "alive\n" {
			t.Errorf("exec: %q", got)
		}
	}
	p, err := r.client.PodSandboxStatus(r.ctx, &runtime.PodSandboxStatusRequest{PodSandboxId: pod})
	r.must(err)
	if p.Status.State != ready || p.Status.GetNetwork().GetIp() == "" {
		t.Errorf("pod after the restarts: %v", p.Status)
	}
	stats, err := r.client.ContainerStats(r.ctx, &runtime.ContainerStatsRequest{ContainerId: id})
	r.must(err)
	if stats.Stats.GetMemory().GetWorkingSetBytes().GetValue() == 0 {
		t.Errorf("stats after the restarts: %v", stats.Stats)
	}
	_, err = r.client.StopContainer(r.ctx, &runtime.StopContainerRequest{ContainerId: id, Timeout: 0})
	r.must(err)
	if n := r.continuous(log); n < 100 {
		t.Errorf("only %d lines", n)
	}
}

// TestExitWhileDown: exits that happen while nobody looks are told with their
// code, time and reason.
func TestExitWhileDown(t *testing.T) {
	t.Parallel()
	r := startNode(t, node.Options{})
	pod, cfg := r.pod("down")
	begun := time.Now() // on a busy machine the first ones end before the last one runs
	want := map[string]int32{}
	for _, code := range []int32{0, 1, 42, 255} {
		want[r.launch(pod, cfg, fmt.Sprintf("exits%d", code), "sh", "-c", fmt.Sprintf("sleep 0.7; echo bye; exit %d", code))] = code
	}
	big := node.ContainerConfig("eater", refs[images.Busybox], "sh", "-c", "sleep 0.7; exec /guest eat 256")
	big.Linux.Resources.MemoryLimitInBytes, big.Linux.Resources.MemorySwapLimitInBytes = 40<<20, 40<<20
	eater, err := r.client.Launch(r.ctx, pod, big, cfg)
	r.must(err)
	stays := r.launch(pod, cfg, "stays", "sleep", "300")
	r.must(r.Kill())
	for id := range want {
		r.until("exit record", func() bool {
			_, err := os.Stat(filepath.Join(r.StateDir, "containers", id, "exit"))
			return err == nil
		})
	}
	over := time.Now()
	time.Sleep(time.Second) // the start is not to be taken for the end
	r.must(r.Start(r.ctx))
	_, err = r.client.WaitExited(r.ctx, eater)
	r.must(err)
	for id, code := range want {
		st := r.state(id)
		reason := map[bool]string{true: "Completed", false: "Error"}[code == 0]
		if st.State != exited || st.ExitCode != code || st.Reason != reason {
			t.Errorf("exit code %d: told as %v, %d, %q", code, st.State, st.ExitCode, st.Reason)
		}
		if at := time.Unix(0, st.FinishedAt); at.Before(begun) || at.After(over) {
			t.Errorf("exit code %d: told to have ended at %v, want it between %v and %v", code, at, begun, over)
		}
		if got := r.lines(filepath.Join(cfg.LogDirectory, fmt.Sprintf("exits%d.log", code))); !slices.Equal(got, []string{"bye"}) {
			t.Errorf("exit code %d: log %q", code, got)
		}
	}
	if st := r.state(eater); st.Reason != "OOMKilled" || st.ExitCode != 137 {
		t.Errorf("out of memory: told as %q, %d", st.Reason, st.ExitCode)
	}
	if st := r.state(stays); st.State != running {
		t.Errorf("a container that runs on is %v", st.State)
	}
}

// TestListAtFirstAnswer: from the first moment on at which the socket answers,
// it tells the whole truth.
func TestListAtFirstAnswer(t *testing.T) {
	t.Parallel()
	r := startNode(t, node.Options{})
	want := map[string]runtime.ContainerState{}
	pods := map[string]bool{}
	for i := range 5 {
		pod, cfg := r.pod(fmt.Sprintf("list%d", i))
		pods[pod] = true
		want[r.launch(pod, cfg, "a", "sleep", "300")] = running
		want[r.launch(pod, cfg, "b", "sleep", "0.5")] = exited
	}
	r.must(r.Kill())
	time.Sleep(time.Second)
	started := call(func() error { return r.Start(r.ctx) })
	cs, err := r.client.ListContainers(r.ctx, &runtime.ListContainersRequest{}, grpc.WaitForReady(true))
	r.must(err)
	ps, err := r.client.ListPodSandbox(r.ctx, &runtime.ListPodSandboxRequest{})
	r.must(err)
	r.must(<-started)
	if len(cs.Containers) != len(want) || len(ps.Items) != len(pods) {
		t.Errorf("%d containers and %d pods, want %d and %d", len(cs.Containers), len(ps.Items), len(want), len(pods))
	}
	for _, c := range cs.Containers {
		if c.State != want[c.Id] {
			t.Errorf("container %.12s is %v, want %v", c.Id, c.State, want[c.Id])
		}
	}
	for _, p := range ps.Items {
		if p.State != ready || !pods[p.Id] {
			t.Errorf("pod %.12s is %v", p.Id, p.State)
		}
	}
}

// TestReboot: after a boot everything is told as ended, the networks are
// released, and removal works, with no manual step.
func TestReboot(t *testing.T) {
	t.Parallel()
	r := startNode(t, node.Options{})
	pod, cfg := r.pod("boot")
	id := r.launch(pod, cfg, "web", "/guest", "http", ":80", "x")
	done := r.launch(pod, cfg, "done", "sh", "-c", "exit 3")
	_, err := r.client.WaitExited(r.ctx, done)
	r.must(err)
	r.must(r.Reboot(r.ctx, "11111111-2222-3333-4444-555555555555"))
	p, err := r.client.PodSandboxStatus(r.ctx, &runtime.PodSandboxStatusRequest{PodSandboxId: pod})
	r.must(err)
	if p.Status.State != notReady {
		t.Errorf("pod after a reboot is %v", p.Status.State)
	}
	st := r.state(id)
	if st.State != exited || st.ExitCode == 0 || st.Reason == "" || st.Reason == "Completed" || st.FinishedAt == 0 {
		t.Errorf("container after a reboot: %v, exit code %d, reason %q, finished at %d", st.State, st.ExitCode, st.Reason, st.FinishedAt)
	}
	if st := r.state(done); st.ExitCode != 3 {
		t.Errorf("exit code from before the reboot became %d", st.ExitCode)
	}
	r.until("released address", func() bool {
		m, err := r.Marks()
		r.must(err)
		for _, k := range m.Minus(r.before) {
			if strings.HasPrefix(k, "address:") || strings.HasPrefix(k, "iptables:") {
				return false
			}
		}
		return true
	})
	again, cfg2 := r.pod("boot-again")
	r.launch(again, cfg2, "web", "sleep", "300")
}

// TestShimKilled: the container of a shim that is killed is ended at once and
// told as such; also when berthd was down.
func TestShimKilled(t *testing.T) {
	t.Parallel()
	r := startNode(t, node.Options{})
	pod, cfg := r.pod("shim")
	for _, down := range []bool{false, true} {
		id := r.launch(pod, cfg, fmt.Sprintf("c%v", down), "sh", "-c", "sleep 300 & sleep 301 & wait")
		pid := r.shimPid(id)
		if down {
			r.must(r.Kill())
		}
		r.must(syscall.Kill(pid, syscall.SIGKILL))
		begin := time.Now()
		if down {
			r.must(r.Start(r.ctx))
		}
		st, err := r.client.WaitExited(r.ctx, id)
		r.must(err)
		if d := time.Since(begin); d > 5*time.Second {
			t.Errorf("berthd down %v: noticed after %v", down, d)
		}
		if st.ExitCode != 255 || st.Reason == "" || !strings.Contains(strings.ToLower(st.Message), "shim") {
			t.Errorf("berthd down %v: exit code %d, reason %q, message %q; want 255 and the shim named", down, st.ExitCode, st.Reason, st.Message)
		}
		if left := r.processes(id); len(left) != 0 {
			t.Errorf("berthd down %v: processes %v are left of the container", down, left)
		}
	}
	other := r.launch(pod, cfg, "other", "sleep", "300")
	if st := r.state(other); st.State != running {
		t.Errorf("next container of the pod is %v", st.State)
	}
}

// TestBookLost: a damaged book is kept aside, and what runs is found again as
// far as shims and bundles tell; above all it can be stopped and removed.
func TestBookLost(t *testing.T) {
	t.Parallel()
	r := startNode(t, node.Options{})
	pod, cfg := r.pod("book")
	id := r.launch(pod, cfg, "survivor", "/guest", "lines", "0", "5000")
	// An init that the pod gets only when a container wants it.
	shares := node.ContainerConfig("shares", refs[images.Busybox], "sleep", "300")
	shares.Linux.SecurityContext.NamespaceOptions.Pid = runtime.NamespaceMode_POD
	withInit, err := r.client.Launch(r.ctx, pod, shares, cfg)
	r.must(err)
	r.must(r.Kill())
	book := filepath.Join(r.StateDir, "book.db")
	raw, err := os.ReadFile(book)
	r.must(err)
	r.must(os.WriteFile(book, slices.Concat(make([]byte, 16384), raw[16384:]), 0o600))
	r.must(r.Start(r.ctx))
	kept, err := filepath.Glob(book + ".corrupt-*")
	r.must(err)
	if len(kept) != 1 {
		t.Errorf("damaged books kept aside: %q, want one", kept)
	}
	for _, k := range kept {
		r.before["file: "+k] = true // kept on purpose
	}
	if st := r.state(id); st.State != running || st.Metadata.GetName() != "survivor" {
		t.Errorf("container: %v, %v", st.State, st.Metadata)
	}
	if got := r.exec(id, "echo alive"); got != "alive\n" {
		t.Errorf("exec: %q", got)
	}
	ps, err := r.client.ListPodSandbox(r.ctx, &runtime.ListPodSandboxRequest{Filter: &runtime.PodSandboxFilter{Id: pod}})
	r.must(err)
	if len(ps.Items) != 1 || ps.Items[0].Metadata.GetName() != "book" {
		t.Errorf("pod: %v", ps.Items)
	}
	if got := r.exec(withInit, "ps -o args"); !strings.Contains(got, "berth-init") {
		t.Errorf("processes %q, want the pod's init", got)
	}
	shares.Metadata.Name, shares.LogPath = "more", "more.log"
	_, err = r.client.Pull(r.ctx, refs[images.Busybox]) // images are known to the book only
	r.must(err)
	more, err := r.client.Launch(r.ctx, pod, shares, cfg)
	r.must(err)
	if a, b := r.exec(withInit, "readlink /proc/self/ns/pid"), r.exec(more, "readlink /proc/self/ns/pid"); a != b {
		t.Errorf("PID namespaces %q and %q, want one", a, b)
	}
	r.must(r.client.Destroy(r.ctx, pod))
	_, err = r.client.Images.RemoveImage(r.ctx, &runtime.RemoveImageRequest{Image: &runtime.ImageSpec{Image: refs[images.Busybox]}})
	r.must(err) // its layers are not where they were at the beginning
}

// TestTwoDaemons: a second berthd on the same directories gives up, says why,
// and does no harm to the first.
func TestTwoDaemons(t *testing.T) {
	t.Parallel()
	r := startNode(t, node.Options{})
	out, err := r.Second(r.ctx)
	if err == nil {
		t.Error("a second berthd on the same directories started")
	}
	if !strings.Contains(out, r.StateDir) && !strings.Contains(out, r.RunDir) {
		t.Errorf("its last words do not name the directory: %s", out)
	}
	pod, cfg := r.pod("two")
	r.launch(pod, cfg, "c", "sleep", "300")
}

// TestUnavailable: while berthd is down a call fails at once and plainly.
func TestUnavailable(t *testing.T) {
	t.Parallel()
	r := startNode(t, node.Options{})
	r.must(r.Stop(r.ctx))
	if _, err := r.client.Version(r.ctx, &runtime.VersionRequest{}); status.Code(err) != codes.Unavailable {
		t.Errorf("got %v, want code Unavailable", err)
	}
	r.must(r.Start(r.ctx))
	r.until("answer", func() bool {
		_, err := r.client.Version(r.ctx, &runtime.VersionRequest{})
		return err == nil
	})
}
