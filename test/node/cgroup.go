package node

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// cgroupRoot is where the hierarchies are mounted, by the convention that
// systemd set.
const cgroupRoot = "/sys/fs/cgroup"

// hierarchies returns the roots of the cgroup hierarchies: one for a unified
// host, one per controller set on a host with version 1.
func hierarchies() ([]string, error) {
	if Unified() {
		return []string{cgroupRoot}, nil
	}
	entries, err := os.ReadDir(cgroupRoot)
	if err != nil {
		return nil, fmt.Errorf("cgroup: %w", err)
	}
	var out []string
	for _, e := range entries {
		if e.IsDir() { // not the links of joined controllers such as cpu -> cpu,cpuacct
			out = append(out, filepath.Join(cgroupRoot, e.Name()))
		}
	}
	return out, nil
}

// Unified tells whether the host has cgroup version 2 only.
func Unified() bool {
	_, err := os.Stat(filepath.Join(cgroupRoot, "cgroup.controllers"))
	return err == nil
}

// Hierarchy returns the root of the hierarchy of a version 1 controller, or of the
// only one on a unified host.
func Hierarchy(controller string) string {
	if Unified() {
		return cgroupRoot
	}
	return filepath.Join(cgroupRoot, controller)
}

// FindCgroup returns the directory of the cgroup whose path ends in, or whose
// last name contains, id, in the hierarchy of a version 1 controller, which is
// ignored on a unified host.
func FindCgroup(controller, id string) (string, error) {
	root := Hierarchy(controller)
	found := ""
	err := walkCgroups(root, func(dir string) error {
		if strings.Contains(filepath.Base(dir), id) {
			found = dir
			return fs.SkipAll
		}
		return nil
	})
	if err != nil {
		return "", err
	}
	if found == "" {
		return "", fmt.Errorf("cgroup of %.12s below %s: %w", id, root, os.ErrNotExist)
	}
	return found, nil
}

// walkCgroups calls fn for every directory below root. Cgroups that vanish on
// the way are no error.
func walkCgroups(root string, fn func(dir string) error) error {
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, os.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		if !d.IsDir() {
			return nil
		}
		return fn(path)
	})
	if err != nil {
		return fmt.Errorf("cgroup: %w", err)
	}
	return nil
}

// KillParent kills every process below the node's top cgroup and removes the
// cgroups. It is the last resort of Close.
func (n *Node) killParent() error {
	roots, err := hierarchies()
	if err != nil {
		return err
	}
	var errs []error
	for _, root := range roots {
		var dirs []string
		top := filepath.Join(root, n.Parent)
		if _, err := os.Stat(top); err != nil {
			continue
		}
		errs = append(errs, walkCgroups(top, func(dir string) error {
			dirs = append(dirs, dir)
			return killIn(dir)
		}))
		for i := len(dirs) - 1; i >= 0; i-- {
			errs = append(errs, removeCgroup(dirs[i]))
		}
	}
	return errors.Join(errs...)
}
