package sandbox

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berthd/berth/cni/netns"
	"github.com/berthd/berth/snapshotter"
	"github.com/berthd/berth/store"
)

// ownLeaks are what is no pod's or container's: directories of snapshots without a
// row, mounts of layers, inits that no pod has, what a killed daemon has begun for
// itself, and what does not belong into berth's directories.
func (s *Service) ownLeaks(ctx context.Context) ([]store.Finding, error) {
	found, err := s.layerMounts() // before the directories that they are on
	dirs, err2 := s.leakedDirs(ctx)
	for _, d := range dirs {
		found = append(found, store.Finding{Kind: "snapshot directory", What: d, Why: "no row of a snapshot names it", Since: madeAt(d), Mend: s.cleanSnapshots})
	}
	inits, err3 := s.staleInits()
	for _, d := range inits {
		found = append(found, store.Finding{Kind: "init", What: d, Why: "no pod runs this version of berth-init", Since: madeAt(d),
			Mend: func(context.Context) error { return os.RemoveAll(d) }})
	}
	found = append(found, s.begun()...)
	return append(found, s.strangers()...), errors.Join(err, err2, err3)
}

// leakedDirs are none while snapshots that the book has lost may be in use.
func (s *Service) leakedDirs(ctx context.Context) ([]string, error) {
	c, ok := s.deps.Snapshots.(snapshotter.Cleaner)
	if !ok || s.lostSnapshots() && (len(s.noted) > 0 || !s.layersKnown(ctx)) {
		return nil, nil
	}
	return c.Leaked(ctx)
}

// layerMounts are mounts that show layers on the host, where berth has none.
func (s *Service) layerMounts() ([]store.Finding, error) {
	points, err := mountPoints()
	var found []store.Finding
	for _, m := range points {
		f := store.Finding{Kind: "mount", What: m.point}
		for _, dir := range []string{"layers", "snapshots", "containers"} {
			if strings.HasPrefix(m.point, filepath.Join(s.cfg.StateDir, dir)+"/") {
				f.Why, f.Mend = "nothing is mounted there by berth", func(context.Context) error { return netns.UnmountAll(m.point) }
			}
		}
		if f.Why == "" && m.kind == "overlay" && strings.Contains(m.options, "dir="+s.cfg.StateDir+"/") {
			f.Why, f.Remedy = "it shows layers of berth, which mounts none on the host: somebody else has", "umount "+m.point
		}
		if f.Why != "" {
			found = append(found, f)
		}
	}
	return found, err
}

// begun is what a daemon makes for moments, and one that was killed has left. A
// daemon that runs may be at work on its own.
func (s *Service) begun() []store.Finding {
	if !s.cfg.Observe {
		return nil
	}
	paths, _ := filepath.Glob(filepath.Join(s.cfg.StateDir, "probe-*")) // the pattern is well-formed
	for _, name := range names(s.consoleDir()) {
		paths = append(paths, filepath.Join(s.consoleDir(), name))
	}
	var found []store.Finding
	for _, p := range paths {
		found = append(found, store.Finding{Kind: "file", What: p, Why: "a daemon that was killed has left it", Since: madeAt(p),
			Mend: func(context.Context) error { return os.RemoveAll(p) }})
	}
	return found
}

// strangers are entries of directories of IDs that are none. Nobody knows what they
// are for, so that they are not removed.
func (s *Service) strangers() []store.Finding {
	var found []store.Finding
	for _, dir := range []string{
		filepath.Join(s.cfg.RunDir, "c"), filepath.Join(s.cfg.RunDir, "pods"), filepath.Join(s.cfg.RunDir, "ns"),
		filepath.Join(s.cfg.StateDir, "containers"),
	} {
		for _, name := range names(dir) {
			if path := filepath.Join(dir, name); !validID(name) {
				found = append(found, store.Finding{Kind: "stranger", What: path, Why: "berth makes nothing of that name there", Since: madeAt(path),
					Remedy: "find out whose it is, and remove it"})
			}
		}
	}
	return found
}

// madeAt is when a file was made, or changed last if the file system does not tell;
// zero if it is gone.
func madeAt(path string) time.Time {
	var st unix.Statx_t
	if unix.Statx(unix.AT_FDCWD, path, unix.AT_SYMLINK_NOFOLLOW|unix.AT_NO_AUTOMOUNT, unix.STATX_BTIME|unix.STATX_MTIME, &st) != nil {
		return time.Time{}
	}
	t := st.Mtime
	if st.Mask&unix.STATX_BTIME != 0 {
		t = st.Btime
	}
	return time.Unix(t.Sec, int64(t.Nsec))
}

// processStart is when a process was started (proc_pid_stat(5), field 22, in
// hundredths of a second since the boot); zero if it has ended.
func processStart(pid int) time.Time {
	stat, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	// The command, in parentheses, may contain anything, so count from its end.
	f := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	var up unix.Timespec
	if err != nil || len(f) < 20 || unix.ClockGettime(unix.CLOCK_BOOTTIME, &up) != nil {
		return time.Time{}
	}
	ticks, err := strconv.ParseInt(f[19], 10, 64)
	if err != nil {
		return time.Time{}
	}
	return time.Now().Add(time.Duration(ticks)*(time.Second/100) - time.Duration(up.Nano())).Round(time.Second)
}

// commandLine is what a process was started with, each argument ended by a NUL; nothing
// of a process that has ended, and an error for one longer than maxCommand.
func commandLine(pid int) ([]byte, error) {
	return readBounded("/proc/"+strconv.Itoa(pid)+"/cmdline", maxCommand)
}

// killCommand kills a process unless its number was given to another one since its
// command line was read.
func killCommand(pid int, cmdline []byte) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("process %d: %w", pid, err)
	}
	defer unix.Close(fd)
	now, err := commandLine(pid)
	if err != nil || !bytes.Equal(now, cmdline) {
		return nil // it has ended
	}
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("process %d: %w", pid, err)
	}
	return nil
}
