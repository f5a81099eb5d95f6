package shim_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berthd/berth/shim"
)

func TestExitCodes(t *testing.T) {
	tests := []struct {
		name, script string
		code, signal int
	}{
		{"zero", "exit 0", 0, 0},
		{"three", "exit 3", 3, 0},
		{"a child's signal", "sh -c 'kill -9 $$'; exit $?", 137, 0},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			c := newContainer(t, "/bin/sh", "-c", test.script).run()
			if e := c.exit(); e.Code != test.code || e.Signal != test.signal || e.OOMKilled || time.Since(e.At) > time.Minute {
				t.Errorf("got %+v, want code %d, signal %d", e, test.code, test.signal)
			}
			<-c.c.Gone()
		})
	}
}

func TestLifecycle(t *testing.T) {
	c := newContainer(t, "/bin/sleep", "1000")
	mustT(t, c.create())
	ctx := ctxFor(t, time.Minute)
	s, err := c.c.State(ctx)
	if err != nil || s.Status != shim.StatusCreated || s.Pid != c.up.Pid || s.ShimPID != c.up.ShimPID || s.Exit != nil {
		t.Fatalf("state %+v, %v", s, err)
	}
	if _, err := os.Stat(c.l.LogPath); err != nil {
		t.Errorf("log does not exist before the first output: %v", err)
	}
	mustT(t, c.c.Start(ctx))
	if err := c.c.Start(ctx); !errors.Is(err, shim.ErrState) {
		t.Errorf("second start: %v, want ErrState", err)
	}
	if s, err = c.c.State(ctx); err != nil || s.Status != shim.StatusRunning {
		t.Errorf("state %+v, %v", s, err)
	}
	for _, sig := range []int{0, 65, -1} {
		if err := c.c.Kill(ctx, sig, false); !errors.Is(err, shim.ErrInvalid) {
			t.Errorf("signal %d: %v, want ErrInvalid", sig, err)
		}
	}
	list, err := shim.ListShims(c.dir)
	if err != nil || len(list) != 1 || list[c.id] != c.up.ShimPID {
		t.Errorf("ListShims: %v, %v; want %s: %d", list, err, c.id, c.up.ShimPID)
	}
	if list, err := shim.ListShims(c.dir + "x"); err != nil || len(list) != 0 {
		t.Errorf("ListShims elsewhere: %v, %v", list, err)
	}
	unix.Kill(c.up.ShimPID, unix.SIGTERM)
	unix.Kill(c.up.ShimPID, unix.SIGHUP)
	mustT(t, c.c.Kill(ctx, 9, false))
	if e := c.exit(); e.Code != 137 || e.Signal != 9 || e.OOMKilled {
		t.Errorf("got %+v", e)
	}
	<-c.c.Gone()
	if err := c.c.Start(ctx); !errors.Is(err, shim.ErrGone) {
		t.Errorf("start after the end: %v, want ErrGone", err)
	}
}

func TestKillAll(t *testing.T) {
	for _, private := range []bool{true, false} {
		t.Run(fmt.Sprintf("private=%v", private), func(t *testing.T) {
			// Both shells end on SIGTERM with a word, the init waits for its child.
			c := newContainer(t, "/bin/sh", "-c",
				`trap : TERM; sh -c 'trap "echo child; exit 0" TERM; echo up; while :; do sleep 0.05; done' & wait; wait; echo init`)
			if !private {
				c.sharePID()
			}
			c.run()
			waitFor(t, "the child", func() bool { return strings.Contains(c.log(), "up") })
			mustT(t, c.c.Kill(ctxFor(t, time.Minute), int(unix.SIGTERM), true))
			c.exit()
			if got := output(t, c.log(), "stdout"); got != "up\nchild\ninit\n" {
				t.Errorf("log %q", got)
			}
		})
	}
}

