package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// densityCase fills the target in four stages and looks at it in each.
func densityCase(ctx context.Context, b *bench, t *target) (f figures, err error) {
	before := helpers()
	daemon, kernel := pss(t.pid), slab()
	var pods []*pod
	defer func() { err = errors.Join(err, removeAll(ctx, pods, b.o.workers)) }()
	began := time.Now()
	took := time.Duration(0)
	for stage := 1; stage <= 4; stage++ {
		want := b.o.pods * stage / 4
		begun := time.Now()
		more, err := b.many(ctx, t, want-len(pods))
		pods = append(pods, more...)
		if err != nil {
			return nil, err
		}
		took += time.Since(begun)
		time.Sleep(2 * time.Second) // what comes after a start
		if f, err = b.look(ctx, t, pods, before, stage == 4); err != nil {
			return nil, err
		}
		f["daemon above empty, MiB"] = f["daemon, MiB"] - daemon/1024
		f["kernel slabs of a pod, KiB"] = (slab() - kernel) / float64(len(pods))
		b.results = append(b.results, result{Case: "stage", Target: t.name, Round: len(pods), Figures: f, At: time.Since(began).Seconds()})
	}
	f["start of all, s"] = took.Seconds()
	return f, nil
}

// look measures a target that has pods and nothing to do.
func (b *bench) look(ctx context.Context, t *target, pods []*pod, before []int, idle bool) (figures, error) {
	n := float64(len(pods))
	side := without(helpers(), before)
	f := figures{"daemon, MiB": pss(t.pid) / 1024, "helpers of a pod, KiB": pss(side...) / n, "helpers of a pod": float64(len(side)) / n}
	if idle {
		d, h := used(t.pid), used(side...)
		time.Sleep(b.o.idle)
		share := 100 / b.o.idle.Seconds()
		f["idle daemon, % of a CPU"] = (used(t.pid) - d) * share
		f["idle helpers, % of a CPU"] = (used(side...) - h) * share
	}
	one := pods[len(pods)/2]
	for _, q := range []struct {
		name string
		ask  func(context.Context) (int, error)
		want int
	}{
		{"ListPodSandbox", func(ctx context.Context) (int, error) {
			r, err := t.client.ListPodSandbox(ctx, &runtime.ListPodSandboxRequest{})
			return len(r.GetItems()), err
		}, len(pods)},
		{"ListContainers", func(ctx context.Context) (int, error) {
			r, err := t.client.ListContainers(ctx, &runtime.ListContainersRequest{})
			return len(r.GetContainers()), err
		}, len(pods)},
		{"ContainerStatus", func(ctx context.Context) (int, error) {
			r, err := t.client.ContainerStatus(ctx, &runtime.ContainerStatusRequest{ContainerId: one.container})
			return min(len(r.GetStatus().GetId()), 1), err
		}, 1},
		{"ListContainerStats", func(ctx context.Context) (int, error) {
			r, err := t.client.ListContainerStats(ctx, &runtime.ListContainerStatsRequest{})
			return len(r.GetStats()), err
		}, len(pods)},
		{"ListPodSandboxStats", func(ctx context.Context) (int, error) {
			r, err := t.client.ListPodSandboxStats(ctx, &runtime.ListPodSandboxStatsRequest{})
			return len(r.GetStats()), err
		}, len(pods)},
	} {
		if err := b.ask(ctx, f, q.name, q.want, q.ask); err != nil {
			return nil, err
		}
	}
	return f, nil
}

// ask makes a call many times.
func (b *bench) ask(ctx context.Context, f figures, name string, want int, call func(context.Context) (int, error)) error {
	ctx, cancel := context.WithTimeout(ctx, 10*b.o.timeout)
	defer cancel()
	var took []float64
	before := busy()
	for range b.o.calls {
		began := time.Now()
		got, err := call(ctx)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		if got < want {
			return fmt.Errorf("%s: %d answers, want %d", name, got, want)
		}
		took = append(took, ms(time.Since(began)))
	}
	f[name+" p50, ms"], f[name+" p99, ms"] = quantile(took, 0.5), quantile(took, 0.99)
	f[name+" CPU, ms"] = (busy() - before) * 1000 / float64(b.o.calls)
	return nil
}
