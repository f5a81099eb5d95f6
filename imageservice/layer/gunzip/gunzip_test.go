package gunzip

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"
	"math/rand"
	"os"
	"strings"
	"testing"
	"testing/iotest"

	"golang.org/x/sys/unix"

	klauspost "github.com/klauspost/compress/gzip"
)

func mustGzip(t testing.TB, level int, b []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	w, err := gzip.NewWriterLevel(&out, level)
	if err != nil {
		t.Fatal(err)
	}
	w.Write(b)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// kinds of contents: text, noise, runs, short periods, a few symbols.
func contents(n int) map[string][]byte {
	r := rand.New(rand.NewSource(int64(n)))
	noise := make([]byte, n)
	r.Read(noise)
	text := []byte(strings.Repeat("the quick brown fox jumps over the lazy dog; ", n/45+1))[:n]
	for i := 0; i < n; i += 1 + r.Intn(40) {
		text[i] = byte(r.Intn(256))
	}
	periods := make([]byte, n)
	for i := range periods {
		if p := 1 + i/300%17; i >= p && i%300 >= p {
			periods[i] = periods[i-p]
		} else {
			periods[i] = noise[i]
		}
	}
	few := make([]byte, n)
	for i := range few {
		few[i] = "aaab"[noise[i]&3]
	}
	return map[string][]byte{"noise": noise, "text": text, "runs": make([]byte, n), "periods": periods, "few": few}
}

func TestReader(t *testing.T) {
	for _, n := range []int{0, 1, 2, 300, 70_000, 1 << 19} {
		for name, plain := range contents(n) {
			for _, level := range []int{gzip.HuffmanOnly, gzip.NoCompression, gzip.BestSpeed, 6} {
				raw := mustGzip(t, level, plain)
				for _, src := range []io.Reader{bytes.NewReader(raw), iotest.DataErrReader(bytes.NewReader(raw)), iotest.HalfReader(bytes.NewReader(raw))} {
					got, err := io.ReadAll(NewReader(src))
					if err != nil || !bytes.Equal(got, plain) {
						t.Fatalf("%s of %d, level %d: %d bytes, %v", name, n, level, len(got), err)
					}
				}
			}
		}
	}
}

func TestMembersAndReset(t *testing.T) {
	a, b := []byte("first member"), bytes.Repeat([]byte("second"), 30_000)
	r := NewReader(strings.NewReader("nothing"))
	if _, err := io.ReadAll(r); err == nil {
		t.Fatal("garbage was read")
	}
	for range 2 {
		r.Reset(iotest.OneByteReader(bytes.NewReader(append(mustGzip(t, 6, a), mustGzip(t, 9, b)...))))
		got, err := io.ReadAll(r)
		if err != nil || !bytes.Equal(got, append(bytes.Clone(a), b...)) {
			t.Fatalf("%d bytes, %v", len(got), err)
		}
		if _, err := r.Read(make([]byte, 1)); err != io.EOF {
			t.Fatalf("after the end: %v", err)
		}
	}
}

// TestErrors: what is wrong is told, and by the right name.
func TestErrors(t *testing.T) {
	plain := contents(100_000)["text"]
	raw := mustGzip(t, 6, plain)
	change := func(i int, b byte) []byte {
		c := bytes.Clone(raw)
		if i < 0 {
			i += len(c)
		}
		c[i] ^= b
		return c
	}
	broken := errors.New("broken")
	for _, tc := range []struct {
		name string
		src  io.Reader
		want error
	}{
		{"magic", bytes.NewReader(change(0, 1)), ErrHeader},
		{"method", bytes.NewReader(change(2, 1)), ErrHeader},
		{"header cut", bytes.NewReader(raw[:5]), io.ErrUnexpectedEOF},
		{"cut", bytes.NewReader(raw[:len(raw)/2]), io.ErrUnexpectedEOF},
		{"trailer cut", bytes.NewReader(raw[:len(raw)-1]), io.ErrUnexpectedEOF},
		{"checksum", bytes.NewReader(change(-8, 1)), ErrChecksum},
		{"size", bytes.NewReader(change(-1, 1)), ErrChecksum},
		{"garbage after it", bytes.NewReader(append(bytes.Clone(raw), "tail of garbage"...)), ErrHeader},
		{"zeros after it", bytes.NewReader(append(bytes.Clone(raw), make([]byte, 512)...)), ErrHeader},
		{"block type", strings.NewReader(string(raw[:10]) + "\x07"), ErrCorrupt},
		{"stored length", strings.NewReader(string(raw[:10]) + "\x01\x05\x00\x00\x00hello"), ErrCorrupt},
		{"source", io.MultiReader(bytes.NewReader(raw[:len(raw)/2]), iotest.ErrReader(broken)), broken},
		{"source in the header", iotest.ErrReader(broken), broken},
	} {
		got, err := io.ReadAll(NewReader(tc.src))
		if !errors.Is(err, tc.want) {
			t.Errorf("%s: %v, want %v", tc.name, err, tc.want)
		}
		if !bytes.HasPrefix(plain, got) && len(got) > len(plain) {
			t.Errorf("%s: %d bytes were read of %d", tc.name, len(got), len(plain))
		}
	}
	if _, err := io.ReadAll(NewReader(strings.NewReader(""))); err != io.EOF && err != nil {
		t.Errorf("empty: %v", err)
	}
}

// TestHeaders: all fields that a header may have, right, wrong and cut.
func TestHeaders(t *testing.T) {
	plain := []byte("contents")
	body := mustGzip(t, 6, plain)[10:]
	for flags := range byte(64) {
		head := []byte{0x1f, 0x8b, 8, flags, 1, 2, 3, 4, 0, 255}
		if flags&4 != 0 {
			head = append(head, 3, 0, 'a', 'b', 'c')
		}
		if flags&8 != 0 {
			head = append(head, "name\xfc\x00"...)
		}
		if flags&16 != 0 {
			head = append(head, "comment\x00"...)
		}
		if flags&2 != 0 {
			head = binary.LittleEndian.AppendUint16(head, uint16(crc32.ChecksumIEEE(head)))
		}
		raw := append(head, body...)
		if got, err := io.ReadAll(NewReader(bytes.NewReader(raw))); err != nil || !bytes.Equal(got, plain) {
			t.Errorf("flags %06b: %q, %v", flags, got, err)
		}
		for i := range len(raw) - len(body) {
			compare(t, raw[:i+1])
			changed := bytes.Clone(raw)
			changed[i] ^= 0x41
			compare(t, changed)
		}
	}
	for _, n := range []int{maxName - 1, maxName} { // without the zero byte
		raw := append([]byte{0x1f, 0x8b, 8, 8, 0, 0, 0, 0, 0, 255}, bytes.Repeat([]byte{'n'}, n)...)
		raw = append(append(raw, 0), body...)
		compare(t, raw)
		if _, err := io.ReadAll(NewReader(bytes.NewReader(raw))); errors.Is(err, ErrHeader) != (n == maxName) {
			t.Errorf("name of %d bytes: %v", n, err)
		}
	}
}

// FuzzReader compares with compress/gzip: the same bytes, or an error in both.
func FuzzReader(f *testing.F) {
	for _, n := range []int{0, 1, 400, 40_000} {
		for _, plain := range contents(n) {
			f.Add(mustGzip(f, 6, plain), uint16(0), byte(0))
		}
	}
	f.Fuzz(func(t *testing.T, raw []byte, at uint16, flip byte) {
		if len(raw) > 0 {
			raw = bytes.Clone(raw)
			raw[int(at)%len(raw)] ^= flip
		}
		compare(t, raw)
	})
}

func compare(t *testing.T, raw []byte) {
	t.Helper()
	const most = 8 << 20
	var want []byte
	z, wantErr := gzip.NewReader(bytes.NewReader(raw))
	if wantErr == nil {
		want, wantErr = io.ReadAll(io.LimitReader(z, most))
	}
	got, err := io.ReadAll(io.LimitReader(NewReader(bytes.NewReader(raw)), most))
	if len(raw) == 0 {
		return
	}
	if (err == nil) != (wantErr == nil) {
		t.Fatalf("error %v, compress/gzip has %v", err, wantErr)
	}
	if err == nil && !bytes.Equal(got, want) {
		t.Fatalf("%d bytes that differ from the %d of compress/gzip", len(got), len(want))
	}
	// Of a stream that is both cut and wrong in its last bits, either may be said.
	if errors.Is(wantErr, gzip.ErrChecksum) != errors.Is(err, ErrChecksum) {
		t.Fatalf("error %v, compress/gzip has %v", err, wantErr)
	}
}

// TestMutations is what the fuzzer does, for a while and always the same.
func TestMutations(t *testing.T) {
	r := rand.New(rand.NewSource(1))
	for _, n := range []int{50, 3000, 80_000} {
		for _, plain := range contents(n) {
			for _, level := range []int{gzip.HuffmanOnly, 1, 6} {
				raw := mustGzip(t, level, plain)
				for range 40 {
					c := bytes.Clone(raw[:1+r.Intn(len(raw))])
					for range r.Intn(3) {
						c[r.Intn(len(c))] ^= 1 << r.Intn(8)
					}
					compare(t, c)
				}
			}
		}
	}
}

// BenchmarkReader reads the file that BERTH_BENCH_GZIP names, with this package and with
// the two others that there are.
func BenchmarkReader(b *testing.B) {
	path := os.Getenv("BERTH_BENCH_GZIP")
	if path == "" {
		b.Skip("BERTH_BENCH_GZIP names no gzip file")
	}
	raw, err := os.ReadFile(path)
	if err != nil {
		b.Fatal(err)
	}
	for name, open := range map[string]func(io.Reader) (io.Reader, error){
		"own":       func(r io.Reader) (io.Reader, error) { return NewReader(r), nil },
		"compress":  func(r io.Reader) (io.Reader, error) { return gzip.NewReader(r) },
		"klauspost": func(r io.Reader) (io.Reader, error) { return klauspost.NewReader(r) },
	} {
		b.Run(name, func(b *testing.B) {
			buf := make([]byte, 256<<10)
			began, bytesRead := cpu(b), int64(0)
			for b.Loop() {
				r, err := open(bytes.NewReader(raw))
				if err != nil {
					b.Fatal(err)
				}
				n, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{r}, buf)
				if err != nil {
					b.Fatal(err)
				}
				bytesRead += n
			}
			b.ReportMetric(float64(bytesRead)/1e6/(cpu(b)-began), "MB/cpu-s") // a machine may be busy
		})
	}
}

// cpu is the processor time that the process has used, in seconds.
func cpu(b *testing.B) float64 {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return float64(u.Utime.Nano()+u.Stime.Nano()) / 1e9
}
