package imageservice

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/berthd/berth/test/registry"
)

// crash ends the service without its knowing, as a kill does.
func (n *node) crash() {
	n.t.Helper()
	if err := errors.Join(n.sn.Close(), n.book.Close()); err != nil {
		n.t.Fatal(err)
	}
}

// layerDir is where layer i of an image is.
func (n *node) layerDir(img Image, i int) string {
	n.t.Helper()
	dir, err := n.sn.Locate(context.Background(), n.chain(img, i))
	if err != nil {
		n.t.Fatal(err)
	}
	return dir
}

func (n *node) chain(img Image, i int) string { return n.view.Load().rows[img.ID].Layers[i].ChainID }

func mustEmpty(t *testing.T, dir string) {
	t.Helper()
	for _, e := range must(os.ReadDir(dir))(t) {
		if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
			t.Fatal(err)
		}
	}
}

// TestCheckAfterCrash: what a power cut makes of files that were not synced is noticed at
// the next start; the image is hidden, and pulling it again makes only the damaged layer.
func TestCheckAfterCrash(t *testing.T) {
	for name, harm := range map[string]func(*testing.T, *node, Image){
		"layer empty":    func(t *testing.T, n *node, img Image) { mustEmpty(t, n.layerDir(img, 1)) },
		"layer gone":     func(t *testing.T, n *node, img Image) { os.RemoveAll(n.layerDir(img, 1)) },
		"manifest gone":  func(t *testing.T, n *node, img Image) { os.Remove(n.manifests.path(n.chain(img, 1))) },
		"manifest empty": func(t *testing.T, n *node, img Image) { os.Truncate(n.manifests.path(n.chain(img, 1)), 0) },
		"manifest of zeros": func(t *testing.T, n *node, img Image) {
			os.WriteFile(n.manifests.path(n.chain(img, 1)), make([]byte, 4096), 0o600)
		},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			one, other := sample(t, "one"), sample(t, "other") // the base is the same
			n.reg.Push("one", "v1", one)
			n.reg.Push("other", "v1", other)
			img := n.mustPull(n.reg.Ref("one", "v1"))
			n.mustPull(n.reg.Ref("other", "v1"))
			if _, err := n.Pin(img.ID, true); err != nil {
				t.Fatal(err)
			}
			harm(t, n, img)
			before := n.layerGets(one)
			n.crash()
			n.open()
			if _, err := n.Get(img.ID); !errors.Is(err, ErrNotFound) {
				t.Errorf("the damaged image is shown: %v", err)
			}
			if _, err := n.Get(other.ConfigID); err != nil {
				t.Errorf("the other image: %v", err)
			}
			n.crash() // what was found is not forgotten
			n.open()
			if got := n.mustPull(n.reg.Ref("one", "v1")); got.ID != img.ID || !got.Pinned {
				t.Errorf("pulled again: %+v", got)
			}
			if gets := n.layerGets(one) - before; gets != 1 {
				t.Errorf("%d layers fetched, want the damaged one", gets)
			}
			if r, err := n.Verify(context.Background(), nil, VerifyOptions{}); err != nil || r.Damaged != 0 || r.Layers != 5 {
				t.Errorf("verified: %+v, %v", r, err)
			}
		})
	}
}

// TestCleanStop: after a clean stop in the same boot nothing is checked, after a reboot all is.
func TestCleanStop(t *testing.T) {
	boot := func(id string) func(*Config) { return func(c *Config) { c.BootID = id } }
	n := newNode(t, boot("first"))
	n.reg.Push("r", "v1", sample(t, "x"))
	img := n.mustPull(n.reg.Ref("r", "v1"))
	mustEmpty(t, n.layerDir(img, 0))
	n.close()
	n.open(boot("first"))
	if _, err := n.Get(img.ID); err != nil {
		t.Errorf("checked after a clean stop: %v", err)
	}
	n.close()
	n.open(boot("second"))
	if _, err := n.Get(img.ID); !errors.Is(err, ErrNotFound) {
		t.Errorf("not checked after a reboot: %v", err)
	}
}

