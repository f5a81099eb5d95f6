package sandbox

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"slices"
	"strings"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/klog/v2"

	"github.com/berthd/berth/cni/netns"
	"github.com/berthd/berth/sandbox/cgroup"
	"github.com/berthd/berth/sandbox/nri"
	"github.com/berthd/berth/sandbox/spec"
	"github.com/berthd/berth/store"
)

// Plugins see pods and containers come and go, and adjust them (nri.Host). Calls
// wait for one another, and end with their contexts.
type Plugins interface {
	Serve(ctx context.Context, node nri.Node)
	Run(ctx context.Context, p nri.Pod) (done func(), err error)
	Create(ctx context.Context, p nri.Pod, c nri.Container, d nri.Draft) (done func(), err error)
	Update(ctx context.Context, p nri.Pod, c nri.Container, res *specs.LinuxResources) (nri.Said, error)
	Tell(ctx context.Context, e nri.Event, p nri.Pod, c nri.Container) error
}

// pluginPod is a pod for plugins.
func (s *Service) pluginPod(p *pod) nri.Pod {
	m, l := p.config.GetMetadata(), p.config.GetLinux()
	return nri.Pod{ID: p.ID, Name: m.GetName(), UID: m.GetUid(), Namespace: m.GetNamespace(), Handler: p.Handler,
		Labels: p.config.GetLabels(), Annotations: p.config.GetAnnotations(), CgroupParent: l.GetCgroupParent(),
		Overhead: ociResources(l.GetOverhead()), Resources: ociResources(l.GetResources()),
		Namespaces: s.pluginNamespaces(p), IPs: p.IPs, Pid: p.InitPid}
}

// pluginNamespaces are the pod's pins; none when they have been released.
func (s *Service) pluginNamespaces(p *pod) []specs.LinuxNamespace {
	if p.Torn {
		return nil
	}
	var out []specs.LinuxNamespace
	add := func(there bool, t specs.LinuxNamespaceType, k netns.Kind) {
		if there {
			out = append(out, specs.LinuxNamespace{Type: t, Path: s.deps.Pins.Path(p.ID, k)})
		}
	}
	add(!p.HostNetwork, specs.NetworkNamespace, netns.Net)
	add(!p.HostNetwork, specs.UTSNamespace, netns.UTS)
	add(!p.hostIPC(), specs.IPCNamespace, netns.IPC)
	add(p.InitPid != 0, specs.PIDNamespace, pidKind)
	add(p.userNS != nil, specs.UserNamespace, netns.User)
	return out
}

// pluginContainer is a container for plugins.
func (s *Service) pluginContainer(c *container) nri.Container {
	out := nri.Container{ID: c.ID, PodID: c.PodID, Name: c.config.GetMetadata().GetName(),
		Labels: c.config.GetLabels(), Annotations: c.config.GetAnnotations(),
		Pid: c.Pid, Created: c.Created, Started: c.Started, Ended: c.Finished,
		ExitCode: c.ExitCode, Reason: c.Reason, Message: c.Message,
		ImageName: c.ImageName, ImageDigest: c.ImageDigest, ImageID: c.ImageID,
		Spec: func() (*specs.Spec, error) { return s.bundleSpec(c) }}
	switch c.State {
	case StateCreated:
		out.State = nri.Created
	case StateRunning:
		out.State = nri.Running
	case StateExited:
		out.State = nri.Stopped
	}
	for _, d := range c.config.GetCDIDevices() {
		out.CDI = append(out.CDI, d.GetName())
	}
	if p := c.config.GetLinux().GetSecurityContext().GetSeccomp(); p != nil {
		out.SeccompKind, out.SeccompFile = p.GetProfileType().String(), p.GetLocalhostRef()
	}
	return out
}

// bundleSpec reads the specification that a container was made with, and puts its
// resources in force into it. nil if it is gone.
func (s *Service) bundleSpec(c *container) (*specs.Spec, error) {
	sp, err := s.readSpec(c.ID)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if res, err := spec.ResolveResources(c.resources, s.host); err == nil && c.resources != nil && sp.Linux != nil && sp.Linux.Resources != nil {
		now := sp.Linux.Resources
		now.CPU, now.Memory, now.HugepageLimits, now.Unified = res.CPU, res.Memory, res.HugepageLimits, res.Unified
	}
	return sp, nil
}

// announcePod tells plugins of a pod that is about to be ready.
func (s *Service) announcePod(ctx context.Context, p *pod) (done func(), err error) {
	if s.deps.Plugins == nil {
		return func() {}, nil
	}
	return s.deps.Plugins.Run(ctx, s.pluginPod(p))
}

