package shim_test

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berthd/berth/shim"
)

func TestLog(t *testing.T) {
	c := newContainer(t, "/bin/sh", "-c", `echo out; echo err >&2; head -c 40000 /dev/zero | tr '\0' x; echo; printf unended`)
	c.run()
	c.exit()
	log := c.log()
	long := strings.Repeat("x", 40000)
	if got := output(t, log, "stdout"); got != "out\n"+long+"\nunended\n" {
		t.Errorf("stdout: %d bytes: %.100q", len(got), got)
	}
	if got := output(t, log, "stderr"); got != "err\n" {
		t.Errorf("stderr: %q", got)
	}
	var tags string
	for line := range strings.Lines(log) {
		f := strings.SplitN(line, " ", 4)
		if len(f[3]) > 16<<10+1 {
			t.Errorf("record of %d bytes", len(f[3]))
		}
		if f[1] == "stdout" {
			tags += f[2]
		}
	}
	if tags != "FPPFF" {
		t.Errorf("tags %s, want FPPFF", tags)
	}
	st, err := os.Stat(c.l.LogPath)
	mustT(t, err)
	if st.Mode() != 0o640 {
		t.Errorf("mode %v", st.Mode())
	}
}

func TestNoLog(t *testing.T) {
	c := newContainer(t, "/bin/sh", "-c", "seq 100000; exit 2")
	c.l.LogPath = ""
	c.run()
	if e := c.exit(); e.Code != 2 {
		t.Errorf("got %+v", e)
	}
}

func TestStdin(t *testing.T) {
	c := newContainer(t, "/bin/sh", "-c", "cat; echo end")
	c.l.Stdin, c.l.StdinOnce = true, true
	c.run()
	ctx := ctxFor(t, time.Minute)
	// More than a pipe and a frame hold.
	text := strings.Repeat("0123456789abcde\n", 20000)
	mustT(t, c.c.WriteStdin(ctx, []byte(text), false))
	mustT(t, c.c.WriteStdin(ctx, nil, true))
	if e := c.exit(); e.Code != 0 {
		t.Errorf("got %+v", e)
	}
	if got := output(t, c.log(), "stdout"); got != text+"end\n" {
		t.Errorf("log of %d bytes, want %d", len(got), len(text)+4)
	}
}

func TestNoStdin(t *testing.T) {
	c := newContainer(t, "/bin/sh", "-c", "cat; sleep 0.5; echo end")
	c.run()
	if err := c.c.WriteStdin(ctxFor(t, time.Minute), []byte("x"), false); !errors.Is(err, shim.ErrState) {
		t.Errorf("got %v, want ErrState", err)
	}
	c.exit()
	if got := output(t, c.log(), "stdout"); got != "end\n" {
		t.Errorf("log %q", got)
	}
}

// A write that the container does not take waits, and ends with the container.
func TestStdinOfContainerThatDoesNotRead(t *testing.T) {
	c := newContainer(t, "/bin/sleep", "1000")
	c.l.Stdin = true
	c.run()
	done := make(chan error, 1)
	go func() { done <- c.c.WriteStdin(ctxFor(t, time.Minute), make([]byte, 1<<20), false) }()
	time.Sleep(200 * time.Millisecond)
	if err := c.c.WriteStdin(ctxFor(t, time.Minute), []byte("x"), false); !errors.Is(err, shim.ErrBusy) {
		t.Errorf("second write: %v, want ErrBusy", err)
	}
	mustT(t, c.c.Kill(ctxFor(t, time.Minute), 9, false))
	if err := <-done; !errors.Is(err, shim.ErrState) {
		t.Errorf("got %v, want ErrState", err)
	}
	c.exit()
}

func TestTerminal(t *testing.T) {
	c := newContainer(t, "/bin/sh", "-c", "tty; read x; echo got $x; read x; exit 6")
	c.l.Terminal, c.l.Stdin = true, true
	c.process["terminal"] = true
	c.run()
	ctx := ctxFor(t, time.Minute)
	mustT(t, c.c.WriteStdin(ctx, []byte("hello\n"), false))
	waitFor(t, "the answer", func() bool { return strings.Contains(c.log(), "got hello") })
	mustT(t, c.c.WriteStdin(ctx, []byte("\n"), true))
	if e := c.exit(); e.Code != 6 {
		t.Errorf("got %+v", e)
	}
	if got := output(t, c.log(), "stdout"); !strings.Contains(got, "/dev/pts/0\r\n") {
		t.Errorf("log %q", got)
	}
}