// TestHidden: a hidden image that nobody pulls again is dropped with the next start, but
// for a pinned one; and a tag that went to another image meanwhile stays there.
func TestHidden(t *testing.T) {
	n := newNode(t)
	ctx := context.Background()
	first, second := sample(t, "first"), sample(t, "second")
	n.reg.Push("a", "v1", first)
	img := n.mustPull(n.reg.Ref("a", "v1"))
	mustEmpty(t, n.layerDir(img, 2))
	n.crash()
	n.open()
	n.reg.Push("a", "v1", second)
	n.mustPull(n.reg.Ref("a", "v1"))
	back := n.mustPull(n.reg.Ref("a", first.Digest))
	if got, err := n.Get(n.reg.Ref("a", "v1")); err != nil || got.ID != second.ConfigID || len(back.RepoTags) != 0 {
		t.Errorf("the tag means %s, %v, and the first image has %q", got.ID, err, back.RepoTags)
	}
	if _, err := n.Pin(second.ConfigID, true); err != nil {
		t.Fatal(err)
	}
	mustEmpty(t, n.layerDir(back, 2))
	mustEmpty(t, n.layerDir(must(n.Get(second.ConfigID))(t), 2))
	n.crash()
	n.open()
	n.close()
	n.open()
	rows := n.view.Load().rows
	if rows[first.ConfigID] != nil || rows[second.ConfigID] == nil || len(n.List()) != 0 {
		t.Errorf("rows %v, shown %v", rows, n.List())
	}
	if r, err := n.Verify(ctx, nil, VerifyOptions{Repair: true}); err != nil || r.Repaired != 1 {
		t.Errorf("repair of a hidden image: %+v, %v", r, err)
	}
	if got, err := n.Get(n.reg.Ref("a", "v1")); err != nil || !got.Pinned {
		t.Errorf("after the repair: %+v, %v", got, err)
	}
}

func TestVerifyRepair(t *testing.T) {
	n := newNode(t)
	ctx := context.Background()
	img := mustBuild(t, registry.Spec{Layers: []registry.Layer{layerOf(registry.Gzip, registry.File{Name: "base", Data: []byte("base")}),
		layerOf(registry.Zstd, registry.File{Name: "file", Data: noise(9000, 3)}), layerOf(registry.Plain, registry.File{Name: "top"})}})
	n.reg.Push("r", "v1", img)
	got := n.mustPull(n.reg.Ref("r", "v1"))
	if _, err := n.sn.Prepare(ctx, "container", got.ChainID); err != nil {
		t.Fatal(err)
	}
	old := n.layerDir(got, 1)
	f := filepath.Join(old, "file")
	st := must(os.Stat(f))(t)
	bad := noise(9000, 3)
	bad[4711] ^= 0x10
	if err := errors.Join(os.WriteFile(f, bad, 0o644), os.Chtimes(f, st.ModTime(), st.ModTime())); err != nil {
		t.Fatal(err)
	}
	if r, err := n.Verify(ctx, []string{got.ID}, VerifyOptions{Quick: true}); err != nil || r.Damaged != 0 || r.Bytes != 0 {
		t.Errorf("quick: %+v, %v", r, err)
	}
	var reports []LayerReport
	o := VerifyOptions{Report: func(r LayerReport) { reports = append(reports, r) }}
	r, err := n.Verify(ctx, nil, o)
	if err != nil || r.Images != 1 || r.Layers != 3 || r.Damaged != 1 || r.Repaired != 0 {
		t.Errorf("verified: %+v, %v", r, err)
	}
	if len(reports) != 3 || !reports[1].Damaged || reports[0].Damaged || len(reports[1].Deviating) != 1 || !strings.Contains(reports[1].Deviating[0], "content") {
		t.Errorf("reports %+v", reports)
	}
	before := n.layerGets(img)
	o.Repair, reports = true, nil
	if r, err = n.Verify(ctx, []string{n.reg.Ref("r", "v1")}, o); err != nil || r.Damaged != 1 || r.Repaired != 1 || len(reports) != 4 || !reports[3].Repaired {
		t.Errorf("repaired: %+v, %v, %+v", r, err, reports)
	}
	if gets := n.layerGets(img) - before; gets != 1 {
		t.Errorf("%d layers fetched, want the damaged one", gets)
	}
	if r, err = n.Verify(ctx, nil, VerifyOptions{}); err != nil || r.Damaged != 0 {
		t.Errorf("after the repair: %+v, %v", r, err)
	}
	// The container may still show the old tree; then it goes.
	if b, err := os.ReadFile(f); err != nil || !slices.Equal(b, bad) {
		t.Errorf("the tree under the container was touched: %v", err)
	}
	if err := errors.Join(n.sn.Remove(ctx, "container"), n.GC(ctx)); err != nil {
		t.Error(err)
	}
	waitFor(t, "the old tree's end", func() bool {
		_, err := os.Stat(old)
		return errors.Is(err, os.ErrNotExist)
	})
	if kept := n.kept(); len(kept) != 3 {
		t.Errorf("kept %q", kept)
	}
	if _, err := n.Verify(ctx, []string{"nothing/here:1"}, VerifyOptions{}); !errors.Is(err, ErrNotFound) {
		t.Errorf("verify of nothing: %v", err)
	}
}

