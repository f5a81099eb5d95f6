package imageservice

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/berthd/berth/snapshotter"
	"github.com/berthd/berth/store"
)

func TestUnneeded(t *testing.T) {
	infos := map[string]snapshotter.Info{}
	for _, i := range []snapshotter.Info{
		{Name: "base", Kind: snapshotter.KindCommitted}, {Name: "top", Parent: "base", Kind: snapshotter.KindCommitted},
		{Name: "used", Kind: snapshotter.KindCommitted}, {Name: "container", Parent: "used", Kind: snapshotter.KindActive},
		{Name: "old", Kind: snapshotter.KindCommitted}, {Name: "old-top", Parent: "old", Kind: snapshotter.KindCommitted},
		{Name: "replaced-7", Kind: snapshotter.KindCommitted},
	} {
		infos[i.Name] = i
	}
	if got, want := unneeded(infos, map[string]bool{"top": true}), []string{"old", "old-top"}; !slices.Equal(got, want) {
		t.Errorf("unneeded: %q, want %q", got, want)
	}
	if got := unneeded(nil, nil); len(got) != 0 {
		t.Errorf("of nothing: %q", got)
	}
}

// mustLeak looks for leaks, and wants those of the kinds.
func (n *node) mustLeak(fix bool, kinds ...string) {
	n.t.Helper()
	var got []string
	err := n.Leaks(n.t.Context(), fix, func(f store.Finding, mended bool, err error) {
		if mended != fix || err != nil {
			n.t.Errorf("%+v: mended %v, %v", f, mended, err)
		}
		got = append(got, f.Kind)
	})
	slices.Sort(got)
	if err != nil || !slices.Equal(got, kinds) {
		n.t.Errorf("leaks of the kinds %q, %v; want %q", got, err, kinds)
	}
}

// TestDropManifest: between the look and the mending the layer may have come, or somebody
// may have begun to make it.
func TestDropManifest(t *testing.T) {
	n := newNode(t)
	img := n.mustPull(n.push())
	const held = "sha256:held"
	release, err := n.chains.hold(t.Context(), []string{held})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := n.sn.Prepare(t.Context(), "extract-0-0", ""); err != nil {
		t.Fatal(err)
	}
	const unnamed = "sha256:unnamed" // by an image
	if err := n.sn.Commit(t.Context(), unnamed, "extract-0-0"); err != nil {
		t.Fatal(err)
	}
	for _, chain := range []string{held, unnamed} {
		if err := os.WriteFile(n.manifests.path(chain), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	drop := func(chain string, gone bool) {
		t.Helper()
		path := n.manifests.path(chain)
		err := n.dropManifest(t.Context(), filepath.Base(path))
		if _, there := os.Stat(path); err != nil || errors.Is(there, os.ErrNotExist) != gone {
			t.Errorf("%s: %v; then %v, want it gone: %v", chain, err, there, gone)
		}
	}
	drop(img.ChainID, false)
	drop(unnamed, false)
	drop(held, false)
	release()
	drop(held, true)
	drop(held, true) // it has been done
	if n.chains.busy(held) || n.chains.busy(unnamed) {
		t.Error("a layer is still condemned")
	}
}

// TestLeaks: what nobody needs is found and removed; an image, an unfinished layer
// that a pull is at and what a container is on are not.
func TestLeaks(t *testing.T) {
	n := newNode(t)
	img := n.mustPull(n.push())
	key, done := n.newExtraction()
	prepare := func(key, parent string) {
		if _, err := n.sn.Prepare(t.Context(), key, parent); err != nil {
			t.Fatal(err)
		}
	}
	write := func(name string) {
		if err := os.WriteFile(filepath.Join(n.cfg.ManifestsDir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	prepare(key, "")
	write(key + ".tmp")
	prepare("container", img.ChainID)
	n.mustLeak(false)

	done()
	prepare("extract-0-0", "")
	if err := n.sn.Commit(t.Context(), "sha256:nobody", "extract-0-0"); err != nil {
		t.Fatal(err)
	}
	write("sha256-0123")
	if err := n.book.Update(func(tx *store.Tx) error { return blobRows.Put(tx, "sha256:blob", []byte("{}")) }); err != nil {
		t.Fatal(err)
	}
	want := []string{"layer", "layer manifest", "layer manifest", "row", "unfinished layer"}
	n.mustLeak(false, want...)
	n.mustLeak(true, want...)
	n.mustLeak(false)
	if _, err := n.Get(img.ID); err != nil {
		t.Errorf("the image: %v", err)
	}
	n.mustMatch()
}
