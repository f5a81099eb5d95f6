package main

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"math/rand"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"time"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

// corpus is what is measured with: images as a registry holds them.
type corpus struct {
	dir    string
	Images []image
}

type image struct {
	Name     string
	Layers   []blob
	Config   []byte
	Manifest []byte
	Unpacked int64 // bytes of the archives
	Files    int
}

type blob struct {
	MediaType string `json:"mediaType"`
	Digest    string `json:"digest"`
	Size      int64  `json:"size"`
	diffID    string
	unpacked  int64
}

// imageNames in the order in which they are measured.
var imageNames = []string{"gzip", "zstd", "tiny", "small", "single"}

const (
	mediaLayer    = "application/vnd.oci.image.layer.v1.tar"
	mediaConfig   = "application/vnd.oci.image.config.v1+json"
	mediaManifest = "application/vnd.oci.image.manifest.v1+json"

	multiLayers  = 8
	multiBytes   = 400 << 20 // of all of them
	tinyLayers   = 60
	smallFiles   = 30_000
	largestFile  = 24 << 20
	corpusFormat = 2
)

// packed are names of what is compressed already. An image may hold some of it; a
// machine's /usr may consist of little else.
var packed = []string{".gz", ".xz", ".zst", ".bz2", ".zip", ".jar", ".jmod", ".whl"}

// epoch is the time of the files that are not copies, so that images are the same every time.
var epoch = time.Unix(1_700_000_000, 0)

// openCorpus reads the images that dir holds and makes those that are missing.
func openCorpus(ctx context.Context, dir, source string, names []string) (*corpus, error) {
	c := &corpus{dir: dir}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("corpus: %w", err)
	}
	for _, name := range names {
		if !slices.Contains(imageNames, name) {
			return nil, fmt.Errorf("image %q: must be one of %q", name, imageNames)
		}
		file := filepath.Join(dir, fmt.Sprintf("%s.v%d.json", name, corpusFormat))
		var img image
		b, err := os.ReadFile(file)
		if err == nil {
			if err := json.Unmarshal(b, &img); err != nil {
				return nil, fmt.Errorf("corpus: %s: %w", file, err)
			}
			c.Images = append(c.Images, img)
			continue
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("corpus: %w", err)
		}
		fmt.Fprintf(os.Stderr, "making image %s\n", name)
		if img, err = c.build(ctx, name, source); err != nil {
			return nil, fmt.Errorf("corpus: image %s: %w", name, err)
		}
		if b, err = json.Marshal(img); err != nil {
			return nil, err
		}
		if err := os.WriteFile(file, b, 0o644); err != nil {
			return nil, fmt.Errorf("corpus: %w", err)
		}
		c.Images = append(c.Images, img)
	}
	return c, nil
}

func (c *corpus) build(ctx context.Context, name, source string) (image, error) {
	src := &files{root: source}
	if err := src.list(); err != nil {
		return image{}, err
	}
	img := image{Name: name}
	layer := func(kind string, fill func(*archive) error) error {
		a, err := c.newArchive(kind)
		if err != nil {
			return err
		}
		if err = fill(a); err == nil {
			err = ctx.Err()
		}
		b, end := a.finish(err == nil)
		img.Layers, img.Unpacked, img.Files = append(img.Layers, b), img.Unpacked+b.unpacked, img.Files+a.entries
		return errors.Join(err, end)
	}
	var err error
	switch name {
	case "gzip", "zstd":
		for i := 0; i < multiLayers && err == nil; i++ {
			err = layer(name, func(a *archive) error { return src.copyInto(a, multiBytes/multiLayers) })
		}
	case "single":
		err = layer("gzip", func(a *archive) error { return src.copyInto(a, multiBytes) })
	case "tiny":
		for i := 0; i < tinyLayers && err == nil; i++ {
			err = layer("gzip", func(a *archive) error { return src.small(a, fmt.Sprintf("layer-%02d", i), 1+i%5, 8<<10) })
		}
	case "small":
		err = layer("gzip", func(a *archive) error { return src.small(a, "opt/small", smallFiles, 12<<10) })
	}
	if err != nil {
		return img, err
	}
	return img, img.describe()
}

