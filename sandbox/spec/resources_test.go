package spec

import (
	"reflect"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestResolveResources(t *testing.T) {
	type res = runtime.LinuxContainerResources
	mem := func(limit, swap int64) *specs.LinuxResources {
		return &specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &limit, Swap: &swap}}
	}
	noSwap := v2Host
	noSwap.Swap = false
	tests := []struct {
		name string
		r    *res
		host Host
		want *specs.LinuxResources
		err  string
	}{
		{"nil", nil, v1Host, &specs.LinuxResources{}, ""},
		{"oom score is elsewhere", &res{OomScoreAdj: 5}, v1Host, &specs.LinuxResources{}, ""},
		{"cpu", &res{CpuShares: 1, CpuPeriod: 1000, CpuQuota: -5, CpusetCpus: "0,2-3", CpusetMems: "0"}, v1Host,
			&specs.LinuxResources{CPU: &specs.LinuxCPU{Shares: ptr(uint64(2)), Period: ptr(uint64(1000)), Quota: ptr(int64(-1)), Cpus: "0,2-3", Mems: "0"}}, ""},
		{"memory", &res{MemoryLimitInBytes: 5}, v1Host, mem(5, 5), ""},
		{"memory without swap accounting", &res{MemoryLimitInBytes: 5, MemorySwapLimitInBytes: 9}, noSwap,
			&specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: ptr(int64(5))}}, ""},
		{"memory and swap", &res{MemoryLimitInBytes: 5, MemorySwapLimitInBytes: 9}, v1Host, mem(5, 9), ""},
		{"unlimited swap", &res{MemoryLimitInBytes: 5, MemorySwapLimitInBytes: -1}, v1Host, mem(5, -1), ""},
		{"unified", &res{Unified: map[string]string{"memory.high": "1", "hugetlb.2MB.max": "0"}}, v2Host, &specs.LinuxResources{Unified: map[string]string{"memory.high": "1", "hugetlb.2MB.max": "0"}}, ""},
		{"no pages is no limit", &res{HugepageLimits: []*runtime.HugepageLimit{{PageSize: "64KB"}}}, v2Host, &specs.LinuxResources{}, ""},

		{"shares", &res{CpuShares: 262145}, v1Host, nil, "linux.resources: invalid argument: cpu_shares 262145: not in 2..262144"},
		{"negative shares", &res{CpuShares: -1}, v1Host, nil, "cpu_shares -1"},
		{"period", &res{CpuPeriod: 999}, v1Host, nil, "cpu_period 999: not in 1000..1000000"},
		{"quota", &res{CpuQuota: 999}, v1Host, nil, "cpu_quota 999: less than 1000"},
		{"cpus", &res{CpusetCpus: "0-"}, v1Host, nil, `cpuset_cpus "0-"`},
		{"cpus backwards", &res{CpusetCpus: "3-1"}, v1Host, nil, `"3-1" is neither`},
		{"cpus long", &res{CpusetCpus: strings.Repeat("0,", 4096)}, v1Host, nil, "the limit is 4096"},
		{"mems", &res{CpusetMems: "a"}, v1Host, nil, `cpuset_mems "a"`},
		{"memory -2", &res{MemoryLimitInBytes: -2}, v1Host, nil, "memory_limit_in_bytes -2"},
		{"swap -2", &res{MemorySwapLimitInBytes: -2}, v1Host, nil, "memory_swap_limit_in_bytes -2"},
		{"swap below memory", &res{MemoryLimitInBytes: 9, MemorySwapLimitInBytes: 5}, v1Host, nil, "less than memory_limit_in_bytes 9"},
		{"swap alone", &res{MemorySwapLimitInBytes: 5}, v1Host, nil, "needs a memory_limit_in_bytes"},
		{"pages", &res{HugepageLimits: []*runtime.HugepageLimit{{PageSize: "2MB"}, {PageSize: "1GB", Limit: 1}}}, v2Host, nil, `hugepage_limits[1].page_size "1GB"`},
		{"unified on v1", &res{Unified: map[string]string{"memory.high": "1"}}, v1Host, nil, "needs cgroup v2"},
		{"unified path", &res{Unified: map[string]string{"../memory.high": "1"}}, v2Host, nil, "want a file of a controller"},
		{"unified dots", &res{Unified: map[string]string{"memory..high": "1"}}, v2Host, nil, "want a file of a controller"},
		{"unified cgroup.procs", &res{Unified: map[string]string{"cgroup.procs": "1"}}, v2Host, nil, `"cgroup.procs"`},
		{"unified no dot", &res{Unified: map[string]string{"memory": "1"}}, v2Host, nil, `"memory"`},
		{"unified value", &res{Unified: map[string]string{"memory.high": strings.Repeat("1", 4097)}}, v2Host, nil, "the limit is 4096"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := ResolveResources(tt.r, tt.host)
			wantErr(t, err, tt.err)
			if !reflect.DeepEqual(got, tt.want) {
				t.Errorf("got %+v, want %+v", got, tt.want)
			}
		})
	}
}

func TestMergeResources(t *testing.T) {
	old := &runtime.LinuxContainerResources{
		CpuPeriod: 1, CpuQuota: 2, CpuShares: 3, MemoryLimitInBytes: 4, OomScoreAdj: 5, CpusetCpus: "0",
		HugepageLimits: []*runtime.HugepageLimit{{PageSize: "2MB", Limit: 1}}, Unified: map[string]string{"a.a": "1", "b.b": "1"},
	}
	change := &runtime.LinuxContainerResources{
		CpuQuota: 20, MemorySwapLimitInBytes: 40, OomScoreAdj: 50, CpusetMems: "1",
		HugepageLimits: []*runtime.HugepageLimit{{PageSize: "1GB", Limit: 2}, {PageSize: "2MB", Limit: 3}}, Unified: map[string]string{"b.b": "2"},
	}
	want := &runtime.LinuxContainerResources{
		CpuPeriod: 1, CpuQuota: 20, CpuShares: 3, MemoryLimitInBytes: 4, MemorySwapLimitInBytes: 40, OomScoreAdj: 5, CpusetCpus: "0", CpusetMems: "1",
		HugepageLimits: []*runtime.HugepageLimit{{PageSize: "2MB", Limit: 3}, {PageSize: "1GB", Limit: 2}}, Unified: map[string]string{"a.a": "1", "b.b": "2"},
	}
	if got := MergeResources(old, change); !reflect.DeepEqual(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	if got := MergeResources(nil, nil); !reflect.DeepEqual(got, &runtime.LinuxContainerResources{}) {
		t.Errorf("of nothing: %v", got)
	}
	if old.Unified["b.b"] != "1" || old.HugepageLimits[0].Limit != 1 {
		t.Error("the old resources have changed")
	}
}
