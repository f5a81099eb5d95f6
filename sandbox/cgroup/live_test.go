package cgroup

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// liveGroup returns a group of this test's own, which is removed with what is
// left in it when the test ends.
func liveGroup(t *testing.T) Group {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes control groups")
	}
	h, err := Detect()
	if err != nil {
		t.Fatal(err)
	}
	g := h.at(fmt.Sprintf("/berth-test-%d-%s/pod", os.Getpid(), strings.ToLower(t.Name())))
	created, err := g.Ensure()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := errors.Join(g.Kill(ctx), g.Remove(), RemoveEmpty(created...)); err != nil {
			t.Error(err)
		}
		for _, dir := range created {
			if exists(dir) {
				t.Errorf("%s is left", dir)
			}
		}
	})
	if err != nil {
		t.Skipf("needs a writable control group file system: %v", err)
	}
	if g.h.v2 {
		// What runtimes do for theirs. Where the root has not got them on for
		// all, as it has with systemd, there is nothing to turn on.
		above := g.h.at(filepath.Dir(g.path)).dir(unified)
		for _, c := range []string{"+memory", "+pids"} {
			if err := write(above, "cgroup.subtree_control", c); err != nil {
				t.Logf("controller %s: %v", c, err)
			}
		}
	}
	return g
}

