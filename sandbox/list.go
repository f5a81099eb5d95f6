package sandbox

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berthd/berth/cni/netns"
	"github.com/berthd/berth/sandbox/spec"
)

// ListPods lists the pods that match the filter, the newest first. nil matches
// all. No match is an empty list.
func (s *Service) ListPods(f *runtime.PodSandboxFilter) []*runtime.PodSandbox {
	v := s.book.view()
	out := []*runtime.PodSandbox{}
	for _, p := range v.pods {
		if !p.listed() || !matchID(p.ID, f.GetId()) || !matchLabels(p.config.GetLabels(), f.GetLabelSelector()) {
			continue
		}
		if f.GetState() != nil && f.GetState().GetState() != p.criState() {
			continue
		}
		out = append(out, &runtime.PodSandbox{Id: p.ID, Metadata: p.config.GetMetadata(), State: p.criState(),
			CreatedAt: p.Created, Labels: p.config.GetLabels(), Annotations: p.config.GetAnnotations(), RuntimeHandler: p.Handler})
	}
	slices.SortFunc(out, func(a, b *runtime.PodSandbox) int { return newer(a.CreatedAt, b.CreatedAt, a.Id, b.Id) })
	return out
}

// ListContainers lists the containers that match the filter, the newest first.
func (s *Service) ListContainers(f *runtime.ContainerFilter) []*runtime.Container {
	out := []*runtime.Container{}
	for _, c := range s.matching(f.GetId(), f.GetPodSandboxId(), f.GetLabelSelector()) {
		if f.GetState() != nil && f.GetState().GetState() != c.criState() {
			continue
		}
		out = append(out, &runtime.Container{Id: c.ID, PodSandboxId: c.PodID, Metadata: c.config.GetMetadata(),
			Image: c.imageSpec(), ImageRef: c.ImageDigest, ImageId: c.ImageID, State: c.criState(), CreatedAt: c.Created,
			Labels: c.config.GetLabels(), Annotations: c.config.GetAnnotations()})
	}
	slices.SortFunc(out, func(a, b *runtime.Container) int { return newer(a.CreatedAt, b.CreatedAt, a.Id, b.Id) })
	return out
}

// matching returns the listed containers by ID, pod and labels; "" and nil match
// all. IDs may be prefixes.
func (s *Service) matching(id, podID string, labels map[string]string) []*container {
	v := s.book.view()
	var out []*container
	for _, c := range v.containers {
		if c.listed() && matchID(c.ID, id) && matchID(c.PodID, podID) && matchLabels(c.config.GetLabels(), labels) {
			out = append(out, c)
		}
	}
	return out
}

func matchID(id, want string) bool { return want == "" || strings.HasPrefix(id, want) }

func matchLabels(labels, want map[string]string) bool {
	for k, v := range want {
		if got, ok := labels[k]; !ok || got != v {
			return false
		}
	}
	return true
}

func newer(a, b int64, idA, idB string) int {
	if a != b {
		return int(min(max(b-a, -1), 1))
	}
	return strings.Compare(idA, idB)
}

func (p *pod) criState() runtime.PodSandboxState {
	if p.State == StateReady {
		return runtime.PodSandboxState_SANDBOX_READY
	}
	return runtime.PodSandboxState_SANDBOX_NOTREADY
}

func (c *container) criState() runtime.ContainerState {
	switch c.State {
	case StateCreated:
		return runtime.ContainerState_CONTAINER_CREATED
	case StateRunning:
		return runtime.ContainerState_CONTAINER_RUNNING
	case StateExited:
		return runtime.ContainerState_CONTAINER_EXITED
	}
	return runtime.ContainerState_CONTAINER_UNKNOWN
}

func (c *container) imageSpec() *runtime.ImageSpec {
	in := c.config.GetImage()
	return &runtime.ImageSpec{Image: c.ImageName, Annotations: in.GetAnnotations(),
		UserSpecifiedImage: in.GetUserSpecifiedImage(), RuntimeHandler: in.GetRuntimeHandler(), ImageRef: in.GetImageRef()}
}

