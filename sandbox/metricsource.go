package sandbox

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// processCount is what was counted of the processes of a cgroup.
type processCount struct {
	pids      []int
	looked    bool // files and sockets were counted
	files     uint64
	sockets   uint64
	openFiles *uint64 // RLIMIT_NOFILE of the first process
}

// maxCounted bounds the open files of a container whose kind is looked at: to
// ask for each is a system call. Those beyond it are counted as no sockets.
const maxCounted = 1 << 16

// countProcesses counts the open files of processes. Those that end meanwhile
// have none.
func countProcesses(pids []int, first int) *processCount {
	out := &processCount{pids: pids, looked: true}
	budget := maxCounted
	for _, pid := range pids {
		files, sockets := countFiles(pid, &budget)
		out.files += files
		out.sockets += sockets
	}
	// Not prlimit(2): for a process of another user that needs CAP_SYS_RESOURCE,
	// which a berthd in a container of its own may lack.
	if text, err := os.ReadFile(fmt.Sprintf("/proc/%d/limits", first)); err == nil {
		out.openFiles = openFilesLimit(string(text))
	}
	return out
}

// openFilesLimit finds the soft limit of open files in /proc/<pid>/limits, nil if
// it is not there. Such a limit is never "unlimited".
func openFilesLimit(text string) *uint64 {
	for line := range strings.Lines(text) {
		if rest, ok := strings.CutPrefix(line, "Max open files "); ok {
			if f := strings.Fields(rest); len(f) > 0 {
				if n, err := strconv.ParseUint(f[0], 10, 64); err == nil {
					return &n
				}
			}
		}
	}
	return nil
}

func countFiles(pid int, budget *int) (files, sockets uint64) {
	dir, err := os.Open("/proc/" + strconv.Itoa(pid) + "/fd")
	if err != nil {
		return 0, 0
	}
	defer dir.Close()
	var kind [8]byte
	for {
		names, err := dir.Readdirnames(1024)
		files += uint64(len(names))
		for _, n := range names {
			if *budget--; *budget < 0 {
				break
			}
			if m, err := unix.Readlinkat(int(dir.Fd()), n, kind[:]); err == nil && strings.HasPrefix(string(kind[:m]), "socket:") {
				sockets++
			}
		}
		if err != nil {
			return files, sockets
		}
	}
}

// diskSpace is the file system that writable layers are on.
type diskSpace struct {
	device             string
	bytes              uint64
	inodes, inodesFree uint64
}

// disk looks at the file system of the writable layers; nil if that fails.
func (s *Service) disk() *diskSpace {
	dir := filepath.Join(s.cfg.StateDir, "snapshots")
	var fs unix.Statfs_t
	var st unix.Stat_t
	if unix.Statfs(dir, &fs) != nil || unix.Stat(dir, &st) != nil {
		return nil
	}
	return &diskSpace{device: deviceName(unix.Major(st.Dev), unix.Minor(st.Dev)),
		bytes: fs.Blocks * uint64(fs.Bsize), inodes: fs.Files, inodesFree: fs.Ffree}
}

// deviceNames returns deviceName with a memory.
func deviceNames() func(major, minor uint32) string {
	var known sync.Map
	return func(major, minor uint32) string {
		key := uint64(major)<<32 | uint64(minor)
		if n, ok := known.Load(key); ok {
			return n.(string)
		}
		n := deviceName(major, minor)
		known.Store(key, n)
		return n
	}
}

// deviceName is the path of a block device, "" if the number is no device's: file
// systems such as btrfs and overlayfs have numbers of their own.
func deviceName(major, minor uint32) string {
	link, err := os.Readlink(fmt.Sprintf("/sys/dev/block/%d:%d", major, minor))
	if err != nil {
		return ""
	}
	// sysfs writes the slashes of a name as exclamation marks.
	return "/dev/" + strings.ReplaceAll(filepath.Base(link), "!", "/")
}
