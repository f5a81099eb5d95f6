// Package archive reads images from files: OCI image layouts and the archives of
// "docker save", as tar, as tar in gzip or zstd, or as a directory.
//
// # Nouns
//
//   - Archive: an open file or directory, with an index of what is in it. Nothing is
//     ever unpacked: members are read where they are.
//   - Image: a manifest and a config from it, and the names that it has there. The layers
//     are read by the digests that the manifest lists them under.
//   - spool: a nameless file in SpoolDir, for what cannot be read twice: a stream, or a
//     compressed archive. It is gone when the archive is closed, or the process ends.
//
// # Safety
//
// An archive may come from anywhere. Names of members are keys of a map, or resolved
// below the directory by the kernel (os.Root); links count only between members. The
// number of members and images, the size of what is read into memory and of a spool are
// bounded. Digests of manifests and configs are verified here, those of layers by who
// unpacks them.
//
// # Caveats
//
//   - Of an index for several platforms, one image is read: that which Options choose.
//   - An archive of "docker save" before version 25 has no manifests; one is made up for
//     each image, so its digest says nothing about any registry.
package archive

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// Errors, tested with errors.Is. The text names the member.
var (
	// ErrFormat: not an image archive, or one whose parts contradict each other.
	ErrFormat = errors.New("image archive not valid")
	// ErrMissing: a member that another one refers to is not there.
	ErrMissing = errors.New("image archive not complete")
	// ErrTooLarge: a limit was passed.
	ErrTooLarge = errors.New("image archive too large")
	// ErrDigest: a manifest or config is not what its digest says.
	ErrDigest = errors.New("image archive digest mismatch")
	// ErrPlatform: no image in it is for this node.
	ErrPlatform = errors.New("image archive for other platforms")
)

// Limits of every archive.
const (
	maxMembers  = 1 << 18
	maxImages   = 4096
	maxDocument = 8 << 20 // bytes of an index, manifest or config
	maxLinks    = 8       // from one member to the next
)

// Options say what to make of an archive.
type Options struct {
	// SpoolDir is where spools are made: a directory on a file system with room.
	SpoolDir string
	// MaxBytes bounds a spool.
	MaxBytes int64
	// Choose picks the manifest for this node from an index of the given media type. Its
	// error is returned.
	Choose func(index []byte, mediaType string) (digest.Digest, error)
	// Matches tells whether a platform is this node's, where an archive lists images
	// for several side by side.
	Matches func(os, architecture string) bool
}

// Image is one image of an archive.
type Image struct {
	// Names are those that the archive gives it: references in full, of which nothing
	// has been checked.
	Names []string
	// Tag is set instead where the archive has no more than "v1" for a name.
	Tag string
	// Top is the digest of what the archive's list points to, an index or a manifest; ""
	// when the manifest was made up.
	Top       digest.Digest
	Manifest  []byte
	MediaType string // of the manifest
	Config    []byte
	// Err tells why this one cannot be read; then the rest is not set.
	Err error
}

// Archive is an open archive. It may be used by many goroutines.
type Archive struct {
	opt     Options
	file    *os.File // a tar archive that can be read anywhere
	spooled bool     // file is ours
	root    *os.Root // or a directory
	members map[string]extent
	links   map[string]string
	blobs   map[digest.Digest]string // members that are not under their digests
}

// extent is where a member of a tar archive is.
type extent struct{ off, size int64 }

// Open reads the index of f, a file, a directory or a pipe, which stays the caller's and
// must be open until Close. Reading a pipe or a compressed file takes a spool; progress is
// told how many bytes of it there are.
func Open(ctx context.Context, f *os.File, opt Options, progress func(n int64)) (*Archive, error) {
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if st.IsDir() {
		root, err := os.OpenRoot(fmt.Sprintf("/proc/self/fd/%d", f.Fd()))
		if err != nil {
			return nil, err
		}
		return &Archive{opt: opt, root: root, blobs: map[digest.Digest]string{}}, nil
	}
	var head [6]byte
	seekable := st.Mode().IsRegular()
	if seekable {
		n, err := f.ReadAt(head[:], 0)
		if err != nil && !errors.Is(err, io.EOF) {
			return nil, err
		}
		if compression(head[:n]) == "" {
			return open(ctx, f, opt)
		}
		if _, err := f.Seek(0, io.SeekStart); err != nil {
			return nil, err
		}
	}
	return OpenStream(ctx, f, opt, progress)
}

