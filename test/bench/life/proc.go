package main

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// helperNames are what the processes are called that stay with pods.
var helperNames = regexp.MustCompile(`^(berth-shim|berth-init|containerd-shim.*|conmon.*|pause)$`)

// helpers lists the processes of that kind.
func helpers() (pids []int) {
	entries, _ := os.ReadDir("/proc")
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		line, err := os.ReadFile(filepath.Join("/proc", e.Name(), "cmdline"))
		if err != nil {
			continue
		}
		name, _, _ := strings.Cut(string(line), "\x00")
		if helperNames.MatchString(filepath.Base(name)) {
			pids = append(pids, pid)
		}
	}
	return pids
}

// without returns what of a is not in b.
func without(a, b []int) (rest []int) {
	for _, v := range a {
		if !slices.Contains(b, v) {
			rest = append(rest, v)
		}
	}
	return rest
}

// pss is the proportional share of memory of processes, in KiB.
func pss(pids ...int) (kib float64) {
	for _, pid := range pids {
		kib += value(fmt.Sprintf("/proc/%d/smaps_rollup", pid), "Pss")
	}
	return kib
}

// slab is the kernel's memory in slabs, in KiB.
func slab() float64 { return value("/proc/meminfo", "Slab") }

// value finds a line "key: n …" of a file.
func value(file, key string) float64 {
	b, err := os.ReadFile(file)
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, key+":"); ok {
			if f := strings.Fields(v); len(f) > 0 {
				n, _ := strconv.ParseFloat(f[0], 64)
				return n
			}
		}
	}
	return 0
}

// used is the processor time that processes have used, in seconds to 10 ms.
func used(pids ...int) (seconds float64) {
	for _, pid := range pids {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			continue
		}
		// The name in parentheses may hold anything; the state is field 3.
		f := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
		if len(f) > 12 {
			for _, v := range f[11:13] { // utime, stime; USER_HZ is 100
				n, _ := strconv.ParseFloat(v, 64)
				seconds += n / 100
			}
		}
	}
	return seconds
}

// busy is the processor time of the machine, less this program's, in seconds.
func busy() float64 {
	b, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0
	}
	line, _, _ := strings.Cut(string(b), "\n")
	var ticks float64
	for i, v := range strings.Fields(line) {
		if i == 0 || i == 4 || i == 5 || i > 8 { // name, idle, iowait, guests
			continue
		}
		n, _ := strconv.ParseFloat(v, 64)
		ticks += n
	}
	var ru unix.Rusage
	if unix.Getrusage(unix.RUSAGE_SELF, &ru) != nil {
		return ticks / 100
	}
	own := time.Duration(ru.Utime.Nano() + ru.Stime.Nano())
	return ticks/100 - own.Seconds()
}
