package registry

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/net/http/httpproxy"
)

// Client asks one endpoint. Its methods may be called at any time.
type Client struct {
	endpoint  Endpoint
	http      *http.Client
	tokenHTTP *http.Client
	transport *http.Transport

	scheme    atomic.Pointer[string]    // once decided
	challenge atomic.Pointer[challenge] // what the endpoint last asked for

	asking chan struct{}    // one token at a time: holds whoever asks for one
	tokens map[string]token // by challenge; guarded by asking
}

// New returns a client. Nothing is sent before it is asked for something. Proxies are
// those of the environment (HTTP_PROXY, HTTPS_PROXY, NO_PROXY and in lower case).
func New(e Endpoint) *Client {
	dial := e.DialTimeout
	if dial == 0 {
		dial = defaultDialTimeout
	}
	proxy := httpproxy.FromEnvironment().ProxyFunc()
	tlsConfig := e.TLS
	if tlsConfig == nil {
		tlsConfig = &tls.Config{}
	}
	t := &http.Transport{
		Proxy:               func(r *http.Request) (*url.URL, error) { return proxy(r.URL) },
		DialContext:         (&net.Dialer{Timeout: dial, KeepAlive: 15 * time.Second}).DialContext,
		TLSClientConfig:     tlsConfig.Clone(),
		TLSHandshakeTimeout: handshakeTimeout,
		ForceAttemptHTTP2:   true,
		// A connection that died without a word must not take a whole stall timeout.
		HTTP2:                  &http.HTTP2Config{SendPingTimeout: 20 * time.Second, PingTimeout: 15 * time.Second},
		MaxIdleConnsPerHost:    16,
		IdleConnTimeout:        30 * time.Second,
		MaxResponseHeaderBytes: 256 << 10,
	}
	c := &Client{endpoint: e, transport: t, asking: make(chan struct{}, 1), tokens: map[string]token{}}
	c.http = &http.Client{Transport: t, CheckRedirect: c.redirect}
	c.tokenHTTP = &http.Client{Transport: t, CheckRedirect: tokenRedirect}
	return c
}

// Close ends idle connections. Those in use end with their bodies.
func (c *Client) Close() { c.transport.CloseIdleConnections() }

// Endpoint returns what New was given, with the scheme that turned out to be spoken.
func (c *Client) Endpoint() Endpoint {
	e := c.endpoint
	if s := c.scheme.Load(); s != nil {
		e.Scheme = *s
	}
	return e
}

// secure: requests to the endpoint are, or have to be, over TLS.
func (c *Client) secure() bool { return c.Endpoint().Scheme == "https" }

// Challenge names how the endpoint wants to be asked: "basic", "bearer", or "" when it has
// not asked for anything yet.
func (c *Client) Challenge() string {
	if ch := c.challenge.Load(); ch != nil {
		return ch.scheme
	}
	return ""
}

// Manifest is an answer of the manifests API.
type Manifest struct {
	Body      []byte
	MediaType string // as the server states it; may be anything
}

var manifestTypes = []string{
	"application/vnd.oci.image.index.v1+json",
	"application/vnd.oci.image.manifest.v1+json",
	"application/vnd.docker.distribution.manifest.list.v2+json",
	"application/vnd.docker.distribution.manifest.v2+json",
	// Asked for so that the error is about the image and not about the registry.
	"application/vnd.docker.distribution.manifest.v1+prettyjws",
	"application/vnd.docker.distribution.manifest.v1+json",
}

