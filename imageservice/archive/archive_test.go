package archive

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"

	"github.com/berthd/berth/test/registry"
)

func options(t testing.TB) Options {
	return Options{
		SpoolDir: t.TempDir(), MaxBytes: 16 << 20,
		Choose:  func([]byte, string) (digest.Digest, error) { return "", errors.New("none fits") },
		Matches: func(os, _ string) bool { return os == "linux" },
	}
}

func mustBuild(t testing.TB, text string) *registry.Image {
	t.Helper()
	img, err := registry.Build(registry.Spec{Config: registry.Config{User: text}, Layers: []registry.Layer{
		{Files: []registry.File{{Name: "a", Data: []byte(text)}}}, {Compression: registry.Gzip, Files: []registry.File{{Name: "b"}}}}})
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// mustTar writes a tar archive of files and returns its path.
func mustTar(t testing.TB, files map[string][]byte) string {
	t.Helper()
	var b bytes.Buffer
	if err := registry.Tar(&b, files); err != nil {
		t.Fatal(err)
	}
	return mustWrite(t, b.Bytes())
}

func mustWrite(t testing.TB, b []byte) string {
	t.Helper()
	p := filepath.Join(t.TempDir(), "archive")
	if err := os.WriteFile(p, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return p
}

// readAll opens an archive and reads all that an importer would.
func readAll(t testing.TB, path string, opt Options) ([]Image, error) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	a, err := Open(context.Background(), f, opt, nil)
	if err != nil {
		return nil, err
	}
	defer a.Close()
	return a.Images()
}

func must[T any](v T, err error) func(testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// TestForms: the same images come out of every form of archive.
func TestForms(t *testing.T) {
	one, two := mustBuild(t, "one"), mustBuild(t, "two")
	named := []registry.Named{{Image: one, Names: []string{"h.example/one:1", "h.example/one:2"}}, {Image: two, Names: []string{"h.example/two:1"}}}
	layout := must(registry.Layout(named...))(t)
	saved := must(registry.DockerSave(named...))(t)
	dir := t.TempDir()
	for name, b := range layout {
		p := filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(p), 0o700), os.WriteFile(p, b, 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	var z bytes.Buffer
	gz := gzip.NewWriter(&z)
	if err := errors.Join(registry.Tar(gz, layout), gz.Close()); err != nil {
		t.Fatal(err)
	}
	var zs bytes.Buffer
	zw := must(zstd.NewWriter(&zs))(t)
	if err := errors.Join(registry.Tar(zw, saved), zw.Close()); err != nil {
		t.Fatal(err)
	}
	for name, path := range map[string]string{
		"layout": mustTar(t, layout), "layout, directory": dir, "layout, gzip": mustWrite(t, z.Bytes()),
		"docker": mustTar(t, saved), "docker, zstd": mustWrite(t, zs.Bytes()),
	} {
		f := must(os.Open(path))(t)
		a, err := Open(context.Background(), f, options(t), nil)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		images, err := a.Images()
		if err != nil || len(images) != 2 {
			t.Errorf("%s: %d images, %v", name, len(images), err)
			continue
		}
		for i, img := range images {
			if img.Err != nil || digest.FromBytes(img.Config).String() != named[i].Image.ConfigID || !slices.Equal(img.Names, named[i].Names) {
				t.Errorf("%s: image %d: names %q, %v", name, i, img.Names, img.Err)
			}
			if docker := strings.HasPrefix(name, "docker"); docker == (img.Top.String() == named[i].Image.Digest) {
				t.Errorf("%s: image %d: digest %s", name, i, img.Top)
			}
			for _, l := range named[i].Image.Layers {
				r, size, err := a.Blob(digest.Digest(l.Digest))
				if err != nil {
					t.Errorf("%s: layer: %v", name, err)
					continue
				}
				if b, err := io.ReadAll(r); err != nil || digest.FromBytes(b).String() != l.Digest || size != l.Size {
					t.Errorf("%s: layer of %d bytes, %v", name, len(b), err)
				}
				r.Close()
			}
		}
		if left := must(os.ReadDir(options(t).SpoolDir))(t); len(left) != 0 {
			t.Errorf("%s: spool left: %v", name, left)
		}
		a.Close()
		f.Close()
	}
}

// TestNames: what an index calls an image.
func TestNames(t *testing.T) {
	img := mustBuild(t, "x")
	for _, c := range []struct{ given, name, tag string }{
		{"h.example/a:1", "h.example/a:1", ""}, {"v1", "", "v1"}, {"", "", ""},
	} {
		n := registry.Named{Image: img}
		if c.given != "" {
			n.Names = []string{c.given}
		}
		images, err := readAll(t, mustTar(t, must(registry.Layout(n))(t)), options(t))
		if err != nil || len(images) != 1 || strings.Join(images[0].Names, " ") != c.name || images[0].Tag != c.tag {
			t.Errorf("%q: %+v, %v", c.given, images, err)
		}
	}
}

// tarOf makes an archive of headers whose sizes may be lies.
func tarOf(t testing.TB, headers ...*tar.Header) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range headers {
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(make([]byte, h.Size)); err != nil {
			t.Fatal(err)
		}
	}
	w.Close()
	return b.Bytes()
}

// TestRefused: archives that are no good end in an error that says why.
func TestRefused(t *testing.T) {
	img := mustBuild(t, "x")
	layout := func(change func(map[string][]byte)) []byte {
		files := must(registry.Layout(registry.Named{Image: img}))(t)
		change(files)
		return must(os.ReadFile(mustTar(t, files)))(t)
	}
	saved := func(change func(map[string][]byte)) []byte {
		files := must(registry.DockerSave(registry.Named{Image: img, Names: []string{"a:1"}}))(t)
		change(files)
		return must(os.ReadFile(mustTar(t, files)))(t)
	}
	blob := func(d string) string { return "blobs/" + strings.Replace(d, ":", "/", 1) }
	bomb := new(bytes.Buffer)
	gz := gzip.NewWriter(bomb)
	if _, err := gz.Write(make([]byte, 32<<20)); err != nil {
		t.Fatal(err)
	}
	gz.Close()
	whole := layout(func(map[string][]byte) {})
	for _, c := range []struct {
		name string
		b    []byte
		want error
		text string
	}{
		{"empty", nil, ErrFormat, "no members"},
		{"text", bytes.Repeat([]byte("this is no archive\n"), 100), ErrFormat, "member 1"},
		{"gzip of nothing", []byte{0x1f, 0x8b}, ErrFormat, ""},
		{"bomb", bomb.Bytes(), ErrTooLarge, "more than 16777216 bytes"},
		{"cut off", whole[:len(whole)/2+100], ErrFormat, "member"},
		{"other content", tarOf(t, &tar.Header{Name: "etc/passwd", Size: 10, Mode: 0o600}), ErrFormat, "neither index.json"},
		{"index is a directory", tarOf(t, &tar.Header{Name: "index.json/", Typeflag: tar.TypeDir}), ErrFormat, "neither"},
		{"index links to itself", tarOf(t, &tar.Header{Name: "index.json", Typeflag: tar.TypeSymlink, Linkname: "index.json"}), ErrFormat, "neither"},
		{"index links out", tarOf(t, &tar.Header{Name: "index.json", Typeflag: tar.TypeSymlink, Linkname: "../../etc/passwd"}), ErrFormat, "neither"},
		{"huge index", tarOf(t, &tar.Header{Name: "index.json", Size: maxDocument + 1}), ErrTooLarge, "limit 8388608"},
		{"index not JSON", layout(func(f map[string][]byte) { f["index.json"] = []byte("{") }), ErrFormat, "index.json"},
		{"index of nothing", layout(func(f map[string][]byte) { f["index.json"] = []byte("{}") }), ErrFormat, "lists no image"},
		{"other platform", layout(func(f map[string][]byte) {
			f["index.json"] = bytes.ReplaceAll(f["index.json"], []byte(`"linux"`), []byte(`"plan9"`))
		}), ErrPlatform, "none for this node"},
		{"docker list not JSON", saved(func(f map[string][]byte) { f["manifest.json"] = []byte("[1]") }), ErrFormat, "manifest.json"},
		{"docker list empty", saved(func(f map[string][]byte) { f["manifest.json"] = []byte("[]") }), ErrFormat, "lists no image"},

		{"manifest missing", layout(func(f map[string][]byte) { delete(f, blob(img.Digest)) }), ErrMissing, img.Digest[7:]},
		{"manifest changed", layout(func(f map[string][]byte) { f[blob(img.Digest)] = []byte("{}") }), ErrDigest, img.Digest},
		{"config changed", layout(func(f map[string][]byte) { f[blob(img.ConfigID)] = []byte("{}") }), ErrDigest, "config"},
		{"digest that is a path", layout(func(f map[string][]byte) {
			f["index.json"] = bytes.ReplaceAll(f["index.json"], []byte(img.Digest), []byte("../../etc:passwd"))
		}), ErrFormat, "etc:passwd"},
		{"docker config missing", saved(func(f map[string][]byte) { delete(f, img.ConfigID[7:]+".json") }), ErrMissing, "config"},
		{"docker layer missing", saved(func(f map[string][]byte) { delete(f, img.ConfigID[7:19]+"-1/layer.tar") }), ErrMissing, "layer 2"},
		{"docker layers of another number", saved(func(f map[string][]byte) {
			f["manifest.json"] = bytes.Replace(f["manifest.json"], []byte(`"Layers":[`), []byte(`"Layers":["x",`), 1)
		}), ErrFormat, "3"},
	} {
		images, err := readAll(t, mustWrite(t, c.b), options(t))
		if err == nil && len(images) == 1 {
			err = images[0].Err
		}
		if !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.text) {
			t.Errorf("%s: %v; want %v with %q", c.name, err, c.want, c.text)
		}
	}
}

// TestDirectory: nothing outside a directory is read, and nothing that is no file.
func TestDirectory(t *testing.T) {
	outside := mustWrite(t, []byte(`{"manifests":[]}`))
	dir := t.TempDir()
	if err := os.Symlink(outside, filepath.Join(dir, "index.json")); err != nil {
		t.Fatal(err)
	}
	if _, err := readAll(t, dir, options(t)); !errors.Is(err, ErrFormat) || !strings.Contains(err.Error(), "escapes") {
		t.Errorf("a link out of it: %v", err)
	}
	dir = t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "index.json"), 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := readAll(t, dir, options(t)); !errors.Is(err, ErrFormat) || !strings.Contains(err.Error(), "regular") {
		t.Errorf("a directory for a file: %v", err)
	}
}

