package cni

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"
)

const (
	// orphanPatience is how long orphans may go on by themselves.
	orphanPatience = time.Second
	// orphanGrace is how long killed orphans are waited for. One that is stuck
	// in the kernel longer does not hold up the start.
	orphanGrace = 2 * time.Second
	// clearLimit is how long new plugins wait for the orphans' end. To look for these
	// is to read of every process of the machine, which may hang with it.
	clearLimit = 10 * time.Second
)

// within starts a search for orphans, and closes the channel when it has ended or its
// context, which has that limit.
func within(limit time.Duration, search func(context.Context)) <-chan struct{} {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	ended, over := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		search(ctx)
	}()
	go func() {
		defer cancel()
		defer close(over)
		select {
		case <-ended:
		case <-ctx.Done():
			klog.Background().Error(ctx.Err(), "Search for network plugins of an earlier daemon hangs, new ones no longer wait for it", "limit", limit)
		}
	}()
	return over
}

// killOrphans ends the plugins of an earlier daemon on the same cache directory.
// That daemon was killed in the middle of a verb; the plugin, in its own process
// group, works on and could give an address to a pod whose DEL is under way.
//
// They get a moment to finish first, for plugins are not made to be killed: the
// bridge plugin, for one, learns from the pod's interface which rules to remove,
// and removes the interface before the rules, so that no later DEL would find
// what a killed one has left.
//
// Whoever started a session of its own (a plugin's daemon) is left alone.
// It kills nobody after the end of ctx, when new plugins may run that look the same.
func killOrphans(ctx context.Context, mark string) (killed int) {
	fds := orphans(mark)
	if len(fds) == 0 {
		return 0
	}
	awaitEnd(fds, orphanPatience)
	fds = orphans(mark)
	if ctx.Err() != nil {
		awaitEnd(fds, 0)
		return 0
	}
	for _, fd := range fds {
		if unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0) == nil {
			killed++
		}
	}
	awaitEnd(fds, orphanGrace)
	return killed
}

// orphans finds the plugins of that mark, and what they have started, as pidfds,
// which awaitEnd closes.
func orphans(mark string) (fds []int) {
	procs, err := os.ReadDir("/proc")
	own, err2 := os.Readlink("/proc/self/ns/pid")
	if err != nil || err2 != nil {
		return nil
	}
	for _, p := range procs {
		pid, err := strconv.Atoi(p.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		// A process in a container can choose how long it takes to read its environment.
		if ns, err := os.Readlink("/proc/" + p.Name() + "/ns/pid"); err != nil || ns != own {
			continue
		}
		if fd, ok := openIfMarked(pid, mark); ok {
			fds = append(fds, fd)
		}
	}
	return fds
}

// awaitEnd waits until all the processes have ended, at most for that long
// altogether, and closes the pidfds.
func awaitEnd(fds []int, limit time.Duration) {
	deadline := time.Now().Add(limit)
	for _, fd := range fds {
		for {
			left := time.Until(deadline)
			if left <= 0 {
				break
			}
			// A pidfd is readable once the process has ended.
			n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(left.Milliseconds())+1)
			if err != unix.EINTR || n > 0 {
				break
			}
		}
		unix.Close(fd)
	}
}

// openIfMarked opens the process if it is a plugin of that mark. The pidfd comes
// first, so that what was looked at is what is killed.
func openIfMarked(pid int, mark string) (fd int, ok bool) {
	env, err := readBounded(fmt.Sprintf("/proc/%d/environ", pid), maxOutput)
	if err != nil || !marked(env, mark) {
		return -1, false
	}
	fd, err = unix.PidfdOpen(pid, 0)
	if err != nil {
		return -1, false
	}
	env, err = readBounded(fmt.Sprintf("/proc/%d/environ", pid), maxOutput)
	if err == nil && marked(env, mark) && !leadsSession(pid) {
		return fd, true
	}
	unix.Close(fd)
	return -1, false
}

// marked looks for the mark in an environment as /proc shows it.
func marked(environ []byte, mark string) bool {
	want := []byte(markEnv + "=" + mark)
	for kv := range bytes.SplitSeq(environ, []byte{0}) {
		if bytes.Equal(kv, want) {
			return true
		}
	}
	return false
}

// leadsSession tells whether the process is in the first group of its session,
// as a daemon is and a plugin's group is not.
func leadsSession(pid int) bool {
	stat, err := readBounded(fmt.Sprintf("/proc/%d/stat", pid), 4096)
	if err != nil {
		return true
	}
	// The command, in parentheses, may contain anything, so count from its end:
	// state, ppid, pgrp, session (proc_pid_stat(5)).
	_, rest, _ := strings.Cut(string(stat[max(0, bytes.LastIndexByte(stat, ')')):]), " ")
	f := strings.Fields(rest)
	return len(f) < 4 || f[2] == f[3]
}

// readBounded reads a regular file of at most limit bytes. It does not wait for
// the writer of a pipe that somebody put in its place.
func readBounded(path string, limit int64) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !fi.Mode().IsRegular() {
		return nil, fmt.Errorf("%s: not a regular file", path)
	}
	b, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(b)) > limit {
		return nil, fmt.Errorf("%s: more than %d bytes", path, limit)
	}
	return b, nil
}
