package imageservice

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/berthd/berth/test/registry"
)

// mirror is a server of its own in front of the node's registry.
type mirror struct {
	*httptest.Server
	host  string
	bytes atomic.Int64 // of layers, sent
	mu    sync.Mutex
	got   []*http.Request
}

// mirrorOf serves what the registry does, unless spoil answers first and says so.
func mirrorOf(n *node, spoil func(m *mirror, w http.ResponseWriter, q *http.Request) bool) *mirror {
	m := &mirror{}
	m.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		m.mu.Lock()
		m.got = append(m.got, q)
		m.mu.Unlock()
		if spoil != nil && spoil(m, w, q) {
			return
		}
		if isLayer(q) {
			w = &counting{w, &m.bytes}
		}
		n.reg.ServeHTTP(w, q)
	}))
	n.t.Cleanup(m.Close)
	m.host = strings.TrimPrefix(m.URL, "http://")
	return m
}

func isLayer(q *http.Request) bool { return strings.Contains(q.URL.Path, "/blobs/") }

func isManifest(q *http.Request) bool { return strings.Contains(q.URL.Path, "/manifests/") }

// count is how many requests matched.
func (m *mirror) count(what func(*http.Request) bool) int {
	m.mu.Lock()
	defer m.mu.Unlock()
	n := 0
	for _, q := range m.got {
		if what(q) {
			n++
		}
	}
	return n
}

type counting struct {
	http.ResponseWriter
	n *atomic.Int64
}

func (c *counting) Write(p []byte) (int, error) {
	n, err := c.ResponseWriter.Write(p)
	c.n.Add(int64(n))
	return n, err
}

// Unwrap lets what is written be flushed.
func (c *counting) Unwrap() http.ResponseWriter { return c.ResponseWriter }

// limited passes on some bytes and then breaks the connection, or goes on at a trickle.
type limited struct {
	http.ResponseWriter
	left    int64
	trickle time.Duration // between single bytes; 0 breaks
	until   <-chan struct{}
}

func (l *limited) Write(p []byte) (int, error) {
	now := min(int64(len(p)), l.left)
	n, err := l.ResponseWriter.Write(p[:now])
	l.left -= int64(n)
	if err != nil || l.left > 0 {
		return n, err
	}
	http.NewResponseController(l.ResponseWriter).Flush()
	if l.trickle == 0 {
		panic(http.ErrAbortHandler)
	}
	for ; n < len(p); n++ {
		select {
		case <-time.After(l.trickle):
		case <-l.until:
			return n, io.ErrClosedPipe
		}
		if _, err := l.ResponseWriter.Write(p[n : n+1]); err != nil {
			return n, err
		}
		http.NewResponseController(l.ResponseWriter).Flush()
	}
	return n, nil
}

// mirrored tells the node to get images of img.example from these, in order.
func (n *node) mirrored(hosts ...string) {
	var b strings.Builder
	fmt.Fprintf(&b, "server = \"http://%s\"\n", hosts[len(hosts)-1])
	for _, h := range hosts[:len(hosts)-1] {
		fmt.Fprintf(&b, "[host.\"http://%s\"]\n", h)
	}
	n.hostsFor("img.example", b.String())
}

// TestResume: what came before a connection broke is not fetched again.
func TestResume(t *testing.T) {
	n := newNode(t)
	img := big(t, 1)
	n.reg.Push("r", "v1", img)
	size := int64(img.Layers[0].Size)
	var drops atomic.Int64
	m := mirrorOf(n, func(m *mirror, w http.ResponseWriter, q *http.Request) bool {
		if !strings.HasSuffix(q.URL.Path, img.Layers[0].Digest) || drops.Add(1) > 3 {
			return false
		}
		n.reg.ServeHTTP(&limited{ResponseWriter: &counting{w, &m.bytes}, left: 700_000}, q)
		return true
	})
	got := n.mustPull(m.host + "/r:v1")
	if b, _, err := n.readIn(got, "f1"); err != nil || b != string(noise(3<<20, 1)) {
		t.Errorf("contents differ: %d bytes, %v", len(b), err)
	}
	config := int64(2000) // the config is a blob too
	if sent := m.bytes.Load(); drops.Load() < 4 || sent > size+3*(1<<20)+config {
		t.Errorf("%d connections sent %d bytes of a layer of %d", drops.Load(), sent, size)
	}
	ranged := m.count(func(q *http.Request) bool { return q.Header.Get("Range") != "" })
	if ranged != 3 {
		t.Errorf("%d requests for a range, want 3", ranged)
	}
}

