package shim_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/berthd/berth/shim"
)

func TestExec(t *testing.T) {
	c := newContainer(t, "/bin/sleep", "1000").run()
	big := strings.Repeat("x", 100<<10)
	tests := []struct {
		name   string
		r      shim.ExecRequest
		args   []string
		want   shim.ExecResult
		within time.Duration // 0: a minute
	}{
		{name: "output", args: []string{"sh", "-c", "echo out; echo err >&2; exit 3"},
			want: shim.ExecResult{ExitCode: 3, Stdout: []byte("out\n"), Stderr: []byte("err\n")}},
		{name: "signal", args: []string{"sh", "-c", "kill -9 $$"}, want: shim.ExecResult{ExitCode: 137}},
		{name: "stdin is empty", args: []string{"cat"}},
		{name: "large output", args: []string{"sh", "-c", "yes | head -c 1000000 | tr '\\n' x"}, r: shim.ExecRequest{MaxOutput: 2 << 20},
			want: shim.ExecResult{Stdout: []byte(strings.Repeat("yx", 500000))}},
		{name: "truncated", args: []string{"sh", "-c", "echo 0123456789; echo abcdefghijklm >&2; exit 1"}, r: shim.ExecRequest{MaxOutput: 5},
			want: shim.ExecResult{ExitCode: 1, Stdout: []byte("01234"), Stderr: []byte("abcde"), StdoutTruncated: true, StderrTruncated: true}},
		{name: "truncated exactly", args: []string{"echo", "0123"}, r: shim.ExecRequest{MaxOutput: 5},
			want: shim.ExecResult{Stdout: []byte("0123\n")}},
		{name: "truncated without end", args: []string{"sh", "-c", "yes | head -c 30000000"}, r: shim.ExecRequest{MaxOutput: 2},
			want: shim.ExecResult{Stdout: []byte("y\n"), StdoutTruncated: true}},
		{name: "background child", args: []string{"sh", "-c", "sleep 100 & echo out"}, r: shim.ExecRequest{Drain: 300 * time.Millisecond},
			want: shim.ExecResult{Stdout: []byte("out\n")}, within: 5 * time.Second},
		{name: "timeout", args: []string{"sh", "-c", "echo out; sleep 321"}, r: shim.ExecRequest{Timeout: 400 * time.Millisecond},
			want: shim.ExecResult{ExitCode: 137, Stdout: []byte("out\n"), TimedOut: true}, within: 5 * time.Second},
		{name: "timeout with children", args: []string{"sh", "-c", "trap '' TERM; (trap '' TERM; sleep 322 & sleep 323 & wait) & sleep 324; wait"}, r: shim.ExecRequest{Timeout: 400 * time.Millisecond},
			want: shim.ExecResult{ExitCode: 137, TimedOut: true}, within: 5 * time.Second},
		{name: "long argument", args: []string{"echo", "-n", big}, want: shim.ExecResult{Stdout: []byte(big)}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			began := time.Now()
			got, err := c.exec(test.r, test.args...)
			if err != nil {
				t.Fatal(err)
			}
			if test.within != 0 && time.Since(began) > test.within {
				t.Errorf("took %v", time.Since(began))
			}
			if g, w := fmt.Sprintf("%+v", got), fmt.Sprintf("%+v", test.want); g != w {
				t.Errorf("got %.300s\nwant %.300s", g, w)
			}
		})
	}
	got, err := c.exec(shim.ExecRequest{}, "ps", "-o", "args")
	mustT(t, err)
	if out := string(got.Stdout); strings.Contains(out, "sleep 32") {
		t.Errorf("a timeout left processes:\n%s", out)
	}
}

func TestExecFails(t *testing.T) {
	c := newContainer(t, "/bin/sleep", "1000")
	mustT(t, c.create())
	if _, err := c.exec(shim.ExecRequest{}, "true"); !errors.Is(err, shim.ErrState) {
		t.Errorf("before the start: %v, want ErrState", err)
	}
	mustT(t, c.c.Start(ctxFor(t, time.Minute)))
	if _, err := c.exec(shim.ExecRequest{}, "/bin/nothing"); !errors.Is(err, shim.ErrRuntime) || !strings.Contains(err.Error(), "/bin/nothing") {
		t.Errorf("no such executable: %v, want ErrRuntime", err)
	}
	ctx := ctxFor(t, time.Minute)
	if _, err := c.c.Exec(ctx, shim.ExecRequest{Process: []byte("{")}); !errors.Is(err, shim.ErrRuntime) {
		t.Errorf("no JSON: %v, want ErrRuntime", err)
	}
	if _, err := c.c.Exec(ctx, shim.ExecRequest{}); !errors.Is(err, shim.ErrInvalid) {
		t.Errorf("no process: %v, want ErrInvalid", err)
	}
	if _, err := c.c.Exec(ctx, shim.ExecRequest{Process: []byte("{}"), Timeout: -1}); !errors.Is(err, shim.ErrInvalid) {
		t.Errorf("negative timeout: %v, want ErrInvalid", err)
	}
	if _, err := c.c.Exec(ctx, shim.ExecRequest{Process: make([]byte, 9<<20)}); !errors.Is(err, shim.ErrInvalid) {
		t.Errorf("large process: %v, want ErrInvalid", err)
	}
}

