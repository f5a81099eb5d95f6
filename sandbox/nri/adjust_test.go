package nri

import (
	"encoding/json"
	"errors"
	"os"
	"reflect"
	"strings"
	"testing"

	"github.com/containerd/nri/pkg/api"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
)

// full is a specification with something of everything.
func full() *specs.Spec {
	one := int64(1)
	return &specs.Spec{
		Process: &specs.Process{Env: []string{"A=1", "B=2"}, Args: []string{"sh"},
			Rlimits: []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Hard: 10, Soft: 10}, {Type: "RLIMIT_CORE"}}},
		Annotations: map[string]string{"keep": "1", "drop": "1"},
		Mounts:      []specs.Mount{{Destination: "/proc", Type: "proc"}, {Destination: "/old", Type: "tmpfs"}},
		Linux: &specs.Linux{
			Devices:    []specs.LinuxDevice{{Path: "/dev/old", Type: "c", Major: 1, Minor: 1}},
			Namespaces: []specs.LinuxNamespace{{Type: specs.NetworkNamespace, Path: "/net"}, {Type: specs.MountNamespace}},
			Sysctl:     map[string]string{"net.a": "1"},
			Resources: &specs.LinuxResources{Devices: []specs.LinuxDeviceCgroup{{Type: "c", Major: &one, Minor: &one, Access: "r"}},
				HugepageLimits: []specs.LinuxHugepageLimit{{Pagesize: "2MB", Limit: 1}}},
		},
	}
}

func TestAdjust(t *testing.T) {
	dir := t.TempDir()
	a := &api.ContainerAdjustment{}
	a.AddEnv("B", "3")
	a.AddEnv("C", "4")
	a.RemoveEnv("A")
	a.SetArgs([]string{"sleep", "1"})
	a.AddAnnotation("new", "2")
	a.RemoveAnnotation("drop")
	a.AddMount(&api.Mount{Destination: "/deep/down", Source: dir, Type: "bind", Options: []string{"rbind", "ro"}})
	a.AddMount(&api.Mount{Destination: "/data", Source: dir, Type: "bind", Options: []string{"rbind"}})
	a.RemoveMount("/old")
	a.AddDevice(&api.LinuxDevice{Path: "/dev/new", Type: "c", Major: 1, Minor: 3})
	a.RemoveDevice("/dev/old")
	a.AddRlimit("RLIMIT_NOFILE", 100, 50)
	a.AddHooks(&api.Hooks{CreateRuntime: []*api.Hook{{Path: "/bin/true", Args: []string{"true"}}}, Poststop: []*api.Hook{{Path: "/bin/false"}}})
	a.SetLinuxMemoryLimit(4096)
	a.SetLinuxCPUShares(7)
	a.SetLinuxCPUSetCPUs("0-1")
	a.SetLinuxPidLimits(42)
	a.AddLinuxHugepageLimit("2MB", 9)
	a.AddLinuxUnified("memory.high", "5")
	score := 300
	a.SetLinuxOomScoreAdj(&score)
	a.SetLinuxSysctl("net.b", "2")
	a.Linux.Namespaces = []*api.LinuxNamespace{{Type: "ipc", Path: "/ipc"}}
	a.SetLinuxRDTClass("gold")
	a.AddCDIDevice(&api.CDIDevice{Name: "vendor.example/class=x"})

	s := full()
	var injected []string
	err := adjust(s, a, func(_ *specs.Spec, names []string) error { injected = append(injected, names...); return nil })
	must(t, err)
	same := func(what string, got, want any) {
		t.Helper()
		if !reflect.DeepEqual(got, want) {
			t.Errorf("%s: %+v, want %+v", what, got, want)
		}
	}
	same("environment", s.Process.Env, []string{"B=3", "C=4"})
	same("arguments", s.Process.Args, []string{"sleep", "1"})
	same("annotations", s.Annotations, map[string]string{"keep": "1", "new": "2"})
	var mounts []string
	for _, m := range s.Mounts {
		mounts = append(mounts, m.Destination)
	}
	same("mounts", mounts, []string{"/data", "/proc", "/deep/down"})
	same("devices", []any{len(s.Linux.Devices), s.Linux.Devices[0].Path}, []any{1, "/dev/new"})
	rule := s.Linux.Resources.Devices[len(s.Linux.Resources.Devices)-1]
	same("device rule", []any{rule.Allow, rule.Type, *rule.Major, *rule.Minor, rule.Access}, []any{true, "c", int64(1), int64(3), "rw"})
	same("rlimits", s.Process.Rlimits, []specs.POSIXRlimit{{Type: "RLIMIT_CORE"}, {Type: "RLIMIT_NOFILE", Hard: 100, Soft: 50}})
	same("hooks", []string{s.Hooks.CreateRuntime[0].Path, s.Hooks.Poststop[0].Path}, []string{"/bin/true", "/bin/false"})
	r := s.Linux.Resources
	same("memory", *r.Memory.Limit, int64(4096))
	same("cpu", []any{*r.CPU.Shares, r.CPU.Cpus}, []any{uint64(7), "0-1"})
	same("pids", *r.Pids.Limit, int64(42))
	same("huge pages", r.HugepageLimits, []specs.LinuxHugepageLimit{{Pagesize: "2MB", Limit: 9}})
	same("unified", r.Unified, map[string]string{"memory.high": "5"})
	same("OOM score", *s.Process.OOMScoreAdj, 300)
	same("sysctl", s.Linux.Sysctl, map[string]string{"net.a": "1", "net.b": "2"})
	same("namespaces", s.Linux.Namespaces, []specs.LinuxNamespace{{Type: specs.NetworkNamespace, Path: "/net"}, {Type: specs.MountNamespace}, {Type: specs.IPCNamespace, Path: "/ipc"}})
	same("RDT", s.Linux.IntelRdt.ClosID, "gold")
	same("CDI", injected, []string{"vendor.example/class=x"})
}

