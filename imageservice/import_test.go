package imageservice

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/berthd/berth/test/registry"
)

// mustArchive writes files as a tar archive and opens it.
func (n *node) mustArchive(files map[string][]byte, err error) *os.File {
	n.t.Helper()
	if err != nil {
		n.t.Fatal(err)
	}
	f, err := os.CreateTemp(n.t.TempDir(), "archive")
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { f.Close() })
	if err := registry.Tar(f, files); err != nil {
		n.t.Fatal(err)
	}
	return f
}

func TestImport(t *testing.T) {
	n := newNode(t)
	ctx := context.Background()
	one, two := sample(t, "one"), sample(t, "two")
	named := []registry.Named{{Image: one, Names: []string{"h.example/one:1", "h.example/one:2"}}, {Image: two, Names: []string{"h.example/two:1"}}}
	f := n.mustArchive(registry.Layout(named...))
	var reports []ImportReport
	images, err := n.Import(ctx, f, ImportOptions{Report: func(r ImportReport) { reports = append(reports, r) }})
	if err != nil || len(images) != 2 || images[0].ID != one.ConfigID || images[1].ID != two.ConfigID {
		t.Fatalf("import: %v, %v", images, err)
	}
	got, err := n.Get("h.example/one@" + one.Digest)
	if err != nil || !slices.Equal(got.RepoTags, []string{"h.example/one:1", "h.example/one:2"}) || got.Pinned {
		t.Errorf("image %+v, %v", got, err)
	}
	if b, _, err := n.readIn(got, "own"); err != nil || b != "one" {
		t.Errorf("content: %q, %v", b, err)
	}
	done := 0
	for _, r := range reports {
		if r.Image != nil && !r.Present {
			done++
		}
	}
	if done != 2 {
		t.Errorf("reports %+v", reports)
	}
	// Again, with a pin, and from the other kind of archive, as a stream.
	images, err = n.Import(ctx, f, ImportOptions{Pin: true})
	if err != nil || len(images) != 2 || !images[0].Pinned {
		t.Errorf("again: %v, %v", images, err)
	}
	var b bytes.Buffer
	files, err := registry.DockerSave(registry.Named{Image: two, Names: []string{"two:again"}})
	if err := errors.Join(err, registry.Tar(&b, files)); err != nil {
		t.Fatal(err)
	}
	reports = nil
	images, err = n.ImportStream(ctx, &b, ImportOptions{Report: func(r ImportReport) { reports = append(reports, r) }})
	if err != nil || len(images) != 1 || !slices.Equal(images[0].RepoTags, []string{"docker.io/library/two:again", "h.example/two:1"}) || !images[0].Pinned {
		t.Errorf("docker archive: %+v, %v", images, err)
	}
	for _, r := range reports {
		if r.Bytes > 0 && r.Stage == stageLayers {
			t.Errorf("layers were read that are there: %+v", r)
		}
	}
	if len(n.Pulls()) != 0 {
		t.Errorf("imports still shown: %v", n.Pulls())
	}
	n.close()
	n.open()
	if got, err := n.Get("h.example/two:1"); err != nil || !got.Pinned {
		t.Errorf("after a restart: %+v, %v", got, err)
	}
}

func TestImportNames(t *testing.T) {
	n := newNode(t)
	a, b := sample(t, "a"), sample(t, "b")
	tagged := func(img *registry.Image, names ...string) registry.Named {
		return registry.Named{Image: img, Names: names}
	}
	for _, c := range []struct {
		what   string
		images []registry.Named
		name   string
		tags   []string // of the first image
		err    error
	}{
		{"a tag and no name", []registry.Named{tagged(a, "v1")}, "", nil, nil},
		{"a tag and a repository", []registry.Named{tagged(a, "v1")}, "h.example/x", []string{"h.example/x:v1"}, nil},
		{"a tag and a whole name", []registry.Named{tagged(a, "v1")}, "h.example/y:2", []string{"h.example/x:v1", "h.example/y:2"}, nil},
		{"another name", []registry.Named{tagged(b, "h.example/b:1")}, "h.example/c:1", []string{"h.example/c:1"}, nil},
		{"two with tags", []registry.Named{tagged(a, "v3"), tagged(b, "v4")}, "h.example/z", []string{"h.example/x:v1", "h.example/y:2", "h.example/z:v3"}, nil},
		{"two with names", []registry.Named{tagged(a, "h.example/a:1"), tagged(b, "h.example/b:1")}, "h.example/z", nil, ErrInvalidReference},
		{"bad name", []registry.Named{tagged(a)}, "Not A Name", nil, ErrInvalidReference},
		{"bad name inside", []registry.Named{tagged(a, "h.example/BAD:1")}, "", nil, ErrInvalidReference},
		{"another digest", []registry.Named{tagged(a, "h.example/a@sha256:"+strings.Repeat("0", 64))}, "", nil, ErrDigestMismatch},
	} {
		images, err := n.Import(context.Background(), n.mustArchive(registry.Layout(c.images...)), ImportOptions{Name: c.name})
		if !errors.Is(err, c.err) || c.err == nil && (len(images) != len(c.images) || !slices.Equal(images[0].RepoTags, c.tags)) {
			t.Errorf("%s: %+v, %v; want tags %q, error %v", c.what, images, err, c.tags, c.err)
		}
	}
}

