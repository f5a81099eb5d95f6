package registry

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"path"
	"runtime"
	"time"

	"github.com/klauspost/compress/zstd"
)

// Compression names how a layer's tar stream is stored.
type Compression string

// The compressions that the OCI image specification has media types for.
const (
	Gzip  Compression = "gzip"
	Zstd  Compression = "zstd"
	Plain Compression = ""
)

// Media types of the OCI image specification 1.1.
const (
	typeManifest = "application/vnd.oci.image.manifest.v1+json"
	typeIndex    = "application/vnd.oci.image.index.v1+json"
	typeConfig   = "application/vnd.oci.image.config.v1+json"
	typeLayer    = "application/vnd.oci.image.layer.v1.tar"
)

// epoch is the time stamp of every file and image, so that digests are stable.
var epoch = time.Unix(1_700_000_000, 0).UTC()

// File is one entry of a layer. The zero Type is a regular file; a name that
// ends in a slash is a directory.
type File struct {
	Name       string // relative to the root, without a leading slash
	Type       byte   // a tar type flag; 0: regular file, or directory if Name ends in "/"
	Mode       int64  // permission and set-id bits; 0: 0644, directories 0755
	UID, GID   int
	Data       []byte
	Link       string // target of a symbolic or hard link
	Major      int64  // device numbers, for TypeChar and TypeBlock
	Minor      int64
	Attributes map[string]string // extended attributes
}

// Whiteout returns the entry that deletes name from the layers below.
func Whiteout(name string) File {
	return File{Name: path.Join(path.Dir(name), ".wh."+path.Base(name))}
}

// Opaque returns the entry that hides what the layers below have in dir.
func Opaque(dir string) File { return File{Name: path.Join(dir, ".wh..wh..opq")} }

// Layer is a list of files and how the layer is stored.
type Layer struct {
	Files       []File
	Compression Compression
}

// Config is the part of the OCI image configuration that a runtime reads.
// The field names are those of the specification's "config" object.
type Config struct {
	User       string              `json:"User,omitempty"`
	Env        []string            `json:"Env,omitempty"`
	Entrypoint []string            `json:"Entrypoint,omitempty"`
	Cmd        []string            `json:"Cmd,omitempty"`
	WorkingDir string              `json:"WorkingDir,omitempty"`
	StopSignal string              `json:"StopSignal,omitempty"`
	Volumes    map[string]struct{} `json:"Volumes,omitempty"`
	Labels     map[string]string   `json:"Labels,omitempty"`
}

// Spec says what an image is made of.
type Spec struct {
	Config       Config
	Layers       []Layer
	Architecture string // this machine's if empty
	Variant      string // of it, in an index
	OS           string // "linux" if empty
}

// Descriptor refers to a blob by digest. It is the object of the OCI
// specification; Platform is set in an index only.
type Descriptor struct {
	MediaType string    `json:"mediaType"`
	Digest    string    `json:"digest"`
	Size      int64     `json:"size"`
	Platform  *Platform `json:"platform,omitempty"`
}

// Platform selects an image in an index.
type Platform struct {
	Architecture string `json:"architecture"`
	OS           string `json:"os"`
	Variant      string `json:"variant,omitempty"`
}

// Image is a built image or an index of images, with all blobs that it needs.
type Image struct {
	Manifest  []byte
	MediaType string
	Digest    string // of Manifest
	ConfigID  string // digest of the config; empty for an index
	Layers    []Descriptor
	platform  Platform
	diffIDs   []string
	blobs     map[string][]byte // by digest, without the manifests
	children  []*Image
}

// Size returns the sum of the stored sizes of config and layers, in bytes.
func (img *Image) Size() (n int64) {
	for _, b := range img.blobs {
		n += int64(len(b))
	}
	return n
}

// Build makes the image that spec describes.
func Build(spec Spec) (*Image, error) {
	if spec.Architecture == "" {
		spec.Architecture = runtime.GOARCH
	}
	if spec.OS == "" {
		spec.OS = "linux"
	}
	img := &Image{
		MediaType: typeManifest,
		platform:  Platform{Architecture: spec.Architecture, OS: spec.OS, Variant: spec.Variant},
		blobs:     map[string][]byte{},
	}
	for i, l := range spec.Layers {
		raw, err := tarball(l.Files)
		if err != nil {
			return nil, fmt.Errorf("layer %d: %w", i, err)
		}
		blob, mediaType, err := compress(raw, l.Compression)
		if err != nil {
			return nil, fmt.Errorf("layer %d: %w", i, err)
		}
		img.diffIDs = append(img.diffIDs, digest(raw))
		img.Layers = append(img.Layers, img.add(blob, mediaType))
	}
	if err := img.finish(spec.Config); err != nil {
		return nil, err
	}
	return img, nil
}

