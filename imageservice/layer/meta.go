package layer

import (
	"archive/tar"
	"errors"
	"fmt"
	"math"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	xattrRecord     = "SCHILY.xattr."
	capabilityXattr = "security.capability"
	maxXattrs       = 256 // for one entry; the kernel bounds their bytes
)

// dirMeta is what a directory gets when all entries are there.
type dirMeta struct {
	name   string
	mode   uint32
	uid    uint32
	gid    uint32
	mtime  time.Time
	atime  time.Time
	xattrs map[string]string
}

// fileMeta sets owner, mode, attributes and times of a new regular file, in an order in
// which none undoes another: chown clears setuid and capabilities, and all of them but
// utimensat change times.
func (a *applier) fileMeta(fd int, at place, r *record, h *tar.Header) error {
	uid, gid, err := owner(h)
	if err != nil {
		return err
	}
	if uid != 0 || gid != 0 {
		if err := unix.Fchown(fd, uid, gid); err != nil {
			return fmt.Errorf("chown: %w", err)
		}
	}
	if r.mode&(a.umask|0o7000) != 0 {
		if err := unix.Fchmod(fd, r.mode); err != nil {
			return fmt.Errorf("chmod: %w", err)
		}
	}
	if r.xattrs, err = setXattrs(fd, a.xattrs(h)); err != nil {
		return err
	}
	r.uid, r.gid, r.mtime = uint32(uid), uint32(gid), timespec(h.ModTime)
	a.log.add(r)
	return setTimes(at.parent, at.base, h.AccessTime, h.ModTime)
}

// setXattrs sets attributes and returns them without those that the file system does
// not keep.
func setXattrs(fd int, xattrs map[string]string) (map[string]string, error) {
	for name, value := range xattrs {
		err := unix.Fsetxattr(fd, name, []byte(value), 0)
		if err == nil {
			continue
		}
		if err := xattrError(name, err); err != nil {
			return nil, err
		}
		delete(xattrs, name)
	}
	return xattrs, nil
}

// nodeMeta does the same for what cannot be opened: links, devices, fifos.
func (a *applier) nodeMeta(at place, r *record, h *tar.Header) error {
	uid, gid, err := owner(h)
	if err != nil {
		return err
	}
	if uid != 0 || gid != 0 {
		if err := unix.Fchownat(at.parent, at.base, uid, gid, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return fmt.Errorf("chown: %w", err)
		}
	}
	// base was made by us just now and is no link, so following it is no danger.
	if r.kind != kindSymlink && r.mode&(a.umask|0o7000) != 0 {
		if err := unix.Fchmodat(at.parent, at.base, r.mode, 0); err != nil {
			return fmt.Errorf("chmod: %w", err)
		}
	}
	// Of the attributes that are kept, the kernel allows only this one here.
	if value, ok := a.xattrs(h)[capabilityXattr]; ok {
		if err := unix.Lsetxattr(procPath(at.parent, at.base), capabilityXattr, []byte(value), 0); err != nil {
			return xattrError(capabilityXattr, err)
		}
		r.xattrs = map[string]string{capabilityXattr: value}
	}
	r.uid, r.gid, r.mtime = uint32(uid), uint32(gid), timespec(h.ModTime)
	a.log.add(r)
	return setTimes(at.parent, at.base, h.AccessTime, h.ModTime)
}

// dirMetaLater keeps what a directory is to get for finishDirs.
func (a *applier) dirMetaLater(at place, h *tar.Header) error {
	uid, gid, err := owner(h)
	if err != nil {
		return err
	}
	a.later = append(a.later, dirMeta{
		name: at.name, mode: uint32(h.Mode) & 0o7777, uid: uint32(uid), gid: uint32(gid),
		mtime: h.ModTime, atime: h.AccessTime, xattrs: a.xattrs(h),
	})
	return nil
}

// finishDirs goes from the last to the first: an entry that lists a directory again
// must win, and setting a child's mode does not touch the parent's times.
func (a *applier) finishDirs() error {
	done := make(map[string]bool, len(a.later))
	for i := len(a.later) - 1; i >= 0; i-- {
		m := &a.later[i]
		if err := a.finishDir(m, done); err != nil {
			return entryError(m.name, err)
		}
	}
	return nil
}