func TestBadAdjustments(t *testing.T) {
	tests := []struct {
		name  string
		edit  func(*api.ContainerAdjustment)
		parts []string
	}{
		{"empty name in the environment", func(a *api.ContainerAdjustment) { a.AddEnv("", "x") }, []string{"env"}},
		{"'=' in a name", func(a *api.ContainerAdjustment) { a.AddEnv("A=B", "x") }, []string{"env", "A=B"}},
		{"NUL in a value", func(a *api.ContainerAdjustment) { a.AddEnv("A", "x\x00") }, []string{"env", "NUL"}},
		{"relative destination", func(a *api.ContainerAdjustment) { a.AddMount(&api.Mount{Destination: "data"}) }, []string{"mount", "data"}},
		{"relative source", func(a *api.ContainerAdjustment) { a.AddMount(&api.Mount{Destination: "/d", Source: "x", Type: "bind"}) }, []string{"mount", "/d", "source"}},
		{"missing source", func(a *api.ContainerAdjustment) {
			a.AddMount(&api.Mount{Destination: "/d", Source: "/no/such", Options: []string{"rbind"}})
		}, []string{"/d", "/no/such"}},
		{"relative device", func(a *api.ContainerAdjustment) { a.AddDevice(&api.LinuxDevice{Path: "x", Type: "c"}) }, []string{"device", "x"}},
		{"type of a device", func(a *api.ContainerAdjustment) { a.AddDevice(&api.LinuxDevice{Path: "/dev/x", Type: "q"}) }, []string{"/dev/x", "q"}},
		{"unknown limit", func(a *api.ContainerAdjustment) { a.AddRlimit("RLIMIT_MOON", 1, 1) }, []string{"RLIMIT_MOON"}},
		{"soft above hard", func(a *api.ContainerAdjustment) { a.AddRlimit("RLIMIT_CPU", 1, 2) }, []string{"RLIMIT_CPU", "soft 2"}},
		{"relative hook", func(a *api.ContainerAdjustment) { a.AddHooks(&api.Hooks{Prestart: []*api.Hook{{Path: "x"}}}) }, []string{"hook", "x"}},
		{"OOM score", func(a *api.ContainerAdjustment) { v := 1001; a.SetLinuxOomScoreAdj(&v) }, []string{"oom_score_adj", "1001"}},
		{"namespace", func(a *api.ContainerAdjustment) {
			a.Linux = &api.LinuxContainerAdjustment{Namespaces: []*api.LinuxNamespace{{Type: "moon"}}}
		}, []string{"namespace", "moon"}},
		{"class of block I/O", func(a *api.ContainerAdjustment) { a.SetLinuxBlockIOClass("fast") }, []string{"blockio_class", "fast"}},
		{"CDI device", func(a *api.ContainerAdjustment) { a.AddCDIDevice(&api.CDIDevice{Name: "none"}) }, []string{"no such device none"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			a := &api.ContainerAdjustment{}
			tt.edit(a)
			err := adjust(full(), a, func(_ *specs.Spec, names []string) error { return errors.New("no such device " + names[0]) })
			if !errors.Is(err, ErrAdjustment) {
				t.Fatalf("got %v, want ErrAdjustment", err)
			}
			for _, p := range tt.parts {
				if !strings.Contains(err.Error(), p) {
					t.Errorf("error does not name %q: %v", p, err)
				}
			}
		})
	}
}

