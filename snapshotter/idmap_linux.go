package snapshotter

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// ErrIDMap: this kernel, or a file system, cannot show the owners of files as a
// user namespace maps them.
var ErrIDMap = errors.New("ID-mapped mounts not supported")

// IDMapped takes a mount apart for a container in a user namespace. An overlay as
// a whole cannot be ID-mapped (fs/overlayfs has no FS_ALLOW_IDMAP), but what it is
// made of can since Linux 5.19: so an ID-mapped copy of base, the deepest directory
// above all its layers, is mounted first, and the overlay on top of that.
// Whoever mounts it has to be in the directory dir of the copy, a path relative
// to base, to which all directories in the options are relative, and to have the
// file system user and group (setfsuid(2)) that the namespace's root is on the host
// and yet all capabilities: the kernel does what it does in the layers in the
// mounter's name, and users who are not mapped can make no file there. What the
// container writes lands in its writable layer with the owners that it sees, so
// no layer is ever changed for it, and all users of an image share its files.
//
// Of a bind mount base is the source, and its copy is all there is.
func IDMapped(m Mount) (base, dir string, mapped Mount, err error) {
	if m.Type == "bind" {
		return m.Source, "", m, nil
	}
	if m.Type != "overlay" || m.option("lowerdir") == "" {
		return "", "", m, fmt.Errorf("%w: mount of type %q", ErrIDMap, m.Type)
	}
	lowers := strings.Split(m.option("lowerdir"), ":")
	all := append([]string(nil), lowers...)
	for _, key := range []string{"upperdir", "workdir"} {
		if v := m.option(key); v != "" {
			all = append(all, v)
		}
	}
	base, in := commonDir(all), commonDir(lowers)
	if base == "" {
		return "", "", m, fmt.Errorf("%w: layers of one snapshot without a directory above them", ErrIDMap)
	}
	if dir, err = filepath.Rel(base, in); err != nil {
		return "", "", m, fmt.Errorf("%w: %w", ErrIDMap, err)
	}
	mapped = Mount{Type: m.Type, Source: m.Source, Target: m.Target}
	for _, o := range m.Options {
		if o, err = relativeTo(in, o); err != nil {
			return "", "", m, fmt.Errorf("%w: %w", ErrIDMap, err)
		}
		mapped.Options = append(mapped.Options, o)
	}
	return base, dir, mapped, nil
}

// relativeTo rewrites the directories in an option of overlay.
func relativeTo(dir, option string) (string, error) {
	key, value, _ := strings.Cut(option, "=")
	if key != "lowerdir" && key != "upperdir" && key != "workdir" {
		return option, nil
	}
	names := strings.Split(value, ":")
	for i, n := range names {
		var err error
		if names[i], err = filepath.Rel(dir, n); err != nil {
			return "", err
		}
	}
	return key + "=" + strings.Join(names, ":"), nil
}

// CanIDMap tells whether a tree can be mounted with the owners that userns, an
// open user namespace, maps them to: an error that wraps ErrIDMap says why not.
// It asks the kernel and leaves nothing behind. Needs CAP_SYS_ADMIN.
func CanIDMap(path string, userns *os.File) error {
	fd, err := idMappedClone(path, userns)
	if err != nil {
		return err
	}
	return unix.Close(fd)
}

// idMappedClone is a detached copy of the mount at path.
func idMappedClone(path string, userns *os.File) (int, error) {
	fd, err := cloneWith(path, unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP, Propagation: unix.MS_PRIVATE, Userns_fd: uint64(userns.Fd())})
	if err != nil {
		return -1, fmt.Errorf("%w: %w", ErrIDMap, err)
	}
	return fd, nil
}

// IDMapSupported tells whether snapshots below root, an existing directory, can be
// mounted for a user namespace, userns, whose root is uid and gid; if not, an
// error that wraps ErrIDMap says why. It does once what a shim does for each
// container, in a mount namespace that ends with it, with directories that it
// makes in root and removes. Needs CAP_SYS_ADMIN.
func IDMapSupported(root string, userns *os.File, uid, gid uint32) (err error) {
	dir, err := os.MkdirTemp(root, "probe-")
	if err != nil {
		return fmt.Errorf("%w: %w", ErrIDMap, err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	for _, name := range []string{"lower", "upper", "work", "root"} {
		if err := os.Mkdir(filepath.Join(dir, name), 0o755); err != nil {
			return fmt.Errorf("%w: %w", ErrIDMap, err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "lower", "file"), []byte("x"), 0o644); err != nil {
		return fmt.Errorf("%w: %w", ErrIDMap, err)
	}
	return WithMounted(nil, "", func() error { return tryIDMapped(dir, userns, uid, gid) })
}

// tryIDMapped mounts an overlay of the directories in dir on dir/root.
func tryIDMapped(dir string, userns *os.File, uid, gid uint32) error {
	fd, err := idMappedClone(dir, userns)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	target := filepath.Join(dir, "root")
	if err := unix.MoveMount(fd, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("%w: move_mount: %w", ErrIDMap, err)
	}
	m := Mount{Type: "overlay", Source: "overlay", Options: []string{"lowerdir=lower", "upperdir=upper", "workdir=work"}}
	err = asUser(uid, gid, func() error {
		if err := m.mount(target, target); err != nil {
			return err
		}
		return os.Chmod(filepath.Join(target, "file"), 0o600) // which copies it up
	})
	if err != nil {
		return fmt.Errorf("%w: %w", ErrIDMap, err)
	}
	for path, want := range map[string][2]uint32{filepath.Join(target, "file"): {uid, gid}, filepath.Join(dir, "upper", "file"): {0, 0}} {
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil {
			return fmt.Errorf("%w: %w", ErrIDMap, err)
		}
		if st.Uid != want[0] || st.Gid != want[1] {
			return fmt.Errorf("%w: %s: belongs to %d:%d, not to %d:%d", ErrIDMap, path, st.Uid, st.Gid, want[0], want[1])
		}
	}
	return nil
}

// asUser runs fn with the calling thread's file system user and group changed, on
// a thread that its goroutine is locked to, and all capabilities kept.
func asUser(uid, gid uint32, fn func() error) error {
	const noSetuidFixup = 1 << 2 // SECBIT_NO_SETUID_FIXUP
	if err := unix.Prctl(unix.PR_SET_SECUREBITS, noSetuidFixup, 0, 0, 0); err != nil {
		return fmt.Errorf("securebits: %w", err)
	}
	set := func(uid, gid uint32) error {
		return errors.Join(unix.Setfsgid(int(gid)), unix.Setfsuid(int(uid)))
	}
	return errors.Join(set(uid, gid), fn(), set(0, 0), unix.Prctl(unix.PR_SET_SECUREBITS, 0, 0, 0, 0))
}
