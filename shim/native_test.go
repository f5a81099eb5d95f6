package shim_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/berthd/berth/shim"
)

// capabilityNumbers has what the tests use.
var capabilityNumbers = map[string]int{
	"CAP_CHOWN": 0, "CAP_DAC_OVERRIDE": 1, "CAP_KILL": 5, "CAP_SETGID": 6, "CAP_SETUID": 7, "CAP_SETPCAP": 8, "CAP_NET_BIND_SERVICE": 10,
	"CAP_NET_RAW": 13, "CAP_SYS_CHROOT": 18, "CAP_SYS_PTRACE": 19, "CAP_SYS_ADMIN": 21, "CAP_MKNOD": 27, "CAP_AUDIT_WRITE": 29,
	"CAP_SETFCAP": 31, "CAP_CHECKPOINT_RESTORE": 40,
}

func capabilityNumber(name string) (int, bool) {
	n, ok := capabilityNumbers[name]
	return n, ok
}

// needNewRunc skips unless the runtime is a runc that native execs are like.
func needNewRunc(t *testing.T) {
	t.Helper()
	out, err := exec.Command(runtimePath(t), "--version").Output()
	if err != nil || !regexp.MustCompile(`^runc version (1\.[2-9]|1\.\d\d|[2-9])`).Match(out) {
		t.Skipf("needs runc 1.2 or newer as the runtime to compare with, not %.40q", out)
	}
}

// spec is the container's specification as OCI types.
func (c *container) typedSpec() *specs.Spec {
	c.t.Helper()
	b, err := json.Marshal(c.spec)
	mustT(c.t, err)
	sp := new(specs.Spec)
	mustT(c.t, json.Unmarshal(b, sp))
	return sp
}

// cgroupDirs are those that the container's init is in.
func (c *container) cgroupDirs() (dirs []string) {
	c.t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", c.up.Pid))
	mustT(c.t, err)
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	mustT(c.t, err)
	for line := range strings.Lines(string(text)) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if !strings.HasPrefix(f[2], cgroupParent) {
			continue
		}
		for m := range strings.Lines(string(mounts)) {
			before, after, _ := strings.Cut(m, " - ")
			b, a := strings.Fields(before), strings.Fields(after)
			is := f[1] == "" && a[0] == "cgroup2" ||
				f[1] != "" && a[0] == "cgroup" && slices.Contains(strings.Split(a[2], ","), strings.Split(f[1], ",")[0])
			if is {
				dirs = append(dirs, b[4]+f[2])
				break
			}
		}
	}
	if len(dirs) == 0 {
		c.t.Fatalf("no cgroup of the container in %s", text)
	}
	return dirs
}

// execNative runs p by the shim alone, if that can.
func (c *container) execNative(sp *specs.Spec, p specs.Process, home string) (shim.ExecResult, error) {
	c.t.Helper()
	m, err := shim.ImageOf(sp, &p, shim.Surroundings{ID: c.id, Cgroups: c.cgroupDirs(), Home: home, Capability: capabilityNumber})
	mustT(c.t, err)
	return c.execImage(p, m)
}

func (c *container) execImage(p specs.Process, m *shim.ExecImage) (shim.ExecResult, error) {
	c.t.Helper()
	b, err := json.Marshal(p)
	mustT(c.t, err)
	return c.c.Exec(ctxFor(c.t, time.Minute), shim.ExecRequest{Process: b, Image: m, MaxOutput: 1 << 20})
}

// execBoth runs p by the shim alone and by the runtime.
func (c *container) execBoth(sp *specs.Spec, p specs.Process, home string) (native, runtime shim.ExecResult) {
	c.t.Helper()
	native, err := c.execNative(sp, p, home)
	mustT(c.t, err)
	runtime, err = c.execImage(p, nil)
	mustT(c.t, err)
	if !native.Native || runtime.Native {
		c.t.Errorf("native: %v and %v", native.Native, runtime.Native)
	}
	return native, runtime
}