// mustRun starts a shell in the group, in all of its directories.
func mustRun(t *testing.T, g Group, script string) *exec.Cmd {
	t.Helper()
	join := ""
	for _, dir := range g.Dirs() {
		cp := filepath.Join(dir, "cpuset.cpus")
		if b, err := os.ReadFile(cp); err == nil && len(strings.TrimSpace(string(b))) == 0 && !g.h.v2 {
			// v1 takes nobody into a cpuset without CPUs; runtimes copy
			// those of the parent down.
			for _, f := range []string{"cpuset.cpus", "cpuset.mems"} {
				mustCopyDown(t, dir, f)
			}
		}
		join += fmt.Sprintf("echo $$ > %s/cgroup.procs\n", dir)
	}
	cmd := exec.Command("/bin/sh", "-c", "set -e\n"+join+"echo ready\n"+script)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 6)
	if n, err := out.Read(buf); err != nil || string(buf[:n]) != "ready\n" {
		t.Fatalf("shell said %q, %v", buf[:n], err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	return cmd
}

func mustCopyDown(t *testing.T, dir, file string) {
	t.Helper()
	parent := filepath.Dir(dir)
	b, err := os.ReadFile(filepath.Join(parent, file))
	if err != nil {
		t.Fatal(err)
	}
	if len(strings.TrimSpace(string(b))) == 0 {
		mustCopyDown(t, parent, file)
		b, _ = os.ReadFile(filepath.Join(parent, file))
	}
	if err := write(dir, file, string(b)); err != nil {
		t.Fatal(err)
	}
}

func TestEnsureAndRemove(t *testing.T) {
	g := liveGroup(t)
	if !g.Exists() {
		t.Fatal("does not exist")
	}
	for _, dir := range g.Dirs() {
		if !exists(dir) {
			t.Errorf("%s does not exist", dir)
		}
	}
	if again, err := g.Ensure(); err != nil || len(again) != 0 {
		t.Errorf("second Ensure: %q, %v", again, err)
	}
	below := g.h.at(g.path + "/a/b")
	created, err := below.Ensure()
	if err != nil || len(created) != 2*len(g.Dirs()) {
		t.Errorf("below: %q, %v", created, err)
	}
	if err := g.Remove(); err != nil || g.Exists() {
		t.Errorf("Remove: %v", err)
	}
	if err := g.Remove(); err != nil {
		t.Errorf("second Remove: %v", err)
	}
	if err := RemoveEmpty(created...); err != nil {
		t.Errorf("RemoveEmpty of what is gone: %v", err)
	}
	if _, err := g.Stats(); !errors.Is(err, ErrGone) {
		t.Errorf("Stats of a removed group: %v", err)
	}
}

func TestProcsAndStats(t *testing.T) {
	g := liveGroup(t)
	cmd := mustRun(t, g, "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; echo done; sleep 60")
	pids, err := g.Procs()
	if err != nil || !slices.Contains(pids, cmd.Process.Pid) {
		t.Fatalf("processes %v, %v, want %d", pids, err, cmd.Process.Pid)
	}
	if above, err := g.h.at(filepath.Dir(g.path)).Procs(); err != nil || !slices.Contains(above, cmd.Process.Pid) {
		t.Errorf("the group above: %v, %v", above, err)
	}
	if g.h.v2 && !exists(filepath.Join(g.dir(unified), "memory.current")) {
		t.Skip("needs the memory controller in groups below the root")
	}
	deadline := time.Now().Add(10 * time.Second)
	for {
		s, err := g.Stats()
		if err != nil {
			t.Fatal(err)
		}
		if s.CPUUsage > 0 && s.MemoryUsage > 0 && s.Threads >= 1 && s.WorkingSet <= s.MemoryUsage {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("stats stay at %+v", s)
		}
		time.Sleep(10 * time.Millisecond)
	}
	if err := RemoveEmpty(g.Dirs()[0]); err == nil || !strings.Contains(err.Error(), "busy") {
		t.Errorf("removal of a group in use: %v", err)
	}
}

func TestKill(t *testing.T) {
	g := liveGroup(t)
	below := g.h.at(g.path + "/nested")
	if _, err := below.Ensure(); err != nil {
		t.Fatal(err)
	}
	// Processes that do not listen, in a group below as well, and one that forks
	// all the time.
	outer := mustRun(t, g, "trap '' TERM INT; (trap '' TERM; while :; do /bin/true; done) & sleep 60")
	inner := mustRun(t, below, "trap '' TERM; sleep 60")
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	// Its parent has to reap a zombie, which is not ours to wait for.
	if err := g.Kill(ctx); err != nil {
		t.Fatal(err)
	}
	if pids, err := g.Procs(); err != nil || len(pids) != 0 {
		t.Errorf("left: %v, %v", pids, err)
	}
	for _, cmd := range []*exec.Cmd{outer, inner} {
		if err := cmd.Wait(); err == nil || !strings.Contains(err.Error(), "killed") {
			t.Errorf("shell: %v", err)
		}
	}
	if err := g.Kill(ctx); err != nil {
		t.Errorf("Kill of an empty group: %v", err)
	}
}

// TestKillFrozen: what a container has frozen by itself dies, too.
func TestKillFrozen(t *testing.T) {
	g := liveGroup(t)
	below := g.h.at(g.path + "/nested")
	if _, err := below.Ensure(); err != nil {
		t.Fatal(err)
	}
	cmd := mustRun(t, below, "sleep 60")
	thaw := below.freeze()
	for range 2000 {
		if below.Frozen() {
			break
		}
		time.Sleep(time.Millisecond)
	}
	if !below.Frozen() || g.Frozen() {
		t.Errorf("frozen: %v, the one above: %v", below.Frozen(), g.Frozen())
	}
	thaw()
	if below.Frozen() {
		t.Error("frozen after a thaw")
	}
	below.freeze()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if err := g.Kill(ctx); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err == nil {
		t.Error("the shell ended by itself")
	}
}

func TestKillRefuses(t *testing.T) {
	h, err := Detect()
	if err != nil {
		t.Fatal(err)
	}
	if err := h.at("/").Kill(t.Context()); !errors.Is(err, ErrInvalid) {
		t.Errorf("root: %v", err)
	}
	if err := h.at("/").Remove(); !errors.Is(err, ErrInvalid) {
		t.Errorf("removal of the root: %v", err)
	}
	if err := RemoveEmpty("relative"); !errors.Is(err, ErrInvalid) {
		t.Errorf("relative directory: %v", err)
	}
	if _, err := (Group{}).Ensure(); !errors.Is(err, ErrInvalid) {
		t.Errorf("zero group: %v", err)
	}
	if err := (Group{}).Kill(t.Context()); err != nil {
		t.Errorf("zero group: %v", err)
	}
	// A group with this process in it, made of plain files so that a mistake
	// kills nobody.
	g := fakeGroup(t, true, map[string]string{"cgroup.procs": fmt.Sprintf("%d\n", os.Getpid()), "cgroup.kill": ""})
	if err := g.Kill(t.Context()); !errors.Is(err, ErrInvalid) {
		t.Errorf("own group: %v", err)
	}
	if b, _ := os.ReadFile(filepath.Join(g.Dirs()[0], "cgroup.kill")); len(b) != 0 {
		t.Error("cgroup.kill was written")
	}
}

// TestKillGivesUp: an error says how many processes are left when time is up.
func TestKillGivesUp(t *testing.T) {
	g := fakeGroup(t, true, map[string]string{"cgroup.procs": "0\n2147483647\n", "cgroup.kill": ""})
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Millisecond)
	defer cancel()
	err := g.Kill(ctx)
	if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "1 processes left") {
		t.Errorf("got %v", err)
	}
}
