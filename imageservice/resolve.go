package imageservice

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/containers/image/v5/docker/reference"
	"github.com/containers/image/v5/manifest"
	"github.com/containers/image/v5/types"
	"github.com/opencontainers/go-digest"
)

// systemContext is what all pulls have in common.
func (s *Service) systemContext() *types.SystemContext {
	sys := &types.SystemContext{
		SystemRegistriesConfPath: s.cfg.RegistriesConf, SystemRegistriesConfDirPath: s.cfg.RegistriesConfDir,
		RegistriesDirPath: s.cfg.RegistriesDir, DockerPerHostCertDirPath: s.cfg.CertsDir, AuthFilePath: s.cfg.AuthFile,
		OSChoice: s.cfg.OS, ArchitectureChoice: s.cfg.Architecture, VariantChoice: s.cfg.Variant,
		DockerRegistryUserAgent: userAgent,
	}
	if s.cfg.Architecture == runtime.GOARCH && s.cfg.Variant == "" {
		sys.ArchitectureChoice = "" // so that the variant is found out
	}
	return sys
}

// plan is what a manifest and a config say about an image to pull.
type plan struct {
	named       reference.Named
	src         *source
	id          string
	top         digest.Digest // what the name points to: an index or a manifest
	manifest    []byte
	manifestSum digest.Digest
	config      []byte
	parsed      configFile
	layers      []layerRow

	// Of an import, instead of named and src:
	local         func(digest.Digest) (io.ReadCloser, error) // opens a layer's bytes
	tags, digests []string
	pin           bool
}

// resolve asks for manifest and config and checks them. On success the plan's source is
// open and the caller's to close.
func (s *Service) resolve(ctx context.Context, p *pull, named reference.Named, auth *Auth) (_ *plan, err error) {
	if err := failpoint(ctx, verbPull, stageManifest); err != nil {
		return nil, err
	}
	src, err := s.openSource(ctx, named, auth, p.trouble)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			src.Close()
		}
	}()
	pl := &plan{named: named, src: src}
	blob, mime, err := s.chooseInstance(ctx, pl)
	if err != nil {
		return nil, err
	}
	if pl.manifestSum, err = manifest.Digest(blob); err != nil {
		return nil, fmt.Errorf("manifest: %w: %w", ErrInvalidImage, err)
	}
	if err := p.reach(ctx, stagePolicy); err != nil {
		return nil, err
	}
	if err := s.checkPolicy(ctx, src, auth, blob, mime, pl.manifestSum); err != nil {
		return nil, err
	}
	if err := p.reach(ctx, stageConfig); err != nil {
		return nil, err
	}
	if err := s.readManifest(ctx, pl, blob, mime); err != nil {
		return nil, err
	}
	return pl, nil
}

// patience bounds a step that is one request or a few.
func patience(ctx context.Context, d time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeoutCause(ctx, d, fmt.Errorf("no answer within %s: %w: %w", d, ErrRegistryUnavailable, ErrStalled))
}

// because prefers the reason for which a context ended to "context canceled".
func because(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); err != nil && cause != nil && !errors.Is(err, cause) {
		return fmt.Errorf("%w (%w)", cause, err)
	}
	return err
}

// chooseInstance reads what the name points to and, if that is an index, the manifest for
// this node's platform from it.
func (s *Service) chooseInstance(ctx context.Context, pl *plan) ([]byte, string, error) {
	blob, mime, err := manifestOf(ctx, pl.src, "")
	if err != nil {
		return nil, "", err
	}
	if pl.top, err = topDigest(pl.named, blob); err != nil {
		return nil, "", err
	}
	for depth := 0; manifest.MIMETypeIsMultiImage(mime); depth++ {
		if depth == maxIndexDepth {
			return nil, "", fmt.Errorf("%d indexes inside one another, at most %d: %w", depth+1, maxIndexDepth, ErrUnsupported)
		}
		chosen, err := s.choose(blob, mime)
		if err != nil {
			return nil, "", err
		}
		if blob, mime, err = manifestOf(ctx, pl.src, chosen); err != nil {
			return nil, "", err
		}
	}
	return blob, mime, nil
}

// topDigest is that of the reference, which Manifest has checked, or of what came.
func topDigest(named reference.Named, blob []byte) (digest.Digest, error) {
	if d, ok := named.(reference.Digested); ok {
		return d.Digest(), nil
	}
	d, err := manifest.Digest(blob)
	if err != nil {
		return "", fmt.Errorf("manifest: %w: %w", ErrInvalidImage, err)
	}
	return d, nil
}

