package spec

import (
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// ociVersion is the version of the runtime specification that the result keeps
// to. It is not the newest one that the types know: some runtimes refuse a version
// above their own, and nothing here needs more than 1.1 has.
const ociVersion = "1.1.0"

// rules are the concerns of a container, each of which fills in its part.
// Their order does not matter, except that devices add to resources.
var rules = []struct {
	name  string
	apply func(*Container, *specs.Spec) error
}{
	{"process", processRule},
	{"user", userRule},
	{"capabilities", capabilityRule},
	{"root", rootRule},
	{"mounts", mountRule},
	{"namespaces", namespaceRule},
	{"resources", resourceRule},
	{"devices", deviceRule},
	{"paths", pathRule},
	{"confinement", confinementRule},
}

// Build returns the OCI runtime specification of c, for runc 1.1 or later and
// its peers. The result shares no memory with c that either may change. Errors
// wrap [ErrInvalid] and name the CRI field, the value and the limit.
func Build(c Container) (*specs.Spec, error) {
	if c.Config == nil {
		return nil, fmt.Errorf("%w: config: missing", ErrInvalid)
	}
	s := &specs.Spec{
		Version:     ociVersion,
		Process:     &specs.Process{},
		Linux:       &specs.Linux{CgroupsPath: c.CgroupsPath},
		Annotations: maps.Clone(c.Annotations),
	}
	for _, r := range rules {
		if err := r.apply(&c, s); err != nil {
			return nil, fmt.Errorf("spec: %s: %w", r.name, err)
		}
	}
	return s, nil
}

func (c *Container) security() *runtime.LinuxContainerSecurityContext {
	return c.Config.GetLinux().GetSecurityContext()
}

func (c *Container) privileged() bool { return c.security().GetPrivileged() }

// seesHost tells whether the container is shown the host's control groups as they
// are. One in a user namespace is root there at most, and the kernel would not
// mount them for it.
func (c *Container) seesHost() bool { return c.privileged() && c.UserNS == nil }

func processRule(c *Container, s *specs.Spec) (err error) {
	p := s.Process
	if p.Args, err = command(c); err != nil {
		return err
	}
	if p.Env, err = environment(c); err != nil {
		return err
	}
	total := 0
	for _, v := range slices.Concat(p.Args, p.Env) {
		total += len(v) + 1 + 8 // a string, its end, its pointer
	}
	if total > maxExec {
		return fmt.Errorf("%w: command, args and envs: %d bytes, the limit is %d", ErrInvalid, total, maxExec)
	}
	if p.Cwd, err = workingDir(c); err != nil {
		return err
	}
	p.Terminal = c.Config.GetTty()
	p.Rlimits = slices.Clone(c.Rlimits)
	p.OOMScoreAdj, err = oomScore(c.Config.GetLinux().GetResources().GetOomScoreAdj(), c.OOMScoreMin)
	return err
}

func userRule(c *Container, s *specs.Spec) error {
	s.Process.User = specs.User{UID: c.User.UID, GID: c.User.GID, AdditionalGids: slices.Clone(c.User.AdditionalGIDs)}
	return nil
}

func capabilityRule(c *Container, s *specs.Spec) (err error) {
	s.Process.NoNewPrivileges = c.security().GetNoNewPrivs()
	s.Process.Capabilities, err = Capabilities(c.security(), c.Host)
	return err
}

func rootRule(c *Container, s *specs.Spec) error {
	s.Root = &specs.Root{Path: rootfs(c.Rootfs), Readonly: c.security().GetReadonlyRootfs()}
	return nil
}

func rootfs(dir string) string {
	if dir == "" {
		return "rootfs"
	}
	return dir
}

func namespaceRule(c *Container, s *specs.Spec) error {
	add := namespaces(s)
	add(specs.NetworkNamespace, c.Network)
	add(specs.IPCNamespace, c.IPC)
	add(specs.UTSNamespace, c.UTS)
	add(specs.PIDNamespace, c.PID)
	add(specs.MountNamespace, Namespace{})
	// On v2 a container sees its own group as the root, except one that is
	// there to see the host. On v1 there is no need: the
	// runtime mounts just the container's part of each hierarchy.
	add(specs.CgroupNamespace, Namespace{Host: !c.Host.CgroupV2 || c.seesHost()})
	addUser(s, c.UserNS)
	if c.UTS == (Namespace{}) {
		// A pinned namespace has its name already, the host's must keep it.
		s.Hostname = c.Hostname
	}
	return nil
}

// addUser has the container join a user namespace. Runtimes want to be told its
// mappings as well, which they compare or need to know before they join.
func addUser(s *specs.Spec, u *UserNS) {
	if u == nil {
		return
	}
	namespaces(s)(specs.UserNamespace, Namespace{Path: u.Path})
	s.Linux.UIDMappings, s.Linux.GIDMappings = slices.Clone(u.UIDs), slices.Clone(u.GIDs)
}

func namespaces(s *specs.Spec) func(specs.LinuxNamespaceType, Namespace) {
	return func(t specs.LinuxNamespaceType, n Namespace) {
		if !n.Host {
			s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: t, Path: n.Path})
		}
	}
}

