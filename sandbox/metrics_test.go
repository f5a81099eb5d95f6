package sandbox

import (
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berthd/berth/sandbox/cgroup"
)

// promised are the metrics of the kubelet's own reader in Kubernetes 1.37 (cAdvisor
// 0.60), of the sets that the kubelet has it read, and those that the conformance
// suite of the CRI lists besides. Left out are the state of health, which only
// Docker's containers have and which is -1 for others, and what io schedulers and
// the io.cost controller count by device (container_fs_sector_…, _merged_, _io_…
// and …_seconds_total): no default of a distribution has one of these count.
const promised = `container_blkio_device_usage_total container_cpu_cfs_periods_total container_cpu_cfs_throttled_periods_total
	container_cpu_cfs_throttled_seconds_total container_cpu_system_seconds_total container_cpu_usage_seconds_total container_cpu_user_seconds_total
	container_file_descriptors container_fs_inodes_free container_fs_inodes_total container_fs_limit_bytes container_fs_reads_bytes_total
	container_fs_reads_total container_fs_usage_bytes container_fs_writes_bytes_total container_fs_writes_total container_hugetlb_max_usage_bytes
	container_hugetlb_usage_bytes container_last_seen container_memory_cache container_memory_failcnt container_memory_failures_total
	container_memory_kernel_usage container_memory_mapped_file container_memory_max_usage_bytes container_memory_rss container_memory_swap
	container_memory_usage_bytes container_memory_working_set_bytes container_network_receive_bytes_total container_network_receive_errors_total
	container_network_receive_packets_dropped_total container_network_receive_packets_total container_network_transmit_bytes_total
	container_network_transmit_errors_total container_network_transmit_packets_dropped_total container_network_transmit_packets_total
	container_oom_events_total container_pressure_cpu_stalled_seconds_total container_pressure_cpu_waiting_seconds_total
	container_pressure_io_stalled_seconds_total container_pressure_io_waiting_seconds_total container_pressure_memory_stalled_seconds_total
	container_pressure_memory_waiting_seconds_total container_processes container_sockets container_spec_cpu_period container_spec_cpu_quota
	container_spec_cpu_shares container_spec_memory_limit_bytes container_spec_memory_reservation_limit_bytes container_spec_memory_swap_limit_bytes
	container_start_time_seconds container_threads container_threads_max container_ulimits_soft
	container_creation_time_seconds container_cpu_cfs_burst_periods_total container_cpu_cfs_burst_seconds_total
	container_memory_total_active_file_bytes container_memory_total_inactive_file_bytes container_memory_events_high_total
	container_memory_events_max_total container_memory_file_dirty_bytes container_memory_file_writeback_bytes container_memory_pgscan_total
	container_memory_pgsteal_total container_memory_workingset_refault_file_total container_memory_workingset_refault_anon_total`

func fullSample() *sample {
	limit := uint64(1024)
	p := &cgroup.Pressure{Some: cgroup.PressureLine{Total: 2_500_000_000}, Full: cgroup.PressureLine{Total: 1_500_000_000}}
	return &sample{
		labels: []string{"/kubepods/pod1/c", "c", "image", "app", "ns", "pod"}, now: time.Unix(77, 0), created: 4e9, started: 5e9,
		group: &cgroup.Details{
			Stats:   cgroup.Stats{CPUUsage: 3_900_000_000, Threads: 4, CPU: p, Memory: p, IO: p, SwapLimit: 5},
			Limits:  cgroup.Limits{Memory: cgroup.NoLimit, MemorySwap: 9, Quota: 20000, Period: 100000, Shares: 2, Threads: cgroup.NoLimit, Reservation: 1 << 63},
			Devices: []cgroup.DeviceIO{{Major: 8, ReadBytes: 1}}, HugePages: []cgroup.HugePages{{Size: "2MB", Usage: 1}},
		},
		procs: &processCount{pids: []int{1, 2}, looked: true, files: 6, sockets: 3, openFiles: &limit}, devices: func(uint32, uint32) string { return "/dev/x" },
		disk: &diskSpace{device: "/dev/y", bytes: 10, inodes: 5, inodesFree: 4}, layer: &runtime.FilesystemUsage{UsedBytes: u64(8), Timestamp: 99},
		nets: []netDev{{name: "eth0"}, {name: "net1"}},
	}
}

