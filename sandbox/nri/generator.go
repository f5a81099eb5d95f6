package nri

import (
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/nri/pkg/runtime-tools/generate"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// generator makes the small changes of a specification that the library puts its
// own generator together from. The package that it was made for,
// opencontainers/runtime-tools, would bring along more than it does.
type generator struct{ s *specs.Spec }

var _ generate.UnderlyingGenerator = (*generator)(nil)

func (g *generator) Spec() *specs.Spec { return g.s }

// process, linux and the like return parts of the specification, which are made
// if need be.
func (g *generator) process() *specs.Process { return need(&g.s.Process) }
func (g *generator) linux() *specs.Linux     { return need(&g.s.Linux) }
func (g *generator) hooks() *specs.Hooks     { return need(&g.s.Hooks) }

func (g *generator) resources() *specs.LinuxResources { return need(&g.linux().Resources) }
func (g *generator) cpu() *specs.LinuxCPU             { return need(&g.resources().CPU) }
func (g *generator) memory() *specs.LinuxMemory       { return need(&g.resources().Memory) }

func need[T any](p **T) *T {
	if *p == nil {
		*p = new(T)
	}
	return *p
}

func put[V any](m *map[string]V, key string, v V) {
	if *m == nil {
		*m = map[string]V{}
	}
	(*m)[key] = v
}

func (g *generator) AddAnnotation(key, value string) { put(&g.s.Annotations, key, value) }
func (g *generator) RemoveAnnotation(key string)     { delete(g.s.Annotations, key) }

func (g *generator) AddProcessEnv(name, value string) {
	p := g.process()
	p.Env = slices.DeleteFunc(p.Env, func(e string) bool { return strings.HasPrefix(e, name+"=") })
	p.Env = append(p.Env, name+"="+value)
}

func (g *generator) ClearProcessEnv()             { g.process().Env = nil }
func (g *generator) SetProcessArgs(args []string) { g.process().Args = slices.Clone(args) }
func (g *generator) SetProcessOOMScoreAdj(v int)  { g.process().OOMScoreAdj = &v }

func (g *generator) AddPreStartHook(h specs.Hook) {
	g.hooks().Prestart = append(g.hooks().Prestart, h) //nolint:staticcheck // deprecated, and in NRI
}
func (g *generator) AddPostStartHook(h specs.Hook) {
	g.hooks().Poststart = append(g.hooks().Poststart, h)
}
func (g *generator) AddPostStopHook(h specs.Hook) { g.hooks().Poststop = append(g.hooks().Poststop, h) }

func (g *generator) Mounts() []specs.Mount  { return g.s.Mounts }
func (g *generator) ClearMounts()           { g.s.Mounts = nil }
func (g *generator) AddMount(m specs.Mount) { g.s.Mounts = append(g.s.Mounts, m) }
func (g *generator) RemoveMount(dest string) {
	g.s.Mounts = slices.DeleteFunc(g.s.Mounts, func(m specs.Mount) bool { return m.Destination == dest })
}

func (g *generator) AddDevice(d specs.LinuxDevice) {
	g.RemoveDevice(d.Path)
	g.linux().Devices = append(g.linux().Devices, d)
}

func (g *generator) RemoveDevice(path string) {
	l := g.linux()
	l.Devices = slices.DeleteFunc(l.Devices, func(d specs.LinuxDevice) bool { return d.Path == path })
}

// AddLinuxResourcesDevice adds a rule, or replaces the one for the same device.
func (g *generator) AddLinuxResourcesDevice(allow bool, kind string, major, minor *int64, access string) {
	r := g.resources()
	rule := specs.LinuxDeviceCgroup{Allow: allow, Type: kind, Major: major, Minor: minor, Access: access}
	same := func(a, b *int64) bool { return a == b || a != nil && b != nil && *a == *b }
	for i, d := range r.Devices {
		if d.Type == kind && major != nil && minor != nil && same(d.Major, major) && same(d.Minor, minor) {
			r.Devices[i] = rule
			return
		}
	}
	r.Devices = append(r.Devices, rule)
}

func (g *generator) AddLinuxResourcesHugepageLimit(size string, limit uint64) {
	r := g.resources()
	r.HugepageLimits = slices.DeleteFunc(r.HugepageLimits, func(l specs.LinuxHugepageLimit) bool { return l.Pagesize == size })
	r.HugepageLimits = append(r.HugepageLimits, specs.LinuxHugepageLimit{Pagesize: size, Limit: limit})
}

func (g *generator) AddLinuxResourcesUnified(key, v string) { put(&g.resources().Unified, key, v) }

func (g *generator) SetLinuxResourcesCPUCpus(v string)           { g.cpu().Cpus = v }
func (g *generator) SetLinuxResourcesCPUMems(v string)           { g.cpu().Mems = v }
func (g *generator) SetLinuxResourcesCPUPeriod(v uint64)         { g.cpu().Period = &v }
func (g *generator) SetLinuxResourcesCPUQuota(v int64)           { g.cpu().Quota = &v }
func (g *generator) SetLinuxResourcesCPURealtimePeriod(v uint64) { g.cpu().RealtimePeriod = &v }
func (g *generator) SetLinuxResourcesCPURealtimeRuntime(v int64) { g.cpu().RealtimeRuntime = &v }
func (g *generator) SetLinuxResourcesCPUShares(v uint64)         { g.cpu().Shares = &v }
func (g *generator) SetLinuxResourcesMemoryLimit(v int64)        { g.memory().Limit = &v }
func (g *generator) SetLinuxResourcesMemorySwap(v int64)         { g.memory().Swap = &v }
func (g *generator) SetLinuxCgroupsPath(path string)             { g.linux().CgroupsPath = path }
func (g *generator) AddLinuxSysctl(key, v string)                { put(&g.linux().Sysctl, key, v) }
func (g *generator) RemoveLinuxSysctl(key string)                { delete(g.linux().Sysctl, key) }

// SetLinuxRootPropagation sets how mounts below the root spread.
func (g *generator) SetLinuxRootPropagation(v string) error {
	g.linux().RootfsPropagation = v
	return nil
}

// namespaceKinds are those of the runtime specification, by the names that
// runtime-tools gives them, and by their own.
var namespaceKinds = map[string]specs.LinuxNamespaceType{"network": specs.NetworkNamespace, "pid": specs.PIDNamespace, "mount": specs.MountNamespace,
	"ipc": specs.IPCNamespace, "uts": specs.UTSNamespace, "user": specs.UserNamespace, "cgroup": specs.CgroupNamespace, "time": specs.TimeNamespace}

func (g *generator) AddOrReplaceLinuxNamespace(kind, path string) error {
	if err := g.RemoveLinuxNamespace(kind); err != nil {
		return err
	}
	g.linux().Namespaces = append(g.linux().Namespaces, specs.LinuxNamespace{Type: namespaceKinds[kind], Path: path})
	return nil
}

func (g *generator) RemoveLinuxNamespace(kind string) error {
	t, ok := namespaceKinds[kind]
	if !ok {
		return fmt.Errorf("namespace %q: no such kind", clip(kind))
	}
	l := g.linux()
	l.Namespaces = slices.DeleteFunc(l.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == t })
	return nil
}