// describe makes config and manifest.
func (img *image) describe() error {
	diffIDs := make([]string, len(img.Layers))
	for i, l := range img.Layers {
		diffIDs[i] = l.diffID
	}
	var err error
	img.Config, err = json.Marshal(map[string]any{
		"created": epoch.UTC().Format(time.RFC3339), "architecture": runtime.GOARCH, "os": "linux",
		"config": map[string]any{"Cmd": []string{"/bin/true"}},
		"rootfs": map[string]any{"type": "layers", "diff_ids": diffIDs},
	})
	if err != nil {
		return err
	}
	sum := sha256.Sum256(img.Config)
	img.Manifest, err = json.Marshal(map[string]any{
		"schemaVersion": 2, "mediaType": mediaManifest, "layers": img.Layers,
		"config": blob{MediaType: mediaConfig, Digest: "sha256:" + hex.EncodeToString(sum[:]), Size: int64(len(img.Config))},
	})
	return err
}

// archive is a layer that is being made.
type archive struct {
	file    *os.File
	out     *bufio.Writer
	raw     hash.Hash // of what is stored
	tar     hash.Hash // of the archive in it
	pack    io.WriteCloser
	w       *tar.Writer
	stored  counter
	plain   counter
	kind    string
	entries int
	dir     string
}

type counter int64

func (c *counter) Write(p []byte) (int, error) { *c += counter(len(p)); return len(p), nil }

func (c *corpus) newArchive(kind string) (*archive, error) {
	f, err := os.CreateTemp(c.dir, "layer-*.tmp")
	if err != nil {
		return nil, err
	}
	a := &archive{file: f, out: bufio.NewWriterSize(f, 1<<20), raw: sha256.New(), tar: sha256.New(), kind: kind, dir: c.dir}
	to := io.MultiWriter(a.out, a.raw, &a.stored)
	if kind == "zstd" {
		a.pack, err = zstd.NewWriter(to, zstd.WithEncoderConcurrency(1))
	} else {
		a.pack, err = gzip.NewWriterLevel(to, gzip.DefaultCompression)
	}
	if err != nil {
		return nil, err
	}
	a.w = tar.NewWriter(io.MultiWriter(a.pack, a.tar, &a.plain))
	return a, nil
}

func (a *archive) add(h *tar.Header, body io.Reader) error {
	a.entries++
	if err := a.w.WriteHeader(h); err != nil {
		return err
	}
	if h.Size == 0 {
		return nil
	}
	_, err := io.CopyN(a.w, body, h.Size)
	return err
}

// finish gives the layer the name of its digest, or removes it.
func (a *archive) finish(keep bool) (blob, error) {
	var err error
	if keep {
		err = errors.Join(a.w.Close(), a.pack.Close(), a.out.Flush())
	}
	if err = errors.Join(err, a.file.Close()); err != nil || !keep {
		return blob{}, errors.Join(err, os.Remove(a.file.Name()))
	}
	b := blob{
		MediaType: mediaLayer + "+" + a.kind, Digest: "sha256:" + hex.EncodeToString(a.raw.Sum(nil)), Size: int64(a.stored),
		diffID: "sha256:" + hex.EncodeToString(a.tar.Sum(nil)), unpacked: int64(a.plain),
	}
	return b, os.Rename(a.file.Name(), filepath.Join(a.dir, b.Digest[len("sha256:"):]))
}

// files is what layers are made of: the files of this machine, over and over.
type files struct {
	root  string
	paths []string
	next  int
	lap   int
}

