package imageservice

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/berthd/berth/snapshotter"
	"github.com/berthd/berth/snapshotter/overlay"
	"github.com/berthd/berth/store"
	"github.com/berthd/berth/test/registry"
)

// node is an image service with a book, a snapshotter and a registry of its own.
type node struct {
	*Service
	t    *testing.T
	dir  string
	book *store.Store
	sn   *overlay.Snapshotter
	reg  *registry.Server
}

func newNode(t *testing.T, change ...func(*Config)) *node {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: layers have owners, devices and trusted.* attributes")
	}
	reg, err := registry.Start()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { reg.Close() })
	n := &node{t: t, dir: t.TempDir(), reg: reg}
	n.open(change...)
	t.Cleanup(n.close)
	return n
}

func (n *node) open(change ...func(*Config)) {
	n.t.Helper()
	var err error
	if n.book, err = store.Open(filepath.Join(n.dir, "book.db")); err != nil {
		n.t.Fatal(err)
	}
	if n.sn, err = overlay.New(filepath.Join(n.dir, "state"), n.book); err != nil {
		n.t.Fatal(err)
	}
	n.start(change...)
}

// start makes the service on the open book; config files of the host must not matter.
func (n *node) start(change ...func(*Config)) {
	n.t.Helper()
	cfg := Config{
		LayersDir: filepath.Join(n.dir, "state", "layers"), ManifestsDir: filepath.Join(n.dir, "state", "manifests"),
		RegistriesConf:    n.mustWrite("registries.conf", ""),
		RegistriesConfDir: n.mustMkdir("registries.conf.d"), RegistriesDir: n.mustMkdir("registries.d"),
		CertsDir: n.mustMkdir("certs.d"), HostsDir: n.mustMkdir("hosts.d"), AuthFile: filepath.Join(n.dir, "auth.json"),
		PolicyPath: n.mustWrite("policy.json", `{"default":[{"type":"insecureAcceptAnything"}]}`),
	}
	for _, c := range change {
		c(&cfg)
	}
	var err error
	if n.Service, err = New(context.Background(), cfg, n.book, n.sn); err != nil {
		n.t.Fatal(err)
	}
}

func (n *node) close() {
	if n.book == nil {
		return // an open that failed
	}
	n.Service.Close()
	n.sn.Close()
	n.book.Close()
}

func (n *node) mustWrite(name, text string) string {
	n.t.Helper()
	p := filepath.Join(n.dir, name)
	if _, err := os.Stat(p); err == nil && text == "" {
		return p
	}
	if err := os.WriteFile(p, []byte(text), 0o600); err != nil {
		n.t.Fatal(err)
	}
	return p
}

func (n *node) mustMkdir(name string) string {
	n.t.Helper()
	p := filepath.Join(n.dir, name)
	if err := os.MkdirAll(p, 0o700); err != nil {
		n.t.Fatal(err)
	}
	return p
}

func (n *node) mustPull(ref string) Image {
	n.t.Helper()
	img, err := n.Pull(context.Background(), ref, nil)
	if err != nil {
		n.t.Fatalf("pull %s: %v", ref, err)
	}
	return img
}

// kept lists the snapshots, which tell what is on disk.
func (n *node) kept() []string {
	n.t.Helper()
	var out []string
	err := n.sn.Walk(context.Background(), func(_ context.Context, i snapshotter.Info) error {
		out = append(out, i.Name)
		return nil
	})
	if err != nil {
		n.t.Fatal(err)
	}
	slices.Sort(out)
	// Those of removed ones go in the background.
	waitFor(n.t, "no more layer directories than snapshots", func() bool {
		dirs, err := os.ReadDir(filepath.Join(n.dir, "state", "layers"))
		return err == nil && len(dirs) <= len(out)
	})
	return out
}

