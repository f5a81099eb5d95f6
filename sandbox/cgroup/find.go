package cgroup

import (
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
)

// NamedID returns the container ID that the directory of a group is named by, as
// OCIPath has it for either driver, or "" if it is another name.
func NamedID(base string, isID func(string) bool) string {
	if scope, ok := strings.CutSuffix(base, ".scope"); ok {
		base, ok = strings.CutPrefix(scope, scopePrefix+"-")
		if !ok {
			return ""
		}
	}
	if !isID(base) {
		return ""
	}
	return base
}

// Find returns the groups anywhere that are named by IDs, with the IDs, sorted by
// path. What is below one of them belongs to it, and is not looked at.
func (h Hierarchy) Find(isID func(string) bool) (groups []Group, ids []string) {
	found := map[string]string{}
	var look func(mount, rel string)
	look = func(mount, rel string) {
		entries, err := os.ReadDir(filepath.Join(mount, rel))
		if err != nil {
			return // gone this moment
		}
		for _, e := range entries {
			if !e.IsDir() {
				continue
			}
			sub := path.Join(rel, e.Name())
			if id := NamedID(e.Name(), isID); id != "" {
				found[sub] = id
			} else {
				look(mount, sub)
			}
		}
	}
	for _, m := range h.at("/").mountPoints() {
		look(m, "/")
	}
	for p := range found {
		groups = append(groups, h.at(p))
	}
	slices.SortFunc(groups, func(a, b Group) int { return strings.Compare(a.path, b.path) })
	for _, g := range groups {
		ids = append(ids, found[g.path])
	}
	return groups, ids
}
