package imageservice

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containers/image/v5/docker"
	"github.com/containers/image/v5/docker/reference"
	"github.com/containers/image/v5/image"
	"github.com/containers/image/v5/manifest"
	"github.com/containers/image/v5/pkg/blobinfocache/none"
	"github.com/containers/image/v5/pkg/sysregistriesv2"
	"github.com/containers/image/v5/signature"
	"github.com/containers/image/v5/types"
	"github.com/opencontainers/go-digest"
)

// systemContext is what all pulls have in common.
func (s *Service) systemContext() *types.SystemContext {
	return &types.SystemContext{
		SystemRegistriesConfPath: s.cfg.RegistriesConf, SystemRegistriesConfDirPath: s.cfg.RegistriesConfDir,
		RegistriesDirPath: s.cfg.RegistriesDir, DockerPerHostCertDirPath: s.cfg.CertsDir, AuthFilePath: s.cfg.AuthFile,
		OSChoice: s.cfg.OS, ArchitectureChoice: s.cfg.Architecture, VariantChoice: s.cfg.Variant,
		DockerRegistryUserAgent: "berth",
	}
}

// contextFor adds what one reference and its credentials need.
func (s *Service) contextFor(named reference.Named, auth *Auth) (*types.SystemContext, error) {
	sys := s.systemContext()
	host := reference.Domain(named)
	configured, err := sysregistriesv2.FindRegistry(sys, named.Name())
	if err != nil {
		return nil, fmt.Errorf("registries configuration: %w", err)
	}
	if configured != nil && configured.Blocked {
		return nil, fmt.Errorf("%s is blocked in registries.conf: %w", configured.Prefix, ErrPolicyRejected)
	}
	if slices.Contains(s.cfg.InsecureRegistries, host) || configured == nil && isLoopback(host) && !s.hasCerts(host) {
		sys.DockerInsecureSkipTLSVerify = types.OptionalBoolTrue
	}
	return sys, auth.apply(sys, host)
}

func isLoopback(hostPort string) bool {
	host := hostPort
	if h, _, err := net.SplitHostPort(hostPort); err == nil {
		host = h
	}
	ip := net.ParseIP(strings.Trim(host, "[]"))
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

// hasCerts: whoever installed certificates for a registry wants them checked.
func (s *Service) hasCerts(host string) bool {
	dirs := []string{s.cfg.CertsDir}
	if s.cfg.CertsDir == "" {
		dirs = []string{"/etc/containers/certs.d", "/etc/docker/certs.d"}
	}
	for _, d := range dirs {
		if _, err := os.Stat(filepath.Join(d, host)); err == nil {
			return true
		}
	}
	return false
}

// apply sets the credentials, unless they are for another registry.
func (a *Auth) apply(sys *types.SystemContext, host string) error {
	if a == nil || a.ServerAddress != "" && serverHost(a.ServerAddress) != serverHost(host) {
		return nil
	}
	switch {
	case a.RegistryToken != "":
		sys.DockerBearerRegistryToken = a.RegistryToken
	case a.IdentityToken != "":
		sys.DockerAuthConfig = &types.DockerAuthConfig{IdentityToken: a.IdentityToken}
	case a.Username != "":
		sys.DockerAuthConfig = &types.DockerAuthConfig{Username: a.Username, Password: a.Password}
	case a.Auth != "":
		b, err := base64.StdEncoding.DecodeString(a.Auth)
		user, password, ok := strings.Cut(string(b), ":")
		if err != nil || !ok {
			return fmt.Errorf("credentials: auth is not the base64 of user:password: %w", ErrUnauthorized)
		}
		sys.DockerAuthConfig = &types.DockerAuthConfig{Username: user, Password: strings.TrimRight(password, "\x00")}
	}
	return nil
}

// serverHost brings the forms in which registries are named in credentials to one.
func serverHost(address string) string {
	_, rest, ok := strings.Cut(address, "://")
	if !ok {
		rest = address
	}
	host, _, _ := strings.Cut(rest, "/")
	switch host {
	case "index.docker.io", "registry-1.docker.io":
		return "docker.io"
	}
	return host
}

// plan is what a manifest and a config say about an image to pull.
type plan struct {
	named       reference.Named
	src         types.ImageSource
	id          string
	top         digest.Digest // what the name points to: an index or a manifest
	manifest    []byte
	manifestSum digest.Digest
	config      []byte
	parsed      configFile
	layers      []layerRow
}

// resolve asks the registry for manifest and config and checks them. On success the
// plan's source is open and the caller's to close.
func (s *Service) resolve(ctx context.Context, p *pull, named reference.Named, auth *Auth) (_ *plan, err error) {
	sys, err := s.contextFor(named, auth)
	if err != nil {
		return nil, err
	}
	src, err := s.openSource(ctx, sys, named)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			src.Close()
		}
	}()
	pl := &plan{named: named, src: src}
	instance, err := s.chooseInstance(ctx, pl, sys)
	if err != nil {
		return nil, err
	}
	p.enter(stagePolicy)
	if err := s.checkPolicy(ctx, instance); err != nil {
		return nil, err
	}
	p.enter(stageConfig)
	if err := s.readManifest(ctx, pl, instance); err != nil {
		return nil, err
	}
	return pl, nil
}

