package snapshotter

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// MakeDir makes a directory in a writable snapshot that is not mounted yet, with
// those above it that are missing, owned by root and with mode 0755. root is the
// snapshot's tree as OpenRoot has opened it; mounts are the same as there. Links
// in name are followed with root as the root directory, also to where there is
// nothing yet. What is there already, of whatever kind, stays as it is.
//
// Nothing has to be mounted for it: the directories are made where the kernel
// will find them, in the writable layer of an overlay. Those above that are in a lower layer
// only are made there too, with their owners and modes, and merged with what is below.
func MakeDir(mounts []Mount, root *os.File, name string) error {
	if len(mounts) != 1 {
		return fmt.Errorf("mkdir %q: %d mounts, limit 1", name, len(mounts))
	}
	m := mounts[0]
	top := m.option("upperdir")
	if top == "" {
		if m.Type != "bind" {
			return fmt.Errorf("mkdir %q: %s mount without a writable layer", name, m.Type)
		}
		top = m.Source
	}
	have, missing, err := deepest(root, name)
	if err != nil {
		return fmt.Errorf("mkdir %q: %w", name, err)
	}
	if len(missing) == 0 {
		return nil
	}
	upper, err := os.OpenRoot(top)
	if err != nil {
		return fmt.Errorf("mkdir %q: %w", name, err)
	}
	defer upper.Close()
	if err := copyUp(root, upper, have); err != nil {
		return fmt.Errorf("mkdir %q: %w", name, err)
	}
	dir := have
	for _, c := range missing {
		dir = filepath.Join(dir, c)
		if err := makeLike(upper, dir, 0o755, 0, 0); err != nil {
			return fmt.Errorf("mkdir %q: %w", name, err)
		}
	}
	return nil
}

// maxLinks is how many links that lead nowhere are followed on one path.
const maxLinks = 40

// deepest resolves the part of a path that exists, and returns it without links
// and relative to root, and the names that are missing below it: none if all of
// it exists. A link that leads nowhere is followed to where it leads, like that of
// an image whose volume replaces a directory: a name in its place would hide it.
func deepest(root *os.File, name string) (have string, missing []string, err error) {
	path := filepath.Clean("/" + name)
	for range maxLinks {
		if have, missing, err = existing(root, path); err != nil || len(missing) == 0 {
			return have, nil, err
		}
		to, err := readlinkAt(root, filepath.Join(have, missing[0]))
		below := "/" + strings.Join(missing[1:], "/")
		switch {
		case err != nil:
			return "", nil, err
		case filepath.IsAbs(to):
			path = to + below
		case to != "":
			path = have + "/" + to + below
		case slices.ContainsFunc(missing, func(n string) bool { return n == "" || n == "." || n == ".." }):
			path = filepath.Join(have, missing[0]+below) // of what is missing nothing is a link
		default:
			return have, missing, nil
		}
	}
	return "", nil, unix.ELOOP
}

// existing splits a path into what exists of it, without links, and the rest. The
// names in it are as they stand, with "..": the kernel knows what that means behind
// a link.
func existing(root *os.File, path string) (have string, missing []string, err error) {
	names := strings.Split(strings.Trim(path, "/"), "/")
	for n := len(names); ; n-- {
		have, err = resolveDir(root, strings.Join(names[:n], "/"))
		switch {
		case err == nil:
			return have, names[n:], nil
		case n == len(names) && errors.Is(err, unix.ENOTDIR):
			return "", nil, nil // there, and no directory
		case n == 0 || !errors.Is(err, unix.ENOENT):
			return "", nil, err
		}
	}
}

// readlinkAt reads a link whose directory has none on its way; "" if it is not
// there.
func readlinkAt(root *os.File, path string) (string, error) {
	buf := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(int(root.Fd()), path, buf)
	if errors.Is(err, unix.ENOENT) {
		return "", nil
	}
	return string(buf[:max(n, 0)]), err
}

// resolveDir returns the path of a directory without links, relative to root.
func resolveDir(root *os.File, name string) (string, error) {
	how := unix.OpenHow{Flags: unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS}
	if name == "" {
		return ".", nil
	}
	var fd int
	var err error
	// The kernel gives up on ".." when anything on the machine is renamed or mounted meanwhile.
	for range 32 {
		if fd, err = unix.Openat2(int(root.Fd()), name, &how); !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err != nil {
		return "", err
	}
	defer unix.Close(fd)
	// The kernel knows the way that it took. Of a file system that is mounted
	// nowhere it tells paths from that one's root.
	above, err := os.Readlink("/proc/self/fd/" + strconv.Itoa(int(root.Fd())))
	if err != nil {
		return "", err
	}
	full, err := os.Readlink("/proc/self/fd/" + strconv.Itoa(fd))
	if err != nil {
		return "", err
	}
	rel, err := filepath.Rel(above, full)
	if err != nil || !filepath.IsLocal(rel) {
		return "", fmt.Errorf("resolved to %q, which is not below %q", full, above)
	}
	return rel, nil
}

// copyUp makes the directories of a path in the writable layer like they are.
func copyUp(root *os.File, upper *os.Root, path string) error {
	dir := ""
	for c := range strings.SplitSeq(path, "/") {
		if dir = filepath.Join(dir, c); dir == "." {
			continue
		}
		var st unix.Stat_t
		if err := unix.Fstatat(int(root.Fd()), dir, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return err
		}
		if err := makeLike(upper, dir, os.FileMode(st.Mode&0o7777), int(st.Uid), int(st.Gid)); err != nil {
			return err
		}
	}
	return nil
}

// makeLike makes a directory with all twelve bits of a mode, unless it is there.
func makeLike(upper *os.Root, dir string, mode os.FileMode, uid, gid int) error {
	if err := upper.Mkdir(dir, 0o700); err != nil {
		if errors.Is(err, os.ErrExist) {
			return nil
		}
		return err
	}
	if err := upper.Lchown(dir, uid, gid); err != nil {
		return err
	}
	d, err := upper.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return unix.Fchmod(int(d.Fd()), uint32(mode)) // os.FileMode has the upper three elsewhere
}
