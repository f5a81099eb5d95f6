package cgroup

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

func TestFind(t *testing.T) {
	isID := func(s string) bool { return s == "id1" || s == "id2" || s == "id3" }
	for base, want := range map[string]string{"id1": "id1", "berth-id2.scope": "id2", "cri-id2.scope": "", "id2.scope": "", "id2.slice": "", "berth-x.scope": "", "": ""} {
		if got := NamedID(base, isID); got != want {
			t.Errorf("NamedID(%q) is %q, want %q", base, got, want)
		}
	}
	one, two := t.TempDir(), t.TempDir()
	for _, d := range []string{one + "/pods/id1/id2", one + "/other", two + "/pods/id1", two + "/a.slice/berth-id3.scope"} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(one, "id3"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	h := Hierarchy{mounts: map[string]string{"memory": one, "pids": two, "gone": one + "/none"}}
	groups, ids := h.Find(isID)
	var paths []string
	for _, g := range groups {
		paths = append(paths, g.Path())
	}
	// What is below a container's group is the container's.
	if want := []string{"/a.slice/berth-id3.scope", "/pods/id1"}; !slices.Equal(paths, want) || !slices.Equal(ids, []string{"id3", "id1"}) {
		t.Errorf("found %q of %q, want %q", paths, ids, want)
	}
	if groups, _ := (Hierarchy{}).Find(isID); len(groups) != 0 {
		t.Errorf("without hierarchies: %v", groups)
	}
}

func TestForeign(t *testing.T) {
	for procs, want := range map[string]bool{"": false, "1\n20\n": false, "10\n0\n": true, "0\n": true} {
		if got := fakeGroup(t, true, map[string]string{"cgroup.procs": procs}).Foreign(); got != want {
			t.Errorf("cgroup.procs %q: %v, want %v", procs, got, want)
		}
	}
	g := fakeGroup(t, true, map[string]string{"cgroup.procs": ""})
	below := filepath.Join(g.Dirs()[0], "below")
	if err := errors.Join(os.Mkdir(below, 0o755), os.WriteFile(filepath.Join(below, "cgroup.procs"), []byte("0\n"), 0o644)); err != nil {
		t.Fatal(err)
	}
	if !g.Foreign() {
		t.Error("a process in a group below it is not seen")
	}
	if (Group{}).Foreign() {
		t.Error("the zero group has processes")
	}
}
