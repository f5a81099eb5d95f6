package sandbox

import (
	"errors"
	"os"
	"strings"
	"testing"
)

// The namespace is that of the container or nothing: a process that has its
// number by now is not taken for it.
func TestOpenTarget(t *testing.T) {
	own, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	// Something that stands in the test's own cgroup stands for the ID.
	id := strings.TrimSpace(strings.Split(string(own), "\n")[0])
	f, err := openTarget(&container{containerRow: containerRow{ID: id, Pid: os.Getpid()}}, "")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	got, err := os.Readlink(heldPath(f))
	if err != nil {
		t.Fatal(err)
	}
	if want, _ := os.Readlink("/proc/self/ns/pid"); got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	for name, c := range map[string]containerRow{
		"reused": {ID: newID(), Pid: os.Getpid()},
		"gone":   {ID: id, Pid: 1 << 30},
		"exited": {ID: id},
	} {
		if _, err := openTarget(&container{containerRow: c}, ""); !errors.Is(err, ErrState) || !strings.Contains(err.Error(), c.ID) {
			t.Errorf("%s: got %v, want ErrState with the ID", name, err)
		}
	}
}
