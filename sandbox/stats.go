package sandbox

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"time"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berthd/berth/sandbox/cgroup"
)

// statsCache keeps what stats need from call to call: the last CPU reading, for
// a rate, and the size of writable layers, which is too dear to walk each time.
type statsCache struct {
	mu sync.Mutex
	m  map[string]*statsEntry
}

type statsEntry struct {
	mu       sync.Mutex // one walk at a time
	cpu      uint64     // ns
	cpuAt    time.Time
	rate     uint64 // nanocores
	layer    *runtime.FilesystemUsage
	layerAt  time.Time
	walking  bool
	walkedIn time.Duration
}

// minRateWindow is the least time between two readings from which a CPU rate is
// made; calls that come faster get the last one.
const minRateWindow = 100 * time.Millisecond

func newStatsCache() *statsCache { return &statsCache{m: map[string]*statsEntry{}} }

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

func (s *statsCache) drop(id string) {
	s.mu.Lock()
	delete(s.m, id)
	s.mu.Unlock()
}

// nanoCores returns the CPU rate since the last reading; false before there are
// two.
func (e *statsEntry) nanoCores(usage uint64, at time.Time) (uint64, bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.cpuAt.IsZero() {
		e.cpu, e.cpuAt = usage, at
		return 0, false
	}
	if d := at.Sub(e.cpuAt); d >= minRateWindow && usage >= e.cpu {
		e.rate = uint64(float64(usage-e.cpu) / d.Seconds())
		e.cpu, e.cpuAt = usage, at
	}
	return e.rate, true
}

// ContainerStats returns the resource usage of a container, read from its cgroup
// now. One that does not run has no CPU and memory figures.
func (s *Service) ContainerStats(ctx context.Context, id string) (*runtime.ContainerStats, error) {
	c, err := s.book.view().container(id)
	if err != nil {
		return nil, err
	}
	return s.statsOf(ctx, c)
}

// ListContainerStats returns the usage of all running containers that match the
// filter; nil matches all.
func (s *Service) ListContainerStats(ctx context.Context, f *runtime.ContainerStatsFilter) ([]*runtime.ContainerStats, error) {
	out := []*runtime.ContainerStats{}
	// One limit for all: first walks of many writable layers do not add up.
	ctx, cancel := context.WithTimeout(ctx, firstWalk)
	defer cancel()
	for _, c := range s.matching(f.GetId(), f.GetPodSandboxId(), f.GetLabelSelector()) {
		if c.State != StateRunning {
			continue
		}
		st, err := s.statsOf(ctx, c)
		if err != nil {
			return nil, err
		}
		out = append(out, st)
	}
	return out, nil
}

func (s *Service) statsOf(ctx context.Context, c *container) (*runtime.ContainerStats, error) {
	out := &runtime.ContainerStats{Attributes: &runtime.ContainerAttributes{Id: c.ID, Metadata: c.config.GetMetadata(),
		Labels: c.config.GetLabels(), Annotations: c.config.GetAnnotations()}}
	e := s.stats.entry(c.ID)
	if c.State == StateRunning || c.State == StateCreated {
		st, err := s.hier.Group(s.cfg.CgroupDriver, c.CgroupPath).Stats()
		if err != nil && !errors.Is(err, cgroup.ErrGone) {
			return nil, fmt.Errorf("container %s: %w", c.ID, err)
		}
		if err == nil {
			fillStats(out, st, e)
		}
	}
	out.WritableLayer = s.layerUsage(ctx, c.ID, e)
	return out, nil
}

func fillStats(out *runtime.ContainerStats, st cgroup.Stats, e *statsEntry) {
	at := st.At.UnixNano()
	out.Cpu = &runtime.CpuUsage{Timestamp: at, UsageCoreNanoSeconds: u64(st.CPUUsage), Psi: psi(st.CPU)}
	if rate, ok := e.nanoCores(st.CPUUsage, st.At); ok {
		out.Cpu.UsageNanoCores = u64(rate)
	}
	out.Memory = &runtime.MemoryUsage{Timestamp: at, WorkingSetBytes: u64(st.WorkingSet), UsageBytes: u64(st.MemoryUsage),
		RssBytes: u64(st.RSS), PageFaults: u64(st.PageFaults), MajorPageFaults: u64(st.MajorFaults), Psi: psi(st.Memory)}
	if st.MemoryLimit != cgroup.NoLimit {
		// proto: available = limit - working set; not set without a limit
		out.Memory.AvailableBytes = u64(st.MemoryLimit - min(st.MemoryLimit, st.WorkingSet))
	}
	out.Swap = &runtime.SwapUsage{Timestamp: at, SwapUsageBytes: u64(st.SwapUsage)}
	if st.SwapLimit != cgroup.NoLimit {
		out.Swap.SwapAvailableBytes = u64(st.SwapLimit - min(st.SwapLimit, st.SwapUsage))
	}
	if st.IO != nil {
		out.Io = &runtime.IoUsage{Timestamp: at, Psi: psi(st.IO)}
	}
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
