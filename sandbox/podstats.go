package sandbox

import (
	"context"
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"
	"time"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/klog/v2"

	"github.com/berthd/berth/sandbox/cgroup"
)

// PodStats returns the resource usage of a pod and of its running containers, read
// now. One that is not ready has none of its own.
func (s *Service) PodStats(ctx context.Context, id string) (*runtime.PodSandboxStats, error) {
	v := s.book.view()
	p, err := v.pod(id)
	if err != nil {
		return nil, err
	}
	out, err := s.statsOfPods(ctx, v, []*pod{p}, 0)
	if err != nil {
		return nil, err
	}
	return out[0], nil
}

// ListPodStats returns the usage of all ready pods that match the filter, the
// newest first, as of the last 100 ms; nil matches all. What cannot be read of a pod
// is left out.
func (s *Service) ListPodStats(ctx context.Context, f *runtime.PodSandboxStatsFilter) ([]*runtime.PodSandboxStats, error) {
	v := s.book.view()
	return s.statsOfPods(ctx, v, v.readyPods(f.GetId(), f.GetLabelSelector()), shared)
}

// readyPods returns the ready pods by ID, which may be a prefix, and labels, the
// newest first.
func (v *view) readyPods(id string, labels map[string]string) []*pod {
	var out []*pod
	for _, p := range v.pods {
		if p.listed() && p.State == StateReady && matchID(p.ID, id) && matchLabels(p.config.GetLabels(), labels) {
			out = append(out, p)
		}
	}
	slices.SortFunc(out, func(a, b *pod) int { return newer(a.Created, b.Created, a.ID, b.ID) })
	return out
}

// statsOfPods takes over what is not older than old.
func (s *Service) statsOfPods(ctx context.Context, v *view, pods []*pod, old time.Duration) ([]*runtime.PodSandboxStats, error) {
	ctx, cancel := context.WithTimeout(ctx, firstWalk)
	defer cancel()
	nets := make(chan map[string][]netDev, 1)
	begun := time.Now()
	go func() {
		m, err := s.networks(pods)
		if err != nil {
			klog.FromContext(ctx).V(2).Info("Network of pods not read", "err", err)
		}
		nets <- m
	}()
	own := v.ownGroups()
	out := eachCPU(pods, func(p *pod) *runtime.PodSandboxStats {
		st, err := s.podStats(ctx, p, v.byPod[p.ID], own(p), old)
		if err != nil {
			klog.FromContext(ctx).V(2).Info("Stats not read", "podID", p.ID, "err", err)
		}
		return st
	})
	devs := <-nets
	for i, p := range pods {
		if l := devs[p.ID]; l != nil {
			out[i].Linux.Network = networkUsage(l, begun)
		}
	}
	return out, nil
}

// podStats reads all but the network.
func (s *Service) podStats(ctx context.Context, p *pod, containers []*container, own bool, old time.Duration) (*runtime.PodSandboxStats, error) {
	linux := &runtime.LinuxPodSandboxStats{}
	out := &runtime.PodSandboxStats{Linux: linux, Attributes: &runtime.PodSandboxAttributes{Id: p.ID, Metadata: p.config.GetMetadata(),
		Labels: p.config.GetLabels(), Annotations: p.config.GetAnnotations()}}
	if p.State != StateReady {
		return out, nil
	}
	var errs []error
	sum := usageSum{}
	for _, c := range containers {
		if !c.listed() || c.State != StateRunning {
			continue
		}
		cs, st, err := s.containerStats(ctx, c, old)
		linux.Containers = append(linux.Containers, cs)
		errs = append(errs, err)
		sum.add(st, cs.GetCpu().GetUsageNanoCores())
		sum.processes += s.processes(c.ID, s.groupOf(c))
	}
	if p.Init {
		errs = append(errs, s.addInit(p, &sum, old))
	}
	st, rate := sum.stats, sum.rate
	if own {
		var err error
		if st, rate, err = s.groupUsage(p.ID, s.podGroup(p), old); errors.Is(err, cgroup.ErrGone) {
			st, rate = sum.stats, sum.rate // it comes with the first container
		} else if err != nil {
			return out, errors.Join(append(errs, fmt.Errorf("pod %s: %w", p.ID, err))...)
		}
	}
	if st.At.IsZero() { // nothing runs: that is measured, too
		st.At, st.MemoryLimit, rate = time.Now(), cgroup.NoLimit, u64(0)
	}
	linux.Cpu, linux.Memory, linux.Io = cpuUsage(st), memoryUsage(st), ioUsage(st)
	linux.Cpu.UsageNanoCores = rate
	linux.Process = &runtime.ProcessUsage{Timestamp: st.At.UnixNano(), ProcessCount: u64(sum.processes)}
	return out, errors.Join(errs...)
}

// usageSum adds up the usage of a pod's containers.
type usageSum struct {
	stats     cgroup.Stats
	rate      *runtime.UInt64Value // nil while there is none of any
	processes uint64
}

