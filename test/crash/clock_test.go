package crash

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berthd/berth/test/images"
	"github.com/berthd/berth/test/node"
)

const year = 365 * 24 * 3600 // seconds

// TestClock: the clock of berthd and its shims is set back a year and forward a year
// under what runs and what is under way. Attempts stay in order, times of one object and of a pod
// grow, nothing is given up before its time, and what is new has the time that it is.
func TestClock(t *testing.T) {
	if os.Getenv(matrixEnv) == "" {
		t.Skipf("compiles everything anew: set %s, as make crash does", matrixEnv)
	}
	if bin == "" {
		t.Skip(node.NeedsRoot)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	root, err := node.Root()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := node.BuildShifted(ctx, root, dir); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "clock")
	r := startNode(t, node.Options{Bin: dir, Env: []string{node.ClockEnv + "=" + file}})
	c := &clock{rig: r, file: file}
	c.pod, c.cfg = r.pod("clock")
	c.stays = r.launch(c.pod, c.cfg, "stays", "sh", "-c", "while :; do :; done")
	c.stayed = r.state(c.stays)
	for _, offset := range []int64{0, -year, year, 0, 2 * year, -2 * year} {
		c.set(offset)
		c.attempts()
		c.figures()
		r.must(r.Restart(r.ctx))
		c.attempts()
	}
}

// clock is a test of times: what it was told last, and what must come after it.
type clock struct {
	*rig
	file   string
	offset int64

	pod, stays string
	cfg        *runtime.PodSandboxConfig
	stayed     *runtime.ContainerStatus

	attempt, podAttempt uint32
	created             int64 // of the last attempt of the container
	podCreated          int64 // of the last attempt of the pod
	usage               uint64
}

// set sets the clock while a stop, a command and the start of a pod are under way.
func (c *clock) set(offset int64) {
	c.Helper()
	id := c.launch(c.pod, c.cfg, "graceful", "sh", "-c", "trap 'until [ -e /dev/shm/set ]; do sleep 0.05; done; sleep 1; exit 9' TERM; touch /tmp/ready; while :; do sleep 0.05; done")
	c.until("trap", func() bool { return strings.Contains(c.exec(id, "ls /tmp"), "ready") })
	command := call(func() error {
		_, err := c.client.ExecSync(c.ctx, &runtime.ExecSyncRequest{ContainerId: c.stays, Cmd: []string{"sh", "-c", "touch /tmp/began; until [ -e /dev/shm/set ]; do sleep 0.05; done; sleep 1"}, Timeout: 120})
		return err
	})
	c.until("command", func() bool { return strings.Contains(c.exec(c.stays, "ls /tmp"), "began") })
	stop := call(func() error {
		_, err := c.client.StopContainer(c.ctx, &runtime.StopContainerRequest{ContainerId: id, Timeout: 120})
		return err
	})
	c.until("stop", func() bool { return strings.Contains(strings.Join(c.operations(), ", "), "stop container") })
	c.offset = offset
	c.must(node.SetClock(c.file, offset))
	set := filepath.Join(c.RunDir, "pods", c.pod, "shm", "set")
	c.must(os.WriteFile(set, nil, 0o644))
	if err := <-command; err != nil {
		c.Errorf("a command over a change of the clock by %d s: %v", offset, err)
	}
	c.must(<-stop)
	c.must(os.Remove(set))
	st := c.state(id)
	if st.ExitCode != 9 {
		c.Errorf("killed before its time was up: exit code %d after a change of the clock to %d s", st.ExitCode, offset)
	}
	c.ordered("graceful", st)
	c.exec(c.stays, "rm /tmp/began")
	_, err := c.client.RemoveContainer(c.ctx, &runtime.RemoveContainerRequest{ContainerId: id})
	c.must(err)
}

func (c *clock) ordered(what string, st *runtime.ContainerStatus) {
	c.Helper()
	if st.StartedAt <= st.CreatedAt || st.State == exited && st.FinishedAt <= st.StartedAt {
		c.Errorf("%s: created at %d, started at %d, finished at %d", what, st.CreatedAt, st.StartedAt, st.FinishedAt)
	}
}

// attempts makes the next attempt of a container, of a pod, and something new.
func (c *clock) attempts() {
	c.Helper()
	cfg := node.ContainerConfig("again", refs[images.Busybox], "sh", "-c", "exit 1")
	cfg.Metadata.Attempt = c.attempt
	c.attempt++
	id, err := c.client.Launch(c.ctx, c.pod, cfg, c.cfg)
	c.must(err)
	st, err := c.client.WaitExited(c.ctx, id)
	c.must(err)
	c.ordered("again", st)
	if st.ExitCode != 1 || st.CreatedAt <= c.created {
		c.Errorf("attempt %d ended with %d, was made at %d, the one before at %d", cfg.Metadata.Attempt, st.ExitCode, st.CreatedAt, c.created)
	}
	c.created = st.CreatedAt
	if now := c.state(c.stays); now.State != running || now.CreatedAt != c.stayed.CreatedAt || now.StartedAt != c.stayed.StartedAt {
		c.Errorf("what runs: %v, was %v", now, c.stayed)
	}
	ps, err := c.client.PodSandboxStatus(c.ctx, &runtime.PodSandboxStatusRequest{PodSandboxId: c.pod})
	c.must(err)
	// A berthd that is started anew knows of no status that was told without a change.
	if ps.Timestamp < c.created || ps.Status.State != ready {
		c.Errorf("status of the pod at %d, with an attempt made at %d", ps.Timestamp, c.created)
	}

	again := c.podConfig("again")
	again.Metadata.Attempt = c.podAttempt
	c.podAttempt++
	pod, err := c.client.Run(c.ctx, again)
	c.must(err)
	as, err := c.client.PodSandboxStatus(c.ctx, &runtime.PodSandboxStatusRequest{PodSandboxId: pod})
	c.must(err)
	if as.Status.CreatedAt <= c.podCreated {
		c.Errorf("attempt %d of a pod made at %d, the one before at %d", again.Metadata.Attempt, as.Status.CreatedAt, c.podCreated)
	}
	c.podCreated = as.Status.CreatedAt
	_, err = c.client.StopPodSandbox(c.ctx, &runtime.StopPodSandboxRequest{PodSandboxId: pod})
	c.must(err)

	fresh, _ := c.rig.pod("fresh")
	fs, err := c.client.PodSandboxStatus(c.ctx, &runtime.PodSandboxStatusRequest{PodSandboxId: fresh})
	c.must(err)
	want := time.Now().Add(time.Duration(c.offset) * time.Second)
	if d := time.Unix(0, fs.Status.CreatedAt).Sub(want); d > time.Hour || d < -time.Hour {
		c.Errorf("a pod without a past was made %v off its time", d)
	}
	c.must(c.client.Destroy(c.ctx, fresh))
}

// figures checks what is counted over time.
func (c *clock) figures() {
	c.Helper()
	for range 2 {
		s, err := c.client.ContainerStats(c.ctx, &runtime.ContainerStatsRequest{ContainerId: c.stays})
		c.must(err)
		cpu := s.Stats.GetCpu()
		if n := cpu.GetUsageCoreNanoSeconds().GetValue(); n < c.usage {
			c.Errorf("usage went back from %d to %d", c.usage, n)
		} else {
			c.usage = n
		}
		if n := cpu.GetUsageNanoCores().GetValue(); n > 1e12 {
			c.Errorf("a busy loop takes %d nanocores", n)
		}
		time.Sleep(200 * time.Millisecond)
	}
}