// patience bounds a step that is one request or a few.
func (s *Service) patience(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeoutCause(ctx, s.cfg.StallTimeout,
		fmt.Errorf("no answer within %s: %w: %w", s.cfg.StallTimeout, ErrRegistryUnavailable, ErrStalled))
}

// because prefers the reason for which a context ended to "context canceled".
func because(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); err != nil && cause != nil && !errors.Is(err, cause) {
		return fmt.Errorf("%w (%w)", cause, err)
	}
	return err
}

// openSource finds the endpoint that has the manifest, and tries again what may be a hiccup.
func (s *Service) openSource(ctx context.Context, sys *types.SystemContext, named reference.Named) (types.ImageSource, error) {
	ref, err := docker.NewReference(named)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrInvalidReference, err)
	}
	ctx, stop := s.patience(ctx)
	defer stop()
	for attempt := 0; ; attempt++ {
		src, err := ref.NewImageSource(ctx, sys)
		if err == nil {
			return src, nil
		}
		err = classify(because(ctx, err))
		if attempt == 2 || !worthRetrying(err) || pause(ctx, backoff(attempt)) != nil {
			return nil, err
		}
	}
}

// backoff is the wait before attempt n+1, n from 0.
func backoff(n int) time.Duration { return min(200*time.Millisecond<<min(n, 10), 5*time.Second) }

func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// chooseInstance reads what the name points to and, if that is an index, chooses the
// manifest for this node's platform from it.
func (s *Service) chooseInstance(ctx context.Context, pl *plan, sys *types.SystemContext) (*image.UnparsedImage, error) {
	ctx, stop := s.patience(ctx)
	defer stop()
	unparsed := image.UnparsedInstance(pl.src, nil)
	blob, mime, err := manifestOf(ctx, unparsed)
	if err != nil {
		return nil, err
	}
	if pl.top, err = topDigest(pl.named, blob); err != nil {
		return nil, err
	}
	if !manifest.MIMETypeIsMultiImage(mime) {
		return unparsed, nil
	}
	list, err := manifest.ListFromBlob(blob, mime)
	if err != nil {
		return nil, fmt.Errorf("index: %w: %w", ErrInvalidImage, err)
	}
	chosen, err := list.ChooseInstance(sys)
	if err != nil {
		return nil, fmt.Errorf("platform %s: %w: %w", s.platform(), ErrUnsupported, err)
	}
	if err := chosen.Validate(); err != nil {
		return nil, fmt.Errorf("index: digest %.100q: %w: %w", chosen, ErrInvalidImage, err)
	}
	return image.UnparsedInstance(pl.src, &chosen), nil
}

