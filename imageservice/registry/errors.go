package registry

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// Errors of this package beside *StatusError and those of package net.
var (
	// ErrTooLarge: an answer longer than its limit.
	ErrTooLarge = errors.New("answer too large")
	// ErrProtocol: an answer that a registry does not give.
	ErrProtocol = errors.New("not the answer of a registry")
	// ErrRedirect: too many redirects, or one that must not be followed.
	ErrRedirect = errors.New("redirect refused")
	// ErrToken: the token server did not give a token. What it answered, if it did, is
	// a *StatusError as well.
	ErrToken = errors.New("token server")
)

// StatusError is an answer that is no success.
type StatusError struct {
	Status     int
	Code       string        // the protocol's, such as MANIFEST_UNKNOWN; may be ""
	Message    string        // the server's words; may be ""
	RetryAfter time.Duration // what the server asks for; 0 for nothing
	Structured bool          // the body was what the protocol asks for
}

func (e *StatusError) Error() string {
	text := fmt.Sprintf("status %d %s", e.Status, strings.ToLower(http.StatusText(e.Status)))
	if e.Code != "" {
		text += ", " + e.Code
	}
	if e.Message != "" {
		text += fmt.Sprintf(", %q", e.Message)
	}
	return text
}

// Temporary tells that the same request may be answered otherwise in a while.
func (e *StatusError) Temporary() bool {
	switch e.Status {
	case http.StatusRequestTimeout, http.StatusTooEarly, http.StatusTooManyRequests, http.StatusInternalServerError,
		http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
		return true
	}
	return false
}

// statusError reads the answer and closes it.
func statusError(res *http.Response, now time.Time) *StatusError {
	defer res.Body.Close()
	e := &StatusError{Status: res.StatusCode, RetryAfter: retryAfter(res.Header.Get("Retry-After"), now)}
	b, _ := io.ReadAll(io.LimitReader(res.Body, maxErrorBody)) // what could be read is enough
	var body struct {
		Errors []struct {
			Code    string `json:"code"`
			Message string `json:"message"`
		} `json:"errors"`
		Details string `json:"details"` // token servers
	}
	if json.Unmarshal(b, &body) != nil {
		return e
	}
	if len(body.Errors) > 0 {
		e.Structured = true
		e.Code, e.Message = clip(body.Errors[0].Code), clip(body.Errors[0].Message)
	} else {
		e.Message = clip(body.Details)
	}
	return e
}

func clip(s string) string {
	if len(s) > maxMessage {
		return s[:maxMessage] + "…"
	}
	return s
}

// retryAfter reads the header of that name (RFC 9110, 10.2.3): seconds or a date.
func retryAfter(v string, now time.Time) time.Duration {
	if v == "" {
		return 0
	}
	if n, err := strconv.ParseInt(v, 10, 32); err == nil {
		return max(time.Duration(n)*time.Second, 0)
	}
	if t, err := http.ParseTime(v); err == nil {
		return max(t.Sub(now), 0)
	}
	return 0
}

// withoutQuery hides the query of the URL in an error of net/http.
func withoutQuery(err error) error {
	var e *url.Error
	if errors.As(err, &e) {
		if u, parseErr := url.Parse(e.URL); parseErr == nil {
			u.RawQuery, u.User, u.Fragment = "", nil, ""
			e.URL = u.String()
		} else {
			e.URL = "(malformed URL)"
		}
	}
	return err
}
