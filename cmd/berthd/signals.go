package main

import (
	"context"
	"os"
	"os/signal"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"k8s.io/klog/v2"
	"k8s.io/klog/v2/textlogger"
)

// daemon is what lives as long as the process does.
type daemon struct {
	source  source
	logs    *textlogger.Config
	manager notifier
	stop    context.CancelFunc // ends the daemon

	mu        sync.Mutex
	config    *config    // in force; guarded by mu
	reloaders []reloader // what a reload tells; guarded by mu
}

// reloader is a part of the daemon that takes a new configuration.
type reloader struct {
	part string
	take func(*config) error
}

// catch handles signals until the function that it returns is called.
//
// SIGPIPE is caught to be ignored: without it, Go ends a process whose log
// goes to a broken pipe, and ignoring it for good would be inherited by shims.
func (d *daemon) catch(ctx context.Context) (stop func()) {
	ch := make(chan os.Signal, 8)
	signal.Notify(ch, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGUSR1, syscall.SIGPIPE)
	done := make(chan struct{})
	go func() {
		for {
			select {
			case <-done:
				return
			case s := <-ch:
				d.handle(ctx, s)
			}
		}
	}()
	return func() {
		signal.Stop(ch)
		close(done)
	}
}

func (d *daemon) handle(ctx context.Context, s os.Signal) {
	log := klog.FromContext(ctx)
	switch s {
	case syscall.SIGTERM, syscall.SIGINT:
		log.Info("Stopping, containers go on", "signal", s.String())
		d.manager.stopping()
		d.stop()
	case syscall.SIGHUP:
		d.reload(ctx)
	case syscall.SIGUSR1:
		log.Info("Goroutines", "stacks", stacks())
	}
}

// stopOnSignal is the life of a command that is not the daemon.
func stopOnSignal() (context.Context, context.CancelFunc) {
	return signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
}

// onReload adds a part to tell when the configuration has been read again.
func (d *daemon) onReload(part string, take func(*config) error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.reloaders = append(d.reloaders, reloader{part, take})
}

// reload reads the configuration again. What can be changed while the daemon
// runs is; the rest is named in the log. After an error the old one stays.
func (d *daemon) reload(ctx context.Context) {
	log := klog.FromContext(ctx)
	d.manager.reloading()
	defer d.manager.ready(d.serving())
	now, err := d.source.load()
	if err != nil {
		log.Error(err, "Configuration not reloaded, the old one stays in force")
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	changed := d.config.difference(now)
	var live, later []string
	for _, key := range changed {
		if slices.ContainsFunc(now.fields(), func(f *field) bool { return f.key == key && f.reload }) {
			live = append(live, key)
		} else {
			later = append(later, key)
		}
	}
	d.config.take(now)
	for _, r := range d.reloaders {
		if err := r.take(d.config); err != nil {
			log.Error(err, "Configuration not taken", "part", r.part)
		}
	}
	log.Info("Configuration reloaded", "changed", strings.Join(live, " "))
	if len(later) > 0 {
		log.Info("Changes that wait for a restart", "keys", strings.Join(later, " "))
	}
}

// take copies the keys that a reload may change.
func (c *config) take(from *config) {
	now := from.fields()
	for i, f := range c.fields() {
		if f.reload {
			_ = f.set(now[i].get()) // it has been accepted once
		}
	}
}

// setLogLevel is the verbosity of all loggers.
func (d *daemon) setLogLevel(c *config) error {
	return d.logs.Verbosity().Set(strconv.FormatInt(c.LogLevel, 10))
}

// serving is what the service manager shows.
func (d *daemon) serving() string { return "Serving on " + d.config.Socket }

// maxStacks bounds a dump of goroutines, in bytes.
const maxStacks = 4 << 20

func stacks() string {
	b := make([]byte, maxStacks)
	return string(b[:runtime.Stack(b, true)])
}