// list finds the files and mixes their order, the same way every time, so that
// layers are alike.
func (f *files) list() error {
	err := filepath.WalkDir(f.root, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			if d != nil && d.IsDir() && p != f.root {
				return fs.SkipDir
			}
			return err
		}
		if t := d.Type(); (t.IsRegular() || t&fs.ModeSymlink != 0) && !slices.Contains(packed, path.Ext(p)) {
			f.paths = append(f.paths, p)
		}
		return nil
	})
	if err != nil {
		return err
	}
	if len(f.paths) == 0 {
		return fmt.Errorf("source %s: no files", f.root)
	}
	// Directories stay whole: an image lists a directory's files one after the other.
	var dirs [][]string
	for _, p := range f.paths {
		if n := len(dirs); n == 0 || filepath.Dir(dirs[n-1][0]) != filepath.Dir(p) {
			dirs = append(dirs, nil)
		}
		dirs[len(dirs)-1] = append(dirs[len(dirs)-1], p)
	}
	rand.New(rand.NewSource(1)).Shuffle(len(dirs), func(i, j int) { dirs[i], dirs[j] = dirs[j], dirs[i] })
	f.paths = slices.Concat(dirs...)
	return nil
}

func (f *files) take() (p string, lap int) {
	if f.next == len(f.paths) {
		f.next, f.lap = 0, f.lap+1
	}
	f.next++
	return f.paths[f.next-1], f.lap
}

// copyInto fills a layer with files and the directories above them. When the
// source has been used up the files come again, under another directory and
// with other contents.
func (f *files) copyInto(a *archive, size int64) error {
	made := map[string]bool{"": true, ".": true, "/": true}
	for int64(a.plain) < size {
		p, lap := f.take()
		fi, err := os.Lstat(p)
		if err != nil || fi.Size() > largestFile {
			continue
		}
		name := path.Join("usr", p[len(f.root):])
		if lap > 0 {
			name = path.Join(fmt.Sprintf("copy-%d", lap), name)
		}
		if err := parents(a, path.Dir(name), made); err != nil {
			return err
		}
		if err := f.copyOne(a, p, name, fi, lap); err != nil {
			return err
		}
	}
	return nil
}

func parents(a *archive, dir string, made map[string]bool) error {
	if made[dir] {
		return nil
	}
	made[dir] = true
	if err := parents(a, path.Dir(dir), made); err != nil {
		return err
	}
	return a.add(&tar.Header{Typeflag: tar.TypeDir, Name: dir + "/", Mode: 0o755, ModTime: epoch}, nil)
}

func (f *files) copyOne(a *archive, from, name string, fi fs.FileInfo, lap int) error {
	h := &tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: int64(fi.Mode().Perm()), ModTime: fi.ModTime().Truncate(time.Second)}
	if fi.Mode()&fs.ModeSymlink != 0 {
		h.Typeflag = tar.TypeSymlink
		var err error
		if h.Linkname, err = os.Readlink(from); err != nil {
			return err
		}
		return a.add(h, nil)
	}
	b, err := os.ReadFile(from)
	if err != nil {
		return nil // unreadable or gone: one file less
	}
	h.Size = int64(len(b))
	if lap > 0 {
		for i := lap % 97; i < len(b); i += 4096 {
			b[i] ^= byte(lap)
		}
	}
	return a.add(h, bytes.NewReader(b))
}

// small fills a layer with n files below dir, of up to most bytes cut out of the source.
func (f *files) small(a *archive, dir string, n, most int) error {
	r := rand.New(rand.NewSource(int64(n)))
	made := map[string]bool{"": true, ".": true, "/": true}
	var text []byte
	for i := range n {
		size := r.Intn(most)
		for len(text) < size {
			p, _ := f.take()
			if fi, err := os.Stat(p); err == nil && fi.Mode().IsRegular() && fi.Size() < 4<<20 {
				b, _ := os.ReadFile(p)
				text = append(text, b...)
			}
		}
		name := path.Join(dir, fmt.Sprintf("d%03d", i/50), fmt.Sprintf("file-%05d", i))
		if err := parents(a, path.Dir(name), made); err != nil {
			return err
		}
		h := &tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: int64(size), ModTime: epoch}
		if err := a.add(h, bytes.NewReader(text[:size])); err != nil {
			return err
		}
		text = text[size:]
	}
	return nil
}
