package spec

import (
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

var update = flag.Bool("update", false, "write the golden files anew")

// golden compares v as JSON with a file in testdata.
func golden(t *testing.T, name string, v any) {
	t.Helper()
	got, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	got = append(got, '\n')
	file := filepath.Join("testdata", name+".json")
	if *update {
		if err := os.WriteFile(file, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if string(got) != string(want) {
		t.Errorf("%s differs; run with -update and read the difference:\n%s", file, got)
	}
}

var v1Host = Host{Seccomp: true, Swap: true, Capabilities: knownCapabilities}

var v2Host = Host{
	CgroupV2: true, CgroupFlags: []string{"nsdelegate"}, Seccomp: true, RRO: true, Swap: true,
	HugePages: []string{"2MB"}, Capabilities: knownCapabilities,
}

// plain is a container such as the kubelet asks for.
func plain() Container {
	return Container{
		ID: "c1", PodID: "p1", Host: v1Host, User: User{UID: 1000, GID: 1000, AdditionalGIDs: []uint32{1000}},
		Config: &runtime.ContainerConfig{
			Metadata: &runtime.ContainerMetadata{Name: "main"},
			Labels:   map[string]string{"label": "stays"}, Annotations: map[string]string{"annotation": "stays"},
			Linux: &runtime.LinuxContainerConfig{SecurityContext: &runtime.LinuxContainerSecurityContext{
				MaskedPaths: []string{"/proc/kcore"}, ReadonlyPaths: []string{"/proc/sys"},
			}},
		},
		Image:   Image{Env: []string{"PATH=/bin", "A=image", "nonsense"}, Entrypoint: []string{"/app"}, Cmd: []string{"serve"}, WorkingDir: "/srv"},
		Network: Namespace{Path: "/run/berth/ns/p1/net"}, IPC: Namespace{Path: "/run/berth/ns/p1/ipc"}, UTS: Namespace{Path: "/run/berth/ns/p1/uts"},
		CgroupsPath: "/kubepods/p1/c1", Hostname: "pod-1",
		HostsFile: "/run/p1/hosts", HostnameFile: "/run/p1/hostname", ResolvConf: "/run/p1/resolv.conf", ShmDir: "/run/p1/shm",
	}
}

func TestBuildGolden(t *testing.T) {
	minor := uint32(0)
	mode := os.FileMode(0o660)
	tests := map[string]func(c *Container){
		"plain": func(*Container) {},
		"everything": func(c *Container) {
			c.Host = v2Host
			c.Config.Tty = true
			c.Config.Envs = []*runtime.KeyValue{{Key: "A", Value: []byte("config")}, {Key: "B", Value: []byte("with=sign")}}
			c.Config.Args = []string{"--now"}
			c.Config.WorkingDir = "/tmp/../data"
			c.Config.Linux.Resources = &runtime.LinuxContainerResources{
				CpuPeriod: 100000, CpuQuota: 50000, CpuShares: 512, MemoryLimitInBytes: 64 << 20, OomScoreAdj: -998, CpusetCpus: "0-1",
				HugepageLimits: []*runtime.HugepageLimit{{PageSize: "2MB", Limit: 4 << 20}, {PageSize: "1GB"}},
				Unified:        map[string]string{"memory.high": "60000000"},
			}
			sc := c.Config.Linux.SecurityContext
			sc.NoNewPrivs, sc.ReadonlyRootfs = true, true
			sc.Capabilities = &runtime.Capability{DropCapabilities: []string{"ALL"}, AddCapabilities: []string{"net_bind_service"}}
			c.ProcessLabel, c.MountLabel = "system_u:system_r:container_t:s0:c1,c2", "system_u:object_r:container_file_t:s0:c1,c2"
			c.OOMScoreMin = ptr(-500)
			c.Seccomp = &specs.LinuxSeccomp{DefaultAction: specs.ActAllow}
			c.AppArmor = "some-profile"
			c.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 1024, Hard: 4096}}
			c.Annotations = map[string]string{"run.oci.example": "1"}
			c.Mounts = []Mount{
				{Source: "/vol/deep", Destination: "/data/a/b/", Readonly: true, Propagation: "rslave", Options: []string{"noexec"}},
				{Source: "/vol/data", Destination: "/data", Propagation: "rprivate"},
				{Source: "/vol/hosts", Destination: "/etc/hosts"},
				{Source: "/vol/ro", Destination: "/ro", Readonly: true, RecursiveReadonly: true},
			}
			c.Devices = []Device{{LinuxDevice: specs.LinuxDevice{Path: "/dev/fuse", Type: "c", Major: 10, Minor: 229, FileMode: &mode, UID: &minor, GID: &minor}, Access: "rw"}}
		},
		"privileged_v1": func(c *Container) {
			c.Config.Linux.SecurityContext.Privileged = true
			c.Seccomp, c.AppArmor, c.ProcessLabel = &specs.LinuxSeccomp{}, "ignored", "ignored"
			c.Devices = []Device{{LinuxDevice: specs.LinuxDevice{Path: "/dev/sda", Type: "b", Major: 8}, Access: "rwm"}}
			c.Mounts = []Mount{{Source: "/mnt", Destination: "/mnt", Propagation: "rshared"}, {Source: "/x", Destination: "/x", Propagation: "rslave"}}
		},
		"privileged_v2": func(c *Container) {
			c.Host = v2Host
			c.Config.Linux.SecurityContext.Privileged = true
		},
		"host_namespaces": func(c *Container) {
			host := Namespace{Host: true}
			c.Network, c.IPC, c.UTS, c.PID = host, host, host, host
			c.ShmDir = "/dev/shm"
		},
		"own_namespaces": func(c *Container) {
			c.Network, c.IPC, c.UTS, c.PID = Namespace{}, Namespace{}, Namespace{}, Namespace{}
			c.HostsFile, c.HostnameFile, c.ResolvConf, c.ShmDir = "", "", "", ""
			c.Config.Linux = nil
		},
		"user_namespace": func(c *Container) {
			c.UserNS = &someUserNS
			c.Host = v2Host
			c.Config.Linux.SecurityContext.Privileged = true
			c.Mounts = []Mount{{Source: "/vol", Destination: "/vol", UIDMappings: someUserNS.UIDs, GIDMappings: someUserNS.GIDs}, {Source: "/plain", Destination: "/plain"}}
			c.Devices = []Device{
				{LinuxDevice: specs.LinuxDevice{Path: "/dev/fuse", Type: "c", Major: 10, Minor: 229}, Access: "rw", Source: "/dev/fuse"},
				{LinuxDevice: specs.LinuxDevice{Path: "/dev/own", Type: "c", Major: 1, Minor: 5}, Access: "r", Source: "/dev/zero"},
			}
		},
		"user_namespace_of_host": func(c *Container) {
			c.UserNS = &UserNS{Path: "/run/berth/ns/p1/user", UIDs: []specs.LinuxIDMapping{{HostID: 7, Size: 1}}, GIDs: []specs.LinuxIDMapping{{HostID: 7, Size: 5}}}
			host := Namespace{Host: true}
			c.Network, c.IPC, c.UTS = host, host, host
			c.Host.MQueue = true
		},
		"own_dev_and_etc": func(c *Container) {
			c.Mounts = []Mount{
				{Source: "/dev", Destination: "/dev"},
				{Source: "/etc", Destination: "/etc", Propagation: "rshared"},
				{Source: "/cg", Destination: "/sys/fs/cgroup"},
			}
		},
	}
	for name, change := range tests {
		t.Run(name, func(t *testing.T) {
			c := plain()
			change(&c)
			s, err := Build(c)
			if err != nil {
				t.Fatal(err)
			}
			golden(t, name, s)
		})
	}
}

var someUserNS = UserNS{
	Path: "/run/berth/ns/p1/user",
	UIDs: []specs.LinuxIDMapping{{HostID: 100000, Size: 65536}},
	GIDs: []specs.LinuxIDMapping{{HostID: 200000, Size: 65536}},
}

// TestUserNSOfHost: what is left out and what is recursive depends on the host.
func TestUserNSOfHost(t *testing.T) {
	c := plain()
	c.UserNS, c.Network, c.IPC, c.Host = &someUserNS, Namespace{Host: true}, Namespace{Host: true}, v2Host
	s, err := Build(c)
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range s.Mounts {
		if m.Destination == "/dev/mqueue" {
			t.Errorf("a queue file system of the host's that is not there: %+v", m)
		}
		if m.Destination == "/sys" && (m.Type != "bind" || !slices.Contains(m.Options, "rro")) {
			t.Errorf("/sys: %+v", m)
		}
	}
}

// TestInitUser: the init of a user namespace is as far from root as can be.
func TestInitUser(t *testing.T) {
	for size, want := range map[uint32]uint32{65536: 65535, 100000: 65535, 65535: 65534, 2: 1, 1: 0} {
		s, err := Init(InitPod{Host: v2Host, Arch: "amd64", UserNS: &UserNS{Path: "/ns", UIDs: []specs.LinuxIDMapping{{HostID: 1 << 20, Size: size}}, GIDs: someUserNS.GIDs}})
		if err != nil || s.Process.User.UID != want || s.Process.User.GID != 65535 {
			t.Errorf("%d users: %+v, %v; want user %d", size, s.Process.User, err, want)
		}
		if n := len(s.Linux.UIDMappings); n != 1 || !slices.ContainsFunc(s.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == specs.UserNamespace && n.Path == "/ns" }) {
			t.Errorf("%d users: %d mappings, namespaces %v", size, n, s.Linux.Namespaces)
		}
	}
}