func resourceRule(c *Container, s *specs.Spec) (err error) {
	s.Linux.Resources, err = ResolveResources(c.Config.GetLinux().GetResources(), c.Host)
	return err
}

// deviceRule closes the device controller and opens it for what is given. The
// runtime itself adds /dev/null and the few others that every container has.
func deviceRule(c *Container, s *specs.Spec) error {
	r := s.Linux.Resources
	if c.privileged() {
		r.Devices = []specs.LinuxDeviceCgroup{{Allow: true, Access: "rwm"}}
	} else {
		r.Devices = []specs.LinuxDeviceCgroup{{Allow: false, Access: "rwm"}}
	}
	for i, d := range c.Devices {
		if err := checkDevice(d); err != nil {
			return fmt.Errorf("devices[%d]: %w", i, err)
		}
		if c.UserNS != nil && d.Source != "" && d.Source != d.Path {
			// No device nodes can be made in a user namespace. Runtimes bind
			// the host's instead, and take its path to be the container's.
			s.Mounts = append(s.Mounts, bindMount(Mount{Source: d.Source, Destination: d.Path, Options: []string{"nosuid", "noexec"}}))
		} else {
			s.Linux.Devices = append(s.Linux.Devices, d.LinuxDevice)
		}
		if !c.privileged() {
			r.Devices = append(r.Devices, specs.LinuxDeviceCgroup{
				Allow: true, Type: d.Type, Major: ptr(d.Major), Minor: ptr(d.Minor), Access: d.Access,
			})
		}
	}
	return nil
}

func checkDevice(d Device) error {
	if !path.IsAbs(d.Path) || path.Clean(d.Path) == "/" {
		return fmt.Errorf("%w: container_path %q: not an absolute path of a file", ErrInvalid, clip(d.Path))
	}
	if d.Type != "c" && d.Type != "b" {
		return fmt.Errorf("%w: %s: type %q, want c or b", ErrInvalid, d.Path, d.Type)
	}
	if !AccessOK(d.Access) {
		return fmt.Errorf("%w: permissions %q: want one or more of r, w and m", ErrInvalid, clip(d.Access))
	}
	return nil
}

// AccessOK tells whether s is a non-empty subset of "rwm" without repetition.
func AccessOK(s string) bool {
	for i, c := range s {
		if !strings.ContainsRune("rwm", c) || strings.ContainsRune(s[:i], c) {
			return false
		}
	}
	return s != ""
}

// pathRule masks what the kernel shows every process about the machine. The
// kubelet sends the lists; without a security context at all nobody has said
// what to mask, and then the usual lists hold.
func pathRule(c *Container, s *specs.Spec) error {
	sc := c.security()
	switch {
	case c.privileged():
		return nil
	case sc == nil:
		s.Linux.MaskedPaths = slices.Clone(defaultMasked)
		s.Linux.ReadonlyPaths = slices.Clone(defaultReadonly)
		return nil
	}
	if err := checkPaths("masked_paths", sc.MaskedPaths); err != nil {
		return err
	}
	if err := checkPaths("readonly_paths", sc.ReadonlyPaths); err != nil {
		return err
	}
	s.Linux.MaskedPaths = slices.Clone(sc.MaskedPaths)
	s.Linux.ReadonlyPaths = slices.Clone(sc.ReadonlyPaths)
	return nil
}

func checkPaths(field string, list []string) error {
	for i, p := range list {
		if !path.IsAbs(p) || strings.IndexByte(p, 0) >= 0 || len(p) >= maxPath {
			return fmt.Errorf("%w: linux.security_context.%s[%d] %q: not an absolute path below %d bytes", ErrInvalid, field, i, clip(p), maxPath)
		}
	}
	return nil
}

var (
	defaultMasked = []string{
		"/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
		"/proc/sched_debug", "/proc/scsi", "/proc/timer_list", "/proc/timer_stats", "/sys/devices/virtual/powercap", "/sys/firmware",
	}
	defaultReadonly = []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"}
)

