package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// firstFD is where file descriptors from the service manager begin
// (sd_listen_fds(3)).
const firstFD = 3

// storeName is the name of the CRI socket in the manager's store.
const storeName = "cri"

// inherited are the sockets that the service manager handed to this process,
// by socket activation or from its store. The environment is cleared, and the
// descriptors are closed on exec.
func inherited() ([]*os.File, error) {
	pid, count := os.Getenv("LISTEN_PID"), os.Getenv("LISTEN_FDS")
	for _, k := range []string{"LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"} {
		if err := os.Unsetenv(k); err != nil {
			return nil, err
		}
	}
	if pid != strconv.Itoa(os.Getpid()) {
		return nil, nil
	}
	n, err := strconv.Atoi(count)
	if err != nil || n < 0 || n > 64 {
		return nil, fmt.Errorf("LISTEN_FDS %q: want 0 to 64", count)
	}
	files := make([]*os.File, n)
	for i := range files {
		unix.CloseOnExec(firstFD + i)
		files[i] = os.NewFile(uintptr(firstFD+i), "inherited-"+strconv.Itoa(i))
	}
	return files, nil
}

// listen gives the listener of the CRI socket: the inherited one that is at
// this path, or a new one, which is then left with the manager. Other sockets
// that were inherited are closed.
func listen(ctx context.Context, socket string, files []*os.File, n notifier) (l *net.UnixListener, err error) {
	for _, f := range files {
		if l == nil && err == nil && isAt(f, socket) {
			l, err = fromFile(f)
		}
		err = errors.Join(err, f.Close())
	}
	if l != nil || err != nil {
		return l, err
	}
	if l, err = listenUnix(ctx, socket); err == nil && n.store(storeName, l) {
		l.SetUnlinkOnClose(false)
	}
	return l, err
}

func fromFile(f *os.File) (*net.UnixListener, error) {
	l, err := net.FileListener(f)
	if err != nil {
		return nil, fmt.Errorf("inherited socket: %w", err)
	}
	ul, ok := l.(*net.UnixListener)
	if !ok {
		return nil, errors.Join(fmt.Errorf("inherited socket: %s is not a unix socket", l.Addr()), l.Close())
	}
	ul.SetUnlinkOnClose(false)
	return ul, nil
}

// siocUnixFile opens the file that a unix socket is bound to (linux/un.h). The
// address of a socket does not tell whether its file is still in its place.
const siocUnixFile = unix.SIOCPROTOPRIVATE

// isAt tells whether f is a listening unix stream socket and the file at path
// is its own.
func isAt(f *os.File, path string) bool {
	fd := int(f.Fd())
	listening, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN)
	if err != nil || listening != 1 {
		return false
	}
	r, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), siocUnixFile, 0)
	if errno != 0 {
		// Only its name is to be had, without a privilege over the network.
		addr, err := unix.Getsockname(fd)
		name, ok := addr.(*unix.SockaddrUnix)
		return err == nil && ok && name.Name == path
	}
	defer unix.Close(int(r))
	var own, there unix.Stat_t
	return unix.Fstat(int(r), &own) == nil && unix.Lstat(path, &there) == nil &&
		own.Dev == there.Dev && own.Ino == there.Ino
}

// listenUnix makes a unix socket that only root may connect to, in place of
// one that a dead process left there. The caller knows that no other berthd
// runs on this state directory; a living listener of any kind is not replaced.
func listenUnix(ctx context.Context, path string) (*net.UnixListener, error) {
	if err := removeStale(path); err != nil {
		return nil, fmt.Errorf("socket %s: %w", path, err)
	}
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		// The mode of the socket's inode, before bind, is that of the file
		// that bind makes: there is no moment in which others may connect.
		var err error
		return errors.Join(c.Control(func(fd uintptr) { err = unix.Fchmod(int(fd), 0o600) }), err)
	}}
	l, err := lc.Listen(ctx, "unix", path)
	if err != nil {
		return nil, err
	}
	return l.(*net.UnixListener), nil
}

// removeStale removes a socket to which nobody listens any more.
func removeStale(path string) error {
	st, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if st.Mode()&os.ModeSocket == 0 {
		return fmt.Errorf("is a file of another kind (%s), not replaced", st.Mode().Type())
	}
	c, err := net.Dial("unix", path)
	if err == nil {
		_ = c.Close()
		return errors.New("another process listens to it")
	}
	if !errors.Is(err, unix.ECONNREFUSED) {
		return err
	}
	return os.Remove(path)
}

// listenMetrics listens where metrics_listen says; nil for nowhere.
func listenMetrics(ctx context.Context, where string) (net.Listener, error) {
	network, address, err := metricsAddress(where)
	if err != nil || network == "" {
		return nil, err
	}
	if network == "unix" {
		return listenUnix(ctx, address)
	}
	return new(net.ListenConfig).Listen(ctx, network, strings.TrimSpace(address))
}
