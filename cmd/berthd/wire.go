package main

import (
	"context"
	"errors"
	"path/filepath"

	"github.com/berthd/berth/cni"
	"github.com/berthd/berth/cni/netns"
	"github.com/berthd/berth/cri"
	"github.com/berthd/berth/imageservice"
	"github.com/berthd/berth/imageservice/preload"
	"github.com/berthd/berth/sandbox"
	"github.com/berthd/berth/snapshotter/overlay"
	"github.com/berthd/berth/store"
)

// run puts the daemon together, from the book up, and serves until ctx ends.
// Locks make sure that there is one daemon per run directory and one per book.
// When the socket answers, lists are right. Everything ends in the opposite
// order.
func (d *daemon) run(ctx context.Context) (err error) {
	c := d.config
	files, err := inherited()
	if err != nil {
		return err
	}
	node, err := c.sandbox()
	if err != nil {
		return err
	}
	book, err := store.Open(c.book())
	if err != nil {
		return err
	}
	defer join(&err, book.Close)
	lock, err := c.claim(ctx)
	if err != nil {
		return err
	}
	defer join(&err, lock.Close)
	if err := overlay.Supported(c.StateDir); err != nil {
		return err
	}
	snapshots, err := overlay.New(c.StateDir, book)
	if err != nil {
		return err
	}
	defer join(&err, snapshots.Close)
	images, err := imageservice.New(ctx, c.images(), book, snapshots)
	if err != nil {
		return err
	}
	defer join(&err, images.Close)
	if err := c.privateRun(ctx); err != nil {
		return err
	}
	pins, err := netns.NewPins(filepath.Join(c.RunDir, "ns"))
	if err != nil {
		return err
	}
	network, err := cni.New(c.network())
	if err != nil {
		return err
	}
	defer background(ctx, "cni", network.Run)()
	plugins := c.plugins()
	pods, err := sandbox.New(ctx, node, sandbox.Deps{Store: book, Images: images, Snapshots: snapshots, Network: network, Pins: pins, Plugins: plugins})
	if err != nil {
		return err
	}
	defer join(&err, func() error { return closeWithin(pods.Close) })
	images.SetInUse(pods.ImagesInUse)
	snapshots.OnLeft(pods.SweepSoon)
	edge, err := cri.New(ctx, d.edge(network, plugins), cri.Deps{
		Pods: pods, Containers: pods, Observer: pods, Exec: pods, Streams: pods, Meter: pods, Resizer: pods, Events: pods,
		Node: pods, Network: network, Images: images,
	})
	if err != nil {
		return err
	}
	stopAdmin, err := d.serveAdmin(ctx, parts{pods, images}, edge)
	if err != nil {
		return err
	}
	defer stopAdmin()
	defer background(ctx, "preload", preload.New(c.PreloadDir, c.PreloadPin, book, images).Run)()
	d.onReload("log", d.setLogLevel)
	d.onReload("network", func(*config) error { network.Reload(); return nil })
	d.onReload("images", func(c *config) error { return errors.Join(images.SetPinned(c.PinnedImages), images.Reload()) })
	return d.serve(ctx, edge, files)
}
