package sandbox

import (
	"errors"
	"math"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berthd/berth/sandbox/cgroup"
)

func TestCPURate(t *testing.T) {
	begun := time.Unix(1000, 0)
	ms := func(n int) time.Time { return begun.Add(time.Duration(n) * time.Millisecond) }
	type step struct {
		at    int    // ms
		usage uint64 // ms of CPU
		want  int64  // millicores, -1 for none
	}
	for name, steps := range map[string][]step{
		"the second call tells":             {{0, 500, -1}, {1000, 1000, 500}},
		"also when it comes at once":        {{0, 500, -1}, {10, 505, 500}},
		"two at the same time":              {{0, 500, -1}, {0, 500, -1}, {1000, 1500, 1000}},
		"a clock that stands behind":        {{1000, 500, -1}, {900, 500, -1}},
		"a close call does not disturb":     {{0, 0, -1}, {10000, 5000, 500}, {10010, 5005, 500}, {20000, 15000, 1000}},
		"another cgroup begins anew":        {{0, 5000, -1}, {1000, 6000, 1000}, {2000, 10, -1}, {3000, 260, 250}},
		"idle":                              {{0, 5000, -1}, {1000, 5000, 0}},
		"many calls in the shortest window": {{0, 0, -1}, {50, 50, 1000}, {99, 99, 1000}, {100, 100, 1000}, {150, 150, 1000}, {250, 150, 1000 * 50 / 150}},
	} {
		var r cpuRate
		for i, s := range steps {
			got, ok := r.add(s.usage*1e6, ms(s.at))
			if ok != (s.want >= 0) || ok && math.Abs(float64(got)/1e6-float64(s.want)) > 1 {
				t.Errorf("%s: step %d: %d nanocores, %v, want %d millicores", name, i, got, ok, s.want)
			}
		}
	}
}

const netDevText = `Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
    lo:       9       9    0    0    0     0          0         0        9       9    0    0    0     0       0          0
  eth0: 18446744073709551615 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16
veth:a:1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16
  net1:       1`

func TestParseNetDev(t *testing.T) {
	got, err := parseNetDev([]byte(netDevText))
	want := []netDev{
		{"eth0", netCounters{math.MaxUint64, 2, 3, 4}, netCounters{9, 10, 11, 12}},
		{"veth:a", netCounters{1, 2, 3, 4}, netCounters{9, 10, 11, 12}},
	}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("got %+v, %v, want %+v", got, err, want)
	}
	for _, bad := range []string{"eth0 1 2\n", "eth0: 1 2 3\n", "eth0: -1" + strings.Repeat(" 1", 15) + "\n"} {
		if got, err := parseNetDev([]byte("\n\n" + bad)); err == nil {
			t.Errorf("%q: got %+v", bad, got)
		}
	}
	if got, err := parseNetDev([]byte("\n\n" + strings.Repeat("x: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16\n", 3*maxNetDevs))); err != nil || len(got) != maxNetDevs {
		t.Errorf("many interfaces: %d, %v", len(got), err)
	}
	u := networkUsage(want, time.Unix(0, 5))
	if u.GetDefaultInterface().GetName() != "eth0" || u.GetDefaultInterface().GetTxErrors().GetValue() != 11 || len(u.GetInterfaces()) != 1 || u.GetTimestamp() != 5 {
		t.Errorf("usage %v", u)
	}
}

func FuzzParseNetDev(f *testing.F) {
	f.Add([]byte(netDevText))
	f.Fuzz(func(t *testing.T, text []byte) {
		devs, err := parseNetDev(text)
		if err != nil && devs != nil || len(devs) > maxNetDevs {
			t.Errorf("%d interfaces and %v", len(devs), err)
		}
	})
}

func TestOwnGroups(t *testing.T) {
	v := &view{pods: map[string]*pod{}}
	add := func(id, uid, parent string, made ...string) *pod {
		p := &pod{podRow: podRow{ID: id, Cgroups: made}, config: &runtime.PodSandboxConfig{
			Metadata: &runtime.PodSandboxMetadata{Uid: uid}, Linux: &runtime.LinuxPodSandboxConfig{CgroupParent: parent}}}
		v.pods[id] = p
		return p
	}
	const uid = "4f3c1c2e-8a70-4f0e-9f0b-0a52d2a7a3f1"
	for want, pods := range map[bool][]*pod{
		true: {
			add("1", uid, "/kubepods/burstable/pod"+uid),
			add("2", uid, "kubepods-burstable-pod4f3c1c2e_8a70_4f0e_9f0b_0a52d2a7a3f1.slice"),
			add("3", "u", "/tests/mine", "/sys/fs/cgroup/memory/tests", "/sys/fs/cgroup/memory/tests/mine"),
		},
		false: {
			add("4", uid, ""),
			add("5", "u", "/kubepods/podu"), // too short to tell
			add("6", uid, "/k8s.io"),
			add("7", uid, "/pod"+uid+"/all"),
			add("8", "u", "/shared", "/sys/fs/cgroup/memory/shared"),
			add("9", "v", "/shared"),
		},
	} {
		for _, p := range pods {
			if got := v.ownGroups()(p); got != want {
				t.Errorf("pod %s in %q: own %v, want %v", p.ID, p.config.Linux.CgroupParent, got, want)
			}
		}
	}
}

