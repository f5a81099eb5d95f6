package crash

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berthd/berth/test/fuse"
	"github.com/berthd/berth/test/images"
	"github.com/berthd/berth/test/node"
)

// volume gives a node that runs a volume that can stop to answer. Close it.
func (r *rig) volume() *fuse.FS {
	r.Helper()
	f, err := fuse.New(filepath.Join(r.Dir, "fuse"))
	if errors.Is(err, fuse.ErrNone) {
		r.Skipf("no volume that hangs can be had: %v", err)
	}
	r.must(err)
	return f
}

// withVolume is a container with a volume at /data.
func withVolume(name, path string, command ...string) *runtime.ContainerConfig {
	c := node.ContainerConfig(name, refs[images.Busybox], command...)
	c.Mounts = []*runtime.Mount{{HostPath: path, ContainerPath: "/data"}}
	return c
}

// background are the verbs of what berthd does by itself, at any time.
var background = []string{"sweep", "record exit", "reach shim", "look for start"}

// operations are those under way that somebody called for, as "verb: step".
func (r *rig) operations() []string {
	r.Helper()
	st, err := r.client.Status(r.ctx, &runtime.StatusRequest{Verbose: true})
	r.must(err)
	var info struct {
		Operations []struct{ Verb, Step string }
	}
	r.must(json.Unmarshal([]byte(st.Info["sandbox"]), &info))
	out := []string{}
	for _, o := range info.Operations {
		if !slices.Contains(background, o.Verb) {
			out = append(out, o.Verb+": "+o.Step)
		}
	}
	return out
}

// works lets another pod live its whole life, and asks for all that a kubelet
// asks for. That it comes to its end is the test; how soon is not.
func (r *rig) works(name string) {
	r.Helper()
	pod, cfg := r.pod(name)
	id := r.launch(pod, cfg, "c", "sleep", "300")
	if got := r.exec(id, "echo alive"); got != "alive\n" {
		r.Errorf("exec beside a hung volume: %q", got)
	}
	r.reads(id)
	_, err := r.client.StopContainer(r.ctx, &runtime.StopContainerRequest{ContainerId: id})
	r.must(err)
	r.must(r.client.Destroy(r.ctx, pod))
}

// reads asks for lists, states and figures, which have a container among them.
func (r *rig) reads(id string) {
	r.Helper()
	_, err := r.client.ListPodSandbox(r.ctx, &runtime.ListPodSandboxRequest{})
	r.must(err)
	_, err = r.client.ListContainers(r.ctx, &runtime.ListContainersRequest{})
	r.must(err)
	_, err = r.client.Status(r.ctx, &runtime.StatusRequest{})
	r.must(err)
	_, err = r.client.ContainerStats(r.ctx, &runtime.ContainerStatsRequest{ContainerId: id})
	r.must(err)
	l, err := r.client.ListContainerStats(r.ctx, &runtime.ListContainerStatsRequest{})
	r.must(err)
	found := false
	for _, s := range l.Stats {
		found = found || s.GetAttributes().GetId() == id && s.GetMemory().GetWorkingSetBytes().GetValue() > 0
	}
	if !found {
		r.Errorf("stats of all containers lack %.12s: %v", id, l.Stats)
	}
	_, err = r.client.ListPodSandboxStats(r.ctx, &runtime.ListPodSandboxStatsRequest{})
	r.must(err)
	_, err = r.client.Images.ImageFsInfo(r.ctx, &runtime.ImageFsInfoRequest{})
	r.must(err)
}

// hangs waits until a look at the volume waits for an answer.
func (r *rig) hangs(f *fuse.FS, more int) {
	r.Helper()
	r.until("look at the hung volume", func() bool { return f.Waiting() >= more })
}

// call runs a call in the background.
func call(fn func() error) <-chan error {
	done := make(chan error, 1)
	go func() { done <- fn() }()
	return done
}