// TestLinks: layers that are links to other members, as old archives have them.
func TestLinks(t *testing.T) {
	img := mustBuild(t, "x")
	files := must(registry.DockerSave(registry.Named{Image: img, Names: []string{"a:1"}}))(t)
	layer := img.ConfigID[7:19] + "-0/layer.tar"
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for name, body := range files {
		if name == layer {
			name = "real/layer.tar"
		}
		if err := w.WriteHeader(&tar.Header{Name: "./" + name, Size: int64(len(body)), Mode: 0o600}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(body); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(w.WriteHeader(&tar.Header{Name: layer, Typeflag: tar.TypeSymlink, Linkname: "../real/layer.tar"}), w.Close()); err != nil {
		t.Fatal(err)
	}
	images, err := readAll(t, mustWrite(t, b.Bytes()), options(t))
	if err != nil || images[0].Err != nil {
		t.Fatalf("%v, %v", err, images)
	}
}

// FuzzArchive: whatever the bytes, an archive has images or an error, in bounded memory.
func FuzzArchive(f *testing.F) {
	img := mustBuild(f, "x")
	for _, files := range []map[string][]byte{
		must(registry.Layout(registry.Named{Image: img, Names: []string{"h.example/a:1"}}))(f),
		must(registry.DockerSave(registry.Named{Image: img, Names: []string{"a:1"}}))(f),
	} {
		b, err := os.ReadFile(mustTar(f, files))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		images, err := readAll(t, mustWrite(t, b), options(t))
		if err == nil && len(images) == 0 {
			t.Error("neither images nor an error")
		}
		for _, img := range images {
			if img.Err == nil && (len(img.Manifest) == 0 || len(img.Config) == 0) {
				t.Errorf("half an image: %+v", img)
			}
		}
	})
}
