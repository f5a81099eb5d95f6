package imageservice

import (
	"context"
	"errors"
	"fmt"

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
	ctx, stop := s.patience(ctx)
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
// sigstore.
func (s *Service) checkSigned(ctx context.Context, src *source, auth *Auth, ref types.ImageReference, d digest.Digest) error {
	var errs []error
	for _, named := range src.signatureNames() {
		signed, sys, err := s.signatureSource(src, named, auth, d)
		if err != nil {
			return err
		}
		got, err := signed.NewImageSource(ctx, sys)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		defer got.Close()
		img := image.UnparsedInstanceWithReference(image.UnparsedInstance(got, &d), ref)
		if err = s.allowed(ctx, img); err == nil {
			return nil
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// signatureNames are the names under which signatures are asked for. nil stands for the
// image's own name, whose mirrors containers/image finds in registries.conf by itself;
// those of hosts.toml it does not know, so they are given one by one.
func (src *source) signatureNames() []*remote {
	var out []*remote
	for _, r := range src.remotes {
		if r.mirror && r.Namespace != "" && r.Path == "/v2" {
			out = append(out, r)
		}
	}
	return append(out, nil)
}

func (s *Service) signatureSource(src *source, r *remote, auth *Auth, d digest.Digest) (types.ImageReference, *types.SystemContext, error) {
	sys := s.systemContext()
	named := src.named
	if r != nil {
		named = r.named
	} else {
		r = src.remotes[len(src.remotes)-1]
		if auth.isFor(serverHost(r.Host), true) {
			sys.DockerAuthConfig = &types.DockerAuthConfig{
				Username: r.Credentials.Username, Password: r.Credentials.Password, IdentityToken: r.Credentials.IdentityToken,
			}
			sys.DockerBearerRegistryToken = r.Credentials.RegistryToken
		}
	}
	if r.insecure {
		sys.DockerInsecureSkipTLSVerify = types.OptionalBoolTrue
	}
	canonical, err := reference.WithDigest(reference.TrimNamed(named), d)
	if err != nil {
		return nil, nil, fmt.Errorf("%w: %w", ErrInvalidReference, err)
	}
	ref, err := docker.NewReference(canonical)
	return ref, sys, err
}