func TestMetricTable(t *testing.T) {
	all := slices.Concat(groupMetrics, otherMetrics, unifiedMetrics)
	seen := map[string]metric{}
	for _, m := range all {
		if _, twice := seen[m.name]; twice || m.help == "" || !strings.HasPrefix(m.name, "container_") {
			t.Errorf("%s: described twice, or not at all", m.name)
		}
		if want := counter; strings.HasSuffix(m.name, "_total") && m.kind != want && m.name != "container_fs_inodes_total" {
			t.Errorf("%s is no counter", m.name)
		}
		seen[m.name] = m
	}
	got := measure(all, fullSample())
	values := map[string][]*runtime.Metric{}
	for _, v := range got {
		values[v.Name] = append(values[v.Name], v)
		m := seen[v.Name]
		if len(v.LabelValues) != len(baseLabels)+len(m.labels) || v.MetricType != m.kind || v.Value == nil {
			t.Errorf("%v does not fit its description", v)
		}
		if !slices.Equal(v.LabelValues[:len(baseLabels)], fullSample().labels) {
			t.Errorf("%s: labels %q", v.Name, v.LabelValues)
		}
	}
	for _, name := range strings.Fields(promised) {
		if len(values[name]) == 0 {
			t.Errorf("no %s", name)
		}
	}
	for name, want := range map[string][]uint64{
		"container_cpu_usage_seconds_total":               {3},
		"container_pressure_cpu_waiting_seconds_total":    {2},
		"container_pressure_cpu_stalled_seconds_total":    {1},
		"container_threads_max":                           {0},
		"container_threads":                               {4},
		"container_processes":                             {2},
		"container_spec_memory_limit_bytes":               {0},
		"container_spec_memory_reservation_limit_bytes":   {0},
		"container_spec_memory_swap_limit_bytes":          {9},
		"container_spec_cpu_quota":                        {20000},
		"container_ulimits_soft":                          {1024},
		"container_last_seen":                             {77},
		"container_start_time_seconds":                    {5},
		"container_creation_time_seconds":                 {4},
		"container_blkio_device_usage_total":              {1, 0, 0},
		"container_memory_failures_total":                 {0, 0, 0, 0},
		"container_network_receive_packets_dropped_total": {0, 0},
	} {
		var n []uint64
		for _, v := range values[name] {
			n = append(n, v.Value.Value)
		}
		if !slices.Equal(n, want) {
			t.Errorf("%s: %d, want %d", name, n, want)
		}
	}
	if v := values["container_fs_usage_bytes"][0]; v.Timestamp != 99 || v.LabelValues[len(baseLabels)] != "/dev/y" || v.Value.Value != 8 {
		t.Errorf("measured before: %v", v)
	}
	if v := values["container_last_seen"][0]; v.Timestamp != 0 {
		t.Errorf("measured now: %v", v)
	}
}

// TestMetricsOfLittle: what is not known is left out, and is no panic.
func TestMetricsOfLittle(t *testing.T) {
	all := slices.Concat(groupMetrics, otherMetrics, unifiedMetrics)
	var names []string
	for _, v := range measure(all, &sample{labels: make([]string, len(baseLabels))}) {
		names = append(names, v.Name)
	}
	if want := []string{"container_last_seen", "container_creation_time_seconds", "container_start_time_seconds"}; !slices.Equal(names, want) {
		t.Errorf("of a pod without anything: %q, want %q", names, want)
	}
	sm := fullSample()
	sm.group.Quota, sm.group.CPU, sm.group.Devices = cgroup.NoLimit, nil, nil
	for _, v := range measure(all, sm) {
		if strings.Contains(v.Name, "cfs_") || strings.Contains(v.Name, "quota") || strings.Contains(v.Name, "pressure_cpu") || strings.Contains(v.Name, "blkio") {
			t.Errorf("%v without its reason", v)
		}
	}
}

func TestCountProcesses(t *testing.T) {
	l, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	socket, err := l.File()
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	f, err := os.Open("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	few, more := mustEcho(t), mustEcho(t, socket, f)
	before := countProcesses([]int{few}, few)
	now := countProcesses([]int{more, 1 << 30}, more)
	if now.files != before.files+2 || now.sockets != before.sockets+1 || now.openFiles == nil || *now.openFiles == 0 {
		t.Errorf("got %+v after %+v", now, before)
	}
}

// mustEcho starts a process with files that nobody opens or closes any more: of this one
// the other tests' goroutines may.
func mustEcho(t *testing.T, files ...*os.File) (pid int) {
	t.Helper()
	cmd := exec.Command("cat")
	cmd.ExtraFiles = files
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close() // which ends it
		if err := cmd.Wait(); err != nil {
			t.Error(err)
		}
	})
	// What it answers has been loaded, and all that it opened for that is closed.
	if _, err := in.Write([]byte{'\n'}); err != nil {
		t.Fatal(err)
	}
	if _, err := out.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	return cmd.Process.Pid
}

func TestOpenFilesLimit(t *testing.T) {
	text, err := os.ReadFile("/proc/self/limits")
	if err != nil {
		t.Fatal(err)
	}
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &l); err != nil {
		t.Fatal(err)
	}
	if got := openFilesLimit(string(text)); got == nil || *got != l.Cur {
		t.Errorf("%v, want %d", got, l.Cur)
	}
	for _, bad := range []string{"", "Max open files", "Max open files     many   more  files\n", "Max processes 1 2\n"} {
		if got := openFilesLimit(bad); got != nil {
			t.Errorf("%q: %d", bad, *got)
		}
	}
}
