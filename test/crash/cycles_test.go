package crash

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berthd/berth/test/images"
	"github.com/berthd/berth/test/node"
)

// cyclesEnv is how many cycles TestCycles does; make crash sets 200.
const cyclesEnv = "BERTH_CRASH_CYCLES"

// TestCycles runs a pod and a container from run to remove, kills berthd at a
// random moment in each, lets a client that knows nothing but CRI go on like a
// kubelet, and checks: the container's exit code is never lost, and at the end
// nothing is left.
func TestCycles(t *testing.T) {
	cycles := numberOf(t, cyclesEnv, 25)
	r := startNode(t, node.Options{})
	seed := uint64(time.Now().UnixNano())
	users := r.userNS()
	t.Logf("%d cycles, seed %d, every second one with a user namespace: %v", cycles, seed, users != nil)
	rnd := rand.New(rand.NewPCG(seed, 0))
	took := r.undisturbed()
	t.Logf("a cycle without a kill takes %v", took.Round(time.Millisecond))
	during := map[string]int{}
	begin := time.Now()
	for i := range cycles {
		moment := time.Duration(rnd.Int64N(int64(took)))
		k := &kubelet{rig: r}
		if i%2 == 1 {
			k.users = users
		}
		step := k.cycle(i, int32(1+rnd.IntN(120)), moment)
		during[step]++
		if t.Failed() {
			t.Fatalf("cycle %d: berthd was killed after %v, during %s", i, moment, step)
		}
		if i%25 == 24 {
			r.emptyNow(i)
		}
	}
	t.Logf("%d cycles in %v, kills during %v", cycles, time.Since(begin).Round(time.Millisecond), during)
	r.emptyNow(cycles)
}

// undisturbed does one cycle and returns how long it took.
func (r *rig) undisturbed() time.Duration {
	r.Helper()
	k := &kubelet{rig: r}
	begin := time.Now()
	k.life("calm", 7)
	return time.Since(begin)
}

// cycle does one cycle with a kill after a moment and returns the step that it
// hit.
func (k *kubelet) cycle(i int, code int32, moment time.Duration) string {
	k.Helper()
	done := make(chan string, 1)
	go func() {
		time.Sleep(moment)
		step, _ := k.step.Load().(string)
		if err := k.Kill(); err != nil {
			k.Errorf("kill: %v", err)
		}
		if err := k.Start(k.ctx); err != nil {
			k.Errorf("start after the kill during %s: %v", step, err)
		}
		done <- step
	}()
	k.life(fmt.Sprintf("cycle%d", i), code)
	return <-done
}

// emptyNow checks that between cycles nothing is there.
func (r *rig) emptyNow(i int) {
	r.Helper()
	left, err := r.Settle(r.ctx, r.before, 10*time.Second)
	r.must(err)
	for _, l := range left {
		r.Errorf("after %d cycles: leak: %s", i, l)
	}
	ps, err := r.client.ListPodSandbox(r.ctx, &runtime.ListPodSandboxRequest{})
	r.must(err)
	cs, err := r.client.ListContainers(r.ctx, &runtime.ListContainersRequest{})
	r.must(err)
	if len(ps.Items) != 0 || len(cs.Containers) != 0 {
		r.Errorf("after %d cycles: pods %v, containers %v", i, ps.Items, cs.Containers)
	}
}

// kubelet drives one pod as a kubelet does: it repeats a call until it is
// answered, and believes the runtime.
type kubelet struct {
	*rig
	step  atomic.Value           // name of the present step
	users *runtime.UserNamespace // of its pods; nil is the node's
}

// userNS is a user namespace as the kubelet asks for one, nil where the OCI runtime
// or the kernel has none.
func (r *rig) userNS() *runtime.UserNamespace {
	r.Helper()
	st, err := r.client.Status(r.ctx, &runtime.StatusRequest{})
	r.must(err)
	for _, h := range st.RuntimeHandlers {
		if h.Name == "" && h.GetFeatures().GetUserNamespaces() {
			ids := []*runtime.IDMapping{{HostId: 1 << 20, Length: 65536}}
			return &runtime.UserNamespace{Mode: runtime.NamespaceMode_POD, Uids: ids, Gids: ids}
		}
	}
	return nil
}

// do repeats a call as long as berthd is not there.
func (k *kubelet) do(what string, call func(context.Context) error) {
	k.Helper()
	for end := time.Now().Add(60 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		k.step.Store(what)
		err := call(k.ctx)
		if err == nil {
			return
		}
		if c := status.Code(err); c != codes.Unavailable && c != codes.Canceled && !errors.Is(err, context.DeadlineExceeded) || time.Now().After(end) {
			k.Errorf("%s: %v", what, err)
			return
		}
	}
}

// life is the whole of a pod with one container that ends with code.
func (k *kubelet) life(name string, code int32) {
	k.Helper()
	c, cfg := k.client, k.podConfig(name)
	cfg.Linux.SecurityContext.NamespaceOptions.UsernsOptions = k.users
	var pod, id string
	k.do("run", func(ctx context.Context) (err error) { pod, err = c.Run(ctx, cfg); return })
	k.do("create", func(ctx context.Context) error {
		r, err := c.CreateContainer(ctx, &runtime.CreateContainerRequest{PodSandboxId: pod, SandboxConfig: cfg,
			Config: node.ContainerConfig("c", refs[images.Busybox], "sh", "-c", fmt.Sprintf("sleep 0.05; exit %d", code))})
		id = r.GetContainerId()
		return err
	})
	k.do("start", func(ctx context.Context) error {
		_, err := c.StartContainer(ctx, &runtime.StartContainerRequest{ContainerId: id})
		return k.started(ctx, id, err)
	})
	var st *runtime.ContainerStatus
	k.do("wait", func(ctx context.Context) (err error) { st, err = c.WaitExited(ctx, id); return })
	if st.GetExitCode() != code {
		k.Errorf("exit code %d, reason %q, message %q; want %d", st.GetExitCode(), st.GetReason(), st.GetMessage(), code)
	}
	k.do("stop", func(ctx context.Context) error {
		_, err := c.StopPodSandbox(ctx, &runtime.StopPodSandboxRequest{PodSandboxId: pod})
		return err
	})
	k.do("remove container", func(ctx context.Context) error {
		_, err := c.RemoveContainer(ctx, &runtime.RemoveContainerRequest{ContainerId: id})
		return err
	})
	k.do("remove", func(ctx context.Context) error {
		_, err := c.RemovePodSandbox(ctx, &runtime.RemovePodSandboxRequest{PodSandboxId: pod})
		return err
	})
}

// started takes a start that was refused because it had happened already, and
// the answer got lost, for a success.
func (k *kubelet) started(ctx context.Context, id string, err error) error {
	if status.Code(err) != codes.FailedPrecondition {
		return err
	}
	st, sErr := k.client.ContainerState(ctx, id)
	if sErr == nil && st.State == exited {
		return nil
	}
	return err
}