// PodStatus returns the state of a pod and of its containers, all of one moment.
func (s *Service) PodStatus(ctx context.Context, id string, verbose bool) (*runtime.PodSandboxStatusResponse, error) {
	now := s.book.events.clock.next() // before the look: what comes later has a later time
	v := s.book.view()
	p, err := v.pod(id)
	if err != nil {
		return nil, err
	}
	out := s.podStatus(p, v.byPod[p.ID], now)
	if verbose {
		out.Info, err = s.podInfo(p)
	}
	return out, err
}

// podStatus is the status of a pod and of its containers as a view has them.
func (s *Service) podStatus(p *pod, containers []*container, at int64) *runtime.PodSandboxStatusResponse {
	st := &runtime.PodSandboxStatus{Id: p.ID, Metadata: p.config.GetMetadata(), State: p.criState(), CreatedAt: p.Created,
		Network: &runtime.PodSandboxNetworkStatus{}, RuntimeHandler: p.Handler,
		Linux:  &runtime.LinuxPodSandboxStatus{Namespaces: &runtime.Namespace{Options: p.namespaceOptions()}},
		Labels: p.config.GetLabels(), Annotations: p.config.GetAnnotations()}
	if len(p.IPs) > 0 && p.State == StateReady {
		st.Network.Ip = p.IPs[0]
		for _, ip := range p.IPs[1:] {
			st.Network.AdditionalIps = append(st.Network.AdditionalIps, &runtime.PodIP{Ip: ip})
		}
	}
	out := &runtime.PodSandboxStatusResponse{Status: st, Timestamp: at}
	for _, c := range containers {
		if c.listed() {
			out.ContainersStatuses = append(out.ContainersStatuses, s.statusOf(c))
		}
	}
	return out
}

func (p *pod) namespaceOptions() *runtime.NamespaceOption {
	in := p.config.GetLinux().GetSecurityContext().GetNamespaceOptions()
	return &runtime.NamespaceOption{Network: in.GetNetwork(), Pid: in.GetPid(), Ipc: in.GetIpc(),
		TargetId: in.GetTargetId(), UsernsOptions: in.GetUsernsOptions()}
}

// ContainerStatus returns the state of a container.
func (s *Service) ContainerStatus(ctx context.Context, id string, verbose bool) (*runtime.ContainerStatusResponse, error) {
	c, err := s.book.view().container(id)
	if err != nil {
		return nil, err
	}
	out := &runtime.ContainerStatusResponse{Status: s.statusOf(c)}
	if verbose {
		out.Info, err = s.containerInfo(c)
	}
	return out, err
}

func (s *Service) statusOf(c *container) *runtime.ContainerStatus {
	st := &runtime.ContainerStatus{Id: c.ID, Metadata: c.config.GetMetadata(), State: c.criState(),
		CreatedAt: c.Created, StartedAt: c.Started, FinishedAt: c.Finished, ExitCode: c.ExitCode,
		Image: c.imageSpec(), ImageRef: c.ImageDigest, ImageId: c.ImageID, Reason: c.Reason, Message: c.Message,
		Labels: c.config.GetLabels(), Annotations: c.config.GetAnnotations(), Mounts: c.mounts(), LogPath: c.LogPath, StopSignal: criSignal(c.StopSignal, c.config.GetStopSignal()),
		User: &runtime.ContainerUser{Linux: &runtime.LinuxContainerUser{Uid: int64(c.User.UID), Gid: int64(c.User.GID)}}}
	for _, g := range c.User.Groups {
		st.User.Linux.SupplementalGroups = append(st.User.Linux.SupplementalGroups, int64(g))
	}
	if r := s.resourcesOf(c); r != nil {
		st.Resources = &runtime.ContainerResources{Linux: r}
	}
	return st
}

// criSignal returns CRI's name for the number of a stop signal: the one that was
// asked for, else of several names (SIGABRT, SIGIOT) the first.
func criSignal(n int, asked runtime.Signal) runtime.Signal {
	names := slices.Sorted(maps.Keys(runtime.Signal_name))
	for _, v := range append([]int32{int32(asked)}, names...) {
		sig := runtime.Signal(v)
		if sig == runtime.Signal_SIGNAL_RUNTIME_DEFAULT {
			continue
		}
		if m, err := spec.StopSignal(sig, ""); err == nil && m == n {
			return sig
		}
	}
	return runtime.Signal_SIGNAL_RUNTIME_DEFAULT
}

