package doctor

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/berthd/berth/cri/admin/api"
)

// What has to be free, in bytes and files.
const (
	leastSpace  = 100 << 20 // below it hardly an image can be pulled
	littleSpace = 1 << 30
	leastRun    = 16 << 20
	littleRun   = 64 << 20
	leastInodes = 1000
)

func (x *exam) disks() {
	x.directory("state_dir", x.StateDir, leastSpace, littleSpace)
	x.stateDisk()
	x.directory("run_dir", x.RunDir, leastRun, littleRun)
	aside, _ := filepath.Glob(filepath.Join(x.StateDir, "book.db.corrupt-*"))
	if len(aside) > 0 {
		x.bad(api.LevelWarning, "book", fmt.Sprintf("%d damaged books were set aside, the last is %s", len(aside), aside[len(aside)-1]), "none",
			"find out what happened to the disk (journalctl -k); remove the file when nobody wants to look at it any more")
	}
}

// directory looks at who may use one, and at what is left of its file system.
func (x *exam) directory(key, dir string, least, little uint64) {
	x.owner(key, dir)
	at := there(dir)
	var st unix.Statfs_t
	if err := unix.Statfs(at, &st); err != nil {
		x.bad(api.LevelError, key+" space", err.Error(), "a file system that answers", "look at the disk and its mount: "+at)
		return
	}
	if st.Flags&unix.ST_RDONLY != 0 {
		x.bad(api.LevelError, key+" file system", at+" is mounted read-only", "writable", "look for errors of the disk (dmesg), then mount -o remount,rw")
	}
	free, all := st.Bavail*uint64(st.Bsize), st.Blocks*uint64(st.Bsize) //nolint:unconvert // Bsize differs between architectures
	seen := fmt.Sprintf("%d MiB of %d MiB free", free>>20, all>>20)
	x.level(key+" space", seen, free < least, free < little || free < all/10, fmt.Sprintf("%d MiB and a tenth of the disk", little>>20),
		"remove images (crictl rmi --prune), enlarge the disk, or move "+key)
	if st.Files > 0 { // file systems such as btrfs have no fixed number
		x.level(key+" inodes", fmt.Sprintf("%d of %d free", st.Ffree, st.Files), st.Ffree < leastInodes, st.Ffree < st.Files/20, "a twentieth of them",
			"remove images, or make the file system with more (mkfs.ext4 -N)")
	}
}

// level is an error, a warning or ok.
func (x *exam) level(name, seen string, isError, isWarning bool, want, remedy string) {
	switch {
	case isError:
		x.bad(api.LevelError, name, seen, want, remedy)
	case isWarning:
		x.bad(api.LevelWarning, name, seen, want, remedy)
	default:
		x.ok(name, "%s", seen)
	}
}

func stat(path string) (st unix.Stat_t, err error) { return st, unix.Stat(path, &st) }

// owner asks what berthd asks at its start, and whether others can exchange the directory
// itself.
func (x *exam) owner(key, dir string) {
	var st unix.Stat_t
	err := unix.Lstat(dir, &st)
	mode := st.Mode & 0o7777
	switch {
	case errors.Is(err, fs.ErrNotExist):
		x.ok(key, "%s is made at the first start", dir)
	case err != nil:
		x.bad(api.LevelError, key, err.Error(), "a directory of root's", "look at the mounts and modes above it")
		return
	case st.Mode&unix.S_IFMT != unix.S_IFDIR:
		x.bad(api.LevelError, key, dir+" is no directory", "a directory; a link is not followed", "set "+key+" to where it leads")
	case st.Uid != 0:
		x.bad(api.LevelError, key, fmt.Sprintf("%s belongs to user %d", dir, st.Uid), "root", "find out who made it, then chown root "+dir)
	case mode != 0o700 && mode != 0o711:
		x.bad(api.LevelNote, key, fmt.Sprintf("%s has mode %#o", dir, mode), "0700, or 0711 once a pod had a user namespace", "none is needed: berthd sets it at its start")
	default:
		x.ok(key, "%s, mode %#o", dir, mode)
	}
	for up := filepath.Dir(dir); ; up = filepath.Dir(up) {
		if st, err := stat(up); err == nil && (st.Uid != 0 || st.Mode&0o022 != 0 && st.Mode&unix.S_ISVTX == 0) {
			x.bad(api.LevelWarning, key+" path", fmt.Sprintf("%s: user %d, mode %#o", up, st.Uid, st.Mode&0o7777), "root's, writable by nobody else: who may write there can put another directory in its place", "chown root "+up+"; chmod go-w "+up)
		}
		if up == "/" {
			return
		}
	}
}

