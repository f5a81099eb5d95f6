package netns

import (
	"errors"
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// errAborted is what OnThread returns when fn left by runtime.Goexit.
var errAborted = errors.New("function ended without returning")

// OnThread runs fn on an operating-system thread of its own and waits for it. The
// thread ends with fn: a goroutine that exits while locked takes its thread
// along, and with it whatever fn did to the thread's namespaces and descriptors.
//
// The process's first thread is the exception. The runtime cannot end it and
// would park it as fn left it, and /proc/<pid>/ns would then show the
// namespaces of some pod as the daemon's. So when the scheduler offers that
// thread, it is held (and later released untouched) while fn runs on another.
func OnThread(fn func() error) error {
	done := make(chan error, 1)
	go func() {
		err := errAborted
		defer func() { done <- err }()
		runtime.LockOSThread()
		if unix.Gettid() == os.Getpid() {
			defer runtime.UnlockOSThread()
			err = OnThread(fn)
			return
		}
		err = fn()
	}()
	return <-done
}

// LoopbackUp brings up the interface lo of the calling thread's network
// namespace, which also gives it its addresses (127.0.0.1/8, ::1/128). It is
// meant for the setup function of Create.
func LoopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("loopback: socket: %w", err)
	}
	defer unix.Close(fd)
	ifr, err := unix.NewIfreq("lo")
	if err != nil {
		return fmt.Errorf("loopback: %w", err)
	}
	if err := unix.IoctlIfreq(fd, unix.SIOCGIFFLAGS, ifr); err != nil {
		return fmt.Errorf("loopback: read flags: %w", err)
	}
	ifr.SetUint16(ifr.Uint16() | unix.IFF_UP)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr); err != nil {
		return fmt.Errorf("loopback: set up: %w", err)
	}
	return nil
}
