package doctor

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berthd/berth/cri/admin/api"
)

// leastFiles is the limit of open files below which a full node runs out: a pod of two
// containers takes up to ten of berthd's, and a pull some dozens.
const leastFiles = 65536

// privileges that berthd needs, and those without which containers lack something.
var (
	needed = []capability{{unix.CAP_SYS_ADMIN, "SYS_ADMIN"}, {unix.CAP_NET_ADMIN, "NET_ADMIN"}, {unix.CAP_SYS_PTRACE, "SYS_PTRACE"}, {unix.CAP_SYS_CHROOT, "SYS_CHROOT"},
		{unix.CAP_CHOWN, "CHOWN"}, {unix.CAP_DAC_OVERRIDE, "DAC_OVERRIDE"}, {unix.CAP_DAC_READ_SEARCH, "DAC_READ_SEARCH"}, {unix.CAP_FOWNER, "FOWNER"}, {unix.CAP_FSETID, "FSETID"},
		{unix.CAP_KILL, "KILL"}, {unix.CAP_MKNOD, "MKNOD"}, {unix.CAP_SETUID, "SETUID"}, {unix.CAP_SETGID, "SETGID"}, {unix.CAP_SETPCAP, "SETPCAP"}, {unix.CAP_SETFCAP, "SETFCAP"}}
	useful = []capability{{unix.CAP_SYS_RESOURCE, "SYS_RESOURCE"}, {unix.CAP_NET_RAW, "NET_RAW"}, {unix.CAP_NET_BIND_SERVICE, "NET_BIND_SERVICE"}, {unix.CAP_AUDIT_WRITE, "AUDIT_WRITE"}}
)

type capability struct {
	number int
	name   string
}

// lacking are those of the list that a set does not have.
func lacking(set uint64, list []capability) (names []string) {
	for _, c := range list {
		if set&(1<<c.number) == 0 {
			names = append(names, "CAP_"+c.name)
		}
	}
	return names
}

// process looks at the daemon's, or at this one in its place.
func (x *exam) process() {
	proc, who := "/proc/self", "this process, in place of berthd,"
	if x.PID != 0 {
		proc, who = "/proc/"+strconv.Itoa(x.PID), "berthd"
	}
	status, err := os.ReadFile(filepath.Join(proc, "status"))
	if err != nil {
		x.bad(api.LevelWarning, "process", err.Error(), "/proc mounted", "mount -t proc proc /proc; if berthd has just ended, ask again")
		return
	}
	x.capabilities(who, status)
	if b, err := os.ReadFile(filepath.Join(proc, "limits")); err == nil {
		n, text := openFiles(b)
		x.level("open files", who+" may have "+text, n < 1024, n < leastFiles, strconv.Itoa(leastFiles)+" or more", "LimitNOFILE= in berthd.service, or ulimit -n before berthd")
	}
	if x.PID != 0 {
		x.oomScore(proc)
	}
	if b, err := os.ReadFile(filepath.Join(proc, "cgroup")); err == nil {
		if dir, most := leastPids("/sys/fs/cgroup", string(b)); most >= 0 {
			x.level("tasks", fmt.Sprintf("%d in %s and below", most, dir), false, most < 8192, "no limit: every shim of a container takes five or so", "TasksMax=infinity in berthd.service and the slices above it")
		}
	}
	if b, err := os.ReadFile("/proc/sys/kernel/pid_max"); err == nil {
		if n, err := strconv.Atoi(strings.TrimSpace(string(b))); err == nil {
			x.level("processes", fmt.Sprintf("kernel.pid_max is %d", n), false, n < 32768, "32768 or more", "sysctl -w kernel.pid_max=4194304")
		}
	}
}

func (x *exam) capabilities(who string, status []byte) {
	text := statusField(status, "CapEff")
	set, err := strconv.ParseUint(text, 16, 64)
	if err != nil {
		x.bad(api.LevelWarning, "capabilities", fmt.Sprintf("CapEff is %q", text), "a number", "look at /proc/self/status")
		return
	}
	remedy := "let the service manager keep them (CapabilityBoundingSet=); in a container, run it privileged"
	switch less, fewer := lacking(set, needed), lacking(set, useful); {
	case len(less) > 0:
		x.bad(api.LevelError, "capabilities", who+" is without "+strings.Join(less, ", "), "all", remedy)
	case len(fewer) > 0:
		x.bad(api.LevelWarning, "capabilities", who+" is without "+strings.Join(fewer, ", "), "all: containers cannot have what berthd has not, and without SYS_RESOURCE oom_score_adj and limits cannot be had", remedy)
	default:
		x.ok("capabilities", "%s has what it takes", who)
	}
	if statusField(status, "NoNewPrivs") == "1" {
		x.bad(api.LevelWarning, "no_new_privs", who+" has it set, and with it every container", "not set: set-uid programs and file capabilities do nothing in containers", "take NoNewPrivileges= out of the service")
	}
	if mode := statusField(status, "Seccomp"); mode == "1" || mode == "2" {
		x.bad(api.LevelNote, "seccomp filter", who+" itself runs under one", "none", "what it forbids is forbidden to all containers; privileged containers have none")
	}
}

// statusField is a line of proc_pid_status(5).
func statusField(status []byte, key string) string {
	for line := range bytes.Lines(status) {
		if v, ok := bytes.CutPrefix(line, []byte(key+":")); ok {
			return string(bytes.TrimSpace(v))
		}
	}
	return ""
}

