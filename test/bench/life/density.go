package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berthd/berth/test/bench/endpoint"
)

// densityCase fills the target with pods of one container and looks at it in
// four stages.
func densityCase(ctx context.Context, b *bench, t *target) (figures, error) {
	return b.fill(ctx, t, filling{name: "density", pods: b.o.pods, containers: 1, stages: 4, look: func(empty base, pods []*pod, f figures) error {
		if len(pods) < b.o.pods {
			return nil
		}
		return empty.idle(ctx, b.o.idle, f)
	}})
}

// scaleCase does so with pods of two containers, many more of them, and also
// runs commands, starts and removes pods beside those that are there, and has the
// daemon restarted over them.
func scaleCase(ctx context.Context, b *bench, t *target) (figures, error) {
	return b.fill(ctx, t, filling{name: "scale", pods: b.o.scale, containers: 2, stages: 5, look: func(_ base, pods []*pod, f figures) error {
		if err := b.ask(ctx, f, question{"ExecSync", probes, 0, pods[len(pods)/2].exec}); err != nil {
			return err
		}
		if err := b.beside(ctx, t, f); err != nil {
			return err
		}
		if !t.restarts() {
			return nil
		}
		return b.restart(ctx, t, pods, f)
	}})
}

// probes is how often what takes tens of milliseconds is done at each stage.
const probes = 10

// beside starts and removes pods while there are others.
func (b *bench) beside(ctx context.Context, t *target, f figures) error {
	var starts, removals []float64
	for range probes {
		at := times{}
		p, err := b.start(ctx, t, at, 2, "sleep", "86400")
		if err := errors.Join(err, p.remove(context.WithoutCancel(ctx), at)); err != nil {
			return err
		}
		starts, removals = append(starts, ms(at.sum(startCalls...))), append(removals, ms(at.sum(removeCalls...)))
	}
	f["one more pod p50, ms"], f["removal of one p50, ms"] = endpoint.Quantile(starts, 0.5), endpoint.Quantile(removals, 0.5)
	return nil
}

// A filling is pods that a target gets in equal stages.
type filling struct {
	name             string
	pods, containers int
	stages           int
	look             func(empty base, pods []*pod, f figures) error // in addition to what all have, after each stage
}

// fill returns the figures of the last stage. Those of each are results of their
// own.
func (b *bench) fill(ctx context.Context, t *target, l filling) (f figures, err error) {
	empty := emptied(t)
	var pods []*pod
	defer func() {
		began := time.Now()
		n := len(pods)
		if err = errors.Join(err, removeAll(ctx, pods, b.o.workers)); err == nil {
			f["removed, pods a second"] = float64(n) / time.Since(began).Seconds()
		}
	}()
	for stage := 1; stage <= l.stages; stage++ {
		add := l.pods*stage/l.stages - len(pods)
		began := time.Now()
		more, err := b.many(ctx, t, add, l.containers)
		pods = append(pods, more...)
		if err != nil {
			return nil, err
		}
		f = figures{"started, pods a second": float64(add) / time.Since(began).Seconds()}
		time.Sleep(2 * time.Second) // what comes after a start
		empty.memory(f, float64(len(pods)))
		if err := b.reads(ctx, t, pods, f); err != nil {
			return nil, err
		}
		if err := l.look(empty, pods, f); err != nil {
			return nil, err
		}
		b.stages = append(b.stages, stageResult{Case: l.name, Target: t.Name, Pods: len(pods), Figures: f})
	}
	return f, nil
}

// base is what there was of memory before the pods.
type base struct {
	t       *target
	helpers []int
	daemon  float64
	kernel  kernelMemory
}

func emptied(t *target) base {
	return base{t: t, helpers: helpers(), daemon: pss(t.Pid), kernel: readKernelMemory()}
}

// memory tells what n pods have made of it.
func (e base) memory(f figures, n float64) {
	side := without(helpers(), e.helpers)
	f["daemon, MiB"] = pss(e.t.Pid) / 1024
	f["daemon above empty, MiB"] = f["daemon, MiB"] - e.daemon/1024
	f["helpers of a pod, KiB"], f["helpers of a pod"] = pss(side...)/n, float64(len(side))/n
	k := readKernelMemory()
	f["kernel slabs of a pod, KiB"] = float64(k.slab-e.kernel.slab) / n
	f["kernel slabs of a pod without caches, KiB"] = float64(k.unreclaimable-e.kernel.unreclaimable) / n
	f["kernel stacks, page tables, per-CPU data of a pod, KiB"] = float64(k.rest-e.kernel.rest) / n
}

