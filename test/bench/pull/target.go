package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berthd/berth/test/node"
)

// target is a CRI endpoint and the daemon behind it.
type target struct {
	name    string
	version string
	client  *node.Client
	pid     int
	idle    int64 // resident bytes before the first pull
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
	Growth        int64 // of PeakRSS over the daemon's size before its first pull
	RemoveSeconds float64
	RemoveCPU     float64
}

// openTargets connects to the endpoints, or starts a berthd when there are none.
// The function that it returns is to be called in any case.
func openTargets(ctx context.Context, o options, reg *registry) (targets []*target, closeAll func(), err error) {
	var closers []func()
	closeAll = func() {
		for _, c := range slices.Backward(closers) {
			c()
		}
	}
	endpoints := o.endpoints
	if len(endpoints) == 0 {
		n, stop, err := ownNode(ctx, o, reg)
		closers = append(closers, stop)
		if err != nil {
			return nil, closeAll, err
		}
		endpoints = []string{"berth=" + n.Socket}
	}
	for _, e := range endpoints {
		name, address, _ := strings.Cut(e, "=")
		t, err := dial(ctx, name, address)
		if err != nil {
			return nil, closeAll, fmt.Errorf("endpoint %s: %w", e, err)
		}
		closers = append(closers, func() { t.client.Close() })
		targets = append(targets, t)
	}
	return targets, closeAll, nil
}

// ownNode starts a berthd with its state below o.dir.
func ownNode(ctx context.Context, o options, reg *registry) (*node.Node, func(), error) {
	dir, err := os.MkdirTemp(o.dir, "bench-pull-")
	if err != nil {
		return nil, func() {}, err
	}
	stop := func() { os.RemoveAll(dir) }
	bin := o.bin
	if bin == "" {
		root, err := node.Root()
		if err != nil {
			return nil, stop, err
		}
		if bin, err = node.Build(ctx, root, dir); err != nil {
			return nil, stop, err
		}
	}
	conf := fmt.Sprintf("state_dir = %q\n%s", filepath.Join(dir, "state"), o.config)
	n, err := node.New(node.Options{Bin: bin, CNI: node.NoCNI, Registries: []string{reg.address}, Config: conf, Without: []string{"state_dir"}})
	if err != nil {
		return nil, stop, err
	}
	stop = func() {
		if err := errors.Join(n.Close(), os.RemoveAll(dir)); err != nil {
			fmt.Fprintln(os.Stderr, "pull: end of berthd:", err)
		}
	}
	ready, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	return n, stop, n.Start(ready)
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
	if err != nil {
		return nil, errors.Join(err, c.Close())
	}
	t.version = v.RuntimeName + " " + v.RuntimeVersion
	if t.pid, err = peer(strings.TrimPrefix(address, "unix://")); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	t.idle = t.memory("VmRSS")
	return t, nil
}

// peer returns the process that listens at a unix socket.
func peer(socket string) (int, error) {
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

// round pulls an image and removes it.
func (t *target) round(ctx context.Context, timeout time.Duration, img image, ref string) (s sample, err error) {
	s = sample{Image: img.Name, Target: t.name}
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
	if _, err := t.client.Images.RemoveImage(ctx, &runtime.RemoveImageRequest{Image: spec}); err != nil {
		return s, err
	}
	t.resetPeak()
	written := t.written()
	s.PullSeconds, s.PullCPU, err = do(func(ctx context.Context) error {
		_, err := t.client.Pull(ctx, ref)
		return err
	})
	if err != nil {
		return s, fmt.Errorf("pull: %w", err)
	}
	s.PeakRSS = t.memory("VmHWM")
	s.Growth = s.PeakRSS - t.idle
	s.Written = t.written() - written
	s.RemoveSeconds, s.RemoveCPU, err = do(func(ctx context.Context) error {
		_, err := t.client.Images.RemoveImage(ctx, &runtime.RemoveImageRequest{Image: spec})
		return err
	})
	if err != nil {
		return s, fmt.Errorf("removal: %w", err)
	}
	return s, nil
}

// cpu returns the seconds of processor time that the daemon and the children
// that it waited for have used. USER_HZ is 100 wherever Go runs on Linux.
func (t *target) cpu() float64 {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", t.pid))
	if err != nil {
		return 0
	}
	// The name in parentheses may hold anything; the state is field 3.
	fields := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	if len(fields) < 15 {
		return 0
	}
	var ticks float64
	for _, f := range fields[11:15] { // utime, stime, cutime, cstime
		v, _ := strconv.ParseFloat(f, 64)
		ticks += v
	}
	return ticks / 100
}

// value finds a line "key: n" of a file of the daemon in /proc.
func (t *target) value(file, key string) int64 {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", t.pid, file))
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, key+":"); ok {
			n, _ := strconv.ParseInt(strings.Fields(v)[0], 10, 64)
			return n
		}
	}
	return 0
}

func (t *target) memory(key string) int64 { return t.value("status", key) << 10 }

// written counts what was made dirty less what was removed before it reached the disk.
func (t *target) written() int64 {
	return t.value("io", "write_bytes") - t.value("io", "cancelled_write_bytes")
}

// resetPeak makes VmHWM begin again at what is resident now (proc(5), clear_refs).
func (t *target) resetPeak() {
	if err := os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", t.pid), []byte("5"), 0); err != nil {
		fmt.Fprintln(os.Stderr, "pull: peak memory is that since the daemon's start:", err)
	}
}