// TestFailOver: a layer goes on from the next mirror in the middle of it, for whatever
// reason the first one gave up.
func TestFailOver(t *testing.T) {
	for name, spoil := range map[string]func(w http.ResponseWriter, q *http.Request) http.ResponseWriter{
		"breaks": func(w http.ResponseWriter, q *http.Request) http.ResponseWriter {
			return &limited{ResponseWriter: w, left: 900_000}
		},
		"trickles": func(w http.ResponseWriter, q *http.Request) http.ResponseWriter {
			return &limited{ResponseWriter: w, left: 900_000, trickle: 50 * time.Millisecond, until: q.Context().Done()}
		},
		"hangs": func(w http.ResponseWriter, q *http.Request) http.ResponseWriter {
			return &limited{ResponseWriter: w, left: 900_000, trickle: time.Hour, until: q.Context().Done()}
		},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t, func(c *Config) { c.StallTimeout = time.Second })
			img := big(t, 1)
			n.reg.Push("r", "v1", img)
			bad := mirrorOf(n, func(m *mirror, w http.ResponseWriter, q *http.Request) bool {
				if !strings.HasSuffix(q.URL.Path, img.Layers[0].Digest) {
					return false
				}
				n.reg.ServeHTTP(spoil(&counting{w, &m.bytes}, q), q)
				return true
			})
			good := mirrorOf(n, nil)
			n.mirrored(bad.host, good.host)
			began := time.Now()
			got := n.mustPull("img.example/r:v1")
			if took := time.Since(began); took > 5*time.Second {
				t.Errorf("took %s", took)
			}
			if b, _, err := n.readIn(got, "f1"); err != nil || b != string(noise(3<<20, 1)) {
				t.Errorf("contents differ: %d bytes, %v", len(b), err)
			}
			if bad.bytes.Load() < 800_000 || good.bytes.Load() > int64(img.Layers[0].Size)-800_000 {
				t.Errorf("%d bytes from the first, %d from the second of %d", bad.bytes.Load(), good.bytes.Load(), img.Layers[0].Size)
			}
		})
	}
}

