package sandbox

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/berthd/berth/sandbox/cgroup"
	"github.com/berthd/berth/sandbox/nri"
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
	c, err := s.book.view().anyContainer(id)
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
			{"signal", func(ctx context.Context) (err error) { done, err = s.terminate(ctx, c.ID, timeout); return err }},
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
		s.tellNews(ctx, nri.StopContainer, c.ID)
		log.V(2).Info("Container stopped", "killed", !done, "took", time.Since(begun))
		return "", nil
	})
	return err
}

// terminate asks the container to end and tells whether it did in that time. An
// error means that the time was not up: the container is left as it is.
func (s *Service) terminate(ctx context.Context, id string, timeout time.Duration) (bool, error) {
	if timeout <= 0 {
		return false, nil
	}
	grace, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	if err := s.ops.wait(grace, "start container", id); err != nil && ctx.Err() != nil {
		return false, err
	}
	c := s.book.view().containers[id]
	if c == nil || c.State != StateRunning {
		return c == nil || c.State == StateExited, nil
	}
	begun := time.Now()
	for wait := retryFirst; ; {
		err := s.signal(grace, id, c.StopSignal, false)
		if err == nil || errors.Is(err, shim.ErrState) {
			break
		}
		if errors.Is(err, errClosing) {
			return false, err
		}
		klog.FromContext(ctx).V(2).Info("Stop signal not sent", "signal", c.StopSignal, "err", err)
		// A connection that broke is no reason to skip the grace period.
		if !s.shimLives(id) || !pause(grace, &wait) {
			return s.exited(id), ctx.Err()
		}
	}
	return s.waitExit(ctx, id, timeout-time.Since(begun))
}

// shimAnswer bounds how long a shim may take to send a signal.
const shimAnswer = 3 * time.Second

// signal has the shim send a signal to the container's init or, with all, to
// every process of the container.
func (s *Service) signal(ctx context.Context, id string, sig int, all bool) error {
	ctx, cancel := context.WithTimeout(ctx, shimAnswer)
	defer cancel()
	client, err := s.client(ctx, id)
	if err != nil {
		return err
	}
	return client.Kill(ctx, sig, all)
}

// waitExit waits until the exit of a container is in the book and tells whether
// it is. An error means that it could not wait for so long.
func (s *Service) waitExit(ctx context.Context, id string, limit time.Duration) (bool, error) {
	t := time.NewTimer(limit)
	defer t.Stop()
	for {
		h := s.live.get(id)
		if h == nil || s.exited(id) {
			return s.exited(id), nil
		}
		select {
		case <-h.ended: // in the book, or the connection is another one by now
			if s.live.get(id) == h {
				return s.exited(id), nil
			}
		case <-h.dropped:
			if s.ctx.Err() != nil || s.live.isClosed() {
				return false, errClosing
			}
		case <-t.C:
			return s.exited(id), nil
		case <-ctx.Done():
			return false, ctx.Err()
		}
	}
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
	err := s.signal(ctx, id, int(unix.SIGKILL), true)
	if errors.Is(err, errClosing) {
		return err
	}
	// On cgroup v1 a frozen process gets its SIGKILL when it is let go.
	if c := s.book.view().containers[id]; c != nil {
		s.groupOf(c).Thaw()
	}
	if err == nil {
		if done, err := s.waitExit(ctx, id, killWait); done || err != nil {
			return err
		}
	}
	c := s.book.view().containers[id]
	if c == nil || c.State == StateExited {
		return nil
	}
	group := s.groupOf(c)
	if err := killGroup(ctx, group); err != nil {
		return fmt.Errorf("%w: %w: %s", ErrStuck, err, describe(group))
	}
	// Nothing of the container is alive. A shim that does not tell so soon does
	// not work any more; whoever follows it records the end.
	if done, err := s.waitExit(ctx, id, shimAnswer); done || err != nil {
		return err
	}
	if err := s.killShim(ctx, id, c.ShimPid); err != nil {
		return fmt.Errorf("shim: %w", err)
	}
	if s.live.get(id) == nil {
		wait, cancel := context.WithTimeout(ctx, killWait)
		defer cancel()
		s.shimLost(wait, id, nil)
	}
	done, err := s.waitExit(ctx, id, killWait)
	if err == nil && !done {
		err = fmt.Errorf("%w: %s", ErrStuck, describe(group))
	}
	return err
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
	if g.Frozen() {
		list = append(list, "the cgroup is frozen")
	}
	return fmt.Sprintf("%d processes left: %s", len(pids), strings.Join(list, ", "))
}

// RemoveContainer kills the container if it runs and removes all that was made
// for it. That it does not exist is no error.
func (s *Service) RemoveContainer(ctx context.Context, id string) error {
	c, err := s.book.view().anyContainer(id)
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
			s.shimLost(s.ctx, id, h)
		}
	})
}

// retryFirst and retryMax are the pauses between tries of what must not be given
// up: to record an exit, to end what a lost shim has left.
const (
	retryFirst = 20 * time.Millisecond
	retryMax   = 5 * time.Second
)

// pause sleeps before the next try, longer each time; false if ctx has ended.
func pause(ctx context.Context, d *time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(*d):
		*d = min(2**d, retryMax)
		return true
	}
}

