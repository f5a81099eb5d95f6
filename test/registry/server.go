package registry

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"
)

// Fault says how a repository misbehaves. The zero Fault is a healthy
// repository. Fields combine; credentials are checked first.
type Fault struct {
	// Username and Password are wanted as basic authorization.
	Username, Password string
	// Token is wanted as a bearer token; the server's own /token endpoint
	// issues it against Username and Password.
	Token string
	// Status answers every request with this HTTP status.
	Status int
	// WrongBlob serves every layer with its last byte flipped: right size, wrong digest.
	WrongBlob bool
	// WrongManifest does the same to manifests asked for by digest.
	WrongManifest bool
	// DropAfter closes the connection in the middle of each layer, DropTimes
	// times altogether (negative: every time).
	DropAfter int64
	DropTimes int
	// Hang leaves every layer request unanswered until the client gives up or
	// the fault is replaced; then the connection is dropped.
	Hang bool
	// Rate limits layers to this many bytes per second; 0 is no limit.
	Rate int64
	// NoRange ignores the Range header.
	NoRange bool
}

// Server is a read-only registry. Its methods may be called at any time.
type Server struct {
	addr     string
	http     *http.Server
	done     chan struct{} // closed by Close: ends hanging answers
	mu       sync.Mutex
	repos    map[string]*repository
	requests []string
}

type repository struct {
	manifests map[string]*Image // by digest
	tags      map[string]string // tag -> digest
	blobs     map[string]blob
	fault     Fault
	replaced  chan struct{} // closed when fault is replaced
}

type blob struct {
	data  []byte
	layer bool // faults on blobs are for layers, not for configs
}

// Start serves an empty registry on a free port of 127.0.0.1.
func Start() (*Server, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("registry: %w", err)
	}
	s := &Server{addr: l.Addr().String(), done: make(chan struct{}), repos: map[string]*repository{}}
	s.http = &http.Server{Handler: s, ReadHeaderTimeout: 30 * time.Second}
	go func() { _ = s.http.Serve(l) }() // ends with Close, whose caller needs no word about it
	return s, nil
}

// Close stops the server and ends all connections.
func (s *Server) Close() error {
	close(s.done)
	return s.http.Close()
}

// Addr returns host:port, the part of a reference before the first slash.
func (s *Server) Addr() string { return s.addr }

// Ref returns the full reference of repo with a tag, or with a digest if
// suffix begins with "sha256:".
func (s *Server) Ref(repo, suffix string) string {
	if strings.HasPrefix(suffix, "sha256:") {
		return s.addr + "/" + repo + "@" + suffix
	}
	return s.addr + "/" + repo + ":" + suffix
}

// Push makes img available as repo:tag and by digest; an empty tag leaves it
// at the digest. A tag that exists is moved.
func (s *Server) Push(repo, tag string, img *Image) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := s.repoLocked(repo)
	r.add(img)
	if tag != "" {
		r.tags[tag] = img.Digest
	}
}

// SetFault replaces the fault of repo; the zero Fault heals it. The repository
// "" stands for the server itself: its credentials are asked for at /v2/, where
// clients learn what kind of authorization there is.
func (s *Server) SetFault(repo string, f Fault) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := s.repoLocked(repo)
	r.fault = f
	close(r.replaced)
	r.replaced = make(chan struct{})
}

// Requests returns "METHOD path" of all requests so far, in order of arrival.
func (s *Server) Requests() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]string(nil), s.requests...)
}

func (s *Server) repoLocked(name string) *repository {
	r := s.repos[name]
	if r == nil {
		r = &repository{manifests: map[string]*Image{}, tags: map[string]string{}, blobs: map[string]blob{}, replaced: make(chan struct{})}
		s.repos[name] = r
	}
	return r
}

func (r *repository) add(img *Image) {
	r.manifests[img.Digest] = img
	for d, b := range img.blobs {
		r.blobs[d] = blob{data: b}
	}
	for _, l := range img.Layers {
		r.blobs[l.Digest] = blob{data: img.blobs[l.Digest], layer: true}
	}
	for _, c := range img.children {
		r.add(c)
	}
}

