package layer

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
	"time"
)

// listing is what both readers make of an archive: a line for each entry, and the error.
type listing struct {
	lines []string
	err   error
}

func line(h *tar.Header, body []byte) string {
	records := slices.Sorted(maps.Keys(h.PAXRecords))
	return fmt.Sprintf("%c %q %q %o %d:%d %d %s %s %d:%d %q %x", h.Typeflag, h.Name, h.Linkname, h.Mode, h.Uid, h.Gid, h.Size,
		h.ModTime.UTC().Format(time.RFC3339Nano), h.AccessTime.UTC().Format(time.RFC3339Nano), h.Devmajor, h.Devminor, records, body)
}

const readMost = 1 << 16 // of an entry: a sparse file may be large

func listStd(raw []byte) (l listing) {
	r := tar.NewReader(bytes.NewReader(raw))
	for {
		h, err := r.Next()
		if err != nil {
			l.err = err
			return l
		}
		var body []byte
		if hasBody(h) {
			if body, err = io.ReadAll(io.LimitReader(r, readMost)); err != nil {
				l.err = err
				return l
			}
		}
		l.lines = append(l.lines, line(h, body))
	}
}

func hasBody(h *tar.Header) bool {
	return h.Typeflag == tar.TypeReg || h.Typeflag == tar.TypeCont || h.Typeflag == tar.TypeGNUSparse
}

func listOwn(r io.Reader, chunk int) (l listing) {
	a := archive{src: chunked{r, make([]byte, chunk)}, buf: make([]byte, 4096)}
	for {
		h, err := a.next()
		if err != nil {
			l.err = err
			return l
		}
		var body []byte
		for hasBody(h) && int64(len(body)) < min(h.Size, readMost) {
			b, err := a.some(min(h.Size, readMost) - int64(len(body)))
			body = append(body, b...)
			if err != nil {
				l.err = err
				return l
			}
		}
		l.lines = append(l.lines, line(h, body))
	}
}

func compareListings(t *testing.T, raw []byte) {
	t.Helper()
	want := listStd(raw)
	for _, chunk := range []int{1, 700, 1 << 16} {
		got := listOwn(bytes.NewReader(raw), chunk)
		if !slices.Equal(got.lines, want.lines) || (got.err == io.EOF) != (want.err == io.EOF) {
			t.Fatalf("chunks of %d: got %v\n%s\nwant %v\n%s", chunk, got.err, strings.Join(got.lines, "\n"), want.err, strings.Join(want.lines, "\n"))
		}
	}
}