// fsNames are magic numbers of file systems (statfs(2)) with what becomes of a state_dir
// on them; "" is nothing bad.
var fsNames = map[int64]struct {
	name  string
	level api.Level
	why   string
}{
	unix.EXT4_SUPER_MAGIC:      {"ext4", api.LevelOK, ""},
	unix.XFS_SUPER_MAGIC:       {"xfs", api.LevelOK, ""},
	unix.BTRFS_SUPER_MAGIC:     {"btrfs", api.LevelOK, ""},
	unix.F2FS_SUPER_MAGIC:      {"f2fs", api.LevelOK, ""},
	0x2fc12fc1:                 {"zfs", api.LevelOK, ""},
	unix.TMPFS_MAGIC:           {"tmpfs", api.LevelWarning, "images and pods are lost at every reboot, and images use memory"},
	unix.OVERLAYFS_SUPER_MAGIC: {"overlay", api.LevelError, "it cannot hold the layers of another overlay"},
	unix.NFS_SUPER_MAGIC:       {"nfs", api.LevelError, "it cannot hold layers, and a book on it is not safe"},
	unix.FUSE_SUPER_MAGIC:      {"fuse", api.LevelWarning, "it may not hold layers, and what becomes of it at a power cut is its own matter"},
	unix.V9FS_MAGIC:            {"9p", api.LevelWarning, "it may not hold layers"},
}

// stateDisk looks at what happens to state_dir when the power is cut.
func (x *exam) stateDisk() {
	at := there(x.StateDir)
	var st unix.Statfs_t
	if unix.Statfs(at, &st) != nil {
		return // told above
	}
	f, known := fsNames[int64(st.Type)] //nolint:unconvert // differs between architectures
	if !known {
		x.bad(api.LevelNote, "state_dir file system", fmt.Sprintf("of type %#x", st.Type), "ext4 or xfs, with which berth is tested", "look whether it is local and has a journal")
		return
	}
	if f.level != api.LevelOK {
		x.bad(f.level, "state_dir file system", f.name+": "+f.why, "a local ext4 or xfs", "set state_dir to one, or mount one at "+x.StateDir)
		return
	}
	options := mountOptions(at)
	switch {
	case f.name == "ext4" && !journalled(at, jbd2):
		x.bad(api.LevelWarning, "state_dir journal", "ext4 without a journal", "one: after a power cut files that were there may not be", "umount it, then tune2fs -O has_journal DEVICE")
	case strings.Contains(options, "nobarrier") || strings.Contains(options, "barrier=0"):
		x.bad(api.LevelWarning, "state_dir journal", f.name+" mounted "+options, "barriers: without them a power cut can damage the book", "mount without nobarrier")
	case strings.Contains(options, "data=writeback"):
		x.bad(api.LevelWarning, "state_dir journal", f.name+" mounted "+options, "data=ordered", "mount without data=writeback")
	default:
		x.ok("state_dir file system", "%s, %s", f.name, options)
	}
}

// jbd2 is where the kernel shows the journals of ext4, one directory "<device>-<n>" each.
const jbd2 = "/proc/fs/jbd2"

// journalled tells whether the device below a path has a journal. Where the kernel does
// not show devices it is believed to have one.
func journalled(path, shown string) bool {
	st, err := stat(path)
	if err != nil {
		return true
	}
	link, err := os.Readlink(fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(uint64(st.Dev)), unix.Minor(uint64(st.Dev)))) //nolint:unconvert // Dev differs between architectures
	if err != nil {
		return true
	}
	found, err := filepath.Glob(filepath.Join(shown, filepath.Base(link)+"-*"))
	return err != nil || len(found) > 0
}

// mountFlags are those of the mount that a path is on; 0 if it does not tell.
func mountFlags(path string) int64 {
	var st unix.Statfs_t
	if unix.Statfs(path, &st) != nil {
		return 0
	}
	return int64(st.Flags) //nolint:unconvert // differs between architectures
}

// maxMountinfo bounds the mount table that is read, in bytes.
const maxMountinfo = 16 << 20

// mountOptions are the options of the file system that a path is on, by the number of its
// mount (statx(2)), which is the first field in proc_pid_mountinfo(5). "" if it is not told.
func mountOptions(path string) string {
	var st unix.Statx_t
	if unix.Statx(unix.AT_FDCWD, path, 0, unix.STATX_MNT_ID, &st) != nil || st.Mask&unix.STATX_MNT_ID == 0 {
		return ""
	}
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return ""
	}
	defer f.Close()
	s := bufio.NewScanner(io.LimitReader(f, maxMountinfo))
	s.Buffer(nil, 1<<20)
	number := fmt.Sprintf("%d ", st.Mnt_id)
	for s.Scan() {
		if strings.HasPrefix(s.Text(), number) {
			_, tail, _ := strings.Cut(s.Text(), " - ")
			if f := strings.Fields(tail); len(f) >= 3 {
				return f[2]
			}
		}
	}
	return ""
}
