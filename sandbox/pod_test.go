package sandbox

import (
	"slices"
	"testing"
)

// TestOwnCgroups: directories that were made for a pod whose removal is not
// complete go with the next pod in them.
func TestOwnCgroups(t *testing.T) {
	s := &Service{book: mustBook(t)}
	made := []string{"/none/kube", "/none/kube/pod1"}
	if _, err := s.book.insertPod(podRow{ID: newID(), State: StateCreating, Removing: true, Cgroups: append([]string{"/proc"}, made...)}); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name string
		dirs []string
		want []string
	}{
		{"the same pod again", []string{"/none/kube/pod1"}, made},
		{"another beside it", []string{"/none/kube/pod2"}, []string{"/none", "/none/kube", "/none/kube/pod2"}},
		{"there already", []string{"/sys"}, nil},
		{"there, and made for the other", []string{"/proc/self"}, []string{"/proc"}},
		{"a name that only begins alike", []string{"/procfs"}, []string{"/procfs"}},
	} {
		got := s.ownCgroups(tc.dirs)
		for _, w := range tc.want {
			if !slices.Contains(got, w) {
				t.Errorf("%s: %q, want %q in it", tc.name, got, w)
			}
		}
		if tc.want == nil && len(got) != 0 {
			t.Errorf("%s: %q, want none", tc.name, got)
		}
		if !slices.IsSortedFunc(got, func(a, b string) int { return len(a) - len(b) }) {
			t.Errorf("%s: %q: parents are to come first", tc.name, got)
		}
		if len(slices.Compact(slices.Clone(got))) != len(got) {
			t.Errorf("%s: %q: twice", tc.name, got)
		}
	}
}

// TestOnlyFor: a cgroup that several pods are in is left alone until the last one
// is to go.
func TestOnlyFor(t *testing.T) {
	a, b := "/none/a", "/none/a/b"
	v := &view{pods: map[string]*pod{}}
	for id, dirs := range map[string][]string{"first": {a, b}, "second": {a, b}, "outer": {a}, "foreign": nil} {
		v.pods[id] = &pod{podRow: podRow{ID: id, Cgroups: dirs}}
	}
	check := func(what string, got []string, want ...string) {
		t.Helper()
		if !slices.Equal(got, want) {
			t.Errorf("%s: got %v, want %v", what, got, want)
		}
	}
	check("the others have them", v.onlyFor(v.pods["first"]))
	delete(v.pods, "first")
	check("the outer one is in use", v.onlyFor(v.pods["second"]), b)
	v.pods["outer"].Removing = true
	check("nobody else is to stay", v.onlyFor(v.pods["second"]), a, b)
}
