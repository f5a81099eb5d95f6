package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// restartCase has the daemon killed and started again over living pods.
func restartCase(ctx context.Context, b *bench, t *target) (f figures, err error) {
	pods, err := b.many(ctx, t, b.o.pods, 2)
	defer func() { err = errors.Join(err, removeAll(ctx, pods, b.o.workers)) }()
	if err != nil {
		return nil, err
	}
	f = figures{}
	return f, b.restart(ctx, t, pods, f)
}

// restarts tells whether the daemon can be started again.
func (t *target) restarts() bool { return t.node != nil || t.restart != "" }

// restartLimit bounds how long a daemon may take to answer and to be right.
const restartLimit = 2 * time.Minute

// restart kills the daemon with SIGKILL, ends some containers while there is none,
// and starts it again: at once after that, so that "first answer" is from the
// start of the program to the answer to Version, over a new connection. It is right
// when the lists have every pod as ready and every container as running, but for
// those that were ended as exited. The containers that were ended are started
// anew in the end.
func (b *bench) restart(ctx context.Context, t *target, pods []*pod, f figures) error {
	ctx, cancel := context.WithTimeout(ctx, restartLimit)
	defer cancel()
	victims, err := victims(ctx, t, pods)
	if err != nil {
		return err
	}
	if err := t.kill(ctx); err != nil {
		return err
	}
	for _, v := range victims {
		if err := end(ctx, v.pid); err != nil {
			return fmt.Errorf("container's process %d: %w", v.pid, err)
		}
	}
	began := time.Now()
	ctx, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	var starting sync.WaitGroup
	defer starting.Wait()
	starting.Go(func() {
		if err := b.startDaemon(ctx, t); err != nil {
			fail(err)
		}
	})
	if err := t.await(ctx); err != nil {
		return err
	}
	f["restart: first answer, ms"] = ms(time.Since(began))
	for first := true; ; first = false {
		wrong, err := wrongStates(ctx, t, pods, victims)
		if err != nil {
			return err
		}
		if first {
			f["restart: first list, ms"], f["restart: wrong in the first list"] = ms(time.Since(began)), float64(wrong)
		}
		if wrong == 0 {
			break
		}
	}
	f["restart: all right, ms"] = ms(time.Since(began))
	starting.Wait()
	for id, v := range victims {
		if err := v.pod.replace(ctx, id, b.container(v.index, []string{"sleep", "86400"})); err != nil {
			return err
		}
	}
	return nil
}

// await returns when the daemon answers over a new connection.
func (t *target) await(ctx context.Context) error {
	for {
		c, err := net.Dial("unix", t.Socket)
		if err == nil {
			c.Close()
			return t.Connect(ctx)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s: does not answer: %w", t.Socket, context.Cause(ctx))
		case <-time.After(time.Millisecond):
		}
	}
}

// kill ends the daemon and waits for its end.
func (t *target) kill(ctx context.Context) error {
	if t.node != nil {
		return t.node.Kill()
	}
	if err := end(ctx, t.Pid); err != nil {
		return fmt.Errorf("daemon %d: %w", t.Pid, err)
	}
	return nil
}

// end kills a process and waits until it has ended.
func end(ctx context.Context, pid int) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil {
		return err
	}
	for ctx.Err() == nil {
		// A pidfd is readable once the process has ended.
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 100)
		if n > 0 {
			return nil
		}
		if err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
	}
	return ctx.Err()
}

// startDaemon starts the daemon. That of a foreign endpoint stays when this
// program has ended, and what it prints goes to a file.
func (b *bench) startDaemon(ctx context.Context, t *target) error {
	if t.node != nil {
		return t.node.Start(ctx)
	}
	log, err := os.OpenFile(filepath.Join(os.TempDir(), "bench-life-"+t.Name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.Command("sh", "-c", "exec "+t.restart)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("%s: %w", t.restart, err)
	}
	go cmd.Wait() // when it is killed the next time
	return nil
}

// A victim is a container that is ended while no daemon runs.
type victim struct {
	pod   *pod
	index int // of the container in its pod
	pid   int
}

// maxVictims is how many there are at most; one in ten pods has one.
const maxVictims = 10

// victims chooses them, by container ID. A runtime that does not tell the process
// of a container, in the verbose status as containerd and berth do, has none.
func victims(ctx context.Context, t *target, pods []*pod) (map[string]victim, error) {
	out := map[string]victim{}
	for i := 0; i < len(pods) && len(out) < maxVictims; i += 10 {
		p := pods[i]
		index := len(p.containers) - 1
		id := p.containers[index]
		r, err := t.Client.ContainerStatus(ctx, &runtime.ContainerStatusRequest{ContainerId: id, Verbose: true})
		if err != nil {
			return nil, fmt.Errorf("ContainerStatus: %w", err)
		}
		if pid := pidOf(r.Info); pid > 1 {
			out[id] = victim{p, index, pid}
		}
	}
	return out, nil
}

// pidOf finds the process in what a verbose status says, JSON under some name.
func pidOf(info map[string]string) int {
	for _, text := range info {
		var v struct{ Pid int }
		if json.Unmarshal([]byte(text), &v) == nil && v.Pid > 1 {
			return v.Pid
		}
	}
	return 0
}

// wrongStates counts the pods and containers that a list does not have, or not
// as they are.
func wrongStates(ctx context.Context, t *target, pods []*pod, victims map[string]victim) (wrong int, err error) {
	ps, err := t.Client.ListPodSandbox(ctx, &runtime.ListPodSandboxRequest{})
	if err != nil {
		return 0, fmt.Errorf("ListPodSandbox: %w", err)
	}
	ready := map[string]bool{}
	for _, p := range ps.Items {
		ready[p.Id] = p.State == runtime.PodSandboxState_SANDBOX_READY
	}
	cs, err := t.Client.ListContainers(ctx, &runtime.ListContainersRequest{})
	if err != nil {
		return 0, fmt.Errorf("ListContainers: %w", err)
	}
	states := map[string]runtime.ContainerState{}
	for _, c := range cs.Containers {
		states[c.Id] = c.State
	}
	for _, p := range pods {
		if !ready[p.id] {
			wrong++
		}
		for _, id := range p.containers {
			want := runtime.ContainerState_CONTAINER_RUNNING
			if _, ended := victims[id]; ended {
				want = runtime.ContainerState_CONTAINER_EXITED
			}
			if got, listed := states[id]; !listed || got != want {
				wrong++
			}
		}
	}
	return wrong, nil
}

// replace removes a container that has ended and starts another one for it.
func (p *pod) replace(ctx context.Context, id string, cfg *runtime.ContainerConfig) error {
	if _, err := p.t.Client.RemoveContainer(ctx, &runtime.RemoveContainerRequest{ContainerId: id}); err != nil {
		return fmt.Errorf("RemoveContainer: %w", err)
	}
	p.containers = slices.DeleteFunc(p.containers, func(c string) bool { return c == id })
	return p.launch(ctx, times{}, cfg)
}