// What differs from one process to the next, and what only tells of time.
var passing = regexp.MustCompile(strings.Join([]string{
	`(?m)^(Pid|Tgid|Ngid|NSpid|NStgid|NSpgid|NSsid|Vm\w+|Rss\w+|HugetlbPages|\w*voluntary_ctxt_switches|StackTop|untag_mask|SigQ|Cpus_allowed_list):.*\n`,
	`pipe:\[\d+\]`,
	`/proc/\d+`,
	`/autogroup-\d+`,
	`(?m)^PPid:\s+[1-9]\d*\n`, // the runtime may still be there
	`\w{3} +\d+ \d\d:\d\d`,    // of ls
	`(?m)^l-.x------.* 3 -> .*$`,
}, "|"))

func tidy(out []byte) string {
	return passing.ReplaceAllString(string(out), "")
}

// A process that the shim starts is in every respect that the kernel shows like
// one that the runtime starts, over what a specification can ask for.
func TestNativeExecIsLikeTheRuntimes(t *testing.T) {
	needNewRunc(t)
	all := []string{"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_KILL", "CAP_SETGID", "CAP_SETUID", "CAP_SETPCAP", "CAP_NET_BIND_SERVICE", "CAP_NET_RAW", "CAP_SYS_CHROOT"}
	caps := func(names ...string) *specs.LinuxCapabilities {
		return &specs.LinuxCapabilities{Bounding: names, Effective: names, Permitted: names}
	}
	adj := 777
	umask := uint32(0o27)
	errno := uint(38)
	profile := &specs.LinuxSeccomp{
		DefaultAction: specs.ActErrno, DefaultErrnoRet: &errno, Architectures: []specs.Arch{specs.ArchX86_64, specs.ArchX86},
		Syscalls: []specs.LinuxSyscall{{Names: mostCalls(), Action: specs.ActAllow}},
	}
	loose := &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Flags: []specs.LinuxSeccompFlag{},
		Syscalls: []specs.LinuxSyscall{{Names: []string{"mkdir", "mkdirat"}, Action: specs.ActErrno}}}
	logging := &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Flags: []specs.LinuxSeccompFlag{specs.LinuxSeccompFlagLog},
		Syscalls: []specs.LinuxSyscall{{Names: []string{"mkdir", "mkdirat"}, Action: specs.ActErrno}}}
	tests := []struct {
		name   string
		change func(*specs.Spec)
	}{
		{"plain", func(*specs.Spec) {}},
		{"user", func(s *specs.Spec) {
			s.Process.User = specs.User{UID: 1234, GID: 1235, AdditionalGids: []uint32{7, 1235, 70000}}
		}},
		{"user and umask", func(s *specs.Spec) { s.Process.User = specs.User{UID: 1, Umask: &umask} }},
		{"no capabilities", func(s *specs.Spec) { s.Process.Capabilities = &specs.LinuxCapabilities{} }},
		{"ambient", func(s *specs.Spec) {
			s.Process.User.UID = 99
			c := caps("CAP_NET_RAW", "CAP_CHECKPOINT_RESTORE")
			c.Ambient, c.Inheritable = []string{"CAP_NET_RAW"}, []string{"CAP_NET_RAW"}
			s.Process.Capabilities = c
		}},
		{"ambient that is not inheritable", func(s *specs.Spec) {
			c := caps("CAP_NET_RAW")
			c.Ambient = []string{"CAP_NET_RAW"}
			s.Process.Capabilities = c
		}},
		{"bounding above permitted", func(s *specs.Spec) {
			s.Process.Capabilities = &specs.LinuxCapabilities{Bounding: all, Permitted: []string{"CAP_KILL"}, Effective: []string{"CAP_KILL"}}
		}},
		{"no new privileges", func(s *specs.Spec) { s.Process.NoNewPrivileges = true }},
		{"seccomp", func(s *specs.Spec) { s.Linux.Seccomp = profile }},
		{"seccomp, user", func(s *specs.Spec) { s.Linux.Seccomp, s.Process.User.UID = profile, 5 }},
		{"seccomp, no new privileges", func(s *specs.Spec) { s.Linux.Seccomp, s.Process.NoNewPrivileges, s.Process.User.UID = profile, true, 5 }},
		{"seccomp without flags", func(s *specs.Spec) { s.Linux.Seccomp = loose }},
		{"seccomp with a log", func(s *specs.Spec) { s.Linux.Seccomp = logging }},
		{"limits", func(s *specs.Spec) {
			s.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 100, Hard: 200}, {Type: "RLIMIT_CORE", Soft: 0, Hard: 0}}
		}},
		{"OOM score", func(s *specs.Spec) { s.Process.OOMScoreAdj = &adj }},
		{"directory", func(s *specs.Spec) { s.Process.Cwd = "/tmp" }},
		{"directory for the user only", func(s *specs.Spec) { s.Process.Cwd, s.Process.User.UID = "/private", 1234 }},
		{"environment", func(s *specs.Spec) {
			s.Process.Env = []string{"A=1", "PATH=/nowhere:/bin", "A=2", "HOME=", "B=", "A=3"}
		}},
		{"shared PIDs", func(s *specs.Spec) {
			s.Linux.Namespaces = slices.DeleteFunc(s.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == specs.PIDNamespace })
		}},
		{"host's network, own cgroup namespace", func(s *specs.Spec) {
			s.Linux.Namespaces = append(slices.DeleteFunc(s.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == specs.NetworkNamespace }),
				specs.LinuxNamespace{Type: specs.CgroupNamespace})
		}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			c := newContainer(t, "/bin/sleep", "1000")
			private := c.path("lower/private")
			mustT(t, os.Mkdir(private, 0o700))
			mustT(t, os.Chown(private, 1234, 0))
			sp := c.typedSpec()
			sp.Process.Capabilities = caps(all...)
			test.change(sp)
			b, err := json.Marshal(sp)
			mustT(t, err)
			c.spec = nil
			mustT(t, json.Unmarshal(b, &c.spec))
			if !slices.ContainsFunc(sp.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == specs.PIDNamespace }) {
				c.l.PrivatePID = false
				c.l.CgroupKill = []string{memoryCgroup(c.id)}
			}
			c.l.KeepFilter = true
			c.run()
			p := *sp.Process
			// The filter is there when the program runs, a moment after Start.
			waitFor(t, "a native exec", func() bool {
				p.Args = []string{"true"}
				r, err := c.execNative(sp, p, "/")
				mustT(t, err)
				return r.Native
			})
			for _, args := range [][]string{
				{"cat", "/proc/self/status", "/proc/self/limits", "/proc/self/cgroup", "/proc/self/oom_score_adj", "/proc/self/environ",
					"/proc/self/timerslack_ns", "/proc/self/mountinfo", "/proc/self/personality", "/proc/self/loginuid", "/proc/self/sessionid",
					"/proc/self/coredump_filter", "/proc/self/autogroup"},
				{"ls", "-ln", "/proc/self/fd", "/proc/self/ns", "/proc/self/cwd", "/proc/self/root"},
				{"sh", "-c", "umask; pwd; read a b c d pgrp session tty tpgid flags rest </proc/self/stat; echo $tty $tpgid; " +
					"[ $pgrp = $session ] && echo leads; echo to /dev/stderr >/dev/stderr; mkdir /tmp/x; rmdir /tmp/x; cat; exit 3"},
				{"sh", "-c", "kill -TERM $$"},
				{"/bin/sh", "-c", "busybox sed 's/^[^ ]* *[^ ]* *[0-9]* //' /proc/keys | busybox grep " + c.id + "; true"},
			} {
				p.Args = args
				n, r := c.execBoth(sp, p, "/")
				if n.ExitCode != r.ExitCode || tidy(n.Stdout) != tidy(r.Stdout) || tidy(n.Stderr) != tidy(r.Stderr) {
					t.Errorf("%.20q: code %d, with the runtime %d; in its output\n%s%s", args, n.ExitCode, r.ExitCode,
						differ(tidy(n.Stdout), tidy(r.Stdout)), differ(tidy(n.Stderr), tidy(r.Stderr)))
				}
			}
		})
	}
}

