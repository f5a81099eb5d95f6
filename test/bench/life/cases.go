package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// figures are what a case measured, by a name that ends with its unit.
type figures map[string]float64

// calls are those of a pod's life in their order.
var calls = []string{"RunPodSandbox", "CreateContainer", "StartContainer", "StopContainer", "RemoveContainer", "StopPodSandbox", "RemovePodSandbox"}

func startCase(ctx context.Context, b *bench, t *target) (figures, error) {
	lives := map[string][]float64{}
	before := busy()
	for range b.o.start {
		at := times{}
		p, err := b.start(ctx, t, at, "sleep", "86400")
		if err := errors.Join(err, p.remove(context.WithoutCancel(ctx), at)); err != nil {
			return nil, err
		}
		whole := time.Duration(0)
		for _, c := range calls {
			lives[c] = append(lives[c], ms(at[c]))
			whole += at[c]
		}
		lives["start"] = append(lives["start"], ms(at["RunPodSandbox"]+at["CreateContainer"]+at["StartContainer"]))
		lives["life"] = append(lives["life"], ms(whole))
	}
	f := figures{"CPU of a life, ms": (busy() - before) * 1000 / float64(b.o.start)}
	for c, v := range lives {
		f[c+" p50, ms"] = quantile(v, 0.5)
	}
	f["start p90, ms"] = quantile(lives["start"], 0.9)
	return f, nil
}

func churnCase(ctx context.Context, b *bench, t *target) (figures, error) {
	before, began := busy(), time.Now()
	err := parallel(b.o.churn, b.o.workers, func(int) error {
		p, err := b.start(ctx, t, times{}, "sleep", "86400")
		return errors.Join(err, p.remove(context.WithoutCancel(ctx), times{}))
	})
	if err != nil {
		return nil, err
	}
	return figures{
		"pods a second":     float64(b.o.churn) / time.Since(began).Seconds(),
		"CPU of a life, ms": (busy() - before) * 1000 / float64(b.o.churn),
	}, nil
}

func execCase(ctx context.Context, b *bench, t *target) (f figures, err error) {
	p, err := b.start(ctx, t, times{}, "sleep", "86400")
	defer func() { err = errors.Join(err, p.remove(context.WithoutCancel(ctx), times{})) }()
	if err != nil {
		return nil, err
	}
	exec := func() error {
		ctx, cancel := context.WithTimeout(ctx, b.o.timeout)
		defer cancel()
		r, err := t.client.ExecSync(ctx, &runtime.ExecSyncRequest{ContainerId: p.container, Cmd: []string{"true"}, Timeout: 60})
		if err == nil && r.ExitCode != 0 {
			err = fmt.Errorf("ExecSync: exit code %d: %.200s", r.ExitCode, r.Stderr)
		}
		return err
	}
	if err := exec(); err != nil { // the first one of a container may cost more
		return nil, err
	}
	var took []float64
	before := busy()
	for range b.o.execs {
		began := time.Now()
		if err := exec(); err != nil {
			return nil, err
		}
		took = append(took, ms(time.Since(began)))
	}
	f = figures{
		"ExecSync p50, ms": quantile(took, 0.5), "ExecSync p90, ms": quantile(took, 0.9),
		"CPU of an ExecSync, ms": (busy() - before) * 1000 / float64(b.o.execs),
	}
	began := time.Now()
	if err := parallel(b.o.execs, b.o.workers, func(int) error { return exec() }); err != nil {
		return nil, err
	}
	f["parallel, execs a second"] = float64(b.o.execs) / time.Since(began).Seconds()
	return f, nil
}

