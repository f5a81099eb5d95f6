package sandbox

import (
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berthd/berth/sandbox/cgroup"
)

func TestAnnotations(t *testing.T) {
	s := &Service{cfg: Config{Runtimes: map[string]Runtime{
		"none": {},
		"some": {PodAnnotations: []string{"dev.gvisor.*", "exact"}, ContainerAnnotations: []string{"exact", "io.x/[ab]"}},
	}}}
	pod := &runtime.PodSandboxConfig{Annotations: map[string]string{"dev.gvisor.spec": "1", "dev.gvisor.a/b": "2",
		"dev.gvisors": "3", "exact": "pod", "io.x/a": "4", "org.systemd.property.Slice": "5"}}
	cfg := &runtime.ContainerConfig{Annotations: map[string]string{"exact": "container", "io.x/a": "6", "io.x/c": "7", "dev.gvisor.c": "8"}}
	for _, tc := range []struct {
		handler string
		cfg     *runtime.ContainerConfig
		want    map[string]string
	}{
		{"none", cfg, nil},
		{"gone", cfg, nil},
		{"some", nil, map[string]string{"dev.gvisor.spec": "1", "exact": "pod"}},
		{"some", cfg, map[string]string{"dev.gvisor.spec": "1", "exact": "container", "io.x/a": "6"}},
	} {
		if got := s.annotations(tc.handler, pod, tc.cfg); !maps.Equal(got, tc.want) || (got == nil) != (tc.want == nil) {
			t.Errorf("%s: got %v, want %v", tc.handler, got, tc.want)
		}
	}
}

// What an object was made with outlives a change of the configuration.
func TestRuntimeOf(t *testing.T) {
	s := &Service{ctx: t.Context(), cfg: Config{RunDir: "/r", DefaultRuntime: "b", CgroupDriver: cgroup.Systemd}}
	s.runtimes = map[string]ociRuntime{
		"a": {prober: newProber(s.ctx, "a", "/bin/a"), root: "/new/a", driver: cgroup.Systemd},
		"b": {prober: newProber(s.ctx, "b", "/bin/b"), root: "/r/oci/b", driver: cgroup.Systemd},
	}
	for _, tc := range []struct {
		name               string
		row                podRow
		path, root, driver string
	}{
		{"early row", podRow{Handler: "a"}, "/bin/a", "/new/a", cgroup.Systemd},
		{"early row, default", podRow{}, "/bin/b", "/r/oci/b", cgroup.Systemd},
		{"default changed", podRow{OCI: rowRuntime{"a", "/bin/a", "/new/a", cgroup.Systemd}}, "/bin/a", "/new/a", cgroup.Systemd},
		{"root and driver changed", podRow{Handler: "a", OCI: rowRuntime{"a", "/old/bin", "/old/a", cgroup.Cgroupfs}}, "/bin/a", "/old/a", cgroup.Cgroupfs},
		{"handler gone", podRow{Handler: "c", OCI: rowRuntime{"c", "/bin/c", "/old/c", cgroup.Cgroupfs}}, "/bin/c", "/old/c", cgroup.Cgroupfs},
		{"early row, handler gone", podRow{Handler: "c"}, "/nonexistent/c", "/r/oci/c", cgroup.Systemd},
	} {
		p := &pod{podRow: tc.row}
		if r := s.runtimeOfPod(p); r.path != tc.path || r.root != tc.root || r.driver != tc.driver {
			t.Errorf("%s: got %s, %s, %s; want %s, %s, %s", tc.name, r.path, r.root, r.driver, tc.path, tc.root, tc.driver)
		}
		c := &container{containerRow: containerRow{Handler: tc.row.Handler, OCI: tc.row.OCI, CgroupPath: "/x/y"}}
		if tc.driver == cgroup.Systemd {
			c.CgroupPath = "x.slice:berth:y"
		}
		if r := s.runtimeOfContainer(c); r.path != tc.path || r.root != tc.root || r.driver != tc.driver {
			t.Errorf("%s, container: got %s, %s, %s; want %s, %s, %s", tc.name, r.path, r.root, r.driver, tc.path, tc.root, tc.driver)
		}
	}
	for parent, want := range map[string]string{"": cgroup.Systemd, "/kubepods/pod1": cgroup.Cgroupfs, "a.slice/b": cgroup.Cgroupfs,
		"kubepods.slice": cgroup.Systemd, "/kubepods.slice/kubepods-pod1.slice/": cgroup.Systemd} {
		for node := range strings.SplitSeq("systemd,cgroupfs", ",") {
			s.cfg.CgroupDriver = node
			if parent == "" {
				want = node
			}
			p := &pod{podRow: podRow{Handler: "a"}, config: &runtime.PodSandboxConfig{Linux: &runtime.LinuxPodSandboxConfig{CgroupParent: parent}}}
			if got := s.driverOf(p); got != want {
				t.Errorf("early row of a pod in %q, driver %s now: got %s, want %s", parent, node, got, want)
			}
			p.OCI.Driver = cgroup.Cgroupfs
			if got := s.driverOf(p); got != cgroup.Cgroupfs {
				t.Errorf("pod in %q with a driver in its row: got %s", parent, got)
			}
		}
	}
	if _, err := s.handler(strings.Repeat("x", 1000)); err == nil || len(err.Error()) > 500 || !strings.Contains(err.Error(), "a, b") {
		t.Errorf("unknown handler: got %v, want the names that there are, in short", err)
	}
}

// State in a directory that others use too is told apart by the bundle.
func TestOwnState(t *testing.T) {
	s := &Service{cfg: Config{RunDir: "/run/berth"}}
	r := ociRuntime{root: t.TempDir()}
	mine, other, torn, flat := newID(), newID(), newID(), newID()
	for path, text := range map[string]string{
		mine + "/state.json":                 `{"bundle":"/run/berth/c/` + mine + `"}`,
		other + "/state.json":                `{"bundle":"/run/else/c/` + other + `"}`,
		torn + "/state.json":                 `{"bundle":"/run/berth/c`,
		flat + "_sandbox:" + flat + ".state": `{}`,
		"lock":                               "",
	} {
		path = filepath.Join(r.root, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	want := []string{mine, other, torn, flat}
	slices.Sort(want)
	if got := r.ids(); !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	if !r.has(flat) || !r.has(mine) || r.has(newID()) {
		t.Error("has: wrong about what is there")
	}
	for id, own := range map[string]bool{mine: true, other: false, torn: false, flat: false} {
		if got := s.ownState(r, id); got != own {
			t.Errorf("%s: got own %v, want %v", id, got, own)
		}
	}
	r.root = "/run/berth/oci/runc"
	if !s.ownState(r, torn) {
		t.Error("what is in the run directory is not berth's own")
	}
}
