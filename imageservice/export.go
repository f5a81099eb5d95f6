package imageservice

import (
	"archive/tar"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/containers/image/v5/docker/reference"
	"github.com/containers/image/v5/manifest"
	"github.com/opencontainers/go-digest"
	"k8s.io/klog/v2"

	"github.com/berthd/berth/imageservice/archive"
	"github.com/berthd/berth/imageservice/layer"
	"github.com/berthd/berth/snapshotter"
	"github.com/berthd/berth/store"
)

// ExportOptions say how images are written.
type ExportOptions struct {
	// Original fetches the layers from a registry again, so that manifest, repo digest
	// and ID of the copy are those of the image. Without it nothing is asked: layers are
	// written from what is unpacked, which has the same content, other digests, and makes
	// an image with another ID.
	Original bool
}

// Export writes images as one tar archive: an OCI image layout that is an archive of
// "docker save" as well, which Import and other tools read. Of each image all tags are named.
// Nothing is written before it is known that all images are there. Errors: those of Get;
// with Original, those of Pull, and ErrUnsupported for an image without a repo digest.
func (s *Service) Export(ctx context.Context, w io.Writer, refs []string, o ExportOptions) error {
	e := &exporter{s: s, ctx: ctx, remade: map[string]exportBlob{}, written: map[string]bool{}}
	defer e.close()
	for _, ref := range refs {
		if err := e.add(ref, o.Original); err != nil {
			return fmt.Errorf("export of image %q: %w", ref, classify(because(ctx, err)))
		}
	}
	if len(e.images) == 0 {
		return fmt.Errorf("export: no image named: %w", ErrInvalidReference)
	}
	began := time.Now()
	if err := e.write(w); err != nil {
		return fmt.Errorf("export: %w", classify(because(ctx, err)))
	}
	klog.FromContext(ctx).V(2).Info("Images exported", "images", len(e.images), "original", o.Original, "took", time.Since(began))
	return nil
}

// exporter collects what is to be written: first everything that is small, and the digests of
// what is not, which in a tar archive come before the contents.
type exporter struct {
	s       *Service
	ctx     context.Context
	images  []exportImage
	remade  map[string]exportBlob // layers by chain ID
	written map[string]bool       // digests
	closers []func()
}

type exportImage struct {
	names    []string
	manifest exportBlob
	config   exportBlob
	layers   []exportBlob
}

// exportBlob is a descriptor and where its bytes are.
type exportBlob struct {
	MediaType string        `json:"mediaType"`
	Digest    digest.Digest `json:"digest"`
	Size      int64         `json:"size"`
	copy      func(io.Writer) error
}

func smallBlobOf(mediaType string, b []byte) exportBlob {
	return exportBlob{mediaType, digest.FromBytes(b), int64(len(b)), func(w io.Writer) error { _, err := w.Write(b); return err }}
}

func (e *exporter) close() {
	for _, c := range e.closers {
		c()
	}
}

// add prepares one image.
func (e *exporter) add(ref string, original bool) error {
	s := e.s
	v := s.view.Load()
	id, err := v.find(ref, *s.search.Load())
	if err != nil {
		return err
	}
	r := v.rows[id]
	release, err := s.chains.hold(e.ctx, chainIDs(r.Layers))
	if err != nil {
		return err
	}
	e.closers = append(e.closers, release)
	config, man, err := s.documents(id, r)
	if err != nil {
		return err
	}
	if original {
		return e.addOriginal(r, config, man)
	}
	return e.addRemade(r, config)
}

// documents are the config and the manifest of an image, byte for byte.
func (s *Service) documents(id string, r *imageRow) (config, man []byte, err error) {
	err = s.book.View(func(tx *store.Tx) (err error) {
		if config, err = blobRows.Get(tx, id); err != nil {
			return err
		}
		man, err = blobRows.Get(tx, r.Manifest)
		return err
	})
	if err != nil {
		return nil, nil, fmt.Errorf("images: config and manifest: %w", err)
	}
	return config, man, nil
}

