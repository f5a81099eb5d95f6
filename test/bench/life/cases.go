package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berthd/berth/test/bench/endpoint"
)

// figures are what a case measured, by a name that ends with its unit.
type figures map[string]float64

// calls are those of a pod's life in their order.
var calls = []string{"RunPodSandbox", "CreateContainer", "StartContainer", "StopContainer", "RemoveContainer", "StopPodSandbox", "RemovePodSandbox"}

var startCalls, removeCalls = calls[:3], calls[3:]

func startCase(ctx context.Context, b *bench, t *target) (figures, error) {
	lives := map[string][]float64{}
	before := busy()
	for range b.o.start {
		at := times{}
		p, err := b.start(ctx, t, at, 1, "sleep", "86400")
		if err := errors.Join(err, p.remove(context.WithoutCancel(ctx), at)); err != nil {
			return nil, err
		}
		for _, c := range calls {
			lives[c] = append(lives[c], ms(at.sum(c)))
		}
		lives["start"] = append(lives["start"], ms(at.sum(startCalls...)))
		lives["life"] = append(lives["life"], ms(at.sum(calls...)))
	}
	f := figures{"CPU of a life, ms": (busy() - before) * 1000 / float64(b.o.start)}
	for c, v := range lives {
		f[c+" p50, ms"] = endpoint.Quantile(v, 0.5)
	}
	f["start p90, ms"] = endpoint.Quantile(lives["start"], 0.9)
	return f, nil
}

func churnCase(ctx context.Context, b *bench, t *target) (figures, error) {
	before, began := busy(), time.Now()
	err := parallel(b.o.churn, b.o.workers, func(int) error {
		p, err := b.start(ctx, t, times{}, 1, "sleep", "86400")
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
	p, err := b.start(ctx, t, times{}, 1, "sleep", "86400")
	defer func() { err = errors.Join(err, p.remove(context.WithoutCancel(ctx), times{})) }()
	if err != nil {
		return nil, err
	}
	if err := p.exec(ctx); err != nil { // the first one of a container may cost more
		return nil, err
	}
	f = figures{}
	if err := b.ask(ctx, f, question{"ExecSync", b.o.execs, 0, func(ctx context.Context) error { return p.exec(ctx) }}); err != nil {
		return nil, err
	}
	began := time.Now()
	if err := parallel(b.o.execs, b.o.workers, func(int) error { return p.exec(ctx) }); err != nil {
		return nil, err
	}
	f["parallel, execs a second"] = float64(b.o.execs) / time.Since(began).Seconds()
	return f, nil
}

// exec runs a command in the first container.
func (p *pod) exec(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, p.timeout)
	defer cancel()
	r, err := p.t.Client.ExecSync(ctx, &runtime.ExecSyncRequest{ContainerId: p.containers[0], Cmd: []string{"true"}, Timeout: 60})
	if err == nil && r.ExitCode != 0 {
		err = fmt.Errorf("ExecSync: exit code %d: %.200s", r.ExitCode, r.Stderr)
	}
	return err
}

func logsCase(ctx context.Context, b *bench, t *target) (f figures, err error) {
	size := b.o.logMiB << 20
	// The lines are made first and printed by the MiB, so that the printing costs little.
	script := fmt.Sprintf("yes %s | head -c 1048576 >/lines; for i in $(seq %d); do cat /lines; done", strings.Repeat("x", b.o.line-1), b.o.logMiB)
	before, began := busy(), time.Now()
	p, err := b.start(ctx, t, times{}, 1, "sh", "-c", script)
	defer func() { err = errors.Join(err, p.remove(context.WithoutCancel(ctx), times{})) }()
	if err != nil {
		return nil, err
	}
	wait, cancel := context.WithTimeout(ctx, 10*b.o.timeout)
	defer cancel()
	if _, err := t.Client.WaitExited(wait, p.containers[0]); err != nil {
		return nil, err
	}
	took, cost := time.Since(began).Seconds(), busy()-before
	log := filepath.Join(p.cfg.LogDirectory, containerName(0)+".log")
	st, err := os.Stat(log)
	if err != nil {
		return nil, err
	}
	if st.Size() < int64(size) {
		return nil, fmt.Errorf("the log has %d bytes, the container printed %d", st.Size(), size)
	}
	f = figures{"MB a second": float64(size) / 1e6 / took, "CPU of a GB, s": cost * 1e9 / float64(size)}
	return f, os.Remove(log)
}

// many starts pods of n containers each, some at once.
func (b *bench) many(ctx context.Context, t *target, pods, n int) ([]*pod, error) {
	var mu sync.Mutex
	var all []*pod
	err := parallel(pods, b.o.workers, func(int) error {
		p, err := b.start(ctx, t, times{}, n, "sleep", "86400")
		mu.Lock()
		defer mu.Unlock()
		all = append(all, p)
		return err
	})
	return all, err
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