func TestShutdown(t *testing.T) {
	for _, when := range []string{"created", "running"} {
		t.Run(when, func(t *testing.T) {
			c := newContainer(t, "/bin/sleep", "1000")
			mustT(t, c.create())
			if when == "running" {
				mustT(t, c.c.Start(ctxFor(t, time.Minute)))
			}
			mustT(t, c.c.Shutdown(ctxFor(t, time.Minute)))
			if e := c.exit(); e.Code != 137 || e.Reason != "shut down" {
				t.Errorf("got %+v", e)
			}
		})
	}
}

// A runtime that hangs in its start keeps neither Shutdown nor, when the shim is
// killed, itself.
func TestRuntimeHangsInStart(t *testing.T) {
	for _, killed := range []bool{false, true} {
		t.Run(map[bool]string{false: "shut down", true: "killed"}[killed], func(t *testing.T) {
			c := newContainer(t, "/bin/sleep", "1000")
			pidFile := c.path("hung.pid")
			c.fakeRuntime("case \"$*\" in *\" start \"*) echo $$ >" + pidFile + "; exec sleep 1000;; esac")
			mustT(t, c.create())
			go c.c.Start(context.Background())
			pid := 0
			waitFor(t, "the runtime's start", func() bool {
				b, err := os.ReadFile(pidFile)
				if err == nil {
					pid, err = strconv.Atoi(strings.TrimSpace(string(b)))
				}
				return err == nil
			})
			begun := time.Now()
			if killed {
				mustT(t, unix.Kill(c.up.ShimPID, unix.SIGKILL))
				defer c.runtimeDelete()
			} else {
				mustT(t, c.c.Shutdown(ctxFor(t, time.Minute)))
			}
			waitFor(t, "the end of the runtime", func() bool { return unix.Kill(pid, 0) == unix.ESRCH })
			if d := time.Since(begun); d > 8*time.Second {
				t.Errorf("took %v", d)
			}
		})
	}
}

// A process that stays behind in a shared PID namespace is killed, and its hold
// on the output does not delay the exit.
func TestSharedPIDNamespaceIsEmptied(t *testing.T) {
	c := newContainer(t, "/bin/sh", "-c", "sleep 1234 & sleep 1235 & sleep 0.2; exit 4")
	c.sharePID()
	c.l.DrainTimeout = 30 * time.Second
	c.run()
	began := time.Now()
	if e := c.exit(); e.Code != 4 {
		t.Errorf("got %+v", e)
	}
	if d := time.Since(began); d > 10*time.Second {
		t.Errorf("exit took %v", d)
	}
	waitFor(t, "the cgroup's end", func() bool { _, err := os.Stat(memoryCgroup(c.id)); return os.IsNotExist(err) })
}

func TestCreateFails(t *testing.T) {
	check := func(t *testing.T, c *container, want error, text string) {
		t.Helper()
		err := c.create()
		if err == nil || want != nil && !errors.Is(err, want) || !strings.Contains(err.Error(), text) {
			t.Errorf("got %v, want %v with %q", err, want, text)
		}
		waitFor(t, "the shim's end", func() bool { l, err := shim.ListShims(c.dir); return err == nil && len(l) == 0 })
		if _, err := os.Stat(c.l.Socket); err == nil {
			t.Error("socket is still there")
		}
		if names, _ := os.ReadDir(c.l.RuntimeRoot); len(names) > 0 {
			t.Errorf("runtime state is still there: %v", names)
		}
	}
	t.Run("no such executable", func(t *testing.T) {
		check(t, newContainer(t, "/bin/nothing"), shim.ErrRuntime, "/bin/nothing")
	})
	t.Run("no such runtime", func(t *testing.T) {
		c := newContainer(t, "/bin/true")
		c.l.Runtime = "/nothing/runtime"
		check(t, c, shim.ErrRuntime, "no such file")
	})
	t.Run("mount", func(t *testing.T) {
		c := newContainer(t, "/bin/true")
		c.l.Mounts[0].Options[0] = "lowerdir=/nothing/lower"
		check(t, c, nil, "mount")
	})
	t.Run("log directory", func(t *testing.T) {
		c := newContainer(t, "/bin/true")
		c.l.LogPath = c.path("nothing/0.log")
		check(t, c, nil, "nothing/0.log")
	})
	t.Run("log is a link", func(t *testing.T) {
		c := newContainer(t, "/bin/true")
		mustT(t, os.Symlink("/dev/null", c.l.LogPath))
		check(t, c, nil, c.l.LogPath)
	})
	t.Run("log line limit", func(t *testing.T) {
		c := newContainer(t, "/bin/true")
		c.l.MaxLogLine = 5
		check(t, c, shim.ErrInvalid, "MaxLogLine")
	})
	t.Run("hang", func(t *testing.T) {
		c := newContainer(t, "/bin/true")
		c.fakeRuntime("case \"$*\" in *create*) sleep 1000 & sleep 1000;; esac")
		c.l.CreateTimeout = 300 * time.Millisecond
		check(t, c, shim.ErrTimeout, "runtime create")
	})
	t.Run("no pid file", func(t *testing.T) {
		c := newContainer(t, "/bin/true")
		c.l.Runtime = "/bin/true"
		check(t, c, shim.ErrRuntime, "pid file")
	})
}

