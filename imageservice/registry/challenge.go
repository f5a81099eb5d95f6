package registry

import (
	"net/http"
	"strings"
)

// challenge is one way to be authorized that a server offers (RFC 9110, 11.6.1).
type challenge struct {
	scheme string // lower case
	params map[string]string
}

// maxChallenges bounds what is parsed of an answer.
const maxChallenges = 16

// challenges parses all WWW-Authenticate headers. What is malformed ends the header that
// it is in.
func challenges(h http.Header) []challenge {
	var out []challenge
	for _, v := range h.Values("WWW-Authenticate") {
		out = append(out, parseChallenges(v)...)
		if len(out) >= maxChallenges {
			return out[:maxChallenges]
		}
	}
	return out
}

// parseChallenges reads one header, which may hold several challenges:
//
//	Basic realm="a", Bearer realm="https://b", service="c"
func parseChallenges(v string) []challenge {
	var out []challenge
	for {
		v = strings.TrimLeft(v, " \t,")
		scheme, rest := word(v)
		if scheme == "" {
			return out
		}
		c := challenge{scheme: strings.ToLower(scheme), params: map[string]string{}}
		v = rest
		for {
			rest := strings.TrimLeft(v, " \t,")
			key, after := word(rest)
			after = strings.TrimLeft(after, " \t")
			if key == "" || !strings.HasPrefix(after, "=") {
				break // the next challenge, or the end
			}
			value, after, ok := value(strings.TrimLeft(after[1:], " \t"))
			if !ok {
				return append(out, c)
			}
			if key = strings.ToLower(key); c.params[key] == "" {
				c.params[key] = value
			}
			v = after
		}
		if out = append(out, c); len(out) >= maxChallenges {
			return out
		}
	}
}

// word splits off a token of RFC 9110.
func word(s string) (token, rest string) {
	i := strings.IndexFunc(s, func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("!#$%&'*+-.^_`|~", r))
	})
	if i < 0 {
		return s, ""
	}
	return s[:i], s[i:]
}

// value splits off a token or a quoted string.
func value(s string) (v, rest string, ok bool) {
	if !strings.HasPrefix(s, `"`) {
		// Servers leave the quotes out around what is no token.
		i := strings.IndexAny(s, ", \t")
		if i < 0 {
			i = len(s)
		}
		return s[:i], s[i:], i > 0
	}
	var b strings.Builder
	for i := 1; i < len(s); i++ {
		switch s[i] {
		case '"':
			return b.String(), s[i+1:], true
		case '\\':
			if i++; i < len(s) {
				b.WriteByte(s[i])
			}
		default:
			b.WriteByte(s[i])
		}
	}
	return "", "", false
}

// choose is the challenge to answer: the first of those that are understood.
func choose(all []challenge) (challenge, bool) {
	for _, c := range all {
		if c.scheme == "basic" || c.scheme == "bearer" && c.params["realm"] != "" {
			return c, true
		}
	}
	return challenge{}, false
}
