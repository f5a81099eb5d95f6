package cgroup

import (
	"bytes"
	"fmt"
	"strconv"
	"time"
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
	Threads     uint64

	// Parts of the memory, in bytes.
	Cache, MappedFile, ActiveFile, InactiveFile uint64

	// Pressure stall information; nil where the kernel has it off and on v1
	// without the unified hierarchy beside it.
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

// Stats reads the usage once; a [Reader] does it often. [ErrGone] if the group
// does not exist. What is not controlled on this machine is zero, or NoLimit.
func (g Group) Stats() (Stats, error) {
	r := g.Reader()
	defer r.Close()
	return r.Stats()
}

// Stats reads the usage, each file once, as [Group.Stats] does.
func (r *Reader) Stats() (Stats, error) {
	s := Stats{At: time.Now(), MemoryLimit: NoLimit, SwapLimit: NoLimit}
	if err := r.read(true, func() { r.stats(&s) }); err != nil {
		return Stats{}, err
	}
	return s, nil
}

func (r *Reader) stats(s *Stats) {
	if r.g.h.v2 {
		r.statsV2(s)
	} else {
		r.statsV1(s)
	}
	// In hybrid mode the unified hierarchy has no controllers, but it has this.
	dir := r.g.unifiedDir()
	s.CPU, s.Memory, s.IO = r.pressure(dir, "cpu.pressure"), r.pressure(dir, "memory.pressure"), r.pressure(dir, "io.pressure")
}

func (r *Reader) statsV2(s *Stats) {
	dir := r.dir(unified)
	if b, ok := r.file(dir, "cpu.stat"); ok {
		s.CPUUsage = keys(b, "usage_usec")[0] * 1000
	}
	s.MemoryUsage = r.numberOr(dir, "memory.current", 0)
	if b, ok := r.file(dir, "memory.stat"); ok {
		v := keys(b, "anon", "inactive_file", "pgfault", "pgmajfault", "file", "file_mapped", "active_file")
		s.RSS, s.InactiveFile, s.PageFaults, s.MajorFaults = v[0], v[1], v[2], v[3]
		s.Cache, s.MappedFile, s.ActiveFile = v[4], v[5], v[6]
		s.WorkingSet = s.MemoryUsage - min(s.InactiveFile, s.MemoryUsage)
	}
	s.MemoryLimit = r.numberOr(dir, "memory.max", NoLimit)
	s.SwapUsage = r.numberOr(dir, "memory.swap.current", 0)
	s.SwapLimit = r.numberOr(dir, "memory.swap.max", NoLimit)
	s.Threads = r.numberOr(dir, "pids.current", 0)
}

func (r *Reader) statsV1(s *Stats) {
	s.CPUUsage = r.numberOr(r.dir("cpuacct"), "cpuacct.usage", 0)
	dir := r.dir("memory")
	s.MemoryUsage = r.numberOr(dir, "memory.usage_in_bytes", 0)
	if b, ok := r.file(dir, "memory.stat"); ok {
		v := keys(b, "total_rss", "total_inactive_file", "total_pgfault", "total_pgmajfault", "total_cache", "total_mapped_file",
			"total_active_file", "total_swap")
		s.RSS, s.InactiveFile, s.PageFaults, s.MajorFaults = v[0], v[1], v[2], v[3]
		s.Cache, s.MappedFile, s.ActiveFile, s.SwapUsage = v[4], v[5], v[6], v[7]
		s.WorkingSet = s.MemoryUsage - min(s.InactiveFile, s.MemoryUsage)
	}
	if v := r.numberOr(dir, "memory.limit_in_bytes", NoLimit); v < noLimitV1 {
		s.MemoryLimit = v
	}
	// v1 limits memory and swap together.
	if v := r.numberOr(dir, "memory.memsw.limit_in_bytes", NoLimit); v < noLimitV1 && s.MemoryLimit != NoLimit {
		s.SwapLimit = v - min(s.MemoryLimit, v)
	}
	s.Threads = r.numberOr(r.dir("pids"), "pids.current", 0)
}

// pressure reads a file of the kernel's psi.rst. One that is not there, as when
// PSI is off, gives nil.
func (r *Reader) pressure(dir, name string) *Pressure {
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
