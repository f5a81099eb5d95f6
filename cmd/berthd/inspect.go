package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"k8s.io/klog/v2"
	"k8s.io/klog/v2/textlogger"

	"github.com/berthd/berth/cni"
	"github.com/berthd/berth/cni/netns"
	"github.com/berthd/berth/cri/admin/api"
	"github.com/berthd/berth/imageservice"
	"github.com/berthd/berth/sandbox"
	"github.com/berthd/berth/snapshotter/overlay"
	"github.com/berthd/berth/store"
)

// A look at the node is asked of the daemon over the admin socket, or, while none
// runs, taken by a process of its own: berthd --inspect, which berth starts. That has
// the locks that a daemon has, so that the two never work at once.

// parts are what knows what belongs to whom.
type parts struct {
	pods   *sandbox.Service
	images *imageservice.Service
}

// leaks tells of what nobody owns, and with fix removes it.
func (p parts) leaks(ctx context.Context, fix bool, tell func(api.Finding)) error {
	report := reporter(tell)
	// Containers first: layers are kept by them.
	return errors.Join(p.pods.Leaks(ctx, fix, report), p.images.Leaks(ctx, fix, report))
}

// reporter turns findings into what is sent.
func reporter(tell func(api.Finding)) store.Report {
	return func(f store.Finding, mended bool, err error) {
		out := api.Finding{Kind: f.Kind, ID: f.ID, What: f.What, Why: f.Why, Consequence: f.Consequence, Remedy: f.Remedy,
			Since: f.Since, Mendable: f.Mend != nil, Mended: mended}
		if err != nil {
			out.Error = err.Error()
		}
		tell(out)
	}
}

// inspect answers --inspect with records, as the admin socket does.
func inspect(src source, what string, mend bool, stdout, stderr io.Writer) error {
	ctx, stop := stopOnSignal()
	defer stop()
	enc := json.NewEncoder(stdout)
	last := api.Record{Done: true}
	var err error
	if what == "ops" {
		err = unfinished(src, func(r api.Record) { _ = enc.Encode(r) })
	} else {
		err = inspectTo(ctx, src, what, mend, stderr, func(f api.Finding) { _ = enc.Encode(api.Record{Finding: &f}) })
	}
	if err != nil {
		last.Error = &api.Error{Code: api.CodeFailed, Text: err.Error()}
	}
	return enc.Encode(last)
}

func inspectTo(ctx context.Context, src source, what string, mend bool, stderr io.Writer, tell func(api.Finding)) error {
	if what != "leaks" {
		return fmt.Errorf("--inspect %q: want leaks or ops", what)
	}
	c, err := src.load()
	if err != nil {
		return err
	}
	// Before anything is made: a wrong state_dir is not to become a node.
	path := filepath.Join(c.StateDir, "book.db")
	if _, err := os.Stat(path); errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("book %s: %w: no berthd has run with this state_dir", path, os.ErrNotExist)
	}
	if err := adapt(c); err != nil {
		return err
	}
	log := klog.Logger{} // discards: what is found is told otherwise
	if c.LogLevel > 2 {
		log = textlogger.NewLogger(textlogger.NewConfig(textlogger.Verbosity(int(c.LogLevel)), textlogger.Output(stderr)))
	}
	klog.SetLoggerWithOptions(log, klog.ContextualLogger(true))
	ctx = klog.NewContext(ctx, log)
	return c.observe(ctx, path, mend, func(p parts) error { return p.leaks(ctx, mend, tell) })
}

// observe puts the parts together as they are without a daemon, for look to use.
func (c *config) observe(ctx context.Context, path string, write bool, look func(parts) error) (err error) {
	node, err := c.sandbox()
	if err != nil {
		return err
	}
	book, err := store.Inspect(path)
	if err != nil {
		return err
	}
	if write { // now that it is known to be whole, and nothing would be set aside
		if err := book.Close(); err != nil {
			return err
		}
		if book, err = store.Open(path); err != nil {
			return err
		}
	}
	defer join(&err, book.Close)
	lock, err := lockDir(ctx, c.RunDir) // after the book, as a daemon does
	if err != nil {
		return c.wrong("run_dir", "%q: %w", c.RunDir, err)
	}
	defer join(&err, lock.Close)
	snapshots, err := overlay.New(c.StateDir, book)
	if err != nil {
		return err
	}
	imageConf, netConf := c.images(), c.network()
	imageConf.Observe, netConf.Observe, node.Observe = true, true, true
	images, err := imageservice.New(ctx, imageConf, book, snapshots)
	if err != nil {
		return err
	}
	pins, err := netns.NewPins(filepath.Join(c.RunDir, "ns"))
	if err != nil {
		return err
	}
	network, err := cni.New(netConf)
	if err != nil {
		return err
	}
	pods, err := sandbox.New(ctx, node, sandbox.Deps{Store: book, Images: images, Snapshots: snapshots, Network: network, Pins: pins})
	if err != nil {
		return err
	}
	defer join(&err, func() error { return closeWithin(pods.Close) })
	images.SetInUse(pods.ImagesInUse)
	return look(parts{pods, images})
}