// TestHungVolume: a volume that does not answer, to anybody, not even to SIGKILL,
// makes the container wait that wants it, and nobody else: while it is created,
// while it runs, is measured and stopped, and over a kill -9 of berthd.
func TestHungVolume(t *testing.T) {
	t.Parallel()
	r := startNode(t, node.Options{})
	f := r.volume()
	r.Cleanup(func() {
		if err := f.Close(); err != nil {
			r.Errorf("volume: %v", err)
		}
	})
	pod, cfg := r.pod("hung")
	user, err := r.client.Launch(r.ctx, pod, withVolume("user", f.Volume(),
		"sh", "-c", "while [ ! -e /tmp/go ]; do sleep 0.05; done; ls /data; exit 3"), cfg)
	r.must(err)
	idle, err := r.client.Launch(r.ctx, pod, withVolume("idle", f.Volume(), "sleep", "300"), cfg)
	r.must(err)
	f.Hang()

	// A process in a container waits.
	r.exec(user, "touch /tmp/go")
	r.hangs(f, 1)
	// A container that is being made waits: no process of berthd's own can be
	// spared that, so it is its own step, known by name.
	other, otherCfg := r.pod("other")
	ctx, cancel := context.WithCancel(r.ctx)
	created := call(func() error {
		_, err := r.client.CreateContainer(ctx, &runtime.CreateContainerRequest{PodSandboxId: other,
			Config: withVolume("late", f.Volume(), "sleep", "300"), SandboxConfig: otherCfg})
		return err
	})
	r.hangs(f, 2)
	if got := r.operations(); !slices.Equal(got, []string{"create container: plan"}) {
		t.Errorf("operations under way: %q, want the creation, and its step", got)
	}
	r.works("beside")
	r.reads(user)
	cancel()
	if err := <-created; err == nil {
		t.Error("a container was made of a volume that hangs")
	}
	// Its pod does not wait for it, and one whose container runs can be stopped.
	r.must(r.client.Destroy(r.ctx, other))
	_, err = r.client.StopContainer(r.ctx, &runtime.StopContainerRequest{ContainerId: idle})
	r.must(err)
	// The process that waits cannot be killed. That is its stop's own matter.
	stopped := call(func() error {
		_, err := r.client.StopContainer(r.ctx, &runtime.StopContainerRequest{ContainerId: user})
		return err
	})
	r.until("stop that waits", func() bool { return strings.Contains(strings.Join(r.operations(), ", "), "stop container") })
	r.works("beside-a-stop")

	r.leaveBehind()
	if err := <-stopped; err == nil {
		t.Error("stopped, though its process cannot die")
	}
	if st := r.state(idle); st.State != exited {
		t.Errorf("after the restart a stopped container is %v", st.State)
	}
	if st := r.state(user); st.State != running {
		t.Errorf("after the restart a container that hangs is %v", st.State)
	}
	if l, err := r.client.ListPodSandbox(r.ctx, &runtime.ListPodSandboxRequest{}); err != nil || len(l.Items) != 1 {
		t.Errorf("pods after the restart: %v, %v; want one", l, err)
	}
	r.works("after-the-restart")

	f.Resume()
	_, err = r.client.StopContainer(r.ctx, &runtime.StopContainerRequest{ContainerId: user, Timeout: 10})
	r.must(err)
	if st := r.state(user); st.State != exited {
		t.Errorf("once the volume answers: %v", st.State)
	}
	r.until("end of all operations", func() bool { return len(r.operations()) == 0 })
}

// leaveBehind kills a berthd that cannot end, starts another one beside it, and
// checks when all is over that nothing of the first is left.
func (r *rig) leaveBehind() {
	r.Helper()
	old := r.Pid()
	begun := time.Now()
	r.must(r.Abandon())
	r.must(r.Start(r.ctx))
	r.Logf("ready %v after a kill of a berthd that cannot end", time.Since(begun).Round(time.Millisecond))
	if !isDying(old) {
		r.Errorf("berthd %d has ended: nothing was shown", old)
	}
	r.Cleanup(func() {
		r.until("end of the berthd that was killed", func() bool { return !isDying(old) })
	})
}

// isDying tells whether a process is there that has no memory of its own any more.
func isDying(pid int) bool {
	text, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "cmdline"))
	return err == nil && len(text) == 0 && syscall.Kill(pid, 0) == nil
}

// TestHungVolumeGone: a server that does not come back but ends leaves an error,
// and nothing else, with whoever waited for it.
func TestHungVolumeGone(t *testing.T) {
	t.Parallel()
	r := startNode(t, node.Options{})
	f := r.volume()
	pod, cfg := r.pod("gone")
	f.Hang()
	create := func() error {
		_, err := r.client.CreateContainer(r.ctx, &runtime.CreateContainerRequest{PodSandboxId: pod,
			Config: withVolume("c", f.Volume(), "sleep", "300"), SandboxConfig: cfg})
		return err
	}
	first := call(create)
	r.hangs(f, 1)
	second := call(create) // a kubelet that tries again joins it, and waits for no file of its own
	r.works("meanwhile")
	if n := f.Waiting(); n != 1 {
		t.Errorf("%d looks at the volume, want the first one's only", n)
	}
	r.must(f.Close())
	for _, c := range []<-chan error{first, second} {
		if err := <-c; err == nil || !strings.Contains(err.Error(), f.Volume()) {
			t.Errorf("got %v, want an error that names %s", err, f.Volume())
		}
	}
}