func TestInitGolden(t *testing.T) {
	s, err := Init(InitPod{
		PodID: "p1", CgroupsPath: "/berth/p1", Binary: "/usr/libexec/berth-init", Arch: "amd64", Host: v2Host, OOMScoreAdj: -998, OOMScoreMin: ptr(0),
		Network: Namespace{Path: "/run/berth/ns/p1/net"}, IPC: Namespace{Host: true}, UTS: Namespace{Path: "/run/berth/ns/p1/uts"},
	})
	if err != nil {
		t.Fatal(err)
	}
	if s.Linux.Seccomp == nil {
		t.Error("init without seccomp")
	}
	s.Linux.Seccomp = nil // has golden files of its own
	golden(t, "init", s)
	_, err = Init(InitPod{Binary: "berth-init"})
	wantErr(t, err, `binary "berth-init"`)
}

func TestBuildErrors(t *testing.T) {
	envs := func(k, v string) func(*Container) {
		return func(c *Container) { c.Config.Envs = []*runtime.KeyValue{{Key: k, Value: []byte(v)}} }
	}
	mount := func(m Mount) func(*Container) {
		return func(c *Container) { c.Mounts = []Mount{{Source: "/a", Destination: "/a"}, m} }
	}
	device := func(d Device) func(*Container) { return func(c *Container) { c.Devices = []Device{d} } }
	tests := []struct {
		name   string
		change func(*Container)
		err    string
	}{
		{"bidirectional from a user namespace", func(c *Container) {
			c.UserNS = &someUserNS
			c.Mounts = []Mount{{Source: "/a", Destination: "/a", Propagation: "rshared"}}
		}, "mounts[0]: invalid argument: propagation: bidirectional"},
		{"no config", func(c *Container) { c.Config = nil }, "config: missing"},
		{"no command", func(c *Container) { c.Image = Image{} }, "neither entrypoint nor cmd"},
		{"empty program", func(c *Container) { c.Config.Command = []string{""} }, "name of the program is empty"},
		{"zero in args", func(c *Container) { c.Config.Args = []string{"a\x00"} }, "argument 1: zero byte at 1"},
		{"long arg", func(c *Container) { c.Config.Args = []string{strings.Repeat("a", maxString)} }, "131072 bytes, the limit is 131071"},
		{"too much", func(c *Container) { c.Config.Args = slices.Repeat([]string{strings.Repeat("a", maxString-1)}, 50) }, "the limit is 6291456"},
		{"env without name", envs("", "x"), `envs[0].key ""`},
		{"env name with sign", envs("A=B", "x"), `envs[0].key "A=B"`},
		{"env zero", envs("A", "\x00"), "env A: zero byte"},
		{"HOME newline", envs("HOME", "/\nroot::0:0"), "env HOME"},
		{"image HOME newline", func(c *Container) { c.Image.Env = []string{"HOME=/\nx"} }, "env HOME"},
		{"relative dir", func(c *Container) { c.Config.WorkingDir = "a" }, `working_dir "a": not an absolute path`},
		{"fd dir", func(c *Container) { c.Image.WorkingDir = "/proc/self/fd/8" }, "file descriptor"},
		{"fd dir hidden", func(c *Container) { c.Config.WorkingDir = "/a/../proc/7/./fd" }, "file descriptor"},
		{"oom", func(c *Container) {
			c.Config.Linux.Resources = &runtime.LinuxContainerResources{OomScoreAdj: -1001}
		}, "oom_score_adj -1001: not in -1000..1000"},
		{"mount on root", mount(Mount{Source: "/a", Destination: "/a/.."}), "mounts[1]: invalid argument: container_path"},
		{"relative mount", mount(Mount{Source: "/a", Destination: "a"}), `container_path "a"`},
		{"relative source", mount(Mount{Source: "a", Destination: "/a"}), `host_path "a"`},
		{"propagation", mount(Mount{Source: "/a", Destination: "/a", Propagation: "private"}), `propagation "private"`},
		{"rro rw", mount(Mount{Source: "/a", Destination: "/a", RecursiveReadonly: true}), "needs readonly true"},
		{"rro rslave", mount(Mount{Source: "/a", Destination: "/a", RecursiveReadonly: true, Readonly: true, Propagation: "rslave"}), "needs private propagation"},
		{"rro unable", mount(Mount{Source: "/a", Destination: "/a", RecursiveReadonly: true, Readonly: true}), "can not do it"},
		{"mount option", mount(Mount{Source: "/a", Destination: "/a", Options: []string{"rw"}}), `mount_options "rw"`},
		{"device path", device(Device{LinuxDevice: specs.LinuxDevice{Path: "dev/x", Type: "c"}, Access: "r"}), `devices[0]: invalid argument: container_path "dev/x"`},
		{"device type", device(Device{LinuxDevice: specs.LinuxDevice{Path: "/dev/x", Type: "p"}, Access: "r"}), `type "p"`},
		{"device access", device(Device{LinuxDevice: specs.LinuxDevice{Path: "/dev/x", Type: "c"}, Access: "rx"}), `permissions "rx"`},
		{"masked", func(c *Container) { c.Config.Linux.SecurityContext.MaskedPaths = []string{"/a", "b"} }, `masked_paths[1] "b"`},
		{"capability", func(c *Container) {
			c.Config.Linux.SecurityContext.Capabilities = &runtime.Capability{AddCapabilities: []string{"KILL", "FLY"}}
		}, `add_capabilities[1] "FLY": no such capability`},
		{"no seccomp", func(c *Container) { c.Host.Seccomp, c.Seccomp = false, &specs.LinuxSeccomp{} }, "no seccomp filters"},
		{"selinux", func(c *Container) {
			c.Config.Linux.SecurityContext.SelinuxOptions = &runtime.SELinuxOption{Type: "a:b"}
		}, `selinux_options.type "a:b"`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c := plain()
			tt.change(&c)
			s, err := Build(c)
			wantErr(t, err, tt.err)
			if s != nil {
				t.Error("specification beside an error")
			}
		})
	}
}

