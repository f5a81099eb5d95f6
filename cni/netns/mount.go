package netns

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// PrivateMount makes dir, which exists and is the caller's alone, a mount point
// with private propagation: mounts below it stay in this mount namespace. A
// directory that is not a mount point is bind-mounted on itself; doing it again
// changes nothing, and a crash between the two steps is repaired by the next
// call. Mounts already below dir stay visible and become private too.
func PrivateMount(dir string) error {
	const private = unix.MS_PRIVATE | unix.MS_REC
	err := unix.Mount("", dir, "", private, "")
	if err == nil {
		return nil
	}
	// EINVAL is the kernel's word for "not a mount point".
	if !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("private mount %s: %w", dir, err)
	}
	if err := unix.Mount(dir, dir, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("private mount %s: bind: %w", dir, err)
	}
	if err := unix.Mount("", dir, "", private, ""); err != nil {
		return fmt.Errorf("private mount %s: %w", dir, err)
	}
	return nil
}
