package imageservice

import (
	"context"
	"errors"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/berthd/berth/snapshotter"
	"github.com/berthd/berth/snapshotter/overlay"
	"github.com/berthd/berth/test/registry"
)

// lossy is a snapshotter with a say in what its syncs tell.
type lossy struct {
	*overlay.Snapshotter
	sync func() error
}

func (l *lossy) Watch() (snapshotter.Watch, error) {
	w, err := l.Snapshotter.Watch()
	return &lossyWatch{w, l.sync}, err
}

type lossyWatch struct {
	snapshotter.Watch
	sync func() error
}

func (w *lossyWatch) Sync(ctx context.Context) error { return errors.Join(w.sync(), w.Watch.Sync(ctx)) }

// TestLostWrites: the kernel tells of a write that the disk refused once. What that may be
// about is not taken for whole by the next pull, nor by another one that shares it.
func TestLostWrites(t *testing.T) {
	n := newNode(t)
	ctx := context.Background()
	l := &lossy{Snapshotter: n.sn, sync: func() error { return unix.EIO }}
	n.Service.sn = l
	shared := layerOf(registry.Gzip, registry.File{Name: "shared", Data: noise(3000, 1)})
	a := mustBuild(t, registry.Spec{Layers: []registry.Layer{shared, layerOf(registry.Gzip, registry.File{Name: "a"})}})
	b := mustBuild(t, registry.Spec{Layers: []registry.Layer{shared, layerOf(registry.Gzip, registry.File{Name: "b"})}})
	n.reg.Push("a", "v1", a)
	n.reg.Push("b", "v1", b)
	if _, err := n.Pull(ctx, n.reg.Ref("a", "v1"), nil); !errors.Is(err, unix.EIO) || len(n.List()) != 0 {
		t.Fatalf("pull with writes that were lost: %v, images %+v", err, n.List())
	}
	l.sync = func() error { return nil }
	n.mustPull(n.reg.Ref("a", "v1"))
	if gets := n.layerGets(a); gets != 4 {
		t.Errorf("layers were fetched %d times, want both twice", gets)
	}
	// The durable layer is not touched by the failure of who shares it.
	l.sync = func() error { return unix.ENOSPC }
	if _, err := n.Pull(ctx, n.reg.Ref("b", "v1"), nil); !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("pull of b: %v", err)
	}
	if damaged := n.damagedOf([]string{n.List()[0].ChainID}); len(n.List()) != 1 || len(damaged) != 0 {
		t.Errorf("images %+v, damaged %q", n.List(), damaged)
	}
	l.sync = func() error { return nil }
	chain := n.mustPull(n.reg.Ref("b", "v1")).ChainID
	if err := n.Remove(ctx, b.ConfigID); err != nil {
		t.Fatal(err)
	}
	// Another pull with the same layer is told first.
	l.sync = func() error {
		n.distrustLayers([]string{chain})
		return nil
	}
	if _, err := n.Pull(ctx, n.reg.Ref("b", "v1"), nil); !errors.Is(err, errLost) {
		t.Errorf("pull of what another one's sync found lost: %v", err)
	}
	l.sync = func() error { return nil }
	img := n.mustPull(n.reg.Ref("b", "v1"))
	if got, _, err := n.readIn(img, "shared"); err != nil || got != string(noise(3000, 1)) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
}
