package sandbox

import (
	"fmt"
	"math"
	"time"

	"github.com/berthd/berth/sandbox/cgroup"
)

// one makes a metric's value of a number of the cgroup.
func one(f func(*cgroup.Details) uint64) func(*sample) []value {
	return func(sm *sample) []value {
		if sm.group == nil {
			return nil
		}
		return []value{{n: f(sm.group)}}
	}
}

// seconds turns nanoseconds into a metric's value.
func seconds(f func(*cgroup.Details) uint64) func(*sample) []value {
	return one(func(d *cgroup.Details) uint64 { return f(d) / uint64(time.Second) })
}

// limited is the value of a metric that only makes sense with a CPU quota.
func limited(f func(*sample) []value) func(*sample) []value {
	return func(sm *sample) []value {
		if sm.group == nil || sm.group.Quota == cgroup.NoLimit {
			return nil
		}
		return f(sm)
	}
}

// stall is the seconds of pressure on a resource, nothing where the kernel does
// not measure it.
func stall(p func(*cgroup.Details) *cgroup.Pressure, line func(*cgroup.Pressure) cgroup.PressureLine) func(*sample) []value {
	return func(sm *sample) []value {
		if sm.group == nil || p(sm.group) == nil {
			return nil
		}
		return []value{{n: line(p(sm.group)).Total / uint64(time.Second)}}
	}
}

// limitOrZero is a limit as metrics have it: 0 is none.
func limitOrZero(v uint64) uint64 {
	if v == cgroup.NoLimit || v > math.MaxInt64 {
		return 0
	}
	return v
}

func full(p *cgroup.Pressure) cgroup.PressureLine { return p.Full }
func some(p *cgroup.Pressure) cgroup.PressureLine { return p.Some }

type details = cgroup.Details

