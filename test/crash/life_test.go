package crash

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berthd/berth/test/images"
	"github.com/berthd/berth/test/node"
)

// callLimit is for how long a life waits for one answer, as a kubelet does with
// its runtime-request-timeout, and retryLimit for how long it repeats a call.
const (
	callLimit  = 20 * time.Second
	retryLimit = 60 * time.Second
)

// script is what the container of a life runs: five lines, then it waits for its
// stop signal, says one more and ends with the code 7.
const (
	script = `trap 'echo "line 6"; exit 7' TERM
for i in 1 2 3 4 5; do echo "line $i"; done
sleep 1000 & wait $!`
	scriptCode  = 7
	scriptLines = 6
)

// life takes one pod with one container from its first to its last call, as a
// kubelet does: it repeats what failed, makes a new container for one that
// ended or did not start, and believes the runtime. Whatever is broken under
// it, it has to get through, and nothing may be lost that was not killed.
type life struct {
	*rig
	name   string
	shared bool // containers share the pod's PID namespace

	retries   int      // calls that failed
	notes     []string // what they said
	onRetry   func()   // called after each call that failed
	recreated int      // containers that were lost or did not start
	lost      []string // exit codes and lines that were lost, each with its reason
	slow      bool     // a shim hangs
	excused   bool     // shims are killed: what they have not written yet is lost

	pod     string
	cfg     *runtime.PodSandboxConfig
	attempt uint32
}

// do repeats a call until it succeeds.
func (l *life) do(what string, call func(context.Context) error) {
	l.Helper()
	for end := time.Now().Add(retryLimit); ; time.Sleep(20 * time.Millisecond) {
		ctx, cancel := context.WithTimeout(l.ctx, callLimit)
		err := call(ctx)
		cancel()
		if err == nil {
			return
		}
		l.revive()
		if l.onRetry != nil {
			l.onRetry()
		}
		if time.Now().After(end) || l.ctx.Err() != nil {
			l.Fatalf("%s: does not succeed in %v: %v", what, retryLimit, err)
		}
		if c := status.Code(err); c != codes.Unavailable && c != codes.Canceled {
			l.retries++
			l.notes = append(l.notes, fmt.Sprintf("%s: %v", what, err))
		}
	}
}

// errLost ends the work with a container that has ended before its time.
var errLost = errors.New("the container was lost")

// run is the whole life.
func (l *life) run() {
	l.Helper()
	l.cfg = l.podConfig(l.name)
	mode := runtime.NamespaceMode_CONTAINER
	if l.shared {
		mode = runtime.NamespaceMode_POD
	}
	l.cfg.Linux.SecurityContext.NamespaceOptions.Pid = mode
	for {
		l.do("run", func(ctx context.Context) (err error) { l.pod, err = l.client.Run(ctx, l.cfg); return })
		if err := l.container(); err == nil {
			break
		} else if !errors.Is(err, errLost) {
			l.Fatal(err)
		}
		if l.recreated++; l.recreated > 5 {
			l.Fatalf("%d containers in a row were lost", l.recreated)
		}
		l.attempt++
		l.renew()
	}
	l.do("stop pod", func(ctx context.Context) error {
		_, err := l.client.StopPodSandbox(ctx, &runtime.StopPodSandboxRequest{PodSandboxId: l.pod})
		return err
	})
	l.do("remove pod", func(ctx context.Context) error {
		_, err := l.client.RemovePodSandbox(ctx, &runtime.RemovePodSandboxRequest{PodSandboxId: l.pod})
		return err
	})
	l.gone()
}

// renew makes a new pod if the present one is not ready any more, as a kubelet
// does whose pod has lost its init.
func (l *life) renew() {
	l.Helper()
	var st *runtime.PodSandboxStatusResponse
	l.do("pod status", func(ctx context.Context) (err error) {
		st, err = l.client.PodSandboxStatus(ctx, &runtime.PodSandboxStatusRequest{PodSandboxId: l.pod})
		return
	})
	if st.GetStatus().GetState() == ready {
		return
	}
	l.do("stop pod that is not ready", func(ctx context.Context) error { return l.client.Destroy(ctx, l.pod) })
	l.cfg.Metadata.Attempt++
}

