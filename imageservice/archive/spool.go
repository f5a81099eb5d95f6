package archive

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// maxZstdWindow bounds what a frame may make the decoder allocate.
const maxZstdWindow = 128 << 20

// compression tells by its first bytes how a file is compressed: "gzip", "zstd" or "".
func compression(head []byte) string {
	switch {
	case bytes.HasPrefix(head, []byte{0x1f, 0x8b}):
		return "gzip"
	case bytes.HasPrefix(head, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		return "zstd"
	}
	return ""
}

// peek tells how r is compressed, and returns a reader of all of it.
func peek(r io.Reader) (kind string, all io.Reader, err error) {
	head := make([]byte, 6)
	n, err := io.ReadFull(r, head)
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		return "", nil, err
	}
	return compression(head[:n]), io.MultiReader(bytes.NewReader(head[:n]), r), nil
}

// decompress is r without its compression.
func decompress(r io.Reader) (io.Reader, func(), error) {
	kind, all, err := peek(r)
	if err != nil {
		return nil, nil, err
	}
	switch kind {
	case "gzip":
		z, err := gzip.NewReader(all)
		if err != nil {
			return nil, nil, fmt.Errorf("gzip: %w: %w", ErrFormat, err)
		}
		return z, func() {}, nil
	case "zstd":
		z, err := zstd.NewReader(all, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxZstdWindow))
		if err != nil {
			return nil, nil, fmt.Errorf("zstd: %w: %w", ErrFormat, err)
		}
		return z, z.Close, nil
	}
	return all, func() {}, nil
}

// spool writes a stream, decompressed, to a file without a name.
func spool(ctx context.Context, r io.Reader, opt Options, progress func(int64)) (*os.File, error) {
	fd, err := unix.Open(opt.SpoolDir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("spool in %s: %w", opt.SpoolDir, err)
	}
	f := os.NewFile(uintptr(fd), "spool")
	plain, done, err := decompress(r)
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	defer done()
	var n int64
	buf := make([]byte, 256<<10)
	for {
		k, err := plain.Read(buf)
		if n += int64(k); n > opt.MaxBytes {
			return nil, errors.Join(fmt.Errorf("more than %d bytes: %w", opt.MaxBytes, ErrTooLarge), f.Close())
		}
		if _, werr := f.Write(buf[:k]); werr != nil {
			return nil, errors.Join(fmt.Errorf("spool in %s: %w", opt.SpoolDir, werr), f.Close())
		}
		if progress != nil {
			progress(n)
		}
		if errors.Is(err, io.EOF) {
			return f, nil
		}
		if err == nil {
			err = ctx.Err()
		} else {
			err = fmt.Errorf("after %d bytes: %w: %w", n, ErrFormat, err)
		}
		if err != nil {
			return nil, errors.Join(err, f.Close())
		}
	}
}

// open makes the index of a plain tar archive. Contents are skipped, not read.
func open(ctx context.Context, f *os.File, opt Options) (*Archive, error) {
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return nil, err
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return nil, err
	}
	a := &Archive{opt: opt, file: f, members: map[string]extent{}, links: map[string]string{}, blobs: map[digest.Digest]string{}}
	tr := tar.NewReader(f)
	for n := 0; ; n++ {
		if err := ctx.Err(); err != nil {
			return nil, context.Cause(ctx)
		}
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			if n == 0 {
				return nil, fmt.Errorf("no members: %w", ErrFormat)
			}
			return a, nil
		}
		if err != nil {
			return nil, fmt.Errorf("member %d: %w: %w", n+1, ErrFormat, err)
		}
		if n >= maxMembers {
			return nil, fmt.Errorf("more than %d members: %w", maxMembers, ErrTooLarge)
		}
		off, err := f.Seek(0, io.SeekCurrent)
		if err != nil {
			return nil, err
		}
		a.add(h, off)
		if h.Size > size-off {
			return nil, fmt.Errorf("member %.200q: ends after the archive: %w", h.Name, ErrFormat)
		}
	}
}

// add notes a member. What is no file or link is of no use to an image.
func (a *Archive) add(h *tar.Header, off int64) {
	name := clean(h.Name)
	delete(a.members, name) // of two with one name the later counts
	delete(a.links, name)
	switch h.Typeflag {
	case tar.TypeReg:
		for k := range h.PAXRecords {
			if strings.HasPrefix(k, "GNU.sparse.") {
				return // its bytes are not its content
			}
		}
		a.members[name] = extent{off, h.Size}
	case tar.TypeLink:
		a.links[name] = clean(h.Linkname)
	case tar.TypeSymlink:
		a.links[name] = clean(path.Join(path.Dir(name), h.Linkname))
	}
}
