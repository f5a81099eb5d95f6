package cgroup

import (
	"fmt"
	"path"
	"strings"
)

const (
	// The parents of pods that name none.
	defaultParent = "/berth"
	defaultSlice  = "berth.slice"

	maxPath = 1024 // bytes of a cgroup_parent; the kubelet's are below 200
	maxName = 255  // bytes of a component, NAME_MAX

	scopePrefix = "berth" // of a systemd scope's name
)

// OCIPath returns linux.cgroupsPath for a container: parent/id for the cgroupfs
// driver, slice:berth:id for systemd, which makes it berth-id.scope below that
// slice. parent is CRI's cgroup_parent; "" is "/berth" or "berth.slice".
//
// The kubelet writes slices as a path too, /a.slice/a-b.slice; the last component says
// it all, and the rest must agree. A parent in the form of the other driver is an
// error: runtime and kubelet then differ about the driver, and pods would
// escape their limits.
func OCIPath(driver, parent, id string) (string, error) {
	parent, err := checkParent(driver, parent)
	if err != nil {
		return "", err
	}
	if id == "" || len(id) > maxName-len(scopePrefix+"-.scope") || strings.ContainsFunc(id, notInID) {
		return "", fmt.Errorf("%w: container ID %q: not the name of a control group", ErrInvalid, clip(id))
	}
	if driver == Systemd {
		return parent + ":" + scopePrefix + ":" + id, nil
	}
	return path.Join(parent, id), nil
}

func notInID(r rune) bool {
	return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && r != '-' && r != '_'
}

// checkParent validates a parent and returns it in the form of the driver: a
// clean absolute path, or the name of a slice.
func checkParent(driver, parent string) (string, error) {
	bad := func(why string) (string, error) {
		return "", fmt.Errorf("%w: linux.cgroup_parent %q: %s (cgroup driver %s)", ErrInvalid, clip(parent), why, driver)
	}
	if driver != Cgroupfs && driver != Systemd {
		return "", fmt.Errorf("%w: cgroup driver %q: want %s or %s", ErrInvalid, clip(driver), Cgroupfs, Systemd)
	}
	if parent == "" {
		return map[string]string{Cgroupfs: defaultParent, Systemd: defaultSlice}[driver], nil
	}
	if len(parent) > maxPath {
		return bad(fmt.Sprintf("%d bytes, the limit is %d", len(parent), maxPath))
	}
	for c := range strings.SplitSeq(parent, "/") {
		if c == ".." || c == "." || len(c) > maxName || strings.ContainsFunc(c, func(r rune) bool { return r <= ' ' || r == 0x7f || r == ':' }) {
			return bad(fmt.Sprintf("component %q", clip(c)))
		}
	}
	if driver == Cgroupfs {
		if IsSlice(parent) {
			return bad("a systemd slice, want a plain path")
		}
		if clean := path.Clean("/" + parent); clean != "/" {
			return clean, nil
		}
		return bad("the root group")
	}
	if !IsSlice(parent) {
		return bad("want a systemd slice, as kubepods.slice")
	}
	return checkSlice(parent, bad)
}

// IsSlice tells whether a parent is in the form of the systemd driver.
func IsSlice(parent string) bool { return strings.HasSuffix(path.Clean(parent), ".slice") }

// checkSlice returns the last component of a path of slices.
func checkSlice(parent string, bad func(string) (string, error)) (string, error) {
	name := path.Base(parent)
	full, err := expandSlice(name)
	if err != nil {
		return bad("not the name of a slice")
	}
	if full == "/" {
		return bad("the root group")
	}
	if clean := path.Clean("/" + parent); clean != "/"+name && clean != full {
		return bad("systemd has that slice at " + full)
	}
	return name, nil
}

// expandSlice returns the path of a slice, as systemd.slice(5) has it:
// "a-b.slice" is /a.slice/a-b.slice, "-.slice" is /.
func expandSlice(name string) (string, error) {
	stem, ok := strings.CutSuffix(name, ".slice")
	if !ok || stem == "" || strings.Contains(name, "/") {
		return "", fmt.Errorf("%w: slice %q", ErrInvalid, clip(name))
	}
	if stem == "-" {
		return "/", nil
	}
	full, prefix := "", ""
	for part := range strings.SplitSeq(stem, "-") {
		if part == "" {
			return "", fmt.Errorf("%w: slice %q: empty part between dashes", ErrInvalid, clip(name))
		}
		prefix += part
		full += "/" + prefix + ".slice"
		prefix += "-"
	}
	return full, nil
}

// clip bounds what an error repeats of its input.
func clip(s string) string {
	const most = 128
	if len(s) > most {
		return s[:most] + "…"
	}
	return s
}