func logsCase(ctx context.Context, b *bench, t *target) (f figures, err error) {
	size := b.o.logMiB << 20
	script := fmt.Sprintf("yes %s | head -c %d", strings.Repeat("x", b.o.line-1), size)
	before, began := busy(), time.Now()
	p, err := b.start(ctx, t, times{}, "sh", "-c", script)
	defer func() { err = errors.Join(err, p.remove(context.WithoutCancel(ctx), times{})) }()
	if err != nil {
		return nil, err
	}
	wait, cancel := context.WithTimeout(ctx, 10*b.o.timeout)
	defer cancel()
	if _, err := t.client.WaitExited(wait, p.container); err != nil {
		return nil, err
	}
	took, cost := time.Since(began).Seconds(), busy()-before
	st, err := os.Stat(filepath.Join(p.cfg.LogDirectory, "main.log"))
	if err != nil {
		return nil, err
	}
	if st.Size() < int64(size) {
		return nil, fmt.Errorf("the log has %d bytes, the container printed %d", st.Size(), size)
	}
	f = figures{"MB a second": float64(size) / 1e6 / took, "CPU of a GB, s": cost * 1e9 / float64(size)}
	return f, os.Remove(filepath.Join(p.cfg.LogDirectory, "main.log"))
}

// restartCase kills the daemon over living pods and starts it again.
func restartCase(ctx context.Context, b *bench, t *target) (f figures, err error) {
	pods, err := b.many(ctx, t, b.o.pods)
	defer func() { err = errors.Join(err, removeAll(ctx, pods, b.o.workers)) }()
	if err != nil {
		return nil, err
	}
	if err := t.node.Kill(); err != nil {
		return nil, err
	}
	began := time.Now()
	if err := t.node.Start(ctx); err != nil {
		return nil, err
	}
	t.client.Reset()
	r, err := t.client.ListContainers(ctx, &runtime.ListContainersRequest{})
	if err != nil {
		return nil, err
	}
	answers := time.Since(began)
	running := 0
	for _, c := range r.Containers {
		if c.State == runtime.ContainerState_CONTAINER_RUNNING {
			running++
		}
	}
	t.pid = t.node.Pid()
	f = figures{"first answer, ms": ms(answers), "containers not running then": float64(len(pods) - running)}
	for running < len(pods) && time.Since(began) < time.Minute {
		if r, err = t.client.ListContainers(ctx, &runtime.ListContainersRequest{Filter: &runtime.ContainerFilter{
			State: &runtime.ContainerStateValue{State: runtime.ContainerState_CONTAINER_RUNNING}}}); err != nil {
			return nil, err
		}
		running = len(r.Containers)
	}
	f["all right, ms"] = ms(time.Since(began))
	return f, nil
}

// many starts pods, some at once.
func (b *bench) many(ctx context.Context, t *target, n int) ([]*pod, error) {
	var mu sync.Mutex
	var pods []*pod
	err := parallel(n, b.o.workers, func(int) error {
		p, err := b.start(ctx, t, times{}, "sleep", "86400")
		mu.Lock()
		defer mu.Unlock()
		pods = append(pods, p)
		return err
	})
	return pods, err
}

// parallel calls f n times, at most workers at once, and stops at the first
// error.
func parallel(n, workers int, f func(i int) error) error {
	next := make(chan int)
	errs := make(chan error, workers)
	stop := make(chan struct{})
	var once sync.Once
	for range workers {
		go func() {
			for i := range next {
				if err := f(i); err != nil {
					once.Do(func() { close(stop) })
					errs <- err
					return
				}
			}
			errs <- nil
		}()
	}
	func() {
		defer close(next)
		for i := range n {
			select {
			case next <- i:
			case <-stop:
				return
			}
		}
	}()
	var all []error
	for range workers {
		all = append(all, <-errs)
	}
	return errors.Join(all...)
}

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// quantile returns the value below which a share q of v lies; 0 for no values.
func quantile(v []float64, q float64) float64 {
	if len(v) == 0 {
		return 0
	}
	s := slices.Clone(v)
	slices.Sort(s)
	return s[max(int(math.Ceil(q*float64(len(s))))-1, 0)]
}
