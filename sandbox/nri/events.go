package nri

import (
	"context"
	"errors"
	"fmt"

	"github.com/containerd/nri/pkg/api"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// Create tells plugins of a container that is to be made, changes the draft as
// they want, and has the node update others. done is to be called when the
// container is in the node's snapshot, or undone; it is never nil. With an error, some plugins may know of the container: its end is to
// be told. What cannot be done is an [ErrAdjustment].
func (h *Host) Create(ctx context.Context, p Pod, c Container, d Draft) (done func(), err error) {
	done = func() { h.forget(c.ID) }
	if err := h.take(ctx, "CreateContainer", c.ID); err != nil {
		return done, err
	}
	defer h.give()
	h.announce(c.ID, passing{p, &c})
	if h.idle() {
		return done, nil
	}
	h.know(c.ID)
	c.Spec = func() (*specs.Spec, error) { return d.Spec, nil }
	m := containerMessage(c)
	rpl, err := h.lib.CreateContainer(ctx, &api.CreateContainerRequest{Pod: podMessage(p), Container: m})
	if err != nil {
		return done, named("CreateContainer", err)
	}
	dropEnv(d.Spec, m.GetEnv())
	if err := adjust(d.Spec, rpl.GetAdjust(), d.Inject); err != nil {
		return done, named("CreateContainer", err)
	}
	if err := d.Accept(); err != nil {
		return done, named("CreateContainer", fmt.Errorf("%w: %w", ErrAdjustment, err))
	}
	_, err = h.apply(ctx, rpl.GetUpdate())
	return done, named("CreateContainer", err)
}

// Update asks plugins about an update of a container's resources, which they may
// change, and has the node make those of others that they want. The update itself
// is for the caller to make: the kernel may take its time over it, and the turn
// does not wait.
func (h *Host) Update(ctx context.Context, p Pod, c Container, res *specs.LinuxResources) (Said, error) {
	said := Said{Undo: nothingToUndo}
	if err := h.take(ctx, "UpdateContainer", c.ID); err != nil {
		return said, err
	}
	defer h.give()
	if h.idle() {
		return said, nil
	}
	rpl, err := h.lib.UpdateContainer(ctx, &api.UpdateContainerRequest{Pod: podMessage(p), Container: containerMessage(c),
		LinuxResources: api.FromOCILinuxResources(res, nil)})
	if err != nil {
		return said, named("UpdateContainer", err)
	}
	// The last one is the container's own, nil if no plugin had a say.
	list := rpl.GetUpdate()
	if n := len(list); n > 0 && (list[n-1] == nil || list[n-1].ContainerId == c.ID) {
		if list[n-1] != nil {
			own, err := updatesOf(list[n-1:])
			if err != nil {
				return said, named("UpdateContainer", err)
			}
			said.Own = own[0].Resources
		}
		list = list[:n-1]
	}
	said.Undo, err = h.apply(ctx, list)
	return said, named("UpdateContainer", err)
}

func nothingToUndo(context.Context) error { return nil }

// Tell tells plugins of an event, of a pod or of c in it. Ends are told once, and
// only of what plugins know; where a stop is missing before a removal it is told
// first. An error of an end, or of an event called Post, is news, and no reason to
// stop.
func (h *Host) Tell(ctx context.Context, e Event, p Pod, c Container) error {
	id := p.ID
	if e >= PostCreateContainer {
		id = c.ID
	}
	if err := h.take(ctx, e.String(), id); err != nil {
		return err
	}
	defer h.give()
	switch e {
	case StopPodSandbox, StopContainer:
		return h.stop(ctx, e, p, c, id)
	case RemovePodSandbox:
		return errors.Join(h.stop(ctx, StopPodSandbox, p, c, id), h.remove(ctx, e, p, c, id))
	case RemoveContainer:
		return errors.Join(h.stop(ctx, StopContainer, p, c, id), h.remove(ctx, e, p, c, id))
	}
	if h.idle() {
		return nil
	}
	return h.send(ctx, e, p, c)
}

func (h *Host) stop(ctx context.Context, e Event, p Pod, c Container, id string) error {
	h.mu.Lock()
	due := h.told[id] == live
	if due {
		h.told[id] = stopped
	}
	h.mu.Unlock()
	if !due || h.idle() {
		return nil
	}
	c.State = Stopped
	return h.send(ctx, e, p, c)
}

func (h *Host) remove(ctx context.Context, e Event, p Pod, c Container, id string) error {
	h.mu.Lock()
	due := h.told[id] != 0
	delete(h.told, id)
	delete(h.passing, id)
	h.mu.Unlock()
	if !due || h.idle() {
		return nil
	}
	c.State = Stopped
	return h.send(ctx, e, p, c)
}

// send has the library relay an event.
func (h *Host) send(ctx context.Context, e Event, p Pod, c Container) error {
	pod := podMessage(p)
	var err error
	switch e {
	case UpdatePodSandbox:
		_, err = h.lib.UpdatePodSandbox(ctx, &api.UpdatePodSandboxRequest{Pod: pod,
			OverheadLinuxResources: api.FromOCILinuxResources(p.Overhead, nil), LinuxResources: api.FromOCILinuxResources(p.Resources, nil)})
	case PostUpdatePodSandbox:
		err = h.lib.PostUpdatePodSandbox(ctx, &api.PostUpdatePodSandboxRequest{Pod: pod})
	case StopPodSandbox:
		err = h.lib.StopPodSandbox(ctx, &api.StopPodSandboxRequest{Pod: pod})
	case RemovePodSandbox:
		err = h.lib.RemovePodSandbox(ctx, &api.RemovePodSandboxRequest{Pod: pod})
	case PostCreateContainer:
		err = h.lib.PostCreateContainer(ctx, &api.PostCreateContainerRequest{Pod: pod, Container: containerMessage(c)})
	case StartContainer:
		err = h.lib.StartContainer(ctx, &api.StartContainerRequest{Pod: pod, Container: containerMessage(c)})
	case PostStartContainer:
		err = h.lib.PostStartContainer(ctx, &api.PostStartContainerRequest{Pod: pod, Container: containerMessage(c)})
	case PostUpdateContainer:
		err = h.lib.PostUpdateContainer(ctx, &api.PostUpdateContainerRequest{Pod: pod, Container: containerMessage(c)})
	case StopContainer:
		var rpl *api.StopContainerResponse
		if rpl, err = h.lib.StopContainer(ctx, &api.StopContainerRequest{Pod: pod, Container: containerMessage(c)}); err == nil {
			_, err = h.apply(ctx, rpl.GetUpdate())
		}
	case RemoveContainer:
		err = h.lib.RemoveContainer(ctx, &api.RemoveContainerRequest{Pod: pod, Container: containerMessage(c)})
	default:
		return fmt.Errorf("NRI: no event %d", e)
	}
	return named(e.String(), err)
}

// String is the event's name in NRI.
func (e Event) String() string {
	names := map[Event]string{UpdatePodSandbox: "UpdatePodSandbox", PostUpdatePodSandbox: "PostUpdatePodSandbox",
		StopPodSandbox: "StopPodSandbox", RemovePodSandbox: "RemovePodSandbox", PostCreateContainer: "PostCreateContainer",
		StartContainer: "StartContainer", PostStartContainer: "PostStartContainer", PostUpdateContainer: "PostUpdateContainer",
		StopContainer: "StopContainer", RemoveContainer: "RemoveContainer"}
	return names[e]
}

// updatesOf translates what plugins want of containers.
func updatesOf(messages []*api.ContainerUpdate) ([]Update, error) {
	out := make([]Update, 0, len(messages))
	for _, m := range messages {
		if m.GetContainerId() == "" {
			return nil, fmt.Errorf("%w: update: container_id: empty", ErrAdjustment)
		}
		res := m.GetLinux().GetResources()
		if res.GetBlockioClass() != nil || res.GetRdtClass() != nil {
			return nil, fmt.Errorf("%w: update of %.64q: blockio_class and rdt_class: only at creation, this runtime cannot move a container", ErrAdjustment, m.GetContainerId())
		}
		out = append(out, Update{ID: m.GetContainerId(), Resources: res.ToOCI(), IgnoreFailure: m.GetIgnoreFailure()})
	}
	return out, nil
}