// groupMetrics are read from the cgroup, and so are told of containers and of pods
// that have one of their own.
var groupMetrics = []metric{
	{"container_cpu_user_seconds_total", "Cumulative user CPU time consumed in seconds.", counter, nil,
		seconds(func(d *details) uint64 { return d.CPUUser })},
	{"container_cpu_system_seconds_total", "Cumulative system CPU time consumed in seconds.", counter, nil,
		seconds(func(d *details) uint64 { return d.CPUSystem })},
	{"container_cpu_usage_seconds_total", "Cumulative CPU time consumed in seconds.", counter, []string{"cpu"}, cpuTotal},
	{"container_cpu_cfs_periods_total", "Number of elapsed enforcement period intervals.", counter, nil,
		limited(one(func(d *details) uint64 { return d.Periods }))},
	{"container_cpu_cfs_throttled_periods_total", "Number of throttled period intervals.", counter, nil,
		limited(one(func(d *details) uint64 { return d.Throttled }))},
	{"container_cpu_cfs_throttled_seconds_total", "Total time duration the container has been throttled in seconds.", counter, nil,
		limited(seconds(func(d *details) uint64 { return d.ThrottledTime }))},
	{"container_cpu_cfs_burst_periods_total", "Number of period intervals in which a burst occurred.", counter, nil,
		limited(one(func(d *details) uint64 { return d.Bursts }))},
	{"container_cpu_cfs_burst_seconds_total", "Total time used above the quota in bursts in seconds.", counter, nil,
		limited(seconds(func(d *details) uint64 { return d.BurstTime }))},

	{"container_memory_cache", "Number of bytes of page cache memory.", gauge, nil, one(func(d *details) uint64 { return d.Cache })},
	{"container_memory_rss", "Size of RSS in bytes.", gauge, nil, one(func(d *details) uint64 { return d.RSS })},
	{"container_memory_kernel_usage", "Size of kernel memory allocated in bytes.", gauge, nil, one(func(d *details) uint64 { return d.Kernel })},
	{"container_memory_mapped_file", "Size of memory mapped files in bytes.", gauge, nil, one(func(d *details) uint64 { return d.MappedFile })},
	{"container_memory_swap", "Container swap usage in bytes.", gauge, nil, one(func(d *details) uint64 { return d.SwapUsage })},
	{"container_memory_failcnt", "Number of memory usage hits limits.", counter, nil, one(func(d *details) uint64 { return d.MemoryFails })},
	{"container_memory_usage_bytes", "Current memory usage in bytes, including all memory regardless of when it was accessed.", gauge, nil,
		one(func(d *details) uint64 { return d.MemoryUsage })},
	{"container_memory_max_usage_bytes", "Maximum memory usage recorded in bytes.", gauge, nil, one(func(d *details) uint64 { return d.MemoryPeak })},
	{"container_memory_working_set_bytes", "Current working set in bytes.", gauge, nil, one(func(d *details) uint64 { return d.WorkingSet })},
	{"container_memory_total_active_file_bytes", "Current total active file in bytes.", gauge, nil, one(func(d *details) uint64 { return d.ActiveFile })},
	{"container_memory_total_inactive_file_bytes", "Current total inactive file in bytes.", gauge, nil, one(func(d *details) uint64 { return d.InactiveFile })},
	{"container_memory_failures_total", "Cumulative count of memory allocation failures.", counter, []string{"failure_type", "scope"}, pageFaults},
	{"container_oom_events_total", "Count of out of memory events observed for the container.", counter, nil, one(func(d *details) uint64 { return d.OOMKills })},

	{"container_hugetlb_usage_bytes", "Current hugepage usage in bytes.", gauge, []string{"pagesize"},
		hugePages(func(h cgroup.HugePages) uint64 { return h.Usage })},
	{"container_hugetlb_max_usage_bytes", "Maximum hugepage usage recorded in bytes.", gauge, []string{"pagesize"},
		hugePages(func(h cgroup.HugePages) uint64 { return h.Peak })},

	{"container_fs_reads_bytes_total", "Cumulative count of bytes read.", counter, []string{"device"},
		deviceIO(func(d cgroup.DeviceIO) uint64 { return d.ReadBytes })},
	{"container_fs_reads_total", "Cumulative count of reads completed.", counter, []string{"device"},
		deviceIO(func(d cgroup.DeviceIO) uint64 { return d.Reads })},
	{"container_fs_writes_bytes_total", "Cumulative count of bytes written.", counter, []string{"device"},
		deviceIO(func(d cgroup.DeviceIO) uint64 { return d.WriteBytes })},
	{"container_fs_writes_total", "Cumulative count of writes completed.", counter, []string{"device"},
		deviceIO(func(d cgroup.DeviceIO) uint64 { return d.Writes })},
	{"container_blkio_device_usage_total", "Blkio device bytes usage.", counter, []string{"device", "major", "minor", "operation"}, blkio},

	{"container_processes", "Number of processes running inside the container.", gauge, nil, processValue},
	{"container_threads", "Number of threads running inside the container.", gauge, nil, one(func(d *details) uint64 { return d.Stats.Threads })},
	{"container_threads_max", "Maximum number of threads allowed inside the container, infinity if value is zero.", gauge, nil,
		one(func(d *details) uint64 { return limitOrZero(d.Limits.Threads) })},

	{"container_spec_cpu_period", "CPU period of the container.", gauge, nil, one(func(d *details) uint64 { return d.Period })},
	{"container_spec_cpu_quota", "CPU quota of the container.", gauge, nil, limited(one(func(d *details) uint64 { return d.Quota }))},
	{"container_spec_cpu_shares", "CPU share of the container.", gauge, nil, one(shares)},
	{"container_spec_memory_limit_bytes", "Memory limit for the container.", gauge, nil, one(func(d *details) uint64 { return limitOrZero(d.Limits.Memory) })},
	{"container_spec_memory_reservation_limit_bytes", "Memory reservation limit for the container.", gauge, nil,
		one(func(d *details) uint64 { return limitOrZero(d.Reservation) })},
	{"container_spec_memory_swap_limit_bytes", "Memory swap limit for the container.", gauge, nil, swapLimit},

	{"container_pressure_cpu_stalled_seconds_total", "Total time duration no tasks in the container could make progress due to CPU congestion.", counter, nil,
		stall(cpuPressure, full)},
	{"container_pressure_cpu_waiting_seconds_total", "Total time duration tasks in the container have waited due to CPU congestion.", counter, nil,
		stall(cpuPressure, some)},
	{"container_pressure_memory_stalled_seconds_total", "Total time duration no tasks in the container could make progress due to memory congestion.", counter, nil,
		stall(memoryPressure, full)},
	{"container_pressure_memory_waiting_seconds_total", "Total time duration tasks in the container have waited due to memory congestion.", counter, nil,
		stall(memoryPressure, some)},
	{"container_pressure_io_stalled_seconds_total", "Total time duration no tasks in the container could make progress due to IO congestion.", counter, nil,
		stall(ioPressure, full)},
	{"container_pressure_io_waiting_seconds_total", "Total time duration tasks in the container have waited due to IO congestion.", counter, nil,
		stall(ioPressure, some)},
}

