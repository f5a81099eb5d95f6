// Command berth-init is the first process of a pod whose containers share a PID
// namespace. It runs as an OCI container of its own, reaps what is left to it,
// and exits with 0 on SIGTERM or SIGINT. It takes no arguments, opens no file
// and links nothing but system calls.
//
// Caveat: children are reaped by the kernel, because SIGCHLD is ignored. That
// is inherited across execve, which this program never calls.
package main

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

func main() {
	prepare()
	for {
		unix.Select(0, nil, nil, nil, nil) // returns only when interrupted
	}
}

const sigIgn = 1

// sigaction is the kernel's struct of that name.
type sigaction struct {
	handler  uintptr
	flags    uint64
	restorer uintptr
	mask     uint64
}

func set(sig unix.Signal, sa sigaction) {
	_, _, errno := unix.RawSyscall6(unix.SYS_RT_SIGACTION, uintptr(sig), uintptr(unsafe.Pointer(&sa)), 0, 8, 0, 0)
	if errno != 0 {
		unix.Exit(1)
	}
}