// archives are all kinds of headers, and some that are wrong.
func archives(t testing.TB) map[string][]byte {
	out := map[string][]byte{
		"everything": mustTar(t, everything()...), "replaced": mustTar(t, replaced()...), "empty": mustTar(t), "none": {},
		"zeros": make([]byte, 512), "zeros and more": append(make([]byte, 1024), "trailing garbage"...),
	}
	entries := []tar.Header{
		{Typeflag: tar.TypeReg, Name: strings.Repeat("long/", 40) + "name", Mode: 0o644, Size: 3},
		{Typeflag: tar.TypeReg, Name: strings.Repeat("n", 99), Mode: 0o644, Size: 3},
		{Typeflag: tar.TypeReg, Name: strings.Repeat("p", 120) + "/in a prefix", Mode: 0o644, Size: 3},
		{Typeflag: tar.TypeReg, Name: "grüße", Mode: 0o7755, Size: 3, ModTime: time.Unix(1e9, 0)},
		{Typeflag: tar.TypeReg, Name: "ids", Uid: 1 << 22, Gid: 1 << 30, Size: 3, ModTime: time.Unix(1<<34, 0)},
		{Typeflag: tar.TypeSymlink, Name: "l", Linkname: strings.Repeat("t", 150)},
		{Typeflag: tar.TypeChar, Name: "c", Devmajor: 4, Devminor: 70000},
	}
	for _, f := range []tar.Format{tar.FormatUSTAR, tar.FormatPAX, tar.FormatGNU} {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		for _, h := range entries {
			h.Format = f
			if w.WriteHeader(&h) != nil {
				continue // not every format can say everything
			}
			if h.Size > 0 {
				io.WriteString(w, "abc")
			}
		}
		w.Close()
		out["format "+f.String()] = b.Bytes()
	}
	whole := func(h *tar.Header) { h.ModTime = time.Unix(1e9, 0) }
	plain := mustTar(t, with(file("f", strings.Repeat("x", 700)), whole), with(file("g", "y"), whole))
	for name, change := range map[string]func(b []byte){
		"checksum":         func(b []byte) { b[148] = '7' },
		"no octal":         func(b []byte) { b[124] = 'x'; fixChecksum(b) },
		"base-256 size":    func(b []byte) { copy(b[124:], "\x80\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\xbc"); fixChecksum(b) },
		"negative size":    func(b []byte) { copy(b[124:], "\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"); fixChecksum(b) },
		"spaces":           func(b []byte) { copy(b[124:], "       1274 "); fixChecksum(b) },
		"old":              func(b []byte) { clear(b[257:265]); fixChecksum(b) },
		"star":             func(b []byte) { copy(b[508:], "tar\x00"); fixChecksum(b) },
		"gnu":              func(b []byte) { copy(b[257:], "ustar  \x00"); fixChecksum(b) },
		"gnu times":        func(b []byte) { copy(b[257:], "ustar  \x0000"); copy(b[345:], "00000001234"); fixChecksum(b) },
		"type 0":           func(b []byte) { b[156] = 0; fixChecksum(b) },
		"type 0 directory": func(b []byte) { b[156] = 0; copy(b, "d/"); fixChecksum(b) },
		"type 7":           func(b []byte) { b[156] = '7'; fixChecksum(b) },
		"link with size":   func(b []byte) { b[156] = '1'; fixChecksum(b) },
		"dir with size":    func(b []byte) { b[156] = '5'; fixChecksum(b) },
		"unknown type":     func(b []byte) { b[156] = 'V'; fixChecksum(b) },
		"device numbers":   func(b []byte) { copy(b[329:], "12x"); fixChecksum(b) },
	} {
		c := bytes.Clone(plain)
		change(c)
		out[name] = c
	}
	return out
}

func fixChecksum(b []byte) { copy(b[148:], fmt.Sprintf("%06o\x00 ", checksum(b[:512]))) }

func TestArchiveLikeStandard(t *testing.T) {
	for name, raw := range archives(t) {
		t.Run(name, func(t *testing.T) {
			compareListings(t, raw)
			for _, n := range []int{1, 511, 513, 1000, 1300, len(raw) - 1} {
				if n >= 0 && n < len(raw) {
					compareListings(t, raw[:n])
				}
			}
		})
	}
	broken := fmt.Errorf("broken")
	raw := mustTar(t, file("f", strings.Repeat("x", 5000)))
	for _, n := range []int{100, 1000} {
		if got := listOwn(io.MultiReader(bytes.NewReader(raw[:n]), iotest.ErrReader(broken)), 512); got.err != broken {
			t.Errorf("error of the stream after %d bytes: %v", n, got.err)
		}
	}
}

// FuzzArchive compares with archive/tar: the same entries, and the end in the same place.
func FuzzArchive(f *testing.F) {
	for _, raw := range archives(f) {
		f.Add(raw, uint16(0), byte(0))
	}
	f.Fuzz(func(t *testing.T, raw []byte, at uint16, c byte) {
		compareListings(t, raw)
		if len(raw) >= 512 { // the same with a change in a header that is valid otherwise
			raw = bytes.Clone(raw)
			raw[int(at)%512] = c
			fixChecksum(raw)
			compareListings(t, raw)
		}
	})
}