// The client ends while the runtime creates: the shim goes on.
func TestClientEndsDuringCreate(t *testing.T) {
	c := newContainer(t, "/bin/sh", "-c", "exit 7")
	c.fakeRuntime("case \"$*\" in *create*) sleep 0.5;; esac")
	mustT(t, writeSpec(c))
	bin, err := builtShim()
	mustT(t, err)
	if _, _, err := shim.Run(ctxFor(t, 200*time.Millisecond), bin, c.l); err == nil {
		t.Fatal("Run was not ended by its context")
	}
	c.c, err = shim.Connect(ctxFor(t, time.Minute), c.l.Socket)
	mustT(t, err)
	waitFor(t, "the create", func() bool {
		s, err := c.c.State(ctxFor(t, time.Minute))
		mustT(t, err)
		c.up = shim.Launched{ShimPID: s.ShimPID, Pid: s.Pid}
		return s.Status == shim.StatusCreated
	})
	defer c.cleanup()
	mustT(t, c.c.Start(ctxFor(t, time.Minute)))
	if e := c.exit(); e.Code != 7 {
		t.Errorf("got %+v", e)
	}
}

func TestShutdownDuringCreate(t *testing.T) {
	c := newContainer(t, "/bin/true")
	c.fakeRuntime("case \"$*\" in *create*) sleep 1000;; esac")
	mustT(t, writeSpec(c))
	bin, err := builtShim()
	mustT(t, err)
	if _, _, err := shim.Run(ctxFor(t, 200*time.Millisecond), bin, c.l); err == nil {
		t.Fatal("Run was not ended by its context")
	}
	other, err := shim.Connect(ctxFor(t, time.Minute), c.l.Socket)
	mustT(t, err)
	defer other.Close()
	mustT(t, other.Shutdown(ctxFor(t, time.Minute)))
	waitFor(t, "the shim's end", func() bool { l, err := shim.ListShims(c.dir); return err == nil && len(l) == 0 })
}

func TestConnectAgain(t *testing.T) {
	c := newContainer(t, "/bin/sh", "-c", "read x; exit 5")
	c.l.Stdin = true
	c.run()
	c.c.Close()
	if err := c.c.Kill(ctxFor(t, time.Minute), 15, false); !errors.Is(err, shim.ErrGone) {
		t.Errorf("kill on a closed client: %v, want ErrGone", err)
	}
	var err error
	c.c, err = shim.Connect(ctxFor(t, time.Minute), c.l.Socket)
	mustT(t, err)
	if c.c.ID() != c.id {
		t.Errorf("ID %q", c.c.ID())
	}
	second, err := shim.Connect(ctxFor(t, time.Minute), c.l.Socket)
	mustT(t, err)
	defer second.Close()
	mustT(t, c.c.WriteStdin(ctxFor(t, time.Minute), []byte("x\n"), false))
	if e := <-second.Exited(); e.Code != 5 {
		t.Errorf("second client: got %+v", e)
	}
	if e := c.exit(); e.Code != 5 {
		t.Errorf("got %+v", e)
	}
	<-c.c.Gone()
	if _, err := shim.Connect(ctxFor(t, time.Minute), c.l.Socket); !errors.Is(err, shim.ErrGone) {
		t.Errorf("connect after the end: %v, want ErrGone", err)
	}
}

