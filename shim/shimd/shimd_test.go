package shimd

import (
	"os"
	osexec "os/exec"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berthd/berth/shim/wire"
	"github.com/berthd/berth/test/userns"
)

func TestMountOptions(t *testing.T) {
	tests := []struct {
		in    string
		flags uintptr
		data  string
	}{
		{"", 0, ""},
		{"ro", unix.MS_RDONLY, ""},
		{"ro,rw", 0, ""},
		{"rw,rbind", unix.MS_BIND | unix.MS_REC, ""},
		{"bind,ro,nosuid,nodev,noexec", unix.MS_BIND | unix.MS_RDONLY | unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
		{"nosuid,suid,dirsync,sync,async,defaults", unix.MS_DIRSYNC, ""},
		{"noatime,strictatime,relatime,nodiratime", unix.MS_NOATIME | unix.MS_STRICTATIME | unix.MS_RELATIME | unix.MS_NODIRATIME, ""},
		{"index=off,ro,lowerdir=a:b,userxattr", unix.MS_RDONLY, "index=off,lowerdir=a:b,userxattr"},
	}
	for _, test := range tests {
		var in []string
		if test.in != "" {
			in = strings.Split(test.in, ",")
		}
		if flags, data := mountOptions(in); flags != test.flags || data != test.data {
			t.Errorf("%q: %#x, %q; want %#x, %q", test.in, flags, data, test.flags, test.data)
		}
	}
}

func TestMountPlan(t *testing.T) {
	plan := func(userNS int, mounts ...wire.Mount) ([]mountCall, error) {
		return mountPlan(&wire.Launch{Mounts: mounts, Rootfs: "/root", Bundle: "/bundle", RootUID: 7, RootGID: 8}, userNS)
	}
	calls, err := plan(-1,
		wire.Mount{Type: "overlay", Source: "overlay", Options: []string{"lowerdir=1"}, Dir: "/layers"},
		wire.Mount{Type: "bind", Source: "/x", Options: []string{"rbind", "ro"}, Target: "vol-0"},
	)
	if err != nil || len(calls) != 3 {
		t.Fatalf("%d calls, %v", len(calls), err)
	}
	if calls[0].dir == nil || calls[1].dir != nil {
		t.Error("working directory")
	}
	if want := uintptr(unix.MS_REMOUNT | unix.MS_BIND | unix.MS_RDONLY); calls[2].flags != want {
		t.Errorf("flags of the third call %#x, want %#x", calls[2].flags, want)
	}
	for i, want := range []string{"/root", "/bundle/vol-0", "/bundle/vol-0"} {
		if got := unix.BytePtrToString(calls[i].target); got != want {
			t.Errorf("call %d at %s, want %s", i, got, want)
		}
	}
	long := []string{"lowerdir=" + strings.Repeat("x", unix.Getpagesize())}
	if _, err := plan(-1, wire.Mount{Type: "overlay", Options: long}); err != unix.E2BIG {
		t.Errorf("options of more than a page: %v", err)
	}
	if _, err := plan(-1, wire.Mount{Type: "bind", Source: "a\x00b"}); err == nil {
		t.Error("a NUL was accepted")
	}
}

func TestMountPlanIDMapped(t *testing.T) {
	l := wire.Launch{Rootfs: "/root", Bundle: "/bundle", RootUID: 7, RootGID: 8, Mounts: []wire.Mount{
		{Type: "overlay", Source: "overlay", Options: []string{"lowerdir=1"}, Dir: "layers", IDMap: "/state"},
		{Type: "bind", Source: "/x", Options: []string{"rbind", "ro", "nosuid"}, Target: "vol-0", IDMap: "/x"},
	}}
	calls, err := mountPlan(&l, 5)
	if err != nil || len(calls) != 3 {
		t.Fatalf("%d calls, %v", len(calls), err)
	}
	if a := calls[0].attr; a == nil || a.Userns_fd != 5 || a.Attr_set != unix.MOUNT_ATTR_IDMAP || a.Propagation != unix.MS_PRIVATE {
		t.Errorf("copy for the overlay: %+v", a)
	}
	if c := calls[1]; c.attr != nil || unix.BytePtrToString(c.dir) != "/root/layers" || c.uid != 7 || c.gid != 8 {
		t.Errorf("the overlay: %+v", c)
	}
	if a := calls[2].attr; a == nil || a.Attr_set != unix.MOUNT_ATTR_IDMAP|unix.MOUNT_ATTR_RDONLY|unix.MOUNT_ATTR_NOSUID || calls[2].uid != 0 {
		t.Errorf("bind: %+v", calls[2])
	}
	for i, want := range []string{"/state", "overlay", "/x"} {
		if got := unix.BytePtrToString(calls[i].source); got != want {
			t.Errorf("call %d of %s, want %s", i, got, want)
		}
	}
	if _, err := mountPlan(&l, -1); err != unix.EBADF {
		t.Errorf("without a user namespace: %v", err)
	}
}

// TestIDMappedMounts has the child mount a writable overlay and a read-only copy,
// on directories that are root's, and looks at who owns what.
func TestIDMappedMounts(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: mounts file systems")
	}
	dir := t.TempDir()
	// A private mount, as berth's run directory is: else the mounts come out
	// where the root is a shared one.
	mustT(t, unix.Mount(dir, dir, "", unix.MS_BIND, ""))
	t.Cleanup(func() { mustT(t, unix.Unmount(dir, unix.MNT_DETACH)) })
	mustT(t, unix.Mount("", dir, "", unix.MS_PRIVATE, ""))
	for _, d := range []string{"layers/1", "snapshots/2/upper", "snapshots/2/work", "bundle/rootfs", "bundle/vol-0"} {
		mustT(t, os.MkdirAll(dir+"/"+d, 0o755))
	}
	mustT(t, os.WriteFile(dir+"/layers/1/old", []byte("old"), 0o600))
	mustT(t, os.Chown(dir+"/layers/1/old", 4, 5))
	l := wire.Launch{Rootfs: dir + "/bundle/rootfs", Bundle: dir + "/bundle", RootUID: 300000, RootGID: 300000, Mounts: []wire.Mount{
		{Type: "overlay", Source: "overlay", Options: []string{"lowerdir=1", "upperdir=../snapshots/2/upper", "workdir=../snapshots/2/work"}, Dir: "layers", IDMap: dir},
		{Type: "bind", Source: dir + "/layers/1", Options: []string{"ro", "rbind"}, Target: "vol-0", IDMap: dir + "/layers/1"},
	}}
	ns := userns.Must(t, 300000)
	// What is made by whoever is not in the namespace must fail, and nothing be read-only.
	script := "cd $0; stat -c %u:%g rootfs rootfs/old vol-0/old; chmod 644 rootfs/old; touch vol-0/x 2>/dev/null || echo read-only; mkdir rootfs/mine 2>/dev/null || echo stranger; id -u; grep ^CapEff /proc/self/status; cat rootfs/old"
	calls, err := mountPlan(&l, int(ns.Fd()))
	mustT(t, err)
	out, status, r := runFork(t, calls, "/bin/sh", "-c", script, dir+"/bundle")
	if r.errno == int32(unix.EINVAL) || r.errno == int32(unix.ENOSYS) {
		t.Skipf("call %d: %v: not on this kernel or file system", r.at, unix.Errno(r.errno))
	}
	own, err := os.ReadFile("/proc/self/status")
	mustT(t, err)
	_, caps, _ := strings.Cut(string(own), "CapEff:")
	caps, _, _ = strings.Cut(caps, "\n") // the runtime is to have all of them back
	if want := "300000:300000\n300004:300005\n300004:300005\nread-only\nstranger\n0\nCapEff:" + caps + "\nold"; status != 0 || out != want {
		t.Errorf("report %+v, status %d, output %q, want %q", r, status, out, want)
	}
	var st unix.Stat_t
	mustT(t, unix.Stat(dir+"/snapshots/2/upper/old", &st))
	if st.Uid != 4 || st.Gid != 5 || st.Mode&0o777 != 0o644 {
		t.Errorf("in the writable layer: %d:%d, mode %o", st.Uid, st.Gid, st.Mode)
	}
	if table, err := os.ReadFile("/proc/self/mountinfo"); err != nil || strings.Contains(string(table), dir+"/") {
		t.Errorf("mounts have come out: %v", err)
	}
	// The runtime dies with who started it, though that changes its user meanwhile.
	pid := make(chan int)
	p := newPlan(t, calls, "/bin/sleep", "60")
	go onThread(func() {
		n, errno := fork(p)
		for i := 0; errno == 0 && i < 500; i++ {
			if comm, err := os.ReadFile("/proc/" + strconv.Itoa(int(n)) + "/comm"); err != nil || string(comm) == "sleep\n" {
				break
			}
			time.Sleep(10 * time.Millisecond)
		}
		pid <- int(n)
	})
	var ws unix.WaitStatus
	if _, err := unix.Wait4(<-pid, &ws, 0, nil); err != nil || !ws.Signaled() || ws.Signal() != unix.SIGKILL {
		t.Errorf("after the end of the thread that started it: %v, %#x", err, ws)
	}
}

