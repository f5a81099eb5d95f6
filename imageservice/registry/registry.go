// Package registry speaks the pulling half of the OCI distribution protocol with one
// endpoint.
//
// # Vocabulary
//
//   - endpoint: where the API of a registry or of its mirror is, which repository is asked
//     for there, and with what certificates, headers and credentials.
//   - challenge: what an endpoint wants to see before it answers (WWW-Authenticate).
//   - token: what a token server gives for credentials, for a scope and a time.
//
// # What it does not do
//
// It tries nothing twice, but for what authorization and the choice between HTTPS and
// HTTP need: its errors tell by Temporary and RetryAfter whether and when another try
// makes sense, and its user knows which other endpoint there is. It verifies no digest.
//
// # Safety
//
// Answers are bounded: manifests by MaxManifest, error and token bodies by smaller limits,
// redirects in number. Authorization and configured headers go to the endpoint itself and
// never follow a redirect elsewhere; credentials go to a token server over TLS unless the
// endpoint itself is without. Query strings, in which storage services put signatures, do
// not appear in errors.
package registry

import (
	"crypto/tls"
	"net/http"
	"time"
)

const (
	// MaxManifest bounds a manifest or an index in bytes, as the distribution
	// specification suggests.
	MaxManifest = 4 << 20
	// maxErrorBody, maxTokenBody bound what else is read into memory.
	maxErrorBody = 16 << 10
	maxTokenBody = 1 << 20
	// maxRedirects ends a loop of them.
	maxRedirects = 10
	// maxMessage bounds what a server's own words add to an error.
	maxMessage = 200

	defaultDialTimeout = 15 * time.Second
	handshakeTimeout   = 15 * time.Second
)

// Credentials are for one endpoint. The first that is set counts: RegistryToken,
// IdentityToken, Username.
type Credentials struct {
	Username, Password string
	IdentityToken      string // OAuth2 refresh token
	RegistryToken      string // bearer token, sent as it is
}

// Endpoint is where to ask, and how.
type Endpoint struct {
	// Scheme is "https" or "http"; "" means https, and http when that is not spoken.
	Scheme string
	// Host is host or host:port.
	Host string
	// Path is the root of the API: "/v2" but for servers that do as they like.
	Path string
	// Repository is the repository's name at this endpoint.
	Repository string
	// Namespace tells a mirror of several registries which one is meant (the query
	// parameter ns); "" for none.
	Namespace string
	// Header is sent with each request to the endpoint.
	Header http.Header
	// TLS has certificates and verification; nil for the system's.
	TLS *tls.Config
	// DialTimeout bounds the making of a connection; 0 means 15 s.
	DialTimeout time.Duration
	// Credentials are used when the endpoint asks for some.
	Credentials Credentials
	// UserAgent is sent to the endpoint, its token server and where it redirects to.
	UserAgent string
}

// String is the URL of the API, without a scheme when that is not decided.
func (e Endpoint) String() string {
	if e.Scheme == "" {
		return e.Host + e.Path
	}
	return e.Scheme + "://" + e.Host + e.Path
}