// Manifest gets the manifest of a tag or a digest.
func (c *Client) Manifest(ctx context.Context, ref string) (Manifest, error) {
	res, err := c.do(ctx, http.MethodGet, "/manifests/"+ref, http.Header{"Accept": {strings.Join(manifestTypes, ", ")}})
	if err != nil {
		return Manifest{}, c.unlessNoRegistry(ctx, err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(io.LimitReader(res.Body, MaxManifest+1))
	if err != nil {
		return Manifest{}, fmt.Errorf("manifest after %d bytes: %w", len(b), err)
	}
	if len(b) > MaxManifest {
		return Manifest{}, fmt.Errorf("manifest of more than %d bytes: %w", MaxManifest, ErrTooLarge)
	}
	mediaType, _, _ := strings.Cut(res.Header.Get("Content-Type"), ";")
	return Manifest{Body: b, MediaType: strings.TrimSpace(mediaType)}, nil
}

// unlessNoRegistry asks, when something is not found in words that are not the protocol's,
// whether there is a registry at all: any web server says 404.
func (c *Client) unlessNoRegistry(ctx context.Context, err error) error {
	var status *StatusError
	if !errors.As(err, &status) || status.Status != http.StatusNotFound || status.Structured || IsToken(err) {
		return err
	}
	if ping := c.ping(ctx); ping != nil {
		return fmt.Errorf("%w (%w at %s/)", ErrProtocol, ping, c.endpoint.Path)
	}
	return err
}

// ping asks the root of the API. A nil error means that a registry is there; it may want
// credentials that it has not got.
func (c *Client) ping(ctx context.Context) error {
	res, err := c.send(ctx, http.MethodGet, c.endpoint.Path+"/", nil, "")
	if err != nil {
		return err
	}
	c.learn(res)
	if res.StatusCode != http.StatusOK && res.StatusCode != http.StatusUnauthorized {
		return statusError(res, time.Now())
	}
	drain(res.Body)
	return nil
}

// Blob is the content of a blob from an offset on.
type Blob struct {
	io.ReadCloser
	Offset int64  // of its first byte: what was asked for, or 0 when the server ignores ranges
	Size   int64  // of the whole blob; -1 when the server does not tell
	ETag   string // strong validator; "" for none
	// Partial: the server knows ranges, as it answered with one.
	Partial bool
}

// Blob gets a blob from byte from on, up to but not including byte to, or to its end if to
// is negative. etag, if not "", is that of an answer of which this is the continuation: if
// the blob is another one now, its beginning comes.
func (c *Client) Blob(ctx context.Context, digest string, from, to int64, etag string) (*Blob, error) {
	// What a registry stores is compressed as it is; what counts are its very bytes.
	h := http.Header{"Accept-Encoding": {"identity"}}
	ranged := from > 0 || to >= 0
	if ranged {
		last := ""
		if to >= 0 {
			last = strconv.FormatInt(to-1, 10)
		}
		h.Set("Range", fmt.Sprintf("bytes=%d-%s", from, last))
		if etag != "" {
			h.Set("If-Range", etag)
		}
	}
	res, err := c.do(ctx, http.MethodGet, "/blobs/"+digest, h)
	if err != nil {
		return nil, err
	}
	b := &Blob{ReadCloser: res.Body, Size: res.ContentLength, ETag: strong(res.Header.Get("ETag"))}
	if enc := res.Header.Get("Content-Encoding"); enc != "" && enc != "identity" {
		res.Body.Close()
		return nil, fmt.Errorf("blob in encoding %.30q, which was not asked for: %w", enc, ErrProtocol)
	}
	if res.StatusCode != http.StatusPartialContent {
		return b, nil
	}
	b.Partial = true
	if b.Offset, b.Size, err = contentRange(res.Header.Get("Content-Range")); err != nil || !ranged || b.Offset != from {
		res.Body.Close()
		return nil, fmt.Errorf("range %.60q for bytes from %d on: %w", res.Header.Get("Content-Range"), from, ErrProtocol)
	}
	return b, nil
}

func strong(etag string) string {
	if strings.HasPrefix(etag, "W/") {
		return ""
	}
	return etag
}

// contentRange reads "bytes 5-9/10"; the size is -1 for "*".
func contentRange(v string) (from, size int64, err error) {
	bad := fmt.Errorf("content range: %w", ErrProtocol)
	spec, ok := strings.CutPrefix(v, "bytes ")
	span, total, ok2 := strings.Cut(spec, "/")
	first, last, ok3 := strings.Cut(span, "-")
	if !ok || !ok2 || !ok3 {
		return 0, 0, bad
	}
	from, err1 := strconv.ParseInt(first, 10, 64)
	end, err2 := strconv.ParseInt(last, 10, 64)
	size = -1
	var err3 error
	if total != "*" {
		size, err3 = strconv.ParseInt(total, 10, 64)
	}
	if err1 != nil || err2 != nil || err3 != nil || from < 0 || end < from || size >= 0 && end >= size {
		return 0, 0, bad
	}
	return from, size, nil
}

// do sends a request about the repository, authorizes it if asked to, and returns answers
// with a status of success.
func (c *Client) do(ctx context.Context, method, path string, h http.Header) (*http.Response, error) {
	path = c.endpoint.Path + "/" + c.endpoint.Repository + path
	for try := 0; ; try++ {
		auth, err := c.authorization(ctx)
		if err != nil {
			return nil, err
		}
		res, err := c.send(ctx, method, path, h, auth)
		if err != nil {
			return nil, err
		}
		if res.StatusCode != http.StatusUnauthorized {
			if res.StatusCode/100 != 2 {
				return nil, statusError(res, time.Now())
			}
			return res, nil
		}
		before := c.challenge.Load()
		asked := c.learn(res)
		status := statusError(res, time.Now())
		if !asked && auth == "" {
			// Some registries do not say at a repository what they want.
			if err := c.ping(ctx); err != nil {
				return nil, err
			}
		}
		if text, ok := strings.CutPrefix(auth, "Bearer "); ok {
			c.forget(text)
		}
		if !again(before, c.challenge.Load(), auth, try) {
			return nil, status
		}
	}
}

// again: one more try answers the challenge, replaces a token that ran out, or asks for
// the scope that the endpoint wants instead of the usual one.
func again(before, now *challenge, auth string, try int) bool {
	switch {
	case now == nil, try > 1, now.scheme == "basic" && auth != "":
		return false
	case try == 1:
		return auth != "" && before != nil && before.params["scope"] != now.params["scope"]
	}
	return true
}

// learn takes over what the answer asks for, if anything.
func (c *Client) learn(res *http.Response) bool {
	if res.StatusCode != http.StatusUnauthorized {
		return false
	}
	ch, ok := choose(challenges(res.Header))
	if ok {
		c.challenge.Store(&ch)
	}
	return ok
}

// authorization is the header that answers the challenge; "" as long as there was none.
func (c *Client) authorization(ctx context.Context) (string, error) {
	ch := c.challenge.Load()
	if ch == nil {
		return "", nil
	}
	if ch.scheme == "bearer" {
		t, err := c.bearer(ctx, *ch)
		return "Bearer " + t, err
	}
	cred := c.endpoint.Credentials
	if cred.Username == "" {
		return "", nil
	}
	var r http.Request
	r.Header = http.Header{}
	r.SetBasicAuth(cred.Username, cred.Password)
	return r.Header.Get("Authorization"), nil
}

// send finds out the scheme if need be.
func (c *Client) send(ctx context.Context, method, path string, h http.Header, auth string) (*http.Response, error) {
	if s := c.Endpoint().Scheme; s != "" {
		return c.sendTo(ctx, s, method, path, h, auth)
	}
	res, err := c.sendTo(ctx, "https", method, path, h, auth)
	scheme := "https"
	if err != nil && ctx.Err() == nil {
		plain, plainErr := c.sendTo(ctx, "http", method, path, h, auth)
		if plainErr != nil {
			if errors.Is(err, http.ErrSchemeMismatch) {
				err = plainErr // HTTP is what is spoken there
			}
			return nil, err
		}
		res, err, scheme = plain, nil, "http"
	}
	if err == nil {
		c.scheme.Store(&scheme)
	}
	return res, err
}

func (c *Client) sendTo(ctx context.Context, scheme, method, path string, h http.Header, auth string) (*http.Response, error) {
	u := url.URL{Scheme: scheme, Host: c.endpoint.Host, Path: path}
	if c.endpoint.Namespace != "" {
		u.RawQuery = url.Values{"ns": {c.endpoint.Namespace}}.Encode()
	}
	req, err := http.NewRequestWithContext(ctx, method, u.String(), nil)
	if err != nil {
		return nil, err
	}
	for k, v := range c.endpoint.Header {
		req.Header[http.CanonicalHeaderKey(k)] = v
	}
	for k, v := range h {
		req.Header[k] = v
	}
	req.Header.Set("User-Agent", c.endpoint.UserAgent)
	if auth != "" {
		req.Header.Set("Authorization", auth)
	}
	res, err := c.http.Do(req)
	if err != nil {
		return nil, withoutQuery(err)
	}
	return res, nil
}

// redirect takes away what is for the endpoint only, and follows to less secure places
// only for blobs, whose bytes are verified.
func (c *Client) redirect(req *http.Request, via []*http.Request) error {
	if len(via) >= maxRedirects {
		return fmt.Errorf("more than %d: %w", maxRedirects, ErrRedirect)
	}
	switch req.URL.Scheme {
	case "https":
	case "http":
		if via[0].URL.Scheme == "https" && !strings.Contains(via[0].URL.Path, "/blobs/") {
			return fmt.Errorf("from https to http: %w", ErrRedirect)
		}
	default:
		return fmt.Errorf("to a URL of scheme %.20q: %w", req.URL.Scheme, ErrRedirect)
	}
	away := false
	for _, r := range append(via[1:len(via):len(via)], req) {
		away = away || r.URL.Host != via[0].URL.Host || r.URL.Scheme != via[0].URL.Scheme
	}
	if away {
		req.Header.Del("Authorization")
		req.Header.Del("Cookie")
		for k := range c.endpoint.Header {
			req.Header.Del(k)
		}
	}
	return nil
}

// drain lets a connection be used again.
func drain(body io.ReadCloser) {
	_, _ = io.CopyN(io.Discard, body, maxErrorBody) // or it is closed instead
	body.Close()
}
