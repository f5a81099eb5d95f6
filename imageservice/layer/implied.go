package layer

import (
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// AdoptDirs gives each of the implied directories in root the owner, mode, attributes
// and times that the directory of that name has in below, the merged tree of the layers
// underneath. Without it, the upper layer's 0755 root:root would be what a container
// sees, of /tmp for instance. Names that are no directory in below are left as they are.
func AdoptDirs(below, root *os.File, implied []string) error {
	for _, name := range implied {
		if err := adoptDir(int(below.Fd()), int(root.Fd()), name); err != nil {
			return entryError(name, fmt.Errorf("metadata of the layers below: %w", err))
		}
	}
	return nil
}

func adoptDir(below, root int, name string) error {
	const flags = unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC
	from, err := resolve(below, name, flags)
	if err == unix.ENOENT || err == unix.ENOTDIR || err == unix.ELOOP {
		return nil
	}
	if err != nil {
		return err
	}
	defer unix.Close(from)
	to, err := resolve(root, name, flags)
	if err == unix.ENOENT || err == unix.ENOTDIR || err == unix.ELOOP {
		return nil // a later entry replaced it
	}
	if err != nil {
		return err
	}
	defer unix.Close(to)
	var st unix.Stat_t
	if err := unix.Fstat(from, &st); err != nil {
		return err
	}
	if err := unix.Fchown(to, int(st.Uid), int(st.Gid)); err != nil {
		return err
	}
	if err := unix.Fchmod(to, st.Mode&0o7777); err != nil {
		return err
	}
	if err := copyXattrs(from, to); err != nil {
		return err
	}
	return setTimes(to, ".", time.Unix(st.Atim.Unix()), time.Unix(st.Mtim.Unix()))
}

func copyXattrs(from, to int) error {
	xattrs, err := keptXattrs(from)
	if err != nil {
		return err
	}
	_, err = setXattrs(to, xattrs)
	return err
}
