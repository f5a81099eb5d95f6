package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"time"

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

// check tells of what is not as the book has it, and with repair puts it right.
func (p parts) check(ctx context.Context, repair bool, tell func(api.Finding)) error {
	report := reporter(tell)
	return errors.Join(p.pods.Check(ctx, repair, report), p.images.Check(ctx, repair, report))
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
	switch what {
	case "ops":
		err = unfinished(src, func(r api.Record) { _ = enc.Encode(r) })
	case "doctor":
		checkup(ctx, src, func(c api.Check) { _ = enc.Encode(api.Record{Check: &c}) })
	default:
		err = inspectTo(ctx, src, what, mend, stderr, func(f api.Finding) { _ = enc.Encode(api.Record{Finding: &f}) })
	}
	if err != nil {
		last.Error = &api.Error{Code: api.CodeFailed, Text: err.Error()}
	}
	return enc.Encode(last)
}

func inspectTo(ctx context.Context, src source, what string, mend bool, stderr io.Writer, tell func(api.Finding)) error {
	looks := map[string]func(*config, context.Context, bool, func(api.Finding)) error{"leaks": (*config).leaks, "check": (*config).check}
	look := looks[what]
	if look == nil {
		return fmt.Errorf("--inspect %q: want leaks, check, ops or doctor", what)
	}
	c, err := src.load()
	if err != nil {
		return err
	}
	// Before anything is made: a wrong state_dir is not to become a node.
	if _, err := os.Stat(c.book()); errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("book %s: %w: no berthd has run with this state_dir", c.book(), os.ErrNotExist)
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
	return look(c, ctx, mend, tell)
}

func (c *config) leaks(ctx context.Context, fix bool, tell func(api.Finding)) error {
	how := toLook
	if fix {
		how = toWrite
	}
	return c.observe(ctx, how, func(p parts) error { return p.leaks(ctx, fix, tell) })
}

// check looks, and with repair does what the start of a daemon does, looks again,
// and tells what has been put right by either.
func (c *config) check(ctx context.Context, repair bool, tell func(api.Finding)) error {
	var found []api.Finding
	collect := func(f api.Finding) { found = append(found, f) }
	err := c.observe(ctx, toLook, func(p parts) error { return p.check(ctx, false, collect) })
	if errors.Is(err, store.ErrCorrupt) {
		collect(api.Finding{Kind: "book", What: c.book(), Why: err.Error(), Consequence: "no berthd can read it: one that starts sets it aside, begins a new one, and finds pods and containers again by their notes",
			Remedy: "start berthd, or --repair; then pull images again"})
		err = nil
	}
	if err != nil || !repair {
		for _, f := range found {
			tell(f)
		}
		return err
	}
	before := found
	found = nil
	err = c.observe(ctx, toSettle, func(p parts) error { return p.check(ctx, true, collect) })
	same := func(a, b api.Finding) bool {
		// An image that lacks a layer may be hidden by now.
		return a.Kind == b.Kind && a.ID == b.ID && (a.What == b.What || a.Kind == "image")
	}
	for _, f := range before {
		if !slices.ContainsFunc(found, func(g api.Finding) bool { return same(f, g) }) {
			f.Mended = err == nil
			tell(f)
		}
	}
	for _, f := range found {
		tell(f)
	}
	return err
}

// What a process does that is no daemon.
const (
	toLook   = iota // read, and change nothing
	toWrite         // take charge of nothing, but what is done is written
	toSettle        // what a daemon does at its start
)

// settleLimit bounds how long that may take.
const settleLimit = 2 * time.Minute

// observe puts the parts together as they are without a daemon, for look to use.
func (c *config) observe(ctx context.Context, how int, look func(parts) error) (err error) {
	node, err := c.sandbox()
	if err != nil {
		return err
	}
	book, err := openBook(c.book(), how)
	if err != nil {
		return err
	}
	defer join(&err, book.Close)
	lock, err := lockDir(ctx, c.RunDir) // after the book, as a daemon does
	if err != nil {
		return c.wrong("run_dir", "%q: %w", c.RunDir, err)
	}
	defer join(&err, lock.Close)
	if how != toLook {
		if err := c.checkPlace(); err != nil {
			return err
		}
	}
	snapshots, err := overlay.New(c.StateDir, book)
	if err != nil {
		return err
	}
	imageConf, netConf := c.images(), c.network()
	imageConf.Observe, netConf.Observe, node.Observe = how != toSettle, how != toSettle, how != toSettle
	images, err := imageservice.New(ctx, imageConf, book, snapshots)
	if err != nil {
		return err
	}
	if how == toSettle {
		defer join(&err, images.Close)
		if err := c.tighten(); err != nil {
			return err
		}
		if err := c.privateRun(ctx); err != nil {
			return err
		}
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
	if how == toSettle {
		settled, cancel := context.WithTimeout(ctx, settleLimit)
		defer cancel()
		if err := pods.Settle(settled); err != nil {
			return err
		}
	}
	return look(parts{pods, images})
}

// openBook opens a book that exists. To be written, but not to settle, it has to be
// whole: nothing is set aside then.
func openBook(path string, how int) (*store.Store, error) {
	if how == toSettle {
		return store.Open(path)
	}
	book, err := store.Inspect(path)
	if err != nil || how == toLook {
		return book, err
	}
	if err := book.Close(); err != nil {
		return nil, err
	}
	return store.Open(path)
}
