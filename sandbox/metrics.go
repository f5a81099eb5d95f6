package sandbox

import (
	"context"
	"time"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/klog/v2"

	"github.com/berthd/berth/sandbox/cgroup"
)

// Metrics are what the kubelet publishes of pods and containers under
// /metrics/cadvisor. Names, labels and meanings are those of its own reader, so
// that dashboards and alerts go on working when the kubelet asks the runtime
// instead (PodAndContainerStatsFromCRI): what is told of a container bears its
// name, what is told of a pod has an empty one.
//
// CRI's values are whole numbers, so times in seconds are rounded down.

// sample is what was found out about a container, or a pod, for its metrics.
type sample struct {
	labels  []string // values of baseLabels
	now     time.Time
	created int64 // ns since 1970
	started int64 // likewise

	group   *cgroup.Details // nil if the cgroup is gone, or not the pod's own
	v2      bool
	procs   *processCount
	devices func(major, minor uint32) string // names of block devices

	disk  *diskSpace
	layer *runtime.FilesystemUsage
	nets  []netDev
}

// value is one value of a metric.
type value struct {
	n      uint64
	labels []string // of the metric's own label keys
	at     int64    // when it was measured if that was not now, ns since 1970
}

// metric describes one metric. values returns nothing if the sample has nothing
// to say on it.
type metric struct {
	name, help string
	kind       runtime.MetricType
	labels     []string // in addition to baseLabels
	values     func(*sample) []value
}

// baseLabels are the keys that every metric has: the path of the cgroup, the ID
// of the container or pod, and what Kubernetes calls them.
var baseLabels = []string{"id", "name", "image", "container", "namespace", "pod"}

const (
	counter = runtime.MetricType_COUNTER
	gauge   = runtime.MetricType_GAUGE
)

// metrics returns the table for this machine.
func (s *Service) metrics() []metric {
	list := append(append([]metric{}, groupMetrics...), otherMetrics...)
	if s.hier.V2() {
		list = append(list, unifiedMetrics...)
	}
	return list
}

// MetricDescriptors describes all metrics that ListPodMetrics may return. They do
// not change while the machine runs.
func (s *Service) MetricDescriptors() []*runtime.MetricDescriptor {
	list := s.metrics()
	out := make([]*runtime.MetricDescriptor, 0, len(list))
	for _, m := range list {
		out = append(out, &runtime.MetricDescriptor{Name: m.name, Help: m.help,
			LabelKeys: append(append([]string{}, baseLabels...), m.labels...)})
	}
	return out
}

// ListPodMetrics returns the metrics of all ready pods and of their running
// containers, the newest first, read now. What cannot be read is left out.
func (s *Service) ListPodMetrics(ctx context.Context) ([]*runtime.PodSandboxMetrics, error) {
	ctx, cancel := context.WithTimeout(ctx, firstWalk)
	defer cancel()
	v := s.book.view()
	pods := v.readyPods("", nil)
	nets, err := s.networks(pods)
	if err != nil {
		klog.FromContext(ctx).V(2).Info("Network of pods not read", "err", err)
	}
	table, own, disk, devices := s.metrics(), v.ownGroups(), s.disk(), deviceNames()
	return eachCPU(pods, func(p *pod) *runtime.PodSandboxMetrics {
		out := &runtime.PodSandboxMetrics{PodSandboxId: p.ID, Metrics: measure(table, s.samplePod(ctx, p, own(p), nets[p.ID], devices))}
		for _, c := range v.byPod[p.ID] {
			if c.listed() && c.State == StateRunning {
				out.ContainerMetrics = append(out.ContainerMetrics, &runtime.ContainerMetrics{ContainerId: c.ID,
					Metrics: measure(table, s.sampleContainer(ctx, p, c, disk, devices))})
			}
		}
		return out
	}), nil
}

// measure makes the metrics of a sample.
func measure(table []metric, sm *sample) []*runtime.Metric {
	out := make([]*runtime.Metric, 0, len(table))
	for _, m := range table {
		for _, v := range m.values(sm) {
			labels := sm.labels
			if len(v.labels) > 0 {
				labels = append(append(make([]string, 0, len(labels)+len(v.labels)), labels...), v.labels...)
			}
			out = append(out, &runtime.Metric{Name: m.name, Timestamp: v.at, MetricType: m.kind, LabelValues: labels, Value: u64(v.n)})
		}
	}
	return out
}

// samplePod looks at a pod as a whole.
func (s *Service) samplePod(ctx context.Context, p *pod, own bool, nets []netDev, devices func(major, minor uint32) string) *sample {
	m, group := p.config.GetMetadata(), s.podGroup(p)
	sm := &sample{now: time.Now(), created: p.Created, started: p.Created, v2: s.hier.V2(), nets: nets, devices: devices,
		labels: []string{group.Path(), p.ID, "", "", m.GetNamespace(), m.GetName()}}
	if own {
		s.sampleGroup(ctx, p.ID, group, sm)
		s.forgetGonePod(p.ID)
	}
	return sm
}

// sampleContainer looks at a container.
func (s *Service) sampleContainer(ctx context.Context, p *pod, c *container, disk *diskSpace, devices func(major, minor uint32) string) *sample {
	m, group := p.config.GetMetadata(), s.groupOf(c)
	sm := &sample{now: time.Now(), created: c.Created, started: c.Started, v2: s.hier.V2(), disk: disk, devices: devices,
		labels: []string{group.Path(), c.ID, c.ImageName, c.config.GetMetadata().GetName(), m.GetNamespace(), m.GetName()}}
	s.sampleGroup(ctx, c.ID, group, sm)
	if sm.group != nil {
		sm.procs = countProcesses(sm.procs.pids, c.Pid)
	}
	sm.layer = s.layerUsage(ctx, c.ID, s.stats.entry(c.ID))
	s.forgetGone(c.ID)
	return sm
}

// sampleGroup reads a cgroup and the list of its processes.
func (s *Service) sampleGroup(ctx context.Context, key string, g cgroup.Group, sm *sample) {
	err := s.stats.entry(key).with(g, func(r *cgroup.Reader) error {
		d, err := r.Details(s.host.HugePages)
		if err != nil {
			return err
		}
		pids, err := r.Pids()
		if err != nil {
			return err
		}
		sm.group, sm.procs = &d, &processCount{pids: pids}
		return nil
	})
	if err != nil {
		klog.FromContext(ctx).V(4).Info("Metrics not read", "id", key, "err", err)
	}
}
