package sandbox

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/berthd/berth/sandbox/cgroup"
	"github.com/berthd/berth/sandbox/nri"
	"github.com/berthd/berth/shim"
	"github.com/berthd/berth/store"
)

func parentDir(p string) string { return filepath.Dir(p) }

// teardown ends everything in the pod that is alive: containers, init, network,
// namespaces. Its files and rows stay. It is all of StopPodSandbox and the first
// half of destroyPod, and idempotent. With a book that cannot be written, as on a
// full disk, what lives ends nevertheless, and the error says so.
func (s *Service) teardown(ctx context.Context, o *op, id string) error {
	p, err := s.book.updatePod(id, func(r *podRow) error {
		// Not ready from here on: insertContainer refuses new containers.
		if r.State == StateReady {
			r.State = StateNotReady
		}
		r.Stopping = true
		return nil
	})
	if errors.Is(err, store.ErrNotFound) {
		return nil
	}
	unmarked := err
	if err != nil {
		if p = s.book.view().pods[id]; p == nil {
			return err
		}
	}
	if p.Torn {
		return nil
	}
	s.forwards.cut(id)
	s.stats.drop(id)
	s.stats.drop(initKey(id))
	err = o.allSteps(ctx, []step{
		{"containers", func(ctx context.Context) error {
			err := s.killContainers(ctx, id)
			if err == nil {
				s.tellPodStop(ctx, p)
			}
			return err
		}},
		{"init", func(ctx context.Context) error { return s.destroyInit(ctx, p) }},
		{"note", func(context.Context) error { return s.noteStop(p) }},
		{"network", func(ctx context.Context) error { return s.detach(ctx, p) }},
	})
	if err = errors.Join(unmarked, err); err != nil {
		return err // the namespaces stay for the next try of CNI DEL
	}
	err = o.allSteps(ctx, []step{
		{"namespaces", func(context.Context) error { return s.deps.Pins.Destroy(id) }},
	})
	if err != nil {
		return err
	}
	_, err = s.book.updatePod(id, func(r *podRow) error {
		if r.State == StateNotReady {
			r.Torn = true
		}
		return nil
	})
	return ignoreGone(err)
}

// ignoreGone forgives that a row is gone: somebody else, a RemovePod beside a
// StopPod, has come to the same end.
func ignoreGone(err error) error {
	if errors.Is(err, store.ErrNotFound) {
		return nil
	}
	return err
}

// onlyFor returns the cgroups that were made for pods and that no other pod, which
// is not to go as well, is in: it may be without a container yet, and its first
// one in the middle of being put in there.
func (v *view) onlyFor(p *pod) []string {
	return slices.DeleteFunc(slices.Clone(p.Cgroups), func(d string) bool {
		for _, other := range v.pods {
			if other.ID != p.ID && !other.Removing && slices.Contains(other.Cgroups, d) {
				return true
			}
		}
		return false
	})
}

// removeUnused removes cgroups, innermost first. One that has others below it, of
// another pod with the same parent, stays.
func removeUnused(dirs []string) error {
	var errs []error
	for _, d := range slices.Backward(dirs) {
		err := unix.Rmdir(d)
		if err != nil && err != unix.ENOENT && err != unix.EBUSY && err != unix.ENOTEMPTY {
			errs = append(errs, fmt.Errorf("cgroup %s: %w", d, err))
		}
	}
	return errors.Join(errs...)
}

// destroyPod undoes a pod, whatever of it exists. With a book that cannot be
// written, all that makes room is removed; then the mark must be in the book
// before the rest goes, since without it a container could still be made.
func (s *Service) destroyPod(ctx context.Context, o *op, id string) error {
	p, err := s.book.updatePod(id, func(r *podRow) error { r.Removing = true; return nil })
	if errors.Is(err, store.ErrNotFound) {
		return nil
	}
	unmarked := err
	if err != nil {
		if p = s.book.view().pods[id]; p == nil {
			return err
		}
		klog.FromContext(ctx).Error(err, "Removal of a pod goes on without a mark in the book")
	}
	err = o.allSteps(ctx, []step{
		{"teardown", func(ctx context.Context) error { return s.teardown(ctx, o, id) }},
		{"containers", func(ctx context.Context) error { return s.removeContainers(ctx, id) }},
	})
	if err = errors.Join(unmarked, err); err == nil || onlyDetach(err) {
		s.tellPodRemoval(ctx, p)
	}
	if err == nil {
		err = o.steps(ctx, []step{
			// Not before the containers are removed: until then their own cgroups
			// may still be in there, and nobody would come back for these.
			{"cgroup", func(context.Context) error { return removeUnused(s.book.view().onlyFor(p)) }},
			{"files", func(context.Context) error { return s.removePodFiles(id) }},
			{"row", func(context.Context) error { return s.book.deletePod(id) }},
		})
	}
	if err == nil {
		p.releaseLabels()
		s.undo.Delete(id)
	}
	if err != nil {
		s.noteFailure(ctx, id, err)
	}
	return err
}

