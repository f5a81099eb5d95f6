package layer

import (
	"bytes"
	_ "crypto/sha256" // digests that Open can verify
	_ "crypto/sha512"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
)

// Blob says what a layer's stream must be.
type Blob struct {
	MediaType string        // used when the first bytes do not tell the compression
	Digest    digest.Digest // of the stream as it comes
	DiffID    digest.Digest // of the archive inside
	Size      int64         // of the stream; -1 if not known
	MaxBytes  int64         // bound of the archive; 0 for none
}

const (
	// The stages of a stream hand over full buffers, so that download, decompression
	// and unpacking overlap. Memory of a stream: sourceAhead+archiveAhead buffers.
	aheadBuffer  = 256 << 10
	sourceAhead  = 4
	archiveAhead = 4
	// maxZstdWindow bounds what a frame may make the decoder allocate.
	maxZstdWindow = 64 << 20
)

// Stream is the archive of a layer. Its Read returns io.EOF only when all of the stream
// was read and both digests are right, and ErrDigest otherwise.
type Stream struct {
	source  io.Closer
	blob    Blob
	raw     *hashed
	tar     *hashed
	stages  []*ahead // source first
	checked error    // what Read returns at the end, once known
}

// Open begins to read src, which belongs to the stream from now on. It returns at once;
// errors come from Read. Both digests of b must be valid.
func Open(src io.ReadCloser, b Blob) (*Stream, error) {
	for _, d := range []digest.Digest{b.Digest, b.DiffID} {
		if err := d.Validate(); err != nil {
			src.Close()
			return nil, fmt.Errorf("digest %q: %w", clip(d.String()), err)
		}
	}
	s := &Stream{source: src, blob: b}
	s.raw = &hashed{r: src, h: b.Digest.Algorithm().Hash(), limit: b.Size,
		over: fmt.Errorf("more than the %d bytes that the manifest states: %w", b.Size, ErrDigest)}
	if b.Size < 0 {
		s.raw.limit = -1
	}
	first := newAhead(s.raw, sourceAhead)
	s.tar = &hashed{r: &decompressor{src: first, mediaType: b.MediaType}, h: b.DiffID.Algorithm().Hash(), limit: -1,
		over: fmt.Errorf("more than %d bytes unpacked: %w", b.MaxBytes, ErrTooLarge)}
	if b.MaxBytes > 0 {
		s.tar.limit = b.MaxBytes
	}
	s.stages = []*ahead{first, newAhead(s.tar, archiveAhead)}
	return s, nil
}

// Read implements io.Reader.
func (s *Stream) Read(p []byte) (int, error) {
	if s.checked != nil {
		return 0, s.checked
	}
	n, err := s.stages[1].Read(p)
	if err == io.EOF {
		s.checked = s.verify()
		err = s.checked
	}
	return n, err
}

// verify runs when the last stage saw the end, which is after the stages before it, so
// that no goroutine is using the hashes.
func (s *Stream) verify() error {
	// A decompressor may stop before the end of its input.
	if _, err := io.Copy(io.Discard, s.stages[0]); err != nil {
		return err
	}
	if got := digest.NewDigest(s.blob.Digest.Algorithm(), s.raw.h); got != s.blob.Digest {
		return fmt.Errorf("received %d bytes with digest %s, want %s: %w", s.raw.n, got, s.blob.Digest, ErrDigest)
	}
	if got := digest.NewDigest(s.blob.DiffID.Algorithm(), s.tar.h); got != s.blob.DiffID {
		return fmt.Errorf("unpacks to diff ID %s, want %s: %w", got, s.blob.DiffID, ErrDigest)
	}
	return io.EOF
}

