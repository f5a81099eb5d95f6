package spec

import (
	"bytes"
	"debug/elf"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestMain lets the test binary be the program in a container: it then tells what
// it finds there.
func TestMain(m *testing.M) {
	if len(os.Args) == 2 && os.Args[1] == "probe" || os.Args[0] == initPath {
		probe()
		return
	}
	os.Exit(m.Run())
}

// probe prints one line for each thing that a test wants to know.
func probe() {
	say := func(what string, v any) { fmt.Printf("%s=%v\n", what, v) }
	try := func(what string, err error) {
		if e := syscall.Errno(0); errors.As(err, &e) {
			say(what, unix.ErrnoName(e))
		} else {
			say(what, "ok")
		}
	}
	for name, family := range map[string]int{"inet": unix.AF_INET, "unix": unix.AF_UNIX, "alg": unix.AF_ALG, "vsock": unix.AF_VSOCK} {
		_, err := unix.Socket(family, unix.SOCK_DGRAM, 0)
		if name == "alg" {
			_, err = unix.Socket(family, unix.SOCK_SEQPACKET, 0)
		}
		try(name, err)
	}
	_, _, e := unix.RawSyscall(unix.SYS_CLONE3, 0, 0, 0)
	try("clone3", e)
	try("unshare", unix.Unshare(unix.CLONE_NEWUSER))
	try("write", os.WriteFile("/x", nil, 0o600))
	groups, _ := os.Getgroups()
	say("ids", fmt.Sprint(os.Getuid(), os.Getgid(), groups))
	status, _ := os.ReadFile("/proc/self/status")
	for line := range strings.Lines(string(status)) {
		for _, key := range []string{"CapInh", "CapBnd", "Seccomp", "NoNewPrivs"} {
			if v, ok := strings.CutPrefix(line, key+":"); ok {
				say(key, strings.TrimSpace(v))
			}
		}
	}
	for _, file := range []string{"/proc/self/oom_score_adj", "/etc/hosts"} {
		b, err := os.ReadFile(file)
		say(file, fmt.Sprint(strings.TrimSpace(string(b)), err))
	}
	for _, m := range []string{"/proc", "/sys", "/dev", "/dev/pts", "/dev/mqueue", "/dev/shm", "/sys/fs/cgroup"} {
		var st unix.Statfs_t
		say(m, fmt.Sprintf("%v %x", unix.Statfs(m, &st), st.Type))
	}
	cwd, _ := os.Getwd()
	say("cwd", cwd)
}

// runIn has runc run the probe in a container and returns what it says. change may
// alter the container before its specification is built.
func runIn(t *testing.T, change func(*Container)) map[string]string {
	t.Helper()
	return runSpec(t, func(dir, id, self string) (*specs.Spec, error) {
		hosts := filepath.Join(dir, "hosts")
		if err := os.WriteFile(hosts, []byte("127.0.0.1 pod"), 0o644); err != nil {
			return nil, err
		}
		c := Container{
			ID: id, Host: realHost(t), CgroupsPath: "/berth-test-spec/" + id, HostsFile: hosts, Hostname: "pod",
			Config: &cri.ContainerConfig{Command: []string{"/probe", "probe"}, Linux: &cri.LinuxContainerConfig{SecurityContext: &cri.LinuxContainerSecurityContext{}}},
			User:   User{UID: 0, GID: 0, AdditionalGIDs: []uint32{0, 7}},
			Mounts: []Mount{{Source: self, Destination: "/probe", Readonly: true}},
		}
		change(&c)
		return Build(c)
	})
}

// realHost has what this machine lets a test have.
func realHost(t *testing.T) Host {
	t.Helper()
	h := Host{Seccomp: true}
	if _, err := os.Stat("/sys/fs/cgroup/cgroup.controllers"); err == nil {
		h.CgroupV2 = true
	}
	bounding, err := strconv.ParseUint(statusField(t, "CapBnd"), 16, 64)
	if err != nil {
		t.Fatal(err)
	}
	for n := range 64 {
		if name := CapabilityName(n); name != "" && bounding&(1<<n) != 0 {
			h.Capabilities = append(h.Capabilities, name)
		}
	}
	return h
}

func statusField(t *testing.T, key string) string {
	t.Helper()
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, key+":"); ok {
			return strings.TrimSpace(v)
		}
	}
	t.Fatalf("/proc/self/status: no %s", key)
	return ""
}

// runSpec has runc run a specification in which this test binary is the program.
func runSpec(t *testing.T, build func(dir, id, self string) (*specs.Spec, error)) map[string]string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: runs a container")
	}
	runc, err := exec.LookPath("runc")
	if err != nil {
		t.Skip("needs runc in PATH")
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if !static(t, self) {
		t.Skip("needs a static test binary: CGO_ENABLED=0")
	}
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "rootfs"), 0o755); err != nil {
		t.Fatal(err)
	}
	id := fmt.Sprintf("berth-spec-%d-%d", os.Getpid(), runs.Add(1))
	s, err := build(dir, id, self)
	if err != nil {
		t.Fatal(err)
	}
	text, err := json.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "config.json"), text, 0o644); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { removeParents() })
	var out, errOut bytes.Buffer
	cmd := exec.CommandContext(t.Context(), runc, "--root", filepath.Join(dir, "state"), "run", "--bundle", dir, id)
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if err := cmd.Run(); err != nil {
		t.Fatalf("runc: %v\n%s%s", err, &out, &errOut)
	}
	said := map[string]string{}
	for line := range strings.Lines(out.String()) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		said[key] = value
	}
	return said
}