// TestBuildIsPure: building twice gives the same and leaves the input alone.
func TestBuildIsPure(t *testing.T) {
	c, c2 := plain(), plain()
	a, err := Build(c)
	if err != nil {
		t.Fatal(err)
	}
	a.Process.User.AdditionalGids[0] = 7
	a.Linux.MaskedPaths[0] = "changed"
	if !reflect.DeepEqual(c, c2) {
		t.Error("the input has changed with the output")
	}
	b, _ := Build(c)
	if b.Process.User.AdditionalGids[0] != 1000 || b.Linux.MaskedPaths[0] != "/proc/kcore" {
		t.Error("two specifications share memory")
	}
}

func TestCommand(t *testing.T) {
	list := func(s string) []string { return strings.Fields(s) }
	for _, tt := range []struct{ entrypoint, cmd, command, args, want string }{
		{"e", "c", "", "", "e c"},
		{"e", "c", "x", "", "x"},
		{"e", "c", "", "y", "e y"},
		{"e", "c", "x", "y z", "x y z"},
		{"", "c d", "", "", "c d"},
		{"", "c", "", "y", "y"},
	} {
		got, err := command(&Container{
			Config: &runtime.ContainerConfig{Command: list(tt.command), Args: list(tt.args)},
			Image:  Image{Entrypoint: list(tt.entrypoint), Cmd: list(tt.cmd)},
		})
		if err != nil || !slices.Equal(got, list(tt.want)) {
			t.Errorf("%+v: got %q, %v", tt, got, err)
		}
	}
}

