package critest

import (
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// tryExec runs a command and returns the plain answer.
func (c *container) tryExec(timeout int64, command ...string) (*runtime.ExecSyncResponse, error) {
	return c.client.ExecSync(c.ctx, &runtime.ExecSyncRequest{ContainerId: c.id, Cmd: command, Timeout: timeout})
}

func TestExec(t *testing.T) {
	b := open(t)
	c := b.pod().run(sh("sleep 300"), func(c *runtime.ContainerConfig) {
		c.WorkingDir, c.Envs = "/tmp", []*runtime.KeyValue{{Key: "SET", Value: []byte("yes")}}
	})
	for _, x := range []struct {
		name           string
		command        []string
		code           int32
		stdout, stderr string
	}{
		{"success", []string{"echo", "a", "b c"}, 0, "a b c\n", ""},
		{"both streams", sh("echo out; echo err >&2"), 0, "out\n", "err\n"},
		{"failure is an exit code, not an error", sh("echo sorry >&2; exit 7"), 7, "", "sorry\n"},
		{"killed by a signal", sh("kill -TERM $$"), 143, "", ""},
		{"environment and directory of the container", sh("echo $SET; pwd"), 0, "yes\n/tmp\n", ""},
		{"no input", []string{"cat"}, 0, "", ""},
		{"bytes that are no text", []string{"printf", `\000\377\n`}, 0, "\x00\xff\n", ""},
	} {
		r, err := c.tryExec(10, x.command...)
		if err != nil {
			t.Errorf("%s: %v", x.name, err)
			continue
		}
		if r.ExitCode != x.code || string(r.Stdout) != x.stdout || string(r.Stderr) != x.stderr {
			t.Errorf("%s: exit code %d, stdout %q, stderr %q; want %d, %q, %q", x.name, r.ExitCode, r.Stdout, r.Stderr, x.code, x.stdout, x.stderr)
		}
	}
	if text := c.text(); text != "" {
		t.Errorf("output of an exec is in the container's log: %q", text)
	}
}

func TestExecNotFound(t *testing.T) {
	b := open(t)
	c := b.pod().run(sh("sleep 300"))
	r, err := c.tryExec(10, "/no/such/program")
	// Both are known in the field; a success is not.
	if err == nil && r.ExitCode != 127 && r.ExitCode != 126 {
		t.Errorf("exit code %d, want an error or 127", r.ExitCode)
	}
	if err != nil && !strings.Contains(err.Error(), "/no/such/program") {
		t.Errorf("error does not name the program: %v", err)
	}
	if b.node != nil {
		_, err = c.tryExec(10)
		b.refused(err, codes.InvalidArgument, "cmd")
		_, err = c.tryExec(-1, "true")
		b.refused(err, codes.InvalidArgument, "timeout", "-1")
	}
	c.exec("true")
}

// TestExecTimeout: the exec is killed, with all its children, and nothing else.
func TestExecTimeout(t *testing.T) {
	b := open(t)
	c := b.pod().run(sh("sleep 300"))
	c.exec("sh", "-c", "sleep 4566 >/dev/null 2>&1 &") // another exec's child
	begin := time.Now()
	_, err := c.tryExec(1, "sh", "-c", "sleep 4567 & setsid sleep 4569 >/dev/null 2>&1 & sleep 4568")
	b.refused(err, codes.DeadlineExceeded)
	if d := time.Since(begin); d < 900*time.Millisecond || d > 30*time.Second {
		t.Errorf("took %v, want about a second", d)
	}
	processes := func() string { return c.exec("ps", "-o", "args") }
	b.until("end of the main process of the exec", func() bool { return !strings.Contains(processes(), "sleep 4568") })
	if b.node != nil {
		b.until("end of its children", func() bool {
			now := processes()
			return !strings.Contains(now, "sleep 4567") && !strings.Contains(now, "sleep 4569")
		})
	}
	if now := processes(); !strings.Contains(now, "sleep 4566") || !strings.Contains(now, "sleep 300") {
		t.Errorf("more than the exec was killed: %s", now)
	}
	if st := c.status(); st.State != running {
		t.Errorf("container is %v after an exec that timed out", st.State)
	}
}

// TestExecIdentity: an exec is the container's user with its groups, in its cgroup
// and namespaces, and may do what the container may.
func TestExecIdentity(t *testing.T) {
	b := open(t)
	c := b.pod().run(sh("/guest ids > /tmp/main; cat /proc/self/cgroup > /tmp/cgroup; sleep 300"), func(c *runtime.ContainerConfig) {
		c.Linux.SecurityContext.RunAsUser = &runtime.Int64Value{Value: 1234}
		c.Linux.SecurityContext.RunAsGroup = &runtime.Int64Value{Value: 2345}
		c.Linux.SecurityContext.SupplementalGroups = []int64{3456, 4567}
	})
	b.until("container's own IDs", func() bool {
		r, err := c.tryExec(10, "cat", "/tmp/cgroup")
		return err == nil && r.ExitCode == 0 && strings.Contains(string(r.Stdout), "\n")
	})
	if got := c.exec("/guest", "ids"); got != c.exec("cat", "/tmp/main") || !strings.Contains(got, "uid 1234 euid 1234 gid 2345") ||
		!strings.Contains(got, "3456") || !strings.Contains(got, "4567") {
		t.Errorf("exec has %q, the container %q", got, c.exec("cat", "/tmp/main"))
	}
	if got, want := c.exec("cat", "/proc/self/cgroup"), c.exec("cat", "/tmp/cgroup"); got != want {
		t.Errorf("exec is in %q, the container in %q", got, want)
	}
	for _, ns := range []string{"mnt", "net", "ipc", "uts", "pid"} {
		if got, want := c.exec("readlink", "/proc/self/ns/"+ns), c.exec("readlink", "/proc/1/ns/"+ns); got != want {
			t.Errorf("namespace %s: %s, want %s", ns, got, want)
		}
	}
	if r, err := c.tryExec(10, "sh", "-c", "echo x > /etc/passwd"); err != nil || r.ExitCode == 0 {
		t.Errorf("a user without rights wrote a file of root's: %v, %v", r, err)
	}
}

// TestExecBackgroundChild: a child that keeps the output open does not hold
// up the answer.
func TestExecBackgroundChild(t *testing.T) {
	b := open(t)
	b.ours()
	c := b.pod().run(sh("sleep 300"))
	begin := time.Now()
	r, err := c.tryExec(30, "/guest", "detach", "60")
	b.must(err)
	if d := time.Since(begin); d > 25*time.Second {
		t.Errorf("took %v, want a short drain", d)
	}
	if !strings.HasPrefix(string(r.Stdout), "detached\n") && !strings.Contains(string(r.Stdout), "\ndetached\n") {
		t.Errorf("stdout %q", r.Stdout)
	}
}

// TestExecOutputLimit: output beyond 16 MiB is cut, not collected, and the answer
// says so.
func TestExecOutputLimit(t *testing.T) {
	b := open(t)
	b.ours()
	const limit = 16 << 20
	c := b.pod().run(sh("sleep 300"))
	for _, x := range []struct {
		name    string
		command []string
		cut     bool
	}{
		{"below", []string{"/guest", "flood", fmt.Sprint(limit / 4), "100"}, false},
		{"stdout", []string{"/guest", "flood", fmt.Sprint(3 * limit), "100"}, true},
		{"stderr", sh(fmt.Sprintf("/guest flood %d 100 >&2", 3*limit)), true},
		{"both, each too much", sh(fmt.Sprintf("/guest flood %d 100; /guest flood %d 100 >&2", 3*limit, 3*limit)), true},
		{"both together more than a message", sh(fmt.Sprintf("/guest flood %d 100; /guest flood %d 100 >&2", limit/4*3, limit/4*3)), true},
	} {
		r, err := c.tryExec(60, x.command...)
		b.must(err)
		if n := len(r.Stdout) + len(r.Stderr); n > limit || x.cut && n < limit-4096 {
			t.Errorf("%s: %d bytes of output, limit %d", x.name, n, limit)
		}
		if said := strings.Contains(string(r.Stderr[max(0, len(r.Stderr)-200):]), "\n[output cut off at "); said != x.cut {
			t.Errorf("%s: the answer says that it was cut: %v, want %v", x.name, said, x.cut)
		}
		if r.ExitCode != 0 {
			t.Errorf("%s: exit code %d, want 0: the command is not to notice", x.name, r.ExitCode)
		}
	}
}

func TestExecMany(t *testing.T) {
	b := open(t)
	c := b.pod().run(sh("sleep 300"))
	var wg sync.WaitGroup
	for i := range 30 {
		wg.Go(func() {
			want := fmt.Sprintf("number %d\n", i)
			r, err := c.tryExec(30, "echo", "number", fmt.Sprint(i))
			if err != nil || string(r.Stdout) != want || r.ExitCode != 0 {
				t.Errorf("exec %d: %q, exit code %d, %v", i, r.GetStdout(), r.GetExitCode(), err)
			}
		})
	}
	wg.Wait()
	if got := c.exec("sh", "-c", "cat /proc/[0-9]*/stat 2>/dev/null"); strings.Contains(got, ") Z ") {
		t.Errorf("zombies are left: %s", got)
	}
}

// TestExecDuringStop: a running exec does not hold up the stop.
func TestExecDuringStop(t *testing.T) {
	b := open(t)
	c := b.pod().run([]string{"/guest", "signals"})
	c.sees("ready")
	done := make(chan error, 1)
	go func() { _, err := c.tryExec(60, "sleep", "60"); done <- err }()
	b.until("exec", func() bool { return strings.Contains(c.exec("ps", "-o", "args"), "sleep 60") })
	begin := time.Now()
	c.stop(20)
	if d := time.Since(begin); d > 18*time.Second {
		t.Errorf("stop took %v while an exec ran", d)
	}
	select {
	case <-done: // an error or exit code 137: the namespace's process 1 has ended
	case <-time.After(10 * time.Second):
		t.Error("the exec's call did not end with the container")
	}
}
