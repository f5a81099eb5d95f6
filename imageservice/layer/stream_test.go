package layer

import (
	"bytes"
	"compress/gzip"
	"errors"
	"io"
	"math/rand"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
)

func mustGzip(t testing.TB, b []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	w := gzip.NewWriter(&out)
	w.Write(b)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func mustZstd(t testing.TB, b []byte, opts ...zstd.EOption) []byte {
	t.Helper()
	w, err := zstd.NewWriter(nil, opts...)
	if err != nil {
		t.Fatal(err)
	}
	return w.EncodeAll(b, nil)
}

func sample(n int) []byte {
	b := make([]byte, n)
	r := rand.New(rand.NewSource(int64(n)))
	r.Read(b[:n/2]) // half does not compress
	return b
}

func TestStream(t *testing.T) {
	skippable := append([]byte{0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0}, "abc"...)
	for _, size := range []int{0, 1, 1000, 3 << 20} {
		plain := sample(size)
		for name, raw := range map[string][]byte{
			"plain": plain, "gzip": mustGzip(t, plain), "zstd": mustZstd(t, plain),
			"gzip members": append(mustGzip(t, plain[:size/2]), mustGzip(t, plain[size/2:])...),
			"zstd chunked": append(bytes.Clone(skippable), mustZstd(t, plain)...),
		} {
			if name == "zstd chunked" && size == 0 {
				continue
			}
			for _, klauspost := range []bool{false, true} {
				s, err := Open(io.NopCloser(bytes.NewReader(raw)), Blob{
					MediaType: "application/vnd.oci.image.layer.v1.tar+zstd", PlainGzip: klauspost,
					Digest: digest.FromBytes(raw), DiffID: digest.SHA512.FromBytes(plain), Size: int64(len(raw)),
				})
				if err != nil {
					t.Fatal(err)
				}
				got, err := io.ReadAll(s)
				if err != nil || !bytes.Equal(got, plain) {
					t.Errorf("%s of %d: %d bytes, %v", name, size, len(got), err)
				}
				s.Close()
				if s.Received() != int64(len(raw)) {
					t.Errorf("%s of %d: received %d, want %d", name, size, s.Received(), len(raw))
				}
			}
		}
	}
}

func TestStreamErrors(t *testing.T) {
	plain := sample(1 << 20)
	raw := mustGzip(t, plain)
	zst := mustZstd(t, plain)
	big := mustZstd(t, make([]byte, 256<<20), zstd.WithWindowSize(128<<20), zstd.WithSingleSegment(false))
	bomb := mustGzip(t, make([]byte, 8<<20))
	broken := errors.New("broken")
	good := digest.FromBytes(plain)
	for _, tc := range []struct {
		name string
		src  io.Reader
		blob Blob
		want error
	}{
		{"other digest", bytes.NewReader(raw), Blob{Digest: good, DiffID: good, Size: -1}, ErrDigest},
		{"other diff ID", bytes.NewReader(raw), Blob{Digest: digest.FromBytes(raw), DiffID: digest.FromString("x"), Size: -1}, ErrDigest},
		{"longer than stated", bytes.NewReader(raw), Blob{Digest: digest.FromBytes(raw), DiffID: good, Size: 1000}, ErrDigest},
		{"cut gzip", bytes.NewReader(raw[:len(raw)/2]), Blob{Digest: good, DiffID: good, Size: -1}, ErrCorrupt},
		{"cut zstd", bytes.NewReader(zst[:len(zst)/2]), Blob{Digest: good, DiffID: good, Size: -1}, ErrCorrupt},
		{"bad gzip", strings.NewReader("\x1f\x8bnonsense"), Blob{Digest: good, DiffID: good, Size: -1}, ErrCorrupt},
		{"xz", strings.NewReader("\xfd7zXZ\x00\x00"), Blob{Digest: good, DiffID: good, Size: -1}, ErrUnsupported},
		{"zstd window", bytes.NewReader(big), Blob{Digest: good, DiffID: good, Size: -1}, ErrTooLarge},
		{"garbage after gzip", strings.NewReader(string(raw) + "garbage garbage"), Blob{Digest: good, DiffID: good, Size: -1}, ErrCorrupt},
		{"checksum of gzip", bytes.NewReader(append(bytes.Clone(raw[:len(raw)-8]), make([]byte, 8)...)), Blob{Digest: good, DiffID: good, Size: -1}, ErrCorrupt},
		{"bomb", bytes.NewReader(bomb), Blob{Digest: good, DiffID: good, Size: -1, MaxBytes: 1 << 20}, ErrTooLarge},
		{"source", io.MultiReader(bytes.NewReader(raw[:5000]), iotest.ErrReader(broken)), Blob{Digest: good, DiffID: good, Size: -1}, broken},
	} {
		all, _ := io.ReadAll(tc.src)
		for _, klauspost := range []bool{false, true} {
			tc.blob.PlainGzip = klauspost
			var src io.Reader = bytes.NewReader(all)
			if tc.name == "source" {
				src = io.MultiReader(src, iotest.ErrReader(broken))
			}
			s, err := Open(io.NopCloser(src), tc.blob)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := io.Copy(io.Discard, s); !errors.Is(err, tc.want) {
				t.Errorf("%s (klauspost %v): %v, want %v", tc.name, klauspost, err, tc.want)
			}
			s.Close()
		}
	}
	if _, err := Open(io.NopCloser(strings.NewReader("")), Blob{Digest: "sha256:zz", DiffID: good}); err == nil {
		t.Error("malformed digest was taken")
	}
	if _, err := Open(io.NopCloser(strings.NewReader("")), Blob{Digest: "md5:d41d8cd98f00b204e9800998ecf8427e", DiffID: good}); err == nil {
		t.Error("digest of an unknown algorithm was taken")
	}
}

// TestStreamClose: a stream that nobody reads to its end leaves no goroutine behind.
func TestStreamClose(t *testing.T) {
	r, w := io.Pipe()
	good := digest.FromString("")
	s, err := Open(r, Blob{Digest: good, DiffID: good, Size: -1})
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		for {
			if _, err := w.Write(make([]byte, 64<<10)); err != nil {
				return
			}
		}
	}()
	if _, err := io.ReadFull(s, make([]byte, 100<<10)); err != nil {
		t.Fatal(err)
	}
	closed := make(chan struct{})
	go func() { s.Close(); close(closed) }()
	select {
	case <-closed:
	case <-time.After(10 * time.Second):
		t.Fatal("Close hangs")
	}
}

