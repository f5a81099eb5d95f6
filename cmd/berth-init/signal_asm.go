//go:build amd64 || arm64

//lint:file-ignore U1000 the assembly uses what Go does not

package main

import "golang.org/x/sys/unix"

// onEnd is the handler of the signals that end the process: exit_group(0). It
// never returns, so it needs no restorer.
func onEnd()
func onEndPC() uintptr

const (
	saOnStack  = 0x08000000
	saRestorer = 0x04000000
)

func prepare() {
	set(unix.SIGCHLD, sigaction{handler: sigIgn})
	end := sigaction{handler: onEndPC(), flags: saOnStack | saRestorer, mask: ^uint64(0)}
	set(unix.SIGTERM, end)
	set(unix.SIGINT, end)
}
