package crash

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/berthd/berth/test/node"
)

// sample is what a node takes at a moment at which it has no pods.
type sample struct {
	goroutines, files int
	rssKiB            int // of berthd
	mounts            int // of the machine's mount table, the node's
	entries           int // of files and directories of the node
	diskKiB           int // of them, without the book
}

// sample measures after berthd has given back what it can.
func (s *soak) sample(metrics string) sample {
	s.Helper()
	time.Sleep(2 * time.Second) // connections and timers of the last calls
	var out sample
	var err error
	out.goroutines, err = node.Goroutines(metrics)
	s.must(err)
	out.files, err = s.Files()
	s.must(err)
	out.rssKiB, err = rss(s.Pid())
	s.must(err)
	m, err := s.Marks()
	s.must(err)
	for k := range m {
		if strings.HasPrefix(k, "mount:") {
			out.mounts++
		}
	}
	for _, dir := range []string{s.StateDir, s.RunDir} { // addresses are looked for by empty
		s.must(filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err != nil || filepath.Base(path) == "book.db" {
				return ignoreAbsent(err)
			}
			fi, err := d.Info()
			if err != nil {
				return ignoreAbsent(err)
			}
			out.entries++
			if st, ok := fi.Sys().(*syscall.Stat_t); ok {
				out.diskKiB += int(st.Blocks / 2)
			}
			return nil
		}))
	}
	return out
}

func ignoreAbsent(err error) error {
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}

// compare reports what has grown.
func (s sample) compare(t *testing.T, before sample) {
	t.Helper()
	for _, c := range []struct {
		name             string
		now, was, excess int
	}{
		{"goroutines", s.goroutines, before.goroutines, 5},
		{"file descriptors", s.files, before.files, 5},
		{"memory in KiB", s.rssKiB, before.rssKiB, 16<<10 + before.rssKiB/4},
		{"mounts", s.mounts, before.mounts, 0},
		{"files", s.entries, before.entries, 0},
		{"disk in KiB", s.diskKiB, before.diskKiB, 64},
	} {
		if c.now > c.was+c.excess {
			t.Errorf("%s: %d, was %d", c.name, c.now, c.was)
		}
	}
}

// rss is the resident memory of a process in KiB.
func rss(pid int) (int, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(text)) {
		if v, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			return strconv.Atoi(strings.Fields(v)[0])
		}
	}
	return 0, errors.New("no VmRSS")
}
