package imageservice

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/berthd/berth/test/registry"
)

// TestRanges: a large layer comes over several connections, each of which may fail.
func TestRanges(t *testing.T) {
	img := big(t, 1)
	layer := img.Layers[0].Digest
	isIt := func(q *http.Request) bool { return strings.HasSuffix(q.URL.Path, layer) }
	for name, tc := range map[string]struct {
		spoil    func(n *node) func(*mirror, http.ResponseWriter, *http.Request) bool
		want     error
		least    int // requests for the layer
		sequence bool
	}{
		"healthy": {nil, nil, 12, false},
		"some fail": {func(*node) func(*mirror, http.ResponseWriter, *http.Request) bool {
			return sequence(func(q *http.Request) bool { return isIt(q) && q.Header.Get("Range") != "bytes=0-262143" }, nil, 500, 503, 500)
		}, nil, 15, false},
		"some break": {func(n *node) func(*mirror, http.ResponseWriter, *http.Request) bool {
			var drops atomic.Int64
			return func(_ *mirror, w http.ResponseWriter, q *http.Request) bool {
				if !isIt(q) || drops.Add(1) > 4 {
					return false
				}
				n.reg.ServeHTTP(&limited{ResponseWriter: w, left: 100_000}, q)
				return true
			}
		}, nil, 16, false},
		"no ranges": {func(n *node) func(*mirror, http.ResponseWriter, *http.Request) bool {
			return func(_ *mirror, w http.ResponseWriter, q *http.Request) bool {
				q.Header.Del("Range")
				return false
			}
		}, nil, 1, true},
		"a range of other bytes": {func(n *node) func(*mirror, http.ResponseWriter, *http.Request) bool {
			return func(_ *mirror, w http.ResponseWriter, q *http.Request) bool {
				if !isIt(q) || q.Header.Get("Range") != "bytes=1048576-1310719" {
					return false
				}
				w.Header().Set("Content-Range", fmt.Sprintf("bytes 1048576-1310719/%d", img.Layers[0].Size))
				w.WriteHeader(http.StatusPartialContent)
				_, _ = w.Write(bytes.Repeat([]byte("x"), 262144))
				return true
			}
		}, ErrDigestMismatch, 1, false},
		"fails for ever": {func(*node) func(*mirror, http.ResponseWriter, *http.Request) bool {
			return func(_ *mirror, w http.ResponseWriter, q *http.Request) bool {
				if !isIt(q) || q.Header.Get("Range") == "bytes=0-262143" {
					return false
				}
				w.WriteHeader(http.StatusForbidden)
				return true
			}
		}, ErrUnauthorized, 1, false},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t, func(c *Config) { c.ParallelRanges = 4 })
			n.rangeBytes = 256 << 10
			n.reg.Push("r", "v1", img)
			var spoil func(*mirror, http.ResponseWriter, *http.Request) bool
			if tc.spoil != nil {
				spoil = tc.spoil(n)
			}
			m := mirrorOf(n, spoil)
			got, err := n.Pull(context.Background(), m.host+"/r:v1", nil)
			if !errors.Is(err, tc.want) || (err == nil) != (tc.want == nil) {
				t.Fatalf("%v, want %v", err, tc.want)
			}
			if gets := m.count(isIt); gets < tc.least || tc.sequence && gets != 1 {
				t.Errorf("%d requests for the layer, want %d", gets, tc.least)
			}
			if err != nil {
				if len(n.kept()) != 0 {
					t.Errorf("left behind: %q", n.kept())
				}
				return
			}
			if b, _, err := n.readIn(got, "f1"); err != nil || b != string(noise(3<<20, 1)) {
				t.Errorf("contents differ: %d bytes, %v", len(b), err)
			}
			if sent := m.bytes.Load(); tc.spoil == nil && sent > int64(img.Layers[0].Size)+2000 {
				t.Errorf("%d bytes sent of %d", sent, img.Layers[0].Size)
			}
		})
	}
}

// TestRangesAtOnce: where a server gives each connection only so much, several are in use,
// and not more than configured.
func TestRangesAtOnce(t *testing.T) {
	img := big(t, 1)
	n := newNode(t, func(c *Config) { c.ParallelRanges = 4 })
	n.rangeBytes = 256 << 10
	n.reg.Push("r", "v1", img)
	n.reg.SetFault("r", registry.Fault{Rate: 1 << 20})
	var now, most atomic.Int64
	m := mirrorOf(n, func(_ *mirror, w http.ResponseWriter, q *http.Request) bool {
		most.Store(max(most.Load(), now.Add(1)))
		defer now.Add(-1)
		n.reg.ServeHTTP(w, q)
		return true
	})
	n.mustPull(m.host + "/r:v1")
	if most.Load() < 3 || most.Load() > 5 { // the first connection goes on beside them
		t.Errorf("%d connections at once", most.Load())
	}
}

// TestCloseRanges: a pull that is given up leaves no goroutine and no connection behind.
func TestCloseRanges(t *testing.T) {
	n := newNode(t, func(c *Config) { c.ParallelRanges, c.OrphanTimeout = 4, time.Millisecond })
	n.rangeBytes = 256 << 10
	img := big(t, 1)
	n.reg.Push("r", "v1", img)
	n.reg.SetFault("r", registry.Fault{Rate: 300_000})
	before := runtime.NumGoroutine()
	ctx, cancel := context.WithTimeout(context.Background(), 700*time.Millisecond)
	defer cancel()
	if _, err := n.Pull(ctx, n.reg.Ref("r", "v1"), nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatal(err)
	}
	waitFor(t, "the end of the pull", func() bool { return len(n.Pulls()) == 0 && len(n.kept()) == 0 })
	waitFor(t, "its goroutines to end", func() bool { return runtime.NumGoroutine() <= before+2 })
}
