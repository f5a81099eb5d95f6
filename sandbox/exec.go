package sandbox

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/klog/v2"

	"github.com/berthd/berth/sandbox/spec"
	"github.com/berthd/berth/shim"
	"github.com/berthd/berth/store"
)

// ExecSync runs a command in a running container and returns its output, each
// stream up to the configured limit. A timeout of zero is none; when it passes,
// the command and all it started are killed and the error is ErrTimeout. That the
// command ends with a code other than zero is no error.
func (s *Service) ExecSync(ctx context.Context, id string, cmd []string, timeout time.Duration) (*runtime.ExecSyncResponse, error) {
	c, err := s.running(id)
	if err != nil {
		return nil, err
	}
	if len(cmd) == 0 {
		return nil, fmt.Errorf("%w: cmd: must not be empty", ErrInvalid)
	}
	what, err := s.command(c, cmd, nil)
	if err != nil {
		return nil, err
	}
	client, err := s.client(ctx, c.ID)
	if err == nil {
		err = failpoint(ctx, "exec", "run")
	}
	if err != nil {
		return nil, fmt.Errorf("container %s: exec: %w", c.ID, err)
	}
	res, err := client.Exec(ctx, shim.ExecRequest{Process: what.process, Image: what.image, Timeout: timeout,
		MaxOutput: s.cfg.ExecOutputLimit, Drain: s.cfg.ExecDrain})
	if err == nil {
		err = failpoint(ctx, "exec", "answer")
	}
	if err != nil {
		return nil, fmt.Errorf("container %s: %w", c.ID, err)
	}
	klog.FromContext(ctx).V(4).Info("Exec ended", "container", c.ID, "native", res.Native, "code", res.ExitCode, "timedOut", res.TimedOut)
	if res.TimedOut {
		return nil, fmt.Errorf("%w: container %s: command %q did not end within %s and was killed", ErrTimeout, c.ID, cmd[0], timeout)
	}
	out := &runtime.ExecSyncResponse{Stdout: res.Stdout, Stderr: res.Stderr, ExitCode: int32(res.ExitCode)}
	if res.StdoutTruncated || res.StderrTruncated {
		note := fmt.Sprintf("\n[output cut off at %d bytes]\n", s.cfg.ExecOutputLimit)
		out.Stderr = append(out.Stderr, note...)
	}
	return out, nil
}

func (s *Service) running(id string) (*container, error) {
	c, err := s.book.view().container(id)
	if err != nil {
		return nil, err
	}
	if c.State != StateRunning {
		return nil, fmt.Errorf("%w: container %s is %s, not running", ErrState, c.ID, c.State)
	}
	return c, nil
}

// maxBundle bounds the size of a bundle's config.json in bytes: a stored
// configuration, and what was made of it.
const maxBundle = 4 * maxConfig

// readSpec reads the OCI specification that a container was made with. The error
// is os.ErrNotExist if it is gone.
func (s *Service) readSpec(id string) (*specs.Spec, error) {
	text, err := readBounded(filepath.Join(s.bundleDir(id), "config.json"), maxBundle)
	if err != nil {
		return nil, fmt.Errorf("container %s: bundle: %w", id, err)
	}
	if len(text) == 0 {
		return nil, fmt.Errorf("container %s: bundle: %w", id, os.ErrNotExist)
	}
	sp := new(specs.Spec)
	if err := json.Unmarshal(text, sp); err != nil || sp.Process == nil {
		return nil, fmt.Errorf("container %s: bundle: config.json: no process: %w", id, err)
	}
	return sp, nil
}

// ReopenLog has the shim open the log file anew after it was moved away.
func (s *Service) ReopenLog(ctx context.Context, id string) error {
	c, err := s.running(id)
	if err != nil {
		return err
	}
	client, err := s.client(ctx, c.ID)
	if err != nil {
		return fmt.Errorf("container %s: reopen log: %w", c.ID, err)
	}
	if err := client.ReopenLog(ctx); err != nil {
		return fmt.Errorf("container %s: %w", c.ID, err)
	}
	return nil
}

