package cgroup

import (
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