// differ lists the lines that only one of two texts has.
func differ(a, b string) string {
	var out bytes.Buffer
	la, lb := strings.Split(a, "\n"), strings.Split(b, "\n")
	for _, l := range la {
		if !slices.Contains(lb, l) {
			fmt.Fprintln(&out, "-", l)
		}
	}
	for _, l := range lb {
		if !slices.Contains(la, l) {
			fmt.Fprintln(&out, "+", l)
		}
	}
	return out.String()
}

// mostCalls are what busybox and a starting process need, and no mkdir.
func mostCalls() []string {
	return strings.Fields(`access arch_prctl brk capget capset chdir clone clone3 close close_range dup dup2 dup3 execve exit exit_group
		faccessat faccessat2 fchown fcntl fork fstat fstatfs futex getcwd getdents64 getegid geteuid getgid getpgid getpgrp getpid
		getppid getrandom gettid getuid ioctl keyctl kill lseek lstat madvise mmap mprotect munmap nanosleep newfstatat open openat openat2
		pipe pipe2 poll prctl pread64 prlimit64 read readlink readlinkat rmdir rseq rt_sigaction rt_sigprocmask rt_sigreturn sched_yield
		seccomp sendfile set_robust_list set_tid_address setgid setgroups setsid setuid sigaltstack stat statfs statx sysinfo tgkill
		umask uname unlinkat vfork wait4 write writev epoll_create1 epoll_ctl epoll_pwait eventfd2 getxattr lgetxattr listxattr llistxattr
		clock_gettime clock_nanosleep ppoll setpgid sched_getaffinity recvmsg sendmsg sendto recvfrom socket connect fchdir`)
}

