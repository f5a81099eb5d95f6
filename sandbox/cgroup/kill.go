package cgroup

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Between looks at a dying group.
const (
	killStep = time.Millisecond
	killMost = 50 * time.Millisecond
)

// Procs returns the IDs of the processes in the group and in the groups below
// it, sorted, none twice. A group that does not exist has none. Zombies do not
// count. Processes that this PID namespace can not see are left out.
func (g Group) Procs() ([]int, error) {
	var pids []int
	for _, top := range g.Dirs() {
		for _, dir := range append([]string{top}, subgroups(top)...) {
			p, err := readProcs(dir)
			if err != nil {
				return nil, fmt.Errorf("control group %s: %w", g.path, err)
			}
			pids = append(pids, p...)
		}
	}
	slices.Sort(pids)
	return slices.Compact(pids), nil
}

// Foreign tells whether processes that this PID namespace can not see are in the group or
// below it, as far as the kernel says so: it does on v2, by the number 0.
func (g Group) Foreign() bool {
	for _, top := range g.Dirs() {
		for _, dir := range append([]string{top}, subgroups(top)...) {
			b, _ := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
			if slices.Contains(strings.Split(string(b), "\n"), "0") {
				return true
			}
		}
	}
	return false
}

func readProcs(dir string) ([]int, error) {
	b, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENODEV):
		return nil, nil
	case errors.Is(err, unix.EOPNOTSUPP):
		return nil, nil // a threaded group: its processes are those of the domain above
	case err != nil:
		return nil, err
	}
	var pids []int
	for line := range bytes.Lines(b) {
		pid, err := strconv.Atoi(string(bytes.TrimSpace(line)))
		if err != nil {
			return nil, fmt.Errorf("%s: line %q", dir, clip(string(line)))
		}
		if pid != 0 { // of another PID namespace
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// Kill kills every process in the group and below it and returns when none is
// left: at once by cgroup.kill where the kernel has it (v2, 5.14), else by SIGKILL
// to each while the group is frozen, so that none can fork away, again and again.
// When ctx ends first, the error says how many are left; those sleep in the
// kernel. The root group and a group with this process in it are refused.
func (g Group) Kill(ctx context.Context) error {
	if g.path == "/" {
		return fmt.Errorf("%w: control group /: must not be killed", ErrInvalid)
	}
	for wait := killStep; ; wait = min(wait*2, killMost) {
		pids, err := g.Procs()
		if err != nil || len(pids) == 0 {
			return err
		}
		if slices.Contains(pids, os.Getpid()) {
			return fmt.Errorf("%w: control group %s: has this process in it", ErrInvalid, g.path)
		}
		if err := g.killOnce(); err != nil {
			return fmt.Errorf("control group %s: kill: %w", g.path, err)
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return fmt.Errorf("control group %s: kill: %d processes left: %w", g.path, len(pids), ctx.Err())
		}
	}
}

func (g Group) killOnce() error {
	if g.h.v2 {
		// Without the file the kernel is older; without the group there is
		// nothing to kill below either.
		if write(g.dir(unified), "cgroup.kill", "1") == nil {
			return nil
		}
	}
	thaw := g.freeze()
	defer thaw() // a frozen process dies only when it runs again
	return g.signalAll()
}

// freeze stops the group as far as that works, it only narrows a race, and returns
// what undoes it. Freezing takes effect later; a process that forks until then is
// found by the next look.
func (g Group) freeze() (thaw func()) {
	dir, file := g.freezer()
	if dir == "" || write(dir, file, map[bool]string{false: "FROZEN", true: "1"}[g.h.v2]) != nil {
		return func() {}
	}
	return g.Thaw
}

// Thaw lets the processes of the group and of those below it run again, if
// somebody has frozen them: on v1 not even SIGKILL reaches a frozen one.
func (g Group) Thaw() {
	dir, file := g.freezer()
	if dir == "" {
		return
	}
	for _, d := range append([]string{dir}, subgroups(dir)...) {
		_ = write(d, file, map[bool]string{false: "THAWED", true: "0"}[g.h.v2])
	}
}

// Frozen tells whether the group is frozen, by itself or by one above it.
func (g Group) Frozen() bool {
	dir, _ := g.freezer()
	if g.h.v2 {
		b, err := os.ReadFile(filepath.Join(dir, "cgroup.events"))
		return err == nil && keys(b, "frozen")[0] == 1
	}
	b, err := os.ReadFile(filepath.Join(dir, "freezer.state"))
	return err == nil && string(bytes.TrimSpace(b)) != "THAWED"
}

// freezer returns the directory and the name of the file that freezes.
func (g Group) freezer() (dir, file string) {
	if g.h.v2 {
		return g.dir(unified), "cgroup.freeze"
	}
	return g.dir("freezer"), "freezer.state"
}

// signalAll sends SIGKILL to all processes by pidfd. A process is looked up in the
// group again after its pidfd is open: then the number can not have passed to a
// process outside of it in between.
func (g Group) signalAll() error {
	pids, err := g.Procs()
	if err != nil {
		return err
	}
	fds := make(map[int]int, len(pids))
	defer func() {
		for _, fd := range fds {
			unix.Close(fd)
		}
	}()
	for _, pid := range pids {
		fd, err := unix.PidfdOpen(pid, 0)
		if errors.Is(err, unix.ESRCH) {
			continue
		}
		if err != nil {
			break // out of descriptors: the next round has the rest
		}
		fds[pid] = fd
	}
	if pids, err = g.Procs(); err != nil {
		return err
	}
	for _, pid := range pids {
		fd, ok := fds[pid]
		if !ok || pid == os.Getpid() {
			continue
		}
		if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("pid %d: %w", pid, err)
		}
	}
	return nil
}

func write(dir, file, value string) error {
	f, err := os.OpenFile(filepath.Join(dir, file), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = f.WriteString(value)
	return err
}
