package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

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
	closers []func() error
	seq     atomic.Int64
}

// target is a CRI endpoint and the processes behind it.
type target struct {
	name    string
	version string
	client  *node.Client
	pid     int
	node    *node.Node // nil for one that was there before
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
	var own *node.Node
	if len(endpoints) == 0 {
		if own, err = b.ownNode(ctx, registryAddr); err != nil {
			return b, err
		}
		endpoints = []string{"berth=" + own.Socket}
	}
	for _, e := range endpoints {
		name, address, _ := strings.Cut(e, "=")
		t, err := dial(ctx, name, address)
		if err != nil {
			return b, fmt.Errorf("endpoint %s: %w", e, err)
		}
		t.node = own
		b.targets = append(b.targets, t)
		b.closers = append(b.closers, t.client.Close)
		if err := b.pull(ctx, t); err != nil {
			return b, fmt.Errorf("endpoint %s: image %s: %w", e, b.image, err)
		}
	}
	return b, nil
}

func (b *bench) pull(ctx context.Context, t *target) error {
	ctx, cancel := context.WithTimeout(ctx, b.o.timeout)
	defer cancel()
	_, err := t.client.Pull(ctx, b.image)
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

func (b *bench) ownNode(ctx context.Context, registryAddr string) (*node.Node, error) {
	bin := b.o.bin
	if bin == "" {
		root, err := node.Root()
		if err != nil {
			return nil, err
		}
		if bin, err = node.Build(ctx, root, b.dir); err != nil {
			return nil, err
		}
	}
	opts := node.Options{Bin: bin, Config: fmt.Sprintf("state_dir = %q\n%s", filepath.Join(b.dir, "state"), b.o.config), Without: []string{"state_dir"}}
	if registryAddr != "" {
		opts.Registries = []string{registryAddr}
	}
	n, err := node.New(opts)
	if err != nil {
		return nil, err
	}
	b.closers = append(b.closers, n.Close)
	ready, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	return n, n.Start(ready)
}

func dial(ctx context.Context, name, address string) (*target, error) {
	c, err := node.Dial(address, nil)
	if err != nil {
		return nil, err
	}
	t := &target{name: name, client: c}
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	v, err := c.Version(ctx, &runtime.VersionRequest{})
	if err == nil {
		t.version = v.RuntimeName + " " + v.RuntimeVersion
		t.pid, err = listener(strings.TrimPrefix(address, "unix://"))
	}
	if err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return t, nil
}

// listener returns the process that listens at a unix socket.
func listener(socket string) (int, error) {
	c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: socket})
	if err != nil {
		return 0, err
	}
	defer c.Close()
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	var inner error
	err = raw.Control(func(fd uintptr) { cred, inner = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	if err := errors.Join(err, inner); err != nil {
		return 0, err
	}
	return int(cred.Pid), nil
}

// A pod is one that a case made, with at most one container.
type pod struct {
	t         *target
	timeout   time.Duration
	cfg       *runtime.PodSandboxConfig
	id        string
	container string
}

// times are how long the calls of a pod's life took, by the name of the call.
type times map[string]time.Duration

// timed makes a call and notes its time.
func (p *pod) timed(ctx context.Context, at times, call string, f func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, p.timeout)
	defer cancel()
	began := time.Now()
	err := f(ctx)
	at[call] = time.Since(began)
	if err != nil {
		return fmt.Errorf("%s: %w", call, err)
	}
	return nil
}

// start makes a pod with a container that runs command. What there is of the pod
// is to be removed in any case.
func (b *bench) start(ctx context.Context, t *target, at times, command ...string) (*pod, error) {
	name := fmt.Sprintf("life-%d-%d", os.Getpid(), b.seq.Add(1))
	p := &pod{t: t, timeout: b.o.timeout, cfg: node.PodConfig(name, b.logDir(t), "/berth-bench")}
	if b.o.hostNetwork {
		p.cfg.Linux.SecurityContext.NamespaceOptions.Network = runtime.NamespaceMode_NODE
	}
	if err := os.MkdirAll(p.cfg.LogDirectory, 0o755); err != nil {
		return p, err
	}
	err := p.timed(ctx, at, "RunPodSandbox", func(ctx context.Context) (err error) {
		p.id, err = t.client.Run(ctx, p.cfg)
		return err
	})
	if err != nil {
		return p, err
	}
	cfg := b.container(command)
	err = p.timed(ctx, at, "CreateContainer", func(ctx context.Context) error {
		r, err := t.client.CreateContainer(ctx, &runtime.CreateContainerRequest{PodSandboxId: p.id, Config: cfg, SandboxConfig: p.cfg})
		p.container = r.GetContainerId()
		return err
	})
	if err != nil {
		return p, err
	}
	return p, p.timed(ctx, at, "StartContainer", func(ctx context.Context) error {
		_, err := t.client.StartContainer(ctx, &runtime.StartContainerRequest{ContainerId: p.container})
		return err
	})
}

// container is configured as the kubelet does it for a best-effort pod.
func (b *bench) container(command []string) *runtime.ContainerConfig {
	c := node.ContainerConfig("main", b.image, command...)
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
	if p.container != "" {
		c := &runtime.StopContainerRequest{ContainerId: p.container}
		if err := p.timed(ctx, at, "StopContainer", func(ctx context.Context) error { _, err := p.t.client.StopContainer(ctx, c); return err }); err != nil {
			return err
		}
		r := &runtime.RemoveContainerRequest{ContainerId: p.container}
		if err := p.timed(ctx, at, "RemoveContainer", func(ctx context.Context) error { _, err := p.t.client.RemoveContainer(ctx, r); return err }); err != nil {
			return err
		}
	}
	if p.id == "" {
		return nil
	}
	s := &runtime.StopPodSandboxRequest{PodSandboxId: p.id}
	if err := p.timed(ctx, at, "StopPodSandbox", func(ctx context.Context) error { _, err := p.t.client.StopPodSandbox(ctx, s); return err }); err != nil {
		return err
	}
	r := &runtime.RemovePodSandboxRequest{PodSandboxId: p.id}
	return p.timed(ctx, at, "RemovePodSandbox", func(ctx context.Context) error { _, err := p.t.client.RemovePodSandbox(ctx, r); return err })
}

// removeAll takes pods down with some at once, also after ctx has ended.
func removeAll(ctx context.Context, pods []*pod, workers int) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Minute)
	defer cancel()
	return parallel(len(pods), workers, func(i int) error { return pods[i].remove(ctx, times{}) })
}