// TestWrongMirror: what a mirror sends instead of the right thing is had from the next.
func TestWrongMirror(t *testing.T) {
	img := big(t, 1)
	layer := img.Layers[0].Digest
	garbage := func(w http.ResponseWriter, size int) {
		w.Header().Set("Content-Length", strconv.Itoa(size))
		_, _ = w.Write(bytes.Repeat([]byte("x"), size))
	}
	for name, spoil := range map[string]func(w http.ResponseWriter, q *http.Request) bool{
		"layer of other bytes": func(w http.ResponseWriter, q *http.Request) bool {
			if strings.HasSuffix(q.URL.Path, layer) {
				garbage(w, int(img.Layers[0].Size))
				return true
			}
			return false
		},
		"layer of other size": func(w http.ResponseWriter, q *http.Request) bool {
			if strings.HasSuffix(q.URL.Path, layer) {
				garbage(w, 10)
				return true
			}
			return false
		},
		"no layer": func(w http.ResponseWriter, q *http.Request) bool {
			if strings.HasSuffix(q.URL.Path, layer) {
				w.WriteHeader(http.StatusNotFound)
				return true
			}
			return false
		},
		"other manifest": func(w http.ResponseWriter, q *http.Request) bool {
			if isManifest(q) {
				garbage(w, 10)
				return true
			}
			return false
		},
		"other config": func(w http.ResponseWriter, q *http.Request) bool {
			if isLayer(q) && !strings.HasSuffix(q.URL.Path, layer) {
				garbage(w, 10)
				return true
			}
			return false
		},
		"denies": func(w http.ResponseWriter, q *http.Request) bool {
			w.WriteHeader(http.StatusForbidden)
			return true
		},
		"wants to be left alone": func(w http.ResponseWriter, q *http.Request) bool {
			if isLayer(q) {
				w.Header().Set("Retry-After", "40")
				w.WriteHeader(http.StatusTooManyRequests)
			}
			return isLayer(q)
		},
		"fails": func(w http.ResponseWriter, q *http.Request) bool {
			w.WriteHeader(http.StatusInternalServerError)
			return true
		},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			n.reg.Push("r", "v1", img)
			bad := mirrorOf(n, func(_ *mirror, w http.ResponseWriter, q *http.Request) bool { return spoil(w, q) })
			n.mirrored(bad.host, n.reg.Addr())
			began := time.Now()
			got := n.mustPull("img.example/r@" + img.Digest)
			if took := time.Since(began); took > 20*time.Second {
				t.Errorf("took %s", took)
			}
			if b, _, err := n.readIn(got, "f1"); err != nil || b != string(noise(3<<20, 1)) {
				t.Errorf("contents differ: %d bytes, %v", len(b), err)
			}
			if len(n.kept()) != 1 {
				t.Errorf("left behind: %q", n.kept())
			}
			if got.RepoDigests[0] != "img.example/r@"+img.Digest {
				t.Errorf("names %q", got.RepoDigests)
			}
		})
	}
}

// sequence answers with these statuses one after the other, and with the registry then.
func sequence(match func(*http.Request) bool, header http.Header, statuses ...int) func(*mirror, http.ResponseWriter, *http.Request) bool {
	var next atomic.Int64
	return func(_ *mirror, w http.ResponseWriter, q *http.Request) bool {
		if !match(q) {
			return false
		}
		i := int(next.Add(1)) - 1
		if i >= len(statuses) {
			return false
		}
		for k, v := range header {
			w.Header()[k] = v
		}
		w.WriteHeader(statuses[i])
		return true
	}
}

// TestStatusSequences: trouble that passes is waited for, and no other.
func TestStatusSequences(t *testing.T) {
	later := http.Header{"Retry-After": {"1"}}
	for _, tc := range []struct {
		name     string
		match    func(*http.Request) bool
		header   http.Header
		statuses []int
		want     error
		least    time.Duration
		requests int // at most, that matched
	}{
		{"500 and 502 and 503 at the manifest", isManifest, nil, []int{500, 502, 503}, nil, 0, 4},
		{"503 and 504 at a blob", isLayer, nil, []int{503, 504}, nil, 0, 6},
		{"429 with Retry-After at the manifest", isManifest, later, []int{429}, nil, 950 * time.Millisecond, 2},
		{"429 with Retry-After at a blob", isLayer, later, []int{429, 429}, nil, 950 * time.Millisecond, 6},
		{"429 for longer than silence may last", isManifest, http.Header{"Retry-After": {"3"}}, []int{429}, nil, 2900 * time.Millisecond, 2},
		{"429 for an hour", isManifest, http.Header{"Retry-After": {"3600"}}, []int{429, 429}, ErrRegistryUnavailable, 0, 1},
		{"500 for ever", isManifest, nil, []int{500, 500, 500, 500, 500, 500, 500, 500, 500}, ErrRegistryUnavailable, 0, 5},
		{"500 for ever at blobs", isLayer, nil, []int{500, 500, 500, 500, 500, 500, 500, 500, 500, 500, 500}, ErrRegistryUnavailable, 0, 5},
		{"401", isManifest, nil, []int{401, 401, 401}, ErrUnauthorized, 0, 3},
		{"403", isManifest, nil, []int{403, 403}, ErrUnauthorized, 0, 1},
		{"404", isManifest, nil, []int{404, 404}, ErrNotFound, 0, 1},
		{"403 at a blob", isLayer, nil, []int{403, 403, 403, 403}, ErrUnauthorized, 0, 3},
		{"410", isManifest, nil, []int{410, 410}, ErrRegistryUnavailable, 0, 1},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			n := newNode(t, func(c *Config) { c.StallTimeout = 2 * time.Second })
			img := big(t, 1)
			n.reg.Push("r", "v1", img)
			m := mirrorOf(n, sequence(tc.match, tc.header, tc.statuses...))
			began := time.Now()
			_, err := n.Pull(context.Background(), m.host+"/r:v1", nil)
			took := time.Since(began)
			if !errors.Is(err, tc.want) || (err == nil) != (tc.want == nil) {
				t.Errorf("%v, want %v", err, tc.want)
			}
			if took < tc.least || took > 15*time.Second {
				t.Errorf("took %s, at least %s", took, tc.least)
			}
			if got := m.count(tc.match); got > tc.requests {
				t.Errorf("%d requests, at most %d", got, tc.requests)
			}
			if tc.want != nil && len(n.kept()) != 0 {
				t.Errorf("left behind: %q", n.kept())
			}
		})
	}
}

