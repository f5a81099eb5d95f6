package critest

import (
	"slices"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func (c *container) stats() *runtime.ContainerStats {
	c.Helper()
	r, err := c.client.ContainerStats(c.ctx, &runtime.ContainerStatsRequest{ContainerId: c.id})
	c.must(err)
	return r.Stats
}

func TestStats(t *testing.T) {
	b := open(t)
	c := b.pod().run(sh("i=0; while true; do i=$((i+1)); done"), func(c *runtime.ContainerConfig) {
		c.Annotations = map[string]string{"note": "kept"}
		c.Linux.Resources.MemoryLimitInBytes = 64 * mib
	})
	first := c.stats()
	if a := first.GetAttributes(); a.GetId() != c.id || !proto.Equal(a.GetMetadata(), c.cfg.Metadata) || a.GetLabels()["container"] == "" || a.GetAnnotations()["note"] != "kept" {
		t.Errorf("attributes %v", first.Attributes)
	}
	// At least a tenth of a second of a core must have been used a while later.
	b.until("rising CPU usage", func() bool {
		now := c.stats()
		return now.GetCpu().GetUsageCoreNanoSeconds().GetValue() > first.GetCpu().GetUsageCoreNanoSeconds().GetValue()+uint64(100*time.Millisecond) &&
			now.Cpu.Timestamp > first.Cpu.Timestamp
	})
	m := c.stats().GetMemory()
	if ws, u := m.GetWorkingSetBytes().GetValue(), m.GetUsageBytes().GetValue(); ws == 0 || ws > 64*mib || u < ws {
		t.Errorf("working set %d, usage %d with a limit of %d", ws, u, 64*mib)
	}
	if av := m.GetAvailableBytes().GetValue(); av == 0 || av > 64*mib {
		t.Errorf("available %d with a limit of %d", av, 64*mib)
	}
	if m.GetRssBytes().GetValue() == 0 {
		t.Error("RSS is 0")
	}
	if at := time.Unix(0, m.Timestamp); time.Since(at) > time.Minute || at.After(time.Now().Add(time.Second)) {
		t.Errorf("memory measured at %v", at)
	}
}

func TestStatsWritableLayer(t *testing.T) {
	b := open(t)
	c := b.pod().run(sh("sleep 300"))
	c.exec("sh", "-c", "mkdir /data && dd if=/dev/zero of=/data/x bs=1M count=3 2>/dev/null && for i in 1 2 3 4 5; do : > /data/$i; done; sync")
	b.until("writable layer of 3 MiB and 7 inodes", func() bool {
		l := c.stats().GetWritableLayer()
		return l.GetUsedBytes().GetValue() >= 3*mib && l.GetUsedBytes().GetValue() < 8*mib && l.GetInodesUsed().GetValue() >= 7 && l.GetFsId().GetMountpoint() != "" && l.Timestamp != 0
	})
}

func TestStatsList(t *testing.T) {
	b := open(t)
	p, other := b.pod(), b.pod()
	one := p.run(sh("sleep 300"), func(c *runtime.ContainerConfig) { c.Labels["kind"] = "one" })
	two, three := p.run(sh("sleep 300")), other.run(sh("sleep 300"))
	list := func(f *runtime.ContainerStatsFilter) []string {
		r, err := b.client.ListContainerStats(b.ctx, &runtime.ListContainerStatsRequest{Filter: f})
		b.must(err)
		var ids []string
		for _, s := range r.Stats {
			ids = append(ids, s.Attributes.Id)
		}
		slices.Sort(ids)
		return ids
	}
	for _, c := range []struct {
		name   string
		filter *runtime.ContainerStatsFilter
		want   []string
	}{
		{"pod", &runtime.ContainerStatsFilter{PodSandboxId: p.id}, []string{one.id, two.id}},
		{"container", &runtime.ContainerStatsFilter{Id: three.id}, []string{three.id}},
		{"label", &runtime.ContainerStatsFilter{PodSandboxId: p.id, LabelSelector: map[string]string{"kind": "one"}}, []string{one.id}},
		{"container of another pod", &runtime.ContainerStatsFilter{PodSandboxId: p.id, Id: three.id}, nil},
	} {
		slices.Sort(c.want)
		if got := list(c.filter); !slices.Equal(got, c.want) {
			t.Errorf("%s: got %.12q, want %.12q", c.name, got, c.want)
		}
	}
	if all := list(nil); !slices.Contains(all, one.id) || !slices.Contains(all, three.id) {
		t.Error("list without a filter lacks a container")
	}
}
