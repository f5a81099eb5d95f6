package imageservice

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berthd/berth/snapshotter"
	"github.com/berthd/berth/test/disk"
	"github.com/berthd/berth/test/registry"
)

// scaled is a number that an environment variable may raise.
func scaled(t *testing.T, env string, usual int) int {
	t.Helper()
	s := os.Getenv(env)
	if s == "" {
		return usual
	}
	n, err := strconv.Atoi(s)
	if err != nil || n < 1 {
		t.Fatalf("%s=%q: want a number from 1", env, s)
	}
	return n
}

// mustDisk puts the node on a file system of its own.
func (n *node) mustDisk(kind string, size int64) *disk.Disk {
	n.t.Helper()
	n.close()
	d, err := disk.New(n.dir, kind, size)
	if errors.Is(err, disk.ErrNone) {
		n.open() // for the clean-up
		n.t.Skip(err)
	}
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { d.Close() })
	n.dir = d.Dir
	n.open()
	n.t.Cleanup(n.close) // before the disk goes
	return d
}

// TestFullDisk: an image can be removed from a full disk, and then there is room again.
func TestFullDisk(t *testing.T) {
	n := newNode(t)
	d := n.mustDisk("ext4", 96<<20)
	ctx := context.Background()
	img := mustBuild(t, registry.Spec{Layers: []registry.Layer{
		layerOf(registry.Plain, registry.File{Name: "a", Data: noise(12<<20, 1)}), layerOf(registry.Gzip, registry.File{Name: "b", Data: noise(8<<20, 2)})}})
	n.reg.Push("r", "v1", img)
	other := sample(t, "other")
	n.reg.Push("o", "v1", other)
	n.mustPull(n.reg.Ref("r", "v1"))
	if err := d.Fill(); err != nil {
		t.Fatal(err)
	}
	if _, err := n.Pull(ctx, n.reg.Ref("o", "v1"), nil); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("pull to a full disk: %v, want ENOSPC", err)
	}
	if got, err := n.Get(n.reg.Ref("r", "v1")); err != nil || got.ID != img.ConfigID {
		t.Errorf("the image that was there: %v, %v", got.ID, err)
	}
	if err := n.Remove(ctx, img.ConfigID); err != nil {
		t.Fatalf("remove from a full disk: %v", err)
	}
	if kept := n.kept(); len(kept) != 0 {
		t.Errorf("kept %q", kept)
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(d.Dir, &fs); err != nil || int64(fs.Bavail)*fs.Bsize < 15<<20 {
		t.Errorf("%d bytes free, %v; the image took 20 MiB", int64(fs.Bavail)*fs.Bsize, err)
	}
	if u, err := n.FsUsage(); err != nil || u.Bytes != 0 || u.Inodes != 0 {
		t.Errorf("usage %+v, %v; want nothing", u, err)
	}
	n.mustPull(n.reg.Ref("o", "v1"))
	if u, err := n.FsUsage(); err != nil || u.Bytes == 0 {
		t.Errorf("usage after a pull: %+v, %v", u, err)
	}
}

