package sandbox

import (
	"errors"
	"os"
	"path/filepath"
	goruntime "runtime"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berthd/berth/sandbox/cgroup"
	"github.com/berthd/berth/sandbox/spec"
)

// wantInvalid checks for an error that blames the caller, with a part of its text.
func wantInvalid(t *testing.T, err error, part string) {
	t.Helper()
	if !(errors.Is(err, ErrInvalid) || errors.Is(err, spec.ErrInvalid)) || !strings.Contains(err.Error(), part) {
		t.Errorf("error %v, want ErrInvalid with %q", err, part)
	}
}

func mustWrite(t *testing.T, name, text string) string {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	return name
}

func mustSymlink(t *testing.T, target, name string) string {
	t.Helper()
	if err := os.Symlink(target, name); err != nil {
		t.Fatal(err)
	}
	return name
}

func TestGatherMounts(t *testing.T) {
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	real := mustWrite(t, filepath.Join(dir, "real", "file"), "")
	link := mustSymlink(t, "real/file", filepath.Join(dir, "link"))
	got, err := gatherMounts([]*runtime.Mount{{
		HostPath: link, ContainerPath: "/c", Readonly: true, RecursiveReadOnly: true, SelinuxRelabel: true, MountOptions: []string{"noexec"},
	}}, mountIDs{})
	if err != nil || len(got) != 1 {
		t.Fatalf("got %+v, %v", got, err)
	}
	if m := got[0]; m.Source != real || m.Destination != "/c" || !m.Readonly || !m.RecursiveReadonly || m.Propagation != "rprivate" || !slices.Equal(m.Options, []string{"noexec"}) {
		t.Errorf("got %+v", m)
	}
	for name, tt := range map[string]struct {
		m   *runtime.Mount
		err string
	}{
		"missing":     {&runtime.Mount{HostPath: filepath.Join(dir, "none"), ContainerPath: "/x"}, `mounts[0] (container_path "/x"): invalid argument: host_path`},
		"relative":    {&runtime.Mount{HostPath: "real", ContainerPath: "/x"}, `host_path "real": not an absolute path`},
		"sub path":    {&runtime.Mount{ContainerPath: "/x", HostPath: dir, ImageSubPath: "a"}, "image_sub_path"},
		"mappings":    {&runtime.Mount{ContainerPath: "/x", HostPath: dir, UidMappings: []*runtime.IDMapping{{}}}, "uidMappings"},
		"propagation": {&runtime.Mount{ContainerPath: "/x", HostPath: dir, Propagation: 9}, "propagation 9"},
		"loop":        {&runtime.Mount{ContainerPath: "/x", HostPath: mustSymlink(t, "loop", filepath.Join(dir, "loop"))}, "host_path"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := gatherMounts([]*runtime.Mount{tt.m}, mountIDs{})
			wantInvalid(t, err, tt.err)
		})
	}
}

func TestGatherPropagation(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: mounts")
	}
	mount := func(source, target string, flags uintptr) {
		t.Helper()
		if err := unix.Mount(source, target, "", flags, ""); err != nil {
			t.Fatal(err)
		}
		if flags&unix.MS_BIND != 0 {
			t.Cleanup(func() {
				if err := unix.Unmount(target, unix.MNT_DETACH); err != nil {
					t.Error(err)
				}
			})
		}
	}
	private, shared, slave := t.TempDir(), t.TempDir(), t.TempDir()
	mount(private, private, unix.MS_BIND)
	mount("", private, unix.MS_PRIVATE)
	mount(shared, shared, unix.MS_BIND)
	mount("", shared, unix.MS_PRIVATE) // leaves the peers that it has from the file system around it
	mount("", shared, unix.MS_SHARED)
	mount(shared, slave, unix.MS_BIND)
	mount("", slave, unix.MS_SLAVE)
	const (
		none      = runtime.MountPropagation_PROPAGATION_PRIVATE
		fromHost  = runtime.MountPropagation_PROPAGATION_HOST_TO_CONTAINER
		bothSides = runtime.MountPropagation_PROPAGATION_BIDIRECTIONAL
	)
	for _, tt := range []struct {
		dir  string
		p    runtime.MountPropagation
		want string
		err  string
	}{
		{private, none, "rprivate", ""},
		{private, fromHost, "", "needs a shared or slave mount"},
		{private, bothSides, "", "needs a shared mount"},
		{shared, none, "rprivate", ""},
		{shared, fromHost, "rslave", ""},
		{shared, bothSides, "rshared", ""},
		{slave, fromHost, "rslave", ""},
		{slave, bothSides, "", "needs a shared mount"},
	} {
		got, err := gatherMounts([]*runtime.Mount{{HostPath: tt.dir, ContainerPath: "/x", Propagation: tt.p}}, mountIDs{})
		switch {
		case tt.err != "":
			wantInvalid(t, err, tt.err)
		case err != nil || got[0].Propagation != tt.want:
			t.Errorf("%s %v: got %+v, %v", tt.dir, tt.p, got, err)
		}
	}
}