// announceContainer tells plugins of a container that is to be made, and changes
// its specification as they want.
func (s *Service) announceContainer(ctx context.Context, plan *containerPlan) (err error) {
	c := s.book.view().containers[plan.row.ID]
	if s.deps.Plugins == nil || c == nil {
		return nil
	}
	before := s.askedResources(plan)
	before.OomScoreAdj = int64(or0(plan.spec.Process.OOMScoreAdj))
	plan.announced, err = s.deps.Plugins.Create(ctx, s.pluginPod(plan.pod), s.pluginContainer(c), nri.Draft{
		Spec: plan.spec,
		Inject: func(sp *specs.Spec, names []string) error {
			if err := s.checkCDI(names); err != nil {
				return err
			}
			return s.injectCDI(sp, names)
		},
		Accept: func() error { return s.acceptAdjusted(plan, before) },
	})
	return err
}

// askedResources are those of a specification as the CRI would ask for them: a
// limit of memory and swap that is no other than that of memory goes without
// saying, unless it was said.
func (s *Service) askedResources(plan *containerPlan) *runtime.LinuxContainerResources {
	r := criResources(plan.spec.Linux.Resources)
	if plan.config.GetLinux().GetResources().GetMemorySwapLimitInBytes() == 0 && r.MemorySwapLimitInBytes == r.MemoryLimitInBytes {
		r.MemorySwapLimitInBytes = 0
	}
	return r
}

// acceptAdjusted checks what plugins have made of a container's specification, as
// far as this package has a say in it, and takes it over into the row.
func (s *Service) acceptAdjusted(plan *containerPlan, before *runtime.LinuxContainerResources) error {
	l := plan.spec.Linux
	if r := l.Resources; r != nil && r.Memory != nil && !s.host.Swap {
		r.Memory.Swap = nil // which the kernel does not count
	}
	now := s.askedResources(plan)
	if _, err := spec.ResolveResources(now, s.host); err != nil {
		return err
	}
	score := int64(or0(plan.spec.Process.OOMScoreAdj))
	if d := changedResources(before, now); d != nil || score != before.OomScoreAdj {
		all := spec.MergeResources(plan.config.GetLinux().GetResources(), d)
		if score != before.OomScoreAdj {
			all.OomScoreAdj = score
		}
		raw, err := proto.Marshal(all)
		if err != nil {
			return err
		}
		plan.row.Resources = raw
	}
	plan.row.PrivatePID = slices.ContainsFunc(l.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == specs.PIDNamespace && n.Path == "" })
	if l.CgroupsPath != plan.row.CgroupPath {
		return s.moveCgroup(plan)
	}
	return nil
}

// moveCgroup has a container that is being made live in another control group,
// which is in the book before it exists. The group above it has to exist: nobody
// would remove it.
func (s *Service) moveCgroup(plan *containerPlan) error {
	to := plan.spec.Linux.CgroupsPath
	switch plan.rt.driver {
	case cgroup.Systemd:
		if parts := slices.DeleteFunc(strings.Split(to, ":"), func(p string) bool { return p == "" }); len(parts) != 3 {
			return fmt.Errorf("cgroups_path %.200q: want slice:prefix:name (cgroup driver systemd)", to)
		}
	default:
		if !path.IsAbs(to) || path.Clean(to) != to || to == "/" {
			return fmt.Errorf("cgroups_path %.200q: want a clean absolute path (cgroup driver cgroupfs)", to)
		}
		above := path.Dir(to)
		if above != path.Dir(plan.row.CgroupPath) && !s.hier.Group(plan.rt.driver, above).Exists() {
			return fmt.Errorf("cgroups_path %.200q: %s does not exist", to, above)
		}
	}
	g := s.hier.Group(plan.rt.driver, to)
	if err := s.freeGroup(plan.row.ID, g); err != nil {
		return fmt.Errorf("cgroups_path %.200q: %w", to, err)
	}
	plan.row.CgroupPath, plan.group = to, g
	_, err := s.book.updateContainer(plan.row.ID, func(_ *store.Tx, r *containerRow) error { r.CgroupPath = to; return nil })
	return err
}

// freeGroup refuses a control group that is somebody else's: what is in the group of
// a container is killed with it.
func (s *Service) freeGroup(id string, g cgroup.Group) error {
	if g.IsZero() || g.Exists() {
		return errors.New("exists already, or names no control group")
	}
	for _, o := range s.book.view().containers {
		other := s.groupOf(o)
		if o.ID != id && !other.IsZero() && (within(other.Path(), g.Path()) || within(g.Path(), other.Path())) {
			return fmt.Errorf("is, or is above or below, that of container %s", o.ID)
		}
	}
	return nil
}

// tell tells plugins of an event of a container and returns what they say.
func (s *Service) tell(ctx context.Context, e nri.Event, id string) error {
	c := s.book.view().containers[id]
	if s.deps.Plugins == nil || c == nil {
		return nil
	}
	return s.deps.Plugins.Tell(ctx, e, s.pluginPodOf(c), s.pluginContainer(c))
}

// newsLimit is how long an operation waits for plugins to hear of what it did.
const newsLimit = 10 * time.Second

// tellNews tells plugins what they cannot change any more. Their errors are no
// reason to stop, nor is it that they are busy: then they are told later.
func (s *Service) tellNews(ctx context.Context, e nri.Event, id string) {
	if c := s.book.view().containers[id]; s.deps.Plugins != nil && c != nil {
		s.news(ctx, e, s.pluginPodOf(c), s.pluginContainer(c))
	}
}

