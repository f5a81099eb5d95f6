package imageservice

import (
	"errors"
	"fmt"
	"regexp"
	"strings"

	"github.com/containers/image/v5/docker/reference"
)

const (
	// maxReference bounds what is parsed; a valid one is far shorter.
	maxReference = 1024
	// minIDPrefix is the shortest prefix of an image ID that is one. It is long, since
	// a name such as "cafe" must never be taken for some image that is here.
	minIDPrefix = 12
)

var (
	hexID   = regexp.MustCompile(`^(?:sha256:)?([0-9a-f]{12,64})$`)
	wholeID = regexp.MustCompile(`^(?:sha256:)?[0-9a-f]{64}$`)
)

// parseReference returns the full form of an image reference: with a host, and with a
// digest or else a tag. Of a tag and a digest the digest counts, as the tag may have
// moved. Short names are looked for at registry, "" meaning docker.io.
func parseReference(text, registry string) (reference.Named, error) {
	fail := func(why string) (reference.Named, error) {
		shown := text
		if len(shown) > 256 {
			shown = shown[:256] + "…"
		}
		return nil, fmt.Errorf("%w %q: %s", ErrInvalidReference, shown, why)
	}
	switch {
	case text == "":
		return fail("it is empty")
	case len(text) > maxReference:
		return fail(fmt.Sprintf("%d characters, at most %d", len(text), maxReference))
	case wholeID.MatchString(text):
		return fail("an image ID, which no registry knows")
	}
	full := text
	if registry != "" && isShort(text) {
		full = registry + "/" + text
	}
	named, err := reference.ParseNormalizedNamed(full)
	if err != nil {
		var why string
		switch {
		case errors.Is(err, reference.ErrNameContainsUppercase), strings.Contains(err.Error(), "lowercase"):
			why = "repository names are lower case"
		case errors.Is(err, reference.ErrNameTooLong):
			why = "the repository name is too long"
		default:
			why = "want [host[:port]/]repository[:tag][@digest]"
		}
		return fail(why)
	}
	if d, ok := named.(reference.Digested); ok {
		canonical, err := reference.WithDigest(reference.TrimNamed(named), d.Digest())
		if err != nil {
			return fail(err.Error())
		}
		return canonical, nil
	}
	return reference.TagNameOnly(named), nil
}

// isShort tells whether a reference has no host: its first component has neither dot
// nor port, and is not localhost.
func isShort(text string) bool {
	host, _, ok := strings.Cut(text, "/")
	return !ok || !strings.ContainsAny(host, ".:") && host != "localhost" && strings.ToLower(host) == host
}

// idPrefix returns the hex digits of what may be an image ID or the beginning of one.
func idPrefix(text string) (string, bool) {
	m := hexID.FindStringSubmatch(text)
	if m == nil {
		return "", false
	}
	return m[1], true
}
