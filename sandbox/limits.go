package sandbox

import (
	"context"
	"fmt"
	"math"

	"google.golang.org/protobuf/proto"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berthd/berth/sandbox/cgroup"
	"github.com/berthd/berth/sandbox/nri"
)

// resourcesOf returns the limits of a container: what it was created with and
// updated to, and while it lives with the values that the kernel really has. nil
// if none were given.
func (s *Service) resourcesOf(c *container) *runtime.LinuxContainerResources {
	if c.resources == nil || (c.State != StateCreated && c.State != StateRunning) {
		return c.resources
	}
	l, err := s.groupOf(c).Limits()
	if err != nil {
		return c.resources // it ends just now
	}
	return inForce(c.resources, l)
}

// inForce returns want with the values of l. What was not specified stays so: the
// kernel's defaults are no limits that anybody set.
func inForce(want *runtime.LinuxContainerResources, l cgroup.Limits) *runtime.LinuxContainerResources {
	out := proto.Clone(want).(*runtime.LinuxContainerResources)
	set := func(v *int64, now uint64, none int64) {
		switch {
		case *v == 0:
		case now == cgroup.NoLimit:
			*v = none
		case now != 0 && now <= math.MaxInt64:
			*v = int64(now)
		}
	}
	set(&out.MemoryLimitInBytes, l.Memory, -1)
	if want.GetMemorySwapLimitInBytes() > 0 && l.MemorySwap != cgroup.NoLimit {
		set(&out.MemorySwapLimitInBytes, l.MemorySwap, -1)
	}
	set(&out.CpuQuota, l.Quota, -1)
	set(&out.CpuPeriod, l.Period, want.GetCpuPeriod())
	set(&out.CpuShares, l.Shares, want.GetCpuShares())
	if l.Weight != 0 && out.CpuShares != 0 && !hasWeight(out.CpuShares, l.Weight) {
		out.CpuShares = int64(sharesOf(l.Weight))
	}
	if want.GetCpusetCpus() != "" && l.CPUs != "" {
		out.CpusetCpus = l.CPUs
	}
	if want.GetCpusetMems() != "" && l.Mems != "" {
		out.CpusetMems = l.Mems
	}
	return out
}

// hasWeight tells whether a runtime turns these CPU shares of v1 into this weight
// of v2. There are two formulas in use: the straight one, and the one of runc 1.4
// and crun 1.23, which turns 1024 into 100. Many shares come to one weight, so
// the way back is only taken when somebody else has changed it.
func hasWeight(shares int64, weight uint64) bool {
	if shares < 2 {
		shares = 2
	}
	straight := 1 + ((uint64(shares)-2)*9999)/262142
	l := math.Log2(float64(shares))
	curved := uint64(math.Ceil(math.Pow(10, (l*l+125*l)/612-7.0/34)))
	return weight == straight || weight == curved
}

// sharesOf is the straight way back from a weight.
func sharesOf(weight uint64) uint64 { return 2 + ((min(max(weight, 1), 10000)-1)*262142)/9999 }

// UpdatePodResources records the resources of a pod as a whole, and its overhead;
// what is nil stays as it was. The kubelet sets the pod's cgroup itself, before
// it calls (UpdatePodSandboxResources in the CRI), so nothing else is done.
func (s *Service) UpdatePodResources(ctx context.Context, req *runtime.UpdatePodSandboxResourcesRequest) error {
	p, err := s.book.view().pod(req.GetPodSandboxId())
	if err != nil {
		return err
	}
	next := s.pluginPod(p)
	if o := req.GetOverhead(); o != nil {
		next.Overhead = ociResources(o)
	}
	if res := req.GetResources(); res != nil {
		next.Resources = ociResources(res)
	}
	if s.deps.Plugins != nil && p.State == StateReady {
		if err := s.deps.Plugins.Tell(ctx, nri.UpdatePodSandbox, next, nri.Container{}); err != nil {
			return err
		}
	}
	p, err = s.book.updatePod(p.ID, func(r *podRow) error {
		if r.State != StateReady || r.Removing {
			return fmt.Errorf("%w: pod %s is not ready", ErrState, r.ID)
		}
		var cfg runtime.PodSandboxConfig
		if err := proto.Unmarshal(r.Config, &cfg); err != nil {
			return fmt.Errorf("config: %w", err)
		}
		if cfg.Linux == nil {
			cfg.Linux = &runtime.LinuxPodSandboxConfig{}
		}
		if o := req.GetOverhead(); o != nil {
			cfg.Linux.Overhead = o
		}
		if res := req.GetResources(); res != nil {
			cfg.Linux.Resources = res
		}
		raw, err := proto.Marshal(&cfg)
		if err == nil && len(raw) > maxConfig {
			err = fmt.Errorf("%w: config: %d bytes, limit %d", ErrInvalid, len(raw), maxConfig)
		}
		r.Config = raw
		return err
	})
	if err == nil {
		s.tellPodNews(ctx, nri.PostUpdatePodSandbox, p)
	}
	return err
}