// container is the life of one container. errLost when it ended before it was
// told to, with a reason.
func (l *life) container() error {
	l.Helper()
	cfg := node.ContainerConfig("c", refs[images.Busybox], "sh", "-c", script)
	cfg.Metadata.Attempt, cfg.LogPath = l.attempt, fmt.Sprintf("c-%d.log", l.attempt)
	cfg.Linux.SecurityContext.NamespaceOptions.Pid = l.cfg.Linux.SecurityContext.NamespaceOptions.Pid
	id := ""
	err := l.unlessLost(&id, "create", func(ctx context.Context) error {
		r, err := l.client.CreateContainer(ctx, &runtime.CreateContainerRequest{PodSandboxId: l.pod, Config: cfg, SandboxConfig: l.cfg})
		id = r.GetContainerId()
		return err
	})
	if err != nil {
		return err
	}
	log := filepath.Join(l.cfg.LogDirectory, cfg.LogPath)
	for _, s := range []struct {
		what string
		call func(context.Context) error
	}{
		{"start", func(ctx context.Context) error {
			_, err := l.client.StartContainer(ctx, &runtime.StartContainerRequest{ContainerId: id})
			return err
		}},
		{"lines", func(context.Context) error { return l.awaits(log, "line 5") }},
		{"exec", func(ctx context.Context) error { return l.execs(ctx, id) }},
		{"update", func(ctx context.Context) error { return l.updates(ctx, id) }},
	} {
		if err := l.unlessLost(&id, s.what, s.call); err != nil {
			if l.onRetry != nil {
				l.onRetry()
			}
			return err
		}
	}
	l.stop(id, log)
	return nil
}

// unlessLost is do for a call that needs a live container and pod.
func (l *life) unlessLost(id *string, what string, call func(context.Context) error) (err error) {
	l.Helper()
	l.do(what, func(ctx context.Context) error {
		if err = call(ctx); err == nil {
			return nil
		}
		l.revive()
		if st, e := l.client.PodSandboxStatus(ctx, &runtime.PodSandboxStatusRequest{PodSandboxId: l.pod}); e == nil && st.Status.State != ready {
			if !l.shared {
				l.Fatalf("%s: the pod is not ready any more: %v", what, st)
			}
			err = fmt.Errorf("%w: its pod is %v", errLost, st.Status.State)
			return nil
		}
		if *id == "" {
			return err
		}
		st, e := l.client.ContainerState(ctx, *id)
		if e != nil || st.State != exited {
			return err // the same call again
		}
		l.judge(what, st)
		err = fmt.Errorf("%w: %s: exit code %d, %s: %s", errLost, what, st.ExitCode, st.Reason, st.Message)
		return nil
	})
	return err
}

// judge makes sure that the end of a container that nobody told to end has a
// reason.
func (l *life) judge(what string, st *runtime.ContainerStatus) {
	l.Helper()
	switch {
	case st.Reason == "StartError" && st.Message != "":
	case l.excused && st.ExitCode == 255 && strings.Contains(st.Message, "shim"):
		l.lost = append(l.lost, fmt.Sprintf("exit code at %s: %s", what, st.Message))
	case l.shared && l.excused: // the init's end takes all others with it
	default:
		l.Errorf("%s: the container has ended by itself: exit code %d, reason %q, message %q", what, st.ExitCode, st.Reason, st.Message)
	}
}

// awaits waits for a line of the log.
func (l *life) awaits(log, line string) error {
	for end := time.Now().Add(2 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		b, err := os.ReadFile(log)
		if err == nil && strings.Contains(string(b), line+"\n") {
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("log %s has no %q: %q, %v", log, line, b, err)
		}
	}
}

func (l *life) execs(ctx context.Context, id string) error {
	r, err := l.client.ExecSync(ctx, &runtime.ExecSyncRequest{ContainerId: id, Cmd: []string{"echo", "alive"}, Timeout: 5})
	if err == nil && (r.ExitCode != 0 || string(r.Stdout) != "alive\n") {
		err = fmt.Errorf("exec: exit code %d, %q, %q", r.ExitCode, r.Stdout, r.Stderr)
	}
	return err
}