// openFiles reads the hard limit, which is what a program in Go has, from
// proc_pid_limits(5).
func openFiles(limits []byte) (n uint64, text string) {
	for line := range bytes.Lines(limits) {
		rest, ok := bytes.CutPrefix(line, []byte("Max open files"))
		f := bytes.Fields(rest)
		if !ok || len(f) < 2 {
			continue
		}
		if text = string(f[1]); text == "unlimited" {
			return 1 << 63, text
		}
		n, _ = strconv.ParseUint(text, 10, 64)
		return n, text
	}
	return 0, "an unknown number"
}

func (x *exam) oomScore(proc string) {
	b, err := os.ReadFile(filepath.Join(proc, "oom_score_adj"))
	n, e := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
	if err = errors.Join(err, e); err != nil {
		return // it has just ended
	}
	x.level("oom_score_adj", fmt.Sprintf("berthd has %d", n), false, n > x.OOMScoreAdj, strconv.FormatInt(x.OOMScoreAdj, 10)+", as configured", "let berthd have CAP_SYS_RESOURCE, or set OOMScoreAdjust= in the service")
}

// leastPids is the lowest limit of tasks of a process's cgroup and those above it, with
// its directory below mount; -1 if there is none.
func leastPids(mount, cgroup string) (dir string, least int64) {
	least = -1
	for line := range strings.Lines(cgroup) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(f) != 3 || f[1] != "" && f[1] != "pids" {
			continue
		}
		for d := filepath.Clean("/" + f[2]); ; d = filepath.Dir(d) {
			b, err := os.ReadFile(filepath.Join(mount, f[1], d, "pids.max"))
			if n, e := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64); err == nil && e == nil && (least < 0 || n < least) {
				dir, least = filepath.Join(mount, f[1], d), n
			}
			if d == "/" {
				break
			}
		}
	}
	return dir, least
}

// sockets looks at what is where berthd is to listen.
func (x *exam) sockets() {
	for _, path := range []string{x.Socket, filepath.Join(x.RunDir, "admin.sock")} {
		x.socket(path)
	}
}

func (x *exam) socket(path string) {
	name := "socket " + filepath.Base(path)
	var st unix.Stat_t
	err := unix.Lstat(path, &st)
	switch {
	case errors.Is(err, fs.ErrNotExist) && !x.runs():
		x.ok(name, "%s is made at the start", path)
	case errors.Is(err, fs.ErrNotExist):
		x.bad(api.LevelError, name, path+" is gone, and berthd runs", "there", "restart berthd, containers go on; find out what removes it")
	case err != nil:
		x.bad(api.LevelError, name, err.Error(), "a place for it", "look at the directories above it")
	case st.Mode&unix.S_IFMT != unix.S_IFSOCK:
		x.bad(api.LevelError, name, path+" is no socket: berthd does not replace it", "a socket, or nothing", "move it away")
	case st.Uid != 0 || st.Mode&0o077 != 0:
		x.bad(api.LevelWarning, name, fmt.Sprintf("%s: user %d, mode %#o", path, st.Uid, st.Mode&0o7777), "root's, mode 0600: who may connect is root on the node", "chown root and chmod 0600 "+path)
	case !x.runs() && listening(path):
		x.bad(api.LevelError, name, "another process listens on "+path, "berthd", "find it with ss -xlp, or set socket to another path")
	case !x.runs():
		x.ok(name, "%s, of a berthd that has ended", path)
	default:
		x.ok(name, "%s", path)
	}
}

func (x *exam) runs() bool { return x.PID != 0 || x.Held }

func listening(path string) bool {
	c, err := net.DialTimeout("unix", path, programTimeout)
	if err != nil {
		return false
	}
	c.Close()
	return true
}

// skew is how far in the future a file may be: clocks are corrected by a little all the time.
const skew = 5 * time.Minute

// clock compares the time with what is older than now.
func (x *exam) clock() {
	now := time.Now()
	files := []string{x.StateDir, filepath.Join(x.StateDir, "book.db"), x.RunDir}
	if self, err := os.Executable(); err == nil {
		files = append(files, self)
	}
	newest, file := newestOf(files)
	remedy := "set the clock, and have chrony or systemd-timesyncd keep it; times of containers stay in order whatever it says"
	switch {
	case newest.After(now.Add(skew)):
		x.bad(api.LevelWarning, "clock", fmt.Sprintf("%s, and %s was changed at %s", now.Format(time.RFC3339), file, newest.Format(time.RFC3339)), "later than every file", remedy)
	case now.Year() < 2025:
		x.bad(api.LevelError, "clock", now.Format(time.RFC3339), "the present: no certificate of a registry is valid yet", remedy)
	default:
		x.ok("clock", "%s, later than every file", now.UTC().Format(time.RFC3339))
	}
	var t unix.Timex
	if state, err := unix.Adjtimex(&t); err == nil && (state == unix.TIME_ERROR || t.Status&unix.STA_UNSYNC != 0) {
		x.bad(api.LevelNote, "clock source", "the kernel knows of nobody who keeps the clock right", "chrony, ntpd or systemd-timesyncd", "install one, unless the machine below this one does it")
	}
}

// newestOf is the file that was changed last.
func newestOf(files []string) (newest time.Time, file string) {
	for _, f := range files {
		if fi, err := os.Stat(f); err == nil && fi.ModTime().After(newest) {
			newest, file = fi.ModTime(), f
		}
	}
	return newest, file
}
