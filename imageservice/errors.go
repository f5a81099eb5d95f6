package imageservice

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"regexp"
	"strconv"
	"strings"

	"github.com/containers/image/v5/docker"
	"github.com/containers/image/v5/signature"
	"github.com/docker/distribution/registry/api/errcode"

	"github.com/berthd/berth/imageservice/layer"
	"github.com/berthd/berth/imageservice/registry"
)

var sentinels = []error{
	ErrNotFound, ErrInvalidReference, ErrUnauthorized, ErrRegistryUnavailable, ErrStalled, ErrDigestMismatch,
	ErrPolicyRejected, ErrUnsupported, ErrInvalidImage, ErrTooLarge, ErrClosed,
}

var ofLayer = []struct{ from, to error }{
	{layer.ErrDigest, ErrDigestMismatch}, {layer.ErrTooLarge, ErrTooLarge}, {layer.ErrUnsupported, ErrUnsupported},
	{layer.ErrUnsafe, ErrInvalidImage}, {layer.ErrCorrupt, ErrInvalidImage},
}

func isClassified(err error) bool {
	for _, s := range sentinels {
		if errors.Is(err, s) {
			return true
		}
	}
	return false
}

// mark adds a sentinel to err, whose own text says more.
func mark(sentinel, err error) error { return fmt.Errorf("%w: %w", sentinel, err) }

// classify adds the sentinel that an error from a registry or from the layer package
// belongs to. What is of neither, such as a full disk, stays as it is.
func classify(err error) error {
	if err == nil || isClassified(err) {
		return err
	}
	for _, m := range ofLayer {
		if errors.Is(err, m.from) {
			return mark(m.to, err)
		}
	}
	var requirement signature.PolicyRequirementError
	var badSignature signature.InvalidSignatureError
	if errors.As(err, &requirement) || errors.As(err, &badSignature) {
		return mark(ErrPolicyRejected, err)
	}
	if errors.Is(err, registry.ErrProtocol) {
		return mark(ErrRegistryUnavailable, err)
	}
	if status := httpStatus(err); status != 0 {
		if registry.IsToken(err) {
			return mark(tokenSentinel(status), err)
		}
		return mark(statusSentinel(status), err)
	}
	switch {
	case errors.Is(err, registry.ErrTooLarge):
		return mark(ErrTooLarge, err)
	case registry.IsToken(err), errors.Is(err, registry.ErrRedirect), errors.Is(err, io.ErrUnexpectedEOF):
		return mark(ErrRegistryUnavailable, err)
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return err // ended by us; a net.Error all the same
	}
	var netErr net.Error
	var urlErr *url.Error
	if errors.As(err, &netErr) || errors.As(err, &urlErr) || strings.Contains(err.Error(), "pinging container registry") {
		return mark(ErrRegistryUnavailable, err)
	}
	return err
}

func statusSentinel(status int) error {
	switch {
	case status == http.StatusUnauthorized, status == http.StatusForbidden:
		return ErrUnauthorized
	case status == http.StatusNotFound:
		return ErrNotFound
	}
	return ErrRegistryUnavailable
}

// tokenSentinel is statusSentinel for a token server, at which no image is looked for. A
// bad request is how OAuth2 refuses a refresh token (RFC 6749, 5.2).
func tokenSentinel(status int) error {
	if status == http.StatusBadRequest || status == http.StatusUnauthorized || status == http.StatusForbidden {
		return ErrUnauthorized
	}
	return ErrRegistryUnavailable
}

// statusText is how containers/image words an answer with a body that is not JSON; the
// type behind it is not exported.
var statusText = regexp.MustCompile(`\bStatusCode: ([1-5][0-9][0-9])\b`)

// httpStatus finds the HTTP status behind an error of containers/image; 0 for none.
func httpStatus(err error) int {
	var status *registry.StatusError
	var unexpected docker.UnexpectedHTTPStatusError
	var credentials docker.ErrUnauthorizedForCredentials
	var coder errcode.ErrorCoder
	switch {
	case errors.As(err, &status):
		return status.Status
	case errors.As(err, &unexpected):
		return unexpected.StatusCode
	case errors.As(err, &credentials):
		return http.StatusUnauthorized
	case errors.Is(err, docker.ErrTooManyRequests):
		return http.StatusTooManyRequests
	case errors.As(err, &coder):
		if coder.ErrorCode() == errcode.ErrorCodeUnknown {
			return unknownStatus(err.Error())
		}
		return coder.ErrorCode().Descriptor().HTTPStatusCode
	}
	if m := statusText.FindStringSubmatch(err.Error()); m != nil {
		n, _ := strconv.Atoi(m[1])
		return n
	}
	return 0
}

// unknownStatus guesses at an answer in the 400s whose code is the registry's own:
// containers/image keeps the message of such an answer and not its status.
func unknownStatus(text string) int {
	text = strings.ToLower(text)
	switch {
	case strings.Contains(text, "not found"):
		return http.StatusNotFound
	case strings.Contains(text, "forbidden"), strings.Contains(text, "denied"), strings.Contains(text, "unauthorized"):
		return http.StatusForbidden
	}
	return http.StatusBadRequest
}

// worthRetrying: the registry may answer otherwise in a moment. A host that does not
// exist is reported at once, so that a mistyped name does not take long.
func worthRetrying(err error) bool {
	if !errors.Is(err, ErrRegistryUnavailable) || errors.Is(err, registry.ErrProtocol) || errors.Is(err, registry.ErrRedirect) {
		return false
	}
	var cert *tls.CertificateVerificationError
	var dns *net.DNSError
	return !errors.As(err, &cert) && (!errors.As(err, &dns) || !dns.IsNotFound)
}