// TestSplitFilesystems: layers on a file system of their own are told apart from writable
// layers, and are durable all the same.
func TestSplitFilesystems(t *testing.T) {
	n := newNode(t)
	layers, snapshots := filepath.Join(n.dir, "state", "layers"), filepath.Join(n.dir, "state", "snapshots")
	if u, err := n.FsUsage(); err != nil || u.Writable != nil {
		t.Errorf("on one file system: %+v, %v", u, err)
	}
	n.close()
	if err := unix.Mount("tmpfs", layers, "tmpfs", 0, "mode=0700"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(layers, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	n.open(func(c *Config) { c.SnapshotsDir = snapshots })
	n.reg.Push("r", "v1", sample(t, "x"))
	n.mustPull(n.reg.Ref("r", "v1"))
	u, err := n.FsUsage()
	if err != nil || u.Mountpoint != layers || u.Bytes == 0 || u.Writable == nil {
		t.Fatalf("usage %+v, %v", u, err)
	}
	if w := u.Writable; w.Mountpoint != snapshots || w.Bytes == 0 || time.Since(w.At) > time.Minute {
		t.Errorf("writable layers: %+v", w)
	}
	n.close()
	n.open() // on the same mount; and closed before it goes
	t.Cleanup(n.close)
}

// TestPullRemoveRace: pulls and removals of images that share layers never break one. Each
// image is read through while others come and go.
func TestPullRemoveRace(t *testing.T) {
	n := newNode(t)
	rounds := scaled(t, "BERTH_STRESS_ROUNDS", 15)
	ctx := context.Background()
	names := []string{"a", "b", "c", "d"}
	for i, name := range names {
		layers := []registry.Layer{layerOf(registry.Gzip, registry.File{Name: "shared", Data: noise(5000, 1)}), layerOf(registry.Gzip, registry.File{Name: "second"})}
		if i%2 == 1 { // one more that two of them share
			layers = append(layers, layerOf(registry.Zstd, registry.File{Name: "third"}))
		}
		n.reg.Push(name, "v1", mustBuild(t, registry.Spec{Config: registry.Config{User: name},
			Layers: append(layers, layerOf(registry.Gzip, registry.File{Name: "own", Data: []byte(name)}))}))
	}
	var pulled, shared atomic.Int64
	var wg sync.WaitGroup
	for worker := range 6 {
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(uint64(worker), 1))
			for i := range rounds {
				name := names[rnd.IntN(len(names))]
				img, err := n.Pull(ctx, n.reg.Ref(name, "v1"), nil)
				if err != nil {
					t.Errorf("pull %s: %v", name, err)
					return
				}
				pulled.Add(1)
				// Another worker may remove the image at any moment, also before the
				// container is made; then there is nothing to read.
				key := fmt.Sprintf("c-%d-%d", worker, i)
				if _, err := n.sn.View(ctx, key, img.ChainID); err == nil {
					shared.Add(1)
					n.readThrough(key, name)
					if err := n.sn.Remove(ctx, key); err != nil {
						t.Errorf("remove %s: %v", key, err)
					}
				}
				if rnd.IntN(2) == 0 {
					if err := n.Remove(ctx, img.ID); err != nil && !errors.Is(err, ErrNotFound) {
						t.Errorf("remove %s: %v", name, err)
					}
				}
			}
		})
	}
	wg.Wait()
	t.Logf("%d pulls, %d images read while others came and went", pulled.Load(), shared.Load())
	for _, img := range n.List() {
		if err := n.Remove(ctx, img.ID); err != nil {
			t.Error(err)
		}
	}
	// Layers that a container had when the last image was removed go when somebody collects
	// after the container, as who removes containers does.
	if err := n.GC(ctx); err != nil {
		t.Error(err)
	}
	if kept := n.kept(); len(kept) != 0 {
		t.Errorf("left behind after %d pulls: %q", pulled.Load(), kept)
	}
	if u, err := n.FsUsage(); err != nil || u.Bytes != 0 {
		t.Errorf("usage at the end: %+v, %v", u, err)
	}
}

// readThrough reads the files of an image through a view of it.
func (n *node) readThrough(key, name string) {
	n.t.Helper()
	m, err := n.sn.Mounts(context.Background(), key)
	if err != nil {
		n.t.Errorf("mounts of %s: %v", key, err)
		return
	}
	got := map[string][]byte{}
	for _, dir := range lowers(m) {
		for _, f := range []string{"shared", "second", "own"} {
			if b, err := os.ReadFile(filepath.Join(dir, f)); err == nil {
				got[f] = b
			}
		}
	}
	if !bytes.Equal(got["shared"], noise(5000, 1)) || got["second"] == nil || string(got["own"]) != name {
		n.t.Errorf("image %s: %d bytes shared, second %v, own %q", name, len(got["shared"]), got["second"] != nil, got["own"])
	}
}

// lowers are the directories of the layers that a mount shows.
func lowers(mounts []snapshotter.Mount) []string {
	for _, o := range mounts[0].Options {
		if l, ok := strings.CutPrefix(o, "lowerdir="); ok {
			return strings.Split(l, ":")
		}
	}
	return []string{mounts[0].Source}
}