// A process that was left behind and holds the output delays the exit by the
// drain timeout at most.
func TestDrainTimeout(t *testing.T) {
	c := newContainer(t, "/bin/sh", "-c", "sleep 1234 & echo out; exit 1")
	c.sharePID()
	c.l.CgroupKill = nil // nothing is killed
	c.l.DrainTimeout = 500 * time.Millisecond
	c.run()
	began := time.Now()
	if e := c.exit(); e.Code != 1 {
		t.Errorf("got %+v", e)
	}
	if d := time.Since(began); d > 5*time.Second {
		t.Errorf("exit took %v", d)
	}
	if got := output(t, c.log(), "stdout"); got != "out\n" {
		t.Errorf("log %q", got)
	}
}

// ReopenLog under load loses no line and tears none.
func TestReopenLog(t *testing.T) {
	const lines = 400000
	c := newContainer(t, "/bin/sh", "-c", fmt.Sprintf("seq 1 %d", lines))
	c.run()
	var files []string
	for i := 0; ; i++ {
		name := fmt.Sprintf("%s.%d", c.l.LogPath, i)
		if err := os.Rename(c.l.LogPath, name); err != nil {
			t.Fatal(err)
		}
		files = append(files, name)
		if err := c.c.ReopenLog(ctxFor(t, time.Minute)); err != nil {
			if errors.Is(err, shim.ErrGone) {
				break
			}
			t.Fatal(err)
		}
		select {
		case <-c.c.Gone():
			i = 1 << 30
		case <-time.After(2 * time.Millisecond):
		}
		if i == 1<<30 {
			break
		}
	}
	files = append(files, c.l.LogPath)
	var all strings.Builder
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil && !os.IsNotExist(err) {
			t.Fatal(err)
		}
		all.Write(b)
	}
	var want strings.Builder
	for i := 1; i <= lines; i++ {
		fmt.Fprintln(&want, i)
	}
	if got := output(t, all.String(), "stdout"); got != want.String() {
		t.Errorf("%d bytes, want %d, in %d files", len(got), want.Len(), len(files))
	}
	t.Logf("%d log files", len(files))
}

func TestReopenLogFails(t *testing.T) {
	c := newContainer(t, "/bin/sh", "-c", "read x; echo after")
	c.l.Stdin = true
	c.run()
	old := c.l.LogPath + ".old"
	mustT(t, os.Rename(c.l.LogPath, old))
	mustT(t, os.Mkdir(c.l.LogPath, 0o755))
	if err := c.c.ReopenLog(ctxFor(t, time.Minute)); err == nil || !strings.Contains(err.Error(), c.l.LogPath) {
		t.Errorf("got %v", err)
	}
	mustT(t, c.c.WriteStdin(ctxFor(t, time.Minute), []byte("\n"), false))
	c.exit()
	b, err := os.ReadFile(old)
	if err != nil || output(t, string(b), "stdout") != "after\n" {
		t.Errorf("old log %q, %v", b, err)
	}
}

// A full log disk neither stops the container nor its end, and the log tells.
func TestLogDiskFull(t *testing.T) {
	c := newContainer(t, "/bin/sh", "-c", "seq 1 200000; echo marker >&2; read x; echo after; exit 3")
	c.l.Stdin = true
	disk := c.path("logs")
	mustT(t, unix.Mount("tmpfs", disk, "tmpfs", 0, "size=64k"))
	t.Cleanup(func() { unix.Unmount(disk, unix.MNT_DETACH) })
	c.run()
	waitFor(t, "the full disk", func() bool {
		var st unix.Statfs_t
		return unix.Statfs(disk, &st) == nil && st.Bavail == 0
	})
	time.Sleep(300 * time.Millisecond) // the rest of the output is dropped
	mustT(t, unix.Mount("tmpfs", disk, "tmpfs", unix.MS_REMOUNT, "size=10m"))
	mustT(t, c.c.WriteStdin(ctxFor(t, time.Minute), []byte("\n"), false))
	if e := c.exit(); e.Code != 3 {
		t.Errorf("got %+v", e)
	}
	log := strings.Split(strings.TrimSpace(c.log()), "\n")
	if n := len(log); !strings.HasSuffix(log[n-1], " stdout F after") || !strings.Contains(log[n-2], "bytes of log dropped: no space left") {
		t.Errorf("log ends %q", log[max(0, n-3):])
	}
}