// noteFailure records why destroy did not succeed; best effort.
func (s *Service) noteFailure(ctx context.Context, id string, cause error) {
	_, err := s.book.updatePod(id, func(r *podRow) error { r.Failure = cause.Error(); return nil })
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		klog.FromContext(ctx).Error(err, "Failure of destroy not recorded", "podID", id)
	}
}

// detachError is a failed CNI DEL. It does not keep a pod from going away as far
// as its user can see: the row stays, and the janitor tries again.
type detachError struct{ err error }

func (e *detachError) Error() string { return "network not released yet: " + e.err.Error() }
func (e *detachError) Unwrap() error { return e.err }

// onlyDetach tells whether err says no more than that the network has not been
// released.
func onlyDetach(err error) bool {
	if list, ok := err.(interface{ Unwrap() []error }); ok && !isDetach(err) {
		for _, e := range list.Unwrap() {
			if !onlyDetach(e) {
				return false
			}
		}
		return true
	}
	if e := errors.Unwrap(err); e != nil && !isDetach(err) {
		return onlyDetach(e)
	}
	return isDetach(err)
}

// isDetach tells whether err is detach's own, not something that wraps it.
func isDetach(err error) bool {
	_, ok := err.(*detachError)
	return ok
}

// detach releases the network and records it.
func (s *Service) detach(ctx context.Context, p *pod) error {
	if !p.Attached {
		return nil
	}
	if err := s.deps.Network.Detach(ctx, s.cniPod(p)); err != nil {
		return &detachError{err}
	}
	_, err := s.book.updatePod(p.ID, func(r *podRow) error { r.Attached = false; return nil })
	return ignoreGone(err)
}

// killContainers makes sure that no container of the pod runs, also one that is
// still being made.
func (s *Service) killContainers(ctx context.Context, podID string) error {
	return parallel(s.book.view().byPod[podID], 16, func(c *container) error {
		if c.State == StateCreating {
			if err := s.ops.wait(ctx, "create container", containerKey(podID, c.config)); err != nil {
				return err
			}
			if c := s.book.view().containers[c.ID]; c != nil && c.State == StateCreating {
				return s.endContainer(ctx, c) // its own undo has failed
			}
		}
		return s.kill(ctx, c.ID)
	})
}

func (s *Service) removeContainers(ctx context.Context, podID string) error {
	return parallel(s.book.view().byPod[podID], 16, func(c *container) error {
		if c.State == StateCreating {
			if err := s.ops.wait(ctx, "create container", containerKey(podID, c.config)); err != nil {
				return err
			}
		}
		return s.destroyContainerOp(ctx, c.ID)
	})
}

// destroyContainerOp is destroyContainer as an operation of its own.
func (s *Service) destroyContainerOp(ctx context.Context, id string) error {
	_, err := s.ops.do(ctx, "remove container", id, s.cfg.ContainerTimeout, func(ctx context.Context, o *op) (string, error) {
		if err := s.destroyContainer(ctx, o, id); err != nil {
			s.retryUndo(id)
			return "", fmt.Errorf("container %s: %w", id, err)
		}
		return "", nil
	})
	return err
}

