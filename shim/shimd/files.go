package shimd

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// maxFiles bounds the descriptors of a client that no frame has taken yet. No
// frame takes more than three.
const maxFiles = 32

// What receive works with, kept because it runs for every frame.
var (
	received    unix.Msghdr
	receivedIov unix.Iovec
	receivedOOB [64]byte // room for twelve descriptors
)

// receive reads from the client into the shared buffer, and keeps what
// descriptors come along.
func (c *conn) receive() ([]byte, error) {
	for {
		receivedIov.Base = &inBuf[0]
		receivedIov.SetLen(inSize)
		received = unix.Msghdr{Iov: &receivedIov, Iovlen: 1, Control: &receivedOOB[0]}
		received.SetControllen(len(receivedOOB))
		n, _, errno := unix.Syscall(unix.SYS_RECVMSG, uintptr(c.fd), uintptr(unsafe.Pointer(&received)), unix.MSG_CMSG_CLOEXEC)
		if errno == unix.EINTR {
			continue
		}
		if errno != 0 {
			return nil, errno
		}
		if received.Controllen > 0 && !c.keep(receivedOOB[:received.Controllen]) {
			return nil, unix.EMSGSIZE
		}
		inHigh = max(inHigh, int(n))
		return inBuf[:n], nil
	}
}

// keep returns false when descriptors were lost: frames would get others than
// theirs.
func (c *conn) keep(oob []byte) bool {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return false
	}
	for i := range messages {
		if fds, err := unix.ParseUnixRights(&messages[i]); err == nil {
			c.files = append(c.files, fds...)
		}
	}
	return received.Flags&unix.MSG_CTRUNC == 0 && len(c.files) <= maxFiles
}

// takeFiles hands the next n descriptors over, to be closed by who takes them,
// or none of them.
func (c *conn) takeFiles(n int) ([]int, bool) {
	if n > len(c.files) {
		return nil, false
	}
	got := append([]int(nil), c.files[:n]...)
	if c.files = c.files[n:]; len(c.files) == 0 {
		c.files = nil
	}
	return got, true
}

func closeFDs(fds []int) {
	for _, fd := range fds {
		closeFD(fd)
	}
}

// closeFD closes fd unless it is -1.
func closeFD(fd int) {
	if fd >= 0 {
		unix.Close(fd)
	}
}
