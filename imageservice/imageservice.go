// Package imageservice keeps the images of the node: it resolves references,
// pulls, lists and removes images, and frees the layers that nothing needs.
//
// # Vocabulary
//
//   - image: a config and a chain of layers. Its ID is the digest of the config.
//   - name: a tag ("host/repo:tag") or a repo digest ("host/repo@sha256:…") that
//     points to one image. A repo digest carries the digest that the registry was
//     asked for: the index when the image is multi-arch.
//   - layer: one unpacked tar stream, a committed snapshot named by its chain ID.
//   - endpoint: one place to ask for an image, with all that is configured for it; source
//     is the endpoints of one pull, of which each part of the image may come from another.
//   - flight: a pull, or the unpacking of one layer, that several callers share.
//   - manifest of a layer: what it held when it was unpacked, beside it on disk.
//   - hidden: an image with a layer that a check after a crash found damaged; invisible
//     until it is pulled or imported again, which makes that layer anew.
//   - view: the immutable state that all reads use; a new one replaces it after
//     each commit to the book, so that reads take no lock.
//
// # The life of a pull
//
// Reference, manifest, policy, platform, config; then all missing layers at the
// same time, each downloaded, verified, decompressed and unpacked in one pass into
// a directory of its own and committed on its parent; then one sync of the file
// system; then one transaction that makes the image and its names visible. A crash
// before that transaction leaves layers that no image needs, which New removes.
//
// # Caveats
//
//   - Removing an image by a name takes only that from it while it has others; the kubelet
//     removes by ID, with which all of them go.
//   - No compressed blob is kept, so an image cannot be pushed from here.
//   - Layers unpack without their parents in sight. Directories that an archive uses
//     and does not list get the metadata of the parent layers' directory; a directory
//     that is a symbolic link in a parent layer becomes a directory.
//   - Unless registries.conf says otherwise, registries on loopback addresses may be
//     plain HTTP, or HTTPS with any certificate.
package imageservice

import (
	"errors"
	"time"
)

// Errors of this package, tested with errors.Is. Each error's text names the
// reference, and the registry when one was asked.
var (
	// ErrNotFound: no image here has that name or ID, or the registry does
	// not have it.
	ErrNotFound = errors.New("image not found")
	// ErrInvalidReference: the text is not an image reference.
	ErrInvalidReference = errors.New("invalid image reference")
	// ErrUnauthorized: the registry or its token server refused the credentials,
	// or wants some.
	ErrUnauthorized = errors.New("registry denied access")
	// ErrRegistryUnavailable: the registry could not be reached, broke the
	// connection too often or answered with a server error.
	ErrRegistryUnavailable = errors.New("registry unavailable")
	// ErrStalled: a registry sent nothing, or next to nothing, for StallTimeout.
	// Such an error is ErrRegistryUnavailable as well.
	ErrStalled = errors.New("registry stalled")
	// ErrDigestMismatch: what was received is not what its digest says.
	ErrDigestMismatch = errors.New("digest mismatch")
	// ErrPolicyRejected: the signature policy or a blocked registry forbids it.
	ErrPolicyRejected = errors.New("image rejected by policy")
	// ErrUnsupported: an image of a kind, format or platform that berth does not run.
	ErrUnsupported = errors.New("image not supported")
	// ErrInvalidImage: manifest, config or layer that breaks its specification, or
	// that tries to reach outside of its root.
	ErrInvalidImage = errors.New("invalid image")
	// ErrTooLarge: a limit of Config was passed.
	ErrTooLarge = errors.New("image too large")
	// ErrClosed: the service was closed.
	ErrClosed = errors.New("image service closed")
)

// Auth is what the caller knows about credentials, as CRI's AuthConfig has it.
// The first that is set counts: RegistryToken, IdentityToken, Username, Auth.
type Auth struct {
	Username      string
	Password      string
	Auth          string // base64 of "user:password"
	ServerAddress string // the registry that the rest is for; "" for whatever is asked
	IdentityToken string // OAuth2 refresh token
	RegistryToken string // bearer token, sent as it is
}

// Image is one image of the node. Its slices and maps are shared: read only.
type Image struct {
	ID           string   // "sha256:<64 hex>", the digest of the config
	RepoTags     []string // "host/repo:tag", sorted
	RepoDigests  []string // "host/repo@sha256:…", sorted
	Size         uint64   // bytes of its unpacked layers on disk
	ChainID      string   // the snapshot to Prepare from; "" when it has no layers
	Config       ImageConfig
	Pinned       bool      // never to be removed by a garbage collector
	Created      time.Time // as the image says; may be zero
	Pulled       time.Time // when it was first complete here
	OS           string
	Architecture string
	Variant      string
}

// ImageConfig is the part of an image's config that containers start from
// (OCI image-spec, config.md, "config").
type ImageConfig struct {
	User         string
	Env          []string
	Entrypoint   []string
	Cmd          []string
	WorkingDir   string
	StopSignal   string
	Volumes      map[string]struct{}
	ExposedPorts map[string]struct{}
	Labels       map[string]string
}

// FsUsage is what the image layers take.
type FsUsage struct {
	Mountpoint string // directory on the file system that holds the layers
	Bytes      uint64
	Inodes     uint64
	At         time.Time // when this was last right
	// Writable is the file system of containers' writable layers, if it is another one;
	// then with all that is in use there.
	Writable *FsUsage
}