// manifestOf reads a manifest, whose digest is checked where one is known, with its media
// type, guessed when the registry did not tell a usable one.
func manifestOf(ctx context.Context, src *source, d digest.Digest) ([]byte, string, error) {
	m, err := src.manifest(ctx, d)
	if err != nil {
		return nil, "", err
	}
	known := []string{
		manifest.DockerV2ListMediaType, ociIndexType, manifest.DockerV2Schema2MediaType, ociManifestType,
		manifest.DockerV2Schema1MediaType, manifest.DockerV2Schema1SignedMediaType,
	}
	mime := m.MediaType
	if !slices.Contains(known, mime) {
		mime = manifest.GuessMIMEType(m.Body)
	}
	return m.Body, mime, nil
}

const (
	ociIndexType    = "application/vnd.oci.image.index.v1+json"
	ociManifestType = "application/vnd.oci.image.manifest.v1+json"
	ociConfigType   = "application/vnd.oci.image.config.v1+json"
)

// readManifest fills the plan from a manifest and its config.
func (s *Service) readManifest(ctx context.Context, pl *plan, blob []byte, mime string) error {
	switch mime {
	case manifest.DockerV2Schema2MediaType, ociManifestType:
	case manifest.DockerV2Schema1MediaType, manifest.DockerV2Schema1SignedMediaType:
		return fmt.Errorf("manifest of Docker's schema 1, obsolete since 2017: push it again with a newer tool: %w", ErrUnsupported)
	default:
		return fmt.Errorf("manifest of type %.100q: %w", mime, ErrUnsupported)
	}
	m, err := manifest.FromBlob(blob, mime)
	if err != nil {
		return fmt.Errorf("manifest: %w: %w", ErrInvalidImage, err)
	}
	pl.manifest = blob
	info := m.ConfigInfo()
	// Before its layers, which are of any type too.
	if t := info.MediaType; t != ociConfigType && t != manifest.DockerV2Schema2ConfigMediaType {
		return fmt.Errorf("config of type %.100q: an artifact, not a container image: %w", t, ErrUnsupported)
	}
	if err := pl.setLayers(m); err != nil {
		return err
	}
	return s.readConfig(ctx, pl, info)
}

// setLayers checks the manifest's layers one by one.
func (pl *plan) setLayers(m manifest.Manifest) error {
	infos := m.LayerInfos()
	if len(infos) > maxLayers {
		return fmt.Errorf("%d layers, at most %d: %w", len(infos), maxLayers, ErrTooLarge)
	}
	for i, l := range infos {
		if err := l.Digest.Validate(); err != nil {
			return fmt.Errorf("layer %d: digest %.100q: %w: %w", i+1, l.Digest, ErrInvalidImage, err)
		}
		if l.Size < 0 {
			return fmt.Errorf("layer %d: size %d: %w", i+1, l.Size, ErrInvalidImage)
		}
		if err := checkLayerType(l.MediaType); err != nil {
			return fmt.Errorf("layer %d (%s): %w", i+1, l.Digest, err)
		}
		pl.layers = append(pl.layers, layerRow{Digest: l.Digest.String(), MediaType: l.MediaType, Size: l.Size})
	}
	return nil
}

// checkLayerType refuses what is no archive to unpack, before anything is fetched.
func checkLayerType(t string) error {
	switch {
	case strings.Contains(t, "foreign"), strings.Contains(t, "nondistributable"):
		return fmt.Errorf("foreign layer, to be fetched from elsewhere: %w", ErrUnsupported)
	case strings.HasSuffix(t, "+encrypted"):
		return fmt.Errorf("encrypted layer: %w", ErrUnsupported)
	case strings.HasPrefix(t, "application/vnd.oci.image.layer.v1.tar"), strings.HasPrefix(t, "application/vnd.docker.image.rootfs.diff.tar"):
		return nil
	}
	return fmt.Errorf("media type %.100q: %w", t, ErrUnsupported)
}

// readConfig reads the config, whose digest is the image's ID, and puts the diff IDs
// that it lists beside the layers.
func (s *Service) readConfig(ctx context.Context, pl *plan, info types.BlobInfo) error {
	if err := info.Digest.Validate(); err != nil {
		return fmt.Errorf("config: digest %.100q: %w: %w", info.Digest, ErrInvalidImage, err)
	}
	if info.Digest.Algorithm() != digest.SHA256 {
		return fmt.Errorf("config: digest algorithm %s: %w", info.Digest.Algorithm(), ErrUnsupported)
	}
	if info.Size > s.cfg.MaxConfigBytes {
		return fmt.Errorf("config of %d bytes, at most %d: %w", info.Size, s.cfg.MaxConfigBytes, ErrTooLarge)
	}
	b, err := pl.src.smallBlob(ctx, info.Digest)
	if err != nil {
		return fmt.Errorf("config %s: %w", info.Digest, err)
	}
	return s.setConfig(pl, info.Digest, b)
}

