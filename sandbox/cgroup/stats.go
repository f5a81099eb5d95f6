package cgroup

import (
	"bytes"
	"errors"
	"fmt"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// NoLimit is the value of a limit that is not set.
const NoLimit = ^uint64(0)

// noLimitV1 is what v1 shows for it, give or take a page: the most pages that fit
// into a signed number of bytes.
const noLimitV1 = 1 << 62

// Stats is the usage of a group and the groups below it, as read at At. The
// values are the ones that the kubelet's own reader (cAdvisor) would give.
type Stats struct {
	At          time.Time
	CPUUsage    uint64 // nanoseconds since the group was made
	MemoryUsage uint64 // bytes, with the page cache
	MemoryLimit uint64 // bytes, NoLimit if there is none in the group itself
	WorkingSet  uint64 // bytes: usage without the inactive part of the page cache
	RSS         uint64 // bytes of anonymous memory
	PageFaults  uint64 // since the group was made, minor and major ones
	MajorFaults uint64
	SwapUsage   uint64 // bytes
	SwapLimit   uint64 // bytes of swap alone, NoLimit if there is none
	Pids        uint64 // threads

	// Pressure stall information; nil on v1 and where the kernel has it off.
	CPU, Memory, IO *Pressure
}

// MemoryAvailable returns how many bytes the working set may grow by, and false
// if there is no limit.
func (s Stats) MemoryAvailable() (uint64, bool) { return available(s.MemoryLimit, s.WorkingSet) }

// SwapAvailable returns how many more bytes may be swapped, and false if there is
// no limit.
func (s Stats) SwapAvailable() (uint64, bool) { return available(s.SwapLimit, s.SwapUsage) }

func available(limit, used uint64) (uint64, bool) {
	if limit == NoLimit {
		return 0, false
	}
	return limit - min(used, limit), true
}

// Pressure is pressure stall information of one resource: the time in which some,
// or all, processes that wanted to run waited for it.
type Pressure struct{ Some, Full PressureLine }

// PressureLine has averages in percent over 10, 60 and 300 seconds, and the sum
// in nanoseconds.
type PressureLine struct {
	Avg10, Avg60, Avg300 float64
	Total                uint64
}

// Stats reads the usage, each file once. [ErrGone] if the group does not exist.
// What is not controlled on this machine is zero, or NoLimit.
func (g Group) Stats() (Stats, error) {
	s := Stats{At: time.Now(), MemoryLimit: NoLimit, SwapLimit: NoLimit}
	read := g.statsV1
	if g.h.v2 {
		read = g.statsV2
	}
	r := reader{buf: make([]byte, 16<<10)}
	read(&r, &s)
	switch {
	case r.found == 0 && r.err == nil:
		return Stats{}, fmt.Errorf("control group %s: %w", g.path, ErrGone)
	case r.err != nil:
		return Stats{}, fmt.Errorf("control group %s: %w", g.path, r.err)
	}
	return s, nil
}

func (g Group) statsV2(r *reader, s *Stats) {
	dir := g.dir(unified)
	if b, ok := r.file(dir, "cpu.stat"); ok {
		s.CPUUsage = keys(b, "usage_usec")[0] * 1000
	}
	if v, ok := r.number(dir, "memory.current"); ok {
		s.MemoryUsage = v
	}
	if b, ok := r.file(dir, "memory.stat"); ok {
		v := keys(b, "anon", "inactive_file", "pgfault", "pgmajfault")
		s.RSS, s.PageFaults, s.MajorFaults = v[0], v[2], v[3]
		s.WorkingSet = s.MemoryUsage - min(v[1], s.MemoryUsage)
	}
	if v, ok := r.number(dir, "memory.max"); ok {
		s.MemoryLimit = v
	}
	if v, ok := r.number(dir, "memory.swap.current"); ok {
		s.SwapUsage = v
	}
	if v, ok := r.number(dir, "memory.swap.max"); ok {
		s.SwapLimit = v
	}
	if v, ok := r.number(dir, "pids.current"); ok {
		s.Pids = v
	}
	s.CPU, s.Memory, s.IO = r.pressure(dir, "cpu.pressure"), r.pressure(dir, "memory.pressure"), r.pressure(dir, "io.pressure")
}

func (g Group) statsV1(r *reader, s *Stats) {
	if v, ok := r.number(g.dir("cpuacct"), "cpuacct.usage"); ok {
		s.CPUUsage = v
	}
	dir := g.dir("memory")
	if v, ok := r.number(dir, "memory.usage_in_bytes"); ok {
		s.MemoryUsage = v
	}
	if b, ok := r.file(dir, "memory.stat"); ok {
		v := keys(b, "total_rss", "total_inactive_file", "total_pgfault", "total_pgmajfault", "total_swap")
		s.RSS, s.PageFaults, s.MajorFaults, s.SwapUsage = v[0], v[2], v[3], v[4]
		s.WorkingSet = s.MemoryUsage - min(v[1], s.MemoryUsage)
	}
	if v, ok := r.number(dir, "memory.limit_in_bytes"); ok && v < noLimitV1 {
		s.MemoryLimit = v
	}
	// v1 limits memory and swap together.
	if v, ok := r.number(dir, "memory.memsw.limit_in_bytes"); ok && v < noLimitV1 && s.MemoryLimit != NoLimit {
		s.SwapLimit = v - min(s.MemoryLimit, v)
	}
	if v, ok := r.number(g.dir("pids"), "pids.current"); ok {
		s.Pids = v
	}
}

// reader reads small files of the kernel into one buffer. It keeps the first
// error that is not the absence of a file.
type reader struct {
	buf   []byte
	found int // files read
	err   error
}

// file returns the content until the next call, and false if there is none.
func (r *reader) file(dir, name string) ([]byte, bool) {
	if r.err != nil || dir == "" {
		return nil, false
	}
	n, err := readInto(r.buf, filepath.Join(dir, name))
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENODEV), errors.Is(err, unix.EOPNOTSUPP):
		return nil, false
	case err != nil:
		r.err = fmt.Errorf("%s: %w", name, err)
		return nil, false
	}
	r.found++
	return r.buf[:n], true
}

