package cni

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestPluginEnvironment(t *testing.T) {
	node := newNode(t)
	t.Setenv("SECRET_TOKEN", "x")
	t.Setenv("CNI_SOMETHING", "x")
	node.conf("10-net.conflist", node.list("pods", "1.0.0", fake{typ: "fake-a"}))
	if _, err := node.start().Attach(t.Context(), thePod("p1")); err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, kv := range node.calls()[0].Env {
		name, _, _ := strings.Cut(kv, "=")
		names = append(names, name)
	}
	slices.Sort(names)
	want := []string{"BERTH_CNI_CACHE", "CNI_ARGS", "CNI_COMMAND", "CNI_CONTAINERID", "CNI_IFNAME", "CNI_NETNS", "CNI_PATH", "PATH"}
	if !slices.Equal(names, want) {
		t.Errorf("got %v, want %v", names, want)
	}
}

func TestPluginFails(t *testing.T) {
	tests := []struct {
		do     string
		result string
		is     error
		want   []string // parts of the error
		not    string
	}{
		{do: "error", want: []string{"code 11", "no free addresses; of 10.1.0.0/24"}, not: "exit status"},
		{do: "stderr", want: []string{"exit status 2", "panic: something went wrong"}},
		{do: "silent", want: []string{"exit status 3", "without a word"}},
		{do: "signal", want: []string{"signal: killed"}},
		{do: "rubbish", is: ErrBadResult, want: []string{"no JSON object", "<html>"}},
		{do: "big", is: ErrOutputTooLarge, want: []string{"more than 1048576 bytes on stdout"}},
		{do: "bigerr", want: []string{"exit status 1", "yyy", "more bytes)"}},
		{result: `null`, is: ErrBadResult, want: []string{"no JSON object"}},
		{result: `{"cniVersion":"1.0.0","ips":[null]}`, is: ErrBadResult, want: []string{"ips[0]"}},
		{result: `{"cniVersion":"9.9.9"}`, want: []string{"9.9.9"}},
		{result: `{"cniVersion":"1.0.0"}`, is: ErrBadResult, want: []string{"0 addresses"}},
	}
	for _, tt := range tests {
		t.Run(tt.do+tt.result, func(t *testing.T) {
			node := newNode(t)
			node.conf("10-net.conflist", node.list("pods", "1.0.0", fake{typ: "fake-a", do: "ADD=" + tt.do, result: tt.result}))
			network := node.start()
			_, err := network.Attach(t.Context(), thePod("p1"))
			if err == nil {
				t.Fatal("no error")
			}
			for _, part := range append(tt.want, "pod shop/web-0 (p1): network pods: ") {
				if !strings.Contains(err.Error(), part) {
					t.Errorf("got %v, want %q in it", err, part)
				}
			}
			if tt.do != "" && !strings.Contains(err.Error(), "plugin fake-a: ADD: after ") {
				t.Errorf("got %v, want plugin, verb and time in it", err)
			}
			if tt.is != nil && !errors.Is(err, tt.is) {
				t.Errorf("got %v, want it to be %v", err, tt.is)
			}
			if tt.not != "" && strings.Contains(err.Error(), tt.not) {
				t.Errorf("got %v, want no %q in it", err, tt.not)
			}
			if len(err.Error()) > 3*maxDiagnostic {
				t.Errorf("error of %d bytes", len(err.Error()))
			}
			// Half an attachment is one: it can be removed.
			if err := network.Detach(t.Context(), thePod("p1")); err != nil {
				t.Error(err)
			}
			if got := node.verbs(); !slices.Contains(got, "DEL fake-a p1") {
				t.Errorf("calls: %v", got)
			}
		})
	}
}

func TestPluginHangs(t *testing.T) {
	tests := []struct {
		name    string
		timeout time.Duration
		cancel  bool
		is      error
	}{
		{"deadline of the verb", 300 * time.Millisecond, false, context.DeadlineExceeded},
		{"caller gives up", time.Minute, true, context.Canceled},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			node := newNode(t)
			node.cfg.Timeout = tt.timeout
			node.conf("10-net.conflist", node.list("pods", "1.0.0", fake{typ: "fake-a"}, fake{typ: "fake-b", do: "ADD=hang"}))
			network := node.start()
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			if tt.cancel {
				go func() {
					for len(node.calls()) < 2 {
						time.Sleep(5 * time.Millisecond)
					}
					cancel()
				}()
			} else {
				// The deadline has to be longer than a slow machine takes to start two plugins.
				network.cfg.Timeout = 2 * time.Second
			}
			start := time.Now()
			_, err := network.Attach(ctx, thePod("p1"))
			if !errors.Is(err, tt.is) || !strings.Contains(err.Error(), "plugin fake-b: ADD: after") {
				t.Errorf("got %v, want %v of fake-b", err, tt.is)
			}
			if d := time.Since(start); d > 15*time.Second {
				t.Errorf("took %v", d)
			}
			calls := node.calls()
			if len(calls) != 2 || calls[1].Child == 0 {
				t.Fatalf("calls: %+v", calls)
			}
			eventually(t, "plugin and child gone", func() bool { return gone(calls[1].PID) && gone(calls[1].Child) })
		})
	}
}

