package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// adapt fits this process to its job: it has to be root, its files get the
// modes they are made with, and the kernel's choice of what to kill passes it
// by. The limit of open files needs nothing: Go raises it to the hard limit,
// and gives children the soft one that berthd was started with.
func adapt(c *config) error {
	if uid := os.Geteuid(); uid != 0 {
		return fmt.Errorf("berthd has to run as root, not as user %d: it makes namespaces, mounts and cgroups", uid)
	}
	syscall.Umask(0o022)
	if err := keepDescriptors(); err != nil {
		return err
	}
	if err := c.eachOwn(makeOwn); err != nil {
		return err
	}
	return os.MkdirAll(filepath.Dir(c.Socket), 0o755)
}

// tighten takes from others what they may do with berth's directories. It is for who
// has their locks: a daemon that runs may have opened them to passing through.
func (c *config) tighten() error {
	return c.eachOwn(func(dir string) error { return errors.Join(makePrivate(dir), tighten(dir)) })
}

// eachOwn calls fn with each directory that is berth's alone.
func (c *config) eachOwn(fn func(dir string) error) error {
	for _, d := range []struct{ key, dir string }{{"state_dir", c.StateDir}, {"run_dir", c.RunDir}} {
		if err := fn(d.dir); err != nil {
			return c.wrong(d.key, "%q: %w", d.dir, err)
		}
	}
	return nil
}

// keepDescriptors makes sure that no program that this process starts gets what
// this process was started with: Go marks what it opens itself, and nothing else.
func keepDescriptors() error {
	if unix.CloseRange(3, ^uint(0)>>32, unix.CLOSE_RANGE_CLOEXEC) == nil {
		return nil
	}
	entries, err := os.ReadDir("/proc/self/fd") // before Linux 5.11
	if err != nil {
		return fmt.Errorf("descriptors: %w", err)
	}
	for _, e := range entries {
		if fd, err := strconv.Atoi(e.Name()); err == nil && fd > 2 {
			unix.CloseOnExec(fd)
		}
	}
	return nil
}

// makeOwn makes a directory that only root may enter, if there is none.
func makeOwn(dir string) error {
	fd, err := openOwn(dir)
	if err != nil {
		return err
	}
	return unix.Close(fd)
}

// openOwn is makeOwn and opens it. One of somebody else is refused: its owner could
// exchange what is in it.
func openOwn(dir string) (fd int, err error) {
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return -1, err
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return -1, err
	}
	if fd, err = unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0); err != nil {
		return -1, fmt.Errorf("want a directory: %w", err)
	}
	var st unix.Stat_t
	if err = unix.Fstat(fd, &st); err == nil && st.Uid != 0 {
		err = fmt.Errorf("belongs to user %d, want root", st.Uid)
	}
	if err != nil {
		return -1, errors.Join(err, unix.Close(fd))
	}
	return fd, nil
}

// makePrivate is makeOwn, and lets only root enter one that is there.
func makePrivate(dir string) error {
	fd, err := openOwn(dir) // held open, so that what was checked is what is changed
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.Fchmod(fd, 0o700)
}

// tighten takes away what others may do with the entries of a private directory:
// the directories, sockets and files that berth makes there are root's alone. They
// are behind that directory's own mode, so this is for the day on which somebody
// opens it. What belongs to somebody else is refused. Links are left: an
// administrator may have put layers on another disk.
func tighten(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); errors.Is(err, unix.ENOENT) {
			continue
		} else if err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		if st.Uid != 0 {
			return fmt.Errorf("%s belongs to user %d, want root", path, st.Uid)
		}
		if st.Mode&unix.S_IFMT == unix.S_IFLNK || st.Mode&0o077 == 0 {
			continue
		}
		if err := unix.Fchmodat(unix.AT_FDCWD, path, st.Mode&0o700, 0); err != nil {
			return fmt.Errorf("%s: mode: %w", path, err)
		}
	}
	return nil
}

// lockTimeout is how long lockDir waits for a daemon that is ending.
var lockTimeout = 5 * time.Second

// lockDir claims a directory for this process until the result is closed or
// the process ends. Two daemons on one run directory would take each other's
// pods for leaks, even with books of their own.
func lockDir(ctx context.Context, dir string) (*os.File, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, lockTimeout)
	defer cancel()
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return f, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			return nil, errors.Join(err, f.Close())
		}
		select {
		case <-ctx.Done():
			return nil, errors.Join(errors.New("another berthd uses it"), f.Close())
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// setOOMScore sets this process's oom_score_adj. Lowering it takes a privilege
// that a container may lack, so the error is for the log.
func setOOMScore(adj int64) error {
	return os.WriteFile("/proc/self/oom_score_adj", []byte(strconv.FormatInt(adj, 10)), 0)
}

// findProgram is the absolute path of one of berth's own programs: as
// configured, or beside this program, or where an installation has them, or in
// PATH.
func findProgram(key, configured, name string) (string, error) {
	if configured == "" {
		if self, err := os.Executable(); err == nil {
			if p := installed(self, name); p != "" {
				return p, nil
			}
		}
		configured = name
	}
	p, err := exec.LookPath(configured)
	if err != nil {
		return "", fmt.Errorf("%s: %w", key, err)
	}
	return filepath.Abs(p)
}

// installed is the absolute path of a program that was installed together with
// the program self, "" if there is none.
func installed(self, name string) string {
	for _, dir := range []string{".", "../libexec/berth"} {
		if p, err := exec.LookPath(filepath.Join(filepath.Dir(self), dir, name)); err == nil {
			return p
		}
	}
	return ""
}

// cgroupDriver decides "auto": systemd makes cgroups where it is the init
// system (sd_booted(3)).
func cgroupDriver(configured string) string {
	if configured != "auto" {
		return configured
	}
	if st, err := os.Lstat("/run/systemd/system"); err == nil && st.IsDir() {
		return "systemd"
	}
	return "cgroupfs"
}
