//go:build !amd64 && !arm64

package main

import (
	"os"
	"os/signal"

	"golang.org/x/sys/unix"
)

func prepare() {
	set(unix.SIGCHLD, sigaction{handler: sigIgn})
	c := make(chan os.Signal, 1)
	signal.Notify(c, unix.SIGTERM, unix.SIGINT)
	go func() {
		<-c
		unix.Exit(0)
	}()
}
