package registry

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"
)

func TestParseChallenges(t *testing.T) {
	ch := func(scheme string, kv ...string) challenge {
		c := challenge{scheme, map[string]string{}}
		for i := 0; i < len(kv); i += 2 {
			c.params[kv[i]] = kv[i+1]
		}
		return c
	}
	for _, tc := range []struct {
		in   string
		want []challenge
	}{
		{"", nil},
		{"Basic", []challenge{ch("basic")}},
		{`Bearer realm="https://a/t",service="s",scope="repository:a/b:pull"`,
			[]challenge{ch("bearer", "realm", "https://a/t", "service", "s", "scope", "repository:a/b:pull")}},
		{`Basic realm="a, b=c", Bearer realm="q\"x" , service=plain`,
			[]challenge{ch("basic", "realm", "a, b=c"), ch("bearer", "realm", `q"x`, "service", "plain")}},
		{`BEARER Realm = "a"`, []challenge{ch("bearer", "realm", "a")}},
		{`Bearer realm=https://no.quotes/x?y,service=z`, []challenge{ch("bearer", "realm", "https://no.quotes/x?y", "service", "z")}},
		{`Bearer realm="never ends`, []challenge{ch("bearer")}},
		{`Bearer realm="first",realm="second"`, []challenge{ch("bearer", "realm", "first")}},
		{`=,=`, nil},
		{"Negotiate, Basic realm=x", []challenge{ch("negotiate"), ch("basic", "realm", "x")}},
	} {
		if got := parseChallenges(tc.in); !reflect.DeepEqual(got, tc.want) {
			t.Errorf("%q: %v, want %v", tc.in, got, tc.want)
		}
	}
}

// FuzzChallenges: any header is parsed in bounds, to lower-case schemes.
func FuzzChallenges(f *testing.F) {
	f.Add(`Basic realm="a", Bearer realm="b\",c",service=d`)
	f.Add(`Bearer realm="`)
	f.Add(strings.Repeat("a ", 50))
	f.Fuzz(func(t *testing.T, s string) {
		all := challenges(http.Header{"Www-Authenticate": {s, s}})
		if len(all) > maxChallenges {
			t.Errorf("%d challenges", len(all))
		}
		for _, c := range all {
			if c.scheme == "" || c.scheme != strings.ToLower(c.scheme) {
				t.Errorf("scheme %q", c.scheme)
			}
		}
	})
}

func TestRetryAfter(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for in, want := range map[string]time.Duration{
		"": 0, "7": 7 * time.Second, "-7": 0, "soon": 0, "99999999999999": 0,
		"Fri, 02 Jan 2026 03:05:05 GMT": time.Minute, "Fri, 02 Jan 2026 03:03:05 GMT": 0,
	} {
		if got := retryAfter(in, now); got != want {
			t.Errorf("%q: %s, want %s", in, got, want)
		}
	}
}

func TestContentRange(t *testing.T) {
	for in, want := range map[string][2]int64{"bytes 5-9/10": {5, 10}, "bytes 0-0/1": {0, 1}, "bytes 3-4/*": {3, -1}} {
		if from, size, err := contentRange(in); err != nil || from != want[0] || size != want[1] {
			t.Errorf("%q: %d, %d, %v", in, from, size, err)
		}
	}
	for _, in := range []string{"", "bytes */10", "bytes 5-4/10", "bytes 5-10/10", "5-9/10", "bytes a-b/c", "bytes -5-9/10"} {
		if _, _, err := contentRange(in); err == nil {
			t.Errorf("%q parses", in)
		}
	}
}

func TestParseToken(t *testing.T) {
	now := time.Now()
	for in, want := range map[string]time.Duration{
		`{"token":"t"}`: minTokenLife, `{"access_token":"t","expires_in":300}`: 5 * time.Minute, `{"token":"t","expires_in":-9}`: minTokenLife,
	} {
		if got, err := parseToken([]byte(in), now); err != nil || got.text != "t" || got.ends != now.Add(want-tokenMargin) {
			t.Errorf("%s: %+v, %v", in, got, err)
		}
	}
	for _, in := range []string{`{}`, `[]`, ``, `{"token":"a\r\nX: y"}`} {
		if _, err := parseToken([]byte(in), now); !errors.Is(err, ErrProtocol) {
			t.Errorf("%s: %v", in, err)
		}
	}
}

