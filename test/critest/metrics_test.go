package critest

import (
	"os"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// metricsOf returns the metrics of a pod and its containers by name and labels,
// "name{key=value,…}" with the labels that are not told of everything, having
// checked each against its description.
func (p *pod) metricsOf(owner string) map[string]uint64 {
	p.Helper()
	d, err := p.client.ListMetricDescriptors(p.ctx, &runtime.ListMetricDescriptorsRequest{})
	p.must(err)
	described := map[string]*runtime.MetricDescriptor{}
	for _, m := range d.Descriptors {
		if described[m.Name] != nil || m.Help == "" || len(m.LabelKeys) == 0 {
			p.Errorf("description %v: twice, or without help or labels", m)
		}
		described[m.Name] = m
	}
	r, err := p.client.ListPodSandboxMetrics(p.ctx, &runtime.ListPodSandboxMetricsRequest{})
	p.must(err)
	out := map[string]uint64{}
	add := func(l []*runtime.Metric, container string) {
		for _, m := range l {
			desc := described[m.Name]
			if desc == nil || len(m.LabelValues) != len(desc.LabelKeys) || m.Value == nil {
				p.Errorf("%v does not fit its description %v", m, desc)
				continue
			}
			var more []string
			for i, key := range desc.LabelKeys {
				switch v := m.LabelValues[i]; key {
				case "pod":
					p.same(m.Name+" pod", v, p.cfg.Metadata.Name)
				case "namespace":
					p.same(m.Name+" namespace", v, p.cfg.Metadata.Namespace)
				case "container":
					p.same(m.Name+" container", v, container)
				case "id", "name", "image":
				default:
					more = append(more, key+"="+v)
				}
			}
			key := m.Name
			if len(more) > 0 {
				key += "{" + strings.Join(more, ",") + "}"
			}
			if _, twice := out[key]; twice {
				p.Errorf("%s twice", key)
			}
			out[key] = m.Value.Value
		}
	}
	for _, pm := range r.PodMetrics {
		if pm.PodSandboxId != p.id {
			continue
		}
		if owner == p.id {
			add(pm.Metrics, "")
		}
		for _, cm := range pm.ContainerMetrics {
			if cm.ContainerId == owner {
				st, err := p.client.ContainerState(p.ctx, owner)
				p.must(err)
				add(cm.Metrics, st.Metadata.Name)
			}
		}
	}
	return out
}

func (b *box) same(what, got, want string) {
	b.Helper()
	if got != want {
		b.Errorf("%s: %q, want %q", what, got, want)
	}
}

func TestMetrics(t *testing.T) {
	b := open(t)
	p := b.pod()
	c := p.run([]string{"/guest", "http", ":80", "hello"}, resources(func(r *runtime.LinuxContainerResources) {
		r.MemoryLimitInBytes, r.CpuPeriod, r.CpuQuota, r.CpuShares = 64*mib, 100000, 20000, 1024
	}), security(func(s *sctx) { s.RunAsUser = &runtime.Int64Value{Value: 1000} }))
	b.fetch("http://" + p.status().Network.Ip + "/")
	// While two execs sleep, there are three processes.
	for range 2 {
		c.exec("sh", "-c", "sleep 300 >/dev/null 2>&1 &")
	}
	// Longer than the quota of a period, so that there has been one.
	c.exec("sh", "-c", "i=0; while [ $i -lt 40000 ]; do i=$((i+1)); done")
	got := p.metricsOf(c.id)
	for name, want := range map[string][2]uint64{ // least and most
		"container_last_seen":                                                      {1, 1 << 40},
		"container_start_time_seconds":                                             {1, 1 << 40},
		"container_creation_time_seconds":                                          {1, 1 << 40},
		"container_cpu_usage_seconds_total{cpu=total}":                             {0, 1000},
		"container_cpu_user_seconds_total":                                         {0, 1000},
		"container_cpu_system_seconds_total":                                       {0, 1000},
		"container_cpu_cfs_periods_total":                                          {1, 1 << 30},
		"container_cpu_cfs_throttled_periods_total":                                {0, 1 << 30},
		"container_cpu_cfs_throttled_seconds_total":                                {0, 1 << 30},
		"container_spec_cpu_period":                                                {100000, 100000},
		"container_spec_cpu_quota":                                                 {20000, 20000},
		"container_spec_cpu_shares":                                                {900, 3000}, // v2 has weights, which are coarser
		"container_spec_memory_limit_bytes":                                        {64 * mib, 64 * mib},
		"container_spec_memory_swap_limit_bytes":                                   {0, 64 * mib},
		"container_spec_memory_reservation_limit_bytes":                            {0, 0},
		"container_memory_usage_bytes":                                             {1, 64 * mib},
		"container_memory_max_usage_bytes":                                         {1, 64 * mib},
		"container_memory_working_set_bytes":                                       {1, 64 * mib},
		"container_memory_rss":                                                     {1, 64 * mib},
		"container_memory_cache":                                                   {0, 64 * mib},
		"container_memory_failcnt":                                                 {0, 1 << 30},
		"container_memory_kernel_usage":                                            {0, 64 * mib},
		"container_memory_mapped_file":                                             {0, 64 * mib},
		"container_memory_swap":                                                    {0, 64 * mib},
		"container_memory_failures_total{failure_type=pgfault,scope=container}":    {1, 1 << 40},
		"container_memory_failures_total{failure_type=pgmajfault,scope=hierarchy}": {0, 1 << 40},
		"container_oom_events_total":                                               {0, 0},
		"container_processes":                                                      {3, 10},
		"container_threads":                                                        {3, 100},
		"container_threads_max":                                                    {0, 1 << 40},
		"container_file_descriptors":                                               {3, 1000},
		"container_sockets":                                                        {1, 100},
		"container_ulimits_soft{ulimit=max_open_files}":                            {1, 1 << 40},
	} {
		if v, ok := got[name]; !ok || v < want[0] || v > want[1] {
			t.Errorf("%s is %d (there: %v), want %d to %d", name, v, ok, want[0], want[1])
		}
	}
	for _, name := range []string{"container_fs_usage_bytes", "container_fs_limit_bytes", "container_fs_inodes_total", "container_fs_inodes_free"} {
		if _, ok := find(got, name+"{device="); !ok {
			t.Errorf("no %s", name)
		}
	}
	if _, err := os.Stat("/proc/pressure/cpu"); err == nil && b.node != nil {
		for _, what := range []string{"cpu_stalled", "cpu_waiting", "memory_stalled", "memory_waiting", "io_stalled", "io_waiting"} {
			if _, ok := got["container_pressure_"+what+"_seconds_total"]; !ok {
				t.Errorf("no pressure %s, which this kernel measures", what)
			}
		}
	}
	ofPod := p.metricsOf(p.id)
	for _, name := range []string{"receive_bytes", "transmit_bytes", "receive_packets", "transmit_packets"} {
		if v := ofPod["container_network_"+name+"_total{interface=eth0}"]; v == 0 {
			t.Errorf("%s of the pod is 0", name)
		}
	}
	for _, name := range []string{"receive_errors", "transmit_errors", "receive_packets_dropped", "transmit_packets_dropped"} {
		if _, ok := ofPod["container_network_"+name+"_total{interface=eth0}"]; !ok {
			t.Errorf("no %s of the pod", name)
		}
	}
	if b.node != nil && ofPod["container_memory_usage_bytes"] < got["container_memory_rss"] {
		t.Errorf("memory of the pod %d, RSS of its container %d", ofPod["container_memory_usage_bytes"], got["container_memory_rss"])
	}
}

func find(m map[string]uint64, prefix string) (uint64, bool) {
	for k, v := range m {
		if strings.HasPrefix(k, prefix) {
			return v, true
		}
	}
	return 0, false
}

// TestMetricsOOM: an OOM kill that the container survives is counted.
func TestMetricsOOM(t *testing.T) {
	b := open(t)
	p := b.pod()
	c := p.run(sh("/guest eat 256 >/dev/null 2>&1; echo survived; sleep 300"), resources(func(r *runtime.LinuxContainerResources) {
		r.MemoryLimitInBytes, r.MemorySwapLimitInBytes = 40*mib, 40*mib
	}))
	c.sees("survived")
	if n := p.metricsOf(c.id)["container_oom_events_total"]; n != 1 {
		t.Errorf("%d OOM events, want 1", n)
	}
}

// TestMetricsOnlyOfRunning: what does not run has no metrics.
func TestMetricsOnlyOfRunning(t *testing.T) {
	b := open(t)
	p := b.pod()
	c, fresh := p.run(sh("sleep 300")), p.create(sh("sleep 300"))
	if len(p.metricsOf(c.id)) == 0 || len(p.metricsOf(fresh.id)) != 0 {
		t.Errorf("running: %d, created: %d metrics", len(p.metricsOf(c.id)), len(p.metricsOf(fresh.id)))
	}
	c.stop(0)
	if n := len(p.metricsOf(c.id)); n != 0 {
		t.Errorf("%d metrics of an exited container", n)
	}
	p.stop()
	r, err := b.client.ListPodSandboxMetrics(b.ctx, &runtime.ListPodSandboxMetricsRequest{})
	b.must(err)
	if slices.ContainsFunc(r.PodMetrics, func(m *runtime.PodSandboxMetrics) bool { return m.PodSandboxId == p.id }) {
		t.Error("metrics of a stopped pod")
	}
}

// TestMetricsEmptyID: a request that names no pod is refused.
func TestMetricsEmptyID(t *testing.T) {
	b := open(t)
	b.ours()
	_, err := b.client.PodSandboxStats(b.ctx, &runtime.PodSandboxStatsRequest{})
	if status.Code(err) != codes.InvalidArgument {
		t.Errorf("PodSandboxStats without an ID: %v", err)
	}
	_, err = b.client.UpdatePodSandboxResources(b.ctx, &runtime.UpdatePodSandboxResourcesRequest{})
	if status.Code(err) != codes.InvalidArgument {
		t.Errorf("UpdatePodSandboxResources without an ID: %v", err)
	}
}