// addOriginal takes manifest and config as they are, and layers from a registry.
func (e *exporter) addOriginal(r *imageRow, config, man []byte) error {
	if len(r.Digests) == 0 {
		return fmt.Errorf("it has no repo digest to fetch its layers by: %w", ErrUnsupported)
	}
	named, err := parseReference(r.Digests[0], "")
	if err != nil {
		return err
	}
	src, err := e.s.openSource(e.ctx, named, nil, nil)
	if err != nil {
		return err
	}
	e.closers = append(e.closers, src.Close)
	img := exportImage{names: r.Tags, manifest: smallBlobOf(manifest.GuessMIMEType(man), man), config: smallBlobOf("", config)}
	// A repo digest that is not an index's is a name as well.
	for _, d := range r.Digests {
		if strings.HasSuffix(d, "@"+r.Manifest) && len(r.Tags) == 0 {
			img.names = append(img.names, d)
		}
	}
	for _, l := range r.Layers {
		img.layers = append(img.layers, exportBlob{l.MediaType, digest.Digest(l.Digest), l.Size, func(w io.Writer) error {
			b := newBlobReader(e.ctx, src, l.Digest, l.Size, nil)
			defer b.Close()
			_, err := io.Copy(w, b)
			return err
		}})
	}
	e.images = append(e.images, img)
	return nil
}

// addRemade writes each layer once to know its digest, and makes a config and a manifest
// that say so.
func (e *exporter) addRemade(r *imageRow, config []byte) error {
	img := exportImage{names: r.Tags}
	diffIDs := []digest.Digest{}
	for i, l := range r.Layers {
		b, ok := e.remade[l.ChainID]
		if !ok {
			var err error
			if b, err = e.remake(l.ChainID, i > 0); err != nil {
				return fmt.Errorf("layer %d of %d: %w", i+1, len(r.Layers), err)
			}
			e.remade[l.ChainID] = b
		}
		img.layers = append(img.layers, b)
		diffIDs = append(diffIDs, b.Digest)
	}
	config, err := withDiffIDs(config, diffIDs)
	if err != nil {
		return err
	}
	img.config = smallBlobOf(ociConfigType, config)
	layers := img.layers
	if layers == nil {
		layers = []exportBlob{}
	}
	man, err := json.Marshal(map[string]any{"schemaVersion": 2, "mediaType": ociManifestType, "config": img.config, "layers": layers})
	if err != nil {
		return err
	}
	img.manifest = smallBlobOf(ociManifestType, man)
	e.images = append(e.images, img)
	return nil
}

// remake finds out what the archive of an unpacked layer will be.
func (e *exporter) remake(chain string, mayBeOpaque bool) (exportBlob, error) {
	locator, ok := e.s.sn.(snapshotter.Locator)
	if !ok {
		return exportBlob{}, fmt.Errorf("snapshotter without directories: %w", ErrUnsupported)
	}
	info, err := e.s.sn.Stat(e.ctx, chain)
	if err != nil {
		return exportBlob{}, err
	}
	dir, err := locator.Locate(e.ctx, chain)
	if err != nil {
		return exportBlob{}, err
	}
	// A layer that hides all below it was committed without a parent.
	opaque := mayBeOpaque && info.Parent == ""
	write := func(w io.Writer) error {
		root, err := os.Open(dir)
		if err != nil {
			return err
		}
		defer root.Close()
		return layer.Write(e.ctx, root, w, opaque)
	}
	sum := newSummer()
	if err := write(sum); err != nil {
		return exportBlob{}, err
	}
	return exportBlob{"application/vnd.oci.image.layer.v1.tar", sum.digester.Digest(), sum.n, write}, nil
}