// TestSlowDisk: time in which nobody reads is not the registry's.
func TestSlowDisk(t *testing.T) {
	n := newNode(t, func(c *Config) { c.StallTimeout = 400 * time.Millisecond })
	img := big(t, 1)
	n.reg.Push("r", "v1", img)
	names, err := n.search.Load().toPull(n.reg.Ref("r", "v1"))
	if err != nil {
		t.Fatal(err)
	}
	src, err := n.openSource(context.Background(), names[0].named, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	r := newBlobReader(context.Background(), src, img.Layers[0].Digest, int64(img.Layers[0].Size), nil)
	defer r.Close()
	h := digest.SHA256.Hash()
	buf := make([]byte, 700_000)
	for {
		k, err := r.Read(buf)
		h.Write(buf[:k])
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if r.off > 2<<20 && r.off < 3<<20 {
			time.Sleep(900 * time.Millisecond) // the disk
		}
	}
	if got := digest.NewDigest(digest.SHA256, h).String(); got != img.Layers[0].Digest {
		t.Errorf("digest %s", got)
	}
	if gets := n.layerGets(img); gets != 1 {
		t.Errorf("%d connections", gets)
	}
}

// TestBrokenHTTP2: what happens to one stream of a connection does not look like a network
// error, and is one.
func TestBrokenHTTP2(t *testing.T) {
	n := newNode(t)
	img := big(t, 1)
	n.reg.Push("r", "v1", img)
	var drops, left atomic.Int64
	left.Store(2)
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		if q.ProtoMajor != 2 {
			t.Errorf("protocol %s", q.Proto)
		}
		if strings.HasSuffix(q.URL.Path, img.Layers[0].Digest) && left.Add(-1) >= 0 {
			drops.Add(1)
			w = &limited{ResponseWriter: w, left: 700_000}
		}
		n.reg.ServeHTTP(w, q)
	}))
	srv.EnableHTTP2 = true
	srv.StartTLS()
	defer srv.Close()
	ref := strings.TrimPrefix(srv.URL, "https://") + "/r:v1"
	got := n.mustPull(ref)
	if b, _, err := n.readIn(got, "f1"); err != nil || b != string(noise(3<<20, 1)) || drops.Load() != 2 {
		t.Errorf("contents differ: %d bytes, %v, after %d drops", len(b), err, drops.Load())
	}
	if err := n.Remove(context.Background(), ref); err != nil {
		t.Fatal(err)
	}
	left.Store(1000)
	srv.Config.Handler = http.HandlerFunc(func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) })
	if _, err := n.Pull(context.Background(), ref, nil); !errors.Is(err, ErrRegistryUnavailable) {
		t.Errorf("broken for ever: %v", err)
	}
}

