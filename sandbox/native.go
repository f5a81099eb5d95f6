package sandbox

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/berthd/berth/sandbox/spec"
	"github.com/berthd/berth/shim"
)

// A command is what a shim is told of a process to run: the OCI description for
// the runtime and, where it is the same to all effect, what starts the process
// without the runtime.
type command struct {
	process []byte
	image   *shim.ExecImage // nil: only the runtime can
}

// command is the container's own process with another command line and, if tty
// is not nil, with a terminal of that size, which may be unknown. User, groups,
// capabilities and limits stay.
func (s *Service) command(c *container, line []string, tty *TermSize) (command, error) {
	sp, err := s.execSpec(c.ID)
	if err != nil {
		return command{}, err
	}
	p := spec.Process(sp.Process, line, tty != nil)
	if tty != nil && tty.Width > 0 && tty.Height > 0 {
		p.ConsoleSize = &specs.Box{Width: uint(tty.Width), Height: uint(tty.Height)}
	}
	text, err := json.Marshal(p)
	if err != nil {
		return command{}, fmt.Errorf("container %s: exec: %w", c.ID, err)
	}
	return command{text, s.image(c, sp, p)}, nil
}

// image returns how the shim may start p by itself, nil if it may not.
func (s *Service) image(c *container, sp *specs.Spec, p *specs.Process) *shim.ExecImage {
	if !s.cfg.NativeExec || p.Terminal || !s.runtimeOfContainer(c).nativeExec() {
		return nil
	}
	group := s.groupOf(c)
	if group.Frozen() {
		return nil // who joins it stands still; the runtime refuses
	}
	at := shim.Surroundings{ID: c.ID, Cgroups: group.Dirs(), Capability: spec.CapabilityNumber}
	if !sameNamespace(c.Pid, "user") || !sameNamespace(c.Pid, "time") {
		return nil // the init has made itself one that it was not given
	}
	if home := lastOf(p.Env, "HOME="); home == "" {
		var err error
		if at.Home, err = homeOf(c.Pid, p.User.UID); err != nil {
			return nil
		}
	}
	m, err := shim.ImageOf(sp, p, at)
	if err != nil {
		return nil // what it cannot do is for the runtime
	}
	return m
}

// keepsFilter tells whether the shim is to keep the seccomp filter of a container
// that is made.
func (s *Service) keepsFilter(rt ociRuntime, sp *specs.Spec) bool {
	if !s.cfg.NativeExec || !rt.nativeExec() || sp.Process == nil || sp.Process.Capabilities == nil {
		return false
	}
	p := *sp.Process
	p.Terminal = false // execs may have none
	m, err := shim.ImageOf(sp, &p, shim.Surroundings{Capability: spec.CapabilityNumber})
	return err == nil && m.Seccomp
}

// nativeExec tells whether execs of this runtime are the ones that those of the
// shim are like.
func (r ociRuntime) nativeExec() bool {
	f, err := r.known()
	return err == nil && f.runc(1, 2)
}

// execSpec is what execs need of the specification that a container was made
// with. It does not change, and is kept as long as the connection to the shim.
func (s *Service) execSpec(id string) (*specs.Spec, error) {
	h := s.live.get(id)
	if h != nil {
		if sp := h.spec.Load(); sp != nil {
			return sp, nil
		}
	}
	full, err := s.readSpec(id)
	if err != nil {
		return nil, err
	}
	sp := &specs.Spec{Process: full.Process}
	if l := full.Linux; l != nil {
		sp.Linux = &specs.Linux{Namespaces: l.Namespaces, Seccomp: withoutCalls(l.Seccomp), Personality: l.Personality,
			MemoryPolicy: l.MemoryPolicy, IntelRdt: l.IntelRdt}
	}
	if h != nil {
		h.spec.Store(sp)
	}
	return sp, nil
}

// withoutCalls drops what is long in a profile, if no exec asks for it.
func withoutCalls(p *specs.LinuxSeccomp) *specs.LinuxSeccomp {
	if p == nil || p.DefaultAction == "" || slices.ContainsFunc(p.Syscalls, func(c specs.LinuxSyscall) bool { return c.Action == specs.ActNotify }) {
		return p
	}
	short := *p
	short.Syscalls = nil
	return &short
}

// homeOf looks a user's home directory up where an OCI runtime does, in the
// container's present files, "/" without one.
func homeOf(pid int, uid uint32) (string, error) {
	root, err := os.OpenFile(filepath.Join("/proc", strconv.Itoa(pid), "root"), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", err
	}
	defer root.Close()
	// Not on a volume, which may hang: nothing here has a deadline.
	fd, err := openInRoot(root, "etc/passwd", unix.RESOLVE_NO_XDEV)
	if errors.Is(err, unix.ENOENT) {
		return "/", nil
	}
	if err != nil {
		return "", err
	}
	passwd, err := readRegular(fd, "etc/passwd", maxUserDB)
	if err != nil {
		return "", err
	}
	return spec.Home(passwd, uid), nil
}

// lastOf is the value of a variable, the last one counts; "" if it has none.
func lastOf(env []string, prefix string) (value string) {
	for _, kv := range env {
		if v, ok := strings.CutPrefix(kv, prefix); ok {
			value = v
		}
	}
	return value
}

// sameNamespace tells whether a process is in this daemon's namespace of a kind.
func sameNamespace(pid int, kind string) bool {
	theirs, err := os.Readlink(filepath.Join("/proc", strconv.Itoa(pid), "ns", kind))
	if err != nil {
		return errors.Is(err, os.ErrNotExist) && kind == "time" // a kernel without them
	}
	ours, err := os.Readlink("/proc/self/ns/" + kind)
	return err == nil && ours == theirs
}