// RuntimeHandlers lists the configured OCI runtimes with what each can do, the
// default one also under the name "" (RuntimeHandler in the CRI).
func (s *Service) RuntimeHandlers() []*runtime.RuntimeHandler {
	s.probed.wait()
	names := []string{""}
	for name := range s.runtimes {
		names = append(names, name)
	}
	slices.Sort(names)
	out := make([]*runtime.RuntimeHandler, 0, len(names))
	for _, name := range names {
		r, err := s.handler(name)
		if err != nil {
			continue
		}
		f, err := r.verdict()
		out = append(out, &runtime.RuntimeHandler{Name: name, Features: &runtime.RuntimeHandlerFeatures{
			RecursiveReadOnlyMounts: s.host.RRO && f.recursiveReadOnly(),
			UserNamespaces:          err == nil && s.canUserNS(f) == nil}})
	}
	return out
}

// podInfo is what the CRI's verbose mode says about a pod.
func (s *Service) podInfo(p *pod) (map[string]string, error) {
	return infoOf(map[string]any{
		"sandboxID": p.ID, "state": p.State, "pid": p.InitPid, "runtimeHandler": p.Handler, "config": p.config,
		"namespaces": s.pinPaths(p), "cni": p.CNI, "ips": p.IPs, "failure": p.Failure, "bootID": p.BootID,
	})
}

func (s *Service) pinPaths(p *pod) map[string]string {
	out := map[string]string{}
	for _, k := range []string{"net", "ipc", "uts", "pid", "user"} {
		if path := s.deps.Pins.Path(p.ID, netns.Kind(k)); exists(path) {
			out[k] = path
		}
	}
	return out
}

// containerInfo is what the CRI's verbose mode says about a container.
func (s *Service) containerInfo(c *container) (map[string]string, error) {
	info := map[string]any{
		"sandboxID": c.PodID, "state": c.State, "pid": c.Pid, "shimPid": c.ShimPid, "cgroup": c.CgroupPath,
		"bundle": s.bundleDir(c.ID), "snapshot": c.ID, "config": c.config, "runtimeHandler": c.Handler, "failure": c.Failure,
	}
	if sp, err := s.readSpec(c.ID); err == nil {
		info["runtimeSpec"] = sp
	}
	return infoOf(info)
}

func infoOf(v map[string]any) (map[string]string, error) {
	text, err := json.Marshal(v)
	if err != nil {
		return nil, fmt.Errorf("info: %w", err)
	}
	return map[string]string{"info": string(text)}, nil
}

// Info is what the CRI's verbose Status says about this package.
func (s *Service) Info() map[string]string {
	s.probed.wait()
	runtimes := map[string]any{}
	for name, r := range s.runtimes {
		f, err := r.verdict()
		entry := map[string]any{"path": f.Path, "version": f.Version, "root": r.root, "cgroupDriver": r.driver}
		if err != nil {
			entry["error"] = err.Error()
		}
		runtimes[name] = entry
	}
	v := s.book.view()
	text, err := json.Marshal(map[string]any{"runtimes": runtimes, "cgroupDriver": s.cfg.CgroupDriver, "cgroupV2": s.hier.V2(),
		"pods": len(v.pods), "containers": len(v.containers), "operations": opsInfo(s.ops.list()), "lowestOOMScoreAdj": s.oomFloor,
		"quarantined": s.deps.Store.Quarantined()})
	if err != nil {
		return map[string]string{"sandbox": err.Error()}
	}
	return map[string]string{"sandbox": string(text)}
}

// opsInfo is the form of operations under way in Info. Work in the background is none.
func opsInfo(list []Op) []map[string]string {
	out := make([]map[string]string, 0, len(list))
	for _, o := range list {
		if o.Background {
			continue
		}
		out = append(out, map[string]string{"verb": o.Verb, "object": o.Object, "step": o.Step,
			"age": o.Age.Round(time.Millisecond).String(), "stepAge": o.StepAge.Round(time.Millisecond).String()})
	}
	return out
}
