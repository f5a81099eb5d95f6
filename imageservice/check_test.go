package imageservice

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/berthd/berth/store"
	"github.com/berthd/berth/test/registry"
)

// mustDeviate checks images, and wants deviations in what is named.
func (n *node) mustDeviate(words ...string) {
	n.t.Helper()
	var got []string
	err := n.Check(n.t.Context(), false, func(f store.Finding, _ bool, _ error) {
		if f.Consequence == "" || f.Remedy == "" {
			n.t.Errorf("says too little: %+v", f)
		}
		got = append(got, f.Kind+" "+f.What)
	})
	slices.Sort(got)
	if err != nil || !slices.Equal(got, words) {
		n.t.Errorf("deviations %q, %v; want %q", got, err, words)
	}
}

// TestCheck: images that were pulled or imported agree with the book; what they lack
// is told.
func TestCheck(t *testing.T) {
	n := newNode(t)
	img := n.mustPull(n.push())
	other, err := registry.Build(registry.Spec{Config: registry.Config{Cmd: []string{"other"}}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := n.Import(t.Context(), n.mustArchive(registry.DockerSave(registry.Named{Image: other, Names: []string{"check.example/o:1"}})), ImportOptions{}); err != nil {
		t.Fatal(err)
	}
	n.mustDeviate()
	if _, err := n.sn.Prepare(t.Context(), "container", img.ChainID); err != nil {
		t.Fatal(err)
	}
	n.mustDeviate()

	top := len(n.view.Load().rows[img.ID].Layers) - 1
	dir := n.layerDir(img, top)
	if err := os.Rename(dir, dir+".away"); err != nil {
		t.Fatal(err)
	}
	chain := n.chain(img, top)
	layer := fmt.Sprintf("image layer %d of %d, %s", top+1, top+1, chain)
	n.mustDeviate(layer, "snapshot "+dir)
	if err := os.Rename(dir+".away", dir); err != nil {
		t.Fatal(err)
	}
	list := n.manifests.path(chain)
	if err := os.Rename(list, filepath.Join(n.dir, "away")); err != nil {
		t.Fatal(err)
	}
	n.mustDeviate(layer)
	if err := os.Rename(filepath.Join(n.dir, "away"), list); err != nil {
		t.Fatal(err)
	}
	if err := n.book.Update(func(tx *store.Tx) error { return blobRows.Delete(tx, img.ID) }); err != nil {
		t.Fatal(err)
	}
	n.SetInUse(func() map[string]bool { return map[string]bool{"sha256:gone": true, img.ID: true} })
	n.mustDeviate("image blob "+img.ID, "image row")
	if err := n.sn.Remove(t.Context(), "container"); err != nil {
		t.Fatal(err)
	}
}
