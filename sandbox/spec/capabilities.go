package spec

import (
	"fmt"
	"slices"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// defaultCapabilities is what a container has that asks for nothing: the set
// that the field has agreed on, which images are tested with.
var defaultCapabilities = []string{
	"CAP_AUDIT_WRITE", "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_MKNOD",
	"CAP_NET_BIND_SERVICE", "CAP_NET_RAW", "CAP_SETFCAP", "CAP_SETGID", "CAP_SETPCAP", "CAP_SETUID", "CAP_SYS_CHROOT",
}

// knownCapabilities has capabilities(7) in the order of their numbers. The
// host decides what can be given; this list decides what is a name.
var knownCapabilities = []string{
	"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_SETGID",
	"CAP_SETUID", "CAP_SETPCAP", "CAP_LINUX_IMMUTABLE", "CAP_NET_BIND_SERVICE", "CAP_NET_BROADCAST", "CAP_NET_ADMIN",
	"CAP_NET_RAW", "CAP_IPC_LOCK", "CAP_IPC_OWNER", "CAP_SYS_MODULE", "CAP_SYS_RAWIO", "CAP_SYS_CHROOT", "CAP_SYS_PTRACE",
	"CAP_SYS_PACCT", "CAP_SYS_ADMIN", "CAP_SYS_BOOT", "CAP_SYS_NICE", "CAP_SYS_RESOURCE", "CAP_SYS_TIME",
	"CAP_SYS_TTY_CONFIG", "CAP_MKNOD", "CAP_LEASE", "CAP_AUDIT_WRITE", "CAP_AUDIT_CONTROL", "CAP_SETFCAP",
	"CAP_MAC_OVERRIDE", "CAP_MAC_ADMIN", "CAP_SYSLOG", "CAP_WAKE_ALARM", "CAP_BLOCK_SUSPEND", "CAP_AUDIT_READ",
	"CAP_PERFMON", "CAP_BPF", "CAP_CHECKPOINT_RESTORE",
}

// CapabilityName returns the name of the capability with number n, "" if this
// version of berth knows none.
func CapabilityName(n int) string {
	if n < 0 || n >= len(knownCapabilities) {
		return ""
	}
	return knownCapabilities[n]
}

// CapabilityNumber is the reverse of [CapabilityName].
func CapabilityNumber(name string) (n int, ok bool) {
	n = slices.Index(knownCapabilities, name)
	return n, n >= 0
}

// Capabilities returns the capability sets of a container by the rules of CRI's
// Capability message, except that add_capabilities makes nothing inheritable: an
// inheritable capability can be raised by any program with file capabilities
// (CVE-2022-24769, CVE-2022-27652). The one exception is what is added as
// ambient, because the kernel has no ambient capability that is not inheritable
// (capabilities(7)); it passes to every program anyhow. Bounding is what
// [DefaultSeccomp] asks for.
//
// Names may lack the "CAP_" prefix and are not case-sensitive. "ALL" stands for
// everything the host can give, and a drop of it leaves only what is added by
// name. A name that is in no version of Linux is an error, a name that
// only this host does not have is one too, except in a drop.
func Capabilities(sc *runtime.LinuxContainerSecurityContext, h Host) (*specs.LinuxCapabilities, error) {
	if sc.GetPrivileged() {
		return capabilitySets(h.Capabilities, nil), nil
	}
	c := sc.GetCapabilities()
	add, addAll, err := capabilityList("add_capabilities", c.GetAddCapabilities(), h.Capabilities)
	if err != nil {
		return nil, err
	}
	ambient, ambientAll, err := capabilityList("add_ambient_capabilities", c.GetAddAmbientCapabilities(), h.Capabilities)
	if err != nil {
		return nil, err
	}
	drop, dropAll, err := capabilityList("drop_capabilities", c.GetDropCapabilities(), nil)
	if err != nil {
		return nil, err
	}
	set := defaultCapabilities
	if addAll || ambientAll {
		set = h.Capabilities
	}
	if dropAll {
		set = nil
	}
	if ambientAll && !dropAll {
		ambient = h.Capabilities
	}
	// Dropping by name is last: it takes away from every set, also what "ALL"
	// has given.
	keep := func(in []string) []string {
		return slices.DeleteFunc(slices.Clone(in), func(s string) bool {
			return slices.Contains(drop, s) || !slices.Contains(h.Capabilities, s)
		})
	}
	return capabilitySets(keep(slices.Concat(set, add, ambient)), keep(ambient)), nil
}

func capabilitySets(set, ambient []string) *specs.LinuxCapabilities {
	unique := func(in []string) []string {
		out := slices.Clone(in)
		slices.Sort(out)
		return slices.Compact(out)
	}
	return &specs.LinuxCapabilities{
		Bounding:    unique(set),
		Effective:   unique(set),
		Permitted:   unique(set),
		Inheritable: unique(ambient),
		Ambient:     unique(ambient),
	}
}

// capabilityList normalises names and takes "ALL" out of them. With a host
// list, names outside of it are refused.
func capabilityList(field string, names, host []string) (caps []string, all bool, err error) {
	for i, name := range names {
		c := strings.ToUpper(name)
		if c == "ALL" || c == "CAP_ALL" {
			all = true
			continue
		}
		if !strings.HasPrefix(c, "CAP_") {
			c = "CAP_" + c
		}
		where := fmt.Sprintf("linux.security_context.capabilities.%s[%d]", field, i)
		if !slices.Contains(knownCapabilities, c) {
			return nil, false, fmt.Errorf("%w: %s %q: no such capability", ErrInvalid, where, clip(name))
		}
		if host != nil && !slices.Contains(host, c) {
			return nil, false, fmt.Errorf("%w: %s %q: this host can not give it", ErrInvalid, where, clip(name))
		}
		caps = append(caps, c)
	}
	return caps, all, nil
}