func TestChildrenOfAPluginThatEnded(t *testing.T) {
	tests := []struct {
		do       string
		survives bool
	}{
		{"daemon", false},
		{"session", true},
	}
	for _, tt := range tests {
		t.Run(tt.do, func(t *testing.T) {
			node := newNode(t)
			node.conf("10-net.conflist", node.list("pods", "1.0.0", fake{typ: "fake-a", do: "ADD=" + tt.do}))
			start := time.Now()
			res, err := node.start().Attach(t.Context(), thePod("p1"))
			if err != nil || len(res.IPs) != 2 {
				t.Fatalf("got %v, %v", res.IPs, err)
			}
			// The child holds stdout for five minutes.
			if d := time.Since(start); d > 20*time.Second {
				t.Errorf("took %v", d)
			}
			child := node.calls()[0].Child
			if tt.survives {
				if gone(child) {
					t.Error("a process in its own session was killed")
				}
				unix.Kill(child, unix.SIGKILL)
				return
			}
			eventually(t, "child gone", func() bool { return gone(child) })
		})
	}
}

// startMarked starts a process as a plugin of the cache directory mark would be.
func startMarked(t *testing.T, mark string, attr *unix.SysProcAttr) (pid int) {
	t.Helper()
	cmd := exec.Command("sleep", "300")
	cmd.Env = []string{markEnv + "=" + mark}
	cmd.SysProcAttr = attr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	pid = cmd.Process.Pid
	eventually(t, "mark of a process", func() bool { // the kernel sets it after Start has seen the exec
		env, err := readBounded("/proc/"+strconv.Itoa(pid)+"/environ", maxOutput)
		return err == nil && marked(env, mark)
	})
	return pid
}

func TestOrphans(t *testing.T) {
	node, other := newNode(t), newNode(t)
	ours := startMarked(t, node.cfg.CacheDir, &unix.SysProcAttr{Setpgid: true})
	daemon := startMarked(t, node.cfg.CacheDir, &unix.SysProcAttr{Setsid: true})
	theirs := startMarked(t, other.cfg.CacheDir, &unix.SysProcAttr{Setpgid: true})
	node.start()
	eventually(t, "orphan gone", func() bool { return gone(ours) })
	if gone(daemon) || gone(theirs) {
		t.Error("a daemon, or a plugin of another cache directory, was killed")
	}
}

// TestOrphansTooLate: once new plugins may run, nobody is killed as an old one.
func TestOrphansTooLate(t *testing.T) {
	mark := t.TempDir()
	startMarked(t, mark, &unix.SysProcAttr{Setpgid: true})
	over, cancel := context.WithCancel(t.Context())
	cancel()
	if n := killOrphans(over, mark); n != 0 {
		t.Errorf("%d killed after the end", n)
	}
	if n := killOrphans(t.Context(), mark); n != 1 {
		t.Errorf("%d killed in time, want 1", n)
	}
}

// TestSearchThatHangs: plugins do not wait for it for ever.
func TestSearchThatHangs(t *testing.T) {
	release := make(chan struct{})
	defer close(release)
	<-within(time.Millisecond, func(context.Context) { <-release })
	ran := false
	<-within(time.Hour, func(context.Context) { ran = true })
	if !ran {
		t.Error("not awaited")
	}
}

func TestBusyBinary(t *testing.T) {
	node := newNode(t)
	path := filepath.Join(node.cfg.BinDirs[1], "fake-c")
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(self)
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY, 0o700)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.Write(b); err != nil {
		t.Fatal(err)
	}
	node.conf("10-net.conflist", node.list("pods", "1.0.0", fake{typ: "fake-c"}))
	network := node.start()
	time.AfterFunc(200*time.Millisecond, func() { f.Close() })
	if _, err := network.Attach(t.Context(), thePod("p1")); err != nil {
		t.Error(err)
	}
}
