package main

import (
	"context"
	"fmt"
	"os"
	"slices"
	"time"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berthd/berth/test/bench/endpoint"
	"github.com/berthd/berth/test/node"
)

// target is a CRI endpoint and the daemon behind it.
type target struct {
	*endpoint.Endpoint
	idle int64 // resident bytes before the first pull
}

// sample is what one round measured. Bytes are bytes, times are seconds.
type sample struct {
	Image         string
	Target        string
	Round         int
	PullSeconds   float64
	PullCPU       float64
	Written       int64 // by the daemon, to block devices
	PeakRSS       int64
	Growth        int64   // of PeakRSS over the daemon's size before its first pull
	RemoveSeconds float64 // until it was answered
	FreedSeconds  float64 // until the daemon had nothing more to do
	RemoveCPU     float64 // until then
}

// openTargets connects to the endpoints, or starts a berthd when there are none.
// The function that it returns is to be called in any case.
func openTargets(ctx context.Context, o options, reg *registry) (targets []*target, closeAll func(), err error) {
	var closers []func() error
	closeAll = func() {
		for _, c := range slices.Backward(closers) {
			if err := c(); err != nil {
				fmt.Fprintln(os.Stderr, "pull: clean-up:", err)
			}
		}
	}
	endpoints := o.endpoints
	if len(endpoints) == 0 {
		dir, err := os.MkdirTemp(o.dir, "bench-pull-")
		if err != nil {
			return nil, closeAll, err
		}
		closers = append(closers, func() error { return os.RemoveAll(dir) })
		n, err := endpoint.Own{Dir: dir, Bin: o.bin, Config: o.config, CNI: node.NoCNI, Registries: []string{reg.address}}.Start(ctx)
		if n != nil {
			closers = append(closers, n.Close)
		}
		if err != nil {
			return nil, closeAll, err
		}
		endpoints = []string{"berth=" + n.Socket}
	}
	for _, e := range endpoints {
		p, err := endpoint.Dial(ctx, e)
		if err != nil {
			return nil, closeAll, err
		}
		closers = append(closers, p.Close)
		t := &target{Endpoint: p}
		t.idle = t.memory("VmRSS")
		targets = append(targets, t)
	}
	return targets, closeAll, nil
}

// round pulls an image and removes it.
func (t *target) round(ctx context.Context, timeout time.Duration, img image, ref string) (s sample, err error) {
	s = sample{Image: img.Name, Target: t.Name}
	spec := &runtime.ImageSpec{Image: ref}
	do := func(f func(context.Context) error) (seconds, cpu float64, err error) {
		settle()
		ctx, cancel := context.WithTimeout(ctx, timeout)
		defer cancel()
		used, began := t.cpu(), time.Now()
		err = f(ctx)
		return time.Since(began).Seconds(), t.cpu() - used, err
	}
	// What a pull that was interrupted left.
	if _, err := t.Client.Images.RemoveImage(ctx, &runtime.RemoveImageRequest{Image: spec}); err != nil {
		return s, err
	}
	t.resetPeak()
	written := t.written()
	s.PullSeconds, s.PullCPU, err = do(func(ctx context.Context) error {
		_, err := t.Client.Pull(ctx, ref)
		return err
	})
	if err != nil {
		return s, fmt.Errorf("pull: %w", err)
	}
	s.PeakRSS = t.memory("VmHWM")
	s.Growth = s.PeakRSS - t.idle
	s.Written = t.written() - written
	used := t.cpu()
	s.RemoveSeconds, _, err = do(func(ctx context.Context) error {
		_, err := t.Client.Images.RemoveImage(ctx, &runtime.RemoveImageRequest{Image: spec})
		return err
	})
	if err != nil {
		return s, fmt.Errorf("removal: %w", err)
	}
	answered := time.Now()
	s.FreedSeconds = s.RemoveSeconds + t.rest(ctx, timeout).Sub(answered).Seconds()
	s.RemoveCPU = t.cpu() - used
	return s, nil
}

// rest waits until the daemon has used no processor time for half a second, so that what
// goes on behind a removal is counted, and disturbs nobody, and returns when it began to.
func (t *target) rest(ctx context.Context, timeout time.Duration) time.Time {
	last, since := t.cpu(), time.Now()
	for end := since.Add(timeout); time.Since(since) < 500*time.Millisecond && time.Now().Before(end) && ctx.Err() == nil; {
		time.Sleep(50 * time.Millisecond)
		if now := t.cpu(); now > last {
			last, since = now, time.Now()
		}
	}
	return since
}

// cpu returns the seconds of processor time that the daemon and the children
// that it waited for have used.
func (t *target) cpu() float64 { return endpoint.CPUWithChildren(t.Pid) }

// value finds a line "key: n" of a file of the daemon in /proc.
func (t *target) value(file, key string) int64 {
	return endpoint.Value(fmt.Sprintf("/proc/%d/%s", t.Pid, file), key)
}

func (t *target) memory(key string) int64 { return t.value("status", key) << 10 }

// written counts what was made dirty less what was removed before it reached the disk.
func (t *target) written() int64 {
	return t.value("io", "write_bytes") - t.value("io", "cancelled_write_bytes")
}

// resetPeak makes VmHWM begin again at what is resident now (proc(5), clear_refs).
func (t *target) resetPeak() {
	if err := os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", t.Pid), []byte("5"), 0); err != nil {
		fmt.Fprintln(os.Stderr, "pull: peak memory is that since the daemon's start:", err)
	}
}
