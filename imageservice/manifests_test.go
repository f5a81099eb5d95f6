package imageservice

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/berthd/berth/imageservice/layer"
	"github.com/berthd/berth/snapshotter"
	"github.com/berthd/berth/test/registry"
)

// mustMatch checks that there is one manifest for each layer, and nothing else.
func (n *node) mustMatch() {
	n.t.Helper()
	layers, files := []string{}, []string{}
	err := n.sn.Walk(context.Background(), func(_ context.Context, i snapshotter.Info) error {
		if i.Kind == snapshotter.KindCommitted {
			layers = append(layers, strings.ReplaceAll(i.Name, ":", "-"))
		}
		return nil
	})
	if err != nil {
		n.t.Fatal(err)
	}
	entries, err := os.ReadDir(n.cfg.ManifestsDir)
	if err != nil {
		n.t.Fatal(err)
	}
	for _, e := range entries {
		files = append(files, e.Name())
	}
	slices.Sort(layers)
	if !slices.Equal(layers, files) {
		n.t.Errorf("manifests %q, layers %q", files, layers)
	}
}

// push puts an image of two layers, the upper with the file top, into the registry.
func (n *node) push() string {
	n.t.Helper()
	img := mustBuild(n.t, registry.Spec{Layers: []registry.Layer{
		{Compression: registry.Gzip, Files: []registry.File{{Name: "etc/"}, {Name: "etc/base", Data: []byte("base")}}},
		{Compression: registry.Zstd, Files: []registry.File{{Name: "top", Data: []byte("top")}, registry.Whiteout("etc/base")}},
	}})
	n.reg.Push("app", "v1", img)
	return n.reg.Ref("app", "v1")
}

func TestVerifyLayer(t *testing.T) {
	n := newNode(t)
	ctx := context.Background()
	img := n.mustPull(n.push())
	n.mustMatch()
	row := n.view.Load().rows[img.ID]
	for i, l := range row.Layers {
		checked, err := n.VerifyLayer(ctx, l.ChainID, layer.VerifyOptions{Contents: true}, func(d layer.Deviation) { t.Errorf("layer %d: %s", i, d) })
		if err != nil || checked.Entries == 0 || checked.Bytes == 0 {
			t.Errorf("layer %d: %+v, %v", i, checked, err)
		}
	}
	chain := row.Layers[1].ChainID
	dir, err := n.sn.Locate(ctx, chain)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(filepath.Join(dir, "top"), 0); err != nil {
		t.Fatal(err)
	}
	var got []string
	if _, err := n.VerifyLayer(ctx, chain, layer.VerifyOptions{}, func(d layer.Deviation) { got = append(got, d.What) }); err != nil || !slices.Contains(got, "size") {
		t.Errorf("damaged layer: %q, %v", got, err)
	}

	for _, tc := range []struct {
		name    string
		prepare func(path string) error
	}{
		{"damaged", func(p string) error { return os.Truncate(p, 40) }},
		{"missing", os.Remove},
	} {
		if err := tc.prepare(n.manifests.path(chain)); err != nil {
			t.Fatal(err)
		}
		if _, err := n.VerifyLayer(ctx, chain, layer.VerifyOptions{}, nil); !errors.Is(err, ErrNoManifest) {
			t.Errorf("%s manifest: %v, want ErrNoManifest", tc.name, err)
		}
	}
	for _, id := range []string{"sha256:" + strings.Repeat("0", 64), "", "../../etc"} {
		if _, err := n.VerifyLayer(ctx, id, layer.VerifyOptions{}, nil); !errors.Is(err, ErrNotFound) {
			t.Errorf("layer %q: %v, want ErrNotFound", id, err)
		}
	}
}

// TestManifestsFollowLayers: through removal, a failed pull and a crash.
func TestManifestsFollowLayers(t *testing.T) {
	n := newNode(t)
	ctx := context.Background()
	img := n.mustPull(n.push())
	if err := n.Remove(ctx, img.ID); err != nil {
		t.Fatal(err)
	}
	n.mustMatch()

	img = n.mustPull(n.push())
	for _, left := range []string{"extract-1-1.tmp", "sha256-" + strings.Repeat("0", 64)} {
		if err := os.WriteFile(filepath.Join(n.cfg.ManifestsDir, left), []byte("left by a crash"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	n.close()
	n.open()
	n.mustMatch()
	if _, err := n.VerifyLayer(ctx, img.ChainID, layer.VerifyOptions{Contents: true}, func(d layer.Deviation) { t.Error(d) }); err != nil {
		t.Error(err)
	}
}

func TestVerifyWithoutManifests(t *testing.T) {
	n := newNode(t, func(c *Config) { c.ManifestsDir = "" })
	img := n.mustPull(n.push())
	if _, err := n.VerifyLayer(context.Background(), img.ChainID, layer.VerifyOptions{}, nil); !errors.Is(err, ErrUnsupported) {
		t.Errorf("got %v, want ErrUnsupported", err)
	}
	if err := n.Remove(context.Background(), img.ID); err != nil {
		t.Error(err)
	}
}
