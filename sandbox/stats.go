package sandbox

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	goruntime "runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/klog/v2"

	"github.com/berthd/berth/sandbox/cgroup"
)

// statsCache keeps what stats need from call to call: the open files of cgroups,
// the last CPU readings, for a rate, and the size of writable layers, which is
// too dear to walk each time.
type statsCache struct {
	mu    sync.Mutex
	m     map[string]*statsEntry
	walks chan struct{} // slots for walks of writable layers
}

// statsEntry is for a container, or for the cgroup of a pod.
type statsEntry struct {
	reading sync.Mutex // guards what follows; held while the kernel's files are read
	reader  *cgroup.Reader
	last    cgroup.Stats // what was read last, with the time of it; zero if that failed

	mu       sync.Mutex // guards the rest
	rate     cpuRate
	layer    *runtime.FilesystemUsage
	layerAt  time.Time
	walking  bool
	walkedIn time.Duration
}

// maxWalks is how many writable layers are walked at once.
const maxWalks = 2

func newStatsCache() *statsCache {
	return &statsCache{m: map[string]*statsEntry{}, walks: make(chan struct{}, maxWalks)}
}

func (s *statsCache) entry(id string) *statsEntry {
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.m[id]
	if e == nil {
		e = &statsEntry{}
		s.m[id] = e
	}
	return e
}

// drop forgets an object that is gone. A call that has seen it just before may
// make a new entry; see forgetGone.
func (s *statsCache) drop(id string) {
	s.rest(id)
	s.mu.Lock()
	delete(s.m, id)
	s.mu.Unlock()
}

// rest closes the files of an object that has no processes any more.
func (s *statsCache) rest(id string) {
	s.mu.Lock()
	e := s.m[id]
	s.mu.Unlock()
	if e != nil {
		e.reading.Lock()
		defer e.reading.Unlock()
		if e.reader != nil {
			e.reader.Close()
		}
	}
}

// with runs fn with the reader of a group.
func (e *statsEntry) with(g cgroup.Group, fn func(*cgroup.Reader) error) error {
	e.reading.Lock()
	defer e.reading.Unlock()
	if e.reader == nil {
		e.reader = g.Reader()
	}
	return fn(e.reader)
}

// shared is how old figures may be that the calls for many containers or pods take
// over from another such call: the kubelet makes several of them at a time, and
// each is most of the work of the others. Calls for one read what is now.
const shared = 100 * time.Millisecond

// stats reads the usage of a group, unless it was read within the last time of
// that length.
func (e *statsEntry) stats(g cgroup.Group, old time.Duration) (st cgroup.Stats, err error) {
	err = e.with(g, func(r *cgroup.Reader) error {
		if time.Since(e.last.At) >= old {
			if e.last, err = r.Stats(); err != nil {
				return err
			}
		}
		st = e.last
		return nil
	})
	return st, err
}

// cpuRate makes a rate of readings of a counter. It goes back to a reading that
// is at least minRateWindow old if there is one, so that it does not matter how
// often and by how many callers it is asked for.
type cpuRate struct{ older, newer cpuReading }

type cpuReading struct {
	usage uint64 // ns
	at    time.Time
}

// minRateWindow is the time that has to pass before a reading takes the place of
// an older one.
const minRateWindow = 100 * time.Millisecond

// add takes in a reading and returns the rate in nanocores; false before there
// are two that differ in time.
func (r *cpuRate) add(usage uint64, at time.Time) (uint64, bool) {
	switch {
	case r.newer.at.IsZero() || usage < r.newer.usage: // the first, or of another cgroup
		r.older, r.newer = cpuReading{usage, at}, cpuReading{usage, at}
	case at.Sub(r.newer.at) >= minRateWindow:
		r.older, r.newer = r.newer, cpuReading{usage, at}
	}
	d := at.Sub(r.older.at)
	if d <= 0 {
		return 0, false
	}
	return uint64(float64(usage-r.older.usage) / d.Seconds()), true
}

func (e *statsEntry) nanoCores(usage uint64, at time.Time) (uint64, bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.rate.add(usage, at)
}

// ContainerStats returns the resource usage of a container, read from its cgroup
// now. One that does not run has no CPU and memory figures.
func (s *Service) ContainerStats(ctx context.Context, id string) (*runtime.ContainerStats, error) {
	c, err := s.book.view().container(id)
	if err != nil {
		return nil, err
	}
	out, _, err := s.containerStats(ctx, c, 0)
	return out, err
}

// ListContainerStats returns the usage of all running containers that match the
// filter, the newest first, as of the last 100 ms; nil matches all. A container that cannot be read has
// no figures.
func (s *Service) ListContainerStats(ctx context.Context, f *runtime.ContainerStatsFilter) ([]*runtime.ContainerStats, error) {
	list := s.matching(f.GetId(), f.GetPodSandboxId(), f.GetLabelSelector())
	list = slices.DeleteFunc(list, func(c *container) bool { return c.State != StateRunning })
	slices.SortFunc(list, func(a, b *container) int { return newer(a.Created, b.Created, a.ID, b.ID) })
	// One limit for all: first walks of many writable layers do not add up.
	ctx, cancel := context.WithTimeout(ctx, firstWalk)
	defer cancel()
	return eachCPU(list, func(c *container) *runtime.ContainerStats {
		out, _, err := s.containerStats(ctx, c, shared)
		if err != nil {
			klog.FromContext(ctx).V(2).Info("Stats not read", "containerID", c.ID, "err", err)
		}
		return out
	}), nil
}

