package sandbox

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/klog/v2"

	"github.com/berthd/berth/sandbox/cgroup"
	"github.com/berthd/berth/sandbox/nri"
)

// Plugins speak of resources as the OCI does, rows as the CRI does.

// ociResources says the same in the words of the OCI. Nothing is checked.
func ociResources(r *runtime.LinuxContainerResources) *specs.LinuxResources {
	if r == nil {
		return nil
	}
	out := &specs.LinuxResources{CPU: &specs.LinuxCPU{Cpus: r.GetCpusetCpus(), Mems: r.GetCpusetMems()}, Memory: &specs.LinuxMemory{}, Unified: maps.Clone(r.GetUnified())}
	unsigned := func(v int64) *uint64 {
		if v == 0 {
			return nil
		}
		u := uint64(v)
		return &u
	}
	signed := func(v int64) *int64 {
		if v == 0 {
			return nil
		}
		return &v
	}
	out.CPU.Shares, out.CPU.Period, out.CPU.Quota = unsigned(r.GetCpuShares()), unsigned(r.GetCpuPeriod()), signed(r.GetCpuQuota())
	out.Memory.Limit, out.Memory.Swap = signed(r.GetMemoryLimitInBytes()), signed(r.GetMemorySwapLimitInBytes())
	for _, h := range r.GetHugepageLimits() {
		out.HugepageLimits = append(out.HugepageLimits, specs.LinuxHugepageLimit{Pagesize: h.GetPageSize(), Limit: h.GetLimit()})
	}
	return out
}

// criResources says the same in the words of the CRI, as far as it has them.
func criResources(r *specs.LinuxResources) *runtime.LinuxContainerResources {
	out := &runtime.LinuxContainerResources{}
	if r == nil {
		return out
	}
	if c := r.CPU; c != nil {
		out.CpusetCpus, out.CpusetMems = c.Cpus, c.Mems
		out.CpuShares, out.CpuPeriod, out.CpuQuota = int64(or0(c.Shares)), int64(or0(c.Period)), or0(c.Quota)
	}
	if m := r.Memory; m != nil {
		out.MemoryLimitInBytes, out.MemorySwapLimitInBytes = or0(m.Limit), or0(m.Swap)
	}
	for _, h := range r.HugepageLimits {
		out.HugepageLimits = append(out.HugepageLimits, &runtime.HugepageLimit{PageSize: h.Pagesize, Limit: h.Limit})
	}
	out.Unified = maps.Clone(r.Unified)
	return out
}

func or0[T any](p *T) (v T) {
	if p != nil {
		v = *p
	}
	return v
}

// addBeyondCRI adds to resources what the CRI has no words for.
func addBeyondCRI(res, want *specs.LinuxResources) {
	if want == nil {
		return
	}
	if p := want.Pids; p != nil && p.Limit != nil {
		res.Pids = p
	}
	if m := want.Memory; m != nil && (m.Reservation != nil || m.Swappiness != nil) {
		if res.Memory == nil {
			res.Memory = &specs.LinuxMemory{}
		}
		res.Memory.Reservation, res.Memory.Swappiness = m.Reservation, m.Swappiness
	}
	if c := want.CPU; c != nil && (c.RealtimePeriod != nil || c.RealtimeRuntime != nil) {
		if res.CPU == nil {
			res.CPU = &specs.LinuxCPU{}
		}
		res.CPU.RealtimePeriod, res.CPU.RealtimeRuntime = c.RealtimePeriod, c.RealtimeRuntime
	}
}

// changedResources returns what now has and before has not, nil for nothing.
func changedResources(before, now *runtime.LinuxContainerResources) *runtime.LinuxContainerResources {
	d := proto.Clone(now).(*runtime.LinuxContainerResources)
	drop := func(v *int64, was int64) {
		if *v == was {
			*v = 0
		}
	}
	drop(&d.CpuShares, before.CpuShares)
	drop(&d.CpuPeriod, before.CpuPeriod)
	drop(&d.CpuQuota, before.CpuQuota)
	drop(&d.MemoryLimitInBytes, before.MemoryLimitInBytes)
	drop(&d.MemorySwapLimitInBytes, before.MemorySwapLimitInBytes)
	if d.CpusetCpus == before.CpusetCpus {
		d.CpusetCpus = ""
	}
	if d.CpusetMems == before.CpusetMems {
		d.CpusetMems = ""
	}
	maps.DeleteFunc(d.Unified, func(k, v string) bool { was, ok := before.Unified[k]; return ok && was == v })
	limits := map[string]uint64{}
	for _, h := range before.HugepageLimits {
		limits[h.PageSize] = h.Limit
	}
	d.HugepageLimits = nil
	for _, h := range now.HugepageLimits {
		if was, ok := limits[h.PageSize]; !ok || was != h.Limit {
			d.HugepageLimits = append(d.HugepageLimits, h)
		}
	}
	if len(d.Unified) == 0 {
		d.Unified = nil
	}
	if proto.Equal(d, &runtime.LinuxContainerResources{}) {
		return nil
	}
	return d
}

// madeUpdate is what is needed to take an update back.
type madeUpdate struct {
	update nri.Update
	old    *container    // with the resources of before
	limits cgroup.Limits // in force before
	made   []byte        // the resources of its row then
}