// Whatever the shim cannot start, the runtime is asked for, and gives the reason.
func TestNativeExecFallsBack(t *testing.T) {
	needNewRunc(t)
	c := newContainer(t, "/bin/sleep", "1000")
	c.process["capabilities"] = map[string]any{}
	mustT(t, os.WriteFile(filepath.Join(c.path("lower/bin"), "script"), []byte("#!/bin/nothing\n"), 0o755))
	mustT(t, os.WriteFile(filepath.Join(c.path("lower/bin"), "text"), []byte("text"), 0o644))
	c.run()
	sp := c.typedSpec()
	p := *sp.Process
	for _, args := range [][]string{{"/bin/nothing"}, {"nothing"}, {"/bin"}, {"text"}, {"script"}} {
		p.Args = args
		n, native := c.execNative(sp, p, "/")
		r, runtime := c.execImage(p, nil)
		if fmt.Sprint(native) != fmt.Sprint(runtime) || n.Native || n.ExitCode != r.ExitCode || native == nil && n.ExitCode == 0 {
			t.Errorf("%s: %+v, %v; the runtime alone: %+v, %v", args, n, native, r, runtime)
		}
	}
	p.Args = []string{"true"}
	missing := func(what string, at shim.Surroundings) {
		at.ID, at.Capability = c.id, capabilityNumber
		m, err := shim.ImageOf(sp, &p, at)
		mustT(t, err)
		if r, err := c.execImage(p, m); err != nil || r.Native || r.ExitCode != 0 {
			t.Errorf("without %s: %+v, %v", what, r, err)
		}
	}
	missing("a cgroup", shim.Surroundings{Cgroups: []string{"/sys/fs/cgroup/gone"}})
	sp.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: specs.ActErrno}
	missing("a filter", shim.Surroundings{Cgroups: c.cgroupDirs()})
}

// Every field of a process that the specification has is one that ImageOf looks
// at: a new one is to be understood first.
func TestImageOfKnowsEveryField(t *testing.T) {
	known := []string{"Terminal", "ConsoleSize", "User", "Args", "CommandLine", "Env", "Cwd", "Capabilities", "Rlimits", "NoNewPrivileges",
		"ApparmorProfile", "OOMScoreAdj", "Scheduler", "SelinuxLabel", "IOPriority", "ExecCPUAffinity"}
	for f := range reflect.TypeFor[specs.Process]().Fields() {
		if !slices.Contains(known, f.Name) {
			t.Errorf("process.%s is new: does a native exec honour it?", f.Name)
		}
	}
}

