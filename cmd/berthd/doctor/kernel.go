package doctor

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/berthd/berth/cri/admin/api"
	"github.com/berthd/berth/sandbox"
	"github.com/berthd/berth/sandbox/cgroup"
	"github.com/berthd/berth/snapshotter/overlay"
)

// The oldest kernel, for openat2 and pidfd_getfd.
const leastMajor, leastMinor = 5, 6

const newerKernel = "run a newer kernel"

func (x *exam) kernel() {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		x.bad(api.LevelError, "kernel version", err.Error(), "uname", newerKernel)
		return
	}
	x.kernelVersion(unix.ByteSliceToString(u.Release[:]))

	fd, err := unix.Openat2(unix.AT_FDCWD, "/", &unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT})
	closeFD(fd, err)
	x.need(api.LevelError, "openat2", "there", err, "paths inside of images resolved by the kernel", newerKernel+", or let the seccomp filter that berthd runs under pass openat2")
	fd, err = unix.PidfdOpen(os.Getpid(), 0)
	closeFD(fd, err)
	x.need(api.LevelError, "pidfd", "there", err, "processes held by descriptors", newerKernel)
	fd, err = unix.Fsopen("tmpfs", unix.FSOPEN_CLOEXEC)
	closeFD(fd, err)
	if x.root {
		x.need(api.LevelNote, "mount API", "fsopen", err, "fsopen, for mounts that no other process sees", "none is needed: transient mount namespaces are used in its place")
	}
	x.namespaces()
	x.overlay()
	x.securityModules()
}

func closeFD(fd int, err error) {
	if err == nil {
		unix.Close(fd)
	}
}

func (x *exam) kernelVersion(release string) {
	want := fmt.Sprintf("%d.%d or newer", leastMajor, leastMinor)
	major, minor, ok := parseRelease(release)
	if !ok || major < leastMajor || major == leastMajor && minor < leastMinor {
		x.bad(api.LevelError, "kernel version", "Linux "+release, want, newerKernel)
		return
	}
	x.ok("kernel version", "Linux %s", release)
}

// parseRelease reads the first two numbers of "6.1.0-13-amd64".
func parseRelease(s string) (major, minor int, ok bool) {
	a, rest, _ := strings.Cut(s, ".")
	end := strings.IndexFunc(rest, func(r rune) bool { return r < '0' || r > '9' })
	if end < 0 {
		end = len(rest)
	}
	major, err1 := strconv.Atoi(a)
	minor, err2 := strconv.Atoi(rest[:end])
	return major, minor, err1 == nil && err2 == nil
}

func (x *exam) namespaces() {
	var missing []string
	for _, k := range []string{"mnt", "net", "ipc", "uts", "pid", "cgroup"} {
		if _, err := os.Stat("/proc/self/ns/" + k); err != nil {
			missing = append(missing, k)
		}
	}
	if len(missing) > 0 {
		x.bad(api.LevelError, "namespaces", "without "+strings.Join(missing, ", "), "mnt, net, ipc, uts, pid and cgroup", "run a kernel that has them (CONFIG_NAMESPACES and what follows it)")
	} else {
		x.ok("namespaces", "mnt, net, ipc, uts, pid, cgroup")
	}
	if !x.root || x.Init == "" {
		return
	}
	remedy := "needed for pods with hostUsers: false only: Linux 5.19, user.max_user_namespaces above 0, a state_dir on a file system with ID-mapped mounts (ext4, xfs, btrfs), directories above run_dir with mode 0755"
	x.need(api.LevelNote, "user namespaces", "pods can have one, with ID-mapped layers", sandbox.ProbeUserNamespaces(x.Init, there(x.StateDir), filepath.Join(there(filepath.Dir(x.RunDir)), filepath.Base(x.RunDir))), "user namespaces with ID-mapped mounts", remedy)
}

// overlay does what berthd does at its start.
func (x *exam) overlay() {
	if !x.root {
		return
	}
	dir := there(x.StateDir)
	remedy := "modprobe overlay; put state_dir on ext4 or xfs (made with ftype=1), not on overlay, NFS or FUSE"
	x.need(api.LevelError, "overlayfs", "mounts on "+dir, overlay.Supported(dir), "overlayfs in the kernel, and a file system below state_dir that can hold layers", remedy)
}

