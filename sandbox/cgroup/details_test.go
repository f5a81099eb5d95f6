package cgroup

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
)

func with(a map[string]string, b map[string]string) map[string]string {
	out := maps.Clone(a)
	maps.Copy(out, b)
	return out
}

func TestDetails(t *testing.T) {
	want := Details{
		Stats: Stats{CPUUsage: 1500000, MemoryUsage: 1000000, MemoryLimit: NoLimit, WorkingSet: 750000, RSS: 300000, PageFaults: 77, MajorFaults: 3,
			SwapUsage: 4096, SwapLimit: NoLimit, Threads: 5, Cache: 600000, MappedFile: 7000, ActiveFile: 350000, InactiveFile: 250000},
		Limits:  Limits{Memory: NoLimit, MemorySwap: NoLimit, Reservation: NoLimit, Quota: 20000, Period: 100000, Shares: 512, CPUs: "0-1", Mems: "0", Threads: 99},
		CPUUser: 30_000_000, CPUSystem: 20_000_000, Periods: 7, Throttled: 2, ThrottledTime: 900, Bursts: 1, BurstTime: 50,
		MemoryPeak: 2000000, MemoryFails: 4, Kernel: 8192, OOMKills: 6,
		Devices: []DeviceIO{{Major: 8, ReadBytes: 4096, WriteBytes: 8192, Reads: 1, Writes: 2, DiscardBytes: 512, Discards: 1},
			{Major: 253, Minor: 3, ReadBytes: 1}},
		HugePages: []HugePages{{Size: "2MB", Usage: 2 << 20, Peak: 4 << 20}},
	}
	check := func(name string, g Group, want Details) {
		t.Helper()
		r := g.Reader()
		defer r.Close()
		got, err := r.Details([]string{"2MB", "1GB"})
		got.At = time.Time{}
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%s: got %+v, %v\nwant %+v", name, got, err, want)
		}
	}
	check("v1", fakeGroup(t, false, with(filesV1, map[string]string{
		"cpuacct/cpuacct.stat":             "user 3\nsystem 2\n",
		"cpu/cpu.stat":                     "nr_periods 7\nnr_throttled 2\nthrottled_time 900\nnr_bursts 1\nburst_time 50\n",
		"cpu/cpu.shares":                   "512\n",
		"cpu/cpu.cfs_quota_us":             "20000\n",
		"cpu/cpu.cfs_period_us":            "100000\n",
		"cpuset/cpuset.cpus":               "0-1\n",
		"cpuset/cpuset.mems":               "0\n",
		"pids/pids.max":                    "99\n",
		"memory/memory.max_usage_in_bytes": "2000000\n", "memory/memory.failcnt": "4\n", "memory/memory.kmem.usage_in_bytes": "8192\n",
		"memory/memory.soft_limit_in_bytes":               "9223372036854771712\n",
		"memory/memory.oom_control":                       "oom_kill_disable 0\nunder_oom 0\noom_kill 6\n",
		"blkio/blkio.throttle.io_service_bytes_recursive": "253:3 Read 1\n8:0 Read 4096\n8:0 Write 8192\n8:0 Sync 1\n8:0 Discard 512\n8:0 Total 12800\nTotal 12800\n",
		"blkio/blkio.throttle.io_serviced_recursive":      "8:0 Read 1\n8:0 Write 2\n8:0 Discard 1\n",
		"hugetlb/hugetlb.2MB.usage_in_bytes":              "2097152\n",
		"hugetlb/hugetlb.2MB.max_usage_in_bytes":          "4194304\n",
	})), want)

	want.MemoryLimit, want.Limits.Memory, want.Reservation = 4000000, 4000000, 10
	want.Shares, want.Weight, want.MemorySwap = 0, 20, NoLimit
	want.Stats.Memory = &Pressure{Some: PressureLine{1.5, 0.25, 0, 123000}, Full: PressureLine{0, 0, 100, 45000}}
	want.CPUUser, want.CPUSystem, want.ThrottledTime, want.BurstTime = 1000000, 500000, 900000, 50000
	want.HighEvents, want.Dirty, want.Writeback, want.PageScans, want.PageSteals, want.RefaultAnon, want.RefaultFile = 9, 1, 2, 3, 4, 5, 6
	want.HugePages[0].Peak = 2 << 20
	check("v2", fakeGroup(t, true, with(filesV2, map[string]string{
		"cpu.stat":   "usage_usec 1500\nuser_usec 1000\nsystem_usec 500\nnr_periods 7\nnr_throttled 2\nthrottled_usec 900\nnr_bursts 1\nburst_usec 50\n",
		"cpu.weight": "20\n", "cpu.max": "20000 100000\n", "cpuset.cpus": "0-1\n", "cpuset.mems": "0\n", "pids.max": "99\n",
		"memory.peak": "2000000\n", "memory.min": "10\n", "memory.events": "low 0\nhigh 9\nmax 4\noom 7\noom_kill 6\n",
		"memory.stat": filesV2["memory.stat"] + "kernel 8192\nfile_dirty 1\nfile_writeback 2\npgscan 3\npgsteal 4\nworkingset_refault_anon 5\nworkingset_refault_file 6\n",
		"io.stat":     "253:3 rbytes=1 wbytes=0\n8:0 rbytes=4096 wbytes=8192 rios=1 wios=2 dbytes=512 dios=1\nbroken\n", "hugetlb.2MB.current": "2097152\n",
	})), want)
}

