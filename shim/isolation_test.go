package shim_test

import (
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berthd/berth/shim"
)

func mountinfo(t *testing.T, pid string) string {
	t.Helper()
	b, err := os.ReadFile("/proc/" + pid + "/mountinfo")
	mustT(t, err)
	return string(b)
}

func mountNS(t *testing.T, pid string) string {
	t.Helper()
	ns, err := os.Readlink("/proc/" + pid + "/ns/mnt")
	mustT(t, err)
	return ns
}

var shim0 shim.ExecRequest // all defaults

// The root's mount is the container's alone: no trace of it on the host, in the
// shim, or in any process but the container's own.
func TestRootIsMountedInTheContainerOnly(t *testing.T) {
	c := newContainer(t, "/bin/sleep", "1000").run()
	if r, err := c.exec(shim0, "cat", "/proc/self/mountinfo"); err != nil || !strings.Contains(string(r.Stdout), " / / ") || !strings.Contains(string(r.Stdout), c.path("upper")) {
		t.Errorf("the container has no overlay root: %s, %v", r.Stdout, err)
	}
	shimPID := fmt.Sprint(c.up.ShimPID)
	for name, pid := range map[string]string{"host": "self", "shim": shimPID} {
		if info := mountinfo(t, pid); strings.Contains(info, c.path("upper")) || strings.Contains(info, c.l.Rootfs) {
			t.Errorf("%s sees the root:\n%s", name, info)
		}
	}
	if mountNS(t, shimPID) != mountNS(t, "self") {
		t.Error("shim has a mount namespace of its own")
	}
	procs, err := filepath.Glob("/proc/[0-9]*/task/[0-9]*")
	mustT(t, err)
	own := mountNS(t, fmt.Sprint(c.up.Pid))
	for _, task := range procs {
		info, err := os.ReadFile(task + "/mountinfo")
		if err != nil || !strings.Contains(string(info), c.path("upper")) {
			continue
		}
		if ns, _ := os.Readlink(task + "/ns/mnt"); ns != own {
			t.Errorf("%s holds the root in another namespace", task)
		}
	}
	if entries := mustReadDir(t, c.l.Rootfs); len(entries) != 0 {
		t.Errorf("rootfs on the host has %v", entries)
	}
}

// A mount that a container makes below a volume with shared propagation shows
// on the host, so the transient namespace is a peer of the host's.
func TestBidirectionalVolume(t *testing.T) {
	volume := privateDir(t)
	mustT(t, unix.Mount("", volume, "", unix.MS_SHARED, ""))
	mustT(t, os.Mkdir(filepath.Join(volume, "sub"), 0o755))
	c := newContainer(t, "/bin/busybox", "sh", "-c", "busybox mount -t tmpfs tmpfs /vol/sub && echo x >/vol/sub/file; sleep 1000")
	mustT(t, os.Mkdir(c.path("lower/vol"), 0o755))
	c.spec["mounts"] = append(c.spec["mounts"].([]any), map[string]any{
		"destination": "/vol", "type": "bind", "source": volume, "options": []string{"rbind", "rshared"}})
	c.linux()["rootfsPropagation"] = "shared"
	caps := []string{"CAP_SYS_ADMIN", "CAP_DAC_OVERRIDE"}
	c.process["capabilities"] = map[string]any{"bounding": caps, "effective": caps, "permitted": caps}
	c.run()
	waitFor(t, "the mount to show on the host", func() bool {
		if c.log() != "" {
			t.Fatal(c.log())
		}
		_, err := os.Stat(filepath.Join(volume, "sub/file"))
		return err == nil
	})
	if info := mountinfo(t, "self"); strings.Contains(info, c.path("upper")) {
		t.Errorf("the host sees the root:\n%s", info)
	}
	unix.Unmount(filepath.Join(volume, "sub"), unix.MNT_DETACH)
}

// A long list of lower directories goes through Dir and relative paths.
func TestManyLayers(t *testing.T) {
	c := newContainer(t, "/bin/cat", "/n/100", "/n/1")
	var lower []string
	for i := 1; i <= 100; i++ {
		name := fmt.Sprintf("layers/layer-with-a-name-that-is-rather-long-%d", i)
		mustT(t, os.MkdirAll(c.path(name+"/n"), 0o755))
		mustT(t, os.WriteFile(c.path(fmt.Sprintf("%s/n/%d", name, i)), fmt.Appendln(nil, i), 0o644))
		short := fmt.Sprintf("layers/%d", i)
		mustT(t, os.Symlink(filepath.Base(name), c.path(short)))
		lower = append(lower, short)
	}
	lower = append(lower, "lower")
	c.l.Mounts[0].Dir = c.dir
	c.l.Mounts[0].Options = []string{"lowerdir=" + strings.Join(lower, ":"), "upperdir=upper", "workdir=work"}
	c.run()
	if e := c.exit(); e.Code != 0 || output(t, c.log(), "stdout") != "100\n1\n" {
		t.Errorf("got %+v, log %q", e, c.log())
	}
}