// seen is what a server was asked.
type seen struct {
	mu  sync.Mutex
	all []*http.Request
}

func (s *seen) add(q *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.all = append(s.all, q)
}

func (s *seen) list() []*http.Request {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.all
}

func serve(t *testing.T, h http.HandlerFunc) (*httptest.Server, *seen) {
	t.Helper()
	s := &seen{}
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		s.add(q)
		h(w, q)
	}))
	t.Cleanup(srv.Close)
	return srv, s
}

func at(srv *httptest.Server, change ...func(*Endpoint)) *Client {
	scheme, host, _ := strings.Cut(srv.URL, "://")
	e := Endpoint{Scheme: scheme, Host: host, Path: "/v2", Repository: "team/app", UserAgent: "test"}
	for _, c := range change {
		c(&e)
	}
	return New(e)
}

// TestToken: one challenge and one token for all requests, a new one when it is refused.
func TestToken(t *testing.T) {
	var registry *httptest.Server
	issued := 0
	valid := "t1"
	registry, asked := serve(t, func(w http.ResponseWriter, q *http.Request) {
		switch {
		case q.URL.Path == "/token":
			if u, p, _ := q.BasicAuth(); u != "u" || p != "p" {
				w.WriteHeader(http.StatusUnauthorized)
				return
			}
			issued++
			fmt.Fprintf(w, `{"token":"t%d"}`, issued)
		case q.Header.Get("Authorization") != "Bearer "+valid:
			w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="%s/token",service="svc",scope="repository:other/app:pull"`, registry.URL))
			w.WriteHeader(http.StatusUnauthorized)
		default:
			fmt.Fprint(w, "{}")
		}
	})
	c := at(registry, func(e *Endpoint) { e.Credentials = Credentials{Username: "u", Password: "p"} })
	for range 3 {
		if _, err := c.Manifest(context.Background(), "v1"); err != nil {
			t.Fatal(err)
		}
	}
	if issued != 1 || len(asked.list()) != 5 {
		t.Errorf("%d tokens, %d requests", issued, len(asked.list()))
	}
	scopes := asked.list()[1].URL.Query()["scope"]
	if !reflect.DeepEqual(scopes, []string{"repository:team/app:pull", "repository:other/app:pull"}) || asked.list()[1].URL.Query().Get("service") != "svc" {
		t.Errorf("asked for a token with %q", asked.list()[1].URL.RawQuery)
	}
	valid = "t2" // as when the first ran out
	if _, err := c.Manifest(context.Background(), "v1"); err != nil || issued != 2 {
		t.Errorf("token that ran out: %v, %d tokens", err, issued)
	}
	valid = "none"
	before := len(asked.list())
	var status *StatusError
	if _, err := c.Manifest(context.Background(), "v1"); !errors.As(err, &status) || status.Status != http.StatusUnauthorized {
		t.Errorf("refused for good: %v", err)
	}
	if n := len(asked.list()) - before; n > 4 {
		t.Errorf("%d requests to be refused", n)
	}
	c = at(registry, func(e *Endpoint) { e.Credentials = Credentials{Username: "u", Password: "wrong"} })
	if _, err := c.Manifest(context.Background(), "v1"); !errors.As(err, &status) || status.Status != http.StatusUnauthorized || !IsToken(err) {
		t.Errorf("wrong password: %v", err)
	}
}

// TestRefreshToken is posted, and not to where the token server redirects.
func TestRefreshToken(t *testing.T) {
	thief, stolen := serve(t, func(w http.ResponseWriter, q *http.Request) { fmt.Fprint(w, `{"token":"x"}`) })
	redirect := false
	var registry *httptest.Server
	registry, _ = serve(t, func(w http.ResponseWriter, q *http.Request) {
		switch {
		case q.URL.Path == "/token" && redirect:
			http.Redirect(w, q, thief.URL, http.StatusTemporaryRedirect)
		case q.URL.Path == "/token":
			if q.FormValue("grant_type") != "refresh_token" || q.FormValue("refresh_token") != "r" || q.Method != http.MethodPost {
				w.WriteHeader(http.StatusUnauthorized)
				return
			}
			fmt.Fprint(w, `{"access_token":"good"}`)
		case q.Header.Get("Authorization") == "Bearer good":
			fmt.Fprint(w, "{}")
		default:
			w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="%s/token"`, registry.URL))
			w.WriteHeader(http.StatusUnauthorized)
		}
	})
	with := func(e *Endpoint) { e.Credentials = Credentials{IdentityToken: "r"} }
	if _, err := at(registry, with).Manifest(context.Background(), "v1"); err != nil {
		t.Error(err)
	}
	redirect = true
	if _, err := at(registry, with).Manifest(context.Background(), "v1"); !errors.Is(err, ErrRedirect) || len(stolen.list()) != 0 {
		t.Errorf("redirect of the refresh token: %v, %d requests there", err, len(stolen.list()))
	}
}