func TestGatherDevices(t *testing.T) {
	dir := t.TempDir()
	link := mustSymlink(t, "/dev/null", filepath.Join(dir, "link"))
	file := mustWrite(t, filepath.Join(dir, "file"), "")
	got, err := gatherDevices([]*runtime.Device{{HostPath: link, ContainerPath: "/dev/nothing", Permissions: "rw"}}, false)
	if err != nil || len(got) != 1 {
		t.Fatalf("got %+v, %v", got, err)
	}
	if d := got[0]; d.Path != "/dev/nothing" || d.Type != "c" || d.Major != 1 || d.Minor != 3 || d.Access != "rw" || *d.FileMode&0o777 != *d.FileMode {
		t.Errorf("got %+v", d)
	}
	if got, err := gatherDevices([]*runtime.Device{{HostPath: "/dev/zero", Permissions: "mrw"}}, false); err != nil || got[0].Path != "/dev/zero" {
		t.Errorf("without container path: %+v, %v", got, err)
	}
	for name, tt := range map[string]struct {
		d   *runtime.Device
		err string
	}{
		"missing":        {&runtime.Device{HostPath: "/dev/none", Permissions: "r"}, `devices[0]: invalid argument: host_path "/dev/none"`},
		"relative":       {&runtime.Device{HostPath: "null", Permissions: "r"}, "not an absolute path"},
		"file":           {&runtime.Device{HostPath: file, Permissions: "r"}, "neither a device node nor a directory"},
		"permissions":    {&runtime.Device{HostPath: "/dev/null", Permissions: "rwx"}, `permissions "rwx"`},
		"no permissions": {&runtime.Device{HostPath: "/dev/null"}, `permissions ""`},
		"twice":          {&runtime.Device{HostPath: "/dev/null", Permissions: "rr"}, `permissions "rr"`},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := gatherDevices([]*runtime.Device{tt.d}, false)
			wantInvalid(t, err, tt.err)
		})
	}
}

func TestGatherDeviceDirectory(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes device nodes")
	}
	dir := t.TempDir()
	mustWrite(t, filepath.Join(dir, "sub", "file"), "")
	for name, minor := range map[string]uint32{"a": 3, "sub/b": 5} {
		if err := unix.Mknod(filepath.Join(dir, name), unix.S_IFCHR|0o600, int(unix.Mkdev(1, minor))); err != nil {
			t.Fatal(err)
		}
	}
	mustSymlink(t, "a", filepath.Join(dir, "link"))
	got, err := gatherDevices([]*runtime.Device{{HostPath: dir, ContainerPath: "/dev/mine", Permissions: "r"}}, false)
	if err != nil || len(got) != 2 || got[0].Path != "/dev/mine/a" || got[1].Path != "/dev/mine/sub/b" || got[1].Minor != 5 || got[1].Access != "r" {
		t.Errorf("got %+v, %v", got, err)
	}
}

func TestGatherDevicesPrivileged(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: reads all of /dev")
	}
	got, err := gatherDevices([]*runtime.Device{{HostPath: "/dev/null", ContainerPath: "/dev/null", Permissions: "r"}}, true)
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]int{}
	for _, d := range got {
		seen[d.Path]++
		if seen[d.Path] > 1 || strings.HasPrefix(d.Path, "/dev/pts/") || strings.HasPrefix(d.Path, "/dev/shm/") || slices.Contains([]string{"/dev/ptmx", "/dev/console", "/dev/zero"}, d.Path) {
			t.Errorf("%s", d.Path)
		}
	}
	if seen["/dev/null"] != 1 {
		t.Error("the device that was asked for is missing")
	}
}