// A read-only bind of a directory serves as a root, too.
func TestReadOnlyBindRoot(t *testing.T) {
	c := newContainer(t, "/bin/sh", "-c", "echo x >/tmp/x || exit 8")
	c.l.Mounts = c.l.Mounts[:1]
	c.l.Mounts[0].Type, c.l.Mounts[0].Source, c.l.Mounts[0].Options = "bind", c.path("lower"), []string{"rbind", "ro"}
	c.run()
	if e := c.exit(); e.Code != 8 {
		t.Errorf("got %+v, log %q", e, c.log())
	}
}

// Neither the runtime nor the container nor an exec gets a descriptor above 2,
// even if the shim was started with strays.
func TestNoDescriptorLeaks(t *testing.T) {
	stray, err := unix.Open("/dev/null", unix.O_RDONLY, 0) // not close-on-exec
	mustT(t, err)
	t.Cleanup(func() { unix.Close(stray) })
	c := newContainer(t, "/bin/sh", "-c", "ls /proc/self/fd | tr '\\n' ' '; echo; sleep 1000")
	list := c.path("list")
	c.fakeRuntime("for f in /proc/$$/fd/*; do /bin/busybox readlink $f >>" + list + "; done")
	c.run()
	waitFor(t, "output", func() bool { return c.log() != "" })
	// The listing itself has a descriptor for the directory.
	if got := output(t, c.log(), "stdout"); got != "0 1 2 3 \n" {
		t.Errorf("the container has descriptors %q; log %s", got, c.log())
	}
	if r, err := c.exec(shim0, "ls", "/proc/self/fd"); err != nil || string(r.Stdout) != "0\n1\n2\n3\n" {
		t.Errorf("an exec has descriptors %q, %v", r.Stdout, err)
	}
	b, err := os.ReadFile(list)
	mustT(t, err)
	for line := range strings.Lines(string(b)) {
		switch line = strings.TrimSpace(line); {
		case line == "/dev/null", strings.HasPrefix(line, "pipe:"), strings.HasPrefix(line, "/memfd:log"), line == c.l.Runtime, line == list:
		default:
			t.Errorf("the runtime has %s", line)
		}
	}
}

// What the shim does to its own process, and how berthd was started, is not
// passed on.
func TestContainerInheritsNothing(t *testing.T) {
	signal.Ignore(unix.SIGHUP, unix.SIGTSTP, unix.SIGUSR2)
	defer signal.Reset(unix.SIGHUP, unix.SIGTSTP, unix.SIGUSR2)
	c := newContainer(t, "/bin/sh", "-c", "umask; busybox grep -E 'SigBlk|SigIgn' /proc/self/status; cat /proc/self/oom_score_adj; busybox env")
	adj := 50
	c.l.OOMScoreAdj = &adj
	c.process["oomScoreAdj"] = 100
	c.run()
	c.exit()
	got := output(t, c.log(), "stdout")
	want := []string{"0022\n", "SigBlk:\t0000000000000000\n", "SigIgn:\t0000000000000000\n", "\n100\n"}
	for _, w := range want {
		if !strings.Contains(got, w) {
			t.Errorf("no %q in:\n%s", w, got)
		}
	}
	if strings.Contains(got, "GOMAXPROCS") {
		t.Errorf("environment:\n%s", got)
	}
}

// One idle shim, and what it keeps after it had work. The bounds are loose
// against noise; what is measured is printed.
func TestMemory(t *testing.T) {
	c := newContainer(t, "/bin/sh", "-c", "seq 300000; exec sleep 1000")
	c.run()
	bin, err := builtShim()
	mustT(t, err)
	f, err := os.Open(bin)
	mustT(t, err)
	mustT(t, f.Sync()) // pages of a file just written count as dirty memory
	f.Close()
	time.Sleep(2500 * time.Millisecond) // buffers are given back after a second
	report := func(when string) {
		pss, anon := rollup(t, c.up.ShimPID, "Pss"), rollup(t, c.up.ShimPID, "Pss_Anon")
		status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", c.up.ShimPID))
		mustT(t, err)
		_, threads, _ := strings.Cut(string(status), "Threads:\t")
		threads, _, _ = strings.Cut(threads, "\n")
		t.Logf("%s: PSS %d KiB, of it anonymous %d KiB, file %d KiB; %s threads; %d descriptors",
			when, pss, anon, pss-anon, threads, len(descriptors(t, c.up.ShimPID)))
		if anon > 1<<10 || pss > 3<<10 {
			t.Errorf("%s: above 1 MiB of anonymous memory or 3 MiB of PSS", when)
		}
	}
	report("after 300000 log lines")
	before := switches(t, c.up.ShimPID)
	time.Sleep(3 * time.Second)
	if n := switches(t, c.up.ShimPID) - before; n > 1 {
		t.Errorf("idle shim woke %d times in 3 s", n)
	}
	for range 100 {
		_, err := c.exec(shim0, "true")
		mustT(t, err)
	}
	report("after 100 execs")
}

// switches counts how often a process's threads gave the processor up.
func switches(t *testing.T, pid int) (n int) {
	t.Helper()
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
	mustT(t, err)
	for _, name := range tasks {
		b, _ := os.ReadFile(name)
		_, rest, _ := strings.Cut(string(b), "\nvoluntary_ctxt_switches:")
		var v int
		fmt.Sscan(rest, &v)
		n += v
	}
	return n
}
