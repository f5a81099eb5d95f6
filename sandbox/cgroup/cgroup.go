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
//     one for each mounted hierarchy on v1.
//
// # Caveats
//
// Limits are set by the OCI runtime, never here. A group that is gone is not an
// error when it is to be removed or killed, and is [ErrGone] when it is read.
// On v1 the directories of a group come and go one by one, so that it may exist
// in part.
package cgroup

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Drivers as the kubelet calls them.
const (
	Cgroupfs = "cgroupfs"
	Systemd  = "systemd"
)

var (
	// ErrGone says that the group does not exist, or not any more.
	ErrGone = errors.New("control group gone")
	// ErrInvalid says that a path does not name a group that may be used so.
	ErrInvalid = errors.New("invalid argument")
)

// unified is the key of the unified hierarchy's mount; v1 controllers have
// their names as keys, the named hierarchy has "name=systemd".
const unified = ""

// maxMountinfo bounds the size in bytes of the mount table that is read.
const maxMountinfo = 64 << 20

// Hierarchy is the control group set-up of a machine. Its zero value has no
// hierarchy, and all of its groups are empty.
type Hierarchy struct {
	v2     bool
	mounts map[string]string // mount point by controller, or by unified
	flags  []string
	self   map[string]string // this process's path by controller, or by unified
}

// Detect reads the set-up from the mount table and /proc/self/cgroup.
func Detect() (Hierarchy, error) {
	cg, err := os.Open("/proc/self/cgroup")
	if err != nil {
		return Hierarchy{}, fmt.Errorf("control groups: %w", err)
	}
	defer cg.Close()
	mi, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return Hierarchy{}, fmt.Errorf("control groups: %w", err)
	}
	defer mi.Close()
	return parse(io.LimitReader(mi, maxMountinfo), io.LimitReader(cg, 1<<20))
}

// parse puts the set-up together. The mode is v2 if the unified hierarchy is all
// there is, else v1.
func parse(mountinfo, selfCgroup io.Reader) (Hierarchy, error) {
	h := Hierarchy{mounts: map[string]string{}}
	var err error
	if h.self, err = parseSelf(selfCgroup); err != nil {
		return Hierarchy{}, err
	}
	s := bufio.NewScanner(mountinfo)
	s.Buffer(nil, 1<<20)
	for s.Scan() {
		h.addMount(s.Text())
	}
	if err := s.Err(); err != nil {
		return Hierarchy{}, fmt.Errorf("mount table: %w", err)
	}
	_, isUnified := h.mounts[unified]
	h.v2 = isUnified && len(h.mounts) == 1
	if len(h.mounts) == 0 {
		return Hierarchy{}, errors.New("control groups: none mounted")
	}
	return h, nil
}

// addMount takes in a line of proc_pid_mountinfo(5). Of several mounts of a
// hierarchy the first counts.
func (h *Hierarchy) addMount(line string) {
	before, after, ok := strings.Cut(line, " - ")
	f, tail := strings.Fields(before), strings.Fields(after)
	if !ok || len(f) < 6 || len(tail) < 3 {
		return
	}
	dir, options := unescape(f[4]), strings.Split(tail[2], ",")
	add := func(controller string) bool {
		if _, seen := h.mounts[controller]; seen {
			return false
		}
		h.mounts[controller] = dir
		return true
	}
	switch tail[0] {
	case "cgroup2":
		if add(unified) {
			h.flags = slices.DeleteFunc(options, func(o string) bool { return o == "rw" || o == "ro" })
		}
	case "cgroup":
		for _, o := range options {
			if _, known := h.self[o]; known && o != unified {
				add(o)
			}
		}
	}
}

// unescape undoes the octal escapes of mount tables.
func unescape(s string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(s)
}

// parseSelf reads lines of id:controller[,controller…]:path as cgroups(7) has
// them; v2's is 0::path.
func parseSelf(r io.Reader) (map[string]string, error) {
	self := map[string]string{}
	s := bufio.NewScanner(r)
	s.Buffer(nil, 1<<20)
	for s.Scan() {
		_, rest, ok := strings.Cut(s.Text(), ":")
		controllers, dir, ok2 := strings.Cut(rest, ":")
		if !ok || !ok2 {
			return nil, fmt.Errorf("/proc/self/cgroup: line %q", s.Text())
		}
		for c := range strings.SplitSeq(controllers, ",") {
			self[c] = dir
		}
	}
	if err := s.Err(); err != nil {
		return nil, fmt.Errorf("/proc/self/cgroup: %w", err)
	}
	return self, nil
}