// add takes in what was read of a cgroup, unless nothing was. A sum has neither
// a limit nor pressure: they do not add up.
func (u *usageSum) add(st cgroup.Stats, rate *runtime.UInt64Value) {
	if st.At.IsZero() {
		return
	}
	s := &u.stats
	s.At, s.MemoryLimit, s.SwapLimit = st.At, cgroup.NoLimit, cgroup.NoLimit
	s.CPUUsage += st.CPUUsage
	s.MemoryUsage += st.MemoryUsage
	s.WorkingSet += st.WorkingSet
	s.RSS += st.RSS
	s.PageFaults += st.PageFaults
	s.MajorFaults += st.MajorFaults
	s.SwapUsage += st.SwapUsage
	if rate != nil {
		u.rate = u64(u.rate.GetValue() + rate.GetValue())
	}
}

// initKey is the key of the stats of a pod's init, whose ID is the pod's own.
func initKey(podID string) string { return podID + " init" }

func (s *Service) addInit(p *pod, sum *usageSum, old time.Duration) error {
	_, group, err := s.initPath(p)
	if err != nil {
		return err
	}
	st, rate, err := s.groupUsage(initKey(p.ID), group, old)
	if err != nil && !errors.Is(err, cgroup.ErrGone) {
		return fmt.Errorf("pod %s: init: %w", p.ID, err)
	}
	sum.add(st, rate)
	sum.processes += s.processes(initKey(p.ID), group)
	return nil
}

// groupUsage reads the usage of a cgroup and its CPU rate, nil before there is one.
func (s *Service) groupUsage(key string, g cgroup.Group, old time.Duration) (st cgroup.Stats, rate *runtime.UInt64Value, err error) {
	defer s.forgetGonePod(key)
	e := s.stats.entry(key)
	if st, err = e.stats(g, old); err != nil {
		return cgroup.Stats{}, nil, err
	}
	if v, ok := e.nanoCores(st.CPUUsage, st.At); ok {
		rate = u64(v)
	}
	return st, rate, nil
}

// forgetGonePod drops what was kept of a pod that was stopped during the call.
func (s *Service) forgetGonePod(key string) {
	id, _, _ := strings.Cut(key, " ")
	if p := s.book.view().pods[id]; p == nil || p.State != StateReady {
		s.stats.drop(key)
	}
}

// processes counts the processes of a cgroup; one that is gone has none.
func (s *Service) processes(key string, g cgroup.Group) uint64 {
	var pids []int
	err := s.stats.entry(key).with(g, func(r *cgroup.Reader) (err error) { pids, err = r.Pids(); return err })
	if err != nil {
		return 0
	}
	return uint64(len(pids))
}

// podGroup is the cgroup that the kubelet has named for the pod.
func (s *Service) podGroup(p *pod) cgroup.Group {
	return s.hier.Parent(s.driverOf(p), p.config.GetLinux().GetCgroupParent())
}

// ownGroups returns a function that tells whether the cgroup that a pod's
// containers are put into is the pod's own, so that what it uses is what the pod
// uses: it is named by the pod's UID, as the kubelet does, or was made for it,
// and no other pod has it.
func (v *view) ownGroups() func(*pod) bool {
	users := make(map[string]int, len(v.pods))
	for _, p := range v.pods {
		users[p.config.GetLinux().GetCgroupParent()]++
	}
	return func(p *pod) bool {
		parent := p.config.GetLinux().GetCgroupParent()
		return parent != "" && (namedBy(parent, p.config.GetMetadata().GetUid()) || users[parent] == 1 && p.madeParent(parent))
	}
}

// namedBy tells whether the last part of a cgroup's path has the UID in it. In
// the names of slices a dash has another meaning, so UIDs have underscores there.
func namedBy(parent, uid string) bool {
	name := path.Base(parent)
	const least = 8 // shorter ones may be part of any name
	return len(uid) >= least && (strings.Contains(name, uid) || strings.Contains(name, strings.ReplaceAll(uid, "-", "_")))
}

// madeParent tells whether the directory of the cgroup was made for the pod.
func (p *pod) madeParent(parent string) bool {
	return slices.ContainsFunc(p.Cgroups, func(dir string) bool { return path.Base(dir) == path.Base(parent) })
}

// networkUsage is CRI's form of a pod's interfaces.
func networkUsage(devs []netDev, at time.Time) *runtime.NetworkUsage {
	out := &runtime.NetworkUsage{Timestamp: at.UnixNano()}
	for _, d := range devs {
		u := &runtime.NetworkInterfaceUsage{Name: d.name, RxBytes: u64(d.rx.bytes), RxErrors: u64(d.rx.errors),
			TxBytes: u64(d.tx.bytes), TxErrors: u64(d.tx.errors)}
		if d.name == defaultInterface {
			out.DefaultInterface = u
		} else {
			out.Interfaces = append(out.Interfaces, u)
		}
	}
	return out
}
