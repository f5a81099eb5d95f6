package spec

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Limits of resource values, as the kernel has them.
const (
	minShares = 2 // v1 cpu.shares; runc maps 2..262144 to cpu.weight on v2
	maxShares = 262144
	minPeriod = 1000    // µs
	maxPeriod = 1000000 // µs
	minQuota  = 1000    // µs; less is refused, negative means no limit
	maxText   = 4096    // bytes of a cpuset list or a unified value
	maxKeys   = 256     // entries of unified
	minOOM    = -1000
	maxOOM    = 1000
)

// ResolveResources translates CRI's resources into those of the OCI
// specification; zero values mean "not specified" and are left out. Device rules
// and the OOM score are not resources in this sense. nil gives an empty result.
//
// Where swap is accounted (h.Swap) a memory limit without a swap limit limits both
// together to the memory limit: a container does not swap unless asked to.
// Huge page limits for a size without a controller are an error unless they
// are 0, which is what they come to without one.
func ResolveResources(r *runtime.LinuxContainerResources, h Host) (*specs.LinuxResources, error) {
	out := &specs.LinuxResources{}
	for _, rule := range []func(*runtime.LinuxContainerResources, Host, *specs.LinuxResources) error{
		cpuResources, memoryResources, hugePageResources, unifiedResources,
	} {
		if err := rule(r, h, out); err != nil {
			return nil, fmt.Errorf("linux.resources: %w", err)
		}
	}
	return out, nil
}

func cpuResources(r *runtime.LinuxContainerResources, _ Host, out *specs.LinuxResources) error {
	cpu := &specs.LinuxCPU{Cpus: r.GetCpusetCpus(), Mems: r.GetCpusetMems()}
	if v := r.GetCpuShares(); v != 0 {
		if v < 0 || v > maxShares {
			return fmt.Errorf("%w: cpu_shares %d: not in %d..%d", ErrInvalid, v, minShares, maxShares)
		}
		cpu.Shares = ptr(uint64(max(v, minShares)))
	}
	if v := r.GetCpuPeriod(); v != 0 {
		if v < minPeriod || v > maxPeriod {
			return fmt.Errorf("%w: cpu_period %d: not in %d..%d µs", ErrInvalid, v, minPeriod, maxPeriod)
		}
		cpu.Period = ptr(uint64(v))
	}
	if v := r.GetCpuQuota(); v != 0 {
		if v > 0 && v < minQuota {
			return fmt.Errorf("%w: cpu_quota %d: less than %d µs", ErrInvalid, v, minQuota)
		}
		cpu.Quota = ptr(max(v, -1))
	}
	if err := checkCPUList("cpuset_cpus", cpu.Cpus); err != nil {
		return err
	}
	if err := checkCPUList("cpuset_mems", cpu.Mems); err != nil {
		return err
	}
	if *cpu != (specs.LinuxCPU{}) {
		out.CPU = cpu
	}
	return nil
}

// checkCPUList checks the form of a list as cpuset(7) has it: "0-3,7".
func checkCPUList(field, s string) error {
	if s == "" {
		return nil
	}
	if len(s) > maxText {
		return fmt.Errorf("%w: %s: %d bytes, the limit is %d", ErrInvalid, field, len(s), maxText)
	}
	for part := range strings.SplitSeq(s, ",") {
		first, last, isRange := strings.Cut(part, "-")
		a, err := strconv.ParseUint(first, 10, 16)
		b := a
		if err == nil && isRange {
			b, err = strconv.ParseUint(last, 10, 16)
		}
		if err != nil || b < a {
			return fmt.Errorf("%w: %s %q: %q is neither a number nor a range", ErrInvalid, field, clip(s), clip(part))
		}
	}
	return nil
}

func memoryResources(r *runtime.LinuxContainerResources, h Host, out *specs.LinuxResources) error {
	limit, swap := r.GetMemoryLimitInBytes(), r.GetMemorySwapLimitInBytes()
	if limit < -1 {
		return fmt.Errorf("%w: memory_limit_in_bytes %d: want bytes, or -1 for no limit", ErrInvalid, limit)
	}
	if swap < -1 {
		return fmt.Errorf("%w: memory_swap_limit_in_bytes %d: want bytes, or -1 for no limit", ErrInvalid, swap)
	}
	if swap > 0 && limit <= 0 {
		return fmt.Errorf("%w: memory_swap_limit_in_bytes %d: needs a memory_limit_in_bytes", ErrInvalid, swap)
	}
	if swap > 0 && swap < limit {
		// The value counts memory and swap together, in CRI as in OCI.
		return fmt.Errorf("%w: memory_swap_limit_in_bytes %d: less than memory_limit_in_bytes %d", ErrInvalid, swap, limit)
	}
	if limit != 0 {
		out.Memory = &specs.LinuxMemory{Limit: ptr(limit)}
	}
	if swap == 0 {
		swap = limit
	}
	if swap != 0 && h.Swap {
		if out.Memory == nil {
			out.Memory = &specs.LinuxMemory{}
		}
		out.Memory.Swap = ptr(swap)
	}
	return nil
}

