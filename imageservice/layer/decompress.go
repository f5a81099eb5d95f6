package layer

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"

	"github.com/berthd/berth/imageservice/layer/gunzip"
)

// filler is what decompresses: Fill writes behind the window that it finds in front of b, as
// a gunzip.Reader does.
type filler interface {
	Fill(b []byte) (int, error)
}

// filling makes a filler of a reader.
type filling struct {
	r   io.Reader
	err error
}

func (f *filling) Fill(b []byte) (n int, err error) {
	if f.err == nil {
		n, f.err = fillFrom(f.r, b)
	}
	if n > 0 {
		return n, nil
	}
	return 0, f.err
}

// decompressor finds the compression at the first Fill, in the goroutine of its stage.
type decompressor struct {
	src  io.Reader
	blob Blob
	quit <-chan struct{}
	f    filler
	err  error
	end  func() // gives back what f is made of
}

// Fill implements filler.
func (d *decompressor) Fill(b []byte) (int, error) {
	if d.f == nil && d.err == nil {
		d.err = d.open()
	}
	if d.err != nil {
		return 0, d.err
	}
	n, err := d.f.Fill(b)
	if err != nil {
		d.err = decompressError(err)
		d.close()
		return 0, d.err
	}
	return n, nil
}

// close lets other streams have the decoder. It may be called more than once, and not while
// Fill runs.
func (d *decompressor) close() {
	if d.end != nil {
		d.end()
	}
	d.end, d.f = nil, nil
	if d.err == nil {
		d.err = io.ErrClosedPipe
	}
}

var (
	magicGzip = []byte{0x1f, 0x8b}
	magicZstd = []byte{0x28, 0xb5, 0x2f, 0xfd}
	// magicOther are formats that a registry may serve and that berth does not read;
	// without them the error would be that of a broken tar.
	magicOther = map[string][]byte{"bzip2": []byte("BZh"), "xz": {0xfd, '7', 'z', 'X', 'Z'}, "lz4": {0x04, 0x22, 0x4d, 0x18}}
)

// open goes by the first bytes, since media types are often wrong, and by the media
// type where they do not tell: a zstd stream may begin with a skippable frame.
func (d *decompressor) open() error {
	head := make([]byte, zstd.HeaderMaxSize)
	n, err := io.ReadFull(d.src, head)
	if err != nil && err != io.EOF && err != io.ErrUnexpectedEOF {
		return err
	}
	head = head[:n]
	all := io.MultiReader(bytes.NewReader(head), d.src)
	skippable := n >= 4 && head[0]&0xf0 == 0x50 && bytes.Equal(head[1:4], []byte{0x2a, 0x4d, 0x18})
	switch {
	case bytes.HasPrefix(head, magicGzip):
		return d.gzip(all)
	case bytes.HasPrefix(head, magicZstd), skippable && strings.Contains(d.blob.MediaType, "zstd"):
		return d.zstd(head, all)
	}
	for name, magic := range magicOther {
		if bytes.HasPrefix(head, magic) {
			return fmt.Errorf("compression %s: %w", name, ErrUnsupported)
		}
	}
	d.f = &filling{r: all}
	return nil
}

var gunzips = sync.Pool{New: func() any { return gunzip.NewReader(nil) }}

func (d *decompressor) gzip(src io.Reader) error {
	if d.blob.PlainGzip {
		r, err := gzip.NewReader(src)
		if err != nil {
			return decompressError(err)
		}
		d.f = &filling{r: r}
		return nil
	}
	r := gunzips.Get().(*gunzip.Reader)
	r.Reset(src)
	d.f, d.end = r, func() {
		r.Reset(nil)
		gunzips.Put(r)
	}
	return nil
}

// zstds are decoders that keep the window that they once needed.
var zstds sync.Pool

// zstd waits until there is memory for the window of the first frame. A stream may have
// frames with larger ones; maxZstdWindow bounds them.
func (d *decompressor) zstd(head []byte, src io.Reader) error {
	var h zstd.Header
	weight := minZstdWeight
	if h.Decode(head) == nil && !h.Skippable {
		weight = int64(min(max(h.WindowSize, uint64(minZstdWeight)), uint64(zstdMemory)))
	}
	if !windows.acquire(weight, d.quit) {
		return io.ErrClosedPipe
	}
	r, ok := zstds.Get().(*zstd.Decoder)
	if !ok {
		var err error
		r, err = zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(maxZstdWindow))
		if err != nil {
			windows.release(weight)
			return err
		}
	}
	d.end = func() {
		if weight <= minZstdWeight && r.Reset(nil) == nil {
			zstds.Put(r)
		} else {
			r.Close()
		}
		windows.release(weight)
	}
	d.f = &filling{r: r}
	return r.Reset(src)
}

// budget is memory that streams share.
type budget struct {
	mu   sync.Mutex
	free int64
	wake chan struct{} // closed when something became free
}

var windows = budget{free: zstdMemory, wake: make(chan struct{})}

// acquire waits until n bytes, at most all that there are, are free, and tells whether they
// were before quit was closed.
func (b *budget) acquire(n int64, quit <-chan struct{}) bool {
	for {
		b.mu.Lock()
		if b.free >= n {
			b.free -= n
			b.mu.Unlock()
			return true
		}
		wake := b.wake
		b.mu.Unlock()
		select {
		case <-wake:
		case <-quit:
			return false
		}
	}
}

func (b *budget) release(n int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.free += n
	close(b.wake)
	b.wake = make(chan struct{})
}

func decompressError(err error) error {
	switch {
	case err == io.EOF:
		return err
	case errors.Is(err, zstd.ErrWindowSizeExceeded), errors.Is(err, zstd.ErrDecoderSizeExceeded):
		return fmt.Errorf("zstd window larger than %d bytes: %w", maxZstdWindow, ErrTooLarge)
	case errors.Is(err, gunzip.ErrHeader), errors.Is(err, gunzip.ErrChecksum), errors.Is(err, gunzip.ErrCorrupt), errors.Is(err, io.ErrUnexpectedEOF),
		errors.Is(err, gzip.ErrHeader), errors.Is(err, gzip.ErrChecksum),
		errors.Is(err, zstd.ErrMagicMismatch), errors.Is(err, zstd.ErrCRCMismatch), strings.HasPrefix(err.Error(), "flate:"):
		return fmt.Errorf("%w: %w", ErrCorrupt, err)
	}
	return err
}
