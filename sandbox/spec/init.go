package spec

import (
	"fmt"
	"maps"
	"path"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

const (
	initPath = "/berth-init"
	// initID is the user and group of the init: nobody's on any system, and
	// it needs no more to reap orphans.
	initID = 65535
)

// Init returns the specification of the init process of a pod whose containers
// share a PID namespace: process 1 of a new one, with the pod's other
// namespaces, a read-only root with little more than the program in it, no
// capability and no way to get one. The binary must be readable and executable by
// everybody, as it does not run as root.
func Init(p InitPod) (*specs.Spec, error) {
	if p.Binary != "" && !path.IsAbs(p.Binary) {
		return nil, fmt.Errorf("%w: spec: init: binary %q: not an absolute path", ErrInvalid, clip(p.Binary))
	}
	oom, err := oomScore(int64(p.OOMScoreAdj), p.OOMScoreMin)
	if err != nil {
		return nil, fmt.Errorf("spec: init: %w", err)
	}
	s := &specs.Spec{
		Version: ociVersion,
		Process: &specs.Process{
			User: initUser(p.UserNS),
			Args: []string{initPath},
			// It sleeps all its life: one P and no collector keep it small.
			Env:             []string{"PATH=" + defaultPath, "GOMAXPROCS=1", "GOGC=off"},
			Cwd:             "/",
			Capabilities:    &specs.LinuxCapabilities{},
			NoNewPrivileges: true,
			OOMScoreAdj:     oom,
		},
		Root: &specs.Root{Path: rootfs(p.Rootfs), Readonly: true},
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "noexec", "mode=755", "size=64k"}},
		},
		Linux: &specs.Linux{
			CgroupsPath:   p.CgroupsPath,
			Resources:     &specs.LinuxResources{Devices: []specs.LinuxDeviceCgroup{{Allow: false, Access: "rwm"}}},
			MaskedPaths:   append([]string(nil), defaultMasked...),
			ReadonlyPaths: append([]string(nil), defaultReadonly...),
		},
		Annotations: maps.Clone(p.Annotations),
	}
	if p.Binary != "" {
		s.Mounts = append(s.Mounts, bindMount(Mount{Source: p.Binary, Destination: initPath, Readonly: true, Options: []string{"nosuid", "nodev"}}))
	}
	if p.Host.Seccomp {
		s.Linux.Seccomp = DefaultSeccomp(nil, p.Arch)
	}
	add := namespaces(s)
	add(specs.NetworkNamespace, p.Network)
	add(specs.IPCNamespace, p.IPC)
	add(specs.UTSNamespace, p.UTS)
	add(specs.PIDNamespace, Namespace{})
	add(specs.MountNamespace, Namespace{})
	add(specs.CgroupNamespace, Namespace{Host: !p.Host.CgroupV2})
	addUser(s, p.UserNS)
	return s, nil
}

// initUser is nobody, or, in a user namespace too small for that, the highest
// user there is.
func initUser(u *UserNS) specs.User {
	uid, gid := uint32(initID), uint32(initID)
	if u != nil {
		uid, gid = highest(u.UIDs, uid), highest(u.GIDs, gid)
	}
	return specs.User{UID: uid, GID: gid, AdditionalGids: []uint32{gid}}
}

// highest is the highest mapped ID up to limit.
func highest(list []specs.LinuxIDMapping, limit uint32) (id uint32) {
	for _, m := range list {
		if m.Size > 0 && m.ContainerID <= limit {
			id = max(id, m.ContainerID+min(m.Size-1, limit-m.ContainerID))
		}
	}
	return id
}
