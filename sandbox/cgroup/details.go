package cgroup

import (
	"bytes"
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// Details is everything that is known of a group: for metrics, which are read more
// seldom than Stats. What the machine does not control or count is zero, and
// NoLimit where it is a limit.
type Details struct {
	Stats
	Limits

	CPUUser, CPUSystem         uint64 // nanoseconds
	Periods, Throttled, Bursts uint64 // periods of the CPU quota: all, the ones in which it was used up, the ones with a burst
	ThrottledTime, BurstTime   uint64 // nanoseconds

	MemoryPeak  uint64 // bytes, the most MemoryUsage has been
	MemoryFails uint64 // how often the limit was hit
	Kernel      uint64 // bytes of the kernel's own memory
	OOMKills    uint64 // processes

	// Of v2 only.
	HighEvents               uint64 // how often memory.high was exceeded
	Dirty, Writeback         uint64 // bytes of the page cache
	PageScans, PageSteals    uint64 // pages
	RefaultAnon, RefaultFile uint64 // pages

	Devices   []DeviceIO  // by number
	HugePages []HugePages // in the order of the sizes asked for
}

// DeviceIO is what was read from and written to a block device.
type DeviceIO struct {
	Major, Minor           uint32
	ReadBytes, WriteBytes  uint64
	Reads, Writes          uint64 // operations
	DiscardBytes, Discards uint64
}

// HugePages is the use of huge pages of one size, in bytes.
type HugePages struct {
	Size        string // as the kernel writes it, "2MB"
	Usage, Peak uint64
}

// Limits are the limits of a group as the kernel has them.
type Limits struct {
	Memory      uint64 // bytes, NoLimit for none
	MemorySwap  uint64 // bytes of memory and swap together, NoLimit for none
	Reservation uint64 // bytes: soft limit on v1, memory.min on v2; 0 or NoLimit for none
	Quota       uint64 // µs of CPU time in each period, NoLimit for none
	Period      uint64 // µs
	Shares      uint64 // v1, 0 on v2
	Weight      uint64 // v2, 0 on v1
	CPUs, Mems  string // lists as in cpuset(7)
	Threads     uint64 // NoLimit for none
}

// Limits reads the limits. [ErrGone] if the group does not exist.
func (g Group) Limits() (Limits, error) {
	r := g.Reader()
	var l Limits
	if err := r.read(false, func() { r.limits(&l) }); err != nil {
		return Limits{}, err
	}
	return l, nil
}

// Details reads everything. pageSizes are the sizes of huge pages to look for.
func (r *Reader) Details(pageSizes []string) (Details, error) {
	var d Details
	var err error
	r.seen = map[string][]byte{} // each file once, also those that Stats has read
	defer func() { r.seen = nil }()
	if d.Stats, err = r.Stats(); err != nil {
		return Details{}, err
	}
	err = r.read(false, func() {
		r.limits(&d.Limits)
		if r.g.h.v2 {
			r.detailsV2(&d)
		} else {
			r.detailsV1(&d)
		}
		for _, size := range pageSizes {
			r.hugePages(&d, size)
		}
	})
	return d, err
}

func (r *Reader) detailsV2(d *Details) {
	dir := r.dir(unified)
	if b, ok := r.file(dir, "cpu.stat"); ok {
		v := keys(b, "user_usec", "system_usec", "nr_periods", "nr_throttled", "throttled_usec", "nr_bursts", "burst_usec")
		d.CPUUser, d.CPUSystem, d.Periods, d.Throttled = v[0]*1000, v[1]*1000, v[2], v[3]
		d.ThrottledTime, d.Bursts, d.BurstTime = v[4]*1000, v[5], v[6]*1000
	}
	if b, ok := r.file(dir, "memory.stat"); ok {
		v := keys(b, "kernel", "kernel_stack", "pagetables", "slab", "percpu", "sock",
			"file_dirty", "file_writeback", "pgscan", "pgsteal", "workingset_refault_anon", "workingset_refault_file")
		d.Kernel = v[0]
		if d.Kernel == 0 { // before Linux 5.18
			d.Kernel = v[1] + v[2] + v[3] + v[4] + v[5]
		}
		d.Dirty, d.Writeback, d.PageScans, d.PageSteals, d.RefaultAnon, d.RefaultFile = v[6], v[7], v[8], v[9], v[10], v[11]
	}
	if b, ok := r.file(dir, "memory.events"); ok {
		v := keys(b, "high", "max", "oom_kill")
		d.HighEvents, d.MemoryFails, d.OOMKills = v[0], v[1], v[2]
	}
	d.MemoryPeak = max(r.numberOr(dir, "memory.peak", 0), d.MemoryUsage)
	if b, ok := r.file(dir, "io.stat"); ok {
		d.Devices = parseIOStat(b)
	}
}

// tick is the unit of cpuacct.stat in nanoseconds: USER_HZ is 100 on every
// architecture that Go runs on.
const tick = 10_000_000

func (r *Reader) detailsV1(d *Details) {
	if b, ok := r.file(r.dir("cpuacct"), "cpuacct.stat"); ok {
		v := keys(b, "user", "system")
		d.CPUUser, d.CPUSystem = v[0]*tick, v[1]*tick
	}
	if b, ok := r.file(r.dir("cpu"), "cpu.stat"); ok {
		v := keys(b, "nr_periods", "nr_throttled", "throttled_time", "nr_bursts", "burst_time")
		d.Periods, d.Throttled, d.ThrottledTime, d.Bursts, d.BurstTime = v[0], v[1], v[2], v[3], v[4]
	}
	dir := r.dir("memory")
	d.MemoryPeak = r.numberOr(dir, "memory.max_usage_in_bytes", 0)
	d.MemoryFails = r.numberOr(dir, "memory.failcnt", 0)
	d.Kernel = r.numberOr(dir, "memory.kmem.usage_in_bytes", 0)
	if b, ok := r.file(dir, "memory.oom_control"); ok {
		d.OOMKills = keys(b, "oom_kill")[0]
	}
	// The recursive ones count the groups below as well.
	for _, f := range []struct {
		name string
		ops  bool
	}{{"blkio.throttle.io_service_bytes_recursive", false}, {"blkio.throttle.io_serviced_recursive", true}} {
		if b, ok := r.file(r.dir("blkio"), f.name); ok {
			d.Devices = addBlkio(d.Devices, b, f.ops)
		}
	}
}

func (r *Reader) limits(l *Limits) {
	*l = Limits{Memory: NoLimit, MemorySwap: NoLimit, Quota: NoLimit, Threads: NoLimit}
	if r.g.h.v2 {
		r.limitsV2(l)
	} else {
		r.limitsV1(l)
	}
	set := r.dir("cpuset")
	if b, ok := r.file(set, "cpuset.cpus"); ok {
		l.CPUs = string(bytes.TrimSpace(b))
	}
	if b, ok := r.file(set, "cpuset.mems"); ok {
		l.Mems = string(bytes.TrimSpace(b))
	}
	l.Threads = r.numberOr(r.dir("pids"), "pids.max", NoLimit)
}

func (r *Reader) limitsV2(l *Limits) {
	dir := r.dir(unified)
	l.Memory = r.numberOr(dir, "memory.max", NoLimit)
	if swap := r.numberOr(dir, "memory.swap.max", NoLimit); swap != NoLimit && l.Memory != NoLimit {
		l.MemorySwap = l.Memory + swap
	}
	l.Reservation = r.numberOr(dir, "memory.min", 0)
	l.Weight = r.numberOr(dir, "cpu.weight", 0)
	if b, ok := r.file(dir, "cpu.max"); ok {
		quota, period, _ := strings.Cut(string(bytes.TrimSpace(b)), " ")
		if quota != "max" {
			l.Quota = r.parse("cpu.max", quota)
		}
		l.Period = r.parse("cpu.max", period)
	}
}

func (r *Reader) limitsV1(l *Limits) {
	dir := r.dir("memory")
	limit := func(name string) uint64 {
		if v := r.numberOr(dir, name, NoLimit); v < noLimitV1 {
			return v
		}
		return NoLimit
	}
	l.Memory, l.MemorySwap = limit("memory.limit_in_bytes"), limit("memory.memsw.limit_in_bytes")
	l.Reservation = limit("memory.soft_limit_in_bytes")
	dir = r.dir("cpu")
	l.Shares = r.numberOr(dir, "cpu.shares", 0)
	l.Period = r.numberOr(dir, "cpu.cfs_period_us", 0)
	if b, ok := r.file(dir, "cpu.cfs_quota_us"); ok {
		if q := string(bytes.TrimSpace(b)); !strings.HasPrefix(q, "-") {
			l.Quota = r.parse("cpu.cfs_quota_us", q)
		}
	}
}

func (r *Reader) parse(name, text string) uint64 {
	v, err := strconv.ParseUint(text, 10, 64)
	if err != nil && r.err == nil {
		r.err = fmt.Errorf("%s: %q is no number", name, clip(text))
	}
	return v
}

// hugePages reads the use of huge pages of a size, where the controller is.
func (r *Reader) hugePages(d *Details, size string) {
	dir, usage, peak := r.dir("hugetlb"), ".usage_in_bytes", ".max_usage_in_bytes"
	if dir == "" || r.g.h.v2 {
		dir, usage, peak = r.g.unifiedDir(), ".current", ".max_usage" // v2 knows no peak
	}
	if v, ok := r.number(dir, "hugetlb."+size+usage); ok {
		d.HugePages = append(d.HugePages, HugePages{Size: size, Usage: v, Peak: max(v, r.numberOr(dir, "hugetlb."+size+peak, 0))})
	}
}

// parseIOStat reads io.stat: "8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5 dios=6".
// What is not of that form is left out.
func parseIOStat(b []byte) []DeviceIO {
	var out []DeviceIO
	for line := range bytes.Lines(b) {
		f := strings.Fields(string(line))
		if len(f) < 2 {
			continue
		}
		d, ok := parseDevice(f[0])
		if !ok {
			continue
		}
		for _, kv := range f[1:] {
			key, value, _ := strings.Cut(kv, "=")
			if p := d.count(key); p != nil {
				*p, _ = strconv.ParseUint(value, 10, 64)
			}
		}
		out = append(out, d)
	}
	return sortDevices(out)
}

// addBlkio adds the lines of a v1 file, "8:0 Read 4096", to what others have
// told of the same devices. "Sync", "Async" and "Total" are other sums of the same.
func addBlkio(devices []DeviceIO, b []byte, ops bool) []DeviceIO {
	access, unit := map[string]string{"Read": "r", "Write": "w", "Discard": "d"}, "bytes"
	if ops {
		unit = "ios"
	}
	for line := range bytes.Lines(b) {
		f := strings.Fields(string(line))
		if len(f) != 3 {
			continue
		}
		d, ok := parseDevice(f[0])
		v, err := strconv.ParseUint(f[2], 10, 64)
		if !ok || err != nil {
			continue
		}
		i := slices.IndexFunc(devices, func(o DeviceIO) bool { return o.Major == d.Major && o.Minor == d.Minor })
		if i < 0 {
			i, devices = len(devices), append(devices, d)
		}
		if p := devices[i].count(access[f[1]] + unit); p != nil {
			*p = v
		}
	}
	return sortDevices(devices)
}

// count is where the value of a key of io.stat belongs, nil for nowhere.
func (d *DeviceIO) count(key string) *uint64 {
	switch key {
	case "rbytes":
		return &d.ReadBytes
	case "wbytes":
		return &d.WriteBytes
	case "rios":
		return &d.Reads
	case "wios":
		return &d.Writes
	case "dbytes":
		return &d.DiscardBytes
	case "dios":
		return &d.Discards
	}
	return nil
}

func parseDevice(s string) (DeviceIO, bool) {
	a, b, ok := strings.Cut(s, ":")
	major, err := strconv.ParseUint(a, 10, 32)
	minor, err2 := strconv.ParseUint(b, 10, 32)
	return DeviceIO{Major: uint32(major), Minor: uint32(minor)}, ok && err == nil && err2 == nil
}

func sortDevices(l []DeviceIO) []DeviceIO {
	slices.SortFunc(l, func(a, b DeviceIO) int { return cmp.Or(cmp.Compare(a.Major, b.Major), cmp.Compare(a.Minor, b.Minor)) })
	return l
}
