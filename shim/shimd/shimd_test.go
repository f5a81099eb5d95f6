package shimd

import (
	"os"
	osexec "os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berthd/berth/shim/wire"
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
	calls, err := mountPlan([]wire.Mount{
		{Type: "overlay", Source: "overlay", Options: []string{"lowerdir=1"}, Dir: "/layers"},
		{Type: "bind", Source: "/x", Options: []string{"rbind", "ro"}, Target: "vol-0"},
	}, "/root", "/bundle")
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
	if _, err := mountPlan([]wire.Mount{{Type: "overlay", Options: long}}, "/root", "/bundle"); err != unix.E2BIG {
		t.Errorf("options of more than a page: %v", err)
	}
	if _, err := mountPlan([]wire.Mount{{Type: "bind", Source: "a\x00b"}}, "/root", "/bundle"); err == nil {
		t.Error("a NUL was accepted")
	}
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
		"MaxLogLine":    func(l *wire.Launch) { l.MaxLogLine = 65 << 10 },
		"DrainTimeout":  func(l *wire.Launch) { l.DrainTimeout = -1 },
		"CreateTimeout": func(l *wire.Launch) { l.CreateTimeout = 2 * time.Hour },
		"OOMScoreAdj":   func(l *wire.Launch) { l.OOMScoreAdj = &score },
	}
	for field, spoil := range bad {
		l := good
		spoil(&l)
		if e := check(&l); e == nil || e.Step != field || e.Code != wire.CodeInvalid {
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