// unifiedMetrics are counted by cgroup v2 alone.
var unifiedMetrics = []metric{
	{"container_memory_events_high_total", "Number of times the memory usage went over the high limit.", counter, nil,
		one(func(d *details) uint64 { return d.HighEvents })},
	{"container_memory_events_max_total", "Number of times the memory usage was about to go over the limit.", counter, nil,
		one(func(d *details) uint64 { return d.MemoryFails })},
	{"container_memory_file_dirty_bytes", "Number of bytes of page cache that are to be written to disk.", gauge, nil, one(func(d *details) uint64 { return d.Dirty })},
	{"container_memory_file_writeback_bytes", "Number of bytes of page cache that are being written to disk.", gauge, nil,
		one(func(d *details) uint64 { return d.Writeback })},
	{"container_memory_pgscan_total", "Number of pages scanned for reclaim.", counter, nil, one(func(d *details) uint64 { return d.PageScans })},
	{"container_memory_pgsteal_total", "Number of pages reclaimed.", counter, nil, one(func(d *details) uint64 { return d.PageSteals })},
	{"container_memory_workingset_refault_file_total", "Number of refaults of file pages that were evicted before.", counter, nil,
		one(func(d *details) uint64 { return d.RefaultFile })},
	{"container_memory_workingset_refault_anon_total", "Number of refaults of anonymous pages that were evicted before.", counter, nil,
		one(func(d *details) uint64 { return d.RefaultAnon })},
}

// otherMetrics come from elsewhere than the cgroup.
var otherMetrics = []metric{
	{"container_last_seen", "Last time a container was seen by the exporter.", gauge, nil,
		func(sm *sample) []value { return []value{{n: uint64(sm.now.Unix())}} }},
	{"container_creation_time_seconds", "Container creation time since unix epoch in seconds.", gauge, nil,
		func(sm *sample) []value { return []value{{n: uint64(sm.created / int64(time.Second))}} }},
	{"container_start_time_seconds", "Start time of the container since unix epoch in seconds.", gauge, nil,
		func(sm *sample) []value { return []value{{n: uint64(sm.started / int64(time.Second))}} }},

	{"container_file_descriptors", "Number of open file descriptors for the container.", gauge, nil,
		ofProcesses(func(p *processCount) uint64 { return p.files })},
	{"container_sockets", "Number of open sockets for the container.", gauge, nil, ofProcesses(func(p *processCount) uint64 { return p.sockets })},
	{"container_ulimits_soft", "Soft ulimit values for the container root process. Unlimited if -1, except priority and nice.", gauge, []string{"ulimit"}, ulimits},

	{"container_fs_inodes_free", "Number of available inodes.", gauge, []string{"device"}, ofDisk(func(d *diskSpace) uint64 { return d.inodesFree })},
	{"container_fs_inodes_total", "Number of inodes.", gauge, []string{"device"}, ofDisk(func(d *diskSpace) uint64 { return d.inodes })},
	{"container_fs_limit_bytes", "Number of bytes that can be consumed by the container on this filesystem.", gauge, []string{"device"},
		ofDisk(func(d *diskSpace) uint64 { return d.bytes })},
	{"container_fs_usage_bytes", "Number of bytes that are consumed by the container on this filesystem.", gauge, []string{"device"}, layerBytes},

	{"container_network_receive_bytes_total", "Cumulative count of bytes received.", counter, []string{"interface"},
		network(func(d netDev) uint64 { return d.rx.bytes })},
	{"container_network_receive_packets_total", "Cumulative count of packets received.", counter, []string{"interface"},
		network(func(d netDev) uint64 { return d.rx.packets })},
	{"container_network_receive_packets_dropped_total", "Cumulative count of packets dropped while receiving.", counter, []string{"interface"},
		network(func(d netDev) uint64 { return d.rx.dropped })},
	{"container_network_receive_errors_total", "Cumulative count of errors encountered while receiving.", counter, []string{"interface"},
		network(func(d netDev) uint64 { return d.rx.errors })},
	{"container_network_transmit_bytes_total", "Cumulative count of bytes transmitted.", counter, []string{"interface"},
		network(func(d netDev) uint64 { return d.tx.bytes })},
	{"container_network_transmit_packets_total", "Cumulative count of packets transmitted.", counter, []string{"interface"},
		network(func(d netDev) uint64 { return d.tx.packets })},
	{"container_network_transmit_packets_dropped_total", "Cumulative count of packets dropped while transmitting.", counter, []string{"interface"},
		network(func(d netDev) uint64 { return d.tx.dropped })},
	{"container_network_transmit_errors_total", "Cumulative count of errors encountered while transmitting.", counter, []string{"interface"},
		network(func(d netDev) uint64 { return d.tx.errors })},
}