// ServeHTTP implements http.Handler with the pull half of the OCI distribution
// specification 1.1.
func (s *Server) ServeHTTP(w http.ResponseWriter, q *http.Request) {
	s.mu.Lock()
	s.requests = append(s.requests, q.Method+" "+q.URL.Path)
	s.mu.Unlock()
	w.Header().Set("Docker-Distribution-API-Version", "registry/2.0")
	if q.URL.Path == "/token" {
		s.token(w, q)
		return
	}
	if q.Method != http.MethodGet && q.Method != http.MethodHead {
		answer(w, http.StatusMethodNotAllowed, "UNSUPPORTED", "this registry is read-only")
		return
	}
	rest, ok := strings.CutPrefix(q.URL.Path, "/v2/")
	if !ok {
		answer(w, http.StatusNotFound, "NOT_FOUND", "no such page")
		return
	}
	if rest == "" {
		s.mu.Lock()
		f := s.repoLocked("").fault
		s.mu.Unlock()
		if s.authorized(w, q, "", f) {
			w.WriteHeader(http.StatusOK)
		}
		return
	}
	repo, kind, name, err := split(rest)
	if err != nil {
		answer(w, http.StatusNotFound, "NAME_INVALID", err.Error())
		return
	}
	s.serve(w, q, repo, kind, name)
}

func (s *Server) serve(w http.ResponseWriter, q *http.Request, repo, kind, name string) {
	s.mu.Lock()
	r := s.repos[repo]
	if r == nil {
		s.mu.Unlock()
		answer(w, http.StatusNotFound, "NAME_UNKNOWN", "repository name not known to registry")
		return
	}
	fault, replaced := r.fault, r.replaced
	digest := name
	if d, ok := r.tags[name]; ok {
		digest = d
	}
	img, b := r.manifests[digest], r.blobs[name]
	s.mu.Unlock()

	switch {
	case !s.authorized(w, q, repo, fault):
	case fault.Status != 0:
		answer(w, fault.Status, errorCodes[fault.Status], "fault on request of the test")
	case kind == "manifests" && img != nil:
		body := img.Manifest
		if fault.WrongManifest && name == digest {
			body = flipped(body)
		}
		w.Header().Set("Content-Type", img.MediaType)
		w.Header().Set("Docker-Content-Digest", img.Digest)
		s.send(w, q, body, Fault{}, nil)
	case kind == "blobs" && b.data != nil:
		w.Header().Set("Content-Type", "application/octet-stream")
		w.Header().Set("Docker-Content-Digest", name)
		if !b.layer {
			fault = Fault{}
		}
		if fault.DropTimes != 0 && q.Method == http.MethodGet {
			s.drop(repo)
		}
		s.send(w, q, b.data, fault, replaced)
	default:
		answer(w, http.StatusNotFound, strings.ToUpper(strings.TrimSuffix(kind, "s"))+"_UNKNOWN", kind+" "+name+" not known to registry")
	}
}

// drop counts one dropped connection of a repository.
func (s *Server) drop(repo string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if r := s.repos[repo]; r.fault.DropTimes > 0 {
		r.fault.DropTimes--
	}
}

func (s *Server) authorized(w http.ResponseWriter, q *http.Request, repo string, f Fault) bool {
	switch {
	case f.Token != "":
		if q.Header.Get("Authorization") == "Bearer "+f.Token {
			return true
		}
		w.Header().Set("WWW-Authenticate", fmt.Sprintf(
			`Bearer realm="http://%s/token",service="berth-test",scope="repository:%s:pull"`, s.addr, repo))
	case f.Username != "":
		if user, password, ok := q.BasicAuth(); ok && user == f.Username && password == f.Password {
			return true
		}
		w.Header().Set("WWW-Authenticate", `Basic realm="berth-test"`)
	default:
		return true
	}
	answer(w, http.StatusUnauthorized, "UNAUTHORIZED", "authentication required")
	return false
}

// token answers the token request of the distribution specification: GET with
// basic authorization and a scope.
func (s *Server) token(w http.ResponseWriter, q *http.Request) {
	scope := strings.Split(q.URL.Query().Get("scope"), ":")
	user, password, _ := q.BasicAuth()
	if q.Method == http.MethodPost { // the OAuth 2 form
		scope = strings.Split(q.PostFormValue("scope"), ":")
		user, password = q.PostFormValue("username"), q.PostFormValue("password")
	}
	if len(scope) < 3 {
		answer(w, http.StatusBadRequest, "UNSUPPORTED", "scope wanted")
		return
	}
	s.mu.Lock()
	var f Fault
	if r := s.repos[scope[1]]; r != nil {
		f = r.fault
	}
	s.mu.Unlock()
	if user != f.Username || password != f.Password {
		answer(w, http.StatusUnauthorized, "UNAUTHORIZED", "wrong user name or password")
		return
	}
	w.Header().Set("Content-Type", "application/json")
	fmt.Fprintf(w, `{"token":%q,"access_token":%q,"expires_in":300}`, f.Token, f.Token)
}