// TestImportPlatforms: of an index the node's image, and of several side by side as well.
func TestImportPlatforms(t *testing.T) {
	n := newNode(t)
	own := sample(t, "own")
	foreign := mustBuild(t, registry.Spec{Architecture: "s390x"})
	index, err := registry.NewIndex(foreign, own)
	if err != nil {
		t.Fatal(err)
	}
	images, err := n.Import(context.Background(), n.mustArchive(registry.Layout(registry.Named{Image: index, Names: []string{"h.example/i:1"}})), ImportOptions{})
	if err != nil || len(images) != 1 || images[0].ID != own.ConfigID || !slices.Equal(images[0].RepoDigests, []string{"h.example/i@" + index.Digest}) {
		t.Errorf("index: %+v, %v", images, err)
	}
	both := n.mustArchive(registry.Layout(registry.Named{Image: foreign, Names: []string{"h.example/b:1"}}, registry.Named{Image: own, Names: []string{"h.example/b:1"}}))
	if images, err := n.Import(context.Background(), both, ImportOptions{}); err != nil || len(images) != 1 || images[0].ID != own.ConfigID {
		t.Errorf("side by side: %+v, %v", images, err)
	}
	only := n.mustArchive(registry.Layout(registry.Named{Image: foreign, Names: []string{"h.example/f:1"}}))
	if images, err := n.Import(context.Background(), only, ImportOptions{}); !errors.Is(err, ErrUnsupported) || len(images) != 0 {
		t.Errorf("foreign only: %+v, %v", images, err)
	}
}

// TestImportRefused: what is wrong with one image keeps no other from being imported, and
// leaves nothing.
func TestImportRefused(t *testing.T) {
	n := newNode(t)
	good, bad := sample(t, "good"), mustBuild(t, registry.Spec{Layers: []registry.Layer{
		layerOf(registry.Gzip, registry.File{Name: "first"}), layerOf(registry.Gzip, registry.File{Name: "bad", Data: noise(10000, 9)})}})
	hostile := mustBuild(t, registry.Spec{Layers: []registry.Layer{layerOf(registry.Plain, registry.File{Name: "../escape", Data: []byte("x")})}})
	files, err := registry.Layout(registry.Named{Image: bad, Names: []string{"h.example/bad:1"}}, registry.Named{Image: hostile, Names: []string{"h.example/hostile:1"}},
		registry.Named{Image: good, Names: []string{"h.example/good:1"}})
	files["blobs/"+strings.Replace(bad.Layers[1].Digest, ":", "/", 1)][5000] ^= 1
	images, err := n.Import(context.Background(), n.mustArchive(files, err), ImportOptions{})
	if !errors.Is(err, ErrDigestMismatch) || !errors.Is(err, ErrInvalidImage) || len(images) != 1 || images[0].ID != good.ConfigID {
		t.Errorf("import: %+v, %v", images, err)
	}
	if _, err := os.Stat(filepath.Join(n.dir, "state", "escape")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a layer left its root: %v", err)
	}
	if err := n.GC(context.Background()); err != nil {
		t.Error(err)
	}
	if kept := n.kept(); len(kept) != len(good.Layers) {
		t.Errorf("kept %q", kept)
	}
	for _, d := range []string{"state", "state/layers"} {
		for _, e := range must(os.ReadDir(filepath.Join(n.dir, d)))(t) {
			if strings.Contains(e.Name(), "spool") {
				t.Errorf("spool left: %s", e.Name())
			}
		}
	}
	limited := func(c *Config) { c.MaxArchiveBytes = 4096 }
	n.close()
	n.open(limited)
	var b bytes.Buffer
	if err := registry.Tar(&b, files); err != nil {
		t.Fatal(err)
	}
	if _, err := n.ImportStream(context.Background(), &b, ImportOptions{}); !errors.Is(err, ErrTooLarge) {
		t.Errorf("a stream above the limit: %v", err)
	}
}

func must[T any](v T, err error) func(*testing.T) T {
	return func(t *testing.T) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func TestPin(t *testing.T) {
	n := newNode(t, func(c *Config) { c.PinnedImages = []string{"h.example/always:*"} })
	img := sample(t, "x")
	f := n.mustArchive(registry.Layout(registry.Named{Image: img, Names: []string{"h.example/x:1"}}))
	if _, err := n.Import(context.Background(), f, ImportOptions{}); err != nil {
		t.Fatal(err)
	}
	for _, want := range []bool{true, true, false} {
		if got, err := n.Pin("h.example/x:1", want); err != nil || got.Pinned != want {
			t.Errorf("pin %v: %v, %v", want, got.Pinned, err)
		}
		n.close()
		n.open()
		if got, err := n.Get(img.ConfigID); err != nil || got.Pinned != want {
			t.Errorf("pin %v after a restart: %v, %v", want, got.Pinned, err)
		}
	}
	if _, err := n.Pin("h.example/none:1", true); !errors.Is(err, ErrNotFound) {
		t.Errorf("pin of nothing: %v", err)
	}
	// A pin ends with the image.
	if _, err := n.Pin(img.ConfigID, true); err != nil {
		t.Fatal(err)
	}
	n.SetInUse(func() map[string]bool { return map[string]bool{img.ConfigID: true} })
	if err := n.Remove(context.Background(), img.ConfigID); err != nil {
		t.Fatal(err)
	}
	if images, err := n.Import(context.Background(), f, ImportOptions{}); err != nil || images[0].Pinned {
		t.Errorf("after removal and import: %+v, %v", images, err)
	}
	n.SetInUse(func() map[string]bool { return nil })
}
