package main

import (
	"context"
	"errors"
	"net"
	"net/http"
	"os"
	"sync"
	"time"

	"k8s.io/klog/v2"

	"github.com/berthd/berth/cri"
)

// closeTimeout is how long operations under way are waited for at the end.
// What they have not finished is taken up by the next start.
const closeTimeout = 5 * time.Second

// serve opens the sockets, tells the service manager and answers until ctx
// ends.
func (d *daemon) serve(ctx context.Context, edge *cri.Server, files []*os.File) error {
	l, err := listen(ctx, d.config.Socket, files, d.manager)
	if err != nil {
		return err
	}
	metrics, err := listenMetrics(ctx, d.config.MetricsListen)
	if err != nil {
		return errors.Join(d.config.wrong("metrics_listen", "%q: %w", d.config.MetricsListen, err), l.Close())
	}
	if metrics != nil {
		defer background(ctx, "metrics", func(ctx context.Context) error { return serveHTTP(ctx, metrics, edge.MetricsHandler()) })()
	}
	stopStreams, err := d.serveStreams(ctx, edge)
	if err != nil {
		return errors.Join(err, l.Close())
	}
	defer stopStreams()
	if every := watchdogInterval(); every > 0 {
		defer background(ctx, "watchdog", func(ctx context.Context) error { return d.watchdog(ctx, every, edge.Alive) })()
	}
	d.manager.ready(d.serving())
	klog.FromContext(ctx).Info("Serving", "socket", d.config.Socket, "metrics", d.config.MetricsListen, "streams", edge.StreamURL())
	return edge.Serve(ctx, l)
}

// watchdog tells the service manager at every interval that the daemon
// answers. If alive hangs, it does not, and the manager starts a new one;
// containers do not notice.
func (d *daemon) watchdog(ctx context.Context, every time.Duration, alive func()) error {
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
			alive()
			d.manager.send("WATCHDOG=1")
		}
	}
}

// serveHTTP answers until ctx ends. Every step of a request is bounded.
func serveHTTP(ctx context.Context, l net.Listener, h http.Handler) error {
	s := &http.Server{
		Handler: h, ReadTimeout: 10 * time.Second, WriteTimeout: 30 * time.Second,
		IdleTimeout: time.Minute, MaxHeaderBytes: 16 << 10,
	}
	defer context.AfterFunc(ctx, func() { _ = s.Close() })()
	if err := s.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// background runs f until the function that it returns is called, which waits
// for its end. Its error goes to the log: the daemon can do without it.
func background(ctx context.Context, name string, f func(context.Context) error) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := f(ctx); err != nil {
			klog.FromContext(ctx).Error(err, "Background work ended", "work", name)
		}
	})
	return func() {
		cancel()
		wg.Wait()
	}
}

// join adds the error of a close to err.
func join(err *error, closed func() error) { *err = errors.Join(*err, closed()) }

// closeWithin gives a close its time.
func closeWithin(closed func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(context.Background(), closeTimeout)
	defer cancel()
	return closed(ctx)
}