// TestMirrorCredentials: credentials for a registry are not for its mirrors, and theirs
// are not for it.
func TestMirrorCredentials(t *testing.T) {
	n := newNode(t)
	n.reg.Push("r", "v1", sample(t, "x"))
	got := map[string]string{}
	var mu sync.Mutex
	asking := func(name string, fail bool) *mirror {
		return mirrorOf(n, func(_ *mirror, w http.ResponseWriter, q *http.Request) bool {
			u, p, ok := q.BasicAuth()
			if !ok {
				w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
				w.WriteHeader(http.StatusUnauthorized)
				return true
			}
			mu.Lock()
			got[name] = u + ":" + p
			mu.Unlock()
			if fail {
				w.WriteHeader(http.StatusServiceUnavailable)
			}
			return fail
		})
	}
	first, second, own := asking("first", true), asking("second", true), asking("own", false)
	n.mirrored(first.host, second.host, own.host)
	n.mustWrite("auth.json", fmt.Sprintf(`{"auths":{%q:{"auth":"ZmlsZTpmaWxl"}}}`, first.host))
	// Under its own name the registry is a host of hosts.toml like the others.
	_, err := n.Pull(context.Background(), "img.example/r:v1", &Auth{Username: "cri", Password: "cri", ServerAddress: "https://" + own.host + "/v1/"})
	if err != nil {
		t.Fatal(err)
	}
	if got["first"] != "file:file" || got["second"] != "" || got["own"] != "cri:cri" {
		t.Errorf("credentials sent: %v", got)
	}
	// Without an address they are for the registry that the image names.
	clear(got)
	if _, err = n.Pull(context.Background(), "img.example/r:v1", &Auth{Username: "cri", Password: "cri"}); !errors.Is(err, ErrUnauthorized) || got["own"] != "" || got["second"] != "" {
		t.Errorf("%v, credentials sent: %v", err, got)
	}
}

// TestReloadByPull: registries.conf, policy and hosts.toml count from the next pull on.
func TestReloadByPull(t *testing.T) {
	n := newNode(t)
	n.reg.Push("r", "v1", sample(t, "x"))
	ref := "img.example/r:v1"
	fails := func(want error) {
		t.Helper()
		if _, err := n.Pull(context.Background(), ref, nil); !errors.Is(err, want) {
			t.Errorf("%v, want %v", err, want)
		}
	}
	n.hostsFor("img.example", `server = "http://127.0.0.1:1"`)
	fails(ErrRegistryUnavailable)
	n.mirrored(n.reg.Addr())
	n.mustPull(ref)
	n.mustWrite("registries.conf", "[[registry]]\nlocation = \"img.example\"\nblocked = true\n")
	fails(ErrPolicyRejected)
	n.mustWrite("registries.conf", fmt.Sprintf("[[registry]]\nprefix = \"img.example\"\nlocation = %q\ninsecure = true\n", n.reg.Addr()))
	n.mustPull(ref)
	n.mustWrite("policy.json", `{"default":[{"type":"reject"}]}`)
	fails(ErrPolicyRejected)
	// A file that is being written, or is wrong, takes nothing away.
	n.mustWrite("policy.json", `{"default":`)
	n.mustWrite("registries.conf.d/new.conf", "unqualified-search-registries = 5")
	fails(ErrPolicyRejected)
	n.mustWrite("policy.json", `{"default":[{"type":"insecureAcceptAnything"}]}`)
	os.Remove(n.dir + "/registries.conf.d/new.conf")
	n.mustPull(ref)
}

// TestOrphan: a pull for which nobody waits any more ends after its grace.
func TestOrphan(t *testing.T) {
	n := newNode(t, func(c *Config) { c.OrphanTimeout = 300 * time.Millisecond })
	n.reg.Push("r", "v1", big(t, 1))
	n.reg.SetFault("r", registry.Fault{Rate: 100_000})
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if _, err := n.Pull(ctx, n.reg.Ref("r", "v1"), nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatal(err)
	}
	if p := n.Pulls(); len(p) != 1 || p[0].Waiters != 0 {
		t.Errorf("the pull after its caller: %+v", p)
	}
	waitFor(t, "the end of the pull", func() bool { return len(n.Pulls()) == 0 })
	waitFor(t, "the layer to be gone", func() bool { return len(n.kept()) == 0 })
}