func TestUsageSum(t *testing.T) {
	var u usageSum
	u.add(cgroup.Stats{}, nil) // gone
	if !u.stats.At.IsZero() {
		t.Error("a sum of nothing has a time")
	}
	st := cgroup.Stats{At: time.Unix(1, 0), CPUUsage: 10, MemoryUsage: 20, WorkingSet: 15, RSS: 5, MemoryLimit: 100, CPU: &cgroup.Pressure{}}
	u.add(st, nil)
	if u.rate != nil {
		t.Error("a rate before there is one")
	}
	u.add(st, u64(7))
	u.add(st, u64(8))
	if s := u.stats; s.CPUUsage != 30 || s.MemoryUsage != 60 || s.WorkingSet != 45 || s.RSS != 15 || s.MemoryLimit != cgroup.NoLimit || s.CPU != nil || u.rate.GetValue() != 15 {
		t.Errorf("sum %+v, rate %v", s, u.rate)
	}
}

func TestInForce(t *testing.T) {
	want := &runtime.LinuxContainerResources{MemoryLimitInBytes: 1<<20 + 1, CpuQuota: 20000, CpuPeriod: 100000, CpuShares: 512, CpusetCpus: "0,1", OomScoreAdj: 5,
		MemorySwapLimitInBytes: 2 << 20, HugepageLimits: []*runtime.HugepageLimit{{PageSize: "2MB", Limit: 1}}}
	kept := proto.Clone(want)
	got := inForce(want, cgroup.Limits{Memory: 1 << 20, MemorySwap: cgroup.NoLimit, Quota: cgroup.NoLimit, Period: 50000, Shares: 256, CPUs: "0-1", Mems: "0"})
	if got.MemoryLimitInBytes != 1<<20 || got.CpuQuota != -1 || got.CpuPeriod != 50000 || got.CpuShares != 256 || got.CpusetCpus != "0-1" || got.CpusetMems != "" ||
		got.OomScoreAdj != 5 || got.MemorySwapLimitInBytes != 2<<20 || len(got.HugepageLimits) != 1 {
		t.Errorf("v1: %v", got)
	}
	if !proto.Equal(want, kept) {
		t.Error("the argument was changed")
	}
	for weight, shares := range map[uint64]int64{20: 512, 59: 512, 100: 2597} { // straight, curved, changed by somebody
		if got := inForce(want, cgroup.Limits{Weight: weight}); got.CpuShares != shares {
			t.Errorf("weight %d: %d shares, want %d", weight, got.CpuShares, shares)
		}
	}
	if got := inForce(&runtime.LinuxContainerResources{}, cgroup.Limits{Memory: 5, Quota: 5, Period: 5, Shares: 5, CPUs: "0"}); !proto.Equal(got, &runtime.LinuxContainerResources{}) {
		t.Errorf("what was not specified: %v", got)
	}
}

// rootGroup is a cgroup that every machine has.
func rootGroup(t testing.TB) cgroup.Group {
	t.Helper()
	h, err := cgroup.Detect()
	if err != nil {
		t.Skip(err)
	}
	return h.Group(cgroup.Cgroupfs, "/")
}

// Figures are taken over as long as they are fresh enough for the caller.
func TestStatsAreShared(t *testing.T) {
	g := rootGroup(t)
	e := &statsEntry{}
	defer func() { e.reader.Close() }()
	var at []time.Time
	for _, old := range []time.Duration{time.Hour, time.Hour, 0} {
		st, err := e.stats(g, old)
		if err != nil || st.At.IsZero() {
			t.Fatal(st, err)
		}
		at = append(at, st.At)
	}
	if !at[1].Equal(at[0]) || !at[2].After(at[1]) {
		t.Errorf("read at %v; want the second to be the first and the third a new one", at)
	}
	gone := &statsEntry{}
	if _, err := gone.stats(cgroup.Group{}, time.Hour); !errors.Is(err, cgroup.ErrGone) {
		t.Errorf("no group: %v", err)
	}
}
