package sandbox

import (
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berthd/berth/sandbox/cgroup"
)

type limits = runtime.LinuxContainerResources

func TestResourcesThereAndBack(t *testing.T) {
	all := &limits{CpuPeriod: 1, CpuQuota: -1, CpuShares: 3, MemoryLimitInBytes: 4, MemorySwapLimitInBytes: 5, CpusetCpus: "0", CpusetMems: "1",
		HugepageLimits: []*runtime.HugepageLimit{{PageSize: "2MB", Limit: 6}}, Unified: map[string]string{"a": "b"}}
	for _, r := range []*limits{{}, all, {CpuShares: -5}} {
		if got := criResources(ociResources(r)); !proto.Equal(got, r) {
			t.Errorf("got %v, want %v", got, r)
		}
	}
	if ociResources(nil) != nil || !proto.Equal(criResources(nil), &limits{}) {
		t.Error("nothing is not nothing")
	}
}

func TestChangedResources(t *testing.T) {
	base := &limits{CpuShares: 2, MemoryLimitInBytes: 10, CpusetCpus: "0", Unified: map[string]string{"a": "1"}, HugepageLimits: []*runtime.HugepageLimit{{PageSize: "2MB", Limit: 1}}}
	if got := changedResources(base, base); got != nil {
		t.Errorf("nothing changed, got %v", got)
	}
	now := &limits{CpuShares: 2, CpuQuota: 7, MemoryLimitInBytes: 11, CpusetCpus: "1", Unified: map[string]string{"a": "1", "b": "2"},
		HugepageLimits: []*runtime.HugepageLimit{{PageSize: "2MB", Limit: 1}, {PageSize: "1GB", Limit: 2}}}
	want := &limits{CpuQuota: 7, MemoryLimitInBytes: 11, CpusetCpus: "1", Unified: map[string]string{"b": "2"}, HugepageLimits: []*runtime.HugepageLimit{{PageSize: "1GB", Limit: 2}}}
	if got := changedResources(base, now); !proto.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

func TestPastResources(t *testing.T) {
	none := cgroup.Limits{Memory: cgroup.NoLimit, Quota: cgroup.NoLimit, Period: 100000, Shares: 1024, CPUs: "0-1", Mems: "0"}
	tests := []struct {
		name            string
		made, old, want *limits
	}{
		{"what had been set comes back", &limits{MemoryLimitInBytes: 1, CpuShares: 2, CpusetCpus: "1", Unified: map[string]string{"a": "2"}},
			&limits{MemoryLimitInBytes: 7, MemorySwapLimitInBytes: 9, CpuShares: 8, CpusetCpus: "0", Unified: map[string]string{"a": "1"}},
			&limits{MemoryLimitInBytes: 7, MemorySwapLimitInBytes: 9, CpuShares: 8, CpusetCpus: "0", Unified: map[string]string{"a": "1"}}},
		{"what had not gets what the kernel had", &limits{MemoryLimitInBytes: 1, CpuQuota: 2, CpuPeriod: 3, CpuShares: 4, CpusetCpus: "1", CpusetMems: "0"}, nil,
			&limits{MemoryLimitInBytes: -1, MemorySwapLimitInBytes: -1, CpuQuota: -1, CpuPeriod: 100000, CpuShares: 1024, CpusetCpus: "0-1", CpusetMems: "0"}},
		{"what was not touched stays", &limits{CpuShares: 4}, &limits{MemoryLimitInBytes: 7, CpuQuota: 5}, &limits{CpuShares: 1024}},
	}
	for _, tt := range tests {
		if got := pastResources(tt.made, tt.old, none); !proto.Equal(got, tt.want) {
			t.Errorf("%s: got %v, want %v", tt.name, got, tt.want)
		}
	}
	if got := pastResources(&limits{CpuShares: 4}, nil, cgroup.Limits{Weight: 100}); got.CpuShares != int64(sharesOf(100)) {
		t.Errorf("shares %d from a weight of 100", got.CpuShares)
	}
}

func TestBeyondCRI(t *testing.T) {
	pids, bytes, runtimeUS := int64(9), int64(10), int64(11)
	res := &specs.LinuxResources{}
	addBeyondCRI(res, nil)
	addBeyondCRI(res, &specs.LinuxResources{Pids: &specs.LinuxPids{Limit: &pids}, Memory: &specs.LinuxMemory{Reservation: &bytes}, CPU: &specs.LinuxCPU{RealtimeRuntime: &runtimeUS}})
	if *res.Pids.Limit != 9 || *res.Memory.Reservation != 10 || *res.CPU.RealtimeRuntime != 11 || res.Memory.Limit != nil {
		t.Errorf("got %+v", res)
	}
}
