package store

import (
	"bufio"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// holder names the process that has the file at path locked, as text to append
// to an error: " (pid 123, berthd)", or "" when it cannot be found.
func holder(path string) string {
	pids := holders(path)
	if len(pids) == 0 {
		return ""
	}
	comm, err := os.ReadFile("/proc/" + strconv.Itoa(pids[0]) + "/comm")
	if err != nil {
		return fmt.Sprintf(" (pid %d)", pids[0])
	}
	return fmt.Sprintf(" (pid %d, %s)", pids[0], strings.TrimSpace(string(comm)))
}

// holders are the processes that have a file locked which may be the one at path.
// It reads /proc/locks, described in proc(5).
func holders(path string) (pids []int) {
	var st unix.Stat_t
	if unix.Stat(path, &st) != nil {
		return nil
	}
	f, err := os.Open("/proc/locks")
	if err != nil {
		return nil
	}
	defer f.Close()
	for sc := bufio.NewScanner(f); sc.Scan(); {
		pid, inode, ok := parseLock(sc.Text())
		// The device is not compared: the one in /proc/locks is not the one
		// that stat reports on btrfs.
		if ok && inode == st.Ino {
			pids = append(pids, pid)
		}
	}
	return pids
}

// abandoned tells whether whoever has the file at path locked was killed, and only
// waits for the kernel to let it end.
func abandoned(path string) bool {
	pids := holders(path)
	for _, pid := range pids {
		if !dying(pid) {
			return false
		}
	}
	return len(pids) > 0
}

// dying tells whether no thread of a process will run a line of its program any
// more: each has ended, or has SIGKILL before it. One that waits in the kernel for
// a file system that does not answer may stay so for days (proc_pid_status(5)).
func dying(pid int) bool {
	files, err := filepath.Glob("/proc/" + strconv.Itoa(pid) + "/task/*/status")
	if err != nil {
		return false
	}
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err == nil && !doomed(string(text)) {
			return false
		}
	}
	return len(files) > 0
}

// doomed reads the status of a thread.
func doomed(status string) bool {
	for line := range strings.Lines(status) {
		key, value, _ := strings.Cut(line, ":")
		value = strings.TrimSpace(value)
		switch key {
		case "State":
			if strings.HasPrefix(value, "Z") || strings.HasPrefix(value, "X") {
				return true
			}
		case "SigPnd":
			pending, err := strconv.ParseUint(value, 16, 64)
			return err == nil && pending&(1<<(unix.SIGKILL-1)) != 0
		}
	}
	return false
}

// parseLock takes a line such as
//
//	1: FLOCK  ADVISORY  WRITE 708 08:01:1835 0 EOF
//
// apart. Lines about waiting processes ("1: -> FLOCK …") are not ok.
func parseLock(line string) (pid int, inode uint64, ok bool) {
	f := strings.Fields(line)
	if len(f) < 8 || f[1] != "FLOCK" {
		return 0, 0, false
	}
	pid, err := strconv.Atoi(f[4])
	if err != nil || pid <= 0 {
		return 0, 0, false
	}
	i := strings.LastIndexByte(f[5], ':')
	inode, err = strconv.ParseUint(f[5][i+1:], 10, 64)
	return pid, inode, err == nil && i > 0
}
