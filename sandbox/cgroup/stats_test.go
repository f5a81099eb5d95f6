package cgroup

import (
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"
)

// fakeGroup lays out files as the kernel would, "dir/file" for each.
func fakeGroup(t *testing.T, v2 bool, files map[string]string) Group {
	t.Helper()
	root := t.TempDir()
	h := Hierarchy{v2: v2, mounts: map[string]string{}}
	if v2 {
		h.mounts[unified] = root
	}
	for name, text := range files {
		controller, file := filepath.Split(name)
		if !v2 {
			h.mounts[strings.TrimSuffix(controller, "/")] = filepath.Join(root, controller)
		}
		dir := filepath.Join(root, controller, "g")
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, file), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return h.at("g")
}

var filesV2 = map[string]string{
	"cpu.stat":            "usage_usec 1500\nuser_usec 1000\nsystem_usec 500\n",
	"memory.current":      "1000000\n",
	"memory.max":          "4000000\n",
	"memory.stat":         "anon 300000\nfile 600000\nfile_mapped 7000\nkernel_stack 1\ninactive_file 250000\nactive_file 350000\npgfault 77\npgmajfault 3\n",
	"memory.swap.current": "4096\n",
	"memory.swap.max":     "max\n",
	"pids.current":        "5\n",
	"memory.pressure":     "some avg10=1.50 avg60=0.25 avg300=0.00 total=123\nfull avg10=0.00 avg60=0.00 avg300=100.00 total=45\n",
}

var filesV1 = map[string]string{
	"cpuacct/cpuacct.usage":              "1500000\n",
	"memory/memory.usage_in_bytes":       "1000000\n",
	"memory/memory.limit_in_bytes":       "9223372036854771712\n",
	"memory/memory.memsw.limit_in_bytes": "9223372036854771712\n",
	"memory/memory.stat":                 "cache 1\nrss 2\ninactive_file 4\nswap 5\ntotal_rss 300000\ntotal_inactive_file 250000\ntotal_pgfault 77\ntotal_pgmajfault 3\ntotal_swap 4096\ntotal_cache 600000\ntotal_mapped_file 7000\ntotal_active_file 350000\n",
	"pids/pids.current":                  "5\n",
}

func TestStats(t *testing.T) {
	want := Stats{
		CPUUsage: 1500000, MemoryUsage: 1000000, MemoryLimit: NoLimit, WorkingSet: 750000, RSS: 300000, PageFaults: 77, MajorFaults: 3,
		SwapUsage: 4096, SwapLimit: NoLimit, Threads: 5,
		Cache: 600000, MappedFile: 7000, ActiveFile: 350000, InactiveFile: 250000,
	}
	check := func(name string, g Group, want Stats) {
		t.Helper()
		got, err := g.Stats()
		if time.Since(got.At) > time.Minute {
			t.Errorf("%s: time %v", name, got.At)
		}
		got.At = time.Time{}
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%s: got %+v, %v, want %+v", name, got, err, want)
		}
	}
	check("v1", fakeGroup(t, false, filesV1), want)

	want.MemoryLimit = 4000000
	want.Memory = &Pressure{Some: PressureLine{1.5, 0.25, 0, 123000}, Full: PressureLine{0, 0, 100, 45000}}
	check("v2", fakeGroup(t, true, filesV2), want)

	check("limited v1", fakeGroup(t, false, map[string]string{
		"memory/memory.limit_in_bytes": "1000\n", "memory/memory.memsw.limit_in_bytes": "1500\n",
	}), Stats{MemoryLimit: 1000, SwapLimit: 500})
	check("only a page cache", fakeGroup(t, true, map[string]string{
		"memory.current": "10\n", "memory.stat": "inactive_file 99\n",
	}), Stats{MemoryUsage: 10, MemoryLimit: NoLimit, SwapLimit: NoLimit, InactiveFile: 99})
}

func TestStatsErrors(t *testing.T) {
	if _, err := fakeGroup(t, true, nil).Stats(); !errors.Is(err, ErrGone) {
		t.Errorf("absent: %v", err)
	}
	if _, err := (Group{}).Stats(); !errors.Is(err, ErrGone) {
		t.Errorf("zero group: %v", err)
	}
	for name, text := range map[string]string{
		"memory.current": "many\n", "pids.current": "-1\n", "cpu.pressure": "some avg10=x\n", "cpu.stat": strings.Repeat("x", 17<<10),
	} {
		_, err := fakeGroup(t, true, map[string]string{name: text}).Stats()
		if err == nil || !strings.Contains(err.Error(), name) || len(err.Error()) > 500 {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestAvailable(t *testing.T) {
	for _, tt := range []struct {
		limit, used, want uint64
		ok                bool
	}{{NoLimit, 5, 0, false}, {10, 4, 6, true}, {10, 12, 0, true}} {
		for _, f := range []func() (uint64, bool){
			Stats{MemoryLimit: tt.limit, WorkingSet: tt.used}.MemoryAvailable, Stats{SwapLimit: tt.limit, SwapUsage: tt.used}.SwapAvailable,
		} {
			if got, ok := f(); got != tt.want || ok != tt.ok {
				t.Errorf("%+v: got %d, %v", tt, got, ok)
			}
		}
	}
}

// BenchmarkReader reads the root, which every machine has, with its files open.
func BenchmarkReader(b *testing.B) {
	h, err := Detect()
	if err != nil {
		b.Skip(err)
	}
	r := h.at("/").Reader()
	defer r.Close()
	b.Run("stats", func(b *testing.B) {
		for b.Loop() {
			if _, err := r.Stats(); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("details", func(b *testing.B) {
		for b.Loop() {
			if _, err := r.Details(nil); err != nil {
				b.Fatal(err)
			}
		}
	})
}
