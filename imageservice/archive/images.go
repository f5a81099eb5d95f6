package archive

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
)

// Media types (OCI image-spec, media-types.md, and Docker's).
const (
	typeOCIIndex       = "application/vnd.oci.image.index.v1+json"
	typeOCIManifest    = "application/vnd.oci.image.manifest.v1+json"
	typeDockerList     = "application/vnd.docker.distribution.manifest.list.v2+json"
	typeDockerManifest = "application/vnd.docker.distribution.manifest.v2+json"
	typeDockerConfig   = "application/vnd.docker.container.image.v1+json"
	typeDockerLayer    = "application/vnd.docker.image.rootfs.diff.tar"
)

// Annotations of an index that name an image (OCI image-spec, annotations.md; the first
// is containerd's).
const (
	annotationFullName = "io.containerd.image.name"
	annotationRefName  = "org.opencontainers.image.ref.name"
	annotationAttests  = "vnd.docker.reference.type" // marks what is about an image
)

type descriptor struct {
	MediaType   string            `json:"mediaType"`
	Digest      digest.Digest     `json:"digest"`
	Size        int64             `json:"size"`
	Annotations map[string]string `json:"annotations,omitempty"`
	Platform    *struct {
		OS           string `json:"os"`
		Architecture string `json:"architecture"`
	} `json:"platform,omitempty"`
}

// saved is an image in the manifest.json of "docker save".
type saved struct {
	Config   string
	RepoTags []string
	Layers   []string
}

// Images reads what images the archive has for this node, in the order of its list. One
// that cannot be read is there with its Err. The error is about the archive as a whole.
func (a *Archive) Images() ([]Image, error) {
	index, err := a.read("index.json")
	if err == nil {
		images, err := a.layout(index)
		if err != nil || len(images) > 0 {
			return images, err
		}
		return nil, fmt.Errorf("index.json lists no image: %w", ErrFormat)
	}
	if !errors.Is(err, ErrMissing) {
		return nil, err
	}
	list, err := a.read("manifest.json")
	if errors.Is(err, ErrMissing) {
		return nil, fmt.Errorf("neither index.json (OCI layout) nor manifest.json (docker save) in it: %w", ErrFormat)
	}
	if err != nil {
		return nil, err
	}
	return a.dockerImages(list)
}

// layout reads the images of an OCI image layout.
func (a *Archive) layout(index []byte) ([]Image, error) {
	var list struct {
		Manifests []descriptor `json:"manifests"`
	}
	if err := parse("index.json", index, &list); err != nil {
		return nil, err
	}
	if len(list.Manifests) > maxImages {
		return nil, fmt.Errorf("%d images, limit %d: %w", len(list.Manifests), maxImages, ErrTooLarge)
	}
	tags := a.repoTags()
	var images []Image
	at := map[digest.Digest]int{}
	others := 0
	for _, d := range list.Manifests {
		if d.Annotations[annotationAttests] != "" {
			continue
		}
		if p := d.Platform; p != nil && p.OS != "" && !a.opt.Matches(p.OS, p.Architecture) {
			others++
			continue
		}
		i, known := at[d.Digest]
		if !known {
			i, at[d.Digest] = len(images), len(images)
			images = append(images, a.image(d, tags))
		}
		images[i].name(d)
	}
	if len(images) == 0 && others > 0 {
		return nil, fmt.Errorf("%d images, none for this node: %w", others, ErrPlatform)
	}
	return images, nil
}

// name takes the name of a descriptor over.
func (img *Image) name(d descriptor) {
	full, ref := d.Annotations[annotationFullName], d.Annotations[annotationRefName]
	if full == "" && strings.Contains(ref, "/") {
		full = ref
	}
	switch {
	case full != "":
		if !slices.Contains(img.Names, full) {
			img.Names = append(img.Names, full)
		}
	case ref != "" && len(img.Names) == 0:
		img.Tag = ref
	}
}

// repoTags are the names by config digest that a manifest.json beside the index gives.
func (a *Archive) repoTags() map[string][]string {
	var list []saved
	b, err := a.read("manifest.json")
	if err != nil || json.Unmarshal(b, &list) != nil {
		return nil // the index is what counts
	}
	tags := map[string][]string{}
	for _, s := range list[:min(len(list), maxImages)] {
		hex := strings.TrimSuffix(s.Config[strings.LastIndex(s.Config, "/")+1:], ".json")
		tags[hex] = s.RepoTags
	}
	return tags
}