// newLimit is what updates sets, in bytes.
const newLimit = 64 << 20

func (l *life) updates(ctx context.Context, id string) error {
	_, err := l.client.UpdateContainerResources(ctx, &runtime.UpdateContainerResourcesRequest{ContainerId: id,
		Linux: &runtime.LinuxContainerResources{MemoryLimitInBytes: newLimit}})
	if err != nil {
		return err
	}
	st, err := l.client.ContainerState(ctx, id)
	if got := st.GetResources().GetLinux().GetMemoryLimitInBytes(); err == nil && st.State == running && got != newLimit {
		err = fmt.Errorf("memory limit %d after the update, want %d", got, newLimit)
	}
	return err
}

// stop ends and removes the container and checks what is to be known of it.
func (l *life) stop(id, log string) {
	l.Helper()
	l.do("stop", func(ctx context.Context) error {
		_, err := l.client.StopContainer(ctx, &runtime.StopContainerRequest{ContainerId: id, Timeout: 3})
		return err
	})
	var st *runtime.ContainerStatus
	l.do("status", func(ctx context.Context) (err error) { st, err = l.client.ContainerState(ctx, id); return })
	switch {
	case st.State != exited:
		l.Errorf("stopped container is %v", st.State)
	case st.ExitCode == scriptCode:
	case l.excused && st.ExitCode == 255 && strings.Contains(st.Message, "shim"):
		l.lost = append(l.lost, "exit code: "+st.Message)
	case l.excused && l.shared && st.ExitCode == 137: // the init was killed first
	case l.slow && st.ExitCode == 137: // the shim did not send the signal within the grace period
	default:
		l.Errorf("exit code %d, reason %q, message %q; want %d", st.ExitCode, st.Reason, st.Message, scriptCode)
	}
	if n := l.continuous(log); n != scriptLines {
		if !l.excused {
			l.Errorf("the log has %d lines, want %d", n, scriptLines)
		}
		l.lost = append(l.lost, fmt.Sprintf("%d of %d lines", scriptLines-n, scriptLines))
	}
	l.do("remove", func(ctx context.Context) error {
		_, err := l.client.RemoveContainer(ctx, &runtime.RemoveContainerRequest{ContainerId: id})
		return err
	})
}

// gone checks that what was removed is not listed, and may be removed again.
func (l *life) gone() {
	l.Helper()
	l.do("last look", func(ctx context.Context) error {
		ps, err := l.client.ListPodSandbox(ctx, &runtime.ListPodSandboxRequest{})
		if err != nil {
			return err
		}
		cs, err := l.client.ListContainers(ctx, &runtime.ListContainersRequest{})
		if err != nil {
			return err
		}
		if len(ps.Items) != 0 || len(cs.Containers) != 0 {
			l.Errorf("listed after the removal: %v, %v", ps.Items, cs.Containers)
		}
		return l.client.Destroy(ctx, l.pod)
	})
}

// image is the life of an image: pulled, used in all ways that need no container,
// removed.
func (l *life) image() {
	l.Helper()
	ref := refs[images.Layers]
	id := ""
	l.do("pull", func(ctx context.Context) (err error) { id, err = l.client.Pull(ctx, ref); return })
	l.do("image status", func(ctx context.Context) error {
		r, err := l.client.Images.ImageStatus(ctx, &runtime.ImageStatusRequest{Image: &runtime.ImageSpec{Image: ref}})
		if err == nil && (r.GetImage().GetId() != id || r.GetImage().GetSize() == 0) {
			l.Errorf("pulled %s, then it is %v", id, r.GetImage())
		}
		return err
	})
	l.do("remove image", func(ctx context.Context) error {
		_, err := l.client.Images.RemoveImage(ctx, &runtime.RemoveImageRequest{Image: &runtime.ImageSpec{Image: ref}})
		return err
	})
	l.do("image list", func(ctx context.Context) error {
		r, err := l.client.Images.ListImages(ctx, &runtime.ListImagesRequest{Filter: &runtime.ImageFilter{Image: &runtime.ImageSpec{Image: ref}}})
		if err == nil && len(r.Images) != 0 {
			l.Errorf("removed image is listed: %v", r.Images)
		}
		return err
	})
}