// send writes body, or the part of it that a single-range request asks for,
// with the faults of f. replaced ends a hanging answer.
func (s *Server) send(w http.ResponseWriter, q *http.Request, body []byte, f Fault, replaced <-chan struct{}) {
	if f.Hang {
		select {
		case <-q.Context().Done():
		case <-replaced:
		case <-s.done:
		}
		panic(http.ErrAbortHandler)
	}
	if f.WrongBlob {
		body = flipped(body)
	}
	status := http.StatusOK
	if from, to, err := byteRange(q.Header.Get("Range"), int64(len(body))); err == nil && !f.NoRange {
		if from >= int64(len(body)) {
			answer(w, http.StatusRequestedRangeNotSatisfiable, "RANGE_INVALID", "range begins after the end")
			return
		}
		w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, to-1, len(body)))
		body, status = body[from:to], http.StatusPartialContent
	}
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	w.Header().Set("Accept-Ranges", "bytes")
	w.WriteHeader(status)
	if q.Method == http.MethodHead {
		return
	}
	drop := f.DropTimes != 0
	if drop && int64(len(body)) > f.DropAfter {
		body = body[:f.DropAfter]
	}
	s.write(q.Context(), w, body, f.Rate)
	if drop {
		// Aborts the connection, so that the client sees a short body.
		panic(http.ErrAbortHandler)
	}
}

// write sends body at rate bytes per second, in ten parts a second.
func (s *Server) write(ctx context.Context, w http.ResponseWriter, body []byte, rate int64) {
	part := int64(len(body))
	if rate > 0 {
		part = max(rate/10, 1)
	}
	for len(body) > 0 {
		n := min(part, int64(len(body)))
		if _, err := w.Write(body[:n]); err != nil {
			return
		}
		body = body[n:]
		if err := http.NewResponseController(w).Flush(); err != nil {
			return
		}
		if len(body) == 0 {
			return
		}
		select {
		case <-time.After(100 * time.Millisecond):
		case <-ctx.Done():
			return
		case <-s.done:
			return
		}
	}
}

func flipped(b []byte) []byte {
	c := append([]byte(nil), b...)
	c[len(c)-1] ^= 1
	return c
}

// split takes "a/b/manifests/name" apart.
func split(p string) (repo, kind, name string, err error) {
	parts := strings.Split(p, "/")
	if len(parts) < 3 {
		return "", "", "", errors.New("path too short")
	}
	n := len(parts)
	return strings.Join(parts[:n-2], "/"), parts[n-2], parts[n-1], nil
}

// byteRange reads the forms of a range that pull clients send: "bytes=N-" and "bytes=N-M".
// The result is from, inclusive, and to, exclusive.
func byteRange(h string, size int64) (from, to int64, err error) {
	v, ok := strings.CutPrefix(h, "bytes=")
	if !ok {
		return 0, 0, errors.New("no byte range")
	}
	first, last, _ := strings.Cut(v, "-")
	if from, err = strconv.ParseInt(first, 10, 64); err != nil || from < 0 {
		return 0, 0, fmt.Errorf("range %q: a start is wanted", h)
	}
	if last == "" {
		return from, size, nil
	}
	if to, err = strconv.ParseInt(last, 10, 64); err != nil || to < from {
		return 0, 0, fmt.Errorf("range %q: it ends before it begins", h)
	}
	return from, min(to+1, size), nil
}

// errorCodes are the codes that registries send with these statuses.
var errorCodes = map[int]string{401: "UNAUTHORIZED", 403: "DENIED", 404: "NAME_UNKNOWN", 429: "TOOMANYREQUESTS"}

// answer writes an error object of the distribution specification.
func answer(w http.ResponseWriter, status int, code, message string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	fmt.Fprintf(w, `{"errors":[{"code":%q,"message":%q}]}`, code, message)
}

// BasicAuth returns the "auth" value of a CRI AuthConfig or an auth.json entry.
func BasicAuth(user, password string) string {
	return base64.StdEncoding.EncodeToString([]byte(user + ":" + password))
}