// blobGets counts the requests for blobs, configs left out.
func (n *node) layerGets(images ...*registry.Image) int {
	count := 0
	for _, img := range images {
		for _, l := range img.Layers {
			for _, r := range n.reg.Requests() {
				if strings.HasPrefix(r, "GET") && strings.HasSuffix(r, "/blobs/"+l.Digest) {
					count++
				}
			}
		}
	}
	return count
}

func mustBuild(t *testing.T, spec registry.Spec) *registry.Image {
	t.Helper()
	img, err := registry.Build(spec)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

func layerOf(c registry.Compression, files ...registry.File) registry.Layer {
	return registry.Layer{Files: files, Compression: c}
}

// noise does not compress and differs by seed.
func noise(n int, seed byte) []byte {
	b := make([]byte, n)
	x := uint32(seed) + 1
	for i := range b {
		x ^= x << 13
		x ^= x >> 17
		x ^= x << 5
		b[i] = byte(x)
	}
	return b
}

func sample(t *testing.T, text string) *registry.Image {
	return mustBuild(t, registry.Spec{
		Config: registry.Config{User: "7:8", Env: []string{"A=b"}, Cmd: []string{"/bin/" + text}, WorkingDir: "/w"},
		Layers: []registry.Layer{
			layerOf(registry.Gzip, registry.File{Name: "tmp/", Mode: 0o1777}, registry.File{Name: "base", Data: []byte("base")}, registry.File{Name: "gone"}),
			layerOf(registry.Zstd, registry.File{Name: "tmp/x", Data: []byte(text)}, registry.Whiteout("gone")),
			layerOf(registry.Plain, registry.File{Name: "own", UID: 7, GID: 8, Mode: 0o4755, Data: []byte(text)}),
		},
	})
}

// readIn reads a file of the image as a container would see it.
func (n *node) readIn(img Image, name string) (string, os.FileInfo, error) {
	n.t.Helper()
	ctx := context.Background()
	mounts, err := n.sn.View(ctx, "read", img.ChainID)
	if err != nil {
		n.t.Fatal(err)
	}
	defer n.sn.Remove(ctx, "read")
	root, err := snapshotter.OpenRoot(mounts)
	if err != nil {
		n.t.Fatal(err)
	}
	defer root.Close()
	p := fmt.Sprintf("/proc/self/fd/%d/%s", root.Fd(), name)
	st, err := os.Stat(p)
	if err != nil || st.IsDir() {
		return "", st, err
	}
	b, err := os.ReadFile(p)
	return string(b), st, err
}

func TestPullTag(t *testing.T) {
	n := newNode(t)
	src := sample(t, "one")
	n.reg.Push("a/b", "v1", src)
	img := n.mustPull(n.reg.Ref("a/b", "v1"))
	if img.ID != src.ConfigID || !slices.Equal(img.RepoTags, []string{n.reg.Ref("a/b", "v1")}) ||
		!slices.Equal(img.RepoDigests, []string{n.reg.Ref("a/b", src.Digest)}) {
		t.Errorf("image %+v", img)
	}
	if img.Config.User != "7:8" || !slices.Equal(img.Config.Cmd, []string{"/bin/one"}) || img.Config.WorkingDir != "/w" ||
		img.Architecture != runtime.GOARCH || img.OS != "linux" || img.Size == 0 || img.Created.IsZero() {
		t.Errorf("config %+v", img)
	}
	for name, want := range map[string]string{"base": "base", "tmp/x": "one", "own": "one"} {
		if got, _, err := n.readIn(img, name); err != nil || got != want {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
	if _, _, err := n.readIn(img, "gone"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("whited out file: %v", err)
	}
	if _, st, _ := n.readIn(img, "own"); st.Mode() != 0o755|os.ModeSetuid {
		t.Errorf("mode of own: %s", st.Mode())
	}
	// The second layer uses /tmp without listing it.
	if _, st, _ := n.readIn(img, "tmp"); st.Mode() != os.ModeDir|os.ModeSticky|0o777 {
		t.Errorf("mode of /tmp: %s", st.Mode())
	}
	u, err := n.FsUsage()
	if err != nil || u.Bytes != img.Size || u.Inodes == 0 || u.Mountpoint == "" || time.Since(u.At) > time.Minute {
		t.Errorf("usage %+v of size %d, %v", u, img.Size, err)
	}
	before := len(n.reg.Requests())
	if again := n.mustPull(n.reg.Ref("a/b", "v1")); !slices.Equal(again.RepoTags, img.RepoTags) || !again.Pulled.Equal(img.Pulled) {
		t.Errorf("again: %+v", again)
	}
	if got := n.layerGets(src); got != 3 {
		t.Errorf("%d layer requests of %d after a second pull, want 3", got, len(n.reg.Requests())-before)
	}
	if len(n.kept()) != 3 {
		t.Errorf("snapshots %q", n.kept())
	}
}

func TestPullNames(t *testing.T) {
	n := newNode(t)
	one, two := sample(t, "one"), sample(t, "two")
	n.reg.Push("r", "x", one)
	n.reg.Push("r", "latest", one)
	n.reg.Push("other/r", "y", one)

	byDigest := n.mustPull(n.reg.Ref("r", one.Digest))
	if len(byDigest.RepoTags) != 0 || !slices.Equal(byDigest.RepoDigests, []string{n.reg.Ref("r", one.Digest)}) {
		t.Errorf("by digest: tags %q, digests %q", byDigest.RepoTags, byDigest.RepoDigests)
	}
	both := n.mustPull(n.reg.Ref("r", "x") + "@" + one.Digest)
	if len(both.RepoTags) != 0 {
		t.Errorf("by tag and digest: tags %q, want none: the tag was not asked for", both.RepoTags)
	}
	n.mustPull(n.reg.Ref("r", "x"))
	n.mustPull(n.reg.Addr() + "/r")
	img := n.mustPull(n.reg.Ref("other/r", "y"))
	if want := []string{n.reg.Ref("other/r", "y"), n.reg.Ref("r", "latest"), n.reg.Ref("r", "x")}; !slices.Equal(img.RepoTags, want) {
		t.Errorf("tags %q, want %q", img.RepoTags, want)
	}
	if want := []string{n.reg.Ref("other/r", one.Digest), n.reg.Ref("r", one.Digest)}; !slices.Equal(img.RepoDigests, want) {
		t.Errorf("digests %q, want %q", img.RepoDigests, want)
	}
	for _, ref := range []string{
		img.ID, img.ID[7:], img.ID[:7+12], img.ID[7 : 7+13], n.reg.Ref("r", "x"), n.reg.Addr() + "/r", n.reg.Ref("r", one.Digest),
		n.reg.Ref("r", "nosuchtag") + "@" + one.Digest,
	} {
		if got, err := n.Get(ref); err != nil || got.ID != img.ID {
			t.Errorf("get %s: %v, %v", ref, got.ID, err)
		}
	}
	for ref, want := range map[string]error{
		n.reg.Ref("r", "z"): ErrNotFound, "sha256:" + strings.Repeat("0", 64): ErrNotFound, strings.Repeat("0", 20): ErrNotFound,
		img.ID[7 : 7+11]: ErrNotFound, "": ErrInvalidReference, "UPPER": ErrInvalidReference, "a b": ErrInvalidReference,
	} {
		if _, err := n.Get(ref); !errors.Is(err, want) || ref != "" && !strings.Contains(err.Error(), ref) {
			t.Errorf("get %q: %v, want %v", ref, err, want)
		}
	}
	// A tag that moved belongs to the new image only.
	n.reg.Push("r", "x", two)
	moved := n.mustPull(n.reg.Ref("r", "x"))
	old, err := n.Get(img.ID)
	if err != nil || slices.Contains(old.RepoTags, n.reg.Ref("r", "x")) || !slices.Equal(moved.RepoTags, []string{n.reg.Ref("r", "x")}) {
		t.Errorf("after the tag moved: old %q, new %q, %v", old.RepoTags, moved.RepoTags, err)
	}
	if l := n.List(); len(l) != 2 {
		t.Errorf("%d images, want 2", len(l))
	}
	// By its ID, with all names; for others see TestRemoveNames.
	if err := n.Remove(context.Background(), img.ID); err != nil {
		t.Fatal(err)
	}
	for _, ref := range append(img.RepoTags, img.ID) {
		if ref == n.reg.Ref("r", "x") {
			continue
		}
		if _, err := n.Get(ref); !errors.Is(err, ErrNotFound) {
			t.Errorf("get %s after removal: %v", ref, err)
		}
	}
	if err := n.Remove(context.Background(), img.ID); !errors.Is(err, ErrNotFound) {
		t.Errorf("removed twice: %v", err)
	}
}

func TestPullIndex(t *testing.T) {
	n := newNode(t, func(c *Config) { c.Architecture = "arm64" })
	arm := mustBuild(t, registry.Spec{Architecture: "arm64", Layers: []registry.Layer{layerOf(registry.Gzip, registry.File{Name: "arm"})}})
	amd := mustBuild(t, registry.Spec{Architecture: "amd64", Layers: []registry.Layer{layerOf(registry.Gzip, registry.File{Name: "amd"})}})
	other := mustBuild(t, registry.Spec{Architecture: "s390x"})
	index := mustIndex(t, amd, arm)
	n.reg.Push("multi", "v1", index)
	n.reg.Push("multi", "none", mustIndex(t, amd, other))
	img := n.mustPull(n.reg.Ref("multi", "v1"))
	if img.ID != arm.ConfigID || img.Architecture != "arm64" || !slices.Equal(img.RepoDigests, []string{n.reg.Ref("multi", index.Digest)}) {
		t.Errorf("image %+v, want config %s under the digest of the index", img, arm.ConfigID)
	}
	if _, err := n.Get(n.reg.Ref("multi", index.Digest)); err != nil {
		t.Error(err)
	}
	if got := n.layerGets(amd); got != 0 {
		t.Errorf("%d layers of the other platform fetched", got)
	}
	_, err := n.Pull(context.Background(), n.reg.Ref("multi", "none"), nil)
	if !errors.Is(err, ErrUnsupported) || !strings.Contains(err.Error(), "linux/arm64") {
		t.Errorf("no such platform: %v", err)
	}
}

// TestPlatforms: which manifest of an index is the node's, by variant.
func TestPlatforms(t *testing.T) {
	of := func(arch, variant string) *registry.Image {
		return mustBuild(t, registry.Spec{Architecture: arch, Variant: variant, Config: registry.Config{User: arch + variant}})
	}
	for _, tc := range []struct {
		arch, variant string
		index         []string // "arch/variant"
		want          string
	}{
		{"amd64", "", []string{"amd64/v3", "amd64/", "arm64/v8"}, "amd64/"},
		{"amd64", "", []string{"arm64/", "amd64/v1"}, "amd64/v1"},
		{"amd64", "v3", []string{"amd64/", "amd64/v2", "amd64/v3", "amd64/v4"}, "amd64/v3"},
		{"amd64", "v3", []string{"amd64/v4", "amd64/v2"}, "amd64/v2"},
		{"amd64", "v2", []string{"amd64/v4", "amd64/v3"}, ""},
		{"arm64", "", []string{"arm/v7", "arm64/v8"}, "arm64/v8"},
		{"arm", "v7", []string{"arm/v5", "arm/v6", "arm/v8", "amd64/"}, "arm/v6"},
		{"arm", "v6", []string{"arm/v7", "arm64/v8"}, ""},
		{"riscv64", "", []string{"amd64/", "riscv64/"}, "riscv64/"},
		{"riscv64", "", []string{"unknown/"}, ""},
	} {
		n := newNode(t, func(c *Config) { c.Architecture, c.Variant = tc.arch, tc.variant })
		var all []*registry.Image
		want := ""
		for _, p := range tc.index {
			arch, variant, _ := strings.Cut(p, "/")
			all = append(all, of(arch, variant))
			if p == tc.want {
				want = all[len(all)-1].ConfigID
			}
		}
		n.reg.Push("r", "v1", mustIndex(t, all...))
		img, err := n.Pull(context.Background(), n.reg.Ref("r", "v1"), nil)
		if img.ID != want || (err == nil) != (want != "") || err != nil && !errors.Is(err, ErrUnsupported) {
			t.Errorf("%s/%s of %q: user %q, %v; want %q", tc.arch, tc.variant, tc.index, img.Config.User, err, tc.want)
		}
	}
}

// TestNestedIndex: an index may point to another, but not for ever.
func TestNestedIndex(t *testing.T) {
	n := newNode(t)
	img := sample(t, "x")
	deep := img
	for i := range maxIndexDepth + 1 {
		deep = mustIndex(t, deep)
		n.reg.Push("r", fmt.Sprintf("v%d", i+1), deep)
	}
	for i := range maxIndexDepth {
		if got := n.mustPull(n.reg.Ref("r", fmt.Sprintf("v%d", i+1))); got.ID != img.ConfigID {
			t.Errorf("depth %d: %s", i+1, got.ID)
		}
	}
	if _, err := n.Pull(context.Background(), n.reg.Ref("r", fmt.Sprintf("v%d", maxIndexDepth+1)), nil); !errors.Is(err, ErrUnsupported) {
		t.Errorf("too deep: %v", err)
	}
}

func mustIndex(t *testing.T, images ...*registry.Image) *registry.Image {
	t.Helper()
	index, err := registry.NewIndex(images...)
	if err != nil {
		t.Fatal(err)
	}
	return index
}

func TestPinned(t *testing.T) {
	n := newNode(t)
	n.reg.Push("infra/tool", "v1", sample(t, "one"))
	ref := n.reg.Ref("infra/tool", "v1")
	if img := n.mustPull(ref); img.Pinned {
		t.Error("pinned without being asked to")
	}
	for pattern, want := range map[string]bool{ref: true, n.reg.Addr() + "/infra/*": true, n.reg.Addr() + "/*": false, "other": false} {
		if err := n.SetPinned([]string{pattern}); err != nil {
			t.Fatal(err)
		}
		if img, err := n.Get(ref); err != nil || img.Pinned != want {
			t.Errorf("pattern %s: pinned %v, want %v, %v", pattern, img.Pinned, want, err)
		}
	}
	if err := n.SetPinned([]string{"[a"}); err == nil {
		t.Error("malformed pattern accepted")
	}
}

func TestRegistriesConf(t *testing.T) {
	n := newNode(t)
	n.reg.Push("real/app", "v1", sample(t, "one"))
	n.mustWrite("registries.conf", fmt.Sprintf(`
unqualified-search-registries = ["nowhere.invalid", "%[1]s"]
[[registry]]
location = "upstream.invalid"
[[registry.mirror]]
location = "%[1]s/real"
insecure = true
[[registry]]
location = "bad.invalid"
blocked = true
[[registry]]
location = "%[1]s"
insecure = true
`, n.reg.Addr()))
	if err := n.Reload(); err != nil {
		t.Fatal(err)
	}
	img := n.mustPull("upstream.invalid/app:v1")
	if !slices.Equal(img.RepoTags, []string{"upstream.invalid/app:v1"}) {
		t.Errorf("through a mirror: tags %q", img.RepoTags)
	}
	if _, err := n.Pull(context.Background(), "bad.invalid/app", nil); !errors.Is(err, ErrPolicyRejected) {
		t.Errorf("blocked: %v", err)
	}
	if img := n.mustPull("real/app:v1"); !slices.Contains(img.RepoTags, n.reg.Ref("real/app", "v1")) {
		t.Errorf("short name: tags %q", img.RepoTags)
	}
	if _, err := n.Get("real/app:v1"); err != nil {
		t.Errorf("get by short name: %v", err)
	}
	n.mustWrite("registries.conf", "not toml [")
	if err := n.Reload(); err == nil {
		t.Error("broken registries.conf accepted")
	}
}

func TestPolicy(t *testing.T) {
	n := newNode(t)
	n.reg.Push("a", "v1", sample(t, "one"))
	n.mustWrite("policy.json", `{"default":[{"type":"reject"}]}`)
	if err := n.Reload(); err != nil {
		t.Fatal(err)
	}
	_, err := n.Pull(context.Background(), n.reg.Ref("a", "v1"), nil)
	if !errors.Is(err, ErrPolicyRejected) || !strings.Contains(err.Error(), n.reg.Ref("a", "v1")) {
		t.Errorf("got %v", err)
	}
	n.mustWrite("policy.json", `{}`)
	if err := n.Reload(); err == nil {
		t.Error("broken policy accepted")
	}
	if _, err := n.Pull(context.Background(), n.reg.Ref("a", "v1"), nil); !errors.Is(err, ErrPolicyRejected) {
		t.Errorf("after a broken policy the last one should hold: %v", err)
	}
}

func TestAuth(t *testing.T) {
	n := newNode(t)
	n.reg.Push("secret", "v1", sample(t, "one"))
	for _, f := range []registry.Fault{
		{Username: "u", Password: "p:w"},
		{Username: "u", Password: "p:w", Token: "tok"},
	} {
		n.reg.SetFault("secret", f)
		front := httptest.NewServer(challenging(n.reg, f))
		defer front.Close()
		host := strings.TrimPrefix(front.URL, "http://")
		ref := host + "/secret:v1"
		kind := "basic"
		if f.Token != "" {
			kind = "bearer"
		}
		for _, bad := range []*Auth{nil, {Username: "u", Password: "wrong"}, {Username: "u", Password: "p:w", ServerAddress: "https://other.invalid/v1/"}} {
			if _, err := n.Pull(context.Background(), ref, bad); !errors.Is(err, ErrUnauthorized) || !strings.Contains(err.Error(), host) {
				t.Errorf("%s %+v: %v", kind, bad, err)
			}
		}
		for _, good := range []*Auth{
			{Username: "u", Password: "p:w"}, {Auth: "dTpwOnc="}, {Username: "u", Password: "p:w", ServerAddress: "http://" + host + "/v2/"},
		} {
			if _, err := n.Pull(context.Background(), ref, good); err != nil {
				t.Errorf("%s %+v: %v", kind, good, err)
			}
		}
		n.mustWrite("auth.json", fmt.Sprintf(`{"auths":{%q:{"auth":"dTpwOnc="}}}`, host))
		if _, err := n.Pull(context.Background(), ref, nil); err != nil {
			t.Errorf("%s with auth.json: %v", kind, err)
		}
		if f.Token != "" {
			if _, err := n.Pull(context.Background(), ref, &Auth{RegistryToken: "tok"}); err != nil {
				t.Errorf("registry token: %v", err)
			}
		}
	}
}

func TestConfigLimits(t *testing.T) {
	for text, c := range map[string]Config{
		"MaxConcurrentLayers = 65": {MaxConcurrentLayers: 65}, "MaxConfigBytes = 9000000": {MaxConfigBytes: 9000000},
		"StallTimeout = -1s": {StallTimeout: -time.Second}, "PinnedImages \"[\"": {PinnedImages: []string{"["}},
		"UnqualifiedRegistry \"a b\"": {UnqualifiedRegistry: "a b"}, "Gunzip = \"slow\"": {Gunzip: "slow"},
	} {
		if _, err := c.withDefaults(); err == nil || !strings.Contains(err.Error(), text) {
			t.Errorf("got %v, want an error with %q", err, text)
		}
	}
	if _, err := (Config{}).withDefaults(); err != nil {
		t.Errorf("defaults: %v", err)
	}
}

func TestNoiseDiffers(t *testing.T) {
	if bytes.Equal(noise(100, 1), noise(100, 2)) {
		t.Error("layers built from noise would be the same")
	}
}