// TestRepairFails: a layer that nobody has any more stays marked, and an import heals it.
func TestRepairFails(t *testing.T) {
	n := newNode(t)
	ctx := context.Background()
	img := sample(t, "x")
	f := n.mustArchive(registry.DockerSave(registry.Named{Image: img, Names: []string{"h.example/x:1"}}))
	images, err := n.Import(ctx, f, ImportOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(n.layerDir(images[0], 2), "own"), []byte("changed"), 0o644); err != nil {
		t.Fatal(err)
	}
	var last LayerReport
	r, err := n.Verify(ctx, nil, VerifyOptions{Repair: true, Report: func(r LayerReport) { last = r }})
	if err != nil || r.Damaged != 1 || r.Repaired != 0 || last.Repaired || !errors.Is(last.Err, ErrUnsupported) || !strings.Contains(last.Err.Error(), "import it again") {
		t.Errorf("repair without a registry: %+v, %v, %+v", r, err, last)
	}
	if images, err = n.Import(ctx, f, ImportOptions{}); err != nil || len(images) != 1 {
		t.Errorf("import: %v", err)
	}
	if r, err := n.Verify(ctx, nil, VerifyOptions{}); err != nil || r.Damaged != 0 {
		t.Errorf("after the import: %+v, %v", r, err)
	}
	if b, _, err := n.readIn(images[0], "own"); err != nil || b != "x" {
		t.Errorf("content %q, %v", b, err)
	}
}

// TestSharedDamage: images that share a damaged layer are all shown again when one of them
// has been pulled; and a hidden one can be removed.
func TestSharedDamage(t *testing.T) {
	n := newNode(t)
	ctx := context.Background()
	for _, name := range []string{"one", "two", "three"} {
		n.reg.Push(name, "v1", sample(t, name))
	}
	one, two := n.mustPull(n.reg.Ref("one", "v1")), n.mustPull(n.reg.Ref("two", "v1"))
	three := n.mustPull(n.reg.Ref("three", "v1"))
	mustEmpty(t, n.layerDir(one, 0))
	mustEmpty(t, n.layerDir(three, 2))
	n.crash()
	n.open()
	if len(n.List()) != 0 {
		t.Errorf("shown: %v", n.List())
	}
	if _, err := n.Pin(three.ID, true); !errors.Is(err, ErrNotFound) {
		t.Errorf("pin of a hidden image: %v", err)
	}
	n.mustPull(n.reg.Ref("one", "v1"))
	if got, err := n.Get(n.reg.Ref("two", "v1")); err != nil || got.ID != two.ID {
		t.Errorf("the image that shares the layer: %v, %v", got, err)
	}
	if _, err := n.Get(three.ID); !errors.Is(err, ErrNotFound) {
		t.Errorf("the image with a damaged layer of its own: %v", err)
	}
	if err := n.Remove(ctx, n.reg.Ref("three", "v1")); err != nil {
		t.Errorf("remove of a hidden image: %v", err)
	}
	if r, err := n.Verify(ctx, nil, VerifyOptions{}); err != nil || r.Images != 2 || r.Damaged != 0 {
		t.Errorf("verified: %+v, %v", r, err)
	}
	for _, img := range n.List() {
		if err := n.Remove(ctx, img.ID); err != nil {
			t.Error(err)
		}
	}
	if kept := n.kept(); len(kept) != 0 {
		t.Errorf("kept %q", kept)
	}
}