func readInto(buf []byte, name string) (int, error) {
	fd, err := unix.Open(name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	for n := 0; n < len(buf); {
		m, err := unix.Read(fd, buf[n:])
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return 0, err
		}
		if m == 0 {
			return n, nil
		}
		n += m
	}
	return 0, fmt.Errorf("over %d bytes", len(buf)-1)
}

// number reads a file with one number, or "max".
func (r *reader) number(dir, name string) (uint64, bool) {
	b, ok := r.file(dir, name)
	if !ok {
		return 0, false
	}
	b = bytes.TrimSpace(b)
	if string(b) == "max" {
		return NoLimit, true
	}
	v, err := strconv.ParseUint(string(b), 10, 64)
	if err != nil {
		r.err = fmt.Errorf("%s: %q is no number", name, clip(string(b)))
	}
	return v, err == nil
}

// keys returns the values of "key value" lines, 0 for a key that is missing.
func keys(b []byte, want ...string) []uint64 {
	values := make([]uint64, len(want))
	for line := range bytes.Lines(b) {
		key, value, _ := bytes.Cut(bytes.TrimSpace(line), []byte(" "))
		for i, w := range want {
			if string(key) == w {
				values[i], _ = strconv.ParseUint(string(value), 10, 64)
			}
		}
	}
	return values
}

// pressure reads a file of the kernel's psi.rst. One that is not there, as when
// PSI is off, gives nil.
func (r *reader) pressure(dir, name string) *Pressure {
	b, ok := r.file(dir, name)
	if !ok {
		return nil
	}
	p, err := parsePressure(b)
	if err != nil {
		r.err = fmt.Errorf("%s: %w", name, err)
	}
	return p
}

func parsePressure(b []byte) (*Pressure, error) {
	p := &Pressure{}
	for line := range bytes.Lines(b) {
		f := bytes.Fields(line)
		if len(f) == 0 {
			continue
		}
		l := &p.Some
		if string(f[0]) == "full" {
			l = &p.Full
		} else if string(f[0]) != "some" {
			continue
		}
		for _, kv := range f[1:] {
			key, value, _ := bytes.Cut(kv, []byte("="))
			if err := l.set(string(key), string(value)); err != nil {
				return nil, fmt.Errorf("%q: %w", clip(string(kv)), err)
			}
		}
	}
	return p, nil
}

func (l *PressureLine) set(key, value string) (err error) {
	switch key {
	case "avg10":
		l.Avg10, err = strconv.ParseFloat(value, 64)
	case "avg60":
		l.Avg60, err = strconv.ParseFloat(value, 64)
	case "avg300":
		l.Avg300, err = strconv.ParseFloat(value, 64)
	case "total":
		var us uint64
		us, err = strconv.ParseUint(value, 10, 64)
		l.Total = us * 1000
	}
	return err
}
