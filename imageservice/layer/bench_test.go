package layer

import (
	"io"
	"os"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// BenchmarkPipeline unpacks the blob that BERTH_BENCH_BLOB names, verified and with a
// manifest, into a directory below BERTH_BENCH_DIR, or only reads it.
func BenchmarkPipeline(b *testing.B) {
	path := os.Getenv("BERTH_BENCH_BLOB")
	if path == "" {
		b.Skip("BERTH_BENCH_BLOB names no layer")
	}
	needRoot(b)
	blob := mustDescribe(b, path)
	for _, c := range strings.Fields("read unpack list+unpack") {
		for _, plain := range []bool{false, true} {
			name := c
			if plain {
				name += "/klauspost"
			}
			b.Run(name, func(b *testing.B) {
				blob.PlainGzip = plain
				var total int64
				began := cpuSeconds(b)
				for b.Loop() {
					total += pipeline(b, path, blob, c)
				}
				b.ReportMetric((cpuSeconds(b)-began)/float64(b.N), "cpu-s/op") // a machine may be busy
				b.ReportMetric(float64(total)/1e6/(cpuSeconds(b)-began), "MB/cpu-s")
			})
		}
	}
}

func mustDescribe(b *testing.B, path string) Blob {
	b.Helper()
	raw, err := os.ReadFile(path)
	if err != nil {
		b.Fatal(err)
	}
	d := decompressor{src: strings.NewReader(string(raw))}
	sum := digest.SHA256.Digester()
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)
	for {
		n, err := d.Fill(*buf)
		sum.Hash().Write(chunk{buf: buf, n: n}.bytes())
		if err == io.EOF {
			return Blob{Digest: digest.FromBytes(raw), DiffID: sum.Digest(), Size: int64(len(raw))}
		}
		if err != nil {
			b.Fatal(err)
		}
	}
}

func pipeline(b *testing.B, path string, blob Blob, what string) (n int64) {
	f, err := os.Open(path)
	if err != nil {
		b.Fatal(err)
	}
	s, err := Open(f, blob)
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	if what == "read" {
		for {
			c, err := s.Chunk()
			if err == io.EOF {
				return n
			}
			if err != nil {
				b.Fatal(err)
			}
			n += int64(len(c))
		}
	}
	b.StopTimer()
	dir, err := os.MkdirTemp(os.Getenv("BERTH_BENCH_DIR"), "bench-")
	if err != nil {
		b.Fatal(err)
	}
	b.StartTimer()
	var opts Options
	if what != "unpack" {
		opts.Manifest = io.Discard
	}
	res, err := ApplyDir(b.Context(), dir, s, opts)
	if err != nil {
		b.Fatal(err)
	}
	b.StopTimer()
	os.RemoveAll(dir)
	b.StartTimer()
	return res.Size
}

func cpuSeconds(b *testing.B) float64 {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return float64(u.Utime.Nano()+u.Stime.Nano()) / 1e9
}
