package cgroup

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
)

// Pids returns the processes in the group and in the groups below it, none twice
// unless one moves meanwhile. It looks at one hierarchy only, which makes it a
// good deal cheaper than [Group.Procs] and good enough to count. [ErrGone] if the
// group does not exist.
func (r *Reader) Pids() ([]int, error) {
	dir := r.dir("pids")
	if dir == "" {
		dir = r.dir("memory")
	}
	b := buffers.Get().(*[]byte)
	defer buffers.Put(b)
	r.keep = true
	fd, err := r.open(dir, "cgroup.procs")
	if missing(err) {
		r.Close()
		return nil, fmt.Errorf("control group %s: %w", r.g.path, ErrGone)
	}
	if err != nil {
		return nil, fmt.Errorf("control group %s: cgroup.procs: %w", r.g.path, err)
	}
	pids, err := list(fd, *b)
	switch {
	case errors.Is(err, unix.EOPNOTSUPP): // a threaded group: its processes are those of the domain above
	case missing(err):
		r.forget("cgroup.procs", fd)
		r.Close()
		return nil, fmt.Errorf("control group %s: %w", r.g.path, ErrGone)
	case err != nil:
		r.forget("cgroup.procs", fd)
		return nil, fmt.Errorf("control group %s: cgroup.procs: %w", r.g.path, err)
	}
	r.done("cgroup.procs", fd)
	// A directory has a link from each one in it.
	var st unix.Stat_t
	if unix.Stat(dir, &st) != nil || st.Nlink <= 2 {
		return pids, nil
	}
	for _, sub := range subgroups(dir) {
		more, err := readProcs(sub)
		if err != nil {
			return nil, fmt.Errorf("control group %s: %w", r.g.path, err)
		}
		pids = append(pids, more...)
	}
	return pids, nil
}

// list reads numbers, one a line, from the beginning of a file. Such a file comes
// in as many reads as the kernel likes. 0, a process of another PID namespace,
// is left out.
func list(fd int, buf []byte) (pids []int, err error) {
	kept, at := 0, int64(0)
	for {
		n, err := unix.Pread(fd, buf[kept:], at)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || n == 0 {
			return pids, err
		}
		at += int64(n)
		b := buf[:kept+n]
		for {
			line, rest, whole := bytes.Cut(b, []byte("\n"))
			if !whole {
				kept = copy(buf, b) // the beginning of a number
				break
			}
			pid, err := strconv.Atoi(string(line))
			if err != nil {
				return nil, fmt.Errorf("line %q", clip(string(line)))
			}
			if pid != 0 {
				pids = append(pids, pid)
			}
			b = rest
		}
		if kept == len(buf) {
			return nil, fmt.Errorf("line %q", clip(string(buf)))
		}
	}
}

// spareThreads is how many processes and threads an OCI runtime may take at a time
// to make a container.
const spareThreads = 16

// Crowded tells of the first group, of this one and those above it, that has room
// for so few processes that making a container may have failed for it: "… has 99 of
// at most 100 processes". "" for none.
func (g Group) Crowded() string {
	top := g.dir("pids")
	for p := g.path; top != "" && p != "/" && p != "."; p, top = filepath.Dir(p), filepath.Dir(top) {
		limit, err1 := readNumber(filepath.Join(top, "pids.max"))
		n, err2 := readNumber(filepath.Join(top, "pids.current"))
		if err1 == nil && err2 == nil && n+spareThreads > limit {
			return fmt.Sprintf("control group %s has %d of at most %d processes and threads", p, n, limit)
		}
	}
	return ""
}

// readNumber reads a file with a number, which "max" is not.
func readNumber(file string) (int, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(string(bytes.TrimSpace(b)))
}