// there is dir or, if it is not there yet, what is of its path.
func there(dir string) string {
	for {
		if _, err := os.Stat(dir); err == nil || dir == "/" || dir == "." {
			return dir
		}
		dir = filepath.Dir(dir)
	}
}

func (x *exam) securityModules() {
	h, err := cgroup.Detect()
	if err != nil {
		return // cgroups tells
	}
	host, err := sandbox.HostFacts(h)
	if err != nil {
		x.bad(api.LevelError, "kernel facts", err.Error(), "/proc mounted", "mount -t proc proc /proc")
		return
	}
	var off error
	if !host.Seccomp {
		off = errors.New("not in the kernel")
	}
	x.need(api.LevelWarning, "seccomp", "there", off, "system call filters: pods that ask for RuntimeDefault are refused without", "run a kernel with CONFIG_SECCOMP_FILTER")
	off = nil
	if !host.RRO {
		off = errors.New("not in the kernel")
	}
	x.need(api.LevelNote, "recursive read-only mounts", "there", off, "mount_setattr, for volumes with recursiveReadOnly", "Linux 5.12")
	modules := "none"
	if b, err := os.ReadFile("/sys/kernel/security/lsm"); err == nil {
		modules = strings.TrimSpace(string(b))
	}
	x.ok("security modules", "%s; SELinux %s", modules, map[bool]string{true: "on", false: "off"}[host.SELinux])
}

// cgroups looks at the hierarchy and at who makes groups in it.
func (x *exam) cgroups() {
	h, err := cgroup.Detect()
	if err != nil {
		x.bad(api.LevelError, "cgroups", err.Error(), "cgroup v2 or v1 mounted", "mount -t cgroup2 none /sys/fs/cgroup, or boot with systemd")
		return
	}
	if h.V2() {
		x.ok("cgroups", "version 2")
	} else {
		x.bad(api.LevelNote, "cgroups", "version 1", "version 2", "works; the kubelet is about to drop version 1: boot with systemd.unified_cgroup_hierarchy=1")
	}
	var missing, extra []string
	for _, c := range []string{"cpu", "memory", "pids"} {
		if !h.Has(c) {
			missing = append(missing, c)
		}
	}
	for _, c := range []string{"cpuset", "hugetlb"} {
		if !h.Has(c) {
			extra = append(extra, c)
		}
	}
	switch {
	case len(missing) > 0:
		x.bad(api.LevelError, "cgroup controllers", "without "+strings.Join(missing, ", "), "cpu, memory and pids", "boot with cgroup_enable=memory, or write \"+cpu +memory +pids\" to cgroup.subtree_control of the groups above")
	case len(extra) > 0:
		x.bad(api.LevelNote, "cgroup controllers", "without "+strings.Join(extra, ", "), "cpu, memory, pids, cpuset and hugetlb", "limits of these are refused")
	default:
		x.ok("cgroup controllers", "cpu, memory, pids, cpuset, hugetlb")
	}
	if !h.SwapAccounted() {
		x.bad(api.LevelNote, "swap", "not counted by cgroups", "memory.swap.max or memory.memsw", "limits of swap are refused; boot with swapaccount=1 if pods are to have them")
	}
	var st unix.Statfs_t
	if unix.Statfs("/sys/fs/cgroup", &st) == nil && st.Flags&unix.ST_RDONLY != 0 && h.V2() {
		x.bad(api.LevelError, "cgroup file system", "mounted read-only", "writable", "mount -o remount,rw /sys/fs/cgroup; in a container, give it a cgroup namespace of its own")
	}
	_, err = os.Lstat("/run/systemd/system")
	x.drivers(err == nil)
}

// drivers compares who is to make groups with the init system.
func (x *exam) drivers(systemd bool) {
	seen := map[string]bool{}
	for _, d := range x.Drivers {
		if seen[d] {
			continue
		}
		seen[d] = true
		switch {
		case d == cgroup.Systemd && !systemd:
			x.bad(api.LevelError, "cgroup driver", "systemd, and systemd is not the init system", "cgroupfs", "cgroup_driver = \"auto\"")
		case d == cgroup.Cgroupfs && systemd:
			x.bad(api.LevelWarning, "cgroup driver", "cgroupfs, and systemd is the init system", "systemd: two writers of one hierarchy undo each other's limits", "cgroup_driver = \"auto\"; the kubelet follows")
		default:
			x.ok("cgroup driver", "%s", d)
		}
	}
}
