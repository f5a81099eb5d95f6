//go:build amd64 || arm64

//lint:file-ignore U1000 the assembly uses what Go does not

package shimd

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// Signals without package os/signal, which would keep a thread and two
// goroutines in every shim: the handler for SIGCHLD, a few instructions, adds
// to the eventfd that the loop waits for, on whatever thread the kernel picks.

// wakeFD is the eventfd that onChild writes wakeOne to.
var (
	wakeFD  int32
	wakeOne uint64 = 1
)

// Handlers, called by the kernel only.
func onChild()
func onIgnored()
func onReturn()

func onChildPC() uintptr
func onIgnoredPC() uintptr
func onReturnPC() uintptr

// sigaction is the kernel's struct of that name.
type sigaction struct {
	handler  uintptr
	flags    uint64
	restorer uintptr
	mask     uint64
}

const (
	saOnStack  = 0x08000000
	saRestart  = 0x10000000
	saRestorer = 0x04000000
)

// watchSignals makes fd readable when a child changed state, and makes the
// signals that would end a shim do nothing. They get a handler rather than be
// ignored: what is ignored stays so across execve, in the container too.
func watchSignals(fd int) error {
	wakeFD = int32(fd)
	if err := unignore(); err != nil {
		return err
	}
	if err := handle(unix.SIGCHLD, onChildPC()); err != nil {
		return err
	}
	for _, sig := range harmless {
		if err := handle(sig, onIgnoredPC()); err != nil {
			return err
		}
	}
	return nil
}

// The values of sigaction.handler that are no functions (signal(7)).
const (
	sigDfl = 0
	sigIgn = 1
)

// unignore gives signals that berthd was started with as ignored (nohup, some
// service managers) their default again, or every container would ignore them.
func unignore() error {
	for sig := uintptr(1); sig <= 64; sig++ {
		var sa sigaction
		_, _, errno := unix.RawSyscall6(unix.SYS_RT_SIGACTION, sig, 0, uintptr(unsafe.Pointer(&sa)), 8, 0, 0)
		if errno != 0 || sa.handler != sigIgn {
			continue
		}
		sa = sigaction{handler: sigDfl}
		if _, _, errno = unix.RawSyscall6(unix.SYS_RT_SIGACTION, sig, uintptr(unsafe.Pointer(&sa)), 0, 8, 0, 0); errno != 0 {
			return errno
		}
	}
	return nil
}

func handle(sig unix.Signal, pc uintptr) error {
	sa := sigaction{
		handler:  pc,
		flags:    saOnStack | saRestart | saRestorer,
		restorer: onReturnPC(),
		mask:     ^uint64(0),
	}
	_, _, errno := unix.RawSyscall6(unix.SYS_RT_SIGACTION, uintptr(sig), uintptr(unsafe.Pointer(&sa)), 0, 8, 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}
