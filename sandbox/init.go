package sandbox

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/berthd/berth/cni/netns"
	"github.com/berthd/berth/sandbox/cgroup"
	"github.com/berthd/berth/sandbox/spec"
	"github.com/berthd/berth/shim"
)

// A pod whose containers share a PID namespace has an init: berth-init as
// process 1, run as an OCI container with the pod's own ID. Its PID namespace is
// pinned beside the others, so that no container ever joins by a process number.

// pidKind is the pin of an init's PID namespace.
const pidKind netns.Kind = "pid"

// ensureInit makes the pod's init unless it has one.
func (s *Service) ensureInit(ctx context.Context, podID string) error {
	_, err := s.ops.do(ctx, "make init", podID, s.cfg.ContainerTimeout, func(ctx context.Context, o *op) (string, error) {
		p, ok := s.book.view().pods[podID]
		if !ok {
			return "", fmt.Errorf("pod %s: %w", podID, ErrNotFound)
		}
		if p.InitPid != 0 {
			return "", nil
		}
		return "", s.makeInit(ctx, o, p)
	})
	return err
}

func (s *Service) makeInit(ctx context.Context, o *op, p *pod) error {
	rt, unfinished := s.runtimeOfPod(p), p.Init
	p, err := s.book.updatePod(p.ID, func(r *podRow) error {
		if r.Stopping || r.Removing {
			return fmt.Errorf("%w: pod %s is being stopped", ErrState, r.ID)
		}
		r.Init = true
		return nil
	})
	if err != nil {
		return err
	}
	var launched shim.Launched
	err = o.steps(ctx, []step{
		{"intent", func(context.Context) error { return s.noteInit(p.ID) }},
		// What is left of an init that was not finished has the same ID.
		{"clear", func(ctx context.Context) error {
			if !unfinished {
				return nil
			}
			return s.clearInit(ctx, p)
		}},
		{"bundle", func(context.Context) error { return s.writeInitBundle(p) }},
		{"launch", func(ctx context.Context) (err error) { launched, err = s.launchInit(ctx, p, rt); return err }},
		{"start", func(ctx context.Context) error {
			c, err := s.client(ctx, p.ID)
			if err != nil {
				return err
			}
			return c.Start(ctx)
		}},
		{"pin", func(context.Context) error { return s.pinPID(p.ID, launched.Pid) }},
		{"running", func(context.Context) error {
			_, err := s.book.updatePod(p.ID, func(r *podRow) error { r.InitPid = launched.Pid; return nil })
			if err != nil {
				return err
			}
			return s.initLives(p.ID)
		}},
		{"note", func(context.Context) error { return s.noteInit(p.ID) }},
	})
	if err != nil {
		undo, cancel := cleanup(ctx, undoTimeout)
		defer cancel()
		if e := s.clearInit(undo, p); e != nil {
			klog.FromContext(ctx).Error(e, "Init half made is left for later")
		}
		_, e := s.book.updatePod(p.ID, func(r *podRow) error { r.InitPid = 0; return nil })
		err = errors.Join(err, e)
	}
	return err
}

// noteInit writes the note of a pod anew that had one before its init. That of a
// pod which is being made is written when it is done.
func (s *Service) noteInit(podID string) error {
	if p := s.book.view().pods[podID]; p == nil || p.State == StateCreating {
		return nil
	}
	return s.writePodNote(podID)
}

// initLives tells of an init that ended before it was in the book, which initEnded
// has passed over. The shim writes the record before it tells anybody, so that
// either there is one by now, or initEnded comes after the book was written.
func (s *Service) initLives(podID string) error {
	e, err := shim.ReadExit(s.initExit(podID))
	switch {
	case err == nil:
		return fmt.Errorf("the pod's init ended at once, with code %d", e.Code)
	case errors.Is(err, os.ErrNotExist):
		if h := s.live.get(podID); (h == nil || !h.alive()) && !s.shimLives(podID) {
			return errors.New("the shim of the pod's init is gone")
		}
		return nil
	}
	return fmt.Errorf("exit record of the pod's init: %w", err)
}

// initExit is the exit record of a pod's init.
func (s *Service) initExit(podID string) string { return filepath.Join(s.bundleDir(podID), "exit") }

// clearInit ends an init that is not in use and removes what was made for it.
func (s *Service) clearInit(ctx context.Context, p *pod) error {
	if err := s.endInit(ctx, p); err != nil {
		return err
	}
	s.live.drop(p.ID)
	path := s.deps.Pins.Path(p.ID, pidKind)
	for unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW) == nil {
	}
	return s.removeBundle(p.ID)
}

func (s *Service) initPath(p *pod) (string, cgroup.Group, error) {
	path, err := cgroup.OCIPath(s.driverOf(p), p.config.GetLinux().GetCgroupParent(), p.ID)
	if err != nil {
		return "", cgroup.Group{}, err
	}
	return path, s.hier.Group(s.driverOf(p), path), nil
}

func (s *Service) writeInitBundle(p *pod) error {
	path, _, err := s.initPath(p)
	if err != nil {
		return err
	}
	pin := func(host bool, k netns.Kind) spec.Namespace {
		if host {
			return spec.Namespace{Host: true}
		}
		return spec.Namespace{Path: s.deps.Pins.Path(p.ID, k)}
	}
	sp, err := spec.Init(spec.InitPod{PodID: p.ID, CgroupsPath: path, Rootfs: s.initDir, Arch: initArch, Host: s.host,
		Network: pin(p.HostNetwork, netns.Net), UTS: pin(p.HostNetwork, netns.UTS), IPC: pin(p.hostIPC(), netns.IPC), UserNS: s.specUserNS(p),
		Annotations: s.annotations(s.runtimeOfPod(p).handler, p.config, nil), OOMScoreAdj: -998, OOMScoreMin: &s.oomFloor})
	if err != nil {
		return err
	}
	return s.makeBundle(p.ID, sp, p.userNS)
}