// TestChallengeAtPing: some registries say at /v2/ only what they want.
func TestChallengeAtPing(t *testing.T) {
	srv, _ := serve(t, func(w http.ResponseWriter, q *http.Request) {
		if u, _, _ := q.BasicAuth(); u == "u" {
			fmt.Fprint(w, "{}")
			return
		}
		if q.URL.Path == "/v2/" {
			w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
		}
		w.WriteHeader(http.StatusUnauthorized)
	})
	c := at(srv, func(e *Endpoint) { e.Credentials = Credentials{Username: "u"} })
	if _, err := c.Manifest(context.Background(), "v1"); err != nil || c.Challenge() != "basic" {
		t.Errorf("%v, challenge %q", err, c.Challenge())
	}
	anonymous := at(srv)
	var status *StatusError
	if _, err := anonymous.Manifest(context.Background(), "v1"); !errors.As(err, &status) || status.Status != http.StatusUnauthorized {
		t.Errorf("without credentials: %v", err)
	}
}

// TestRedirect: what is for the endpoint stays there, and loops end.
func TestRedirect(t *testing.T) {
	storage, stored := serve(t, func(w http.ResponseWriter, q *http.Request) {
		if q.URL.Path == "/further" {
			http.Redirect(w, q, "/blob?signature=secret", http.StatusFound)
			return
		}
		if q.URL.Path == "/gone" {
			w.WriteHeader(http.StatusForbidden)
			return
		}
		http.ServeContent(w, q, "", time.Time{}, strings.NewReader("0123456789"))
	})
	srv, own := serve(t, func(w http.ResponseWriter, q *http.Request) {
		switch _, what, _ := strings.Cut(q.URL.Path, "/blobs/"); what {
		case "away":
			http.Redirect(w, q, storage.URL+"/further", http.StatusTemporaryRedirect)
		case "here":
			http.Redirect(w, q, "/v2/team/app/blobs/final", http.StatusFound)
		case "loop":
			http.Redirect(w, q, q.URL.Path, http.StatusFound)
		case "file":
			http.Redirect(w, q, "file:///etc/passwd", http.StatusFound)
		case "broken":
			http.Redirect(w, q, "http://127.0.0.1:1/x?signature=secret", http.StatusFound)
		default:
			fmt.Fprint(w, "0123456789")
		}
	})
	c := at(srv, func(e *Endpoint) {
		e.Credentials, e.Header = Credentials{Username: "u", Password: "p"}, http.Header{"x-key": {"k"}}
	})
	c.challenge.Store(&challenge{scheme: "basic"})
	b, err := c.Blob(context.Background(), "away", 4, -1, "")
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	if rest, err := io.ReadAll(b); err != nil || string(rest) != "456789" || b.Offset != 4 || b.Size != 10 {
		t.Errorf("rest %q at %d of %d, %v", rest, b.Offset, b.Size, err)
	}
	for _, q := range stored.list() {
		if q.Header.Get("Authorization") != "" || q.Header.Get("x-key") != "" || q.Header.Get("Range") != "bytes=4-" {
			t.Errorf("the storage was sent %v", q.Header)
		}
	}
	b, err = c.Blob(context.Background(), "here", 0, -1, "")
	if err != nil {
		t.Fatal(err)
	}
	b.Close()
	if last := own.list()[len(own.list())-1]; last.Header.Get("Authorization") == "" || last.Header.Get("x-key") != "k" || last.URL.Path != "/v2/team/app/blobs/final" {
		t.Errorf("within the registry: %s %v", last.URL, last.Header)
	}
	for _, what := range []string{"loop", "file"} {
		if _, err := c.Blob(context.Background(), what, 0, -1, ""); !errors.Is(err, ErrRedirect) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if _, err := c.Blob(context.Background(), "broken", 0, -1, ""); err == nil || strings.Contains(err.Error(), "secret") {
		t.Errorf("a signed URL in an error: %v", err)
	}
}

// TestDowngrade: a manifest is not taken from HTTP when HTTPS was asked for.
func TestDowngrade(t *testing.T) {
	plain, _ := serve(t, func(w http.ResponseWriter, q *http.Request) { fmt.Fprint(w, "{}") })
	srv := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		http.Redirect(w, q, plain.URL+q.URL.Path, http.StatusFound)
	}))
	defer srv.Close()
	c := at(srv, func(e *Endpoint) { e.TLS = &tls.Config{InsecureSkipVerify: true} })
	if _, err := c.Manifest(context.Background(), "v1"); !errors.Is(err, ErrRedirect) {
		t.Errorf("manifest: %v", err)
	}
	b, err := c.Blob(context.Background(), "sha256:x", 0, -1, "")
	if err != nil {
		t.Fatalf("blob: %v", err)
	}
	b.Close()
}

