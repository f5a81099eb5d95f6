package imageservice

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/berthd/berth/snapshotter"
	"github.com/berthd/berth/test/registry"
)

// challenging is the registry behind a front that asks for credentials at /v2/ already, as
// registries do that have no public repositories.
func challenging(reg *registry.Server, f registry.Fault) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		if q.URL.Path == "/v2/" {
			w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
			if f.Token != "" {
				w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="http://%s/token",service="x"`, reg.Addr()))
			}
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		reg.ServeHTTP(w, q)
	})
}

// status is a registry that answers all questions but the first like this.
func status(t *testing.T, code int, errorCode, message string) (host string) {
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		switch {
		case q.URL.Path == "/v2/":
		case errorCode == "":
			http.Error(w, "<html>", code)
		default:
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(code)
			fmt.Fprintf(w, `{"errors":[{"code":%q,"message":%q}]}`, errorCode, message)
		}
	}))
	t.Cleanup(srv.Close)
	return strings.TrimPrefix(srv.URL, "http://")
}

// big is an image with layers that are larger than what the stages buffer.
func big(t *testing.T, seeds ...byte) *registry.Image {
	t.Helper()
	var layers []registry.Layer
	for _, s := range seeds {
		layers = append(layers, layerOf(registry.Gzip, registry.File{Name: fmt.Sprintf("f%d", s), Data: noise(3<<20, s)}))
	}
	return mustBuild(t, registry.Spec{Layers: layers})
}

func TestPullErrors(t *testing.T) {
	n := newNode(t, func(c *Config) { c.StallTimeout = 800 * time.Millisecond })
	img := big(t, 1, 2)
	n.reg.Push("r", "v1", img)
	closed := httptest.NewServer(http.NotFoundHandler())
	closed.Close()
	html := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) { http.Error(w, "<html>", http.StatusNotFound) }))
	defer html.Close()
	for _, tc := range []struct {
		name  string
		ref   string
		fault registry.Fault
		want  error
		text  string
	}{
		{"no tag", n.reg.Ref("r", "v2"), registry.Fault{}, ErrNotFound, "v2"},
		{"no repository", n.reg.Ref("other", "v2"), registry.Fault{}, ErrNotFound, "other"},
		{"malformed", "http://x/y", registry.Fault{}, ErrInvalidReference, "http://x/y"},
		{"image ID", "sha256:" + strings.Repeat("a", 64), registry.Fault{}, ErrInvalidReference, "image ID"},
		{"403", status(t, 403, "DENIED", "no") + "/r:v1", registry.Fault{}, ErrUnauthorized, "no"},
		{"403 of its own", status(t, 403, "WHATEVER", "Forbidden") + "/r:v1", registry.Fault{}, ErrUnauthorized, "Forbidden"},
		{"403 without JSON", status(t, 403, "", "") + "/r:v1", registry.Fault{}, ErrUnauthorized, "403"},
		{"404 without JSON", status(t, 404, "", "") + "/r:v1", registry.Fault{}, ErrNotFound, "404"},
		{"404 of its own", status(t, 404, "NOPE", "artifact r not found") + "/r:v1", registry.Fault{}, ErrNotFound, "artifact"},
		{"400", status(t, 400, "NOPE", "what?") + "/r:v1", registry.Fault{}, ErrRegistryUnavailable, "what?"},
		{"503", status(t, 503, "", "") + "/r:v1", registry.Fault{}, ErrRegistryUnavailable, "503"},
		{"500", n.reg.Ref("r", "v1"), registry.Fault{Status: 500}, ErrRegistryUnavailable, ""},
		{"wrong layer", n.reg.Ref("r", "v1"), registry.Fault{WrongBlob: true}, ErrDigestMismatch, "layer "},
		{"wrong manifest", n.reg.Ref("r", img.Digest), registry.Fault{WrongManifest: true}, ErrDigestMismatch, img.Digest},
		{"drops always", n.reg.Ref("r", "v1"), registry.Fault{DropAfter: 1000, DropTimes: -1, NoRange: true}, ErrRegistryUnavailable, "layer "},
		{"hangs", n.reg.Ref("r", "v1"), registry.Fault{Hang: true}, ErrStalled, "layer "},
		{"trickles", n.reg.Ref("r", "v1"), registry.Fault{Rate: 200}, ErrStalled, "layer "},
		{"nobody there", strings.TrimPrefix(closed.URL, "http://") + "/x", registry.Fault{}, ErrRegistryUnavailable, ""},
		{"no registry", strings.TrimPrefix(html.URL, "http://") + "/x", registry.Fault{}, ErrRegistryUnavailable, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n.reg.SetFault("r", tc.fault)
			began := time.Now()
			_, err := n.Pull(context.Background(), tc.ref, nil)
			if !errors.Is(err, tc.want) || !strings.Contains(err.Error(), tc.text) || !strings.Contains(err.Error(), tc.ref) {
				t.Errorf("after %s: %v\nwant %v with %q and the reference", time.Since(began), err, tc.want, tc.text)
			}
			if kept := n.kept(); len(kept) > 1 {
				t.Errorf("left behind: %q", kept) // at most one layer was right
			}
			if l := n.List(); len(l) != 0 {
				t.Errorf("image visible: %+v", l)
			}
			if err := n.GC(context.Background()); err != nil {
				t.Error(err)
			}
			if kept := n.kept(); len(kept) != 0 {
				t.Errorf("left behind after GC: %q", kept)
			}
		})
	}
	n.reg.SetFault("r", registry.Fault{})
	n.mustPull(n.reg.Ref("r", "v1"))
}

func TestPullSurvivesDrops(t *testing.T) {
	n := newNode(t)
	img := big(t, 1)
	n.reg.Push("r", "v1", img)
	n.reg.SetFault("r", registry.Fault{DropAfter: 700_000, DropTimes: 2, NoRange: true})
	got := n.mustPull(n.reg.Ref("r", "v1"))
	if b, _, err := n.readIn(got, "f1"); err != nil || b != string(noise(3<<20, 1)) {
		t.Errorf("contents differ: %d bytes, %v", len(b), err)
	}
	if gets := n.layerGets(img); gets < 3 {
		t.Errorf("%d requests: the fault was not met", gets)
	}
}

// TestManifests feeds manifests that no honest registry serves.
func TestManifests(t *testing.T) {
	n := newNode(t)
	config := `{"os":"linux","rootfs":{"type":"layers","diff_ids":[]}}`
	desc := func(mediaType, d string, size int) string {
		return fmt.Sprintf(`{"mediaType":%q,"digest":%q,"size":%d}`, mediaType, d, size)
	}
	configOf := func(text string) string { return desc(ociConfigType, digest.FromString(text).String(), len(text)) }
	const layerType = "application/vnd.oci.image.layer.v1.tar+gzip"
	ok := digest.FromString("x").String()
	oci := func(config string, layers ...string) string {
		return fmt.Sprintf(`{"schemaVersion":2,"mediaType":%q,"config":%s,"layers":[%s]}`, ociManifestType, config, strings.Join(layers, ","))
	}
	windows := `{"os":"windows","architecture":"amd64","rootfs":{"diff_ids":[]}}`
	many := make([]string, 501)
	for i := range many {
		many[i] = desc(layerType, ok, 1)
	}
	for _, tc := range []struct {
		name, mime, body string
		want             error
	}{
		{"empty image", ociManifestType, oci(configOf(config)), nil},
		{"type not told", "", oci(configOf(config)), nil},
		{"not JSON", ociManifestType, "nonsense", ErrInvalidImage},
		{"schema 1", "application/vnd.docker.distribution.manifest.v1+json", `{"schemaVersion":1,"name":"x","tag":"y","fsLayers":[],"history":[]}`, ErrUnsupported},
		{"other type", "application/json", `{}`, ErrUnsupported},
		{"malformed layer digest", ociManifestType, oci(configOf(config), desc(layerType, "sha256:../../x", 1)), ErrInvalidImage},
		{"layer digest without colon", ociManifestType, oci(configOf(config), desc(layerType, "sha256", 1)), ErrInvalidImage},
		{"negative size", ociManifestType, oci(configOf(config), desc(layerType, ok, -5)), ErrInvalidImage},
		{"malformed config digest", ociManifestType, oci(desc(ociConfigType, ":", 1)), ErrInvalidImage},
		{"artifact", ociManifestType, oci(desc("application/vnd.example+json", ok, 1)), ErrUnsupported},
		{"huge config", ociManifestType, oci(desc(ociConfigType, ok, 1<<30)), ErrTooLarge},
		{"foreign layer", ociManifestType, oci(configOf(config), desc("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", ok, 1)), ErrUnsupported},
		{"encrypted layer", ociManifestType, oci(configOf(config), desc(layerType+"+encrypted", ok, 1)), ErrUnsupported},
		{"more layers than diff IDs", ociManifestType, oci(configOf(config), desc(layerType, ok, 1)), ErrInvalidImage},
		{"too many layers", ociManifestType, oci(configOf(config), many...), ErrTooLarge},
		{"other system", ociManifestType, oci(configOf(windows)), ErrUnsupported},
		{"config not there", ociManifestType, oci(desc(ociConfigType, ok, 1)), ErrNotFound},
		{"index with a malformed digest", ociIndexType, `{"schemaVersion":2,"manifests":[` +
			`{"mediaType":"` + ociManifestType + `","digest":"sha256:zz","size":1,"platform":{"os":"linux","architecture":"amd64"}}]}`, ErrInvalidImage},
	} {
		t.Run(tc.name, func(t *testing.T) {
			blobs := map[string]string{digest.FromString(config).String(): config, digest.FromString(windows).String(): windows}
			srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
				name := q.URL.Path[strings.LastIndex(q.URL.Path, "/")+1:]
				switch b, ok := blobs[name]; {
				case q.URL.Path == "/v2/":
				case strings.Contains(q.URL.Path, "/manifests/"):
					w.Header().Set("Content-Type", tc.mime)
					fmt.Fprint(w, tc.body)
				case ok:
					fmt.Fprint(w, b)
				default:
					http.Error(w, "no", http.StatusNotFound)
				}
			}))
			defer srv.Close()
			_, err := n.Pull(context.Background(), strings.TrimPrefix(srv.URL, "http://")+"/x:y", nil)
			if !errors.Is(err, tc.want) || (err == nil) != (tc.want == nil) {
				t.Errorf("got %v, want %v", err, tc.want)
			}
		})
	}
}

// TestHostileLayer: an archive that tries to leave its root ends the pull, and no more.
func TestHostileLayer(t *testing.T) {
	n := newNode(t, func(c *Config) { c.MaxLayerBytes, c.MaxLayerEntries = 1<<20, 100 })
	many := make([]registry.File, 101)
	for i := range many {
		many[i].Name = fmt.Sprintf("f%d", i)
	}
	for name, tc := range map[string]struct {
		files []registry.File
		want  error
	}{
		"dotdot": {[]registry.File{{Name: "../../evil"}}, ErrInvalidImage},
		"bomb":   {[]registry.File{{Name: "zeros", Data: make([]byte, 2<<20)}}, ErrTooLarge},
		"many":   {many, ErrTooLarge},
	} {
		n.reg.Push(name, "v1", mustBuild(t, registry.Spec{Layers: []registry.Layer{layerOf(registry.Gzip, tc.files...)}}))
		if _, err := n.Pull(context.Background(), n.reg.Ref(name, "v1"), nil); !errors.Is(err, tc.want) {
			t.Errorf("%s: %v, want %v", name, err, tc.want)
		}
	}
	if kept := n.kept(); len(kept) != 0 {
		t.Errorf("left behind: %q", kept)
	}
}

func TestSingleFlight(t *testing.T) {
	n := newNode(t)
	img := big(t, 1, 2)
	sibling := mustBuild(t, registry.Spec{Config: registry.Config{User: "9"}, Layers: []registry.Layer{
		layerOf(registry.Gzip, registry.File{Name: "f1", Data: noise(3<<20, 1)}), layerOf(registry.Gzip, registry.File{Name: "own"}),
	}})
	n.reg.Push("r", "v1", img)
	n.reg.Push("s", "v1", sibling)
	n.reg.SetFault("r", registry.Fault{Rate: 8 << 20}) // slow enough for all to meet
	n.reg.SetFault("s", registry.Fault{Rate: 8 << 20})
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			repo := "r"
			if i%4 == 0 {
				repo = "s"
			}
			if _, err := n.Pull(context.Background(), n.reg.Ref(repo, "v1"), nil); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	manifests := 0
	for _, r := range n.reg.Requests() {
		if strings.Contains(r, "/r/manifests/") {
			manifests++
		}
	}
	if manifests != 1 {
		t.Errorf("%d manifest requests by callers that should share one pull", manifests)
	}
	// The first layer of both images is one; each other layer is fetched once.
	if got := n.layerGets(img) + n.layerGets(&registry.Image{Layers: sibling.Layers[1:]}); got != 3 {
		t.Errorf("%d layer requests, want 3:\n%s", got, strings.Join(n.reg.Requests(), "\n"))
	}
	if len(n.kept()) != 3 {
		t.Errorf("snapshots %q", n.kept())
	}
}

// TestFlightOfAnother: a pull that waits for the layer of one that is then given up makes
// the layer itself.
func TestFlightOfAnother(t *testing.T) {
	n := newNode(t, func(c *Config) { c.OrphanTimeout = time.Millisecond })
	img := big(t, 1)
	n.reg.Push("slow", "v1", img)
	n.reg.Push("fast", "v1", img)
	n.reg.SetFault("slow", registry.Fault{Rate: 10_000})
	ctx, cancel := context.WithCancel(context.Background())
	first := make(chan error, 1)
	go func() {
		_, err := n.Pull(ctx, n.reg.Ref("slow", "v1"), nil)
		first <- err
	}()
	waitFor(t, "the layer's flight", func() bool { return n.layerGets(img) == 1 })
	second := make(chan error, 1)
	go func() {
		_, err := n.Pull(context.Background(), n.reg.Ref("fast", "v1"), nil)
		second <- err
	}()
	waitFor(t, "the second pull at its layers", func() bool {
		return slices.ContainsFunc(n.Pulls(), func(p PullProgress) bool { return strings.Contains(p.Reference, "fast") && p.Stage == "layers 0/1" })
	})
	cancel()
	err := <-first
	if !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), "layers 0/1") {
		t.Errorf("the caller that gave up: %v", err)
	}
	if err := <-second; err != nil {
		t.Errorf("the other: %v", err)
	}
}

func waitFor(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("no sign of %s", what)
		}
	}
}

func TestPullOutlivesCaller(t *testing.T) {
	n := newNode(t)
	img := big(t, 1)
	n.reg.Push("r", "v1", img)
	n.reg.SetFault("r", registry.Fault{Rate: 6 << 20})
	ctx, cancel := context.WithTimeout(context.Background(), time.Millisecond)
	defer cancel()
	_, err := n.Pull(ctx, n.reg.Ref("r", "v1"), nil)
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("got %v", err)
	}
	n.mustPull(n.reg.Ref("r", "v1"))
	if got := n.layerGets(img); got != 1 {
		t.Errorf("%d layer requests: the second caller did not join", got)
	}
}

func TestGC(t *testing.T) {
	n := newNode(t)
	ctx := context.Background()
	shared := layerOf(registry.Gzip, registry.File{Name: "shared", Data: noise(100, 1)})
	build := func(name string) *registry.Image {
		return mustBuild(t, registry.Spec{Layers: []registry.Layer{shared, layerOf(registry.Gzip, registry.File{Name: name})}})
	}
	n.reg.Push("a", "v1", build("a"))
	n.reg.Push("b", "v1", build("b"))
	a, b := n.mustPull(n.reg.Ref("a", "v1")), n.mustPull(n.reg.Ref("b", "v1"))
	if len(n.kept()) != 3 {
		t.Fatalf("snapshots %q, want 3", n.kept())
	}
	if _, err := n.sn.Prepare(ctx, "container", b.ChainID); err != nil {
		t.Fatal(err)
	}
	if err := n.Remove(ctx, a.ID); err != nil {
		t.Fatal(err)
	}
	if slices.Contains(n.kept(), a.ChainID) || len(n.kept()) != 3 {
		t.Errorf("after removing a: %q", n.kept())
	}
	used := map[string]bool{b.ID: true}
	n.SetInUse(func() map[string]bool { return used })
	if err := n.Remove(ctx, b.ID); err != nil {
		t.Fatal(err)
	}
	if _, err := n.Get(b.ID); !errors.Is(err, ErrNotFound) || len(n.List()) != 0 {
		t.Errorf("image removed while in use is visible: %v", err)
	}
	if err := n.sn.Remove(ctx, "container"); err != nil { // between two attempts of a container
		t.Fatal(err)
	}
	if err := n.GC(ctx); err != nil || len(n.kept()) != 2 {
		t.Errorf("layers of an image in use: %q, %v", n.kept(), err)
	}
	if again := n.mustPull(n.reg.Ref("b", "v1")); again.ID != b.ID || len(again.RepoTags) != 1 {
		t.Errorf("pulled again: %+v", again)
	}
	if err := n.Remove(ctx, b.ID); err != nil {
		t.Fatal(err)
	}
	used = nil
	if err := n.GC(ctx); err != nil || len(n.kept()) != 0 {
		t.Errorf("left in the end: %q, %v", n.kept(), err)
	}
	if u, err := n.FsUsage(); err != nil || u.Bytes != 0 || u.Inodes != 0 {
		t.Errorf("usage in the end: %+v, %v", u, err)
	}
}

// stubborn is a snapshotter that refuses to remove the first few times.
type stubborn struct {
	snapshotter.Snapshotter
	refuse atomic.Int32
}

func (s *stubborn) Remove(ctx context.Context, key string) error {
	if s.refuse.Add(-1) >= 0 {
		return errors.New("input/output error")
	}
	return s.Snapshotter.Remove(ctx, key)
}

// TestGCTriesAgain: a layer that could not be removed goes a little later, with
// nobody asking for it.
func TestGCTriesAgain(t *testing.T) {
	defer func(d time.Duration) { gcPause = d }(gcPause)
	gcPause = 10 * time.Millisecond
	n := newNode(t)
	s := &stubborn{Snapshotter: n.sn}
	n.Service.sn = s
	n.reg.Push("a", "v1", sample(t, "x"))
	img := n.mustPull(n.reg.Ref("a", "v1"))
	s.refuse.Store(3)
	if err := n.Remove(context.Background(), img.ID); err != nil {
		t.Fatal(err)
	}
	if len(n.kept()) == 0 {
		t.Fatal("the snapshotter has not refused")
	}
	waitFor(t, "the layers' end", func() bool {
		dirs, err := os.ReadDir(filepath.Join(n.dir, "state", "layers"))
		return err == nil && len(dirs) == 0
	})
	n.Service.mu.Lock()
	defer n.Service.mu.Unlock()
	if n.retrying {
		t.Error("still trying")
	}
}

// TestRestart: what a killed process left is gone, what was complete is there.
func TestRestart(t *testing.T) {
	n := newNode(t)
	ctx := context.Background()
	n.reg.Push("a", "v1", sample(t, "one"))
	n.reg.Push("b", "v1", sample(t, "two"))
	a, b := n.mustPull(n.reg.Ref("a", "v1")), n.mustPull(n.reg.Ref("b", "v1"))
	whole := n.kept()
	// As after a kill in the middle of a pull: an extraction, and layers without image, one
	// of which a container somehow uses.
	for _, key := range []string{extractPrefix + "1-1", extractPrefix + "1-2", "tmp"} {
		if _, err := n.sn.Prepare(ctx, key, ""); err != nil {
			t.Fatal(err)
		}
	}
	orphan, usedOrphan := digest.FromString("orphan").String(), digest.FromString("used").String()
	if err := n.sn.Commit(ctx, orphan, extractPrefix+"1-2", snapshotter.WithParent(a.ChainID)); err != nil {
		t.Fatal(err)
	}
	if err := n.sn.Commit(ctx, usedOrphan, "tmp"); err != nil {
		t.Fatal(err)
	}
	if _, err := n.sn.Prepare(ctx, "container", usedOrphan); err != nil {
		t.Fatal(err)
	}
	n.close()
	n.open()
	want := append(slices.Clone(whole), "container", usedOrphan)
	slices.Sort(want)
	if got := n.kept(); !slices.Equal(got, want) {
		t.Errorf("kept %q\nwant %q", got, want)
	}
	for _, img := range []Image{a, b} {
		got, err := n.Get(img.ID)
		if err != nil || !slices.Equal(got.RepoTags, img.RepoTags) || !got.Pulled.Equal(img.Pulled) || got.Size != img.Size ||
			got.ChainID != img.ChainID || got.Config.User != img.Config.User {
			t.Errorf("after restart %+v\nwant %+v, %v", got, img, err)
		}
	}
	// An image of which a layer is gone must not look as if it were there.
	n.Service.Close()
	if err := n.sn.Remove(ctx, b.ChainID); err != nil {
		t.Fatal(err)
	}
	n.start()
	if _, err := n.Get(b.ID); !errors.Is(err, ErrNotFound) {
		t.Errorf("image without its layer: %v", err)
	}
	if again := n.mustPull(n.reg.Ref("b", "v1")); again.ID != b.ID {
		t.Errorf("pulled again: %+v", again)
	}
}

func TestClose(t *testing.T) {
	n := newNode(t)
	n.reg.Push("r", "v1", big(t, 1))
	n.reg.SetFault("r", registry.Fault{Hang: true})
	got := make(chan error, 1)
	go func() {
		_, err := n.Pull(context.Background(), n.reg.Ref("r", "v1"), nil)
		got <- err
	}()
	waitFor(t, "the pull", func() bool { return len(n.Pulls()) == 1 && n.Pulls()[0].Stage == "layers 0/1" })
	n.Service.Close()
	if err := <-got; !errors.Is(err, ErrClosed) {
		t.Errorf("pull: %v", err)
	}
	if kept := n.kept(); len(kept) != 0 {
		t.Errorf("left behind: %q", kept)
	}
	if _, err := n.Pull(context.Background(), n.reg.Ref("r", "v1"), nil); !errors.Is(err, ErrClosed) {
		t.Errorf("pull after Close: %v", err)
	}
}

func TestUnmarshalConfigKeepsKeys(t *testing.T) {
	var c configFile
	in := `{"config":{"User":"u","Entrypoint":["a"],"ExposedPorts":{"80/tcp":{}},"Labels":{"k":"v"},"StopSignal":"SIGINT","Volumes":{"/v":{}}}}`
	if err := json.Unmarshal([]byte(in), &c); err != nil {
		t.Fatal(err)
	}
	got := ImageConfig(c.Config)
	if got.User != "u" || len(got.Entrypoint) != 1 || len(got.ExposedPorts) != 1 || got.Labels["k"] != "v" || got.StopSignal != "SIGINT" || len(got.Volumes) != 1 {
		t.Errorf("got %+v", got)
	}
}