// A runtime that is killed while it writes its pid file does not spoil the next
// exec.
func TestExecRuntimeKilled(t *testing.T) {
	c := newContainer(t, "/bin/sleep", "1000")
	once := c.path("once")
	mustT(t, os.WriteFile(once, nil, 0o600))
	c.fakeRuntime("case \"$*\" in *\" exec \"*) if rm " + once +
		"; then : >" + c.l.Bundle + "/.exec-1.pid; : >" + c.l.Bundle + "/exec-1.pid; kill -9 $$; fi;; esac")
	c.run()
	if r, err := c.exec(shim.ExecRequest{}, "true"); !errors.Is(err, shim.ErrRuntime) {
		t.Errorf("got %+v, %v; want ErrRuntime", r, err)
	}
	for range 2 {
		if r, err := c.exec(shim.ExecRequest{}, "true"); err != nil || r.ExitCode != 0 {
			t.Errorf("after it: %+v, %v", r, err)
		}
	}
}

// The runtime hangs before it has started the process.
func TestExecRuntimeHangs(t *testing.T) {
	c := newContainer(t, "/bin/sleep", "1000")
	c.fakeRuntime("case \"$*\" in *\" exec \"*) sleep 1000 & sleep 1000;; esac")
	c.run()
	r, err := c.exec(shim.ExecRequest{Timeout: 300 * time.Millisecond}, "true")
	if err != nil || !r.TimedOut {
		t.Errorf("got %+v, %v; want TimedOut", r, err)
	}
	// The container ends before the process has begun: that is no success.
	go func() {
		time.Sleep(300 * time.Millisecond)
		c.c.Kill(context.Background(), 9, false)
	}()
	if r, err = c.exec(shim.ExecRequest{}, "true"); err != nil || r.ExitCode != 137 {
		t.Errorf("got %+v, %v; want code 137", r, err)
	}
	c.exit()
}

// An exec whose caller has gone is killed, by its context or its connection.
func TestExecAbandoned(t *testing.T) {
	c := newContainer(t, "/bin/sleep", "1000").run()
	gone := func() bool {
		r, err := c.exec(shim.ExecRequest{}, "ps", "-o", "args")
		mustT(t, err)
		return !strings.Contains(string(r.Stdout), "sleep 3")
	}
	ctx, cancel := context.WithTimeout(context.Background(), 500*time.Millisecond)
	defer cancel()
	process := []byte(`{"args":["sleep","300"],"cwd":"/","env":["PATH=/bin"],"user":{"uid":0,"gid":0}}`)
	if _, err := c.c.Exec(ctx, shim.ExecRequest{Process: process}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v, want DeadlineExceeded", err)
	}
	waitFor(t, "the exec's end", gone)
	other, err := shim.Connect(ctxFor(t, time.Minute), c.l.Socket)
	mustT(t, err)
	done := make(chan error)
	go func() {
		_, err := other.Exec(context.Background(), shim.ExecRequest{Process: process})
		done <- err
	}()
	waitFor(t, "the exec", func() bool { return !gone() })
	other.Close()
	if err := <-done; !errors.Is(err, shim.ErrGone) {
		t.Errorf("got %v, want ErrGone", err)
	}
	waitFor(t, "the exec's end", gone)
}

// Execs run at once, and none of them delays another or a signal.
func TestExecsAtOnce(t *testing.T) {
	c := newContainer(t, "/bin/sleep", "1000").run()
	var wg sync.WaitGroup
	began := time.Now()
	for i := range 20 {
		wg.Go(func() {
			r, err := c.exec(shim.ExecRequest{}, "sh", "-c", fmt.Sprintf("echo %d; sleep 1; exit %d", i, i))
			if err != nil || r.ExitCode != i || string(r.Stdout) != fmt.Sprintln(i) {
				t.Errorf("exec %d: %+v, %v", i, r, err)
			}
		})
	}
	wg.Wait()
	if d := time.Since(began); d > 15*time.Second {
		t.Errorf("took %v", d)
	}
	// The container ends under a running exec.
	go func() {
		time.Sleep(300 * time.Millisecond)
		c.c.Kill(context.Background(), 9, false)
	}()
	if r, err := c.exec(shim.ExecRequest{}, "sleep", "100"); err != nil || r.ExitCode != 137 {
		t.Errorf("exec in a killed container: %+v, %v", r, err)
	}
	if e := c.exit(); e.Code != 137 {
		t.Errorf("got %+v", e)
	}
}

// Many execs leave no zombie, no descriptor, no file and little memory. Half of
// them leave an orphan to the shim, as the PID namespace is shared.
func TestManyExecs(t *testing.T) {
	c := newContainer(t, "/bin/sleep", "1000")
	c.sharePID()
	c.run()
	run := func(n int) {
		for i := range n {
			r, err := c.exec(shim.ExecRequest{}, "sh", "-c", fmt.Sprintf("(sleep 0.01 &) ; exit %d", i%200))
			if err != nil || r.ExitCode != i%200 {
				t.Fatalf("exec %d: %+v, %v", i, r, err)
			}
		}
	}
	run(64) // the Go runtime opens what it needs
	before := descriptors(t, c.up.ShimPID)
	private := rollup(t, c.up.ShimPID, "Pss_Anon")
	run(300)
	waitFor(t, "the orphans' end", func() bool { return len(children(t, c.up.ShimPID)) == 1 })
	if after := descriptors(t, c.up.ShimPID); len(after) != len(before) {
		t.Errorf("descriptors before: %v\nafter: %v", before, after)
	}
	after := rollup(t, c.up.ShimPID, "Pss_Anon")
	t.Logf("anonymous memory after 64 execs %d KiB, after 364 %d KiB", private, after)
	if after > private+256 {
		t.Errorf("memory grew from %d to %d KiB", private, after)
	}
}

func BenchmarkExec(b *testing.B) {
	c := newContainer(b, "/bin/sleep", "1000").run()
	for b.Loop() {
		if _, err := c.exec(shim.ExecRequest{}, "/bin/true"); err != nil {
			b.Fatal(err)
		}
	}
}
