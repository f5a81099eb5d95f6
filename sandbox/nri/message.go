package nri

import (
	"github.com/containerd/nri/pkg/api"
	"k8s.io/klog/v2"
)

func podMessages(pods []Pod) []*api.PodSandbox {
	out := make([]*api.PodSandbox, 0, len(pods))
	for _, p := range pods {
		out = append(out, podMessage(p))
	}
	return out
}

func containerMessages(containers []Container) []*api.Container {
	out := make([]*api.Container, 0, len(containers))
	for _, c := range containers {
		out = append(out, containerMessage(c))
	}
	return out
}

// podMessage is a pod as plugins see it.
func podMessage(p Pod) *api.PodSandbox {
	return &api.PodSandbox{
		Id: p.ID, Name: p.Name, Uid: p.UID, Namespace: p.Namespace, RuntimeHandler: p.Handler,
		Labels: p.Labels, Annotations: p.Annotations, Ips: p.IPs, Pid: uint32(p.Pid),
		Linux: &api.LinuxPodSandbox{
			PodOverhead: api.FromOCILinuxResources(p.Overhead, nil), PodResources: api.FromOCILinuxResources(p.Resources, nil),
			CgroupParent: p.CgroupParent, Namespaces: api.FromOCILinuxNamespaces(p.Namespaces),
		},
	}
}

// containerMessage is a container as plugins see it. The library changes the
// message on its way from plugin to plugin, so its maps are copies.
func containerMessage(c Container) *api.Container {
	m := &api.Container{
		Id: c.ID, PodSandboxId: c.PodID, Name: c.Name, State: states[c.State], Pid: uint32(c.Pid),
		Labels: api.DupStringMap(c.Labels), Annotations: api.DupStringMap(c.Annotations),
		CreatedAt: c.Created, StartedAt: c.Started, FinishedAt: c.Ended,
		ExitCode: c.ExitCode, StatusReason: c.Reason, StatusMessage: c.Message,
		Image: &api.Image{Name: c.ImageName, Digest: c.ImageDigest, ConfigDigest: c.ImageID},
		Linux: &api.LinuxContainer{SeccompProfile: seccompProfile(c)},
	}
	for _, name := range c.CDI {
		m.CDIDevices = append(m.CDIDevices, &api.CDIDevice{Name: name})
	}
	fillSpec(m, c)
	return m
}

var states = map[State]api.ContainerState{Created: api.ContainerState_CONTAINER_CREATED,
	Running: api.ContainerState_CONTAINER_RUNNING, Stopped: api.ContainerState_CONTAINER_STOPPED}

func seccompProfile(c Container) *api.SecurityProfile {
	kinds := map[string]api.SecurityProfile_ProfileType{"RuntimeDefault": api.SecurityProfile_RUNTIME_DEFAULT,
		"Unconfined": api.SecurityProfile_UNCONFINED, "Localhost": api.SecurityProfile_LOCALHOST}
	kind, ok := kinds[c.SeccompKind]
	if !ok {
		return nil
	}
	return &api.SecurityProfile{ProfileType: kind, LocalhostRef: c.SeccompFile}
}

// fillSpec adds what the container's OCI specification says.
func fillSpec(m *api.Container, c Container) {
	if c.Spec == nil {
		return
	}
	s, err := c.Spec()
	if err != nil {
		klog.Background().Info("NRI: specification of a container not readable", "containerID", c.ID, "err", err)
	}
	if s == nil {
		return
	}
	m.Mounts, m.Hooks = api.FromOCIMounts(s.Mounts), api.FromOCIHooks(s.Hooks)
	for k, v := range s.Annotations {
		if m.Annotations == nil {
			m.Annotations = map[string]string{}
		}
		m.Annotations[k] = v
	}
	if p := s.Process; p != nil {
		m.Args, m.Env = api.DupStringSlice(p.Args), api.DupStringSlice(p.Env)
		m.User = &api.User{Uid: p.User.UID, Gid: p.User.GID, AdditionalGids: p.User.AdditionalGids}
		for _, l := range p.Rlimits {
			m.Rlimits = append(m.Rlimits, &api.POSIXRlimit{Type: l.Type, Hard: l.Hard, Soft: l.Soft})
		}
		m.Linux.OomScoreAdj = api.Int(p.OOMScoreAdj)
		m.Linux.IoPriority = api.FromOCILinuxIOPriority(p.IOPriority)
		m.Linux.Scheduler = api.FromOCILinuxScheduler(p.Scheduler)
	}
	if l := s.Linux; l != nil {
		m.Linux.Namespaces, m.Linux.Devices = api.FromOCILinuxNamespaces(l.Namespaces), api.FromOCILinuxDevices(l.Devices)
		m.Linux.Resources, m.Linux.CgroupsPath = api.FromOCILinuxResources(l.Resources, nil), l.CgroupsPath
		m.Linux.NetDevices, m.Linux.Sysctl = api.FromOCILinuxNetDevices(l.NetDevices), api.DupStringMap(l.Sysctl)
		if l.Seccomp != nil {
			m.Linux.SeccompPolicy = api.FromOCILinuxSeccomp(l.Seccomp)
		}
		if r := l.IntelRdt; r != nil {
			m.Linux.Rdt = &api.LinuxRdt{ClosId: api.String(r.ClosID), Schemata: api.RepeatedString(r.Schemata), EnableMonitoring: api.Bool(r.EnableMonitoring)}
		}
	}
}