// UpdateResources changes the limits of a container that has been created and
// has not exited. All are set, or none.
func (s *Service) UpdateResources(ctx context.Context, req *runtime.UpdateContainerResourcesRequest) error {
	c, err := s.book.view().container(req.GetContainerId())
	if err != nil {
		return err
	}
	if req.GetLinux() == nil {
		return fmt.Errorf("%w: linux: must be set", ErrInvalid)
	}
	_, err = s.ops.do(ctx, "update container", c.ID+fmt.Sprintf(" to %x", hashOf(req.GetLinux())), s.cfg.ContainerTimeout, func(ctx context.Context, o *op) (string, error) {
		return "", s.updateAsked(ctx, o, c.ID, req.GetLinux())
	})
	return err
}

// change is an update of a container's limits.
type change struct {
	update *runtime.LinuxContainerResources
	beyond *specs.LinuxResources // what the CRI has no words for; nil for nothing
	undo   time.Duration         // how long it may take to undo it
	back   *madeUpdate           // what it takes back, unless that has been changed since; nil for nothing
}

// updateResources changes the limits and returns what the row says of them now.
func (s *Service) updateResources(ctx context.Context, o *op, id string, ch change) (raw []byte, err error) {
	o.enter("turn")
	done, err := s.updates.take(ctx, id)
	if err != nil {
		return nil, fmt.Errorf("container %s: another update goes on: %w", id, err)
	}
	defer done()
	c, err := s.book.view().container(id)
	if err != nil {
		return nil, err
	}
	if c.State != StateCreated && c.State != StateRunning {
		return nil, fmt.Errorf("%w: container %s is %s", ErrState, id, c.State)
	}
	merged := spec.MergeResources(c.resources, ch.update)
	res, err := spec.ResolveResources(merged, s.host)
	if err != nil {
		return nil, fmt.Errorf("container %s: %w", id, err)
	}
	if raw, err = proto.Marshal(merged); err != nil {
		return nil, fmt.Errorf("container %s: %w", id, err)
	}
	if ch.back != nil {
		if !bytes.Equal(c.Resources, ch.back.made) {
			return c.Resources, nil
		}
		raw = ch.back.old.Resources
	}
	rt := s.runtimeOfContainer(c)
	res.Devices = nil // device rules are not part of an update
	addBeyondCRI(res, ch.beyond)
	if res.Memory != nil && lowersMemory(c.resources, ch.update) {
		check := true
		res.Memory.CheckBeforeUpdate = &check
	}
	err = o.steps(ctx, []step{
		{"update", func(ctx context.Context) error { return rt.update(ctx, id, res) }},
		{"record", func(context.Context) error {
			_, err := s.book.updateContainer(id, func(_ *store.Tx, r *containerRow) error { r.Resources = raw; return nil })
			return err
		}},
	})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("container %s: %w", id, err), s.restoreResources(ctx, rt, c, ch.undo))
	}
	return raw, nil
}

// lowersMemory tells whether an update lowers the limit of memory. Of itself cgroup
// v2 takes one below what is used, and kills for it; v1 refuses it.
func lowersMemory(old, update *runtime.LinuxContainerResources) bool {
	was, now := old.GetMemoryLimitInBytes(), update.GetMemoryLimitInBytes()
	return now > 0 && (now < was || was <= 0)
}

// restoreResources sets the limits back to what the book says, after an update
// that may have been carried out in part.
func (s *Service) restoreResources(ctx context.Context, rt ociRuntime, c *container, limit time.Duration) error {
	if s.exited(c.ID) {
		return nil
	}
	old, err := spec.ResolveResources(c.resources, s.host)
	if err != nil || old == nil {
		return err
	}
	old.Devices = nil
	// Not for undoTimeout: the next update has to wait for it.
	undo, cancel := cleanup(ctx, min(limit, s.cfg.ContainerTimeout))
	defer cancel()
	if err := rt.update(undo, c.ID, old); err != nil {
		return fmt.Errorf("limits not set back: %w", err)
	}
	return nil
}

func hashOf(m proto.Message) uint64 {
	raw, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		return 0
	}
	var h uint64 = 14695981039346656037 // FNV-1a
	for _, b := range raw {
		h = (h ^ uint64(b)) * 1099511628211
	}
	return h
}
