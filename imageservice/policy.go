package imageservice

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containers/image/v5/docker"
	"github.com/containers/image/v5/docker/reference"
	"github.com/containers/image/v5/image"
	"github.com/containers/image/v5/signature"
	"github.com/containers/image/v5/types"
	"github.com/opencontainers/go-digest"
)

// errWantsSignatures is how an image without signatures finds out that the policy looks
// at some.
var errWantsSignatures = errors.New("the policy looks at signatures")

// unsigned is an image as the policy sees it, as long as it asks for no signature: most
// policies do not, and then nothing is fetched for it.
type unsigned struct {
	ref  types.ImageReference
	blob []byte
	mime string
}

func (u unsigned) Reference() types.ImageReference                  { return u.ref }
func (u unsigned) Manifest(context.Context) ([]byte, string, error) { return u.blob, u.mime, nil }
func (u unsigned) Signatures(ctx context.Context) ([][]byte, error) { return nil, errWantsSignatures }

// checkPolicy asks the signature policy before anything else of the image is believed.
func (s *Service) checkPolicy(ctx context.Context, src *source, auth *Auth, blob []byte, mime string, d digest.Digest) error {
	ref, err := docker.NewReference(src.named)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrInvalidReference, err)
	}
	ctx, stop := patience(ctx, s.cfg.StallTimeout)
	defer stop()
	err = s.allowed(ctx, unsigned{ref, blob, mime})
	if errors.Is(err, errWantsSignatures) {
		err = s.checkSigned(ctx, src, auth, ref, d)
	}
	if err != nil {
		return fmt.Errorf("signature policy: %w", classify(because(ctx, err)))
	}
	return nil
}

func (s *Service) allowed(ctx context.Context, img types.UnparsedImage) error {
	pc, err := signature.NewPolicyContext(s.policy.Load())
	if err != nil {
		return err
	}
	defer pc.Destroy() //nolint:errcheck // of no consequence once the answer is there
	allowed, err := pc.IsRunningImageAllowed(ctx, img)
	if err == nil && !allowed {
		return ErrPolicyRejected
	}
	return err
}

// checkSigned has containers/image fetch the signatures of the manifest with digest d:
// from where registries.d says, from the registry's own extension, or the attachments of
// sigstore. It is enough if they are at one of the endpoints.
func (s *Service) checkSigned(ctx context.Context, src *source, auth *Auth, ref types.ImageReference, d digest.Digest) error {
	var errs []error
	for _, r := range append(src.knownByHosts(d), nil) {
		err := s.checkSignedAt(ctx, src, r, auth, ref, d)
		if err == nil {
			return nil
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// knownByHosts are the mirrors that only hosts.toml names, as far as containers/image can
// ask them: it knows no other path of the API than /v2. Those of registries.conf it
// finds by itself from the image's name.
func (src *source) knownByHosts(d digest.Digest) []*remote {
	return slices.DeleteFunc(src.usable(d.String(), false), func(r *remote) bool {
		return r.Namespace == "" || r.Path != "/v2" && !strings.HasPrefix(r.Path, "/v2/")
	})
}

// checkSignedAt is checkSigned at one mirror, or at the image's own name if that is nil.
func (s *Service) checkSignedAt(ctx context.Context, src *source, r *remote, auth *Auth, ref types.ImageReference, d digest.Digest) error {
	sys, named := s.systemContext(), src.named
	if r != nil {
		named = r.named
		done, err := r.describe(sys)
		if err != nil {
			return err
		}
		defer done()
	} else {
		own := src.remotes[len(src.remotes)-1]
		if own.insecure {
			sys.DockerInsecureSkipTLSVerify = types.OptionalBoolTrue
		}
		if auth.isFor(serverHost(own.Host), true) {
			sys.DockerAuthConfig = &types.DockerAuthConfig{
				Username: own.Credentials.Username, Password: own.Credentials.Password, IdentityToken: own.Credentials.IdentityToken,
			}
			sys.DockerBearerRegistryToken = own.Credentials.RegistryToken
		}
	}
	canonical, err := reference.WithDigest(reference.TrimNamed(named), d)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrInvalidReference, err)
	}
	at, err := docker.NewReference(canonical)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrInvalidReference, err)
	}
	got, err := at.NewImageSource(ctx, sys)
	if err != nil {
		return err
	}
	defer got.Close()
	return s.allowed(ctx, image.UnparsedInstanceWithReference(image.UnparsedInstance(got, &d), ref))
}

// describe tells containers/image what hosts.toml says about the endpoint. It takes
// certificates from a directory of its own form, which exists until done.
func (r *remote) describe(sys *types.SystemContext) (done func(), err error) {
	if r.insecure || r.Scheme == "http" {
		sys.DockerInsecureSkipTLSVerify = types.OptionalBoolTrue
	}
	if len(r.caFiles)+len(r.clientFiles) == 0 {
		return func() {}, nil
	}
	dir, err := os.MkdirTemp("", "berth-certs-")
	if err != nil {
		return nil, fmt.Errorf("signatures: %w", err)
	}
	links := map[string]string{}
	for i, f := range r.caFiles {
		links[fmt.Sprintf("%d.crt", i)] = f
	}
	for i, f := range r.clientFiles {
		links[fmt.Sprintf("%d.cert", i)], links[fmt.Sprintf("%d.key", i)] = f[0], cmp.Or(f[1], f[0])
	}
	for name, target := range links {
		if err := os.Symlink(target, filepath.Join(dir, name)); err != nil {
			os.RemoveAll(dir)
			return nil, fmt.Errorf("signatures: %w", err)
		}
	}
	sys.DockerCertPath = dir
	return func() { os.RemoveAll(dir) }, nil
}
