package store

import (
	"bufio"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// holder names the process that has the file at path locked, as text to append
// to an error: " (pid 123, berthd)", or "" when it cannot be found. It reads
// /proc/locks, described in proc(5).
func holder(path string) string {
	var st unix.Stat_t
	if unix.Stat(path, &st) != nil {
		return ""
	}
	f, err := os.Open("/proc/locks")
	if err != nil {
		return ""
	}
	defer f.Close()
	for sc := bufio.NewScanner(f); sc.Scan(); {
		pid, inode, ok := parseLock(sc.Text())
		// The device is not compared: the one in /proc/locks is not the one
		// that stat reports on btrfs.
		if !ok || inode != st.Ino {
			continue
		}
		comm, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/comm")
		if err != nil {
			return fmt.Sprintf(" (pid %d)", pid)
		}
		return fmt.Sprintf(" (pid %d, %s)", pid, strings.TrimSpace(string(comm)))
	}
	return ""
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