// confinementRule has what privileged containers are free of: seccomp,
// AppArmor and SELinux.
func confinementRule(c *Container, s *specs.Spec) error {
	if _, err := SELinuxOptions(c.security().GetSelinuxOptions()); err != nil {
		return err
	}
	s.Linux.MountLabel = c.MountLabel
	if c.privileged() {
		return nil
	}
	if c.Seccomp != nil && !c.Host.Seccomp {
		return fmt.Errorf("%w: linux.security_context.seccomp: this kernel has no seccomp filters", ErrInvalid)
	}
	s.Linux.Seccomp = c.Seccomp
	s.Process.ApparmorProfile = c.AppArmor
	s.Process.SelinuxLabel = c.ProcessLabel
	return nil
}

// SELinuxOptions returns the options in the form that the SELinux library takes,
// "type:container_t" and so on; none for none.
func SELinuxOptions(o *runtime.SELinuxOption) ([]string, error) {
	var out []string
	for _, f := range []struct{ name, value string }{
		{"user", o.GetUser()}, {"role", o.GetRole()}, {"type", o.GetType()}, {"level", o.GetLevel()},
	} {
		bad := func(r rune) bool { return r <= ' ' || r == 0x7f || r == ':' && f.name != "level" }
		if len(f.value) > 255 || strings.ContainsFunc(f.value, bad) {
			return nil, fmt.Errorf("%w: linux.security_context.selinux_options.%s %q: over 255 bytes, or with a space, colon or control character", ErrInvalid, f.name, clip(f.value))
		}
		if f.value != "" {
			out = append(out, f.name+":"+f.value)
		}
	}
	return out, nil
}

// AppArmor returns the profile that a security context asks for: "" for none.
// Asking for none by saying nothing means the default one, as the CRI has it. On
// a host without AppArmor a profile by name is an error, the default is none.
func AppArmor(sc *runtime.LinuxContainerSecurityContext, enabled bool, defaultProfile string) (string, error) {
	const field = "linux.security_context.apparmor"
	p := sc.GetApparmor()
	if p == nil {
		var err error
		if p, err = profileOf(field+"_profile", sc.GetApparmorProfile()); err != nil { //nolint:staticcheck // kubelets before 1.30 set only this
			return "", err
		}
	}
	switch {
	case sc.GetPrivileged() || p != nil && p.ProfileType == runtime.SecurityProfile_Unconfined:
		return "", nil
	case (p == nil || p.ProfileType == runtime.SecurityProfile_RuntimeDefault) && enabled:
		return defaultProfile, nil
	case p == nil || p.ProfileType == runtime.SecurityProfile_RuntimeDefault:
		return "", nil
	case p.ProfileType != runtime.SecurityProfile_Localhost:
		return "", fmt.Errorf("%w: %s.profile_type %d: unknown", ErrInvalid, field, p.ProfileType)
	case p.LocalhostRef == "" || len(p.LocalhostRef) > maxPath || strings.ContainsFunc(p.LocalhostRef, func(r rune) bool { return r < ' ' || r == 0x7f }):
		return "", fmt.Errorf("%w: %s.localhost_ref %q: not the name of a profile", ErrInvalid, field, clip(p.LocalhostRef))
	case !enabled:
		return "", fmt.Errorf("%w: %s.localhost_ref %q: this host has no AppArmor", ErrInvalid, field, clip(p.LocalhostRef))
	}
	return strings.TrimPrefix(p.LocalhostRef, "localhost/"), nil
}

// Profile returns the seccomp profile that a security context asks for,
// whichever of the two fields says it; nil is unconfined.
func Profile(sc *runtime.LinuxContainerSecurityContext) (*runtime.SecurityProfile, error) {
	if p := sc.GetSeccomp(); p != nil {
		return p, nil
	}
	return profileOf("linux.security_context.seccomp_profile_path", sc.GetSeccompProfilePath()) //nolint:staticcheck // as above
}

// profileOf reads the older, textual form of a security profile; "" is nil.
func profileOf(field, s string) (*runtime.SecurityProfile, error) {
	ref, local := strings.CutPrefix(s, "localhost/")
	switch {
	case s == "":
		return nil, nil
	case s == "runtime/default" || s == "docker/default":
		return &runtime.SecurityProfile{ProfileType: runtime.SecurityProfile_RuntimeDefault}, nil
	case s == "unconfined":
		return &runtime.SecurityProfile{ProfileType: runtime.SecurityProfile_Unconfined}, nil
	case local && ref != "":
		return &runtime.SecurityProfile{ProfileType: runtime.SecurityProfile_Localhost, LocalhostRef: ref}, nil
	}
	return nil, fmt.Errorf("%w: %s %q: want runtime/default, unconfined or localhost/<profile>", ErrInvalid, field, clip(s))
}
