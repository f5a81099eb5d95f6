package crash

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berthd/berth/test/images"
	"github.com/berthd/berth/test/node"
)

// client works on pods of its own, one after the other.
type client struct {
	*soak
	number int
	rnd    *rand.Rand
	serial int
}

// contents of a soak's containers: one that waits for its stop, and one that ends
// by itself with a code.
const endsBy = `for i in 1 2 3 4 5 6; do echo "line $i"; sleep 0.0%d; done; exit %d`

// box is a container of a client.
type box struct {
	id, log string
	ends    bool // by itself
	code    int32
}

// try repeats a call until it succeeds, like a kubelet. done may take an error
// for the end of the matter.
func (c *client) try(what string, call func(context.Context) error, done func(error) bool) error {
	for end := time.Now().Add(5 * retryLimit); ; time.Sleep(20 * time.Millisecond) {
		ctx, cancel := context.WithTimeout(c.ctx, callLimit)
		err := call(ctx)
		cancel()
		c.calls.Add(1)
		if err == nil {
			c.done.Add(1)
			return nil
		}
		if done != nil && done(err) {
			return err
		}
		c.retried.Add(1)
		if time.Now().After(end) || c.ctx.Err() != nil {
			err = fmt.Errorf("%w: client %d: %s: %w", errGaveUp, c.number, what, err)
			c.giveUp(err)
			return err
		}
	}
}

// chance is true in one of n cases.
func (c *client) chance(n int) bool { return c.rnd.IntN(n) == 0 }

func (c *client) work(ctx context.Context) {
	for ctx.Err() == nil && c.problem.Load() == nil {
		if c.number == soakPuller && c.chance(2) {
			c.image()
			continue
		}
		c.life(ctx)
	}
}

// image pulls an image, looks whether it is there, and removes it.
func (c *client) image() {
	ref := refs[[]string{images.Layers, images.Numeric, images.Settings, images.Large}[c.rnd.IntN(4)]]
	spec := &runtime.ImageSpec{Image: ref}
	id := ""
	if c.try("pull", func(ctx context.Context) (err error) { id, err = c.client.Pull(ctx, ref); return }, nil) != nil {
		return
	}
	c.pulls.Add(1)
	err := c.try("image status", func(ctx context.Context) error {
		r, err := c.client.Images.ImageStatus(ctx, &runtime.ImageStatusRequest{Image: spec})
		if err == nil && r.GetImage().GetId() != id {
			c.violate("image %s was pulled as %s, and is told as %v", ref, id, r.GetImage())
		}
		return err
	}, nil)
	if err != nil {
		return
	}
	err = c.try("remove image", func(ctx context.Context) error {
		_, err := c.client.Images.RemoveImage(ctx, &runtime.RemoveImageRequest{Image: spec})
		return err
	}, nil)
	if err != nil {
		return
	}
	_ = c.try("image status", func(ctx context.Context) error {
		r, err := c.client.Images.ImageStatus(ctx, &runtime.ImageStatusRequest{Image: spec})
		if err == nil && r.GetImage() != nil {
			c.violate("image %s is told after its removal", ref)
		}
		return err
	}, nil)
}

func (c *client) violate(format string, args ...any) {
	c.history.mu.Lock()
	defer c.history.mu.Unlock()
	c.violateLocked(format, args...)
}

// life is one pod, from its run to its removal.
func (c *client) life(ctx context.Context) {
	c.serial++
	cfg := node.PodConfig(fmt.Sprintf("p%d-%d-%d", c.number, c.serial, c.rnd.Uint32()), c.LogDir, c.Parent)
	if err := os.MkdirAll(cfg.LogDirectory, 0o755); err != nil {
		c.giveUp(err)
		return
	}
	defer os.RemoveAll(cfg.LogDirectory)
	pod, err := c.twice("run", func(ctx context.Context) (string, error) { return c.client.Run(ctx, cfg) })
	if err != nil {
		return
	}
	c.bear(pod, object{})
	c.pods.Add(1)
	var boxes []*box
	for range 1 + c.rnd.IntN(3) {
		b, err := c.container(pod, cfg, uint32(len(boxes)))
		if err != nil {
			break
		}
		boxes = append(boxes, b)
	}
	for range 2 + c.rnd.IntN(6) {
		if ctx.Err() != nil {
			break
		}
		c.look(pod, boxes)
	}
	for _, b := range boxes {
		if c.chance(3) {
			continue // it goes with its pod
		}
		c.end(b)
	}
	c.remove(pod)
}