// A socket whose path is longer than an address, and an exit record that cannot
// be written: the exit is told all the same.
func TestLongSocketAndNoExitFile(t *testing.T) {
	c := newContainer(t, "/bin/sh", "-c", "read x; exit 5")
	deep := c.path(strings.Repeat("deep/", 30))
	mustT(t, os.MkdirAll(deep, 0o700))
	c.l.Socket = deep + "/" + c.id + ".sock"
	c.l.ExitFile = c.path("nothing/exit")
	c.l.Stdin = true
	c.run()
	other, err := shim.Connect(ctxFor(t, time.Minute), c.l.Socket)
	mustT(t, err)
	defer other.Close()
	st, err := os.Stat(c.l.Socket)
	if err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("socket: %v, %v", st, err)
	}
	mustT(t, other.WriteStdin(ctxFor(t, time.Minute), []byte("x\n"), false))
	if e := <-other.Exited(); e.Code != 5 || !strings.Contains(e.Reason, "exit record not written") {
		t.Errorf("got %+v", e)
	}
	// The shim is there until the record is, or somebody has had enough of it.
	mustT(t, os.Mkdir(filepath.Dir(c.l.ExitFile), 0o700))
	mustEnd(t, other)
	if e, err := shim.ReadExit(c.l.ExitFile); err != nil || e.Code != 5 || e.Reason != "" {
		t.Errorf("exit record: %+v, %v", e, err)
	}
}

// TestShutdownWithoutAnExitRecord: a shim that cannot write it ends when it is told to.
func TestShutdownWithoutAnExitRecord(t *testing.T) {
	c := newContainer(t, "/bin/sh", "-c", "exit 5")
	c.l.ExitFile = c.path("nothing/exit")
	c.run()
	if e := <-c.c.Exited(); e.Code != 5 {
		t.Errorf("got %+v", e)
	}
	mustT(t, c.c.Shutdown(ctxFor(t, time.Minute)))
	mustEnd(t, c.c)
}

func TestShimKilled(t *testing.T) {
	c := newContainer(t, "/bin/sleep", "1000")
	c.run()
	mustT(t, unix.Kill(c.up.ShimPID, unix.SIGKILL))
	select {
	case <-c.c.Gone():
	case <-time.After(10 * time.Second):
		t.Fatal("client did not notice")
	}
	if _, err := shim.ReadExit(c.l.ExitFile); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("exit record: %v, want none", err)
	}
	if _, err := c.exec(shim.ExecRequest{}, "/bin/true"); !errors.Is(err, shim.ErrGone) {
		t.Errorf("exec: %v, want ErrGone", err)
	}
	if _, err := shim.Connect(ctxFor(t, time.Minute), c.l.Socket); !errors.Is(err, shim.ErrGone) {
		t.Errorf("connect: %v, want ErrGone", err)
	}
	c.runtimeDelete()
}

func TestOOM(t *testing.T) {
	c := newContainer(t, "/bin/sh", "-c", "x=$(yes | head -c 200000000 | tr -d '\\n'); echo done")
	c.linux()["resources"] = map[string]any{"memory": map[string]any{"limit": 32 << 20}}
	c.l.OOMFile = oomFile(c.id)
	c.run()
	if e := c.exit(); !e.OOMKilled || e.Code != 137 {
		t.Errorf("got %+v, want OOMKilled", e)
	}
}

func TestOOMFileWithoutOOM(t *testing.T) {
	c := newContainer(t, "/bin/sh", "-c", "kill -9 $$; exit 9")
	c.l.OOMFile = oomFile(c.id)
	c.run()
	if e := c.exit(); e.OOMKilled {
		t.Errorf("got %+v", e)
	}
}
