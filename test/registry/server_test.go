package registry

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
)

func mustBuild(t *testing.T, spec Spec) *Image {
	t.Helper()
	img, err := Build(spec)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

func mustStart(t *testing.T) *Server {
	t.Helper()
	s, err := Start()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func get(t *testing.T, url string, header ...string) (int, []byte, error) {
	t.Helper()
	q, err := http.NewRequest(http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i+1 < len(header); i += 2 {
		q.Header.Set(header[i], header[i+1])
	}
	c := http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	r, err := c.Do(q)
	if err != nil {
		return 0, nil, err
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	return r.StatusCode, b, err
}

func TestBuildIsStableAndWhole(t *testing.T) {
	spec := Spec{Layers: []Layer{
		{Files: []File{{Name: "d/"}, {Name: "d/f", Data: []byte("one")}}, Compression: Gzip},
		{Files: []File{Whiteout("d/f"), Opaque("d")}, Compression: Zstd},
		{Files: []File{{Name: "l", Type: tar.TypeSymlink, Link: "d"}}},
	}, Config: Config{User: "7"}}
	img, again := mustBuild(t, spec), mustBuild(t, spec)
	if img.Digest != again.Digest {
		t.Errorf("digests of two builds: %s, %s", img.Digest, again.Digest)
	}
	names := [][]string{{"d/", "d/f"}, {"d/.wh.f", "d/.wh..wh..opq"}, {"l"}}
	for i, l := range img.Layers {
		r := io.Reader(bytes.NewReader(img.blobs[l.Digest]))
		var err error
		switch spec.Layers[i].Compression {
		case Gzip:
			r, err = gzip.NewReader(r)
		case Zstd:
			r, err = zstd.NewReader(r)
		}
		if err != nil {
			t.Fatal(err)
		}
		tr := tar.NewReader(r)
		for _, want := range names[i] {
			h, err := tr.Next()
			if err != nil || h.Name != want {
				t.Fatalf("layer %d: got %v, %v, want %s", i, h, err, want)
			}
		}
	}
	var config struct{ Config Config }
	if err := json.Unmarshal(img.blobs[img.ConfigID], &config); err != nil || config.Config.User != "7" {
		t.Errorf("config: %+v, %v", config, err)
	}
}

func TestServe(t *testing.T) {
	s := mustStart(t)
	img := mustBuild(t, Spec{Layers: []Layer{{Files: []File{{Name: "f", Data: []byte("hello")}}}}})
	index, err := NewIndex(img)
	if err != nil {
		t.Fatal(err)
	}
	s.Push("a/b", "1", index)
	base := "http://" + s.Addr() + "/v2/a/b/"
	layer := img.Layers[0]

	for _, c := range []struct {
		name, url string
		header    []string
		status    int
		want      []byte
	}{
		{"index by tag", base + "manifests/1", nil, 200, index.Manifest},
		{"index by digest", base + "manifests/" + index.Digest, nil, 200, index.Manifest},
		{"child by digest", base + "manifests/" + img.Digest, nil, 200, img.Manifest},
		{"layer", base + "blobs/" + layer.Digest, nil, 200, img.blobs[layer.Digest]},
		{"part of a layer", base + "blobs/" + layer.Digest, []string{"Range", "bytes=9-"}, 206, img.blobs[layer.Digest][9:]},
		{"unknown tag", base + "manifests/2", nil, 404, nil},
		{"unknown repository", "http://" + s.Addr() + "/v2/c/manifests/1", nil, 404, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			status, body, err := get(t, c.url, c.header...)
			if err != nil || status != c.status || c.want != nil && !bytes.Equal(body, c.want) {
				t.Errorf("got %d, %q, %v; want %d, %q", status, body, err, c.status, c.want)
			}
		})
	}
}

func TestFaults(t *testing.T) {
	s := mustStart(t)
	img := mustBuild(t, Spec{Layers: []Layer{{Files: []File{{Name: "f", Data: []byte("hello")}}}}})
	s.Push("r", "1", img)
	manifest := "http://" + s.Addr() + "/v2/r/manifests/1"
	layer := "http://" + s.Addr() + "/v2/r/blobs/" + img.Layers[0].Digest

	s.SetFault("r", Fault{WrongBlob: true})
	if _, b, err := get(t, layer); err != nil || digest(b) == img.Layers[0].Digest || int64(len(b)) != img.Layers[0].Size {
		t.Errorf("wrong blob: %d bytes, digest right: %v, %v", len(b), digest(b) == img.Layers[0].Digest, err)
	}
	s.SetFault("r", Fault{DropAfter: 10, DropTimes: 1})
	if _, b, err := get(t, layer); err == nil || len(b) != 10 {
		t.Errorf("dropped: %d bytes, %v; want 10 and an error", len(b), err)
	}
	if _, b, err := get(t, layer); err != nil || digest(b) != img.Layers[0].Digest {
		t.Errorf("after the one drop: %d bytes, %v", len(b), err)
	}
	s.SetFault("r", Fault{Status: 503})
	if status, _, _ := get(t, manifest); status != 503 {
		t.Errorf("status %d, want 503", status)
	}
	s.SetFault("r", Fault{Username: "u", Password: "p"})
	if status, _, _ := get(t, manifest); status != 401 {
		t.Errorf("without a password: status %d, want 401", status)
	}
	if status, _, _ := get(t, manifest, "Authorization", "Basic "+BasicAuth("u", "p")); status != 200 {
		t.Errorf("with the password: status %d, want 200", status)
	}
	s.SetFault("r", Fault{Username: "u", Password: "p", Token: "tok"})
	token := "http://" + s.Addr() + "/token?scope=repository:r:pull"
	if status, _, _ := get(t, token); status != 401 {
		t.Errorf("token without a password: status %d, want 401", status)
	}
	if _, b, _ := get(t, token, "Authorization", "Basic "+BasicAuth("u", "p")); !strings.Contains(string(b), `"tok"`) {
		t.Errorf("token: got %s", b)
	}
	if status, _, _ := get(t, manifest, "Authorization", "Bearer tok"); status != 200 {
		t.Errorf("with the token: status %d, want 200", status)
	}
	s.SetFault("r", Fault{Rate: 10 * img.Layers[0].Size / 2})
	begin := time.Now()
	if _, b, err := get(t, layer); err != nil || digest(b) != img.Layers[0].Digest || time.Since(begin) < 50*time.Millisecond {
		t.Errorf("slow: %d bytes, %v, after %v", len(b), err, time.Since(begin))
	}
}