// TestTokenWithoutTLS: a password is not sent in the clear because a registry says so.
func TestTokenWithoutTLS(t *testing.T) {
	thief, stolen := serve(t, func(w http.ResponseWriter, q *http.Request) { fmt.Fprint(w, `{"token":"x"}`) })
	srv := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="%s/token"`, thief.URL))
		w.WriteHeader(http.StatusUnauthorized)
	}))
	defer srv.Close()
	c := at(srv, func(e *Endpoint) {
		e.TLS, e.Credentials = &tls.Config{InsecureSkipVerify: true}, Credentials{Username: "u", Password: "p"}
	})
	if _, err := c.Manifest(context.Background(), "v1"); !errors.Is(err, ErrProtocol) || len(stolen.list()) != 0 {
		t.Errorf("%v, %d requests", err, len(stolen.list()))
	}
}

// TestProtocols: a registry that speaks it is spoken to in it, and a plain one is found behind
// no scheme.
func TestProtocols(t *testing.T) {
	proto := ""
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		proto = q.Proto
		fmt.Fprint(w, "{}")
	}))
	srv.EnableHTTP2 = true
	srv.StartTLS()
	defer srv.Close()
	c := at(srv, func(e *Endpoint) { e.TLS, e.Scheme = &tls.Config{InsecureSkipVerify: true}, "" })
	if _, err := c.Manifest(context.Background(), "v1"); err != nil || proto != "HTTP/2.0" || c.Endpoint().Scheme != "https" {
		t.Errorf("%v, protocol %s", err, proto)
	}
	strict := at(srv)
	if _, err := strict.Manifest(context.Background(), "v1"); err == nil {
		t.Error("an unknown certificate is accepted")
	}
	plain, _ := serve(t, func(w http.ResponseWriter, q *http.Request) { fmt.Fprint(w, "{}") })
	c = at(plain, func(e *Endpoint) { e.Scheme = "" })
	if _, err := c.Manifest(context.Background(), "v1"); err != nil || c.Endpoint().Scheme != "http" {
		t.Errorf("plain: %v", err)
	}
	if _, err := at(plain, func(e *Endpoint) { e.Scheme = "https" }).Manifest(context.Background(), "v1"); err == nil {
		t.Error("plain HTTP where HTTPS is wanted")
	}
}

// TestProxy: what is asked of a proxy of the environment, and for what it is not.
func TestProxy(t *testing.T) {
	proxy, asked := serve(t, func(w http.ResponseWriter, q *http.Request) { fmt.Fprint(w, "{}") })
	t.Setenv("HTTP_PROXY", proxy.URL)
	t.Setenv("NO_PROXY", "direct.invalid")
	e := Endpoint{Scheme: "http", Host: "registry.invalid", Path: "/v2", Repository: "a", Namespace: "ns.example"}
	if _, err := New(e).Manifest(context.Background(), "v1"); err != nil {
		t.Fatal(err)
	}
	if q := asked.list()[0]; q.URL.String() != "http://registry.invalid/v2/a/manifests/v1?ns=ns.example" {
		t.Errorf("the proxy was asked for %s", q.URL)
	}
	e.Host = "direct.invalid"
	if _, err := New(e).Manifest(context.Background(), "v1"); err == nil || len(asked.list()) != 1 {
		t.Errorf("NO_PROXY: %v, %d requests", err, len(asked.list()))
	}
}

// TestBounds: no answer takes more memory than its limit.
func TestBounds(t *testing.T) {
	var what string
	srv, _ := serve(t, func(w http.ResponseWriter, q *http.Request) {
		switch what {
		case "manifest":
			_, _ = io.CopyN(w, zeros{}, MaxManifest+1)
		case "error":
			w.WriteHeader(http.StatusBadGateway)
			b, _ := json.Marshal(map[string]any{"errors": []any{map[string]string{"code": "X", "message": strings.Repeat("m", 5000)}}})
			_, _ = w.Write(b)
		case "endless error":
			w.WriteHeader(http.StatusBadGateway)
			_, _ = io.CopyN(w, zeros{}, 64<<20)
		}
	})
	what = "manifest"
	if _, err := at(srv).Manifest(context.Background(), "v1"); !errors.Is(err, ErrTooLarge) {
		t.Errorf("manifest: %v", err)
	}
	for _, what = range []string{"error", "endless error"} {
		var status *StatusError
		if _, err := at(srv).Manifest(context.Background(), "v1"); !errors.As(err, &status) || len(err.Error()) > 500 || !status.Temporary() {
			t.Errorf("%s: %v", what, err)
		}
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

func TestBlobAnswers(t *testing.T) {
	var answer http.HandlerFunc
	srv, asked := serve(t, func(w http.ResponseWriter, q *http.Request) { answer(w, q) })
	c := at(srv)
	get := func(from, to int64, etag string) (*Blob, error) {
		b, err := c.Blob(context.Background(), "sha256:x", from, to, etag)
		if err == nil {
			b.Close()
		}
		return b, err
	}
	answer = func(w http.ResponseWriter, q *http.Request) {
		w.Header().Set("ETag", `"e1"`)
		http.ServeContent(w, q, "", time.Time{}, strings.NewReader("0123456789"))
	}
	if b, err := get(0, -1, ""); err != nil || b.Offset != 0 || b.Size != 10 || b.ETag != `"e1"` {
		t.Errorf("whole: %+v, %v", b, err)
	}
	if b, err := get(3, 6, ""); err != nil || b.Offset != 3 || b.Size != 10 || asked.list()[1].Header.Get("Range") != "bytes=3-5" {
		t.Errorf("part: %+v, %v", b, err)
	}
	if b, err := get(3, -1, `"e1"`); err != nil || b.Offset != 3 {
		t.Errorf("the same blob: %+v, %v", b, err)
	}
	if b, err := get(3, -1, `"e0"`); err != nil || b.Offset != 0 {
		t.Errorf("another blob: %+v, %v", b, err)
	}
	answer = func(w http.ResponseWriter, q *http.Request) { fmt.Fprint(w, "0123456789") }
	if b, err := get(3, -1, ""); err != nil || b.Offset != 0 || b.Size != 10 {
		t.Errorf("no ranges: %+v, %v", b, err)
	}
	for name, h := range map[string]http.Header{
		"other range":   {"Content-Range": {"bytes 4-9/10"}},
		"no range":      {},
		"odd range":     {"Content-Range": {"lines 3-9/10"}},
		"other numbers": {"Content-Range": {"bytes 3-99/10"}},
	} {
		answer = func(w http.ResponseWriter, q *http.Request) {
			for k, v := range h {
				w.Header()[k] = v
			}
			w.WriteHeader(http.StatusPartialContent)
		}
		if _, err := get(3, -1, ""); !errors.Is(err, ErrProtocol) {
			t.Errorf("%s: %v", name, err)
		}
	}
	answer = func(w http.ResponseWriter, q *http.Request) {
		w.Header().Set("Content-Encoding", "gzip")
		fmt.Fprint(w, "x")
	}
	if _, err := get(0, -1, ""); !errors.Is(err, ErrProtocol) {
		t.Errorf("encoding that was not asked for: %v", err)
	}
}
