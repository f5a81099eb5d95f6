package main

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berthd/berth/test/bench/endpoint"
	"github.com/berthd/berth/test/images"
	"github.com/berthd/berth/test/node"
	"github.com/berthd/berth/test/registry"
)

// bench is one run of the program.
type bench struct {
	o       *options
	dir     string
	image   string
	targets []*target
	results []result
	stages  []stageResult
	closers []func() error
	seq     atomic.Int64
}

// target is a CRI endpoint and the processes behind it.
type target struct {
	*endpoint.Endpoint
	node    *node.Node // nil for one that was there before
	restart string     // the command that starts the daemon of one that was, "" if it is not known
}

func (b *bench) close() {
	for _, c := range slices.Backward(b.closers) {
		if err := c(); err != nil {
			fmt.Fprintln(os.Stderr, "life: clean-up:", err)
		}
	}
}

// open gets the targets and the image ready. What it returns is to be closed in
// any case.
func open(ctx context.Context, o *options) (*bench, error) {
	b := &bench{o: o, image: o.image}
	dir, err := os.MkdirTemp(o.dir, "bench-life-")
	if err != nil {
		return b, err
	}
	b.dir = dir
	b.closers = append(b.closers, func() error { return os.RemoveAll(dir) })
	registryAddr := ""
	if b.image == "" {
		if registryAddr, err = b.serveImage(ctx); err != nil {
			return b, err
		}
	}
	endpoints := o.endpoints
	if len(endpoints) == 0 {
		endpoints = []string{"berth=" + own}
	}
	for _, e := range endpoints {
		if err := b.add(ctx, e, registryAddr); err != nil {
			return b, err
		}
	}
	return b, nil
}

// own stands for the address of a berthd that is started here.
const own = "own"

// add gets an endpoint ready.
func (b *bench) add(ctx context.Context, nameAndAddress, registryAddr string) (err error) {
	t := &target{}
	if name, address, _ := strings.Cut(nameAndAddress, "="); address == own {
		if t.node, err = b.ownNode(ctx, registryAddr); err != nil {
			return fmt.Errorf("endpoint %s: %w", nameAndAddress, err)
		}
		nameAndAddress = name + "=" + t.node.Socket
	}
	if t.Endpoint, err = endpoint.Dial(ctx, nameAndAddress); err != nil {
		return err
	}
	t.restart = b.o.restart[t.Name]
	b.targets = append(b.targets, t)
	b.closers = append(b.closers, t.Close)
	if err := b.pull(ctx, t); err != nil {
		return fmt.Errorf("endpoint %s: image %s: %w", nameAndAddress, b.image, err)
	}
	return nil
}

func (b *bench) pull(ctx context.Context, t *target) error {
	ctx, cancel := context.WithTimeout(ctx, b.o.timeout)
	defer cancel()
	_, err := t.Client.Pull(ctx, b.image)
	return err
}

// serveImage serves a busybox from a registry of its own.
func (b *bench) serveImage(ctx context.Context) (string, error) {
	root, err := node.Root()
	if err != nil {
		return "", err
	}
	guest, err := images.BuildGuest(ctx, root, b.dir)
	if err != nil {
		return "", err
	}
	all, err := images.Standard(ctx, guest)
	if err != nil {
		return "", err
	}
	s, err := registry.Start()
	if err != nil {
		return "", err
	}
	b.closers = append(b.closers, s.Close)
	images.Push(s, map[string]*registry.Image{images.Busybox: all[images.Busybox]})
	b.image = s.Ref(images.Busybox, images.Tag)
	return s.Addr(), nil
}

// ownSubnet has room for as many pods as a bridge has ports, 1023. Programs that run
// at the same time most likely have different ones.
func ownSubnet() string { return fmt.Sprintf("10.%d.%d.0/21", 200+os.Getpid()%50, os.Getpid()/50%32*8) }

func (b *bench) ownNode(ctx context.Context, registryAddr string) (*node.Node, error) {
	dir, err := os.MkdirTemp(b.dir, "own-")
	if err != nil {
		return nil, err
	}
	own := endpoint.Own{Dir: dir, Bin: b.o.bin, Config: b.o.config, Subnet: ownSubnet(), RegistriesConf: b.o.registries}
	if registryAddr != "" {
		own.Registries = []string{registryAddr}
	}
	n, err := own.Start(ctx)
	if n != nil {
		b.closers = append(b.closers, n.Close)
	}
	return n, err
}

// A pod is one that a case made, with what it has of its containers.
type pod struct {
	t          *target
	timeout    time.Duration
	cfg        *runtime.PodSandboxConfig
	id         string
	containers []string
}

// times are how long the calls of a pod's life took, by the name of the call.
type times map[string][]time.Duration

