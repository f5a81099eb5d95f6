// Package cgroup finds, reads, empties and removes control groups, on the
// unified hierarchy (v2) and on per-controller hierarchies (v1, also with the
// unified one beside them, which is called hybrid).
//
// # Vocabulary
//
//   - A [Hierarchy] is what this machine has: the mode and the mount points.
//   - An OCI path is what the runtime specification has in linux.cgroupsPath:
//     a plain path for the cgroupfs driver, slice:prefix:name for systemd.
//   - A [Group] is one control group as the set of its directories: one on v2,
//     one for each controller on v1.
//
// # Caveats
//
// Limits are set by the OCI runtime, never here. A group that is gone is not an
// error when it is to be removed or killed, and is [ErrGone] when it is read.
package cgroup

import (
	"context"
	"errors"
	"time"
)

// Drivers as CRI and the kubelet call them.
const (
	Cgroupfs = "cgroupfs"
	Systemd  = "systemd"
)

var (
	// ErrGone says that the group does not exist (any more).
	ErrGone = errors.New("control group gone")
	// ErrInvalid says that a path does not name a group.
	ErrInvalid = errors.New("invalid argument")
)

// Hierarchy is the control group set-up of a machine.
type Hierarchy struct{ v2 bool }

// Group is one control group.
type Group struct{}

// Detect reads the set-up.
func Detect() (Hierarchy, error) { return Hierarchy{}, nil }

// V2 tells whether the controllers are on the unified hierarchy.
func (h Hierarchy) V2() bool { return h.v2 }

// OCIPath returns linux.cgroupsPath.
func OCIPath(driver, parent, id string) (string, error) { return "", nil }

// Group returns the group that the runtime makes of an OCI path.
func (h Hierarchy) Group(driver, ociPath string) Group { return Group{} }

// Parent returns the group that a CRI cgroup_parent names.
func (h Hierarchy) Parent(driver, parent string) Group { return Group{} }

// Dirs returns the directories.
func (g Group) Dirs() []string { return nil }

// Exists tells whether any of the directories is there.
func (g Group) Exists() bool { return false }

// Ensure makes the directories and returns those that were not there, parents first.
func (g Group) Ensure() (created []string, err error) { return nil, nil }

// Remove removes the group and the groups below it.
func (g Group) Remove() error { return nil }

// RemoveEmpty removes directories, last one first.
func RemoveEmpty(dirs ...string) error { return nil }

// Procs returns the processes.
func (g Group) Procs() ([]int, error) { return nil, nil }

// Kill kills every process.
func (g Group) Kill(ctx context.Context) error { return nil }

// OOMFile returns the file that tells of OOM kills.
func (g Group) OOMFile() string { return "" }

// Stats reads the usage.
func (g Group) Stats() (Stats, error) { return Stats{}, nil }

// NoLimit is the value of a limit that is not set.
const NoLimit = ^uint64(0)

// Stats is the usage of a group.
type Stats struct {
	At              time.Time
	CPUUsage        uint64 // nanoseconds since the group was made
	MemoryUsage     uint64 // bytes
	MemoryLimit     uint64 // bytes, NoLimit if there is none
	WorkingSet      uint64 // bytes
	RSS             uint64 // bytes
	PageFaults      uint64
	MajorFaults     uint64
	SwapUsage       uint64 // bytes
	SwapLimit       uint64 // bytes, NoLimit if there is none
	Pids            uint64
	CPU, Memory, IO *Pressure // nil where the kernel has none
}

// Pressure is pressure stall information.
type Pressure struct{ Some, Full PressureLine }

// PressureLine is one line of it.
type PressureLine struct {
	Avg10, Avg60, Avg300 float64 // percent
	Total                uint64  // nanoseconds
}