// finishDir does nothing for a directory that is in done, by its path without links, and
// adds it otherwise.
func (a *applier) finishDir(m *dirMeta, done map[string]bool) error {
	name := m.name
	if name == "" {
		name = "."
	}
	if done[m.name] {
		return nil
	}
	fd, real, err := resolveReal(a.root, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC)
	if err == unix.ENOENT || err == unix.ENOTDIR || err == unix.ELOOP {
		return nil // a later entry replaced it
	}
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if m.name == "" {
		real = ""
	}
	if done[real] {
		return nil
	}
	done[real] = true
	if m.uid != 0 || m.gid != 0 {
		if err := unix.Fchown(fd, int(m.uid), int(m.gid)); err != nil {
			return fmt.Errorf("chown: %w", err)
		}
	}
	if err := unix.Fchmod(fd, m.mode); err != nil {
		return fmt.Errorf("chmod: %w", err)
	}
	xattrs, err := setXattrs(fd, m.xattrs)
	if err != nil {
		return err
	}
	a.log.add(&record{kind: kindDir, path: real, mode: m.mode, uid: m.uid, gid: m.gid, mtime: timespec(m.mtime), xattrs: xattrs})
	return setTimes(fd, ".", m.atime, m.mtime)
}

// owner checks the IDs of an entry, which chown would take modulo 2^32; -1 would mean
// to leave them as they are.
func owner(h *tar.Header) (uid, gid int, err error) {
	if h.Uid < 0 || h.Uid >= math.MaxUint32 || h.Gid < 0 || h.Gid >= math.MaxUint32 {
		return 0, 0, fmt.Errorf("owner %d:%d, must be 0 to %d: %w", h.Uid, h.Gid, uint32(math.MaxUint32-1), ErrUnsafe)
	}
	return h.Uid, h.Gid, nil
}

func setTimes(dir int, name string, atime, mtime time.Time) error {
	if atime.IsZero() {
		atime = mtime
	}
	ts := [2]unix.Timespec{timespec(atime), timespec(mtime)}
	if err := unix.UtimesNanoAt(dir, name, ts[:], unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fmt.Errorf("times: %w", err)
	}
	return nil
}

// timespec keeps nanoseconds in range: file systems clamp seconds themselves.
func timespec(t time.Time) unix.Timespec {
	if t.IsZero() {
		return unix.Timespec{}
	}
	return unix.Timespec{Sec: t.Unix(), Nsec: int64(t.Nanosecond())}
}

// xattrs returns the attributes of an entry that are kept; nil for none.
func (a *applier) xattrs(h *tar.Header) map[string]string {
	var out map[string]string
	for record, value := range h.PAXRecords {
		name, ok := strings.CutPrefix(record, xattrRecord)
		if !ok {
			continue
		}
		if !keepXattr(name) || len(out) >= maxXattrs {
			a.result.DroppedXattrs++
			continue
		}
		if out == nil {
			out = map[string]string{}
		}
		out[name] = value
	}
	return out
}

// keptXattrs reads the attributes of an open file that are kept; nil for none.
func keptXattrs(fd int) (map[string]string, error) {
	size, err := unix.Flistxattr(fd, nil)
	if err != nil || size == 0 {
		if errors.Is(err, unix.EOPNOTSUPP) {
			err = nil
		}
		return nil, err
	}
	list := make([]byte, size)
	n, err := unix.Flistxattr(fd, list)
	if err != nil {
		return nil, err
	}
	var out map[string]string
	for name := range strings.SplitSeq(string(list[:n]), "\x00") {
		if !keepXattr(name) {
			continue
		}
		value := make([]byte, 64<<10) // the kernel's bound
		n, err := unix.Fgetxattr(fd, name, value)
		if err != nil {
			return nil, fmt.Errorf("attribute %s: %w", name, err)
		}
		if out == nil {
			out = map[string]string{}
		}
		out[name] = string(value[:n])
	}
	return out, nil
}

// keepXattr: trusted.* and user.overlay.* would let an archive steer overlay
// (redirects, metacopy); security.selinux and the like belong to the host.
func keepXattr(name string) bool {
	switch name {
	case capabilityXattr, "system.posix_acl_access", "system.posix_acl_default":
		return true
	}
	return strings.HasPrefix(name, "user.") && !strings.HasPrefix(name, "user.overlay.")
}

// xattrError forgives a file system without attributes of that kind, except for
// capabilities, without which a program fails in ways that are hard to understand.
func xattrError(name string, err error) error {
	if err == nil || err == unix.ENOTSUP && name != capabilityXattr {
		return nil
	}
	return fmt.Errorf("extended attribute %q: %w", clip(name), err)
}