func cpuPressure(d *details) *cgroup.Pressure    { return d.CPU }
func memoryPressure(d *details) *cgroup.Pressure { return d.Stats.Memory }
func ioPressure(d *details) *cgroup.Pressure     { return d.IO }

// cpuTotal has the label that the kubelet's reader gives the sum of all CPUs.
func cpuTotal(sm *sample) []value {
	if sm.group == nil {
		return nil
	}
	return []value{{n: sm.group.CPUUsage / uint64(time.Second), labels: []string{"total"}}}
}

// shares turns a weight of v2 back into shares.
func shares(d *details) uint64 {
	if d.Weight != 0 {
		return sharesOf(d.Weight)
	}
	return d.Shares
}

// swapLimit counts memory and swap together on v1, and swap alone on v2.
func swapLimit(sm *sample) []value {
	switch {
	case sm.group == nil:
		return nil
	case sm.v2:
		return []value{{n: limitOrZero(sm.group.SwapLimit)}}
	}
	return []value{{n: limitOrZero(sm.group.MemorySwap)}}
}

// pageFaults: the cgroup counts those of the groups below it as its own.
func pageFaults(sm *sample) []value {
	if sm.group == nil {
		return nil
	}
	var out []value
	for _, scope := range []string{"container", "hierarchy"} {
		out = append(out, value{n: sm.group.PageFaults, labels: []string{"pgfault", scope}},
			value{n: sm.group.MajorFaults, labels: []string{"pgmajfault", scope}})
	}
	return out
}

func hugePages(f func(cgroup.HugePages) uint64) func(*sample) []value {
	return func(sm *sample) []value {
		if sm.group == nil {
			return nil
		}
		var out []value
		for _, h := range sm.group.HugePages {
			out = append(out, value{n: f(h), labels: []string{h.Size}})
		}
		return out
	}
}

func deviceIO(f func(cgroup.DeviceIO) uint64) func(*sample) []value {
	return func(sm *sample) []value {
		if sm.group == nil {
			return nil
		}
		var out []value
		for _, d := range sm.group.Devices {
			out = append(out, value{n: f(d), labels: []string{sm.devices(d.Major, d.Minor)}})
		}
		return out
	}
}

func blkio(sm *sample) []value {
	if sm.group == nil {
		return nil
	}
	var out []value
	for _, d := range sm.group.Devices {
		for _, op := range []struct {
			name string
			n    uint64
		}{{"Read", d.ReadBytes}, {"Write", d.WriteBytes}, {"Discard", d.DiscardBytes}} {
			out = append(out, value{n: op.n, labels: []string{sm.devices(d.Major, d.Minor), fmt.Sprint(d.Major), fmt.Sprint(d.Minor), op.name}})
		}
	}
	return out
}

func network(f func(netDev) uint64) func(*sample) []value {
	return func(sm *sample) []value {
		var out []value
		for _, d := range sm.nets {
			out = append(out, value{n: f(d), labels: []string{d.name}})
		}
		return out
	}
}

func processValue(sm *sample) []value {
	if sm.procs == nil {
		return nil
	}
	return []value{{n: uint64(len(sm.procs.pids))}}
}

// ofProcesses is told of containers only, whose processes were looked at.
func ofProcesses(f func(*processCount) uint64) func(*sample) []value {
	return func(sm *sample) []value {
		if sm.procs == nil || !sm.procs.looked {
			return nil
		}
		return []value{{n: f(sm.procs)}}
	}
}

func ulimits(sm *sample) []value {
	if sm.procs == nil || sm.procs.openFiles == nil {
		return nil
	}
	return []value{{n: *sm.procs.openFiles, labels: []string{"max_open_files"}}}
}

func ofDisk(f func(*diskSpace) uint64) func(*sample) []value {
	return func(sm *sample) []value {
		if sm.disk == nil {
			return nil
		}
		return []value{{n: f(sm.disk), labels: []string{sm.disk.device}}}
	}
}

// layerBytes is measured less often than the rest.
func layerBytes(sm *sample) []value {
	if sm.disk == nil || sm.layer == nil {
		return nil
	}
	return []value{{n: sm.layer.GetUsedBytes().GetValue(), labels: []string{sm.disk.device}, at: sm.layer.GetTimestamp()}}
}