func TestLimits(t *testing.T) {
	for name, tt := range map[string]struct {
		v2    bool
		files map[string]string
		want  Limits
	}{
		"v1 without limits": {false, map[string]string{"memory/memory.limit_in_bytes": "9223372036854771712\n", "cpu/cpu.cfs_quota_us": "-1\n",
			"cpu/cpu.cfs_period_us": "100000\n", "cpu/cpu.shares": "1024\n", "pids/pids.max": "max\n"},
			Limits{Memory: NoLimit, MemorySwap: NoLimit, Reservation: NoLimit, Quota: NoLimit, Period: 100000, Shares: 1024, Threads: NoLimit}},
		"v1 with swap": {false, map[string]string{"memory/memory.limit_in_bytes": "4096\n", "memory/memory.memsw.limit_in_bytes": "8192\n"},
			Limits{Memory: 4096, MemorySwap: 8192, Reservation: NoLimit, Quota: NoLimit, Threads: NoLimit}},
		"v2 without limits": {true, map[string]string{"memory.max": "max\n", "cpu.max": "max 100000\n", "cpu.weight": "100\n"},
			Limits{Memory: NoLimit, MemorySwap: NoLimit, Quota: NoLimit, Period: 100000, Weight: 100, Threads: NoLimit}},
		"v2 without swap": {true, map[string]string{"memory.max": "4096\n", "memory.swap.max": "0\n"},
			Limits{Memory: 4096, MemorySwap: 4096, Quota: NoLimit, Threads: NoLimit}},
	} {
		if got, err := fakeGroup(t, tt.v2, tt.files).Limits(); err != nil || got != tt.want {
			t.Errorf("%s: got %+v, %v, want %+v", name, got, err, tt.want)
		}
	}
	if _, err := fakeGroup(t, true, nil).Limits(); !errors.Is(err, ErrGone) {
		t.Errorf("absent: %v", err)
	}
	if _, err := fakeGroup(t, true, map[string]string{"cpu.max": "many\n"}).Limits(); err == nil || !strings.Contains(err.Error(), "cpu.max") {
		t.Errorf("broken cpu.max: %v", err)
	}
}

func TestCrowded(t *testing.T) {
	for name, tc := range map[string]struct {
		current, max string
		want         bool
	}{
		"full":          {"100\n", "100\n", true},
		"over":          {"101\n", "100\n", true},
		"next to full":  {"90\n", "100\n", true},
		"room":          {"84\n", "100\n", false},
		"no limit":      {"100\n", "max\n", false},
		"broken":        {"many\n", "100\n", false},
		"nothing to go": {"", "", false},
	} {
		for _, v2 := range []bool{false, true} {
			dir := "pids/"
			if v2 {
				dir = ""
			}
			got := fakeGroup(t, v2, map[string]string{dir + "pids.current": tc.current, dir + "pids.max": tc.max}).Crowded()
			if (got != "") != tc.want || tc.want && !strings.Contains(got, "at most 100 processes") {
				t.Errorf("%s, version 2 %v: %q", name, v2, got)
			}
		}
	}
}