// OpenStream is Open for what can only be read from front to end.
func OpenStream(ctx context.Context, r io.Reader, opt Options, progress func(n int64)) (*Archive, error) {
	f, err := spool(ctx, r, opt, progress)
	if err != nil {
		return nil, err
	}
	a, err := open(ctx, f, opt)
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	a.spooled = true
	return a, nil
}

// Close frees what the archive holds.
func (a *Archive) Close() error {
	switch {
	case a.root != nil:
		return a.root.Close()
	case a.spooled:
		return a.file.Close()
	}
	return nil
}

// Blob opens the bytes of a digest, unverified, and tells how many there are.
// It fails with ErrMissing when the archive does not have them.
func (a *Archive) Blob(d digest.Digest) (io.ReadCloser, int64, error) {
	if err := d.Validate(); err != nil {
		return nil, 0, fmt.Errorf("digest %.100q: %w: %w", d, ErrFormat, err)
	}
	name, ok := a.blobs[d]
	if !ok {
		name = BlobName(d)
	}
	return a.open(name)
}

// BlobName is the name of a blob's member in an OCI image layout.
func BlobName(d digest.Digest) string { return "blobs/" + d.Algorithm().String() + "/" + d.Encoded() }

// open opens a member, through links between members.
func (a *Archive) open(name string) (io.ReadCloser, int64, error) {
	if a.root != nil {
		return a.openFile(name)
	}
	for range maxLinks {
		if e, ok := a.members[name]; ok {
			return io.NopCloser(io.NewSectionReader(a.file, e.off, e.size)), e.size, nil
		}
		to, ok := a.links[name]
		if !ok {
			break
		}
		name = to
	}
	return nil, 0, fmt.Errorf("%.200q: %w", name, ErrMissing)
}

func (a *Archive) openFile(name string) (io.ReadCloser, int64, error) {
	// Not blocking: what is called like a blob may be a fifo.
	f, err := a.root.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, 0, fmt.Errorf("%.200q: %w", name, ErrMissing)
	}
	if err != nil {
		return nil, 0, fmt.Errorf("%w: %w", ErrFormat, err)
	}
	st, err := f.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = fmt.Errorf("%.200q is no regular file: %w", name, ErrFormat)
	}
	if err != nil {
		return nil, 0, errors.Join(err, f.Close())
	}
	return f, st.Size(), nil
}

// read reads a whole member that is a document.
func (a *Archive) read(name string) ([]byte, error) {
	r, size, err := a.open(name)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	if size > maxDocument {
		return nil, fmt.Errorf("%.200q: %d bytes, limit %d: %w", name, size, maxDocument, ErrTooLarge)
	}
	b, err := io.ReadAll(io.LimitReader(r, maxDocument))
	if err != nil {
		return nil, fmt.Errorf("%.200q: %w", name, err)
	}
	return b, nil
}

// document reads and verifies the document of a digest.
func (a *Archive) document(d digest.Digest) ([]byte, error) {
	if err := d.Validate(); err != nil {
		return nil, fmt.Errorf("digest %.100q: %w: %w", d, ErrFormat, err)
	}
	b, err := a.read(BlobName(d))
	if err != nil {
		return nil, err
	}
	if got := d.Algorithm().FromBytes(b); got != d {
		return nil, fmt.Errorf("%s: content has digest %s: %w", d, got, ErrDigest)
	}
	return b, nil
}

func parse(name string, b []byte, v any) error {
	if err := json.Unmarshal(b, v); err != nil {
		return fmt.Errorf("%.200q: %w: %w", name, ErrFormat, err)
	}
	return nil
}

// clean is the name of a member as the map has it: relative, without dots.
func clean(name string) string { return strings.TrimPrefix(path.Clean("/"+name), "/") }