func (s *Service) news(ctx context.Context, e nri.Event, p nri.Pod, c nri.Container) {
	soon, cancel := context.WithTimeout(ctx, newsLimit)
	defer cancel()
	err := s.deps.Plugins.Tell(soon, e, p, c)
	if errors.Is(err, nri.ErrWait) {
		s.bg.Go(func() { s.newsLater(e, p, c) })
		return
	}
	s.newsTold(e, p, c, err)
}

// newsLater is news for background work, which has time.
func (s *Service) newsLater(e nri.Event, p nri.Pod, c nri.Container) {
	s.newsTold(e, p, c, s.deps.Plugins.Tell(s.ctx, e, p, c))
}

func (s *Service) newsTold(e nri.Event, p nri.Pod, c nri.Container, err error) {
	if err != nil && s.ctx.Err() == nil {
		klog.FromContext(s.ctx).Error(err, "Plugins did not take an event", "event", e.String(), "podID", p.ID, "containerID", c.ID)
	}
}

// tellExit tells plugins of a container that has ended, and keeps nobody waiting.
// One that ended at once may still be in its start, of which they hear first.
func (s *Service) tellExit(c *container) {
	if s.deps.Plugins == nil {
		return
	}
	p, about := s.pluginPodOf(c), s.pluginContainer(c)
	s.bg.Go(func() {
		started, cancel := context.WithTimeout(s.ctx, newsLimit)
		_ = s.ops.wait(started, "start container", c.ID)
		cancel()
		s.newsLater(nri.StopContainer, p, about)
	})
}

// pluginPodOf is a container's pod for plugins.
func (s *Service) pluginPodOf(c *container) nri.Pod {
	if p := s.book.view().pods[c.PodID]; p != nil {
		return s.pluginPod(p)
	}
	return nri.Pod{ID: c.PodID}
}

// tellPodNews is for pods what tellNews is for containers.
func (s *Service) tellPodNews(ctx context.Context, e nri.Event, p *pod) {
	if s.deps.Plugins != nil {
		s.news(ctx, e, s.pluginPod(p), nri.Container{})
	}
}

// tellPodStop tells plugins of the end of a pod's containers and of the pod.
func (s *Service) tellPodStop(ctx context.Context, p *pod) {
	if s.deps.Plugins == nil {
		return
	}
	// One limit for all of them: with busy plugins the rest is told later.
	soon, cancel := context.WithTimeout(ctx, newsLimit)
	defer cancel()
	for _, c := range s.book.view().byPod[p.ID] {
		if c.State == StateExited {
			s.tellNews(soon, nri.StopContainer, c.ID)
		}
	}
	s.tellPodNews(soon, nri.StopPodSandbox, p)
}

// tellPodRemoval tells plugins that a pod is gone.
func (s *Service) tellPodRemoval(ctx context.Context, p *pod) {
	if now := s.book.view().pods[p.ID]; now != nil {
		p = now
	}
	s.tellPodNews(ctx, nri.RemovePodSandbox, p)
}

// pluginNode is the service as plugins' host sees it.
type pluginNode struct{ s *Service }

// Snapshot returns the pods that are not stopped, and the containers that have
// not ended, or have done so while there was no daemon to tell of it.
func (n pluginNode) Snapshot() (pods []nri.Pod, containers []nri.Container) {
	v := n.s.book.view()
	for _, p := range v.pods {
		if p.listed() && !p.Torn {
			pods = append(pods, n.s.pluginPod(p))
		}
	}
	for _, c := range v.containers {
		_, missed := n.s.missed.Load(c.ID)
		if c.listed() && (c.State != StateExited || missed) {
			containers = append(containers, n.s.pluginContainer(c))
		}
	}
	slices.SortFunc(containers, func(a, b nri.Container) int { return cmp.Compare(a.Created, b.Created) })
	return pods, containers
}

// Apply changes resources of containers. One that is not there any more, or has
// ended, is among those that failed, and no reason to take back the others.
func (n pluginNode) Apply(ctx context.Context, updates []nri.Update) (failed []nri.Update, undo func(context.Context) error, err error) {
	var made []madeUpdate
	undo = func(ctx context.Context) error { return n.s.takeAllBack(ctx, made) }
	for i, u := range updates {
		m, e := n.s.applyUpdate(ctx, u)
		switch {
		case e == nil:
			made = append(made, m)
		case u.IgnoreFailure || errors.Is(e, ErrNotFound) || errors.Is(e, ErrState):
			klog.FromContext(ctx).V(2).Info("Update that a plugin wants not made", "containerID", u.ID, "err", e)
			failed = append(failed, u)
		default:
			failed = append(failed, updates[i:]...)
			for _, m := range slices.Backward(made) {
				failed = append(failed, m.update)
			}
			e = errors.Join(e, undo(ctx))
			made = nil
			return failed, undo, fmt.Errorf("update that a plugin wants: %w", e)
		}
	}
	return failed, undo, nil
}