// idle watches processes that have nothing to do.
func (e base) idle(ctx context.Context, long time.Duration, f figures) error {
	side := without(helpers(), e.helpers)
	d, h := endpoint.CPU(e.t.Pid), endpoint.CPU(side...)
	select {
	case <-time.After(long):
	case <-ctx.Done():
		return ctx.Err()
	}
	share := 100 / long.Seconds()
	f["idle daemon, % of a CPU"] = (endpoint.CPU(e.t.Pid) - d) * share
	f["idle helpers, % of a CPU"] = (endpoint.CPU(side...) - h) * share
	return nil
}

// reads asks for what the kubelet asks for all the time.
func (b *bench) reads(ctx context.Context, t *target, pods []*pod, f figures) error {
	containers := 0
	for _, p := range pods {
		containers += len(p.containers)
	}
	c, one := t.Client, pods[len(pods)/2].containers[0]
	enough := func(got, want int, err error) error {
		if err == nil && got < want {
			err = fmt.Errorf("%d in the answer, want %d", got, want)
		}
		return err
	}
	stats := func(ctx context.Context) error {
		r, err := c.ListContainerStats(ctx, &runtime.ListContainerStatsRequest{})
		return enough(len(r.GetStats()), containers, err)
	}
	podStats := func(ctx context.Context) error {
		r, err := c.ListPodSandboxStats(ctx, &runtime.ListPodSandboxStatsRequest{})
		return enough(len(r.GetStats()), len(pods), err)
	}
	for _, q := range []question{
		{"ListPodSandbox", b.o.calls, 0, func(ctx context.Context) error {
			r, err := c.ListPodSandbox(ctx, &runtime.ListPodSandboxRequest{})
			return enough(len(r.GetItems()), len(pods), err)
		}},
		{"ListContainers", b.o.calls, 0, func(ctx context.Context) error {
			r, err := c.ListContainers(ctx, &runtime.ListContainersRequest{})
			return enough(len(r.GetContainers()), containers, err)
		}},
		{"ContainerStatus", b.o.calls, 0, func(ctx context.Context) error {
			r, err := c.ContainerStatus(ctx, &runtime.ContainerStatusRequest{ContainerId: one})
			return enough(len(r.GetStatus().GetId()), 1, err)
		}},
		{"ListContainerStats", b.o.calls, 0, stats},
		{"ListPodSandboxStats", b.o.calls, 0, podStats},
		// Nothing is left by then that could be taken over from the call before.
		{"ListContainerStats anew", min(b.o.calls, 20), anew, stats},
		{"ListPodSandboxStats anew", min(b.o.calls, 20), anew, podStats},
	} {
		if err := b.ask(ctx, f, q); err != nil {
			return err
		}
	}
	return nil
}

// anew is longer than any runtime here shares what it has read among callers.
const anew = 200 * time.Millisecond

// A question is a call that is made n times, one after the other, with a pause
// before each.
type question struct {
	name  string
	n     int
	pause time.Duration
	ask   func(context.Context) error
}

func (b *bench) ask(ctx context.Context, f figures, q question) error {
	ctx, cancel := context.WithTimeout(ctx, 10*b.o.timeout)
	defer cancel()
	var took []float64
	cost := 0.0
	for range q.n {
		time.Sleep(q.pause)
		before := busy()
		began := time.Now()
		if err := q.ask(ctx); err != nil {
			return fmt.Errorf("%s: %w", q.name, err)
		}
		took = append(took, ms(time.Since(began)))
		cost += busy() - before
	}
	f[q.name+" p50, ms"], f[q.name+" p99, ms"] = endpoint.Quantile(took, 0.5), endpoint.Quantile(took, 0.99)
	f[q.name+" CPU, ms"] = cost * 1000 / float64(q.n)
	return nil
}
