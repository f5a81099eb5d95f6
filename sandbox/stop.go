package sandbox

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/berthd/berth/sandbox/cgroup"
	"github.com/berthd/berth/shim"
	"github.com/berthd/berth/store"
)

// killWait is how long a container may take to die of SIGKILL before its cgroup
// is killed, and again before it is reported as stuck.
const killWait = 10 * time.Second

// StopContainer sends the stop signal, waits up to timeout and then kills. A
// timeout of zero kills at once. Calls do not wait for one another, so a second
// one with a shorter timeout wins. That the container does not exist or has
// exited is no error.
func (s *Service) StopContainer(ctx context.Context, id string, timeout time.Duration) error {
	c, err := s.book.view().container(id)
	if errors.Is(err, ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	if c.State == StateExited {
		return nil
	}
	verb := fmt.Sprintf("stop container within %s:", timeout)
	limit := timeout + s.cfg.ContainerTimeout
	_, err = s.ops.do(ctx, verb, c.ID, limit, func(ctx context.Context, o *op) (string, error) {
		log, ctx := logFor(ctx, "container", c.config.GetMetadata().GetName(), "containerID", c.ID)
		begun := time.Now()
		var done bool
		err := o.steps(ctx, []step{
			{"signal", func(ctx context.Context) (err error) { done, err = s.terminate(ctx, c, timeout); return err }},
			{"kill", func(ctx context.Context) error {
				if done {
					return nil
				}
				return s.kill(ctx, c.ID)
			}},
		})
		if err != nil {
			return "", fmt.Errorf("container %s: %w", c.ID, err)
		}
		log.V(2).Info("Container stopped", "killed", !done, "took", time.Since(begun))
		return "", nil
	})
	return err
}

// terminate asks the container to end and tells whether it did in that time.
func (s *Service) terminate(ctx context.Context, c *container, timeout time.Duration) (bool, error) {
	if timeout <= 0 || c.State != StateRunning {
		return false, nil
	}
	client, err := s.client(ctx, c.ID)
	if err != nil {
		return false, nil // no shim to ask; kill sees to the rest
	}
	if err := client.Kill(ctx, c.StopSignal, false); err != nil {
		klog.FromContext(ctx).V(2).Info("Stop signal not sent", "signal", c.StopSignal, "err", err)
		return false, nil
	}
	return s.waitExit(ctx, c.ID, timeout), nil
}

// waitExit waits until the exit of a container is in the book.
func (s *Service) waitExit(ctx context.Context, id string, limit time.Duration) bool {
	h := s.live.get(id)
	if h == nil {
		return s.exited(id)
	}
	t := time.NewTimer(limit)
	defer t.Stop()
	select {
	case <-h.ended:
	case <-h.dropped:
	case <-t.C:
	case <-ctx.Done():
	}
	return s.exited(id)
}

func (s *Service) exited(id string) bool {
	c := s.book.view().containers[id]
	return c == nil || c.State == StateExited
}

// kill ends all processes of a container, by the shim if there is one, then by
// its cgroup, and waits until the exit is in the book. It is idempotent.
func (s *Service) kill(ctx context.Context, id string) error {
	if s.exited(id) {
		return nil
	}
	client, err := s.client(ctx, id)
	if err == nil {
		if err = client.Kill(ctx, int(unix.SIGKILL), true); err == nil && s.waitExit(ctx, id, killWait) {
			return nil
		}
	}
	c := s.book.view().containers[id]
	if c == nil || c.State == StateExited {
		return nil
	}
	group := s.hier.Group(s.cfg.CgroupDriver, c.CgroupPath)
	if err := group.Kill(ctx); err != nil {
		return fmt.Errorf("%w: %w: %s", ErrStuck, err, describe(group))
	}
	if s.live.get(id) == nil {
		s.shimLost(ctx, id)
	}
	if !s.waitExit(ctx, id, killWait) {
		return fmt.Errorf("%w: %s", ErrStuck, describe(group))
	}
	return nil
}

// describe names the processes that are left and what they wait for.
func describe(g cgroup.Group) string {
	pids, err := g.Procs()
	if err != nil {
		return err.Error()
	}
	var list []string
	for i, pid := range pids {
		if i == 8 {
			list = append(list, "…")
			break
		}
		text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		state := "?"
		if i := strings.LastIndexByte(string(text), ')'); i >= 0 && len(text) > i+2 {
			state = string(text[i+2])
		}
		list = append(list, fmt.Sprintf("pid %d in state %s", pid, state))
	}
	return fmt.Sprintf("%d processes left: %s", len(pids), strings.Join(list, ", "))
}

// RemoveContainer kills the container if it runs and removes all that was made
// for it. That it does not exist is no error.
func (s *Service) RemoveContainer(ctx context.Context, id string) error {
	c, err := s.book.view().container(id)
	if errors.Is(err, ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	return s.destroyContainerOp(ctx, c.ID)
}

// watch follows a shim until its container's exit is in the book.
func (s *Service) watch(id string, h *handle) {
	s.bg.Go(func() {
		defer close(h.ended)
		select {
		case e := <-h.client.Exited():
			s.markEnded(id, e)
		case <-h.dropped:
		case <-h.client.Gone():
			select { // the exit may have arrived together with the end of the connection
			case e := <-h.client.Exited():
				s.markEnded(id, e)
				return
			case <-h.dropped:
				return
			default:
			}
			s.shimLost(s.ctx, id)
		}
	})
}

// markEnded puts an exit into the book, of a container or of a pod's init.
func (s *Service) markEnded(id string, e shim.Exit) {
	var err error
	if _, isPod := s.book.view().pods[id]; isPod {
		err = s.initEnded(id, e)
	} else {
		err = s.markExited(id, e)
	}
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		klog.FromContext(s.ctx).Error(err, "Exit not recorded", "id", id, "code", e.Code)
	}
}

// The reasons that the kubelet knows (ContainerStatus.reason in the CRI).
const (
	reasonCompleted = "Completed"
	reasonError     = "Error"
	reasonOOM       = "OOMKilled"
)

// markExited puts the exit of a container into the book. The first one counts.
func (s *Service) markExited(id string, e shim.Exit) error {
	c, err := s.book.updateContainer(id, func(_ *store.Tx, r *containerRow) error {
		if r.State == StateExited {
			return nil
		}
		applyExit(r, e)
		return nil
	})
	if err != nil {
		return err
	}
	klog.FromContext(s.ctx).V(2).Info("Container exited", "container", c.config.GetMetadata().GetName(),
		"containerID", id, "code", c.ExitCode, "reason", c.Reason)
	return nil
}

// applyExit is what an exit does to a row.
func applyExit(r *containerRow, e shim.Exit) {
	r.Finished = max(e.At.UnixNano(), r.Started+1, r.Created+1)
	r.State, r.Pid = StateExited, 0
	if r.Reason == reasonStart {
		r.ExitCode = 128
		return
	}
	r.ExitCode = int32(e.Code)
	r.Message = e.Reason
	switch {
	case e.OOMKilled:
		r.Reason = reasonOOM
	case e.Code == 0:
		r.Reason = reasonCompleted
	default:
		r.Reason = reasonError
	}
}

// codeUnknown is the exit code of a process whose real one nobody can tell.
const codeUnknown = 255

// shimLost deals with a shim that went away without having reported an exit: the
// exit record tells, or else what is left of the container is killed.
func (s *Service) shimLost(ctx context.Context, id string) {
	if s.ctx.Err() != nil {
		return // the daemon is stopping; the shim is well
	}
	log := klog.FromContext(ctx)
	v := s.book.view()
	if p, ok := v.pods[id]; ok {
		log.Info("Shim of a pod's init is gone", "podID", id)
		undo, cancel := cleanup(ctx, undoTimeout)
		defer cancel()
		if err := s.endInit(undo, p); err != nil {
			log.Error(err, "Init without a shim is not ended", "podID", id)
		}
		s.markEnded(id, shim.Exit{Code: codeUnknown, At: time.Now(), Reason: "the shim was lost"})
		return
	}
	c, ok := v.containers[id]
	if !ok || c.State == StateExited {
		return
	}
	e, err := shim.ReadExit(s.exitFile(id))
	if err != nil {
		e = shim.Exit{Code: codeUnknown, At: time.Now(), Reason: "the container's shim was lost and the container killed"}
		log.Info("Shim of a container is gone", "containerID", id)
	}
	undo, cancel := cleanup(ctx, undoTimeout)
	defer cancel()
	if err := s.endContainer(undo, c); err != nil {
		log.Error(err, "Container without a shim is not ended", "containerID", id)
	}
	s.markEnded(id, e)
}

// endContainer ends what is left of a container whose shim does not answer.
func (s *Service) endContainer(ctx context.Context, c *container) error {
	rt, err := s.handler(c.Handler)
	if err != nil {
		return err
	}
	return s.endProcesses(ctx, rt, c.ID, c.ShimPid, s.hier.Group(s.cfg.CgroupDriver, c.CgroupPath))
}