func TestCapabilities(t *testing.T) {
	host := Host{Capabilities: slices.DeleteFunc(slices.Clone(knownCapabilities), func(s string) bool { return s == "CAP_BPF" })}
	tests := []struct {
		name        string
		c           *runtime.Capability
		has, hasNot []string
		count       int // of bounding, -1 for any
		ambient     []string
		err         string
	}{
		{name: "default", has: []string{"CAP_CHOWN"}, hasNot: []string{"CAP_SYS_ADMIN"}, count: len(defaultCapabilities)},
		{name: "add", c: &runtime.Capability{AddCapabilities: []string{"net_admin", "CAP_SYS_PTRACE", "NET_ADMIN"}}, has: []string{"CAP_NET_ADMIN", "CAP_SYS_PTRACE"}, count: len(defaultCapabilities) + 2},
		{name: "drop", c: &runtime.Capability{DropCapabilities: []string{"NET_RAW"}}, hasNot: []string{"CAP_NET_RAW"}, count: len(defaultCapabilities) - 1},
		{name: "drop wins", c: &runtime.Capability{AddCapabilities: []string{"KILL"}, DropCapabilities: []string{"KILL"}}, hasNot: []string{"CAP_KILL"}, count: -1},
		{name: "add all", c: &runtime.Capability{AddCapabilities: []string{"ALL"}}, count: len(host.Capabilities)},
		{name: "all but", c: &runtime.Capability{AddCapabilities: []string{"all"}, DropCapabilities: []string{"SYS_ADMIN"}}, hasNot: []string{"CAP_SYS_ADMIN"}, count: len(host.Capabilities) - 1},
		{name: "drop all", c: &runtime.Capability{DropCapabilities: []string{"ALL"}}, count: 0},
		{name: "only", c: &runtime.Capability{DropCapabilities: []string{"ALL"}, AddCapabilities: []string{"KILL"}}, has: []string{"CAP_KILL"}, count: 1},
		{name: "ambient", c: &runtime.Capability{AddAmbientCapabilities: []string{"NET_BIND_SERVICE"}, DropCapabilities: []string{"ALL"}}, count: 1, ambient: []string{"CAP_NET_BIND_SERVICE"}},
		{name: "ambient dropped", c: &runtime.Capability{AddAmbientCapabilities: []string{"KILL"}, DropCapabilities: []string{"KILL"}}, hasNot: []string{"CAP_KILL"}, count: -1},
		{name: "unknown", c: &runtime.Capability{DropCapabilities: []string{"FLY"}}, err: `drop_capabilities[0] "FLY"`},
		{name: "not here", c: &runtime.Capability{AddCapabilities: []string{"BPF"}}, err: `add_capabilities[0] "BPF": this host`},
		{name: "drop what is not here", c: &runtime.Capability{DropCapabilities: []string{"BPF"}}, count: len(defaultCapabilities)},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := Capabilities(&runtime.LinuxContainerSecurityContext{Capabilities: tt.c}, host)
			wantErr(t, err, tt.err)
			if err != nil {
				return
			}
			for _, c := range tt.has {
				if !slices.Contains(got.Bounding, c) {
					t.Errorf("no %s", c)
				}
			}
			for _, c := range tt.hasNot {
				if slices.Contains(got.Bounding, c) {
					t.Errorf("has %s", c)
				}
			}
			if tt.count >= 0 && len(got.Bounding) != tt.count {
				t.Errorf("%d capabilities, want %d", len(got.Bounding), tt.count)
			}
			if !slices.Equal(got.Bounding, got.Effective) || !slices.Equal(got.Bounding, got.Permitted) {
				t.Error("bounding, effective and permitted differ")
			}
			if !slices.Equal(got.Ambient, tt.ambient) || !slices.Equal(got.Inheritable, tt.ambient) {
				t.Errorf("ambient %q, inheritable %q, want %q", got.Ambient, got.Inheritable, tt.ambient)
			}
		})
	}
}

