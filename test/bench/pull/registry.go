package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// registry serves a corpus, as much of the distribution protocol as a pull needs.
type registry struct {
	server    *http.Server
	address   string
	dir       string
	manifests map[string][]byte // by "<image>/<tag or digest>"
	configs   map[string][]byte // by digest
}

// serve begins to listen at address, or at any free port of the loopback address.
func serve(c *corpus, address string) (*registry, error) {
	if address == "" {
		address = "127.0.0.1:0"
	}
	l, err := net.Listen("tcp", address)
	if err != nil {
		return nil, err
	}
	r := &registry{address: l.Addr().String(), dir: c.dir, manifests: map[string][]byte{}, configs: map[string][]byte{}}
	for _, img := range c.Images {
		r.manifests[img.Name+"/latest"] = img.Manifest
		r.manifests[img.Name+"/"+digestOf(img.Manifest)] = img.Manifest
		r.configs[digestOf(img.Config)] = img.Config
	}
	r.server = &http.Server{Handler: r, ReadHeaderTimeout: time.Minute}
	go r.server.Serve(l)
	return r, nil
}

func digestOf(b []byte) string {
	sum := sha256.Sum256(b)
	return "sha256:" + hex.EncodeToString(sum[:])
}

func (r *registry) ref(image string) string { return r.address + "/bench/" + image + ":latest" }

func (r *registry) close() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	r.server.Shutdown(ctx)
	r.server.Close()
}

// ServeHTTP implements http.Handler.
func (r *registry) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	rest, ok := strings.CutPrefix(req.URL.Path, "/v2/")
	if !ok || rest == "" {
		return
	}
	rest = strings.TrimPrefix(rest, "bench/")
	image, kind, _ := strings.Cut(rest, "/")
	kind, name, _ := strings.Cut(kind, "/")
	switch kind {
	case "manifests":
		b := r.manifests[image+"/"+name]
		if b == nil {
			http.NotFound(w, req)
			return
		}
		w.Header().Set("Docker-Content-Digest", digestOf(b))
		w.Header().Set("Content-Type", mediaManifest)
		http.ServeContent(w, req, "", time.Time{}, bytes.NewReader(b))
	case "blobs":
		w.Header().Set("Content-Type", "application/octet-stream")
		w.Header().Set("Docker-Content-Digest", name)
		if b := r.configs[name]; b != nil {
			http.ServeContent(w, req, "", time.Time{}, bytes.NewReader(b))
			return
		}
		f, err := os.Open(filepath.Join(r.dir, filepath.Base(strings.TrimPrefix(name, "sha256:"))))
		if err != nil {
			http.NotFound(w, req)
			return
		}
		defer f.Close()
		http.ServeContent(w, req, "", time.Time{}, f)
	default:
		http.NotFound(w, req)
	}
}
