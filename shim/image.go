package shim

import (
	"fmt"
	"path"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Surroundings are what a process needs and no OCI specification says.
type Surroundings struct {
	// ID is the container's. Its session keyring is named after it.
	ID string
	// Cgroups are the container's cgroup directories.
	Cgroups []string
	// Home is the home directory of the process's user in the container, "/"
	// when that has none, for a process without HOME.
	Home string
	// Capability gives the number of a capability, such as CAP_KILL.
	Capability func(name string) (int, bool)
}

// ImageOf returns what starts p in a container of the specification sp, to the
// same effect as `runc exec` of runc 1.2 and later. The error is ErrUnsupported,
// and names what only the runtime can do: a terminal, labels of a security module, a
// user or time namespace, a seccomp listener, …
func ImageOf(sp *specs.Spec, p *specs.Process, at Surroundings) (*ExecImage, error) {
	if err := plain(sp, p); err != nil {
		return nil, err
	}
	m := &ExecImage{
		Args: p.Args, Env: environment(p.Env, at.Home), Dir: p.Cwd, Keyring: "_ses." + at.ID,
		UID: p.User.UID, GID: p.User.GID, Groups: p.User.AdditionalGids,
		NoNewPrivs: p.NoNewPrivileges, OOMScoreAdj: sp.Process.OOMScoreAdj, Umask: p.User.Umask,
	}
	for _, dir := range at.Cgroups {
		m.Cgroups = append(m.Cgroups, path.Join(dir, "cgroup.procs"))
	}
	var err error
	if m.Files, err = files(p.Args[0], m.Env); err != nil {
		return nil, err
	}
	if m.Rlimits, err = rlimits(p.Rlimits); err != nil {
		return nil, err
	}
	if err := capabilities(m, p.Capabilities, at.Capability); err != nil {
		return nil, err
	}
	return m, seccomp(m, sp.Linux.Seccomp)
}

func unsupported(what string) error { return fmt.Errorf("native exec: %s: %w", what, ErrUnsupported) }

// plain tells whether there is nothing in sp and p that is not looked at here.
func plain(sp *specs.Spec, p *specs.Process) error {
	switch {
	case sp.Process == nil || sp.Linux == nil || len(p.Args) == 0 || !path.IsAbs(p.Cwd):
		return unsupported("incomplete specification")
	case p.Terminal:
		return unsupported("terminal")
	case p.SelinuxLabel != "" || p.ApparmorProfile != "":
		return unsupported("label")
	case p.Scheduler != nil || p.IOPriority != nil || p.ExecCPUAffinity != nil:
		return unsupported("scheduling")
	case p.Capabilities == nil:
		return unsupported("capabilities")
	case p.User.Umask != nil && *p.User.Umask > 0o777:
		return unsupported("umask")
	case sp.Linux.Personality != nil || sp.Linux.MemoryPolicy != nil || sp.Linux.IntelRdt != nil:
		return unsupported("personality, memory policy or resource director")
	}
	for _, ns := range sp.Linux.Namespaces {
		if ns.Type == specs.UserNamespace || ns.Type == specs.TimeNamespace {
			return unsupported(string(ns.Type) + " namespace")
		}
	}
	return nil
}

// environment has each variable once, the last value counts, and a HOME.
func environment(env []string, home string) []string {
	last := make(map[string]int, len(env))
	for i, kv := range env {
		name, _, _ := strings.Cut(kv, "=")
		last[name] = i
	}
	out := make([]string, 0, len(env)+1)
	found := false
	for i, kv := range env {
		name, value, _ := strings.Cut(kv, "=")
		if last[name] != i || name == "HOME" && value == "" {
			continue
		}
		found = found || name == "HOME"
		out = append(out, kv)
	}
	if !found {
		out = append(out, "HOME="+home)
	}
	return out
}

// files are where a program may be.
func files(name string, env []string) ([]string, error) {
	if strings.Contains(name, "/") {
		return []string{name}, nil
	}
	var list []string
	for _, kv := range env {
		dirs, ok := strings.CutPrefix(kv, "PATH=")
		if !ok {
			continue
		}
		for _, dir := range strings.Split(dirs, ":") {
			if !path.IsAbs(dir) {
				return nil, unsupported("relative PATH")
			}
			list = append(list, path.Join(dir, name))
		}
	}
	if len(list) == 0 || name == "" {
		return nil, unsupported("no PATH")
	}
	return list, nil
}

var rlimitNumbers = map[string]uint64{
	"RLIMIT_AS": unix.RLIMIT_AS, "RLIMIT_CORE": unix.RLIMIT_CORE, "RLIMIT_CPU": unix.RLIMIT_CPU, "RLIMIT_DATA": unix.RLIMIT_DATA,
	"RLIMIT_FSIZE": unix.RLIMIT_FSIZE, "RLIMIT_LOCKS": unix.RLIMIT_LOCKS, "RLIMIT_MEMLOCK": unix.RLIMIT_MEMLOCK,
	"RLIMIT_MSGQUEUE": unix.RLIMIT_MSGQUEUE, "RLIMIT_NICE": unix.RLIMIT_NICE, "RLIMIT_NOFILE": unix.RLIMIT_NOFILE,
	"RLIMIT_NPROC": unix.RLIMIT_NPROC, "RLIMIT_RSS": unix.RLIMIT_RSS, "RLIMIT_RTPRIO": unix.RLIMIT_RTPRIO,
	"RLIMIT_RTTIME": unix.RLIMIT_RTTIME, "RLIMIT_SIGPENDING": unix.RLIMIT_SIGPENDING, "RLIMIT_STACK": unix.RLIMIT_STACK,
}

func rlimits(list []specs.POSIXRlimit) (out []Rlimit, err error) {
	for _, l := range list {
		n, ok := rlimitNumbers[l.Type]
		if !ok {
			return nil, unsupported("rlimit " + l.Type)
		}
		out = append(out, Rlimit{Resource: n, Cur: l.Soft, Max: l.Hard})
	}
	return out, nil
}

func capabilities(m *ExecImage, c *specs.LinuxCapabilities, number func(string) (int, bool)) error {
	for _, set := range []struct {
		names []string
		bits  *uint64
	}{
		{c.Bounding, &m.Bounding}, {c.Effective, &m.Effective}, {c.Permitted, &m.Permitted},
		{c.Inheritable, &m.Inheritable}, {c.Ambient, &m.Ambient},
	} {
		for _, name := range set.names {
			n, ok := number(name)
			if !ok || n < 0 || n > 63 {
				return unsupported("capability " + name)
			}
			*set.bits |= 1 << n
		}
	}
	// Where one is not allowed by the others the runtime goes on without it.
	m.Ambient &= m.Permitted & m.Inheritable
	return nil
}

func seccomp(m *ExecImage, s *specs.LinuxSeccomp) error {
	if s == nil || s.DefaultAction == "" && len(s.Syscalls) == 0 {
		return nil
	}
	m.Seccomp = true
	if s.ListenerPath != "" || s.DefaultAction == specs.ActNotify {
		return unsupported("seccomp listener")
	}
	for _, c := range s.Syscalls {
		if c.Action == specs.ActNotify {
			return unsupported("seccomp listener")
		}
	}
	if s.Flags == nil {
		m.SeccompFlags = unix.SECCOMP_FILTER_FLAG_SPEC_ALLOW
	}
	for _, f := range s.Flags {
		switch f {
		case specs.LinuxSeccompFlagLog:
			m.SeccompFlags |= unix.SECCOMP_FILTER_FLAG_LOG
		case specs.LinuxSeccompFlagSpecAllow:
			m.SeccompFlags |= unix.SECCOMP_FILTER_FLAG_SPEC_ALLOW
		default:
			return unsupported("seccomp flag " + string(f))
		}
	}
	return nil
}