// onThread runs fn on a thread that ends afterwards, as the first one never does.
func onThread(fn func()) {
	runtime.LockOSThread()
	if unix.Gettid() == unix.Getpid() {
		done := make(chan bool)
		go func() {
			defer close(done)
			onThread(fn)
		}()
		<-done
		runtime.UnlockOSThread()
		return
	}
	fn()
}

// newPlan is a plan to run a program with these mounts and no stdio.
func newPlan(t *testing.T, mounts []mountCall, argv ...string) *forkPlan {
	t.Helper()
	if reports == nil {
		mustT(t, mapReports())
	}
	args, err := cstrings(argv...)
	mustT(t, err)
	env, err := cstrings("PATH=/usr/sbin:/usr/bin:/sbin:/bin")
	mustT(t, err)
	return &forkPlan{unshare: true, mounts: mounts, stdio: [3]int{-1, -1, -1}, argv: append(args, nil), envv: append(env, nil), report: &reports[0], parent: unix.Getpid()}
}

func mustT(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// runFork forks with the mounts and runs a program to its end.
func runFork(t *testing.T, mounts []mountCall, argv ...string) (out string, status int, r report) {
	t.Helper()
	f, err := os.CreateTemp(t.TempDir(), "out")
	mustT(t, err)
	defer f.Close()
	p := newPlan(t, mounts, argv...)
	p.stdio[1], p.stdio[2] = int(f.Fd()), int(f.Fd())
	pid, errno := fork(p)
	if errno != 0 {
		t.Fatal(errno)
	}
	var ws unix.WaitStatus
	_, err = unix.Wait4(int(pid), &ws, 0, nil)
	mustT(t, err)
	text, err := os.ReadFile(f.Name())
	mustT(t, err)
	return string(text), ws.ExitStatus(), reports[0]
}

func TestRuntimeMessage(t *testing.T) {
	tests := []struct{ name, in, want string }{
		{"nothing", "", ""},
		{"runc", `{"level":"warning","msg":"w","time":"t"}` + "\n" + `{"level":"error","msg":"exec: \"x\": not \u00e4 found\\n","time":"t"}` + "\n", `exec: "x": not ä found\n`},
		{"crun", `{"msg": "cannot \"x\"", "level": "error", "time": "t"}`, `cannot "x"`},
		{"last error counts", `{"level":"error","msg":"first"}` + "\n" + `{"level":"error","msg":"second"}` + "\n" + `{"level":"info","msg":"third"}`, "second"},
		{"no JSON", "panic: x\ngoroutine 1\n", "panic: x\ngoroutine 1"},
		{"no message", `{"level":"error"}`, `{"level":"error"}`},
		{"unended", `{"level":"error","msg":"abc`, `{"level":"error","msg":"abc`},
	}
	for _, test := range tests {
		if got := runtimeMessage([]byte(test.in)); got != test.want {
			t.Errorf("%s: got %q, want %q", test.name, got, test.want)
		}
	}
}

// FuzzRuntimeMessage holds that the message is bounded, whatever a runtime logs.
func FuzzRuntimeMessage(f *testing.F) {
	f.Add([]byte(`{"level":"error","msg":"a\u0041"}`))
	f.Fuzz(func(t *testing.T, in []byte) {
		if got := runtimeMessage(in); len(got) > maxMessage+len(" …") {
			t.Errorf("%d bytes", len(got))
		}
	})
}

func TestOOMKills(t *testing.T) {
	tests := []struct {
		in string
		n  uint64
		ok bool
	}{
		{"oom_kill_disable 0\nunder_oom 0\noom_kill 3\n", 3, true},
		{"low 0\nhigh 0\nmax 7\noom 2\noom_kill 1\noom_group_kill 1\n", 1, true},
		{"oom_kill_disable 0\nunder_oom 0\n", 0, false},
		{"oom_kill x\n", 0, false},
		{"", 0, false},
	}
	for _, test := range tests {
		if n, ok := oomKills([]byte(test.in)); n != test.n || ok != test.ok {
			t.Errorf("%q: %d, %v", test.in, n, ok)
		}
	}
}

// TestOOMWatch: a cgroup v2 that goes away before its count could be read.
func TestOOMWatch(t *testing.T) {
	tests := []struct {
		name      string
		own       string // at the end, "" for gone
		above     string // at the end, "" for never there
		look      bool   // once more, after the count above has risen
		bySIGKILL bool
		want      bool
	}{
		{"nothing", "oom_kill 1", "oom_kill 5", false, true, false},
		{"counted", "oom_kill 2", "oom_kill 6", false, false, true},
		{"counted without a cgroup above", "oom_kill 2", "", false, false, true},
		{"gone", "", "oom_kill 5", false, true, false},
		{"gone without a cgroup above", "", "", false, true, false},
		{"gone after a kill", "", "oom_kill 6", false, true, true},
		{"gone after a kill, own exit code", "", "oom_kill 6", false, false, false},
		{"gone after the kill of a neighbour", "", "oom_kill 6", true, true, false},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			dir := t.TempDir()
			above, own := dir+"/memory.events", dir+"/own/memory.events"
			if err := os.Mkdir(dir+"/own", 0o755); err != nil {
				t.Fatal(err)
			}
			write := func(name, text string) {
				if err := os.WriteFile(name, []byte("max 3\n"+text+"\n"), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			write(own, "oom_kill 1")
			if test.above != "" {
				write(above, "oom_kill 5")
			}
			l, err := newLoop()
			if err != nil {
				t.Fatal(err)
			}
			defer unix.Close(l.ep)
			var o oomWatch
			o.open(l, own)
			if o.fd <= 0 || (o.above > 0) != (test.above != "") {
				t.Fatalf("open: %+v", o)
			}
			if test.above != "" {
				write(above, test.above)
			}
			if test.look {
				o.read()
			}
			write(own, test.own)
			if got := o.killed(test.bySIGKILL); got != test.want {
				t.Errorf("killed: %v", got)
			}
			if o.fd != 0 || o.above != 0 {
				t.Errorf("left open: %+v", o)
			}
		})
	}
}

func TestCheck(t *testing.T) {
	good := wire.Launch{ID: "x", Bundle: "/b", Runtime: "/r", Socket: "/s", ExitFile: "/e"}
	l := good
	if e := check(&l); e != nil || l.MaxLogLine != 16<<10 || l.DrainTimeout != 2*time.Second || l.CreateTimeout != 2*time.Minute {
		t.Errorf("%+v, %+v", e, l)
	}
	score := 1001
	bad := map[string]func(*wire.Launch){
		"ID":            func(l *wire.Launch) { l.ID = "" },
		"Bundle":        func(l *wire.Launch) { l.Bundle = "b" },
		"Runtime":       func(l *wire.Launch) { l.Runtime = "runc" },
		"Socket":        func(l *wire.Launch) { l.Socket = "" },
		"ExitFile":      func(l *wire.Launch) { l.ExitFile = "/" + strings.Repeat("x", 5000) },
		"Rootfs":        func(l *wire.Launch) { l.Mounts = []wire.Mount{{}} },
		"Mounts":        func(l *wire.Launch) { l.Mounts = []wire.Mount{{Target: "a/../../b"}} },
		"Mounts ":       func(l *wire.Launch) { l.Mounts = []wire.Mount{{Target: "a", IDMap: "/x"}} },
		"Mounts  ":      func(l *wire.Launch) { l.Mounts, l.UserNS = []wire.Mount{{Target: "a", IDMap: "x"}}, "/ns" },
		"MaxLogLine":    func(l *wire.Launch) { l.MaxLogLine = 65 << 10 },
		"DrainTimeout":  func(l *wire.Launch) { l.DrainTimeout = -1 },
		"CreateTimeout": func(l *wire.Launch) { l.CreateTimeout = 2 * time.Hour },
		"OOMScoreAdj":   func(l *wire.Launch) { l.OOMScoreAdj = &score },
	}
	for field, spoil := range bad {
		l := good
		spoil(&l)
		if e := check(&l); e == nil || e.Step != strings.TrimSpace(field) || e.Code != wire.CodeInvalid {
			t.Errorf("%s: %+v", field, e)
		}
	}
}

func TestKillTree(t *testing.T) {
	cmd := osexec.Command("/bin/sh", "-c", "trap '' TERM; (trap '' TERM; sleep 4321 & sleep 4322 & wait) & sleep 4323 & echo up; wait")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	out.Read(make([]byte, 3))
	time.Sleep(200 * time.Millisecond)
	tree := appendChildren([]int{cmd.Process.Pid}, cmd.Process.Pid, unix.SIGCONT)
	if len(tree) != 3 {
		t.Fatalf("children: %v", tree)
	}
	killTree(cmd.Process.Pid)
	cmd.Wait()
	for _, name := range []string{"4321", "4322", "4323"} {
		if found := processes(t, "sleep\x00"+name); found != "" {
			t.Errorf("sleep %s lives as %s", name, found)
		}
	}
}

func processes(t *testing.T, command string) (pids string) {
	t.Helper()
	for wait := 0; wait < 20; wait++ { // a killed process takes a moment to go
		pids = ""
		entries, err := os.ReadDir("/proc")
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			if _, err := strconv.Atoi(e.Name()); err != nil {
				continue
			}
			if b, _ := os.ReadFile("/proc/" + e.Name() + "/cmdline"); strings.HasPrefix(string(b), command) {
				pids += e.Name() + " "
			}
		}
		if pids == "" {
			return ""
		}
		time.Sleep(20 * time.Millisecond)
	}
	return pids
}

func TestReplaceFile(t *testing.T) {
	path := t.TempDir() + "/exit"
	for _, text := range []string{"one", "two longer", ""} {
		if err := replaceFile(path, []byte(text)); err != nil {
			t.Fatal(err)
		}
		if b, err := readFile(path, 100); err != nil || string(b) != text {
			t.Errorf("got %q, %v", b, err)
		}
	}
	if err := replaceFile(t.TempDir()+"/no/exit", nil); err != unix.ENOENT {
		t.Errorf("no directory: %v", err)
	}
}
