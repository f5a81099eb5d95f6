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

// lossy is a snapshotter with a say in what its syncs tell, and in what comes after a commit.
type lossy struct {
	*overlay.Snapshotter
	sync      func() error
	committed func() error // nil for nothing
}

func (l *lossy) Commit(ctx context.Context, name, key string, opts ...snapshotter.Opt) error {
	if err := l.Snapshotter.Commit(ctx, name, key, opts...); err != nil || l.committed == nil {
		return err
	}
	return l.committed()
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
		return n.distrustLayers(ctx, []string{chain})
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

// TestLostWritesOfOthers: an error of which another pull is told may be about what a pull
// has left behind that ended before its own sync.
func TestLostWritesOfOthers(t *testing.T) {
	n := newNode(t)
	ctx := context.Background()
	l := &lossy{Snapshotter: n.sn, sync: func() error { return nil }}
	n.Service.sn = l
	push := func(name string) *registry.Image {
		img := mustBuild(t, registry.Spec{Layers: []registry.Layer{layerOf(registry.Gzip, registry.File{Name: name})}})
		n.reg.Push(name, "v1", img)
		return img
	}
	visible, left := push("visible"), push("left")
	push("told")
	n.mustPull(n.reg.Ref("visible", "v1"))
	early := errors.New("ends before its sync")
	l.committed = func() error { return early }
	if _, err := n.Pull(ctx, n.reg.Ref("left", "v1"), nil); !errors.Is(err, early) {
		t.Fatalf("pull that fails: %v", err)
	}
	l.committed = nil
	l.sync = func() error { return unix.EIO }
	if _, err := n.Pull(ctx, n.reg.Ref("told", "v1"), nil); !errors.Is(err, unix.EIO) {
		t.Fatalf("pull that is told: %v", err)
	}
	l.sync = func() error { return nil }
	n.mustPull(n.reg.Ref("left", "v1"))
	n.mustPull(n.reg.Ref("visible", "v1"))
	if gets := n.layerGets(left); gets != 2 {
		t.Errorf("the layer that may have lost writes was fetched %d times, want 2", gets)
	}
	if gets := n.layerGets(visible); gets != 1 {
		t.Errorf("the layer that was durable was fetched %d times, want once", gets)
	}
}