// TestBlame: a stream that was changed on its way fails to unpack, but that is not the cause.
func TestBlame(t *testing.T) {
	plain := sample(2 << 20)
	raw := mustGzip(t, plain)
	changed := bytes.Clone(raw)
	changed[len(changed)/2] ^= 1
	for name, tc := range map[string]struct {
		raw  []byte
		want error
	}{"changed": {changed, ErrDigest}, "as it was": {raw, ErrCorrupt}} {
		s, err := Open(io.NopCloser(bytes.NewReader(tc.raw)), Blob{Digest: digest.FromBytes(raw), DiffID: digest.FromBytes(plain), Size: int64(len(raw))})
		if err != nil {
			t.Fatal(err)
		}
		_, err = ApplyDir(t.Context(), t.TempDir(), s, Options{}) // random bytes are no archive
		if got := s.Blame(err); !errors.Is(err, ErrCorrupt) || !errors.Is(got, tc.want) {
			t.Errorf("%s: %v, blamed on %v, want %v", name, err, got, tc.want)
		}
		s.Close()
	}
	other := errors.New("other")
	s, err := Open(io.NopCloser(strings.NewReader("")), Blob{Digest: digest.FromString("x"), DiffID: digest.FromString("x"), Size: -1})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if got := s.Blame(other); got != other {
		t.Errorf("an error of another kind became %v", got)
	}
}

// TestWindows: zstd layers with large windows run one after the other, and one that waits
// can be closed.
func TestWindows(t *testing.T) {
	plain := make([]byte, 40<<20)
	copy(plain[20<<20:], sample(20<<20))
	raw := mustZstd(t, plain, zstd.WithWindowSize(32<<20), zstd.WithSingleSegment(false))
	blob := Blob{Digest: digest.FromBytes(raw), DiffID: digest.FromBytes(plain), Size: int64(len(raw))}
	open := func() *Stream {
		s, err := Open(io.NopCloser(bytes.NewReader(raw)), blob)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	first := open()
	if _, err := first.Chunk(); err != nil {
		t.Fatal(err)
	}
	waiting, closed := open(), open()
	select {
	case c := <-waiting.digested.full:
		t.Fatalf("two large windows at once: %d bytes, %v", c.n, c.err)
	case <-time.After(50 * time.Millisecond):
	}
	closed.Close()
	if _, err := io.Copy(io.Discard, first); err != nil {
		t.Fatal(err)
	}
	first.Close()
	if n, err := io.Copy(io.Discard, waiting); err != nil || n != int64(len(plain)) {
		t.Fatalf("after it: %d bytes, %v", n, err)
	}
	waiting.Close()
	windows.mu.Lock()
	defer windows.mu.Unlock()
	if windows.free != zstdMemory {
		t.Errorf("%d bytes of the budget are free, want all %d", windows.free, zstdMemory)
	}
}
