package endpoint

import (
	"fmt"
	"os"
	"strconv"
	"strings"
)

// Value finds the number n of a line "key: n …" of a file; 0 if there is none.
func Value(file, key string) int64 {
	b, err := os.ReadFile(file)
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, key+":"); ok {
			if f := strings.Fields(v); len(f) > 0 {
				n, _ := strconv.ParseInt(f[0], 10, 64)
				return n
			}
		}
	}
	return 0
}

// CPU is the processor time that processes have used, in seconds to 10 ms.
func CPU(pids ...int) (seconds float64) {
	for _, pid := range pids {
		seconds += ticks(pid, 11, 13) // utime, stime
	}
	return seconds
}

// CPUWithChildren is CPU with that of the children that the process waited for.
func CPUWithChildren(pid int) float64 { return ticks(pid, 11, 15) }

// ticks adds up fields of /proc/<pid>/stat, counted from the state, in seconds:
// USER_HZ is 100 wherever Go runs on Linux.
func ticks(pid, from, to int) (seconds float64) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0
	}
	// The name in parentheses may hold anything.
	f := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	if len(f) < to {
		return 0
	}
	for _, v := range f[from:to] {
		n, _ := strconv.ParseFloat(v, 64)
		seconds += n / 100
	}
	return seconds
}
