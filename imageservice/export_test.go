package imageservice

import (
	"bytes"
	"context"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"

	"github.com/berthd/berth/test/registry"
)

// TestExport: what is exported and imported again is the same image: to the byte with
// Original, in content without.
func TestExport(t *testing.T) {
	n := newNode(t)
	ctx := context.Background()
	img := mustBuild(t, registry.Spec{Config: registry.Config{User: "7:8", Env: []string{"A=b"}, Cmd: []string{"/x"}}, Layers: []registry.Layer{
		layerOf(registry.Gzip, registry.File{Name: "d/", Mode: 0o1777}, registry.File{Name: "d/below", Data: []byte("below")}, registry.File{Name: "gone"}),
		layerOf(registry.Zstd, registry.Whiteout("gone"), registry.Opaque("d"), registry.File{Name: "d/above", Data: noise(70000, 1), UID: 5}),
		layerOf(registry.Plain, registry.File{Name: "own", Mode: 0o4755, Data: []byte("own"), Attributes: map[string]string{"user.k": "v"}}),
	}})
	empty := mustBuild(t, registry.Spec{Config: registry.Config{User: "empty"}})
	n.reg.Push("r", "v1", img)
	n.reg.Push("e", "v1", empty)
	ref := n.reg.Ref("r", "v1")
	first := n.mustPull(ref)
	n.mustPull(n.reg.Ref("e", "v1"))

	var original, remade, again bytes.Buffer
	if err := n.Export(ctx, &original, []string{ref}, ExportOptions{Original: true}); err != nil {
		t.Fatal(err)
	}
	for _, w := range []io.Writer{&remade, &again} {
		if err := n.Export(ctx, w, []string{ref, n.reg.Ref("e", "v1")}, ExportOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(remade.Bytes(), again.Bytes()) {
		t.Error("two exports differ")
	}
	for _, i := range n.List() {
		if err := n.Remove(ctx, i.ID); err != nil {
			t.Fatal(err)
		}
	}
	images, err := n.ImportStream(ctx, &original, ImportOptions{})
	if err != nil || len(images) != 1 || images[0].ID != img.ConfigID || !slices.Equal(images[0].RepoTags, first.RepoTags) || !slices.Equal(images[0].RepoDigests, first.RepoDigests) {
		t.Fatalf("original: %+v, %v", images, err)
	}
	before := n.contents(images[0])
	images, err = n.ImportStream(ctx, &remade, ImportOptions{})
	if err != nil || len(images) != 2 || images[0].ID == img.ConfigID || !slices.Equal(images[0].RepoTags, first.RepoTags) {
		t.Fatalf("remade: %+v, %v", images, err)
	}
	if got := images[0].Config; got.User != "7:8" || !slices.Equal(got.Env, []string{"A=b"}) || !slices.Equal(got.Cmd, []string{"/x"}) {
		t.Errorf("config %+v", got)
	}
	if after := n.contents(images[0]); !slices.Equal(before, after) {
		t.Errorf("content %q, want %q", after, before)
	}
	// What was made anew is stable: exported once more it has the same ID.
	var third bytes.Buffer
	if err := n.Export(ctx, &third, []string{images[0].ID}, ExportOptions{}); err != nil {
		t.Fatal(err)
	}
	if twice, err := n.ImportStream(ctx, &third, ImportOptions{}); err != nil || twice[0].ID != images[0].ID {
		t.Errorf("exported twice: %+v, %v", twice, err)
	}
}

// contents are the files of an image, with what matters about them.
func (n *node) contents(img Image) (out []string) {
	n.t.Helper()
	for _, name := range []string{"d/above", "d/below", "gone", "own"} {
		b, st, err := n.readIn(img, name)
		if err != nil {
			out = append(out, name+" is not there")
			continue
		}
		out = append(out, name+" "+st.Mode().String()+" "+b)
	}
	return out
}

func TestExportRefused(t *testing.T) {
	n := newNode(t)
	ctx := context.Background()
	img := sample(t, "x")
	if _, err := n.Import(ctx, n.mustArchive(registry.DockerSave(registry.Named{Image: img, Names: []string{"h.example/x:1"}})), ImportOptions{}); err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	for _, c := range []struct {
		refs     []string
		original bool
		want     error
	}{
		{nil, false, ErrInvalidReference}, {[]string{"h.example/x:1", "h.example/none:1"}, false, ErrNotFound}, {[]string{"h.example/x:1"}, true, ErrUnsupported},
	} {
		if err := n.Export(ctx, &b, c.refs, ExportOptions{Original: c.original}); !errors.Is(err, c.want) || b.Len() != 0 {
			t.Errorf("%q: %v after %d bytes, want %v and nothing written", c.refs, err, b.Len(), c.want)
		}
	}
	// A registry that sends something else is found out.
	n.reg.Push("r", "v1", img)
	n.mustPull(n.reg.Ref("r", "v1"))
	n.reg.SetFault("r", registry.Fault{WrongBlob: true})
	if err := n.Export(ctx, &b, []string{n.reg.Ref("r", "v1")}, ExportOptions{Original: true}); !errors.Is(err, ErrDigestMismatch) || !strings.Contains(err.Error(), "sha256:") {
		t.Errorf("from a lying registry: %v", err)
	}
}