// setConfig takes what the plan needs from a verified config, whose digest is the image's ID.
func (s *Service) setConfig(pl *plan, id digest.Digest, b []byte) error {
	pl.id, pl.config = id.String(), b
	if err := json.Unmarshal(b, &pl.parsed); err != nil {
		return fmt.Errorf("config %s: %w: %w", id, ErrInvalidImage, err)
	}
	if os := pl.parsed.OS; os != "" && os != s.cfg.OS {
		return fmt.Errorf("image for %.50s/%.50s, this node is %s: %w", os, pl.parsed.Architecture, s.platform(), ErrUnsupported)
	}
	return pl.setDiffIDs()
}

// smallBlob reads a whole blob into memory and verifies it.
func (src *source) smallBlob(ctx context.Context, d digest.Digest) (b []byte, err error) {
	limit := src.cfg.MaxConfigBytes
	err = src.ask(ctx, src.usable(d.String(), false), func(ctx context.Context, r *remote) error {
		blob, err := r.client.Blob(ctx, d.String(), 0, -1, "")
		if err != nil {
			return err
		}
		defer blob.Close()
		if b, err = io.ReadAll(io.LimitReader(blob, limit+1)); err != nil {
			return mark(ErrRegistryUnavailable, err)
		}
		if int64(len(b)) > limit {
			return fmt.Errorf("more than %d bytes: %w", limit, ErrTooLarge)
		}
		if got := d.Algorithm().FromBytes(b); got != d {
			return fmt.Errorf("received %d bytes with digest %s: %w", len(b), got, ErrDigestMismatch)
		}
		return nil
	})
	return b, err
}

// configFile is an image config as OCI and Docker write it, as far as berth reads it.
type configFile struct {
	Created      string `json:"created"`
	OS           string `json:"os"`
	Architecture string `json:"architecture"`
	Variant      string `json:"variant"`
	Config       struct {
		User         string
		Env          []string
		Entrypoint   []string
		Cmd          []string
		WorkingDir   string
		StopSignal   string
		Volumes      map[string]struct{}
		ExposedPorts map[string]struct{}
		Labels       map[string]string
	} `json:"config"`
	RootFS struct {
		Type    string   `json:"type"`
		DiffIDs []string `json:"diff_ids"`
	} `json:"rootfs"`
}

// setDiffIDs also derives the chain IDs (OCI image-spec, config.md, "Layer ChainID").
func (pl *plan) setDiffIDs() error {
	diffs := pl.parsed.RootFS.DiffIDs
	if len(diffs) != len(pl.layers) {
		return fmt.Errorf("config lists %d layers, the manifest %d: %w", len(diffs), len(pl.layers), ErrInvalidImage)
	}
	var chain digest.Digest
	for i, d := range diffs {
		diff := digest.Digest(d)
		if err := diff.Validate(); err != nil {
			return fmt.Errorf("config: diff ID %d: %.100q: %w: %w", i+1, d, ErrInvalidImage, err)
		}
		if i == 0 {
			chain = diff
		} else {
			chain = digest.FromString(chain.String() + " " + d)
		}
		pl.layers[i].DiffID, pl.layers[i].ChainID = d, chain.String()
	}
	return nil
}

func (pl *plan) chainIDs() []string { return chainIDs(pl.layers) }

// names are those that this pull gives to the image: a tag only if one was asked for, and
// the digest of what the registry holds under the name.
func (pl *plan) names() (tags, digests []string) {
	if pl.named == nil {
		return pl.tags, pl.digests
	}
	if t, ok := pl.named.(reference.Tagged); ok {
		tags = []string{pl.named.Name() + ":" + t.Tag()}
	}
	return tags, []string{pl.named.Name() + "@" + pl.top.String()}
}

func (pl *plan) row() *imageRow {
	c := pl.parsed
	created, _ := time.Parse(time.RFC3339Nano, c.Created) // informational: zero when odd
	return &imageRow{
		Manifest: pl.manifestSum.String(), Layers: pl.layers, Config: ImageConfig(c.Config),
		OS: c.OS, Architecture: c.Architecture, Variant: c.Variant, Created: created,
	}
}

func (pl *plan) blobs() map[string][]byte {
	return map[string][]byte{pl.id: pl.config, pl.manifestSum.String(): pl.manifest}
}
