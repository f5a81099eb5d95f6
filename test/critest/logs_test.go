package critest

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestLogFormat(t *testing.T) {
	b := open(t)
	begin := time.Now()
	c := b.pod().run(sh("echo one; echo two >&2; echo; echo '  three  '; printf 'no newline'"))
	c.wait()
	entries := c.readLog(c.log)
	if got, want := join(entries, "stdout"), "one\n\n  three  \nno newline"; strings.TrimSuffix(got, "\n") != want {
		t.Errorf("stdout %q, want %q", got, want)
	}
	if got := join(entries, "stderr"); got != "two\n" {
		t.Errorf("stderr %q", got)
	}
	last := map[string]time.Time{}
	for i, e := range entries {
		if e.at.Before(begin.Add(-time.Second)) || e.at.After(time.Now()) || e.at.Before(last[e.stream]) {
			t.Errorf("entry %d: time %v, container run at %v, entry before at %v", i, e.at, begin, last[e.stream])
		}
		last[e.stream] = e.at
	}
	st, err := os.Stat(c.log)
	b.must(err)
	if got := st.Mode().Perm(); b.node != nil && got != 0o640 {
		t.Errorf("log has mode %04o, want 0640", got)
	}
}

// TestLogEmpty: the log is there from the start, for those who follow it.
func TestLogEmpty(t *testing.T) {
	b := open(t)
	c := b.pod().run(sh("sleep 300"))
	if got := c.readLog(c.log); len(got) != 0 {
		t.Errorf("log of a silent container: %v", got)
	}
}

// TestLogLongLines: a line is cut at 16 KiB; all parts but the last are
// tagged P, and together they are what was written.
func TestLogLongLines(t *testing.T) {
	b := open(t)
	const part = 16 << 10
	for _, c := range []struct {
		name   string
		length int
		parts  int
	}{
		{"below", part - 1, 1},
		{"two and a half", part*5/2 - 1, 3},
		{"many", 20 * part, 20},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := b.with(t)
			run := b.pod().run([]string{"/guest", "flood", fmt.Sprint(c.length + 1), fmt.Sprint(c.length + 1)})
			run.wait()
			entries := run.readLog(run.log)
			for i, e := range entries {
				if len(e.text) > part {
					t.Errorf("entry %d has %d bytes, limit %d", i, len(e.text), part)
				}
				if want := map[bool]string{true: "F", false: "P"}[i == len(entries)-1]; e.tag != want {
					t.Errorf("entry %d of %d is tagged %s", i, len(entries), e.tag)
				}
			}
			if got := len(join(entries, "stdout")); got != c.length+1 {
				t.Errorf("%d bytes logged, want %d", got, c.length+1)
			}
			if len(entries) < c.parts || len(entries) > c.parts+1 {
				t.Errorf("%d entries, want %d", len(entries), c.parts)
			}
		})
	}
}

func TestLogFast(t *testing.T) {
	b := open(t)
	const lines = 200000
	c := b.pod().run([]string{"/guest", "lines", fmt.Sprint(lines), "0"})
	c.wait()
	b.continuous(c.readLog(c.log), lines)
}

// continuous checks that "line 1" to "line last" are there, in order, once each.
func (b *box) continuous(entries []entry, last int) {
	b.Helper()
	for i, e := range entries {
		if want := fmt.Sprintf("line %d", i+1); e.text != want || e.tag != "F" {
			b.Fatalf("entry %d is %q %s, want %q F", i, e.text, e.tag, want)
		}
	}
	if len(entries) != last {
		b.Errorf("%d lines logged, want %d", len(entries), last)
	}
}

// TestLogReopen: what a rotation does: rename, then reopen, while output flows.
func TestLogReopen(t *testing.T) {
	b := open(t)
	const lines = 6000
	c := b.pod().run([]string{"/guest", "lines", fmt.Sprint(lines), "100"})
	var rotated []string
	for i := range 3 {
		time.Sleep(200 * time.Millisecond)
		old := fmt.Sprintf("%s.%d", c.log, i)
		b.must(os.Rename(c.log, old))
		rotated = append(rotated, old)
		_, err := b.client.ReopenContainerLog(b.ctx, &runtime.ReopenContainerLogRequest{ContainerId: c.id})
		b.must(err)
		if _, err := os.Stat(c.log); err != nil {
			t.Errorf("no new log after reopening: %v", err)
		}
	}
	c.wait()
	var all []entry
	for _, f := range append(rotated, c.log) {
		part := c.readLog(f)
		if len(part) == 0 {
			t.Errorf("%s is empty", filepath.Base(f))
		}
		all = append(all, part...)
	}
	b.continuous(all, lines)
	_, err := b.client.ReopenContainerLog(b.ctx, &runtime.ReopenContainerLogRequest{ContainerId: c.id})
	if err == nil {
		t.Error("reopening the log of an exited container: no error")
	} else if b.node != nil {
		b.refused(err, codes.FailedPrecondition, c.id[:12])
	}
}

// TestLogDirectoryMissing: the kubelet makes the directories of logs; one that
// is not there is told by its path.
func TestLogDirectoryMissing(t *testing.T) {
	b := open(t)
	p := b.pod()
	p.refuses(sh("true"), func(c *runtime.ContainerConfig) { c.LogPath = "no-such-dir/x.log" }, "no-such-dir")
}

// TestLogNone: without a log path a container runs all the same.
func TestLogNone(t *testing.T) {
	b := open(t)
	c := b.pod().run([]string{"/guest", "flood", "1000000", "100"}, func(c *runtime.ContainerConfig) { c.LogPath = "" })
	if st := c.wait(); st.ExitCode != 0 {
		t.Errorf("exit code %d", st.ExitCode)
	}
}

// TestLogBackgroundChild: a process that outlives the main one is killed, and
// the container's end is not held up by its open pipe.
func TestLogBackgroundChild(t *testing.T) {
	b := open(t)
	begin := time.Now()
	c := b.pod().run(sh("sleep 300 & echo started; exit 5"))
	if st := c.wait(); st.ExitCode != 5 {
		t.Errorf("exit code %d, want 5", st.ExitCode)
	}
	if d := time.Since(begin); d > 15*time.Second {
		t.Errorf("took %v", d)
	}
	if got := c.text(); got != "started\n" {
		t.Errorf("log %q", got)
	}
}

func TestTerminal(t *testing.T) {
	b := open(t)
	c := b.pod().run(sh("tty; echo to stderr >&2"), func(c *runtime.ContainerConfig) { c.Tty = true })
	c.wait()
	entries := c.readLog(c.log)
	text := strings.ReplaceAll(join(entries, "stdout"), "\r", "")
	if !strings.HasPrefix(text, "/dev/") || !strings.Contains(text, "to stderr\n") {
		t.Errorf("log %q, want a terminal's name and both streams as one", text)
	}
	if got := join(entries, "stderr"); got != "" {
		t.Errorf("stderr %q: a terminal has one stream", got)
	}
}
