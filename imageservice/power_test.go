package imageservice

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/berthd/berth/test/disk"
	"github.com/berthd/berth/test/registry"
)

// TestPowerLoss takes the power away from the disk with the book and the layers at random
// moments of pulls and removals. After each time what the book lists is whole to the last
// byte, without any help by the check at the start; a pull that was reported done is there;
// and what is left over is swept. BERTH_POWER_CUTS is how often, on each file system.
func TestPowerLoss(t *testing.T) {
	cuts := scaled(t, "BERTH_POWER_CUTS", 2)
	for _, kind := range []string{"ext4", "xfs"} {
		t.Run(kind, func(t *testing.T) {
			n := newNode(t)
			d := n.mustDisk(kind, 384<<20)
			refs := n.pushOverlapping()
			seed := uint64(time.Now().UnixNano())
			t.Logf("seed %d", seed)
			rnd := rand.New(rand.NewPCG(seed, 0))
			whole, promised := 0, 0
			for i := range cuts {
				w, p := n.cut(d, refs, time.Duration(rnd.Int64N(int64(1500*time.Millisecond))))
				whole, promised = whole+w, promised+p
				if t.Failed() {
					t.Fatalf("at cut %d", i+1)
				}
			}
			t.Logf("%d cuts: %d images listed afterwards, all whole; %d pulls had been reported done and not removed, all there", cuts, whole, promised)
		})
	}
}

// pushOverlapping offers images that share layers, of a few MiB and with many files.
func (n *node) pushOverlapping() (refs []string) {
	n.t.Helper()
	many := make([]registry.File, 400)
	for i := range many {
		many[i] = registry.File{Name: fmt.Sprintf("many/%d", i), Data: noise(200+i*7, byte(i))}
	}
	shared := []registry.Layer{layerOf(registry.Gzip, registry.File{Name: "base", Data: noise(3<<20, 1)}), layerOf(registry.Zstd, many...)}
	for i := range 4 {
		name := fmt.Sprintf("p%d", i)
		layers := append(slices.Clone(shared[:1+i%2]), layerOf(registry.Gzip, registry.File{Name: "own", Data: noise(1<<20, byte(10+i))}))
		n.reg.Push(name, "v1", mustBuild(n.t, registry.Spec{Config: registry.Config{User: name}, Layers: layers}))
		refs = append(refs, n.reg.Ref(name, "v1"))
	}
	return refs
}

// cut lets a process pull and remove for a while, takes the power, and looks. It returns
// how many images were listed, and how many had to be.
func (n *node) cut(d *disk.Disk, refs []string, after time.Duration) (whole, promised int) {
	n.t.Helper()
	ctx := context.Background()
	n.close()
	said := pullAndKill(n.t, n.dir+"|"+strings.Join(refs, " "), after, d.Cut)
	if err := d.Restore(); err != nil {
		n.t.Fatal(err)
	}
	n.open()
	for id, r := range n.view.Load().rows {
		if r.Damaged {
			n.t.Errorf("the check at the start had to hide %s", id)
		}
	}
	res, err := n.Verify(ctx, nil, VerifyOptions{Report: func(r LayerReport) {
		if r.Damaged {
			n.t.Errorf("%s, layer %d: %d deviations %q, %v", r.Name, r.Number, r.Count, r.Deviating, r.Err)
		}
	}})
	if err != nil {
		n.t.Error(err)
	}
	for ref, last := range said {
		if last != '+' {
			continue
		}
		promised++
		if _, err := n.Get(ref); err != nil {
			n.t.Errorf("%s was pulled before the power went: %v", ref, err)
		}
	}
	if err := errors.Join(n.GC(ctx), n.sn.Cleanup(ctx)); err != nil {
		n.t.Error(err)
	}
	n.nothingOrphaned()
	return res.Images, promised
}

// nothingOrphaned: on disk are the layers and manifests of images, and nothing else.
func (n *node) nothingOrphaned() {
	n.t.Helper()
	chains := n.view.Load().chains
	if kept := n.kept(); len(kept) != len(chains) {
		n.t.Errorf("snapshots %q for layers %v", kept, chains)
	}
	for dir, want := range map[string]int{"layers": len(chains), "manifests": len(chains), "snapshots": 0} {
		entries, err := os.ReadDir(filepath.Join(n.dir, "state", dir))
		if err != nil || len(entries) != want {
			n.t.Errorf("%d entries in %s, %v; want %d", len(entries), dir, err, want)
		}
	}
}
