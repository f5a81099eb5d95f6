package sandbox

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berthd/berth/cni/netns"
	"github.com/berthd/berth/sandbox/cgroup"
	"github.com/berthd/berth/sandbox/nri"
	"github.com/berthd/berth/store"
)

// sayer is plugins that have the node update another container, and double the
// shares that are asked for.
type sayer struct {
	Plugins
	node  pluginNode
	other string
	news  []string
}

func (p *sayer) Update(ctx context.Context, _ nri.Pod, _ nri.Container, res *specs.LinuxResources) (said nri.Said, err error) {
	_, said.Undo, err = p.node.Apply(ctx, []nri.Update{{ID: p.other, Resources: ociShares(77)}})
	said.Own = ociShares(2 * *res.CPU.Shares)
	return said, err
}

func (p *sayer) Tell(_ context.Context, e nri.Event, _ nri.Pod, c nri.Container) error {
	p.news = append(p.news, e.String())
	return nil
}

func ociShares(n uint64) *specs.LinuxResources {
	return &specs.LinuxResources{CPU: &specs.LinuxCPU{Shares: &n}}
}

// updates is a service with two running containers, and a runtime that fails to
// update the one whose ID is in the file "fail".
func updates(t *testing.T) (s *Service, p *sayer, own, other string, fail string) {
	t.Helper()
	dir := t.TempDir()
	fail = filepath.Join(dir, "fail")
	bin := program(t, filepath.Join(dir, "runc"), "runc version 1.9.1",
		fmt.Sprintf("case \"$*\" in *\" update \"*) for id; do :; done; cat >%s.$id; ! grep -q $id %[1]s 2>/dev/null; exit;; esac", fail))
	s = &Service{ctx: t.Context(), book: mustBook(t), ops: newOps(), live: newLive(), stats: newStatsCache(), wake: make(chan struct{}, 1),
		cfg: Config{RunDir: dir, StateDir: dir, ContainerTimeout: time.Minute, DefaultRuntime: "runc", CgroupDriver: cgroup.Cgroupfs}}
	s.runtimes = map[string]ociRuntime{"runc": {prober: newProber(s.ctx, "runc", bin), root: dir, driver: cgroup.Cgroupfs}}
	pod := newID()
	if _, err := s.book.insertPod(podRow{ID: pod, State: StateReady, Created: after(0)}); err != nil {
		t.Fatal(err)
	}
	own, other = newID(), newID()
	for _, id := range []string{own, other} {
		if _, err := s.book.insertContainer(containerRow{ID: id, PodID: pod, State: StateRunning, Created: after(0), CgroupPath: "/none/" + id}); err != nil {
			t.Fatal(err)
		}
	}
	p = &sayer{node: pluginNode{s}, other: other}
	s.deps = Deps{Pins: new(netns.Pins), Plugins: p}
	return s, p, own, other, fail
}

// An update is made together with those that plugins want of others, or neither
// is, unless the container has ended or somebody has changed the others since.
func TestUpdateWithPlugins(t *testing.T) {
	for _, tc := range []struct {
		name               string
		arrange            func(s *Service, own, other, fail string)
		err                error
		wantOwn, wantOther int64
	}{
		{name: "made", wantOwn: 20, wantOther: 77},
		{name: "own fails", arrange: func(_ *Service, own, _, fail string) { os.WriteFile(fail, []byte(own), 0o600) }, err: errAny},
		{name: "own fails, other changed since", err: errAny, wantOther: 5, arrange: func(s *Service, own, other, fail string) {
			os.WriteFile(fail, []byte(own), 0o600)
			p := s.deps.Plugins.(*sayer)
			s.deps.Plugins = &meanwhile{p, func() {
				if _, err := s.updateResources(s.ctx, &op{}, other, change{update: &runtime.LinuxContainerResources{CpuShares: 5}}); err != nil {
					panic(err)
				}
			}}
		}},
		{name: "others fail", arrange: func(_ *Service, _, other, fail string) { os.WriteFile(fail, []byte(other), 0o600) }, err: errAny},
		{name: "own has ended", err: ErrState, wantOther: 77, arrange: func(s *Service, own, _, _ string) {
			p := s.deps.Plugins.(*sayer)
			s.deps.Plugins = &meanwhile{p, func() {
				if _, err := s.book.updateContainer(own, func(_ *store.Tx, r *containerRow) error { r.State = StateExited; return nil }); err != nil {
					panic(err)
				}
			}}
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s, p, own, other, fail := updates(t)
			if tc.arrange != nil {
				tc.arrange(s, own, other, fail)
			}
			err := s.UpdateResources(t.Context(), &runtime.UpdateContainerResourcesRequest{ContainerId: own, Linux: &runtime.LinuxContainerResources{CpuShares: 10}})
			if (err == nil) != (tc.err == nil) || tc.err == ErrState && !errors.Is(err, ErrState) {
				t.Errorf("got %v, want %v", err, tc.err)
			}
			v := s.book.view()
			if got := v.containers[own].resources.GetCpuShares(); got != tc.wantOwn {
				t.Errorf("own shares %d, want %d", got, tc.wantOwn)
			}
			if got := v.containers[other].resources.GetCpuShares(); got != tc.wantOther {
				t.Errorf("shares of the other %d, want %d", got, tc.wantOther)
			}
			if told := strings.Join(p.news, " ") == "PostUpdateContainer"; told != (tc.err == nil) {
				t.Errorf("plugins were told %q", p.news)
			}
		})
	}
}

// A limit of memory is not lowered below what is used, which would kill. One that
// stays may well be used up, and other limits are no business of that.
func TestUpdateBelowUsage(t *testing.T) {
	s, _, own, _, fail := updates(t)
	s.deps.Plugins = nil
	for _, tc := range []struct {
		update *runtime.LinuxContainerResources
		want   bool
	}{
		{&runtime.LinuxContainerResources{CpuShares: 10}, false},
		{&runtime.LinuxContainerResources{MemoryLimitInBytes: 4 << 20}, true},
		{&runtime.LinuxContainerResources{MemoryLimitInBytes: 4 << 20, CpuShares: 20}, false},
		{&runtime.LinuxContainerResources{MemoryLimitInBytes: 8 << 20}, false},
		{&runtime.LinuxContainerResources{MemoryLimitInBytes: 2 << 20}, true},
		{&runtime.LinuxContainerResources{MemoryLimitInBytes: -1}, false},
		{&runtime.LinuxContainerResources{MemoryLimitInBytes: 8 << 20}, true},
	} {
		if err := s.UpdateResources(t.Context(), &runtime.UpdateContainerResourcesRequest{ContainerId: own, Linux: tc.update}); err != nil {
			t.Fatal(err)
		}
		text, err := os.ReadFile(fail + "." + own)
		if err != nil {
			t.Fatal(err)
		}
		if got := strings.Contains(string(text), `"checkBeforeUpdate":true`); got != tc.want {
			t.Errorf("%v: the runtime is told %s, want a check: %v", tc.update, text, tc.want)
		}
	}
}

var errAny = errors.New("any error")

// meanwhile does something between the plugins' word and the update.
type meanwhile struct {
	*sayer
	do func()
}

func (m *meanwhile) Update(ctx context.Context, p nri.Pod, c nri.Container, res *specs.LinuxResources) (nri.Said, error) {
	said, err := m.sayer.Update(ctx, p, c, res)
	m.do()
	return said, err
}
