package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// notifier tells the service manager about the daemon's state: sd_notify(3),
// datagrams of lines "KEY=VALUE" to the socket in $NOTIFY_SOCKET. The zero value
// has nobody to tell and does nothing.
type notifier struct {
	conn *net.UnixConn
}

// newNotifier connects to $NOTIFY_SOCKET and takes it from the environment, so
// that no child speaks in the daemon's name. "@" begins an abstract address.
func newNotifier() (notifier, error) {
	addr := os.Getenv("NOTIFY_SOCKET")
	if err := os.Unsetenv("NOTIFY_SOCKET"); err != nil || addr == "" {
		return notifier{}, err
	}
	if addr[0] != '/' && addr[0] != '@' {
		return notifier{}, fmt.Errorf("NOTIFY_SOCKET %q: want a path or an abstract address", addr)
	}
	conn, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: addr, Net: "unixgram"})
	if err != nil {
		return notifier{}, fmt.Errorf("NOTIFY_SOCKET: %w", err)
	}
	return notifier{conn}, nil
}

// send sends one message. A lost message is no reason to stop serving, so
// there is no error; the manager's own timeouts tell.
func (n notifier) send(lines string) {
	if n.conn != nil {
		_ = n.conn.SetWriteDeadline(time.Now().Add(time.Second))
		_, _ = n.conn.Write([]byte(lines))
	}
}

func (n notifier) ready(status string)  { n.send("READY=1\nSTATUS=" + status) }
func (n notifier) status(status string) { n.send("STATUS=" + status) }
func (n notifier) stopping()            { n.send("STOPPING=1\nSTATUS=Stopping, containers go on") }

// reloading has to carry the time, for units of Type=notify-reload.
func (n notifier) reloading() {
	var ts unix.Timespec
	if unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts) == nil {
		n.send("RELOADING=1\nMONOTONIC_USEC=" + strconv.FormatInt(ts.Nano()/1000, 10))
	}
}

// store leaves a listening socket with the manager, in place of what it has
// under that name. The manager hands it to the next start of the daemon:
// clients that connect in between wait instead of being refused. False means
// that there is no manager, or that it did not take it.
func (n notifier) store(name string, l *net.UnixListener) bool {
	if n.conn == nil {
		return false
	}
	// By its raw descriptor: File would make the listener's accept block, and
	// WriteMsgUnix refuses connected datagram sockets.
	manager, err := n.conn.SyscallConn()
	if err != nil {
		return false
	}
	socket, err := l.SyscallConn()
	if err != nil {
		return false
	}
	n.send("FDSTOREREMOVE=1\nFDNAME=" + name)
	var sent, reached error
	err = socket.Control(func(fd uintptr) {
		reached = manager.Control(func(to uintptr) {
			sent = unix.Sendmsg(int(to), []byte("FDSTORE=1\nFDNAME="+name), unix.UnixRights(int(fd)), nil, 0)
		})
	})
	return errors.Join(err, reached, sent) == nil
}

// watchdogInterval is how often the manager wants to hear from this process,
// halved to be safe; 0 if it does not ask. Children are not asked, so the
// environment is cleared.
func watchdogInterval() time.Duration {
	pid, text := os.Getenv("WATCHDOG_PID"), os.Getenv("WATCHDOG_USEC")
	if errors.Join(os.Unsetenv("WATCHDOG_PID"), os.Unsetenv("WATCHDOG_USEC")) != nil {
		return 0
	}
	usec, err := strconv.ParseUint(text, 10, 32)
	if err != nil || pid != "" && pid != strconv.Itoa(os.Getpid()) {
		return 0
	}
	return time.Duration(usec) * time.Microsecond / 2
}
