package netns

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// ErrNoexec: PrivateMount has done all but let programs be run, as the kernel does not
// allow it: the flags of a mount from another user namespace are locked
// (mount_namespaces(7)).
var ErrNoexec = errors.New("the mount stays noexec")

// PrivateMount makes dir, which exists and is the caller's alone, a mount point
// with private propagation: mounts below it stay in this mount namespace. A
// directory that is not a mount point is bind-mounted on itself; doing it again
// changes nothing, and a crash between the two steps is repaired by the next
// call. Mounts already below dir stay visible and become private too.
//
// Programs can be run from it, also where dir is on a file system that is mounted
// noexec, as /run often is: pods' user namespaces and inits begin with one.
func PrivateMount(dir string) error {
	if err := makePrivate(dir); err != nil {
		return fmt.Errorf("private mount %s: %w", dir, err)
	}
	err := allowExec(dir)
	if errors.Is(err, unix.EPERM) {
		err = fmt.Errorf("%w: %w", ErrNoexec, err)
	}
	if err != nil {
		return fmt.Errorf("private mount %s: without noexec: %w", dir, err)
	}
	return nil
}

func makePrivate(dir string) error {
	const private = unix.MS_PRIVATE | unix.MS_REC
	err := unix.Mount("", dir, "", private, "")
	if err == nil {
		return nil
	}
	// EINVAL is the kernel's word for "not a mount point".
	if !errors.Is(err, unix.EINVAL) {
		return err
	}
	if err := unix.Mount(dir, dir, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("bind: %w", err)
	}
	return unix.Mount("", dir, "", private, "")
}

// stNoSymFollow is ST_NOSYMFOLLOW (statfs(2), Linux 5.10), another bit than that for
// mount(2).
const stNoSymFollow = 0x2000

// allowExec takes noexec from a mount, and from no other of its file system.
func allowExec(dir string) error {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil || st.Flags&unix.ST_NOEXEC == 0 {
		return err
	}
	// The other flags of a mount are as given; only those about access times
	// stay when none is.
	keep := uintptr(st.Flags) & (unix.ST_RDONLY | unix.ST_NOSUID | unix.ST_NODEV)
	if st.Flags&stNoSymFollow != 0 {
		keep |= unix.MS_NOSYMFOLLOW
	}
	return unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_BIND|keep, "")
}

// UnmountAll unmounts what is mounted on a path, which may be several on top of each
// other. That nothing is, or that there is no such path, is no error.
func UnmountAll(path string) error {
	for {
		err := unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("unmount %s: %w", path, err)
		}
	}
}