func hugePageResources(r *runtime.LinuxContainerResources, h Host, out *specs.LinuxResources) error {
	for i, l := range r.GetHugepageLimits() {
		switch {
		case slices.Contains(h.HugePages, l.GetPageSize()):
			out.HugepageLimits = append(out.HugepageLimits, specs.LinuxHugepageLimit{Pagesize: l.PageSize, Limit: l.Limit})
		case l.GetLimit() != 0:
			return fmt.Errorf("%w: hugepage_limits[%d].page_size %q: this host has a controller for %q only", ErrInvalid, i, clip(l.PageSize), h.HugePages)
		}
	}
	return nil
}

func unifiedResources(r *runtime.LinuxContainerResources, h Host, out *specs.LinuxResources) error {
	u := r.GetUnified()
	if len(u) == 0 {
		return nil
	}
	if !h.CgroupV2 {
		return fmt.Errorf("%w: unified: needs cgroup v2, this host has v1", ErrInvalid)
	}
	if len(u) > maxKeys {
		return fmt.Errorf("%w: unified: %d entries, the limit is %d", ErrInvalid, len(u), maxKeys)
	}
	for _, key := range slices.Sorted(maps.Keys(u)) {
		if err := checkUnified(key, u[key]); err != nil {
			return err
		}
	}
	out.Unified = maps.Clone(u)
	return nil
}

// checkUnified refuses what is not a plain "controller.name" file, since the
// runtime opens the key below the container's group. The cgroup.* files are
// not limits: cgroup.procs would move processes, cgroup.kill would kill them.
func checkUnified(key, value string) error {
	bad := strings.IndexFunc(key, func(c rune) bool {
		return (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && c != '.' && c != '_' && c != '-'
	}) >= 0
	controller, _, ok := strings.Cut(key, ".")
	if bad || !ok || controller == "" || controller == "cgroup" || strings.Contains(key, "..") || len(key) > 255 {
		return fmt.Errorf("%w: unified key %q: want a file of a controller, as memory.high", ErrInvalid, clip(key))
	}
	if len(value) > maxText || strings.IndexByte(value, 0) >= 0 {
		return fmt.Errorf("%w: unified[%q]: %d bytes, the limit is %d without a zero byte", ErrInvalid, key, len(value), maxText)
	}
	return nil
}

// MergeResources returns a copy of old in which everything that update
// specifies (is not zero) has update's value; huge page limits are merged by
// page size, unified by key. The OOM score stays: it belongs to processes and
// is set once.
func MergeResources(old, update *runtime.LinuxContainerResources) *runtime.LinuxContainerResources {
	pick := func(a, b int64) int64 {
		if b != 0 {
			return b
		}
		return a
	}
	pickText := func(a, b string) string {
		if b != "" {
			return b
		}
		return a
	}
	m := &runtime.LinuxContainerResources{
		CpuPeriod:              pick(old.GetCpuPeriod(), update.GetCpuPeriod()),
		CpuQuota:               pick(old.GetCpuQuota(), update.GetCpuQuota()),
		CpuShares:              pick(old.GetCpuShares(), update.GetCpuShares()),
		MemoryLimitInBytes:     pick(old.GetMemoryLimitInBytes(), update.GetMemoryLimitInBytes()),
		MemorySwapLimitInBytes: pick(old.GetMemorySwapLimitInBytes(), update.GetMemorySwapLimitInBytes()),
		OomScoreAdj:            old.GetOomScoreAdj(),
		CpusetCpus:             pickText(old.GetCpusetCpus(), update.GetCpusetCpus()),
		CpusetMems:             pickText(old.GetCpusetMems(), update.GetCpusetMems()),
	}
	if n := len(old.GetUnified()) + len(update.GetUnified()); n > 0 {
		m.Unified = make(map[string]string, n)
		maps.Copy(m.Unified, old.GetUnified())
		maps.Copy(m.Unified, update.GetUnified())
	}
	for _, l := range slices.Concat(old.GetHugepageLimits(), update.GetHugepageLimits()) {
		at := slices.IndexFunc(m.HugepageLimits, func(h *runtime.HugepageLimit) bool { return h.PageSize == l.GetPageSize() })
		c := &runtime.HugepageLimit{PageSize: l.GetPageSize(), Limit: l.GetLimit()}
		if at >= 0 {
			m.HugepageLimits[at] = c
		} else {
			m.HugepageLimits = append(m.HugepageLimits, c)
		}
	}
	return m
}

// oomScore returns the oom_score_adj to set. It is never left out: a process
// without one would inherit the shim's, which protects it.
func oomScore(adj int64, lowest *int) (*int, error) {
	if adj < minOOM || adj > maxOOM {
		return nil, fmt.Errorf("%w: linux.resources.oom_score_adj %d: not in %d..%d", ErrInvalid, adj, minOOM, maxOOM)
	}
	v := int(adj)
	if lowest != nil {
		v = max(v, *lowest)
	}
	return &v, nil
}

func ptr[T any](v T) *T { return &v }