// destroyContainer undoes a container, whatever of it exists. A book that cannot
// be written now is no reason to keep it: what it has may be what fills the disk.
func (s *Service) destroyContainer(ctx context.Context, o *op, id string) error {
	c, err := s.book.updateContainer(id, func(_ *store.Tx, r *containerRow) error { r.Removing = true; return nil })
	if errors.Is(err, store.ErrNotFound) {
		return nil
	}
	if err != nil {
		if c = s.book.view().containers[id]; c == nil {
			return err
		}
		klog.FromContext(ctx).Error(err, "Removal of a container goes on without a mark in the book")
	}
	err = o.steps(ctx, []step{
		{"process", func(ctx context.Context) error {
			return s.endContainer(ctx, c)
		}},
		{"plugins", func(ctx context.Context) error { s.tellNews(ctx, nri.RemoveContainer, id); return nil }},
		{"bundle", func(context.Context) error { return s.removeBundle(id) }},
		{"snapshot", func(ctx context.Context) error { return s.removeSnapshots(ctx, c) }},
		{"state", func(context.Context) error { return os.RemoveAll(s.stateDir(id)) }},
		{"row", func(context.Context) error { return s.book.deleteContainer(id) }},
	})
	if err != nil {
		_, e := s.book.updateContainer(id, func(_ *store.Tx, r *containerRow) error { r.Failure = err.Error(); return nil })
		return errors.Join(err, e)
	}
	s.live.drop(id)
	s.stats.drop(id)
	s.undo.Delete(id)
	s.missed.Delete(id)
	s.freeImages(ctx, c)
	if s.lostSnapshots() {
		s.kick() // it may have been the last one that forgetRebuild waits for
	}
	return nil
}

// endProcesses ends the shim and all processes of a container or init, and has
// the runtime forget it. It works without a shim, and without a runtime if no
// state of it is left. A shimPid of zero means that nobody knows it.
func (s *Service) endProcesses(ctx context.Context, rt ociRuntime, id string, shimPid int, group cgroup.Group) error {
	group.Thaw() // else SIGKILL would be in vain, and the shim wait for its effect
	if err := s.endShim(ctx, id, shimPid); err != nil {
		return err
	}
	if group.Exists() {
		if err := killGroup(ctx, group); err != nil {
			return fmt.Errorf("cgroup: %w", err)
		}
	}
	if err := rt.delete(ctx, id); err != nil {
		// A runtime that is killed while it writes leaves state that it
		// cannot read itself. Nothing runs any more, so it may go.
		if procs, e := group.Procs(); e == nil && len(procs) > 0 {
			return err
		}
		if err := rt.forget(ctx, id, err); err != nil {
			return err
		}
	}
	if err := group.Remove(); err != nil {
		return fmt.Errorf("cgroup: %w", err)
	}
	return nil
}

// killGroup kills a cgroup, in bounded time: what does not die of SIGKILL does
// not die of waiting.
func killGroup(ctx context.Context, group cgroup.Group) error {
	ctx, cancel := context.WithTimeout(ctx, killWait)
	defer cancel()
	return group.Kill(ctx)
}

// shimGrace is how long a shim may take to end by itself.
const shimGrace = 10 * time.Second

// endShim has the shim kill its container and end, and kills it if it does not.
func (s *Service) endShim(ctx context.Context, id string, pid int) error {
	if c, err := s.client(ctx, id); err == nil {
		wait, cancel := context.WithTimeout(ctx, shimGrace)
		err := c.Shutdown(wait)
		cancel()
		if err != nil {
			klog.FromContext(ctx).Info("Shim does not end by itself", "id", id, "err", err)
		}
		s.live.drop(id)
	}
	if err := s.killShim(ctx, id, pid); err != nil {
		return fmt.Errorf("shim: %w", err)
	}
	if err := os.Remove(s.socket(id)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("shim socket: %w", err)
	}
	return nil
}

// killShim kills the shim of that ID if one runs. Without its pid it is looked
// for among all processes, which is what a crash in the middle of a launch needs.
func (s *Service) killShim(ctx context.Context, id string, pid int) error {
	for {
		if pid == 0 {
			shims, err := shim.ListShims(filepath.Dir(s.socket(id)))
			if err != nil {
				return err
			}
			pid = shims[id]
		}
		if pid == 0 || !shim.Is(pid, s.socket(id), id) {
			return nil
		}
		if err := killPid(pid); err != nil {
			return err
		}
		if !s.resweep.Swap(true) {
			s.kick()
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w: shim %d: %w", ErrStuck, pid, ctx.Err())
		case <-time.After(5 * time.Millisecond):
		}
	}
}