// V2 tells whether the controllers are on the unified hierarchy.
func (h Hierarchy) V2() bool { return h.v2 }

// Flags are the options of the unified hierarchy's super block, such as
// "nsdelegate"; nil if it is not mounted.
func (h Hierarchy) Flags() []string { return slices.Clone(h.flags) }

// Has tells whether a controller ("memory", "hugetlb") can be used.
func (h Hierarchy) Has(controller string) bool {
	if !h.v2 {
		return h.mounts[controller] != ""
	}
	b, err := os.ReadFile(filepath.Join(h.mounts[unified], "cgroup.controllers"))
	return err == nil && slices.Contains(strings.Fields(string(b)), controller)
}

// SwapAccounted tells whether swap is limited and counted by group. On v2 the root
// group has no such file, so that some other group has to be asked.
func (h Hierarchy) SwapAccounted() bool {
	if !h.v2 {
		dir := h.mounts["memory"]
		return dir != "" && exists(filepath.Join(dir, "memory.memsw.limit_in_bytes"))
	}
	root := h.mounts[unified]
	if exists(filepath.Join(root, path.Clean("/"+h.self[unified]), "memory.swap.max")) {
		return true
	}
	found, _ := filepath.Glob(filepath.Join(root, "*", "memory.swap.max"))
	return len(found) > 0
}

func exists(name string) bool {
	return unix.Access(name, unix.F_OK) == nil
}

// Group is one control group: a value that names directories and holds nothing
// open. Its zero value has none and does nothing.
type Group struct {
	h    Hierarchy
	path string // clean, absolute, "" for the zero value
}

// Group returns the group that the runtime makes of an OCI path. A path that the
// driver does not understand gives the zero group.
func (h Hierarchy) Group(driver, ociPath string) Group {
	p := ociPath
	if driver == Systemd {
		parts := strings.Split(ociPath, ":")
		if len(parts) != 3 || parts[2] == "" {
			return Group{}
		}
		slice, err := expandSlice(parts[0])
		if err != nil {
			return Group{}
		}
		unit := parts[2] + ".scope"
		if parts[1] != "" {
			unit = parts[1] + "-" + unit
		}
		p = path.Join(slice, unit)
	}
	return h.at(p)
}

// Parent returns the group that a CRI cgroup_parent names, "" being the default.
// An invalid one gives the zero group; OCIPath says what is wrong with it.
func (h Hierarchy) Parent(driver, parent string) Group {
	parent, err := checkParent(driver, parent)
	if err != nil {
		return Group{}
	}
	if driver == Systemd {
		if parent, err = expandSlice(parent); err != nil {
			return Group{}
		}
	}
	return h.at(parent)
}

func (h Hierarchy) at(p string) Group {
	if p == "" || len(h.mounts) == 0 {
		return Group{}
	}
	return Group{h: h, path: path.Clean("/" + p)}
}

// IsZero tells whether g names nothing.
func (g Group) IsZero() bool { return g.path == "" }

// Path is the path of the group below each mount point.
func (g Group) Path() string { return g.path }

// Dirs returns the directories, whether they exist or not, each once and in
// a fixed order.
func (g Group) Dirs() []string {
	if g.IsZero() {
		return nil
	}
	var dirs []string
	for _, m := range g.h.mounts {
		dirs = append(dirs, filepath.Join(m, g.path))
	}
	slices.Sort(dirs)
	return slices.Compact(dirs) // co-mounted controllers share one
}

// dir returns the directory with a controller's files, "" if there is none.
func (g Group) dir(controller string) string {
	if g.h.v2 {
		controller = unified
	}
	m := g.h.mounts[controller]
	if g.IsZero() || m == "" {
		return ""
	}
	return filepath.Join(m, g.path)
}

// unifiedDir returns the directory on the unified hierarchy, which there is in
// hybrid mode too, "" if there is none.
func (g Group) unifiedDir() string {
	m := g.h.mounts[unified]
	if g.IsZero() || m == "" {
		return ""
	}
	return filepath.Join(m, g.path)
}

// Exists tells whether any of the directories is there.
func (g Group) Exists() bool { return slices.ContainsFunc(g.Dirs(), exists) }

// OOMFile returns the file whose counter "oom_kill" tells of OOM kills:
// memory.events on v2, memory.oom_control on v1. "" if memory is not controlled.
func (g Group) OOMFile() string {
	dir := g.dir("memory")
	switch {
	case dir == "":
		return ""
	case g.h.v2:
		return filepath.Join(dir, "memory.events")
	}
	return filepath.Join(dir, "memory.oom_control")
}
