package cgroup

import (
	"errors"
	"os"
	"slices"
	"strings"
	"testing"
)

const (
	mountsV1 = `31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:5 - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
36 31 0:35 / /sys/fs/cgroup/freezer rw,relatime - cgroup cgroup rw,freezer
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,xattr,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw,nsdelegate
55 23 0:32 / /other/memory rw,relatime - cgroup cgroup rw,memory
56 23 8:1 / /with\040space rw - ext4 /dev/sda1 rw
`
	selfV1 = "9:name=systemd:/\n6:freezer:/\n4:memory:/x\n2:cpu,cpuacct:/\n0::/\n"

	mountsV2 = `35 24 0:30 / /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot
36 24 0:31 / /sys/fs/pstore rw - pstore pstore rw
`
	selfV2 = "0::/system.slice/berthd.service\n"
)

func mustParse(t *testing.T, mounts, self string) Hierarchy {
	t.Helper()
	h, err := parse(strings.NewReader(mounts), strings.NewReader(self))
	if err != nil {
		t.Fatal(err)
	}
	return h
}

func TestParse(t *testing.T) {
	v1 := mustParse(t, mountsV1, selfV1)
	if v1.V2() {
		t.Error("hybrid is v1")
	}
	got := v1.Group(Cgroupfs, "/pods/p/c").Dirs()
	want := []string{
		"/sys/fs/cgroup/cpu,cpuacct/pods/p/c", "/sys/fs/cgroup/freezer/pods/p/c", "/sys/fs/cgroup/memory/pods/p/c",
		"/sys/fs/cgroup/systemd/pods/p/c", "/sys/fs/cgroup/unified/pods/p/c",
	}
	if !slices.Equal(got, want) {
		t.Errorf("v1: got %q, want %q", got, want)
	}
	v2 := mustParse(t, mountsV2, selfV2)
	if !v2.V2() || !slices.Equal(v2.Flags(), []string{"nsdelegate", "memory_recursiveprot"}) {
		t.Errorf("v2: %v, flags %q", v2.V2(), v2.Flags())
	}
	if got := v2.Group(Systemd, "a-b.slice:berth:c").Dirs(); !slices.Equal(got, []string{"/sys/fs/cgroup/a.slice/a-b.slice/berth-c.scope"}) {
		t.Errorf("v2: got %q", got)
	}
	if got := v2.Group(Systemd, "a.slice::c").Path(); got != "/a.slice/c.scope" {
		t.Errorf("without prefix: %q", got)
	}
	for _, in := range []string{"", "a.slice", "a.slice:b", "a:b:c", "a.slice:b:"} {
		if g := v2.Group(Systemd, in); !g.IsZero() || g.Exists() || g.Dirs() != nil || g.OOMFile() != "" {
			t.Errorf("Group(%q) = %q", in, g.Path())
		}
	}
	if got := v1.Group(Cgroupfs, "/c").OOMFile(); got != "/sys/fs/cgroup/memory/c/memory.oom_control" {
		t.Errorf("v1: OOM file %q", got)
	}
	if got := v2.Group(Cgroupfs, "/../c").OOMFile(); got != "/sys/fs/cgroup/c/memory.events" {
		t.Errorf("v2: OOM file %q", got)
	}
}

func TestParseErrors(t *testing.T) {
	for _, tt := range []struct{ mounts, self string }{
		{mountsV2, "nonsense\n"},
		{"36 24 0:31 / /sys/fs/pstore rw - pstore pstore rw\n", selfV2},
		{"", ""},
	} {
		if h, err := parse(strings.NewReader(tt.mounts), strings.NewReader(tt.self)); err == nil {
			t.Errorf("%q: got %+v", tt, h)
		}
	}
}