// applyUpdate changes the resources of one container as a plugin wants.
func (s *Service) applyUpdate(ctx context.Context, u nri.Update) (madeUpdate, error) {
	c := s.book.view().containers[u.ID]
	if c == nil || !c.listed() {
		return madeUpdate{}, fmt.Errorf("container %.64q: %w", u.ID, ErrNotFound)
	}
	m := madeUpdate{update: u, old: c}
	var err error
	if m.limits, err = s.groupOf(c).Limits(); err != nil && s.exited(c.ID) {
		return m, fmt.Errorf("%w: container %s: %w", ErrState, c.ID, err)
	}
	// Without limits that can be read, as a runtime may keep them elsewhere, only
	// what the book knows can be taken back.
	o := &op{verb: "update container", object: c.ID}
	m.made, err = s.updateResources(ctx, o, c.ID, change{update: criResources(u.Resources), beyond: u.Resources, undo: pluginUndo})
	return m, err
}

// pluginUndo is how long it may take to undo an update that plugins wanted, as all
// of them may have to wait meanwhile.
const pluginUndo = 5 * time.Second

// takeBack undoes an update: what the container was given before is set again, and
// what had no limit gets the one that the kernel had. Of keys of cgroup v2, of
// huge pages and of what only the OCI knows, nothing is taken back that had not
// been set before, and nothing at all of what somebody has changed since.
func (s *Service) takeBack(ctx context.Context, m madeUpdate) error {
	ctx, cancel := cleanup(ctx, pluginUndo)
	defer cancel()
	back := pastResources(criResources(m.update.Resources), m.old.resources, m.limits)
	o := &op{verb: "update container back", object: m.old.ID}
	if _, err := s.updateResources(ctx, o, m.old.ID, change{update: back, undo: pluginUndo, back: &m}); err != nil && !s.exited(m.old.ID) {
		klog.FromContext(ctx).Error(err, "Update not taken back", "containerID", m.old.ID)
		return fmt.Errorf("update of container %s not taken back: %w", m.old.ID, err)
	}
	return nil
}

// takeAllBack undoes updates, the last one first.
func (s *Service) takeAllBack(ctx context.Context, made []madeUpdate) error {
	var errs []error
	for _, m := range slices.Backward(made) {
		errs = append(errs, s.takeBack(ctx, m))
	}
	return errors.Join(errs...)
}

// pastResources is an update that undoes another one.
func pastResources(made, old *runtime.LinuxContainerResources, l cgroup.Limits) *runtime.LinuxContainerResources {
	back := &runtime.LinuxContainerResources{}
	set := func(v *int64, made, old int64, now uint64) {
		switch {
		case made == 0:
		case old != 0:
			*v = old
		case now == cgroup.NoLimit:
			*v = -1
		case now <= math.MaxInt64:
			*v = int64(now)
		}
	}
	shares := l.Shares
	if l.Weight != 0 {
		shares = sharesOf(l.Weight)
	}
	set(&back.CpuShares, made.CpuShares, old.GetCpuShares(), shares)
	set(&back.CpuPeriod, made.CpuPeriod, old.GetCpuPeriod(), l.Period)
	set(&back.CpuQuota, made.CpuQuota, old.GetCpuQuota(), l.Quota)
	set(&back.MemoryLimitInBytes, made.MemoryLimitInBytes, old.GetMemoryLimitInBytes(), l.Memory)
	if made.MemoryLimitInBytes != 0 || made.MemorySwapLimitInBytes != 0 {
		back.MemorySwapLimitInBytes = old.GetMemorySwapLimitInBytes()
		if back.MemorySwapLimitInBytes == 0 {
			back.MemorySwapLimitInBytes = back.MemoryLimitInBytes
		}
	}
	if made.CpusetCpus != "" {
		if back.CpusetCpus = old.GetCpusetCpus(); back.CpusetCpus == "" {
			back.CpusetCpus = l.CPUs
		}
	}
	if made.CpusetMems != "" {
		if back.CpusetMems = old.GetCpusetMems(); back.CpusetMems == "" {
			back.CpusetMems = l.Mems
		}
	}
	for k := range made.Unified {
		if v, ok := old.GetUnified()[k]; ok {
			if back.Unified == nil {
				back.Unified = map[string]string{}
			}
			back.Unified[k] = v
		}
	}
	back.HugepageLimits = old.GetHugepageLimits()
	return back
}

// updateAsked makes an update that was asked for through the CRI, as plugins want
// it.
func (s *Service) updateAsked(ctx context.Context, o *op, id string, update *runtime.LinuxContainerResources) error {
	v := s.book.view()
	c, p := v.containers[id], (*pod)(nil)
	if c != nil {
		p = v.pods[c.PodID]
	}
	ch := change{update: update, undo: undoTimeout}
	if s.deps.Plugins == nil || p == nil || (c.State != StateCreated && c.State != StateRunning) {
		_, err := s.updateResources(ctx, o, id, ch)
		return err
	}
	o.enter("plugins")
	said, err := s.deps.Plugins.Update(ctx, s.pluginPod(p), s.pluginContainer(c), ociResources(update))
	if err != nil {
		return err
	}
	if said.Own != nil {
		ch.update, ch.beyond = criResources(said.Own), said.Own
	}
	if _, err := s.updateResources(ctx, o, id, ch); err != nil {
		if s.exited(id) { // which is no reason to take back what others got
			return fmt.Errorf("%w: container %s has exited: %w", ErrState, id, err)
		}
		return errors.Join(err, said.Undo(ctx))
	}
	s.tellNews(ctx, nri.PostUpdateContainer, id)
	return nil
}
