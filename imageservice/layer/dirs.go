package layer

import (
	"errors"
	"fmt"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	dirFlags = unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC
	// linkLimit is how many dangling links makeDir follows, as the kernel does.
	linkLimit = 40
	// opaqueXattr marks a directory that hides those below it.
	opaqueXattr = "trusted.overlay.opaque"
)

// dirs resolves directories inside the root and remembers the last one, since an
// archive lists a directory's files one after the other. Its descriptor belongs to it.
type dirs struct {
	root    int
	last    string
	real    string // path of last without symbolic links
	lastFD  int    // -1 for none
	stale   bool   // something was removed: last may lead elsewhere, or be gone
	maxNew  int64
	implied []string
	log     *manifestWriter
}

func newDirs(root int, maxNew int64, log *manifestWriter) *dirs {
	return &dirs{root: root, lastFD: -1, maxNew: maxNew, log: log}
}

// forget closes what is remembered.
func (d *dirs) forget() {
	if d.lastFD >= 0 {
		unix.Close(d.lastFD)
	}
	d.lastFD, d.last, d.stale = -1, "", false
}

// open returns a descriptor of dir, "" being the root, and its path without symbolic links,
// and makes what is missing of it. The descriptor is valid until the next call.
func (d *dirs) open(dir string) (fd int, real string, err error) {
	if dir == "" {
		return d.root, "", nil
	}
	if d.lastFD >= 0 && d.last == dir && !d.stale {
		return d.lastFD, d.real, nil
	}
	fd, real, err = resolveReal(d.root, dir, dirFlags)
	if err == unix.ENOENT || err == unix.ENOTDIR {
		if err = d.makeDir(dir, linkLimit); err == nil {
			fd, real, err = resolveReal(d.root, dir, dirFlags)
		}
	}
	if err != nil {
		return -1, "", fmt.Errorf("parent directory: %w", err)
	}
	d.forget()
	d.last, d.real, d.lastFD = dir, real, fd
	return fd, real, nil
}

// makeDir makes the missing components of dir. What is there and is no directory is
// replaced, except that links are followed: one that dangles gets its target made.
func (d *dirs) makeDir(dir string, links int) error {
	parent := d.root
	defer func() {
		if parent != d.root {
			unix.Close(parent)
		}
	}()
	for end := 0; end < len(dir); end++ {
		start := end
		if i := strings.IndexByte(dir[end:], '/'); i >= 0 {
			end += i
		} else {
			end = len(dir)
		}
		prefix, base := dir[:end], dir[start:end]
		fd, err := resolve(d.root, prefix, dirFlags)
		if err == unix.ENOENT || err == unix.ENOTDIR {
			if err := d.makeOne(parent, prefix, base, links); err != nil {
				return err
			}
			fd, err = resolve(d.root, prefix, dirFlags)
		}
		if err != nil {
			return err
		}
		if parent != d.root {
			unix.Close(parent)
		}
		parent = fd
	}
	return nil
}

// makeOne makes the directory base in parent, which is known not to resolve to one.
func (d *dirs) makeOne(parent int, prefix, base string, links int) error {
	if int64(len(d.implied)) >= d.maxNew {
		return fmt.Errorf("more than %d directories that the archive does not list: %w", d.maxNew, ErrTooLarge)
	}
	err := unix.Mkdirat(parent, base, 0o755)
	if err == nil {
		d.implied = append(d.implied, prefix)
		return d.note(kindImplied, parent, base)
	}
	if err != unix.EEXIST {
		return err
	}
	target, err := readlinkat(parent, base)
	if err == unix.EINVAL { // no link: a file, or the whiteout of this directory
		return d.replace(parent, prefix, base)
	}
	if err != nil {
		return err
	}
	if links == 0 {
		return unix.ELOOP
	}
	// A lexical join may name another directory than the kernel would; it is inside
	// the root all the same, and the caller resolves again.
	if !path.IsAbs(target) {
		target = path.Join("/", path.Dir(prefix), target)
	}
	if target = strings.TrimPrefix(path.Clean(target), "/"); target == "" {
		return unix.ELOOP
	}
	return d.makeDir(target, links-1)
}

// replace makes a directory of what is none.
func (d *dirs) replace(parent int, prefix, base string) error {
	opaque, err := removeAt(parent, base)
	if err != nil {
		return err
	}
	d.stale = true
	if err := unix.Mkdirat(parent, base, 0o755); err != nil {
		return err
	}
	if err := errors.Join(d.note(kindRemoved, parent, base), d.note(kindImplied, parent, base)); err != nil {
		return err
	}
	// Its metadata comes from the layers below only if they are to be seen.
	if opaque {
		return errors.Join(d.note(kindOpaque, parent, base), setOpaque(parent, base))
	}
	d.implied = append(d.implied, prefix)
	return nil
}