// image reads the manifest and the config that a descriptor leads to.
func (a *Archive) image(d descriptor, tags map[string][]string) Image {
	fail := func(err error) Image { return Image{Err: fmt.Errorf("image %.100s: %w", d.Digest, err)} }
	img := Image{Top: d.Digest, MediaType: d.MediaType}
	var err error
	if img.Manifest, err = a.document(d.Digest); err != nil {
		return fail(err)
	}
	if img.MediaType == "" {
		img.MediaType = guess(img.Manifest)
	}
	if img.MediaType == typeOCIIndex || img.MediaType == typeDockerList {
		chosen, err := a.opt.Choose(img.Manifest, img.MediaType)
		if err != nil {
			return fail(err)
		}
		if img.Manifest, err = a.document(chosen); err != nil {
			return fail(err)
		}
		img.MediaType = guess(img.Manifest)
	}
	var m struct {
		Config descriptor `json:"config"`
	}
	if err := parse("manifest", img.Manifest, &m); err != nil {
		return fail(err)
	}
	if img.Config, err = a.document(m.Config.Digest); err != nil {
		return fail(fmt.Errorf("config: %w", err))
	}
	img.Names = slices.Clone(tags[m.Config.Digest.Encoded()])
	return img
}

// guess is the media type of a document that does not come with one.
func guess(b []byte) string {
	var doc struct {
		MediaType string          `json:"mediaType"`
		Manifests json.RawMessage `json:"manifests"`
	}
	if json.Unmarshal(b, &doc) == nil {
		switch {
		case doc.MediaType != "":
			return doc.MediaType
		case doc.Manifests != nil:
			return typeOCIIndex
		}
	}
	return typeOCIManifest
}

// dockerImages reads the list of "docker save".
func (a *Archive) dockerImages(list []byte) ([]Image, error) {
	var all []saved
	if err := parse("manifest.json", list, &all); err != nil {
		return nil, err
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("manifest.json lists no image: %w", ErrFormat)
	}
	if len(all) > maxImages {
		return nil, fmt.Errorf("%d images, limit %d: %w", len(all), maxImages, ErrTooLarge)
	}
	images := make([]Image, len(all))
	for i, s := range all {
		img, err := a.dockerImage(s)
		if err != nil {
			img = Image{Err: fmt.Errorf("image %d, %.100q: %w", i+1, strings.Join(s.RepoTags, " "), err)}
		}
		img.Names = s.RepoTags
		images[i] = img
	}
	return images, nil
}

// dockerImage makes up the manifest of an image, in Docker's format as its config is.
func (a *Archive) dockerImage(s saved) (Image, error) {
	config, err := a.read(clean(s.Config))
	if err != nil {
		return Image{}, fmt.Errorf("config: %w", err)
	}
	var c struct {
		RootFS struct {
			DiffIDs []digest.Digest `json:"diff_ids"`
		} `json:"rootfs"`
	}
	if err := parse(s.Config, config, &c); err != nil {
		return Image{}, err
	}
	if len(c.RootFS.DiffIDs) != len(s.Layers) {
		return Image{}, fmt.Errorf("config lists %d layers, manifest.json %d: %w", len(c.RootFS.DiffIDs), len(s.Layers), ErrFormat)
	}
	layers := make([]descriptor, len(s.Layers))
	for i, name := range s.Layers {
		if layers[i], err = a.dockerLayer(clean(name), c.RootFS.DiffIDs[i]); err != nil {
			return Image{}, fmt.Errorf("layer %d: %w", i+1, err)
		}
	}
	m, err := json.Marshal(struct {
		SchemaVersion int          `json:"schemaVersion"`
		MediaType     string       `json:"mediaType"`
		Config        descriptor   `json:"config"`
		Layers        []descriptor `json:"layers"`
	}{2, typeDockerManifest, descriptor{MediaType: typeDockerConfig, Digest: digest.FromBytes(config), Size: int64(len(config))}, layers})
	if err != nil {
		return Image{}, err
	}
	return Image{Manifest: m, MediaType: typeDockerManifest, Config: config}, nil
}

// dockerLayer describes a layer's file. What is not compressed has its diff ID for a
// digest, and the unpacker finds out if that is true; what is has to be read once.
func (a *Archive) dockerLayer(name string, diff digest.Digest) (descriptor, error) {
	d := descriptor{MediaType: typeDockerLayer, Digest: diff}
	if err := diff.Validate(); err != nil {
		return d, fmt.Errorf("diff ID %.100q: %w: %w", diff, ErrFormat, err)
	}
	r, size, err := a.open(name)
	if err != nil {
		return d, err
	}
	defer r.Close()
	d.Size = size
	kind, all, err := peek(r)
	if err != nil {
		return d, err
	}
	if kind != "" {
		d.MediaType += ".gzip" // unpackers go by the first bytes
		h := digest.SHA256.Digester()
		if _, err := io.Copy(h.Hash(), all); err != nil {
			return d, err
		}
		d.Digest = h.Digest()
	}
	a.blobs[d.Digest] = name
	return d, nil
}