func TestOCIPath(t *testing.T) {
	for _, tt := range []struct{ driver, parent, want, err string }{
		{Cgroupfs, "", "/berth/c1", ""},
		{Cgroupfs, "/kubepods/burstable/podx", "/kubepods/burstable/podx/c1", ""},
		{Cgroupfs, "kubepods//podx/", "/kubepods/podx/c1", ""},
		{Systemd, "", "berth.slice:berth:c1", ""},
		{Systemd, "kubepods.slice", "kubepods.slice:berth:c1", ""},
		{Systemd, "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podx_y.slice", "kubepods-burstable-podx_y.slice:berth:c1", ""},
		{Systemd, "/kubepods-burstable.slice", "kubepods-burstable.slice:berth:c1", ""},

		{Cgroupfs, "/kubepods.slice", "", `linux.cgroup_parent "/kubepods.slice": a systemd slice, want a plain path (cgroup driver cgroupfs)`},
		{Systemd, "/kubepods/podx", "", "want a systemd slice, as kubepods.slice (cgroup driver systemd)"},
		{Systemd, "/other.slice/kubepods-burstable.slice", "", "systemd has that slice at /kubepods.slice/kubepods-burstable.slice"},
		{Systemd, "a--b.slice", "", "not the name of a slice"},
		{Systemd, ".slice", "", "not the name of a slice"},
		{Systemd, "-.slice", "", "the root group"},
		{Cgroupfs, "/", "", "the root group"},
		{Cgroupfs, "/../x", "", `component ".."`},
		{Cgroupfs, "/a/./x", "", `component "."`},
		{Cgroupfs, "/a\nb", "", "component"},
		{Systemd, "a:b.slice", "", "component"},
		{Cgroupfs, "/" + strings.Repeat("a", 256), "", "component"},
		{Cgroupfs, strings.Repeat("/a", 600), "", "1200 bytes, the limit is 1024"},
		{"cgroup", "", "", `cgroup driver "cgroup"`},
	} {
		got, err := OCIPath(tt.driver, tt.parent, "c1")
		switch {
		case tt.err == "" && (err != nil || got != tt.want):
			t.Errorf("%s %q: got %q, %v, want %q", tt.driver, tt.parent, got, err, tt.want)
		case tt.err != "" && (!errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), tt.err)):
			t.Errorf("%s %q: got %q, %v, want %q", tt.driver, tt.parent, got, err, tt.err)
		}
	}
	for _, id := range []string{"", "../x", "a/b", "a:b", "a b", strings.Repeat("a", 256)} {
		if got, err := OCIPath(Cgroupfs, "", id); !errors.Is(err, ErrInvalid) {
			t.Errorf("ID %q: got %q, %v", id, got, err)
		}
	}
}

func TestParent(t *testing.T) {
	h := mustParse(t, mountsV2, selfV2)
	for _, tt := range []struct{ driver, parent, want string }{
		{Cgroupfs, "", "/berth"}, {Cgroupfs, "/a/b", "/a/b"}, {Systemd, "", "/berth.slice"}, {Systemd, "/a.slice/a-b.slice", "/a.slice/a-b.slice"},
		{Systemd, "a-b-c.slice", "/a.slice/a-b.slice/a-b-c.slice"}, {Systemd, "/a", ""}, {Cgroupfs, "/a.slice", ""},
	} {
		if got := h.Parent(tt.driver, tt.parent).Path(); got != tt.want {
			t.Errorf("%s %q: got %q, want %q", tt.driver, tt.parent, got, tt.want)
		}
	}
}

// FuzzOCIPath: a path that is given leads to a group below the root, with the ID
// in its name, and never up.
func FuzzOCIPath(f *testing.F) {
	for _, p := range []string{"", "/a/b", "a-b.slice", "/a.slice/a-b.slice", "/../a", "-.slice", "/.slice"} {
		f.Add(p, "c1", true)
		f.Add(p, "c1", false)
	}
	h, err := parse(strings.NewReader(mountsV2), strings.NewReader(selfV2))
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, parent, id string, systemd bool) {
		driver := Cgroupfs
		if systemd {
			driver = Systemd
		}
		p, err := OCIPath(driver, parent, id)
		if err != nil {
			if p != "" || !errors.Is(err, ErrInvalid) {
				t.Fatalf("%q beside %v", p, err)
			}
			return
		}
		g := h.Group(driver, p)
		above := h.Parent(driver, parent)
		if g.IsZero() || above.IsZero() || above.Path() == "/" || !strings.HasPrefix(g.Path(), above.Path()+"/") || !strings.Contains(g.Path(), id) {
			t.Fatalf("%q, %q: group %q below %q", parent, id, g.Path(), above.Path())
		}
	})
}

func TestDetect(t *testing.T) {
	h, err := Detect()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat("/sys/fs/cgroup/cgroup.controllers"); (err == nil) != h.V2() {
		t.Errorf("v2 is %v", h.V2())
	}
	if !h.Has("memory") || h.Has("no-such-controller") {
		t.Errorf("memory %v, no-such-controller %v", h.Has("memory"), h.Has("no-such-controller"))
	}
}