// WithConfig returns an image of the same layers with another configuration.
func (img *Image) WithConfig(c Config) (*Image, error) {
	out := &Image{MediaType: typeManifest, platform: img.platform, Layers: img.Layers, diffIDs: img.diffIDs, blobs: map[string][]byte{}}
	for _, l := range img.Layers {
		out.blobs[l.Digest] = img.blobs[l.Digest]
	}
	if err := out.finish(c); err != nil {
		return nil, err
	}
	return out, nil
}

// finish makes config and manifest for the layers that img has.
func (img *Image) finish(c Config) error {
	config, err := json.Marshal(map[string]any{
		"created":      epoch.Format(time.RFC3339),
		"architecture": img.platform.Architecture,
		"os":           img.platform.OS,
		"config":       c,
		"rootfs":       map[string]any{"type": "layers", "diff_ids": orEmpty(img.diffIDs)},
	})
	if err != nil {
		return fmt.Errorf("image config: %w", err)
	}
	desc := img.add(config, typeConfig)
	img.ConfigID = desc.Digest
	img.Manifest, err = json.Marshal(map[string]any{
		"schemaVersion": 2, "mediaType": typeManifest, "config": desc, "layers": orEmpty(img.Layers),
	})
	if err != nil {
		return fmt.Errorf("image manifest: %w", err)
	}
	img.Digest = digest(img.Manifest)
	return nil
}

// orEmpty keeps an absent list from becoming null in JSON.
func orEmpty[T any](s []T) []T {
	if s == nil {
		return []T{}
	}
	return s
}

// NewIndex makes an index of the images, each under the platform that it was
// built for. As a part of another index, one of a single image has its platform.
func NewIndex(images ...*Image) (*Image, error) {
	index := &Image{MediaType: typeIndex, children: images, blobs: map[string][]byte{}}
	var manifests []Descriptor
	if len(images) == 1 {
		index.platform = images[0].platform
	}
	for _, c := range images {
		manifests = append(manifests, Descriptor{
			MediaType: c.MediaType, Digest: c.Digest, Size: int64(len(c.Manifest)), Platform: &c.platform,
		})
		for d, b := range c.blobs {
			index.blobs[d] = b
		}
	}
	raw, err := json.Marshal(map[string]any{"schemaVersion": 2, "mediaType": typeIndex, "manifests": manifests})
	if err != nil {
		return nil, fmt.Errorf("image index: %w", err)
	}
	index.Manifest, index.Digest = raw, digest(raw)
	return index, nil
}

func (img *Image) add(blob []byte, mediaType string) Descriptor {
	d := Descriptor{MediaType: mediaType, Digest: digest(blob), Size: int64(len(blob))}
	img.blobs[d.Digest] = blob
	return d
}

func digest(b []byte) string {
	sum := sha256.Sum256(b)
	return "sha256:" + hex.EncodeToString(sum[:])
}

func tarball(files []File) ([]byte, error) {
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, f := range files {
		h := &tar.Header{
			Name: f.Name, Typeflag: f.Type, Mode: f.Mode, Uid: f.UID, Gid: f.GID, Size: int64(len(f.Data)),
			Linkname: f.Link, Devmajor: f.Major, Devminor: f.Minor, ModTime: epoch, Format: tar.FormatPAX,
		}
		dir := f.Name != "" && f.Name[len(f.Name)-1] == '/'
		if h.Typeflag == 0 {
			h.Typeflag = tar.TypeReg
			if dir {
				h.Typeflag = tar.TypeDir
			}
		}
		if h.Mode == 0 {
			h.Mode = 0o644
			if dir {
				h.Mode = 0o755
			}
		}
		for k, v := range f.Attributes {
			if h.PAXRecords == nil {
				h.PAXRecords = map[string]string{}
			}
			h.PAXRecords["SCHILY.xattr."+k] = v
		}
		if err := w.WriteHeader(h); err != nil {
			return nil, fmt.Errorf("file %q: %w", f.Name, err)
		}
		if _, err := w.Write(f.Data); err != nil {
			return nil, fmt.Errorf("file %q: %w", f.Name, err)
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return buf.Bytes(), nil
}

func compress(raw []byte, c Compression) (blob []byte, mediaType string, err error) {
	var buf bytes.Buffer
	var w io.WriteCloser
	switch c {
	case Plain:
		return raw, typeLayer, nil
	case Gzip:
		w, err = gzip.NewWriterLevel(&buf, gzip.BestSpeed)
	case Zstd:
		w, err = zstd.NewWriter(&buf, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(1))
	default:
		return nil, "", fmt.Errorf("compression %q unknown", c)
	}
	if err != nil {
		return nil, "", err
	}
	if _, err := w.Write(raw); err != nil {
		return nil, "", err
	}
	if err := w.Close(); err != nil {
		return nil, "", err
	}
	return buf.Bytes(), typeLayer + "+" + string(c), nil
}