// twice makes a call, now and then from two callers at once, who must be told the
// same.
func (c *client) twice(what string, call func(context.Context) (string, error)) (string, error) {
	n := 1
	if c.chance(5) {
		n = 2
	}
	ids := make([]string, n)
	err := c.try(what, func(ctx context.Context) error {
		errs := make([]error, n)
		var wg sync.WaitGroup
		for i := range n {
			wg.Go(func() { ids[i], errs[i] = call(ctx) })
		}
		wg.Wait()
		return errors.Join(errs...)
	}, nil)
	if err == nil && n == 2 && ids[0] != ids[1] {
		c.violate("%s: two callers at once were told %.12s and %.12s", what, ids[0], ids[1])
	}
	return ids[0], err
}

// container makes and starts a container.
func (c *client) container(pod string, podCfg *runtime.PodSandboxConfig, attempt uint32) (*box, error) {
	b := &box{code: scriptCode, ends: c.chance(2)}
	text := script
	if b.ends {
		b.code = int32(1 + c.rnd.IntN(100))
		text = fmt.Sprintf(endsBy, c.rnd.IntN(5), b.code)
	}
	cfg := node.ContainerConfig("c", refs[images.Busybox], "sh", "-c", text)
	cfg.Metadata.Attempt, cfg.LogPath = attempt, fmt.Sprintf("c-%d.log", attempt)
	b.log = filepath.Join(podCfg.LogDirectory, cfg.LogPath)
	var err error
	b.id, err = c.twice("create", func(ctx context.Context) (string, error) {
		r, err := c.client.CreateContainer(ctx, &runtime.CreateContainerRequest{PodSandboxId: pod, Config: cfg, SandboxConfig: podCfg})
		return r.GetContainerId(), err
	})
	if err != nil {
		return nil, err
	}
	c.bear(b.id, object{pod: pod, code: b.code})
	c.conts.Add(1)
	c.note(b.id, func(o *object) { o.starting = true })
	err = c.try("start", func(ctx context.Context) error {
		_, err := c.client.StartContainer(ctx, &runtime.StartContainerRequest{ContainerId: b.id})
		return err
	}, func(err error) bool { return status.Code(err) == codes.FailedPrecondition })
	if errors.Is(err, errGaveUp) {
		return nil, err
	}
	return b, nil // also when it has ended between two tries of this call
}

// status asks for a container's status and holds it against the model; nil when
// there is none.
func (c *client) status(id string) *runtime.ContainerStatus {
	var st *runtime.ContainerStatus
	var from time.Time
	err := c.try("status", func(ctx context.Context) (err error) {
		from = time.Now()
		st, err = c.client.ContainerState(ctx, id)
		return
	}, func(err error) bool { return status.Code(err) == codes.NotFound })
	if err != nil {
		if !errors.Is(err, errGaveUp) {
			c.violate("container %.12s, which nobody has removed: %v", id, err)
		}
		return nil
	}
	c.history.container(id, st, from)
	return st
}

// look asks one question at random.
func (c *client) look(pod string, boxes []*box) {
	switch c.rnd.IntN(6) {
	case 0:
		c.lists()
	case 1:
		c.podStatus(pod)
	case 2:
		if len(boxes) > 0 {
			c.status(boxes[c.rnd.IntN(len(boxes))].id)
		}
	case 3, 4:
		if len(boxes) > 0 {
			c.exec(boxes[c.rnd.IntN(len(boxes))])
		}
	case 5:
		if len(boxes) > 0 {
			c.update(boxes[c.rnd.IntN(len(boxes))])
		}
	}
}

func (c *client) lists() {
	var ids []string
	var from, to time.Time
	pods := c.chance(2)
	_ = c.try("list", func(ctx context.Context) error {
		ids, from = nil, time.Now()
		if pods {
			r, err := c.client.ListPodSandbox(ctx, &runtime.ListPodSandboxRequest{})
			for _, p := range r.GetItems() {
				ids = append(ids, p.Id)
			}
			to = time.Now()
			return err
		}
		r, err := c.client.ListContainers(ctx, &runtime.ListContainersRequest{})
		for _, b := range r.GetContainers() {
			ids = append(ids, b.Id)
		}
		to = time.Now()
		return err
	}, nil)
	c.list(pods, ids, from, to)
}

