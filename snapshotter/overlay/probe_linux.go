package overlay

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// loadModule makes the kernel load the overlay module if it is one, so that its
// parameters can be read. Without the privilege for it nothing happens, and
// nothing could be mounted either.
func loadModule() {
	if fd, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC); err == nil {
		unix.Close(fd)
	}
}

// Supported returns nil when snapshots under root, an existing directory, can be
// mounted, or why not: no overlay in the kernel, or a file system below root
// that cannot hold a writable layer, such as overlay itself. It makes and
// removes a directory in root, mounts nothing, and needs CAP_SYS_ADMIN. Kernels
// without fsopen(2) (before 5.2) are believed, and so is a disk without room for
// the directory: a node has to come up for things to be removed from it.
func Supported(root string) error {
	err := supported(root)
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return nil
	}
	return err
}

func supported(root string) (err error) {
	dir, err := os.MkdirTemp(root, "probe-")
	if err != nil {
		return fmt.Errorf("overlay: probe: %w", err)
	}
	defer func() { err = errors.Join(err, removeTree(dir, nil)) }()

	fs, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	if errors.Is(err, unix.ENOSYS) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("overlay: probe: fsopen: %w", err)
	}
	defer unix.Close(fs)
	for _, name := range []string{"lower", "upper", "work"} {
		sub := filepath.Join(dir, name)
		if err := os.Mkdir(sub, 0o700); err != nil {
			return fmt.Errorf("overlay: probe: %w", err)
		}
		if err := unix.FsconfigSetString(fs, name+"dir", sub); err != nil {
			return fmt.Errorf("overlay: probe: %s layer on %s: %w%s", name, root, err, messages(fs))
		}
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		return fmt.Errorf("overlay: probe: mount on %s: %w%s", root, err, messages(fs))
	}
	return nil
}

// messages returns what the kernel has to say about an error, for appending to
// it. Each read of the descriptor gives one line.
func messages(fs int) string {
	var text string
	buf := make([]byte, 256)
	for range 8 {
		n, err := unix.Read(fs, buf)
		if err != nil || n <= 0 {
			break
		}
		text += "; " + string(buf[:n])
	}
	return text
}