func TestLoadSeccomp(t *testing.T) {
	dir := t.TempDir()
	good := mustWrite(t, filepath.Join(dir, "good.json"), `{"defaultAction":"SCMP_ACT_LOG"}`)
	bad := mustWrite(t, filepath.Join(dir, "bad.json"), `{"defaultAction":"MAYBE"}`)
	big := mustWrite(t, filepath.Join(dir, "big.json"), strings.Repeat(" ", maxProfile+1))
	fifo := filepath.Join(dir, "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	local := func(ref string) *runtime.SecurityProfile {
		return &runtime.SecurityProfile{ProfileType: runtime.SecurityProfile_Localhost, LocalhostRef: ref}
	}
	unconfined := &runtime.SecurityProfile{ProfileType: runtime.SecurityProfile_Unconfined}
	for _, tt := range []struct {
		name       string
		p          *runtime.SecurityProfile
		old        string
		privileged bool
		want       string // default action, "" for no profile
		err        string
	}{
		{name: "unset"},
		{name: "default", p: &runtime.SecurityProfile{}, want: "SCMP_ACT_ERRNO"},
		{name: "unconfined", p: unconfined},
		{name: "localhost", p: local(good), want: "SCMP_ACT_LOG"},
		{name: "privileged", p: local(bad), privileged: true},
		{name: "old default", old: "runtime/default", want: "SCMP_ACT_ERRNO"},
		{name: "old docker", old: "docker/default", want: "SCMP_ACT_ERRNO"},
		{name: "old unconfined", old: "unconfined"},
		{name: "old localhost", old: "localhost/" + good, want: "SCMP_ACT_LOG"},
		{name: "new before old", p: unconfined, old: "runtime/default"},

		{name: "old nonsense", old: "default", err: `seccomp_profile_path "default"`},
		{name: "type", p: &runtime.SecurityProfile{ProfileType: 5}, err: "profile_type 5"},
		{name: "ref without type", p: &runtime.SecurityProfile{LocalhostRef: good}, err: "only for profile_type Localhost"},
		{name: "relative", p: local("good.json"), err: "not an absolute path"},
		{name: "empty", p: local(""), err: "not an absolute path"},
		{name: "missing", p: local(filepath.Join(dir, "none")), err: "no such file"},
		{name: "directory", p: local(dir), err: "not a regular file"},
		{name: "fifo", p: local(fifo), err: "not a regular file"},
		{name: "big", p: local(big), err: "over 1048576 bytes"},
		{name: "bad", p: local(bad), err: `defaultAction "MAYBE"`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := loadSeccomp(tt.p, tt.old, tt.privileged, nil)
			switch {
			case tt.err != "":
				wantInvalid(t, err, tt.err)
			case err != nil:
				t.Error(err)
			case (got == nil) != (tt.want == "") || got != nil && string(got.DefaultAction) != tt.want:
				t.Errorf("got %+v, want %q", got, tt.want)
			}
		})
	}
}