func (c *client) podStatus(pod string) {
	var st *runtime.PodSandboxStatusResponse
	var from time.Time
	err := c.try("pod status", func(ctx context.Context) (err error) {
		from = time.Now()
		st, err = c.client.PodSandboxStatus(ctx, &runtime.PodSandboxStatusRequest{PodSandboxId: pod})
		return
	}, nil)
	if err == nil {
		c.podIs(pod, st.GetStatus().GetNetwork().GetIp(), st.GetStatus().GetState() == ready, from)
	}
}

// exec runs a command whose output nobody else gets.
func (c *client) exec(b *box) {
	word := fmt.Sprintf("w%d", c.rnd.Uint64())
	var from time.Time
	err := c.try("exec", func(ctx context.Context) error {
		from = time.Now()
		r, err := c.client.ExecSync(ctx, &runtime.ExecSyncRequest{ContainerId: b.id, Cmd: []string{"echo", word}, Timeout: 10})
		if err == nil && r.ExitCode == 0 && string(r.Stdout) != word+"\n" {
			c.violate("exec in %.12s: said %q, want %q", b.id, r.Stdout, word)
		}
		return err
	}, func(error) bool {
		st := c.status(b.id)
		return st == nil || st.State == exited
	})
	if err == nil {
		c.alive(b.id, from)
	}
}

func (c *client) update(b *box) {
	_ = c.try("update", func(ctx context.Context) error {
		_, err := c.client.UpdateContainerResources(ctx, &runtime.UpdateContainerResourcesRequest{ContainerId: b.id,
			Linux: &runtime.LinuxContainerResources{MemoryLimitInBytes: newLimit}})
		return err
	}, func(error) bool {
		st := c.status(b.id)
		return st == nil || st.State == exited
	})
}

// end waits for a container that ends by itself, or stops it, then holds its end
// and its log against what they should be, and removes it.
func (c *client) end(b *box) {
	if !b.ends {
		c.stop(b.id)
		err := c.try("stop", func(ctx context.Context) error {
			_, err := c.client.StopContainer(ctx, &runtime.StopContainerRequest{ContainerId: b.id, Timeout: 3})
			return err
		}, nil)
		if err != nil {
			return
		}
	}
	var st *runtime.ContainerStatus
	for end := time.Now().Add(retryLimit); ; time.Sleep(20 * time.Millisecond) {
		if st = c.status(b.id); st == nil || st.State == exited {
			break
		}
		if !b.ends || time.Now().After(end) {
			c.violate("container %.12s is %v after its end was asked for, or due", b.id, st.State)
			break
		}
	}
	if st != nil && st.ExitCode == b.code && !c.wasKilled(b.id) {
		c.complete(b)
	}
	c.doom(b.id)
	err := c.try("remove", func(ctx context.Context) error {
		_, err := c.client.RemoveContainer(ctx, &runtime.RemoveContainerRequest{ContainerId: b.id})
		return err
	}, nil)
	if err == nil {
		c.bury(b.id)
	}
}

// complete checks that a log holds all its lines, once each and in order.
func (c *client) complete(b *box) {
	text, err := os.ReadFile(b.log)
	if err != nil {
		c.violate("container %.12s: log: %v", b.id, err)
		return
	}
	var got []string
	for line := range strings.Lines(string(text)) {
		f := strings.SplitN(strings.TrimSuffix(line, "\n"), " ", 4)
		got = append(got, f[len(f)-1])
	}
	want := []string{"line 1", "line 2", "line 3", "line 4", "line 5", "line 6"}
	// One that waits for its stop may be stopped before it has printed all but
	// the last line.
	if n := len(got) - 1; !b.ends && n >= 0 && n < len(want) && got[n] == want[5] {
		want = append(slices.Clone(want[:n]), want[5])
	}
	if strings.Join(got, "|") != strings.Join(want, "|") {
		c.violate("container %.12s, which ended with %d: log %q", b.id, b.code, got)
	}
}

// remove stops the pod, most of the time, and removes it.
func (c *client) remove(pod string) {
	if !c.chance(4) {
		c.stop(pod)
		err := c.try("stop pod", func(ctx context.Context) error {
			_, err := c.client.StopPodSandbox(ctx, &runtime.StopPodSandboxRequest{PodSandboxId: pod})
			return err
		}, nil)
		if err != nil {
			return
		}
	}
	c.doom(pod)
	err := c.try("remove pod", func(ctx context.Context) error {
		_, err := c.client.RemovePodSandbox(ctx, &runtime.RemovePodSandboxRequest{PodSandboxId: pod})
		return err
	}, nil)
	if err == nil {
		c.bury(pod)
	}
}