// markEnded puts an exit into the book, of a container or of a pod's init. A book
// that cannot be written now, on a full disk, is tried again until it can.
func (s *Service) markEnded(id string, e shim.Exit) {
	_, end := s.ops.show("record exit", id)
	defer end()
	for wait := retryFirst; ; {
		var err error
		if _, isPod := s.book.view().pods[id]; isPod {
			err = s.initEnded(id, e)
		} else {
			err = s.markExited(id, e)
		}
		if err == nil || errors.Is(err, store.ErrNotFound) {
			return
		}
		klog.FromContext(s.ctx).Error(err, "Exit not recorded yet", "id", id, "code", e.Code)
		if !pause(s.ctx, &wait) {
			return
		}
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
	starting := s.ops.active("start container", id)
	c, err := s.book.updateContainer(id, func(_ *store.Tx, r *containerRow) error {
		if r.State == StateExited {
			return nil
		}
		if starting && r.State == StateCreated && r.Reason != reasonStart {
			// It ended before its start was recorded. It has started all the
			// same, and its followers are told so.
			r.Started = max(r.Created+1, min(time.Now().UnixNano(), e.At.UnixNano()-1))
		}
		applyExit(r, e)
		return nil
	})
	if err != nil {
		return err
	}
	s.stats.rest(id)
	s.tellExit(c)
	klog.FromContext(s.ctx).V(2).Info("Container exited", "container", c.config.GetMetadata().GetName(),
		"containerID", id, "code", c.ExitCode, "reason", c.Reason)
	return nil
}

// applyExit is what an exit does to a row.
func applyExit(r *containerRow, e shim.Exit) {
	r.Finished = max(e.At.UnixNano(), r.Started+1, r.Created+1)
	r.State, r.Pid = StateExited, 0
	if r.Reason == reasonStart && r.Started == 0 {
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

// reasonLost is the message of a container whose shim died before it could say
// anything.
const reasonLost = "the container's shim was lost and the container killed"

// shimLost deals with a connection that ended without an exit having been told. A
// shim that lives is connected to again, however long it takes. Of one that is
// dead the exit record tells, or else what is left of the container is killed. h
// is the connection that was lost, nil if there was none. It returns when the end
// is in the book or somebody else follows the shim, or ctx has ended.
func (s *Service) shimLost(ctx context.Context, id string, h *handle) {
	log := klog.FromContext(ctx).WithValues("id", id)
	_, end := s.ops.show("reach shim", id)
	defer end()
	for wait := retryFirst; ; {
		if s.ctx.Err() != nil || s.live.get(id) != h {
			return
		}
		c, err := shim.Connect(ctx, s.socket(id))
		if err == nil {
			if s.follow(id, c) == nil {
				s.settle(ctx, id, c)
				log.Info("Connected to the shim again")
			}
			return
		}
		if errors.Is(err, shim.ErrGone) && !s.shimLives(id) && s.endLost(ctx, id) {
			return
		}
		if !pause(ctx, &wait) {
			return
		}
	}
}

// shimLives tells whether the shim's process is there.
func (s *Service) shimLives(id string) bool {
	if c := s.book.view().containers[id]; c != nil && c.ShimPid != 0 {
		return shim.Is(c.ShimPid, s.socket(id), id)
	}
	shims, err := shim.ListShims(filepath.Dir(s.socket(id)))
	_, ok := shims[id]
	return ok || err != nil
}

// endLost ends what a dead shim has left and records the end. It tells whether
// that is done.
func (s *Service) endLost(ctx context.Context, id string) bool {
	log := klog.FromContext(ctx).WithValues("id", id)
	undo, cancel := cleanup(ctx, undoTimeout)
	defer cancel()
	v := s.book.view()
	if p, ok := v.pods[id]; ok {
		if err := s.endInit(undo, p); err != nil {
			log.Error(err, "Init without a shim is not ended yet")
			return false
		}
		s.markEnded(id, shim.Exit{Code: codeUnknown, At: time.Now(), Reason: "the shim was lost"})
		return true
	}
	c, ok := v.containers[id]
	if !ok || c.State == StateExited {
		return true
	}
	e, err := shim.ReadExit(s.exitFile(id))
	if err != nil {
		e = shim.Exit{Code: codeUnknown, At: time.Now(), Reason: reasonLost}
		log.Info("Shim of a container is gone")
	}
	if err := s.endContainer(undo, c); err != nil {
		log.Error(err, "Container without a shim is not ended yet")
		return false
	}
	s.markEnded(id, e)
	return true
}

// settle brings a container's row up to what its shim says: a start that an
// earlier daemon began may have ended since.
func (s *Service) settle(ctx context.Context, id string, c *shim.Client) {
	_, end := s.ops.show("look for start", id)
	defer end()
	for range settlePolls {
		row := s.book.view().containers[id]
		if row == nil || row.State != StateCreated {
			return
		}
		st, err := c.State(ctx)
		if err != nil {
			return
		}
		if st.Status == shim.StatusRunning {
			if err := s.markRunning(id); err != nil {
				klog.FromContext(ctx).Error(err, "Start not recorded", "id", id)
			}
			return
		}
		select {
		case <-s.ctx.Done():
			return
		case <-time.After(settlePoll):
		}
	}
}

// A start that was under way when the daemon died is looked for so often.
const (
	settlePolls = 50
	settlePoll  = 100 * time.Millisecond
)

// endContainer ends the shim of a container and what is left of its processes,
// and has the runtime forget it.
func (s *Service) endContainer(ctx context.Context, c *container) error {
	return s.endProcesses(ctx, s.runtimeOfContainer(c), c.ID, c.ShimPid, s.groupOf(c))
}