func TestImageOfLeavesToTheRuntime(t *testing.T) {
	tests := []struct {
		what   string
		change func(*specs.Spec)
	}{
		{"incomplete", func(s *specs.Spec) { s.Process.Args = nil }},
		{"incomplete", func(s *specs.Spec) { s.Process.Cwd = "tmp" }},
		{"terminal", func(s *specs.Spec) { s.Process.Terminal = true }},
		{"label", func(s *specs.Spec) { s.Process.SelinuxLabel = "a:b:c:s0" }},
		{"label", func(s *specs.Spec) { s.Process.ApparmorProfile = "unconfined" }},
		{"scheduling", func(s *specs.Spec) { s.Process.Scheduler = &specs.Scheduler{} }},
		{"scheduling", func(s *specs.Spec) { s.Process.IOPriority = &specs.LinuxIOPriority{} }},
		{"scheduling", func(s *specs.Spec) { s.Process.ExecCPUAffinity = &specs.CPUAffinity{} }},
		{"capabilities", func(s *specs.Spec) { s.Process.Capabilities = nil }},
		{"capability CAP_NEW", func(s *specs.Spec) { s.Process.Capabilities.Bounding = []string{"CAP_NEW"} }},
		{"umask", func(s *specs.Spec) { m := uint32(0o1000); s.Process.User.Umask = &m }},
		{"personality", func(s *specs.Spec) { s.Linux.Personality = &specs.LinuxPersonality{} }},
		{"user namespace", func(s *specs.Spec) { s.Linux.Namespaces = []specs.LinuxNamespace{{Type: specs.UserNamespace}} }},
		{"time namespace", func(s *specs.Spec) { s.Linux.Namespaces = []specs.LinuxNamespace{{Type: specs.TimeNamespace}} }},
		{"no PATH", func(s *specs.Spec) { s.Process.Env = nil }},
		{"relative PATH", func(s *specs.Spec) { s.Process.Env = []string{"PATH=/bin:."} }},
		{"rlimit RLIMIT_X", func(s *specs.Spec) { s.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_X"}} }},
		{"seccomp listener", func(s *specs.Spec) {
			s.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{{Action: specs.ActNotify}}}
		}},
		{"seccomp flag", func(s *specs.Spec) {
			s.Linux.Seccomp = &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Flags: []specs.LinuxSeccompFlag{specs.LinuxSeccompFlagWaitKillableRecv}}
		}},
	}
	for _, test := range tests {
		sp := &specs.Spec{Linux: &specs.Linux{}, Process: &specs.Process{Args: []string{"true"}, Cwd: "/", Env: []string{"PATH=/bin"},
			Capabilities: &specs.LinuxCapabilities{}}}
		at := shim.Surroundings{ID: "c", Capability: capabilityNumber}
		if _, err := shim.ImageOf(sp, sp.Process, at); err != nil {
			t.Fatal(err)
		}
		test.change(sp)
		if m, err := shim.ImageOf(sp, sp.Process, at); !errors.Is(err, shim.ErrUnsupported) || !strings.Contains(err.Error(), test.what) {
			t.Errorf("%s: %v, %v", test.what, m, err)
		}
	}
}

// Nobody can write to the shim's program through a process that runs it, not even
// after all of these have ended: an image may have a program that is a link to it.
func TestProgramIsReadOnly(t *testing.T) {
	needNewRunc(t)
	c := newContainer(t, "/bin/sleep", "1000")
	c.process["capabilities"] = map[string]any{}
	mustT(t, os.Symlink("/proc/self/exe", filepath.Join(c.path("lower/bin"), "itself")))
	c.run()
	fd, err := unix.Open(fmt.Sprintf("/proc/%d/exe", c.up.ShimPID), unix.O_PATH|unix.O_CLOEXEC, 0)
	mustT(t, err)
	defer unix.Close(fd)
	// With O_TRUNC the mount is looked at before whether the file is running.
	if again, err := unix.Open(fmt.Sprintf("/proc/self/fd/%d", fd), unix.O_WRONLY|unix.O_TRUNC|unix.O_CLOEXEC, 0); err != unix.EROFS {
		unix.Close(again)
		t.Errorf("the shim's program opened for writing: %v, want EROFS", err)
	}
	sp := c.typedSpec()
	p := *sp.Process
	p.Args = []string{"itself"}
	r, err := c.execNative(sp, p, "/")
	if err == nil && r.ExitCode == 0 {
		t.Errorf("the shim's program as a command: %+v", r)
	}
	if text, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", c.up.ShimPID)); err != nil || string(text) != "berth-shim\n" {
		t.Errorf("the shim is called %q, %v", text, err)
	}
}