func TestReadUserDB(t *testing.T) {
	outside := mustWrite(t, filepath.Join(t.TempDir(), "secret"), "secret")
	read := func(t *testing.T, dir string) (passwd, group []byte, err error) {
		t.Helper()
		fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		root := os.NewFile(uintptr(fd), dir)
		defer root.Close()
		return readUserDB(root)
	}
	for name, tt := range map[string]struct {
		make          func(t *testing.T, dir string)
		passwd, group string
		err           string
	}{
		"empty image": {make: func(*testing.T, string) {}},
		"files": {make: func(t *testing.T, dir string) {
			mustWrite(t, filepath.Join(dir, "etc/passwd"), "p")
			mustWrite(t, filepath.Join(dir, "etc/group"), "g")
		}, passwd: "p", group: "g"},
		"links inside": {make: func(t *testing.T, dir string) {
			mustWrite(t, filepath.Join(dir, "store/passwd"), "p")
			mustWrite(t, filepath.Join(dir, "etc/keep"), "")
			mustSymlink(t, "/store/passwd", filepath.Join(dir, "etc/passwd"))
			mustSymlink(t, "../../../../store/none", filepath.Join(dir, "etc/group"))
		}, passwd: "p"},
		"link to the host": {make: func(t *testing.T, dir string) {
			mustWrite(t, filepath.Join(dir, "etc/keep"), "")
			mustSymlink(t, outside, filepath.Join(dir, "etc/passwd"))
		}},
		"directory link to the host": {make: func(t *testing.T, dir string) {
			mustSymlink(t, "/etc", filepath.Join(dir, "etc"))
		}, err: "too many levels"},
		"etc is a file": {make: func(t *testing.T, dir string) { mustWrite(t, filepath.Join(dir, "etc"), "") }},
		"directory":     {make: func(t *testing.T, dir string) { mustWrite(t, filepath.Join(dir, "etc/group/x"), "") }, err: "/etc/group: not a regular file"},
		"fifo": {make: func(t *testing.T, dir string) {
			mustWrite(t, filepath.Join(dir, "etc/keep"), "")
			if err := unix.Mkfifo(filepath.Join(dir, "etc/passwd"), 0o644); err != nil {
				t.Fatal(err)
			}
		}, err: "/etc/passwd: not a regular file"},
		"huge": {make: func(t *testing.T, dir string) {
			if err := os.Truncate(mustWrite(t, filepath.Join(dir, "etc/group"), ""), 1<<30); err != nil {
				t.Fatal(err)
			}
		}, err: "/etc/group: over 4194304 bytes"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			tt.make(t, dir)
			passwd, group, err := read(t, dir)
			if tt.err != "" {
				wantInvalid(t, err, tt.err)
				return
			}
			if err != nil || string(passwd) != tt.passwd || string(group) != tt.group {
				t.Errorf("got %q, %q, %v", passwd, group, err)
			}
		})
	}
}

func TestHostFacts(t *testing.T) {
	h, err := cgroup.Detect()
	if err != nil {
		t.Fatal(err)
	}
	f, err := hostFacts(h)
	if err != nil {
		t.Fatal(err)
	}
	if f.CgroupV2 != h.V2() {
		t.Errorf("cgroup v2: %v", f.CgroupV2)
	}
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	if has := strings.Contains(string(status), "\nSeccomp_filters:"); has && !f.Seccomp {
		t.Error("no seccomp, but the kernel counts filters")
	}
	if os.Geteuid() == 0 && !slices.Contains(f.Capabilities, "CAP_CHOWN") {
		t.Errorf("capabilities %q", f.Capabilities)
	}
	if floor := oomScoreFloor(); floor < -1000 || floor > 1000 {
		t.Errorf("OOM score floor %d", floor)
	}
}

func TestHugePageSizes(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"hugepages-2048kB", "hugepages-1048576kB", "hugepages-64kB", "hugepages-0kB", "other"} {
		mustWrite(t, filepath.Join(dir, name, "nr"), "")
	}
	got := hugePageSizes(dir)
	slices.Sort(got)
	if !slices.Equal(got, []string{"1GB", "2MB", "64KB"}) {
		t.Errorf("got %q", got)
	}
	if got := hugePageSizes(filepath.Join(dir, "none")); len(got) != 0 {
		t.Errorf("of nothing: %q", got)
	}
}