// Blame finds the cause of err, an error about the contents: when the stream, read to its
// end, is not what its digest says, the result is ErrDigest, and otherwise err. Nothing may
// be read afterwards.
func (s *Stream) Blame(err error) error {
	if !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrUnsafe) && !errors.Is(err, ErrUnsupported) {
		return err
	}
	s.stages[1].stop()
	<-s.stages[1].done
	if _, drained := io.Copy(io.Discard, s.stages[0]); drained != nil {
		return err
	}
	if got := digest.NewDigest(s.blob.Digest.Algorithm(), s.raw.h); got != s.blob.Digest {
		return fmt.Errorf("received %d bytes with digest %s, want %s: %w (noticed as: %v)", s.raw.n, got, s.blob.Digest, ErrDigest, err)
	}
	return err
}

// Received is the number of bytes that came from the source; it may be called only
// after Close, or after Read returned an error.
func (s *Stream) Received() int64 { return s.raw.n }

// Close closes the source and waits for the stages to end.
func (s *Stream) Close() error {
	err := s.source.Close()
	for _, st := range s.stages {
		st.stop()
	}
	for _, st := range s.stages {
		<-st.done
		st.release()
	}
	return err
}

// decompressor finds the compression at the first Read, in the goroutine of its stage.
type decompressor struct {
	src       io.Reader
	mediaType string
	r         io.Reader
	err       error
}

func (d *decompressor) Read(p []byte) (int, error) {
	if d.r == nil && d.err == nil {
		d.r, d.err = decompress(d.src, d.mediaType)
	}
	if d.err != nil {
		return 0, d.err
	}
	n, err := d.r.Read(p)
	if err != nil {
		err = decompressError(err)
		if z, ok := d.r.(*zstd.Decoder); ok {
			z.Close()
		}
		d.err = err
	}
	return n, err
}

var (
	magicGzip = []byte{0x1f, 0x8b}
	magicZstd = []byte{0x28, 0xb5, 0x2f, 0xfd}
	// magicOther are formats that a registry may serve and that berth does not read;
	// without them the error would be that of a broken tar.
	magicOther = map[string][]byte{"bzip2": []byte("BZh"), "xz": {0xfd, '7', 'z', 'X', 'Z'}, "lz4": {0x04, 0x22, 0x4d, 0x18}}
)

// decompress goes by the first bytes, since media types are often wrong, and by the media
// type where they do not tell: a zstd stream may begin with a skippable frame.
func decompress(src io.Reader, mediaType string) (io.Reader, error) {
	head := make([]byte, 6)
	n, err := io.ReadFull(src, head)
	if err != nil && err != io.EOF && err != io.ErrUnexpectedEOF {
		return nil, err
	}
	head = head[:n]
	all := io.MultiReader(bytes.NewReader(head), src)
	skippable := n >= 4 && head[0]&0xf0 == 0x50 && bytes.Equal(head[1:4], []byte{0x2a, 0x4d, 0x18})
	switch {
	case bytes.HasPrefix(head, magicGzip):
		r, err := gzip.NewReader(all)
		if err != nil {
			return nil, decompressError(err)
		}
		return r, nil
	case bytes.HasPrefix(head, magicZstd), skippable && strings.Contains(mediaType, "zstd"):
		return zstd.NewReader(all, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(maxZstdWindow))
	}
	for name, magic := range magicOther {
		if bytes.HasPrefix(head, magic) {
			return nil, fmt.Errorf("compression %s: %w", name, ErrUnsupported)
		}
	}
	return all, nil
}

func decompressError(err error) error {
	switch {
	case err == io.EOF:
		return err
	case errors.Is(err, zstd.ErrWindowSizeExceeded), errors.Is(err, zstd.ErrDecoderSizeExceeded):
		return fmt.Errorf("zstd window larger than %d bytes: %w", maxZstdWindow, ErrTooLarge)
	case errors.Is(err, gzip.ErrHeader), errors.Is(err, gzip.ErrChecksum), errors.Is(err, io.ErrUnexpectedEOF),
		errors.Is(err, zstd.ErrMagicMismatch), errors.Is(err, zstd.ErrCRCMismatch), strings.HasPrefix(err.Error(), "flate:"):
		return fmt.Errorf("%w: %w", ErrCorrupt, err)
	}
	return err
}
