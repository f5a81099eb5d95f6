package imageservice

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// tokens is a registry that wants a token from a server of its own, which answers like this.
func tokens(answer func(w http.ResponseWriter)) func(*mirror, http.ResponseWriter, *http.Request) bool {
	return func(m *mirror, w http.ResponseWriter, q *http.Request) bool {
		if q.URL.Path == "/token" {
			answer(w)
			return true
		}
		w.Header().Set("WWW-Authenticate", `Bearer realm="`+m.URL+`/token"`)
		w.WriteHeader(http.StatusUnauthorized)
		return true
	}
}

// TestMisbehaviour is of registries that try to cost time, memory or secrets.
func TestMisbehaviour(t *testing.T) {
	var bomb bytes.Buffer
	z := gzip.NewWriter(&bomb)
	_, _ = io.CopyN(z, zeros{}, 256<<20)
	z.Close()
	index := `{"schemaVersion":2,"manifests":[` + strings.Repeat(`{"mediaType":"`+ociManifestType+`","digest":"sha256:`+strings.Repeat("a", 64)+`","size":1},`, 40_000)
	refused := httptest.NewServer(http.NotFoundHandler())
	refused.Close()
	for _, tc := range []struct {
		name  string
		want  error
		text  string
		spoil func(m *mirror, w http.ResponseWriter, q *http.Request) bool
	}{
		{"endless manifest", ErrTooLarge, "manifest", func(_ *mirror, w http.ResponseWriter, q *http.Request) bool {
			_, _ = io.CopyN(w, zeros{}, 1<<30)
			return isManifest(q)
		}},
		{"huge index", ErrTooLarge, "manifest", func(_ *mirror, w http.ResponseWriter, q *http.Request) bool {
			w.Header().Set("Content-Type", ociIndexType)
			fmt.Fprint(w, index)
			return true
		}},
		{"gzip bomb for a manifest", ErrTooLarge, "manifest", func(_ *mirror, w http.ResponseWriter, q *http.Request) bool {
			w.Header().Set("Content-Encoding", "gzip")
			_, _ = w.Write(bomb.Bytes())
			return true
		}},
		{"manifest cut off", ErrRegistryUnavailable, "manifest", func(_ *mirror, w http.ResponseWriter, q *http.Request) bool {
			w.Header().Set("Content-Length", "1000")
			fmt.Fprint(w, "{")
			return true
		}},
		{"manifest that never ends", ErrStalled, "manifest", func(_ *mirror, w http.ResponseWriter, q *http.Request) bool {
			for i := 0; i < 1000; i++ {
				if _, err := fmt.Fprint(w, " "); err != nil || http.NewResponseController(w).Flush() != nil {
					break
				}
				time.Sleep(20 * time.Millisecond)
			}
			return true
		}},
		{"no answer", ErrStalled, "manifest", func(_ *mirror, w http.ResponseWriter, q *http.Request) bool {
			<-q.Context().Done()
			return true
		}},
		{"redirect loop", ErrRegistryUnavailable, "redirect", func(_ *mirror, w http.ResponseWriter, q *http.Request) bool {
			http.Redirect(w, q, q.URL.Path, http.StatusTemporaryRedirect)
			return true
		}},
		{"redirect loop of blobs", ErrRegistryUnavailable, "redirect", func(_ *mirror, w http.ResponseWriter, q *http.Request) bool {
			if isLayer(q) {
				http.Redirect(w, q, q.URL.Path+"x", http.StatusTemporaryRedirect)
			}
			return isLayer(q)
		}},
		{"token server down", ErrRegistryUnavailable, "token server", func(_ *mirror, w http.ResponseWriter, q *http.Request) bool {
			w.Header().Set("WWW-Authenticate", `Bearer realm="`+refused.URL+`/token"`)
			w.WriteHeader(http.StatusUnauthorized)
			return true
		}},
		{"token server fails", ErrRegistryUnavailable, "token server", tokens(func(w http.ResponseWriter) { w.WriteHeader(http.StatusBadGateway) })},
		{"token server of another kind", ErrRegistryUnavailable, "token server", tokens(func(w http.ResponseWriter) { w.WriteHeader(http.StatusNotFound) })},
		{"token server without a token", ErrRegistryUnavailable, "token server", tokens(func(w http.ResponseWriter) { fmt.Fprint(w, "<html>") })},
		{"endless token", ErrTooLarge, "token server", tokens(func(w http.ResponseWriter) { _, _ = io.CopyN(w, zeros{}, 1<<30) })},
		{"layer of another size", ErrDigestMismatch, "layer 1", func(_ *mirror, w http.ResponseWriter, q *http.Request) bool {
			if isLayer(q) && q.Header.Get("Accept-Encoding") == "identity" && layerTwin.Load() != nil && strings.HasSuffix(q.URL.Path, *layerTwin.Load()) {
				fmt.Fprint(w, "short")
				return true
			}
			return false
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n := newNode(t, func(c *Config) { c.StallTimeout, c.Retries = 600*time.Millisecond, 3 })
			img := big(t, 1)
			layerTwin.Store(&img.Layers[0].Digest)
			n.reg.Push("r", "v1", img)
			m := mirrorOf(n, tc.spoil)
			var before, after runtime.MemStats
			runtime.GC()
			runtime.ReadMemStats(&before)
			began := time.Now()
			_, err := n.Pull(context.Background(), m.host+"/r:v1", &Auth{Username: "u", Password: "p"})
			if took := time.Since(began); took > 10*time.Second {
				t.Errorf("took %s", took)
			}
			runtime.ReadMemStats(&after)
			if used := after.TotalAlloc - before.TotalAlloc; used > 64<<20 {
				t.Errorf("%d MiB allocated in all", used>>20)
			}
			if !errors.Is(err, tc.want) || !strings.Contains(err.Error(), tc.text) || len(err.Error()) > 2000 {
				t.Errorf("%v\nwant %v with %q", err, tc.want, tc.text)
			}
			if len(n.kept()) != 0 || len(n.List()) != 0 {
				t.Errorf("left behind: %q", n.kept())
			}
		})
	}
}

var layerTwin atomic.Pointer[string]

type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}