// eachCPU maps a list in parallel, in its order.
func eachCPU[A, B any](list []A, fn func(A) B) []B {
	out := make([]B, len(list))
	var next atomic.Int64
	var wg sync.WaitGroup
	for range min(len(list), goruntime.GOMAXPROCS(0)) {
		wg.Go(func() {
			for {
				i := int(next.Add(1)) - 1
				if i >= len(list) {
					return
				}
				out[i] = fn(list[i])
			}
		})
	}
	wg.Wait()
	return out
}

// containerStats reads the usage of a container, or takes over what is not older
// than old, and returns it also as it was read. What it can tell it does, also with
// an error.
func (s *Service) containerStats(ctx context.Context, c *container, old time.Duration) (*runtime.ContainerStats, cgroup.Stats, error) {
	out := &runtime.ContainerStats{Attributes: &runtime.ContainerAttributes{Id: c.ID, Metadata: c.config.GetMetadata(),
		Labels: c.config.GetLabels(), Annotations: c.config.GetAnnotations()}}
	defer s.forgetGone(c.ID)
	e := s.stats.entry(c.ID)
	var st cgroup.Stats
	var err error
	if c.State == StateRunning || c.State == StateCreated {
		st, err = e.stats(s.groupOf(c), old)
		if errors.Is(err, cgroup.ErrGone) {
			err = nil // it ends just now
		} else if err == nil {
			fillStats(out, st, e)
		}
	}
	out.WritableLayer = s.layerUsage(ctx, c.ID, e)
	if err != nil {
		err = fmt.Errorf("container %s: %w", c.ID, err)
	}
	return out, st, err
}

// forgetGone drops what was kept of an object that was removed during the call.
func (s *Service) forgetGone(id string) {
	v := s.book.view()
	if v.containers[id] == nil && v.pods[id] == nil {
		s.stats.drop(id)
	}
}

func fillStats(out *runtime.ContainerStats, st cgroup.Stats, e *statsEntry) {
	at := st.At.UnixNano()
	out.Cpu = cpuUsage(st)
	if rate, ok := e.nanoCores(st.CPUUsage, st.At); ok {
		out.Cpu.UsageNanoCores = u64(rate)
	}
	out.Memory = memoryUsage(st)
	out.Swap = &runtime.SwapUsage{Timestamp: at, SwapUsageBytes: u64(st.SwapUsage)}
	if left, ok := st.SwapAvailable(); ok {
		out.Swap.SwapAvailableBytes = u64(left)
	}
	out.Io = ioUsage(st)
}

// cpuUsage is all but the rate.
func cpuUsage(st cgroup.Stats) *runtime.CpuUsage {
	return &runtime.CpuUsage{Timestamp: st.At.UnixNano(), UsageCoreNanoSeconds: u64(st.CPUUsage), Psi: psi(st.CPU)}
}

func memoryUsage(st cgroup.Stats) *runtime.MemoryUsage {
	m := &runtime.MemoryUsage{Timestamp: st.At.UnixNano(), WorkingSetBytes: u64(st.WorkingSet), UsageBytes: u64(st.MemoryUsage),
		RssBytes: u64(st.RSS), PageFaults: u64(st.PageFaults), MajorPageFaults: u64(st.MajorFaults), Psi: psi(st.Memory)}
	// proto: available = limit - working set; not set without a limit
	if left, ok := st.MemoryAvailable(); ok {
		m.AvailableBytes = u64(left)
	}
	return m
}

func ioUsage(st cgroup.Stats) *runtime.IoUsage {
	if st.IO == nil {
		return nil
	}
	return &runtime.IoUsage{Timestamp: st.At.UnixNano(), Psi: psi(st.IO)}
}

func u64(v uint64) *runtime.UInt64Value { return &runtime.UInt64Value{Value: v} }

func psi(p *cgroup.Pressure) *runtime.PsiStats {
	if p == nil {
		return nil
	}
	line := func(l cgroup.PressureLine) *runtime.PsiData {
		return &runtime.PsiData{Total: l.Total, Avg10: l.Avg10, Avg60: l.Avg60, Avg300: l.Avg300}
	}
	return &runtime.PsiStats{Some: line(p.Some), Full: line(p.Full)}
}

// firstWalk bounds how long the first caller waits for the size of a writable
// layer. Later callers get the last size and at most start a new walk.
const firstWalk = 500 * time.Millisecond

// layerUsage returns the size of a container's writable layer, not older than
// StatsTTL plus the time that a walk takes.
func (s *Service) layerUsage(ctx context.Context, id string, e *statsEntry) *runtime.FilesystemUsage {
	e.mu.Lock()
	known := e.layer
	fresh := known != nil && time.Since(e.layerAt) < s.cfg.StatsTTL+10*e.walkedIn
	if fresh || e.walking {
		e.mu.Unlock()
		return known
	}
	e.walking = true
	e.mu.Unlock()
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.walkLayer(id, e)
	}()
	if known != nil {
		return known
	}
	select {
	case <-done:
	case <-time.After(firstWalk):
	case <-ctx.Done():
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.layer
}

func (s *Service) walkLayer(id string, e *statsEntry) {
	s.stats.walks <- struct{}{}
	defer func() { <-s.stats.walks }()
	begun := time.Now()
	u, err := s.deps.Snapshots.Usage(s.ctx, id)
	e.mu.Lock()
	defer e.mu.Unlock()
	e.walking = false
	e.layerAt, e.walkedIn = time.Now(), time.Since(begun)
	if err == nil {
		e.layer = &runtime.FilesystemUsage{Timestamp: e.layerAt.UnixNano(),
			FsId:      &runtime.FilesystemIdentifier{Mountpoint: filepath.Join(s.cfg.StateDir, "snapshots")},
			UsedBytes: u64(uint64(u.Size)), InodesUsed: u64(uint64(u.Inodes))}
	}
}
