package layer

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

// endless is an archive of n entries that is made while it is read.
func endless(t *testing.T, n int, make func(i int) tar.Header) io.Reader {
	r, w := io.Pipe()
	t.Cleanup(func() { r.Close() })
	go func() {
		tw := tar.NewWriter(w)
		for i := range n {
			h := make(i)
			if tw.WriteHeader(&h) != nil {
				return // the reader has had enough
			}
		}
		w.CloseWithError(tw.Close())
	}()
	return r
}

// TestManyEntries: a million entries end at the limit, whatever they are.
func TestManyEntries(t *testing.T) {
	needRoot(t)
	const most = 3000
	for name, entry := range map[string]func(i int) tar.Header{
		"files": func(i int) tar.Header {
			return tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprintf("f%d", i), Mode: 0o644}
		},
		"directories": func(i int) tar.Header {
			return tar.Header{Typeflag: tar.TypeDir, Name: fmt.Sprintf("d%d/", i), Mode: 0o755}
		},
		"one file again and again": func(int) tar.Header { return tar.Header{Typeflag: tar.TypeReg, Name: "same", Mode: 0o644} },
		"whiteouts":                func(i int) tar.Header { return tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprintf(".wh.w%d", i)} },
		"implied directories": func(i int) tar.Header {
			return tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprintf("i%d/j/k/l", i), Mode: 0o644}
		},
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			_, err := ApplyDir(context.Background(), root, endless(t, 1_000_000, entry), Options{MaxEntries: most, Manifest: io.Discard})
			if !errors.Is(err, ErrTooLarge) || !strings.Contains(err.Error(), fmt.Sprint(most)) {
				t.Errorf("got %v, want ErrTooLarge with the limit", err)
			}
		})
	}
}

// TestBomb: ten GiB in ten MiB end at the limit, and soon.
func TestBomb(t *testing.T) {
	needRoot(t)
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	w := tar.NewWriter(z)
	if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "bomb", Mode: 0o644, Size: 10 << 30}); err != nil {
		t.Fatal(err)
	}
	zeros := make([]byte, 1<<20)
	for range 64 {
		w.Write(zeros)
	}
	z.Close() // cut, but nobody comes that far
	raw := b.Bytes()
	for name, limits := range map[string]struct {
		blob Blob
		opts Options
	}{
		"of the stream":  {Blob{MaxBytes: 16 << 20}, Options{}},
		"of the entries": {Blob{}, Options{MaxBytes: 16 << 20}},
	} {
		blob := limits.blob
		blob.Digest, blob.DiffID, blob.Size = digest.FromBytes(raw), digest.FromString("x"), int64(len(raw))
		s, err := Open(io.NopCloser(bytes.NewReader(raw)), blob)
		if err != nil {
			t.Fatal(err)
		}
		root := t.TempDir()
		began := time.Now()
		if _, err = ApplyDir(context.Background(), root, s, limits.opts); !errors.Is(err, ErrTooLarge) {
			t.Errorf("limit %s: %v after %s, want ErrTooLarge", name, err, time.Since(began))
		}
		s.Close()
		if fi, err := os.Stat(root + "/bomb"); err == nil && fi.Size() > 17<<20 {
			t.Errorf("limit %s: %d bytes were written", name, fi.Size())
		}
	}
}

// TestHugeHeaders: records before an entry are bounded as well.
func TestHugeHeaders(t *testing.T) {
	needRoot(t)
	for _, kind := range []byte{'x', 'g', 'L', 'K'} {
		raw := mustTar(t, file("f", ""))[:512]
		raw = append(bytes.Clone(raw), make([]byte, 8<<20)...)
		raw[156] = kind
		copy(raw[124:136], fmt.Sprintf("%011o\x00", 8<<20))
		fixChecksum(raw)
		if _, err := ApplyDir(context.Background(), t.TempDir(), bytes.NewReader(raw), Options{}); !errors.Is(err, ErrCorrupt) {
			t.Errorf("header %q of 8 MiB: %v, want ErrCorrupt", kind, err)
		}
	}
}
