package shimd

import (
	"bytes"
	"strconv"
	"unsafe"

	"golang.org/x/sys/unix"
)

// readFile reads at most limit bytes of a file.
func readFile(path string, limit int) ([]byte, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	return readAt(fd, 0, limit)
}

// readAt reads at most limit bytes from offset off on.
func readAt(fd int, off int64, limit int) ([]byte, error) {
	b := make([]byte, 0, min(limit, 512))
	for len(b) < limit {
		if len(b) == cap(b) {
			b = append(b, 0)[:len(b)]
		}
		n, err := unix.Pread(fd, b[len(b):min(cap(b), limit)], off+int64(len(b)))
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return nil, err
		}
		if n == 0 {
			break
		}
		b = b[:len(b)+n]
	}
	return b, nil
}

// writeAll writes b to a file that does not block.
func writeAll(fd int, b []byte) error {
	for len(b) > 0 {
		n, err := unix.Write(fd, b)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return err
		}
		b = b[n:]
	}
	return nil
}

// writeFile writes to an existing file, such as one of a cgroup.
func writeFile(path, text string) error {
	fd, err := unix.Open(path, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return writeAll(fd, []byte(text))
}

// replaceFile writes b to path by way of a temporary file beside it, so that
// the path names either nothing or all of b.
func replaceFile(path string, b []byte) error {
	tmp := path + ".tmp"
	fd, err := unix.Open(tmp, unix.O_WRONLY|unix.O_CREAT|unix.O_TRUNC|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	err = writeAll(fd, b)
	if cerr := unix.Close(fd); err == nil {
		err = cerr
	}
	if err == nil {
		err = unix.Rename(tmp, path)
	}
	if err != nil {
		unix.Unlink(tmp)
	}
	return err
}

// readPid reads a file that holds one process ID, and removes it. The name is
// one in directory dir, with a NUL at its end.
func readPid(dir int, name []byte) (int, error) {
	fd, _, errno := unix.Syscall6(unix.SYS_OPENAT, uintptr(dir), uintptr(unsafe.Pointer(&name[0])), unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0, 0, 0)
	if errno != 0 {
		return 0, errno
	}
	var b [16]byte
	n, err := unix.Read(int(fd), b[:])
	unix.Close(int(fd))
	if err != nil {
		return 0, err
	}
	unlinkAt(dir, name)
	pid := 0
	for _, c := range bytes.TrimSpace(b[:n]) {
		if c < '0' || c > '9' {
			return 0, unix.EINVAL
		}
		pid = pid*10 + int(c-'0')
	}
	if pid <= 1 || n == len(b) {
		return 0, unix.EINVAL
	}
	return pid, nil
}

// unlinkAt removes a file; name is as for readPid.
func unlinkAt(dir int, name []byte) {
	unix.Syscall(unix.SYS_UNLINKAT, uintptr(dir), uintptr(unsafe.Pointer(&name[0])), 0)
}

// eachDir calls fn for the names of the directories in dir. It tells them by
// their type in the entry, which /proc and cgroup file systems give.
func eachDir(dir string, fn func(name string)) error {
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	buf := make([]byte, 2048)
	for {
		n, err := unix.ReadDirent(fd, buf)
		if n <= 0 || err != nil {
			return err
		}
		for b := buf[:n]; len(b) > direntName; {
			// ino u64, off u64, reclen u16, type u8, name
			size := int(b[16]) | int(b[17])<<8
			if size <= direntName || size > len(b) {
				return unix.EIO
			}
			name := b[direntName:size]
			if i := bytes.IndexByte(name, 0); i >= 0 {
				name = name[:i]
			}
			if b[18] == unix.DT_DIR && name[0] != '.' {
				fn(string(name))
			}
			b = b[size:]
		}
	}
}

const direntName = 19

func fdPath(fd int) string {
	return "/proc/" + strconv.Itoa(unix.Getpid()) + "/fd/" + strconv.Itoa(fd)
}
