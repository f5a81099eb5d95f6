package spec

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

const (
	// maxSyscallRules and maxSyscallNames bound what a profile makes of a few
	// bytes of JSON; Linux has about 450 calls.
	maxSyscallRules = 4096
	maxSyscallNames = 4096
	maxErrno        = 4095 // MAX_ERRNO of the kernel
	maxSyscallArg   = 5    // calls have six arguments
)

var (
	seccompActions = []specs.LinuxSeccompAction{
		specs.ActKill, specs.ActKillProcess, specs.ActKillThread, specs.ActTrap, specs.ActErrno, specs.ActTrace, specs.ActAllow, specs.ActLog,
	}
	seccompOperators = []specs.LinuxSeccompOperator{
		specs.OpNotEqual, specs.OpLessThan, specs.OpLessEqual, specs.OpEqualTo, specs.OpGreaterEqual, specs.OpGreaterThan, specs.OpMaskedEqual,
	}
	seccompFlags = []specs.LinuxSeccompFlag{
		specs.LinuxSeccompFlagLog, specs.LinuxSeccompFlagSpecAllow, specs.LinuxSeccompFlagWaitKillableRecv, "SECCOMP_FILTER_FLAG_TSYNC",
	}
	seccompABIs = []specs.Arch{
		specs.ArchX86, specs.ArchX86_64, specs.ArchX32, specs.ArchARM, specs.ArchAARCH64, specs.ArchMIPS, specs.ArchMIPS64,
		specs.ArchMIPS64N32, specs.ArchMIPSEL, specs.ArchMIPSEL64, specs.ArchMIPSEL64N32, specs.ArchPPC, specs.ArchPPC64,
		specs.ArchPPC64LE, specs.ArchS390, specs.ArchS390X, specs.ArchPARISC, specs.ArchPARISC64, specs.ArchRISCV64,
		specs.ArchLOONGARCH64, specs.ArchM68K, specs.ArchSH, specs.ArchSHEB,
	}
)

// profileFile is the JSON form of a profile: linux.seccomp of the OCI runtime
// specification, and comments, which people write into such files.
type profileFile struct {
	DefaultAction    specs.LinuxSeccompAction `json:"defaultAction"`
	DefaultErrnoRet  *uint                    `json:"defaultErrnoRet"`
	Architectures    []specs.Arch             `json:"architectures"`
	Flags            []specs.LinuxSeccompFlag `json:"flags"`
	ListenerPath     string                   `json:"listenerPath"`
	ListenerMetadata string                   `json:"listenerMetadata"`
	Syscalls         []profileRule            `json:"syscalls"`
	Comment          string                   `json:"comment"`
}

type profileRule struct {
	Names    []string                 `json:"names"`
	Action   specs.LinuxSeccompAction `json:"action"`
	ErrnoRet *uint                    `json:"errnoRet"`
	Args     []specs.LinuxSeccompArg  `json:"args"`
	Comment  string                   `json:"comment"`
}

// ParseSeccomp reads a localhost profile: JSON as linux.seccomp of the OCI runtime
// specification. It is strict, because what a profile does not mean to say opens
// it: a field that is not known, such as those with which Docker's form makes
// rules conditional (archMap, includes, excludes), is an error that names it.
// Actions that need a listener are refused. The caller bounds the size of data.
func ParseSeccomp(data []byte) (*specs.LinuxSeccomp, error) {
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	var f profileFile
	if err := d.Decode(&f); err != nil {
		return nil, fmt.Errorf("%w: seccomp profile at byte %d: %w", ErrInvalid, d.InputOffset(), err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("%w: seccomp profile at byte %d: more after its end", ErrInvalid, d.InputOffset())
	}
	if err := f.check(); err != nil {
		return nil, fmt.Errorf("%w: seccomp profile: %w", ErrInvalid, err)
	}
	p := &specs.LinuxSeccomp{
		DefaultAction: f.DefaultAction, DefaultErrnoRet: f.DefaultErrnoRet, Architectures: f.Architectures, Flags: f.Flags,
	}
	for _, r := range f.Syscalls {
		p.Syscalls = append(p.Syscalls, specs.LinuxSyscall{Names: r.Names, Action: r.Action, ErrnoRet: r.ErrnoRet, Args: r.Args})
	}
	return p, nil
}

func (f *profileFile) check() error {
	if !slices.Contains(seccompActions, f.DefaultAction) {
		return fmt.Errorf("defaultAction %q: want one of %q", clip(string(f.DefaultAction)), seccompActions)
	}
	if f.ListenerPath != "" || f.ListenerMetadata != "" {
		return fmt.Errorf("listenerPath %q: listeners are not supported", clip(f.ListenerPath))
	}
	if err := checkErrno("defaultErrnoRet", f.DefaultErrnoRet); err != nil {
		return err
	}
	for i, a := range f.Architectures {
		if !slices.Contains(seccompABIs, a) {
			return fmt.Errorf("architectures[%d] %q: unknown", i, clip(string(a)))
		}
	}
	for i, flag := range f.Flags {
		if !slices.Contains(seccompFlags, flag) {
			return fmt.Errorf("flags[%d] %q: want one of %q", i, clip(string(flag)), seccompFlags)
		}
	}
	if n := len(f.Syscalls); n > maxSyscallRules {
		return fmt.Errorf("syscalls: %d rules, the limit is %d", n, maxSyscallRules)
	}
	for i := range f.Syscalls {
		if err := f.Syscalls[i].check(); err != nil {
			return fmt.Errorf("syscalls[%d].%w", i, err)
		}
	}
	return nil
}

func (r *profileRule) check() error {
	if !slices.Contains(seccompActions, r.Action) {
		return fmt.Errorf("action %q: want one of %q", clip(string(r.Action)), seccompActions)
	}
	if n := len(r.Names); n < 1 || n > maxSyscallNames {
		return fmt.Errorf("names: %d, want 1 to %d", n, maxSyscallNames)
	}
	for i, name := range r.Names {
		if name == "" || len(name) > 64 {
			return fmt.Errorf("names[%d] %q: want 1 to 64 bytes", i, clip(name))
		}
	}
	for i, a := range r.Args {
		if a.Index > maxSyscallArg {
			return fmt.Errorf("args[%d].index %d: the limit is %d", i, a.Index, maxSyscallArg)
		}
		if !slices.Contains(seccompOperators, a.Op) {
			return fmt.Errorf("args[%d].op %q: want one of %q", i, clip(string(a.Op)), seccompOperators)
		}
	}
	return checkErrno("errnoRet", r.ErrnoRet)
}

func checkErrno(field string, v *uint) error {
	if v != nil && *v > maxErrno {
		return fmt.Errorf("%s %d: the limit is %d", field, *v, maxErrno)
	}
	return nil
}