var runs atomic.Int32 // for IDs

// removeParents removes the group that runc has made for the parent.
func removeParents() {
	for _, pattern := range []string{"/sys/fs/cgroup/berth-test-spec", "/sys/fs/cgroup/*/berth-test-spec"} {
		dirs, _ := filepath.Glob(pattern)
		for _, d := range dirs {
			_ = unix.Rmdir(d)
		}
	}
}

func static(t *testing.T, name string) bool {
	f, err := elf.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	return !slices.ContainsFunc(f.Progs, func(p *elf.Prog) bool { return p.Type == elf.PT_INTERP })
}

func wantSaid(t *testing.T, got, want map[string]string) {
	t.Helper()
	for key, v := range want {
		if got[key] != v {
			t.Errorf("%s: %q, want %q", key, got[key], v)
		}
	}
}

// TestRuncDefault: what a container with the default profile is and may do.
func TestRuncDefault(t *testing.T) {
	adj := 100 // any process may be made more killable
	got := runIn(t, func(c *Container) {
		sc := c.Config.Linux.SecurityContext
		sc.NoNewPrivs, sc.ReadonlyRootfs = true, true
		sc.Capabilities = &cri.Capability{DropCapabilities: []string{"ALL"}, AddCapabilities: []string{"CHOWN"}}
		c.Config.Linux.Resources = &cri.LinuxContainerResources{OomScoreAdj: int64(adj), CpuShares: 100}
		c.Config.WorkingDir = "/dev"
		c.Seccomp = DefaultSeccomp([]string{"CAP_CHOWN"}, runtime.GOARCH)
	})
	wantSaid(t, got, map[string]string{
		"inet": "ok", "unix": "ok", "alg": "EPERM", "vsock": "EPERM", "clone3": "ENOSYS", "unshare": "EPERM",
		"write": "EROFS", "ids": "0 0 [0 7]", "cwd": "/dev",
		"CapInh": "0000000000000000", "CapBnd": "0000000000000001", "Seccomp": "2", "NoNewPrivs": "1",
		"/proc/self/oom_score_adj": "100<nil>", "/etc/hosts": "127.0.0.1 pod<nil>",
		"/proc": "<nil> 9fa0", "/sys": "<nil> 62656572", "/dev": "<nil> 1021994", "/dev/pts": "<nil> 1cd1",
		"/dev/mqueue": "<nil> 19800202", "/dev/shm": "<nil> 1021994",
	})
	if !strings.HasPrefix(got["/sys/fs/cgroup"], "<nil>") {
		t.Errorf("/sys/fs/cgroup: %s", got["/sys/fs/cgroup"])
	}
}

// TestRuncUnconfined: without a profile nothing is filtered.
func TestRuncUnconfined(t *testing.T) {
	got := runIn(t, func(c *Container) {
		c.User = User{UID: 1234, GID: 5678, AdditionalGIDs: []uint32{5678, 42}}
	})
	wantSaid(t, got, map[string]string{"Seccomp": "0", "NoNewPrivs": "0", "ids": "1234 5678 [42 5678]", "CapInh": "0000000000000000", "cwd": "/"})
	if got["clone3"] == "ENOSYS" || got["clone3"] == "" {
		t.Errorf("clone3: %q", got["clone3"])
	}
}

// TestRuncAmbient: an ambient capability reaches a process that is not root.
func TestRuncAmbient(t *testing.T) {
	got := runIn(t, func(c *Container) {
		c.User = User{UID: 1234, GID: 1234, AdditionalGIDs: []uint32{1234}}
		c.Config.Linux.SecurityContext.Capabilities = &cri.Capability{DropCapabilities: []string{"ALL"}, AddAmbientCapabilities: []string{"KILL"}}
	})
	wantSaid(t, got, map[string]string{"CapBnd": "0000000000000020", "CapInh": "0000000000000020"})
}

// TestRuncLocalhost: a profile that was read from a file is understood by runc.
func TestRuncLocalhost(t *testing.T) {
	p, err := ParseSeccomp([]byte(`{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["unshare"],"action":"SCMP_ACT_ERRNO","errnoRet":95}]}`))
	if err != nil {
		t.Fatal(err)
	}
	wantSaid(t, runIn(t, func(c *Container) { c.Seccomp = p }), map[string]string{"Seccomp": "2", "unshare": "ENOTSUP"})
}

// TestRuncPrivileged: a privileged container has every capability and a writable root.
func TestRuncPrivileged(t *testing.T) {
	got := runIn(t, func(c *Container) {
		c.Config.Linux.SecurityContext.Privileged = true
		c.Seccomp = DefaultSeccomp(nil, runtime.GOARCH)
	})
	wantSaid(t, got, map[string]string{"Seccomp": "0", "write": "ok", "CapInh": "0000000000000000", "CapBnd": statusField(t, "CapBnd")})
}

// TestRuncInit: the init of a pod starts from an empty root and can do nothing.
func TestRuncInit(t *testing.T) {
	got := runSpec(t, func(dir, id, self string) (*specs.Spec, error) {
		return Init(InitPod{PodID: id, CgroupsPath: "/berth-test-spec/" + id, Binary: self, Arch: runtime.GOARCH, Host: realHost(t), OOMScoreAdj: 50})
	})
	wantSaid(t, got, map[string]string{
		"ids": "65535 65535 [65535]", "CapBnd": "0000000000000000", "CapInh": "0000000000000000", "Seccomp": "2", "NoNewPrivs": "1",
		"write": "EROFS", "alg": "EPERM", "/proc/self/oom_score_adj": "50<nil>", "cwd": "/",
	})
}
