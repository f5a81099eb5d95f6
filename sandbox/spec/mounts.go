package spec

import (
	"fmt"
	"path"
	"slices"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// maxPath is the kernel's limit for a path, PATH_MAX.
const maxPath = 4096

// mountOptions are the options of Mount.Options that a bind mount may carry.
// Others change what the mount is, not how it may be used.
var mountOptions = []string{
	"noexec", "exec", "nosuid", "suid", "nodev", "dev", "noatime", "atime", "relatime", "norelatime",
	"strictatime", "nostrictatime", "nodiratime", "diratime", "nosymfollow", "symfollow",
}

// mountRule lists the mounts in the order in which the runtime makes them:
// the usual ones, then the pod's files and the user's mounts by depth, so that
// none hides another that it should contain.
func mountRule(c *Container, s *specs.Spec) error {
	user := make(map[string]*Mount, len(c.Mounts))
	for i := range c.Mounts {
		m := &c.Mounts[i]
		if err := checkMount(m, c); err != nil {
			return fmt.Errorf("mounts[%d]: %w", i, err)
		}
		user[path.Clean(m.Destination)] = m
	}
	_, ownDev := user["/dev"]
	for _, m := range usualMounts(c) {
		if user[m.Destination] == nil && !(ownDev && strings.HasPrefix(m.Destination, "/dev/")) {
			s.Mounts = append(s.Mounts, m)
		}
	}
	late := podFiles(c, user)
	for i := range c.Mounts {
		m := &c.Mounts[i]
		late = append(late, bindMount(*m))
		raisePropagation(s.Linux, m.Propagation)
	}
	slices.SortStableFunc(late, func(a, b specs.Mount) int { return depth(a.Destination) - depth(b.Destination) })
	s.Mounts = append(s.Mounts, late...)
	return nil
}

func depth(p string) int { return strings.Count(path.Clean(p), "/") }

func checkMount(m *Mount, c *Container) error {
	for _, p := range []struct{ field, value string }{{"container_path", m.Destination}, {"host_path", m.Source}} {
		if !path.IsAbs(p.value) || strings.IndexByte(p.value, 0) >= 0 || len(p.value) >= maxPath {
			return fmt.Errorf("%w: %s %q: not an absolute path below %d bytes", ErrInvalid, p.field, clip(p.value), maxPath)
		}
	}
	if path.Clean(m.Destination) == "/" {
		return fmt.Errorf("%w: container_path %q: would hide the container's root", ErrInvalid, m.Destination)
	}
	if !slices.Contains([]string{"", "rprivate", "rslave", "rshared"}, m.Propagation) {
		return fmt.Errorf("%w: propagation %q: want rprivate, rslave or rshared", ErrInvalid, m.Propagation)
	}
	if m.Propagation == "rshared" && c.UserNS != nil {
		// The kernel makes every mount of the host a slave there.
		return fmt.Errorf("%w: propagation: bidirectional is not possible from a user namespace", ErrInvalid)
	}
	if m.RecursiveReadonly {
		switch {
		case !m.Readonly:
			return fmt.Errorf("%w: recursive_read_only true: needs readonly true", ErrInvalid)
		case m.Propagation != "" && m.Propagation != "rprivate":
			return fmt.Errorf("%w: recursive_read_only true: needs private propagation, not %s", ErrInvalid, m.Propagation)
		case !c.Host.RRO:
			return fmt.Errorf("%w: recursive_read_only true: the kernel or the OCI runtime can not do it", ErrInvalid)
		}
	}
	for _, o := range m.Options {
		if !slices.Contains(mountOptions, o) {
			return fmt.Errorf("%w: mount_options %q: want some of %s", ErrInvalid, clip(o), strings.Join(mountOptions, ", "))
		}
	}
	return nil
}

func bindMount(m Mount) specs.Mount {
	mode := "rw"
	switch {
	case m.RecursiveReadonly:
		mode = "rro"
	case m.Readonly:
		mode = "ro"
	}
	propagation := m.Propagation
	if propagation == "" {
		propagation = "rprivate"
	}
	return specs.Mount{
		Destination: path.Clean(m.Destination),
		Type:        "bind",
		Source:      m.Source,
		Options:     append([]string{"rbind", propagation, mode}, m.Options...),
		UIDMappings: slices.Clone(m.UIDMappings),
		GIDMappings: slices.Clone(m.GIDMappings),
	}
}

// raisePropagation makes the root at least as open as the mount: events pass to
// the container's mounts only through a root that passes them.
func raisePropagation(l *specs.Linux, propagation string) {
	if propagation == "rshared" || propagation == "rslave" && l.RootfsPropagation == "" {
		l.RootfsPropagation = propagation
	}
}

// hostShm is the shared memory of a pod in the host's IPC namespace.
const hostShm = "/dev/shm"

// podFiles are berth's own mounts from the host. A user's mount at the same
// place wins. So does one above it that passes mounts back to the host: ours
// would appear there as well.
func podFiles(c *Container, user map[string]*Mount) (out []specs.Mount) {
	ro := c.security().GetReadonlyRootfs()
	var shm []string
	if c.ShmDir != hostShm {
		// The pod's own is mounted like this; crun has to be told again.
		shm = []string{"nosuid", "noexec", "nodev"}
	}
	for _, f := range []Mount{
		{Source: c.HostsFile, Destination: "/etc/hosts", Readonly: ro},
		{Source: c.HostnameFile, Destination: "/etc/hostname", Readonly: ro},
		{Source: c.ResolvConf, Destination: "/etc/resolv.conf", Readonly: ro},
		{Source: c.ShmDir, Destination: "/dev/shm", Options: shm},
	} {
		parent := user[path.Dir(f.Destination)]
		leaks := parent != nil && (parent.Propagation == "rshared" || f.Destination == "/dev/shm")
		if f.Source != "" && user[f.Destination] == nil && !leaks {
			out = append(out, bindMount(f))
		}
	}
	return out
}

// usualMounts are the file systems that the runtime specification wants a Linux
// container to have.
func usualMounts(c *Container) []specs.Mount {
	access := "ro"
	if c.privileged() {
		access = "rw"
	}
	cgroup := []string{"nosuid", "noexec", "nodev", "relatime", access}
	if c.Host.CgroupV2 && c.seesHost() {
		// In the host's cgroup namespace the mount's options become those
		// of the one super block that everybody has: repeat the host's.
		cgroup = append(cgroup, c.Host.CgroupFlags...)
	}
	list := []specs.Mount{
		{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
		{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
		{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: ptsOptions(c.UserNS)},
		{Destination: "/dev/mqueue", Type: "mqueue", Source: "mqueue", Options: []string{"nosuid", "noexec", "nodev"}},
		{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev", access}},
		{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: cgroup},
	}
	if c.ShmDir == "" {
		list = append(list, specs.Mount{Destination: "/dev/shm", Type: "tmpfs", Source: "shm", Options: []string{"nosuid", "noexec", "nodev", "mode=1777", "size=65536k"}})
	}
	if c.UserNS == nil {
		return list
	}
	var out []specs.Mount
	for _, m := range list {
		if m, ok := asUser(c, m); ok {
			out = append(out, m)
		}
	}
	return out
}

// ptsOptions are those of a container's terminals, which belong to the group tty.
func ptsOptions(u *UserNS) []string {
	list := []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"}
	if u == nil || mapped(u.GIDs, ttyGID) {
		list = append(list, fmt.Sprintf("gid=%d", ttyGID))
	}
	return list
}

// ttyGID is the group tty on every distribution.
const ttyGID = 5

// asUser changes a mount that the root of a user namespace may not make, because
// what it shows belongs to a namespace of the host, to one that binds the host's.
// It returns false if there is none.
func asUser(c *Container, m specs.Mount) (specs.Mount, bool) {
	switch {
	case m.Type == "sysfs" && c.Network.Host:
		ro := "ro"
		if c.Host.RRO {
			ro = "rro"
		}
		m.Options = []string{"rbind", "rprivate", "nosuid", "noexec", "nodev", ro}
	case m.Type == "mqueue" && c.IPC.Host && c.Host.MQueue:
		m.Options = []string{"rbind", "rprivate", "nosuid", "noexec", "nodev"}
	case m.Type == "mqueue" && c.IPC.Host:
		return m, false // queues are there without it, only not to be listed
	default:
		return m, true
	}
	m.Type, m.Source = "bind", m.Destination
	return m, true
}