// note writes a record about base in the directory parent, whose path is looked up.
func (d *dirs) note(kind byte, parent int, base string) error {
	if !d.log.wanted() {
		return nil
	}
	dir, err := pathOf(d.root, parent)
	if err != nil {
		return err
	}
	d.log.add(&record{kind: kind, path: join(dir, base)})
	return nil
}

// join is path.Join for what is clean.
func join(dir, base string) string {
	if dir == "" {
		return base
	}
	return dir + "/" + base
}

// pathOf asks the kernel where a descriptor below root is.
func pathOf(root, fd int) (string, error) {
	top, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", root))
	if err != nil {
		return "", err
	}
	p, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
	if err != nil {
		return "", err
	}
	rest, ok := strings.CutPrefix(p, strings.TrimSuffix(top, "/"))
	if !ok || rest != "" && rest[0] != '/' {
		return "", fmt.Errorf("%q is not below %q: %w", clip(p), clip(top), ErrUnsafe)
	}
	return strings.TrimPrefix(rest, "/"), nil
}

// resolveReal is resolve, and returns the path without symbolic links. Where there are
// none, which is nearly always, it costs nothing more.
func resolveReal(root int, name string, flags uint64) (fd int, real string, err error) {
	fd, err = openBeneath(root, name, flags)
	if err == nil {
		return fd, name, nil
	}
	if err != unix.ELOOP {
		return -1, "", err
	}
	if fd, err = resolve(root, name, flags); err != nil {
		return -1, "", err
	}
	if real, err = pathOf(root, fd); err != nil {
		unix.Close(fd)
		return -1, "", err
	}
	return fd, real, nil
}

// openBeneath opens name, relative and clean, inside root and goes through no link at all.
func openBeneath(root int, name string, flags uint64) (int, error) {
	return openat2(root, name, flags, unix.RESOLVE_BENEATH|unix.RESOLVE_NO_SYMLINKS)
}

// resolve opens name inside root: absolute links and ".." end at root, as after a chroot.
func resolve(root int, name string, flags uint64) (int, error) {
	return openat2(root, name, flags, unix.RESOLVE_IN_ROOT|unix.RESOLVE_NO_MAGICLINKS)
}

func openat2(root int, name string, flags, how uint64) (int, error) {
	open := unix.OpenHow{Flags: flags, Resolve: how}
	for range 8 { // EAGAIN: a rename elsewhere raced with the walk
		fd, err := unix.Openat2(root, name, &open)
		switch err {
		case unix.EINTR, unix.EAGAIN:
			continue
		case unix.ENOSYS:
			return -1, errors.New("the kernel has no openat2; Linux 5.6 is needed")
		}
		return fd, err
	}
	return -1, unix.EAGAIN
}

// removeAt removes whatever name in dir is, and tells whether it was a whiteout.
func removeAt(dir int, name string) (whiteout bool, err error) {
	var st unix.Stat_t
	if err := unix.Fstatat(dir, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return false, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return isWhiteout(&st), unix.Unlinkat(dir, name, 0)
	}
	return false, removeTree(dir, name)
}

func isWhiteout(st *unix.Stat_t) bool {
	return st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == 0
}

// removeTree removes the directory name in dir and all below it, never following
// a link.
func removeTree(dir int, name string) error {
	fd, err := unix.Openat(dir, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	buf := make([]byte, 16<<10)
	for removed := false; ; {
		n, err := unix.Getdents(fd, buf)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return err
		}
		if n == 0 && !removed {
			break
		}
		if n == 0 { // entries were removed under the cursor: look again until none is left
			if _, err := unix.Seek(fd, 0, 0); err != nil {
				return err
			}
			removed = false
			continue
		}
		// A call that a signal interrupts gives what it has, which may be "." alone: only
		// one that gives nothing is at the end.
		_, _, names := unix.ParseDirent(buf[:n], -1, nil)
		for _, child := range names {
			err := unix.Unlinkat(fd, child, 0)
			if err == unix.EISDIR {
				err = removeTree(fd, child)
			}
			if err != nil {
				return err
			}
			removed = true
		}
	}
	return unix.Unlinkat(dir, name, unix.AT_REMOVEDIR)
}

func readlinkat(dir int, name string) (string, error) {
	buf := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(dir, name, buf)
	if err != nil {
		return "", err
	}
	return string(buf[:n]), nil
}

func setOpaque(dir int, name string) error {
	return unix.Lsetxattr(procPath(dir, name), opaqueXattr, []byte("y"), 0)
}

// procPath names a file below a descriptor for the calls that take only paths. The
// kernel goes through the descriptor, so that no part of it is resolved by name but
// the last, which the L-calls do not follow.
func procPath(dir int, name string) string {
	return fmt.Sprintf("/proc/self/fd/%d/%s", dir, name)
}