func TestProcess(t *testing.T) {
	s, err := Build(plain())
	if err != nil {
		t.Fatal(err)
	}
	before, _ := json.Marshal(s.Process)
	p := Process(s.Process, []string{"id", "-G"}, true)
	if !slices.Equal(p.Args, []string{"id", "-G"}) || !p.Terminal || p.User.UID != 1000 || p.Cwd != "/srv" || !slices.Contains(p.Env, "TERM=xterm") {
		t.Errorf("got %+v", p)
	}
	p.Env[0], p.User.AdditionalGids[0], p.Capabilities.Bounding[0] = "x", 1, "y"
	if after, _ := json.Marshal(s.Process); string(before) != string(after) {
		t.Errorf("the base has changed to %s", after)
	}
}

func TestStopSignal(t *testing.T) {
	for _, tt := range []struct {
		cfg   runtime.Signal
		image string
		want  int // 0 for an error
	}{
		{0, "", 15}, {0, "SIGQUIT", 3}, {0, "usr1", 10}, {0, "9", 9}, {0, "SIGRTMIN+3", 37}, {0, "RTMAX-1", 63}, {0, "SIGRTMIN", 34},
		{runtime.Signal_SIGNAL_SIGINT, "SIGQUIT", 2}, {runtime.Signal_SIGNAL_SIGRTMINPLUS15, "", 49}, {runtime.Signal_SIGNAL_SIGRTMAXMINUS14, "", 50},
		{0, "SIGNONE", 0}, {0, "0", 0}, {0, "65", 0}, {0, "-9", 0}, {0, "+9", 0}, {0, "SIGRTMIN+31", 0}, {0, "SIGRTMIN3", 0}, {9999, "", 0},
	} {
		got, err := StopSignal(tt.cfg, tt.image)
		if got != tt.want || (err == nil) != (tt.want > 0) {
			t.Errorf("StopSignal(%v, %q) = %d, %v, want %d", tt.cfg, tt.image, got, err, tt.want)
		}
	}
	for v := range runtime.Signal_name {
		if n, err := StopSignal(runtime.Signal(v), ""); err != nil || n < 1 || n > 64 {
			t.Errorf("%s: %d, %v", runtime.Signal(v), n, err)
		}
	}
}