// TestHybridPressure: pressure is on the unified hierarchy, also when the
// controllers are not.
func TestHybridPressure(t *testing.T) {
	g := fakeGroup(t, false, filesV1)
	root := t.TempDir()
	g.h.mounts[unified] = root
	if err := os.MkdirAll(filepath.Join(root, "g"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(root, "g", "cpu.pressure"), []byte("some avg10=0.50 avg60=0 avg300=0 total=2\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	s, err := g.Stats()
	if err != nil || s.CPU == nil || s.CPU.Some.Total != 2000 || s.CPU.Some.Avg10 != 0.5 || s.Memory != nil || s.CPUUsage != 1500000 {
		t.Errorf("got %+v, %v", s, err)
	}
}

func TestPids(t *testing.T) {
	var text strings.Builder
	var want []int
	for i := range 10000 { // more than fits into a buffer
		fmt.Fprintln(&text, 1000+i)
		want = append(want, 1000+i)
	}
	g := fakeGroup(t, true, map[string]string{"cgroup.procs": "0\n" + text.String()})
	r := g.Reader()
	defer r.Close()
	for range 2 {
		if got, err := r.Pids(); err != nil || !slices.Equal(got, want) {
			t.Fatalf("got %d, %v, want %d", len(got), err, len(want))
		}
	}
	if _, err := fakeGroup(t, true, nil).Reader().Pids(); !errors.Is(err, ErrGone) {
		t.Errorf("absent: %v", err)
	}
	if _, err := fakeGroup(t, true, map[string]string{"cgroup.procs": "many\n"}).Reader().Pids(); err == nil || !strings.Contains(err.Error(), `"many"`) {
		t.Errorf("no number: %v", err)
	}
}

// TestReaderLive: a reader sees changes, groups below, and the end of its group,
// and leaves no file open.
func TestReaderLive(t *testing.T) {
	g := liveGroup(t)
	before := openFiles(t)
	r := g.Reader()
	first, err := r.Stats()
	if err != nil {
		t.Fatal(err)
	}
	cmd := mustRun(t, g, "i=0; while [ $i -lt 50000 ]; do i=$((i+1)); done; sleep 60")
	deadline := time.Now().Add(20 * time.Second)
	for now := first; now.CPUUsage <= first.CPUUsage || now.Threads == 0; {
		if time.Now().After(deadline) {
			t.Fatalf("stays at %+v", now)
		}
		if now, err = r.Stats(); err != nil {
			t.Fatal(err)
		}
	}
	below := g.h.at(g.path + "/nested")
	if _, err := below.Ensure(); err != nil {
		t.Fatal(err)
	}
	inner := mustRun(t, below, "sleep 60")
	if pids, err := r.Pids(); err != nil || !slices.Contains(pids, cmd.Process.Pid) || !slices.Contains(pids, inner.Process.Pid) {
		t.Errorf("processes %v, %v, want %d and %d", pids, err, cmd.Process.Pid, inner.Process.Pid)
	}
	if d, err := r.Details(nil); err != nil || d.CPUUsage < first.CPUUsage || d.Limits.Period == 0 && exists(g.dir("cpu")+"/cpu.cfs_period_us") {
		t.Errorf("details %+v, %v", d, err)
	}
	if err := errors.Join(g.Kill(t.Context()), g.Remove()); err != nil {
		t.Fatalf("removal under a reader: %v", err)
	}
	if _, err := r.Stats(); !errors.Is(err, ErrGone) {
		t.Errorf("Stats of a removed group: %v", err)
	}
	if _, err := r.Pids(); !errors.Is(err, ErrGone) {
		t.Errorf("Pids of a removed group: %v", err)
	}
	if _, err := g.Ensure(); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Stats(); err != nil {
		t.Errorf("Stats of a group that is there again: %v", err)
	}
	r.Close()
	for _, c := range []interface{ Wait() error }{cmd, inner} {
		_ = c.Wait() // its pipe, too
	}
	if now := openFiles(t); now > before {
		t.Errorf("%d open files, %d before", now, before)
	}
}

func openFiles(t *testing.T) int {
	t.Helper()
	l, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(l)
}

func FuzzDevices(f *testing.F) {
	f.Add([]byte("8:0 rbytes=1 wbytes=2\n"), []byte("8:0 Read 4096\n"))
	f.Fuzz(func(t *testing.T, v2, v1 []byte) {
		for _, l := range [][]DeviceIO{parseIOStat(v2), addBlkio(nil, v1, true)} {
			for i, d := range l {
				if i > 0 && d.Major < l[i-1].Major {
					t.Errorf("not in order: %v", l)
				}
			}
		}
	})
}
