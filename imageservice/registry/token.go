package registry

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"
)

const (
	// minTokenLife is what a token is good for when its server does not tell, or tells
	// less (distribution specification, token authentication).
	minTokenLife = time.Minute
	// tokenMargin is how long before its end a token is not used any more.
	tokenMargin = 5 * time.Second
)

type token struct {
	text string
	ends time.Time
}

// bearer returns a token for the challenge, from memory or from its server. Requests that
// want one at the same time wait for one answer.
func (c *Client) bearer(ctx context.Context, ch challenge) (string, error) {
	if t := c.endpoint.Credentials.RegistryToken; t != "" {
		return t, nil
	}
	select {
	case c.asking <- struct{}{}:
		defer func() { <-c.asking }()
	case <-ctx.Done():
		return "", context.Cause(ctx)
	}
	key := ch.params["realm"] + "\n" + ch.params["service"] + "\n" + ch.params["scope"]
	if t, ok := c.tokens[key]; ok && time.Now().Before(t.ends) {
		return t.text, nil
	}
	t, err := c.fetchToken(ctx, ch)
	if err != nil {
		return "", fmt.Errorf("%w %s: %w", ErrToken, hostOf(ch.params["realm"]), err)
	}
	c.tokens[key] = t
	return t.text, nil
}

// forget drops a token that was refused.
func (c *Client) forget(text string) {
	c.asking <- struct{}{}
	defer func() { <-c.asking }()
	for k, t := range c.tokens {
		if t.text == text {
			delete(c.tokens, k)
		}
	}
}

func hostOf(rawURL string) string {
	u, err := url.Parse(rawURL)
	if err != nil {
		return "(malformed realm)"
	}
	return u.Host
}

// scopes is what to ask for: this repository, and what the challenge says, which differs
// where a mirror knows the repository under another name.
func (c *Client) scopes(ch challenge) []string {
	scopes := []string{"repository:" + c.endpoint.Repository + ":pull"}
	for _, s := range strings.Fields(ch.params["scope"]) {
		if !slices.Contains(scopes, s) && len(scopes) < 4 {
			scopes = append(scopes, s)
		}
	}
	return scopes
}

func (c *Client) fetchToken(ctx context.Context, ch challenge) (token, error) {
	req, err := c.tokenRequest(ctx, ch)
	if err != nil {
		return token{}, err
	}
	req.Header.Set("User-Agent", c.endpoint.UserAgent)
	res, err := c.tokenHTTP.Do(req)
	if err != nil {
		return token{}, withoutQuery(err)
	}
	if res.StatusCode != http.StatusOK {
		return token{}, statusError(res, time.Now())
	}
	defer res.Body.Close()
	b, err := io.ReadAll(io.LimitReader(res.Body, maxTokenBody+1))
	if err != nil {
		return token{}, err
	}
	if len(b) > maxTokenBody {
		return token{}, fmt.Errorf("more than %d bytes: %w", maxTokenBody, ErrTooLarge)
	}
	return parseToken(b, time.Now())
}

// parseToken reads a token server's answer.
func parseToken(b []byte, now time.Time) (token, error) {
	var answer struct {
		Token       string `json:"token"`
		AccessToken string `json:"access_token"`
		ExpiresIn   int64  `json:"expires_in"` // seconds
	}
	if err := json.Unmarshal(b, &answer); err != nil {
		return token{}, fmt.Errorf("%w: %w", ErrProtocol, err)
	}
	t := answer.Token
	if t == "" {
		t = answer.AccessToken
	}
	if t == "" {
		return token{}, fmt.Errorf("no token in its answer: %w", ErrProtocol)
	}
	if strings.ContainsAny(t, "\r\n") {
		return token{}, fmt.Errorf("line break in its token: %w", ErrProtocol)
	}
	life := max(time.Duration(min(answer.ExpiresIn, 1<<31))*time.Second, minTokenLife)
	return token{text: t, ends: now.Add(life - tokenMargin)}, nil
}

// tokenRequest is a GET with the user's name and password, or a POST with the refresh
// token (distribution specification, "Token Authentication", "OAuth2").
func (c *Client) tokenRequest(ctx context.Context, ch challenge) (*http.Request, error) {
	realm, err := url.Parse(ch.params["realm"])
	if err != nil || realm.Host == "" || realm.Scheme != "https" && realm.Scheme != "http" {
		return nil, fmt.Errorf("realm %.100q: %w", ch.params["realm"], ErrProtocol)
	}
	cred := c.endpoint.Credentials
	if realm.Scheme == "http" && c.secure() && cred != (Credentials{}) {
		return nil, fmt.Errorf("realm %s://%s: credentials are not sent without TLS: %w", realm.Scheme, realm.Host, ErrProtocol)
	}
	q := realm.Query()
	if s := ch.params["service"]; s != "" {
		q.Set("service", s)
	}
	if cred.IdentityToken != "" {
		q.Set("grant_type", "refresh_token")
		q.Set("refresh_token", cred.IdentityToken)
		q.Set("client_id", c.endpoint.UserAgent)
		q.Set("scope", strings.Join(c.scopes(ch), " "))
		realm.RawQuery = ""
		req, err := http.NewRequestWithContext(ctx, http.MethodPost, realm.String(), strings.NewReader(q.Encode()))
		if err == nil {
			req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		}
		return req, err
	}
	for _, s := range c.scopes(ch) {
		q.Add("scope", s)
	}
	if cred.Username != "" {
		q.Set("account", cred.Username)
	}
	realm.RawQuery = q.Encode()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, realm.String(), nil)
	if err == nil && cred.Username != "" {
		req.SetBasicAuth(cred.Username, cred.Password)
	}
	return req, err
}

// tokenRedirect lets a token server move within itself only: the request may carry a
// password or a refresh token.
func tokenRedirect(req *http.Request, via []*http.Request) error {
	if len(via) >= maxRedirects {
		return fmt.Errorf("more than %d: %w", maxRedirects, ErrRedirect)
	}
	if req.URL.Host != via[0].URL.Host || req.URL.Scheme != via[0].URL.Scheme {
		return fmt.Errorf("to another server, %s://%s: %w", req.URL.Scheme, req.URL.Host, ErrRedirect)
	}
	return nil
}

// IsToken tells that err is about the token server.
func IsToken(err error) bool { return errors.Is(err, ErrToken) }