func TestBadUpdates(t *testing.T) {
	for name, u := range map[string]*api.ContainerUpdate{
		"no ID": {},
		"class": {ContainerId: "x", Linux: &api.LinuxContainerUpdate{Resources: &api.LinuxResources{RdtClass: api.String("a")}}},
	} {
		if _, err := updatesOf([]*api.ContainerUpdate{u}); !errors.Is(err, ErrAdjustment) {
			t.Errorf("%s: %v, want ErrAdjustment", name, err)
		}
	}
	if got, err := updatesOf([]*api.ContainerUpdate{{ContainerId: "x"}}); err != nil || len(got) != 1 || got[0].Resources != nil {
		t.Errorf("empty update: %+v, %v", got, err)
	}
}

// FuzzAdjust: whatever a plugin says, a specification stays one, or there is an
// error that says it was the adjustment.
func FuzzAdjust(f *testing.F) {
	seed := &api.ContainerAdjustment{}
	seed.AddEnv("A", "1")
	seed.AddMount(&api.Mount{Destination: "/d", Type: "tmpfs"})
	seed.SetLinuxMemoryLimit(1)
	seed.AddHooks(&api.Hooks{Prestart: []*api.Hook{{Path: "/x"}}})
	raw, err := proto.Marshal(seed)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(raw)
	f.Fuzz(func(t *testing.T, raw []byte) {
		a := &api.ContainerAdjustment{}
		if proto.Unmarshal(raw, a) != nil {
			return
		}
		s := full()
		if err := adjust(s, a, func(*specs.Spec, []string) error { return nil }); err != nil {
			if !errors.Is(err, ErrAdjustment) {
				t.Fatalf("%v is no ErrAdjustment", err)
			}
			return
		}
		if _, err := json.Marshal(s); err != nil {
			t.Fatal(err)
		}
		kinds := map[string]bool{}
		for _, l := range s.Process.Rlimits {
			if kinds[l.Type] {
				t.Fatalf("two limits of %s", l.Type)
			}
			kinds[l.Type] = true
		}
	})
}

// TestMessage: what a plugin sees of a container is what its specification says.
func TestMessage(t *testing.T) {
	s := full()
	m := containerMessage(Container{ID: "c", PodID: "p", Name: "n", State: Running, SeccompKind: "Localhost", SeccompFile: "x.json", CDI: []string{"d"},
		Labels: map[string]string{"l": "1"}, Annotations: map[string]string{"a": "1"}, Spec: func() (*specs.Spec, error) { return s, nil }})
	if m.GetName() != "n" || m.GetState() != api.ContainerState_CONTAINER_RUNNING || m.GetEnv()[1] != "B=2" || m.GetMounts()[1].GetDestination() != "/old" ||
		m.GetAnnotations()["keep"] != "1" || m.GetAnnotations()["a"] != "1" || m.GetLinux().GetNamespaces()[0].GetPath() != "/net" ||
		m.GetLinux().GetSeccompProfile().GetLocalhostRef() != "x.json" || m.GetCDIDevices()[0].GetName() != "d" || len(m.GetRlimits()) != 2 {
		t.Errorf("message %v", m)
	}
	m = containerMessage(Container{ID: "c", Spec: func() (*specs.Spec, error) { return nil, os.ErrPermission }})
	if m.GetId() != "c" || m.GetLinux() == nil {
		t.Errorf("message without a specification: %v", m)
	}
}