func (s *Service) launchInit(ctx context.Context, p *pod, rt ociRuntime) (shim.Launched, error) {
	_, group, err := s.initPath(p)
	if err != nil {
		return shim.Launched{}, err
	}
	l, err := s.launchOf(ctx, p.ID, s.bundleDir(p.ID), rt, group)
	if err != nil {
		return shim.Launched{}, fmt.Errorf("pod init: %w", err)
	}
	l.PrivatePID = true
	c, launched, err := shim.Run(ctx, s.cfg.ShimBinary, l)
	if err != nil {
		return launched, fmt.Errorf("pod init: %w", err)
	}
	return launched, s.follow(p.ID, c)
}

// pinPID pins the PID namespace of a process.
func (s *Service) pinPID(podID string, pid int) error {
	path := s.deps.Pins.Path(podID, pidKind)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return fmt.Errorf("pin PID namespace: %w", err)
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDONLY, 0o600)
	if err != nil {
		return fmt.Errorf("pin PID namespace: %w", err)
	}
	f.Close()
	if err := unix.Mount("/proc/"+strconv.Itoa(pid)+"/ns/pid", path, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("pin PID namespace: %w", err)
	}
	return nil
}

// destroyInit undoes the init of a pod, whatever of it exists.
func (s *Service) destroyInit(ctx context.Context, p *pod) error {
	if !p.Init {
		return nil
	}
	if err := s.ops.wait(ctx, "make init", p.ID); err != nil {
		return err
	}
	if err := s.endInit(ctx, p); err != nil {
		return err
	}
	if err := s.removeBundle(p.ID); err != nil {
		return err
	}
	s.live.drop(p.ID)
	_, err := s.book.updatePod(p.ID, func(r *podRow) error { r.Init, r.InitPid = false, 0; return nil })
	return ignoreGone(err)
}

func (s *Service) endInit(ctx context.Context, p *pod) error {
	_, group, err := s.initPath(p)
	if err != nil {
		return err
	}
	return s.endProcesses(ctx, s.runtimeOfPod(p), p.ID, 0, group)
}

// initEnded: without its init a pod's PID namespace is dead, so it is not ready.
func (s *Service) initEnded(id string, e shim.Exit) error {
	_, err := s.book.updatePod(id, func(r *podRow) error {
		if r.InitPid == 0 {
			return nil // it had not been put to use
		}
		r.InitPid = 0
		if r.State == StateReady {
			r.State = StateNotReady
			r.Failure = fmt.Sprintf("the pod's init ended with code %d", e.Code)
		}
		return nil
	})
	if err == nil {
		klog.FromContext(s.ctx).V(2).Info("Init of a pod ended", "podID", id, "code", e.Code)
	}
	return err
}

// installInit makes the root file system of inits in the run directory: berth-init
// and the mount points that the spec wants. It is a copy, so that no container
// of a pod can reach a file of the node through /proc/1/exe, and named by
// content, so that an upgrade does not change what runs.
func installInit(dir, binary string) (string, error) {
	src, root, err := openInit(dir, binary)
	if err != nil {
		return "", err
	}
	defer src.Close()
	if _, err := os.Stat(root); err == nil {
		return root, nil
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", fmt.Errorf("init: %w", err)
	}
	tmp, err := os.MkdirTemp(dir, ".new-")
	if err != nil {
		return "", fmt.Errorf("init: %w", err)
	}
	defer os.RemoveAll(tmp)
	if err := fillInit(tmp, src); err != nil {
		return "", fmt.Errorf("init: %w", err)
	}
	if err := os.Rename(tmp, root); err != nil && !errors.Is(err, os.ErrExist) {
		return "", fmt.Errorf("init: %w", err)
	}
	return root, nil
}

// initDirOf is where installInit puts a binary.
func initDirOf(dir, binary string) (string, error) {
	src, root, err := openInit(dir, binary)
	if err == nil {
		src.Close()
	}
	return root, err
}

// openInit opens a binary at its beginning, and tells where installInit puts it.
func openInit(dir, binary string) (src *os.File, root string, err error) {
	if src, err = os.Open(binary); err != nil {
		return nil, "", fmt.Errorf("init: %w", err)
	}
	h := sha256.New()
	_, err = io.Copy(h, src)
	if err == nil {
		_, err = src.Seek(0, io.SeekStart)
	}
	if err != nil {
		src.Close()
		return nil, "", fmt.Errorf("init: %w", err)
	}
	return src, filepath.Join(dir, hex.EncodeToString(h.Sum(nil)[:8])), nil
}

func fillInit(root string, src *os.File) error {
	if err := os.Chmod(root, 0o755); err != nil {
		return err
	}
	for _, d := range []string{"proc", "dev", "sys"} {
		if err := os.Mkdir(filepath.Join(root, d), 0o755); err != nil {
			return err
		}
	}
	dst, err := os.OpenFile(filepath.Join(root, "berth-init"), os.O_CREATE|os.O_WRONLY|os.O_EXCL, 0o755)
	if err != nil {
		return err
	}
	if _, err := io.Copy(dst, src); err != nil {
		dst.Close()
		return err
	}
	return dst.Close()
}