// withDiffIDs is a config with other layers; all else in it stays.
func withDiffIDs(config []byte, diffIDs []digest.Digest) ([]byte, error) {
	var c map[string]json.RawMessage
	if err := json.Unmarshal(config, &c); err != nil {
		return nil, fmt.Errorf("config: %w: %w", ErrInvalidImage, err)
	}
	var err error
	if c["rootfs"], err = json.Marshal(map[string]any{"type": "layers", "diff_ids": diffIDs}); err != nil {
		return nil, err
	}
	return json.Marshal(c)
}

// write writes the archive: its lists first, so that a reader soon knows what is to come.
func (e *exporter) write(w io.Writer) error {
	tw := tar.NewWriter(w)
	index, err := e.index()
	if err != nil {
		return err
	}
	list, err := e.dockerList()
	if err != nil {
		return err
	}
	for _, f := range []struct {
		name string
		b    []byte
	}{{"oci-layout", []byte(`{"imageLayoutVersion":"1.0.0"}`)}, {"index.json", index}, {"manifest.json", list}} {
		if err := writeMember(tw, f.name, smallBlobOf("", f.b)); err != nil {
			return err
		}
	}
	for _, img := range e.images {
		for _, b := range append([]exportBlob{img.manifest, img.config}, img.layers...) {
			if e.written[b.Digest.String()] {
				continue
			}
			e.written[b.Digest.String()] = true
			if err := writeMember(tw, archive.BlobName(b.Digest), b); err != nil {
				return fmt.Errorf("blob %s: %w", b.Digest, err)
			}
		}
	}
	return tw.Close()
}

func writeMember(tw *tar.Writer, name string, b exportBlob) error {
	if err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: b.Size, ModTime: time.Unix(0, 0)}); err != nil {
		return err
	}
	sum := newSummer()
	if b.Digest.Algorithm() != digest.SHA256 {
		sum.digester = b.Digest.Algorithm().Digester()
	}
	if err := b.copy(io.MultiWriter(tw, sum)); err != nil {
		return err
	}
	if got := sum.digester.Digest(); got != b.Digest {
		return fmt.Errorf("content has digest %s: %w", got, ErrDigestMismatch)
	}
	return nil
}

// index is the list of the OCI layout, with an entry for each name.
func (e *exporter) index() ([]byte, error) {
	type entry struct {
		exportBlob
		Annotations map[string]string `json:"annotations,omitempty"`
	}
	entries := []entry{}
	for _, img := range e.images {
		for _, name := range img.names {
			a := map[string]string{"io.containerd.image.name": name}
			if named, err := reference.ParseNormalizedNamed(name); err == nil {
				if t, ok := named.(reference.Tagged); ok {
					a["org.opencontainers.image.ref.name"] = t.Tag()
				}
			}
			entries = append(entries, entry{img.manifest, a})
		}
		if len(img.names) == 0 {
			entries = append(entries, entry{exportBlob: img.manifest})
		}
	}
	return json.Marshal(map[string]any{"schemaVersion": 2, "mediaType": ociIndexType, "manifests": entries})
}

// dockerList is the list that "docker load" reads.
func (e *exporter) dockerList() ([]byte, error) {
	type entry struct {
		Config           string
		RepoTags, Layers []string
	}
	var list []entry
	for _, img := range e.images {
		d := entry{Config: archive.BlobName(img.config.Digest), Layers: []string{}}
		d.RepoTags = slices.DeleteFunc(slices.Clone(img.names), func(n string) bool { return strings.Contains(n, "@") })
		for _, l := range img.layers {
			d.Layers = append(d.Layers, archive.BlobName(l.Digest))
		}
		list = append(list, d)
	}
	return json.Marshal(list)
}

// summer counts and digests what is written to it.
type summer struct {
	digester digest.Digester
	n        int64
}

func newSummer() *summer { return &summer{digester: digest.SHA256.Digester()} }

// Write implements io.Writer.
func (s *summer) Write(p []byte) (int, error) {
	s.n += int64(len(p))
	return s.digester.Hash().Write(p)
}
