package cgroup

import (
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// A group whose last process has just died stays busy for a moment: the kernel
// lets go of it only when it has finished the exit.
const (
	busyPatience = 2 * time.Second
	busyStep     = time.Millisecond
	busyMost     = 50 * time.Millisecond
)

// Ensure makes the directories of the group and of those above it. It returns the
// ones that were not there, each before what is in it, which is what to give
// to [RemoveEmpty] when the group is done with; on an error, those made so far.
// Controllers are turned on by the OCI runtime, when it makes a group in there.
// It is for the cgroupfs driver only: below a slice, systemd makes the directories.
func (g Group) Ensure() (created []string, err error) {
	if g.IsZero() {
		return nil, fmt.Errorf("%w: control group without a path", ErrInvalid)
	}
	for _, m := range g.mountPoints() {
		dir := m
		for _, c := range strings.Split(strings.Trim(g.path, "/"), "/") {
			dir = filepath.Join(dir, c)
			switch err := unix.Mkdir(dir, 0o755); {
			case err == nil:
				created = append(created, dir)
			case !errors.Is(err, unix.EEXIST):
				return created, fmt.Errorf("control group %s: mkdir %s: %w", g.path, dir, err)
			}
		}
	}
	return created, nil
}

func (g Group) mountPoints() []string {
	var points []string
	for _, m := range g.h.mounts {
		points = append(points, m)
	}
	slices.Sort(points)
	return slices.Compact(points)
}

// Remove removes the group and all groups below it. They must be without processes;
// a group that is still letting go of its last one is waited for shortly. What
// does not exist is no error.
func (g Group) Remove() error {
	if g.IsZero() {
		return nil
	}
	if g.path == "/" {
		return fmt.Errorf("%w: control group /: can not be removed", ErrInvalid)
	}
	var errs []error
	for _, dir := range g.Dirs() {
		errs = append(errs, RemoveEmpty(append([]string{dir}, subgroups(dir)...)...))
	}
	return errors.Join(errs...)
}

// RemoveEmpty removes directories of groups, the last one first, and nothing that
// is in them: rmdir(2), which for a control group succeeds when it has neither
// processes nor groups below it. One that does not exist is no error.
func RemoveEmpty(dirs ...string) error {
	deadline := time.Now().Add(busyPatience)
	var errs []error
	for _, dir := range slices.Backward(dirs) {
		if err := removeDir(dir, deadline); err != nil {
			errs = append(errs, fmt.Errorf("control group: rmdir %s: %w", dir, err))
		}
	}
	return errors.Join(errs...)
}

func removeDir(dir string, deadline time.Time) error {
	if !path.IsAbs(dir) {
		return fmt.Errorf("%w: not an absolute path", ErrInvalid)
	}
	for wait := busyStep; ; wait = min(wait*2, busyMost) {
		err := unix.Rmdir(dir)
		if err == nil || errors.Is(err, unix.ENOENT) {
			return nil
		}
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if !errors.Is(err, unix.EBUSY) || time.Now().After(deadline) {
			return err
		}
		time.Sleep(wait)
	}
}

// subgroups returns the directories below dir, each before what is in it. A
// group that vanishes meanwhile is left out.
func subgroups(dir string) []string {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil
	}
	var dirs []string
	for _, e := range entries {
		if e.IsDir() {
			sub := filepath.Join(dir, e.Name())
			dirs = append(dirs, sub)
			dirs = append(dirs, subgroups(sub)...)
		}
	}
	return dirs
}