func TestParseSysctls(t *testing.T) {
	got, err := parseSysctls(map[string]string{
		"net.ipv4.conf.eth0/1.forwarding": "1", "net/ipv4/ip_local_port_range": "1024\t65535", "kernel.shm_rmid_forced": "1",
		"kernel/msgmax": "8192", "kernel.sem": "250 32000 32 128", "fs.mqueue.msg_max": "10",
	}, false, false)
	want := []sysctl{
		{"fs/mqueue/msg_max", "10"}, {"kernel/sem", "250 32000 32 128"}, {"kernel/shm_rmid_forced", "1"}, {"kernel/msgmax", "8192"},
		{"net/ipv4/conf/eth0.1/forwarding", "1"}, {"net/ipv4/ip_local_port_range", "1024\t65535"},
	}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("got %q, %v, want %q", got, err, want)
	}
	for _, tt := range []struct {
		key, value       string
		hostNet, hostIPC bool
		err              string
	}{
		{"kernel.core_pattern", "|/evil", false, false, `linux.sysctls["kernel.core_pattern"]: not of a pod's namespaces`},
		{"vm.swappiness", "1", false, false, "not of a pod's namespaces"},
		{"kernel.hostname", "x", false, false, "not of a pod's namespaces"},
		{"kernel.semaphore", "x", false, false, "not of a pod's namespaces"},
		{"kernel.shm.x", "x", false, false, "not of a pod's namespaces"},
		{"fs.mqueue", "x", false, false, "not of a pod's namespaces"},
		{"net", "x", false, false, "not of a pod's namespaces"},
		{"network.x", "x", false, false, "not of a pod's namespaces"},
		{"", "x", false, false, "not the name of a sysctl"},
		{"net/../kernel/core_pattern", "x", false, false, "not the name of a sysctl"},
		{"net.ipv4.//.x", "x", false, false, "not the name of a sysctl"},
		{"net..ipv4", "x", false, false, "not the name of a sysctl"},
		{"net/ipv4/a\nb", "x", false, false, "not the name of a sysctl"},
		{"net.ipv4.ip_forward", "1\nkernel.core_pattern=x", false, false, "not printable ASCII"},
		{"net.ipv4.ip_forward", strings.Repeat("1", maxSysctl+1), false, false, "over 4096 bytes"},
		{"net.ipv4.ip_forward", "1", true, false, "network namespace, which is the host's"},
		{"kernel.msgmax", "1", false, true, "IPC namespace, which is the host's"},
		{"fs.mqueue.msg_max", "1", false, true, "IPC namespace, which is the host's"},
	} {
		_, err := parseSysctls(map[string]string{tt.key: tt.value}, tt.hostNet, tt.hostIPC)
		wantInvalid(t, err, tt.err)
	}
	_, err = parseSysctls(map[string]string{"kernel.sem": "1", "kernel/sem": "2"}, false, false)
	wantInvalid(t, err, "given twice")
	many := map[string]string{}
	for i := range maxSysctls + 1 {
		many["net.x."+strings.Repeat("a", i+1)] = "1"
	}
	_, err = parseSysctls(many, false, false)
	wantInvalid(t, err, "257, the limit is 256")
}

// TestApplySysctls sets sysctls in new namespaces of a thread that ends with them.
func TestApplySysctls(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes namespaces")
	}
	const file = "/proc/sys/net/ipv4/ip_forward"
	host, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	flip := map[string]string{"0": "1", "1": "0"}[strings.TrimSpace(string(host))]
	inside := make(chan string, 1)
	errs := make(chan error, 3)
	go func() {
		goruntime.LockOSThread() // never unlocked: the thread must not be used again
		if err := unix.Unshare(unix.CLONE_NEWNET | unix.CLONE_NEWIPC); err != nil {
			errs <- err
			inside <- ""
			return
		}
		errs <- applySysctls([]sysctl{{"net/ipv4/ip_forward", flip}, {"kernel/msgmax", "4321"}, {"fs/mqueue/msg_max", "17"}}, nil)
		errs <- applySysctls([]sysctl{{"net/ipv4/no_such_thing", "1"}}, nil)
		errs <- applySysctls([]sysctl{{"../sys/kernel/msgmax", "1"}}, nil)
		var all []string
		for _, name := range []string{file, "/proc/sys/kernel/msgmax", "/proc/sys/fs/mqueue/msg_max"} {
			b, err := os.ReadFile(name)
			all = append(all, strings.TrimSpace(string(b)))
			if err != nil {
				all = append(all, err.Error())
			}
		}
		inside <- strings.Join(all, " ")
	}()
	if got, want := <-inside, flip+" 4321 17"; got != want {
		t.Errorf("inside %q, want %q", got, want)
	}
	if err := <-errs; err != nil {
		t.Fatal(err)
	}
	wantInvalid(t, <-errs, "net.ipv4.no_such_thing")
	wantInvalid(t, <-errs, "...sys.kernel.msgmax")
	if after, _ := os.ReadFile(file); string(after) != string(host) {
		t.Errorf("the host's has become %q", after)
	}
}
