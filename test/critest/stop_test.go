package critest

import (
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berthd/berth/test/node"
)

// freeze stops all processes of a container as an administrator may do.
func (c *container) freeze() {
	c.Helper()
	dir, err := node.FindCgroup("freezer", c.id)
	c.must(err)
	file, on := "freezer.state", "FROZEN"
	if node.Unified() {
		file, on = "cgroup.freeze", "1"
	}
	c.must(os.WriteFile(filepath.Join(dir, file), []byte(on), 0))
	c.until("frozen container", func() bool {
		if node.Unified() {
			b, err := os.ReadFile(filepath.Join(dir, "cgroup.events"))
			return err == nil && strings.Contains(string(b), "frozen 1")
		}
		b, err := os.ReadFile(filepath.Join(dir, file))
		return err == nil && strings.TrimSpace(string(b)) == "FROZEN"
	})
}

// TestStopFrozen: a frozen container is stopped when its grace period is over,
// and removed without one.
func TestStopFrozen(t *testing.T) {
	b := open(t)
	b.ours()
	p := b.pod()
	c, other := p.run(sh("sleep 300")), p.run(sh("sleep 300"))
	c.freeze()
	begin := time.Now()
	c.stop(1)
	if d := time.Since(begin); d > time.Minute {
		t.Errorf("stop took %v, want little more than the grace period of 1 s", d)
	}
	if st := c.status(); st.State != runtime.ContainerState_CONTAINER_EXITED || st.ExitCode != 137 {
		t.Errorf("container is %v with exit code %d", st.State, st.ExitCode)
	}
	other.freeze()
	begin = time.Now()
	other.remove()
	if d := time.Since(begin); d > time.Minute {
		t.Errorf("removal took %v", d)
	}
}

// TestStopManyAtOnce: stops do not wait for one another.
func TestStopManyAtOnce(t *testing.T) {
	b := open(t)
	p := b.pod()
	var stubborn []*container
	for range 6 {
		stubborn = append(stubborn, p.run([]string{"/guest", "stubborn"}))
	}
	for _, c := range stubborn {
		c.sees("ready")
	}
	begin := time.Now()
	var all sync.WaitGroup
	for _, c := range stubborn {
		for range 2 { // and are joined
			all.Go(func() {
				if _, err := b.client.StopContainer(b.ctx, &runtime.StopContainerRequest{ContainerId: c.id, Timeout: 3}); err != nil {
					t.Error(err)
				}
			})
		}
	}
	all.Wait()
	if d := time.Since(begin); d < 3*time.Second || d > 15*time.Second {
		t.Errorf("took %v, want the grace period of 3 s once", d)
	}
	for _, c := range stubborn {
		if st := c.status(); st.ExitCode != 137 || st.State != runtime.ContainerState_CONTAINER_EXITED {
			t.Errorf("container is %v with exit code %d", st.State, st.ExitCode)
		}
	}
}