func (s *Service) platform() string {
	p := s.cfg.OS + "/" + s.cfg.Architecture
	if s.cfg.Variant != "" {
		p += "/" + s.cfg.Variant
	}
	return p
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

// manifestOf reads a manifest, whose digest is checked where one is known, with its
// media type, guessed when the registry did not tell a usable one.
func manifestOf(ctx context.Context, u *image.UnparsedImage) ([]byte, string, error) {
	blob, mime, err := u.Manifest(ctx)
	if err != nil {
		err = because(ctx, err)
		if strings.Contains(err.Error(), "does not match provided manifest digest") {
			return nil, "", mark(ErrDigestMismatch, err)
		}
		return nil, "", fmt.Errorf("manifest: %w", err)
	}
	if len(blob) > maxManifestBytes {
		return nil, "", fmt.Errorf("manifest of %d bytes, at most %d: %w", len(blob), maxManifestBytes, ErrTooLarge)
	}
	known := []string{
		manifest.DockerV2ListMediaType, ociIndexType, manifest.DockerV2Schema2MediaType, ociManifestType,
		manifest.DockerV2Schema1MediaType, manifest.DockerV2Schema1SignedMediaType,
	}
	if !slices.Contains(known, mime) {
		mime = manifest.GuessMIMEType(blob)
	}
	return blob, mime, nil
}

const (
	ociIndexType    = "application/vnd.oci.image.index.v1+json"
	ociManifestType = "application/vnd.oci.image.manifest.v1+json"
	ociConfigType   = "application/vnd.oci.image.config.v1+json"
)

// checkPolicy asks the signature policy before anything else of the image is believed.
func (s *Service) checkPolicy(ctx context.Context, u *image.UnparsedImage) error {
	pc, err := signature.NewPolicyContext(s.policy.Load())
	if err != nil {
		return fmt.Errorf("signature policy: %w", err)
	}
	defer pc.Destroy() //nolint:errcheck // of no consequence once the answer is there
	ctx, stop := s.patience(ctx)
	defer stop()
	allowed, err := pc.IsRunningImageAllowed(ctx, u)
	if err != nil {
		return fmt.Errorf("signature policy: %w", classify(because(ctx, err)))
	}
	if !allowed {
		return fmt.Errorf("signature policy: %w", ErrPolicyRejected)
	}
	return nil
}

// readManifest fills the plan from a manifest and its config.
func (s *Service) readManifest(ctx context.Context, pl *plan, u *image.UnparsedImage) error {
	ctx, stop := s.patience(ctx)
	defer stop()
	blob, mime, err := manifestOf(ctx, u)
	if err != nil {
		return err
	}
	if pl.manifestSum, err = manifest.Digest(blob); err != nil {
		return fmt.Errorf("manifest: %w: %w", ErrInvalidImage, err)
	}
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
	if err := pl.setLayers(m); err != nil {
		return err
	}
	return s.readConfig(ctx, pl, m.ConfigInfo())
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
	if t := info.MediaType; t != ociConfigType && t != manifest.DockerV2Schema2ConfigMediaType {
		return fmt.Errorf("config of type %.100q: an artifact, not a container image: %w", t, ErrUnsupported)
	}
	if info.Size > s.cfg.MaxConfigBytes {
		return fmt.Errorf("config of %d bytes, at most %d: %w", info.Size, s.cfg.MaxConfigBytes, ErrTooLarge)
	}
	b, err := s.smallBlob(ctx, pl.src, types.BlobInfo{Digest: info.Digest, Size: info.Size, MediaType: info.MediaType})
	if err != nil {
		return fmt.Errorf("config %s: %w", info.Digest, err)
	}
	pl.id, pl.config = info.Digest.String(), b
	if err := json.Unmarshal(b, &pl.parsed); err != nil {
		return fmt.Errorf("config %s: %w: %w", info.Digest, ErrInvalidImage, err)
	}
	if os := pl.parsed.OS; os != "" && os != s.cfg.OS {
		return fmt.Errorf("image for %.50s/%.50s, this node is %s: %w", os, pl.parsed.Architecture, s.platform(), ErrUnsupported)
	}
	return pl.setDiffIDs()
}

// smallBlob reads a whole blob into memory and verifies it.
func (s *Service) smallBlob(ctx context.Context, src types.ImageSource, info types.BlobInfo) ([]byte, error) {
	for attempt := 0; ; attempt++ {
		b, err := s.smallBlobOnce(ctx, src, info)
		if err == nil {
			return b, nil
		}
		err = classify(because(ctx, err))
		if attempt == 2 || !worthRetrying(err) || pause(ctx, backoff(attempt)) != nil {
			return nil, err
		}
	}
}

func (s *Service) smallBlobOnce(ctx context.Context, src types.ImageSource, info types.BlobInfo) ([]byte, error) {
	r, _, err := src.GetBlob(ctx, info, none.NoCache)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	b, err := io.ReadAll(io.LimitReader(r, s.cfg.MaxConfigBytes+1))
	if err != nil {
		return nil, mark(ErrRegistryUnavailable, err)
	}
	if int64(len(b)) > s.cfg.MaxConfigBytes {
		return nil, fmt.Errorf("more than %d bytes: %w", s.cfg.MaxConfigBytes, ErrTooLarge)
	}
	if got := info.Digest.Algorithm().FromBytes(b); got != info.Digest {
		return nil, fmt.Errorf("received %d bytes with digest %s: %w", len(b), got, ErrDigestMismatch)
	}
	return b, nil
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

func (pl *plan) chainIDs() []string {
	ids := make([]string, len(pl.layers))
	for i, l := range pl.layers {
		ids[i] = l.ChainID
	}
	return ids
}

// names are those that this pull gives to the image: a tag only if one was asked for, and
// the digest of what the registry holds under the name.
func (pl *plan) names() (tags, digests []string) {
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
