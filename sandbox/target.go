package sandbox

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// A container in the PID namespace of another one, its target, is told the
// namespace by a file that this daemon holds open, and not by the number of a
// process: the target may end at any time, and its number pass to somebody else.

// openTarget opens the PID namespace of a container that runs. Everything is
// looked up below one open directory of /proc, which is that process and no later
// one; that it is the container's shows in its cgroup, whose path is given, as
// plugins may have chosen it.
func openTarget(c *container, group string) (*os.File, error) {
	gone := func(err error) error {
		return fmt.Errorf("%w: PID namespace of container %s, which may have ended: %w", ErrState, c.ID, err)
	}
	dir, err := os.OpenFile("/proc/"+strconv.Itoa(c.Pid), unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, gone(err)
	}
	defer dir.Close()
	groups, err := openBelow(dir, "cgroup")
	if err != nil {
		return nil, gone(err)
	}
	defer groups.Close()
	text, err := io.ReadAll(io.LimitReader(groups, 1<<20))
	if err != nil {
		return nil, gone(err)
	}
	if !bytes.Contains(text, []byte(c.ID)) && (len(group) < 2 || !bytes.Contains(text, []byte(group))) {
		return nil, gone(fmt.Errorf("process %d is another one by now", c.Pid))
	}
	ns, err := openBelow(dir, "ns/pid")
	if err != nil {
		return nil, gone(err)
	}
	return ns, nil
}

func openBelow(dir *os.File, name string) (*os.File, error) {
	fd, err := unix.Openat(int(dir.Fd()), name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "openat", Path: dir.Name() + "/" + name, Err: err}
	}
	return os.NewFile(uintptr(fd), dir.Name()+"/"+name), nil
}

// heldPath is how other processes find a file that this one holds open.
func heldPath(f *os.File) string {
	return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), f.Fd())
}

// joinTarget opens the PID namespace that the container is to join, if it is that
// of another container. What it returns has to be closed when the runtime has
// created the container.
func (s *Service) joinTarget(plan *containerPlan) (*os.File, error) {
	if plan.target == "" {
		return nil, nil
	}
	t, err := s.book.view().container(plan.target)
	if err != nil {
		return nil, err
	}
	f, err := openTarget(t, s.groupOf(t).Path())
	if err != nil {
		return nil, err
	}
	plan.in.PID.Path = heldPath(f)
	return f, nil
}