func TestAppArmor(t *testing.T) {
	profile := func(kind runtime.SecurityProfile_ProfileType, ref string) *runtime.LinuxContainerSecurityContext {
		return &runtime.LinuxContainerSecurityContext{Apparmor: &runtime.SecurityProfile{ProfileType: kind, LocalhostRef: ref}}
	}
	old := func(s string) *runtime.LinuxContainerSecurityContext {
		return &runtime.LinuxContainerSecurityContext{ApparmorProfile: s} //nolint:staticcheck // that it still works is what is tested
	}
	for _, tt := range []struct {
		name    string
		sc      *runtime.LinuxContainerSecurityContext
		enabled bool
		want    string
		err     string
	}{
		{"nothing", nil, true, "berth-default", ""},
		{"nothing off", nil, false, "", ""},
		{"privileged", &runtime.LinuxContainerSecurityContext{Privileged: true}, true, "", ""},
		{"old unconfined", old("unconfined"), true, "", ""},
		{"default", profile(runtime.SecurityProfile_RuntimeDefault, ""), true, "berth-default", ""},
		{"default off", profile(runtime.SecurityProfile_RuntimeDefault, ""), false, "", ""},
		{"unconfined", profile(runtime.SecurityProfile_Unconfined, ""), true, "", ""},
		{"named", profile(runtime.SecurityProfile_Localhost, "mine"), true, "mine", ""},
		{"named off", profile(runtime.SecurityProfile_Localhost, "mine"), false, "", "no AppArmor"},
		{"no name", profile(runtime.SecurityProfile_Localhost, ""), true, "", "not the name of a profile"},
		{"type", profile(7, ""), true, "", "profile_type 7"},
		{"old default", old("runtime/default"), true, "berth-default", ""},
		{"old named", old("localhost/mine"), true, "mine", ""},
		{"old nonsense", old("mine"), true, "", "apparmor_profile"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := AppArmor(tt.sc, tt.enabled, "berth-default")
			wantErr(t, err, tt.err)
			if got != tt.want {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
}

func TestSELinuxOptions(t *testing.T) {
	got, err := SELinuxOptions(&runtime.SELinuxOption{User: "u", Role: "r", Type: "t", Level: "s0:c1,c2"})
	if want := []string{"user:u", "role:r", "type:t", "level:s0:c1,c2"}; err != nil || !slices.Equal(got, want) {
		t.Errorf("got %q, %v, want %q", got, err, want)
	}
	if got, err := SELinuxOptions(nil); err != nil || len(got) != 0 {
		t.Errorf("nothing: %q, %v", got, err)
	}
	for field, o := range map[string]*runtime.SELinuxOption{
		"user": {User: "a b"}, "role": {Role: "a:b"}, "type": {Type: strings.Repeat("x", 256)}, "level": {Level: "s0\n"},
	} {
		_, err := SELinuxOptions(o)
		wantErr(t, err, "selinux_options."+field)
	}
}
