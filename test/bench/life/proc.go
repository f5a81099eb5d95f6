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

	"github.com/berthd/berth/test/bench/endpoint"
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
		kib += float64(endpoint.Value(fmt.Sprintf("/proc/%d/smaps_rollup", pid), "Pss"))
	}
	return kib
}

// kernelMemory is what the kernel needs for itself, in KiB, by /proc/meminfo.
type kernelMemory struct {
	slab          int64 // with caches of directory entries and inodes
	unreclaimable int64 // slabs without those
	rest          int64 // stacks of threads, page tables, per-CPU data
}

func readKernelMemory() kernelMemory {
	v := func(key string) int64 { return endpoint.Value("/proc/meminfo", key) }
	return kernelMemory{slab: v("Slab"), unreclaimable: v("SUnreclaim"), rest: v("KernelStack") + v("PageTables") + v("Percpu")}
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
