package layer

import (
	_ "crypto/sha256" // digests that Open can verify
	_ "crypto/sha512"
	"errors"
	"fmt"
	"io"

	"github.com/opencontainers/go-digest"

	"github.com/berthd/berth/imageservice/layer/gunzip"
)

// Blob says what a layer's stream must be.
type Blob struct {
	MediaType string        // used when the first bytes do not tell the compression
	Digest    digest.Digest // of the stream as it comes
	DiffID    digest.Digest // of the archive inside
	Size      int64         // of the stream; -1 if not known
	MaxBytes  int64         // bound of the archive; 0 for none
	// PlainGzip has gzip decompressed by the widely used decoder in place of package
	// gunzip: slower, for comparison.
	PlainGzip bool
}

const (
	// The stages of a stream hand over full buffers, so that download, decompression
	// and unpacking overlap. Memory of a stream: sourceAhead+archiveAhead buffers.
	aheadBuffer  = 128 << 10
	sourceAhead  = 4
	archiveAhead = 4
	// maxZstdWindow bounds what a frame may make the decoder allocate.
	maxZstdWindow = 64 << 20
	// zstdMemory is shared by the windows of all streams at a time, of which a stream
	// counts as one of minZstdWeight at least. A stream with a larger window than that
	// runs alone.
	zstdMemory    = 24 << 20
	minZstdWeight = int64(8 << 20)
)

// Stream is the archive of a layer. Its Read and Chunk return io.EOF only when all of the
// stream was read and both digests are right, and ErrDigest otherwise.
//
//	source -> hash, goroutine -> decompress, goroutine -> hash, goroutine -> Chunk
type Stream struct {
	source io.Closer
	blob   Blob
	raw    hashing
	tar    hashing
	// The stages. A buffer of the second goes through the third and back.
	received, decoded, digested *stage
	stored                      *reading // of the first
	decoder                     decompressor
	cur                         chunk
	off                         int
	checked                     error // what Read returns at the end, once known
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
	s.raw = hashing{h: b.Digest.Algorithm().Hash(), limit: b.Size,
		over: fmt.Errorf("more than the %d bytes that the manifest states: %w", b.Size, ErrDigest)}
	if b.Size < 0 {
		s.raw.limit = -1
	}
	s.tar = hashing{h: b.DiffID.Algorithm().Hash(), limit: -1, over: fmt.Errorf("more than %d bytes unpacked: %w", b.MaxBytes, ErrTooLarge)}
	if b.MaxBytes > 0 {
		s.tar.limit = b.MaxBytes
	}
	var ended error
	s.received = start(sourceAhead, func(buf []byte) (n int, err error) {
		if ended == nil {
			n, ended = fillFrom(src, buf)
			err = s.raw.add(buf[gunzip.Window : gunzip.Window+n])
		}
		if n == 0 && err == nil {
			err = ended
		}
		if err != nil {
			n = 0
		}
		return n, err
	})
	s.stored = &reading{s: s.received}
	s.decoder = decompressor{src: s.stored, blob: b, quit: s.received.quit}
	s.decoded = start(archiveAhead, s.decoder.Fill)
	s.digested = s.startDigest()
	return s, nil
}

// startDigest is a stage that has no buffers of its own: it passes on those of the stage
// before, to which Chunk gives them back.
func (s *Stream) startDigest() *stage {
	d := &stage{full: make(chan chunk, 1), quit: s.decoded.quit, done: make(chan struct{})}
	go func() {
		defer close(d.done)
		for {
			c := s.decoded.take()
			if c.err == nil {
				if c.err = s.tar.add(c.bytes()); c.err != nil {
					c.n = 0
				}
			}
			select {
			case d.full <- c:
			case <-d.quit:
				return
			}
			if c.err != nil {
				return
			}
		}
	}()
	return d
}

// Chunk implements Chunks.
func (s *Stream) Chunk() ([]byte, error) {
	if s.off < s.cur.n { // left by Read
		b := s.cur.bytes()[s.off:]
		s.off = s.cur.n
		return b, nil
	}
	if s.checked != nil {
		return nil, s.checked
	}
	s.decoded.back(s.cur)
	s.cur = chunk{}
	s.cur = s.digested.take()
	s.off = s.cur.n
	if s.cur.err == io.EOF {
		s.checked = s.verify()
	} else {
		s.checked = s.cur.err
	}
	if s.checked != nil {
		return nil, s.checked
	}
	return s.cur.bytes(), nil
}

// Read implements io.Reader.
func (s *Stream) Read(p []byte) (int, error) {
	b, err := s.Chunk()
	if err != nil {
		return 0, err
	}
	n := copy(p, b)
	s.off -= len(b) - n
	return n, nil
}

// verify runs when the last stage saw the end, which is after the stages before it, so
// that no goroutine is using the hashes.
func (s *Stream) verify() error {
	// A decompressor may stop before the end of its input.
	if _, err := io.Copy(io.Discard, s.stored); err != nil {
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
	s.decoded.stop()
	<-s.decoded.done
	if _, drained := io.Copy(io.Discard, s.stored); drained != nil {
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
	s.received.stop()
	s.decoded.stop()
	<-s.digested.done
	<-s.decoded.done // from here on nobody else uses what follows
	s.decoded.back(s.cur)
	s.cur, s.off = chunk{}, 0
	s.received.back(s.stored.cur)
	s.stored.cur, s.stored.off = chunk{err: io.ErrClosedPipe}, 0
	s.decoder.close()
	s.decoded.release()
	s.received.release()
	return err
}