// sum is the time of all calls of these names.
func (at times) sum(calls ...string) (d time.Duration) {
	for _, c := range calls {
		for _, one := range at[c] {
			d += one
		}
	}
	return d
}

// timed makes a call and notes its time.
func (p *pod) timed(ctx context.Context, at times, call string, f func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, p.timeout)
	defer cancel()
	began := time.Now()
	err := f(ctx)
	at[call] = append(at[call], time.Since(began))
	if err != nil {
		return fmt.Errorf("%s: %w", call, err)
	}
	return nil
}

// start makes a pod with n containers that run command, one after the other as
// the kubelet does. What there is of the pod is to be removed in any case.
func (b *bench) start(ctx context.Context, t *target, at times, n int, command ...string) (*pod, error) {
	name := fmt.Sprintf("life-%d-%d", os.Getpid(), b.seq.Add(1))
	p := &pod{t: t, timeout: b.o.timeout, cfg: node.PodConfig(name, b.logDir(t), "/berth-bench")}
	if b.o.hostNetwork {
		p.cfg.Linux.SecurityContext.NamespaceOptions.Network = runtime.NamespaceMode_NODE
	}
	if err := os.MkdirAll(p.cfg.LogDirectory, 0o755); err != nil {
		return p, err
	}
	err := p.timed(ctx, at, "RunPodSandbox", func(ctx context.Context) (err error) {
		p.id, err = t.Client.Run(ctx, p.cfg)
		return err
	})
	for i := 0; i < n && err == nil; i++ {
		err = p.launch(ctx, at, b.container(i, command))
	}
	return p, err
}

// launch starts one more container.
func (p *pod) launch(ctx context.Context, at times, cfg *runtime.ContainerConfig) error {
	id := ""
	err := p.timed(ctx, at, "CreateContainer", func(ctx context.Context) error {
		r, err := p.t.Client.CreateContainer(ctx, &runtime.CreateContainerRequest{PodSandboxId: p.id, Config: cfg, SandboxConfig: p.cfg})
		id = r.GetContainerId()
		return err
	})
	if err != nil {
		return err
	}
	p.containers = append(p.containers, id)
	return p.timed(ctx, at, "StartContainer", func(ctx context.Context) error {
		_, err := p.t.Client.StartContainer(ctx, &runtime.StartContainerRequest{ContainerId: id})
		return err
	})
}

// containerName is the name of the i-th container of a pod, which its log has, too.
func containerName(i int) string { return fmt.Sprintf("c%d", i) }

// container is configured as the kubelet does it for a best-effort pod.
func (b *bench) container(i int, command []string) *runtime.ContainerConfig {
	c := node.ContainerConfig(containerName(i), b.image, command...)
	c.Linux.Resources = &runtime.LinuxContainerResources{CpuShares: 2, OomScoreAdj: 1000}
	s := c.Linux.SecurityContext
	s.Seccomp = &runtime.SecurityProfile{ProfileType: runtime.SecurityProfile_RuntimeDefault}
	s.MaskedPaths = []string{"/proc/asound", "/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list",
		"/proc/timer_stats", "/proc/sched_debug", "/proc/scsi", "/sys/firmware"}
	s.ReadonlyPaths = []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"}
	if b.o.hostNetwork {
		s.NamespaceOptions.Network = runtime.NamespaceMode_NODE
	}
	return c
}

// remove takes the pod down in the kubelet's order of calls.
func (p *pod) remove(ctx context.Context, at times) error {
	c := p.t.Client
	for _, id := range p.containers {
		err := p.timed(ctx, at, "StopContainer", func(ctx context.Context) error {
			_, err := c.StopContainer(ctx, &runtime.StopContainerRequest{ContainerId: id})
			return err
		})
		if err != nil {
			return err
		}
	}
	for _, id := range p.containers {
		err := p.timed(ctx, at, "RemoveContainer", func(ctx context.Context) error {
			_, err := c.RemoveContainer(ctx, &runtime.RemoveContainerRequest{ContainerId: id})
			return err
		})
		if err != nil {
			return err
		}
	}
	if p.id == "" {
		return nil
	}
	err := p.timed(ctx, at, "StopPodSandbox", func(ctx context.Context) error {
		_, err := c.StopPodSandbox(ctx, &runtime.StopPodSandboxRequest{PodSandboxId: p.id})
		return err
	})
	if err != nil {
		return err
	}
	return p.timed(ctx, at, "RemovePodSandbox", func(ctx context.Context) error {
		_, err := c.RemovePodSandbox(ctx, &runtime.RemovePodSandboxRequest{PodSandboxId: p.id})
		return err
	})
}

// removeAll takes pods down with some at once, also after ctx has ended.
func removeAll(ctx context.Context, pods []*pod, workers int) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Minute)
	defer cancel()
	return parallel(len(pods), workers, func(i int) error { return pods[i].remove(ctx, times{}) })
}
