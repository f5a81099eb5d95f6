package layer

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: chown, mknod and trusted.* attributes")
	}
}

// entry is a tar header with its contents.
type entry struct {
	tar.Header
	body string
}

func file(name, body string) entry {
	return entry{tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, ModTime: time.Unix(1e9, 5)}, body}
}

func dir(name string, mode int64) entry {
	return entry{tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: mode, ModTime: time.Unix(1e9, 0)}, ""}
}

func symlink(name, to string) entry {
	return entry{tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: to, Mode: 0o777, ModTime: time.Unix(1e9, 0)}, ""}
}

func hardlink(name, to string) entry {
	return entry{tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: to}, ""}
}

func with(e entry, f func(h *tar.Header)) entry {
	f(&e.Header)
	return e
}

func mustTar(t testing.TB, entries ...entry) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		h := e.Header
		h.Size = int64(len(e.body))
		if !h.ModTime.IsZero() && h.ModTime.Nanosecond() != 0 || h.PAXRecords != nil {
			h.Format = tar.FormatPAX
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatalf("tar %s: %v", h.Name, err)
		}
		if _, err := io.WriteString(w, e.body); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// describe lists a tree, one line an inode: mode, owner, device or size, name, link.
func describe(t testing.TB, root string) []string {
	t.Helper()
	var out []string
	err := filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err != nil {
			return err
		}
		rel, _ := filepath.Rel(root, p)
		line := fmt.Sprintf("%06o %d:%d %s", st.Mode, st.Uid, st.Gid, rel)
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			b, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			line += fmt.Sprintf(" %d links %x", st.Nlink, sha256.Sum256(b))[:24]
		case unix.S_IFLNK:
			to, _ := os.Readlink(p)
			line += " -> " + to
		case unix.S_IFCHR, unix.S_IFBLK:
			line += fmt.Sprintf(" dev %d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))
		case unix.S_IFDIR:
			if xattr(p, opaqueXattr) == "y" {
				line += " opaque"
			}
		}
		out = append(out, line)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func xattr(p, name string) string {
	b := make([]byte, 1024)
	n, err := unix.Lgetxattr(p, name, b)
	if err != nil {
		return ""
	}
	return string(b[:n])
}

func mustApply(t testing.TB, entries ...entry) (string, Result) {
	t.Helper()
	root := t.TempDir()
	res, err := ApplyDir(context.Background(), root, bytes.NewReader(mustTar(t, entries...)), Options{})
	if err != nil {
		t.Fatal(err)
	}
	return root, res
}

func TestApplyTrees(t *testing.T) {
	needRoot(t)
	owned := func(uid, gid int) func(*tar.Header) {
		return func(h *tar.Header) { h.Uid, h.Gid = uid, gid }
	}
	for _, tc := range []struct {
		name    string
		entries []entry
		want    []string // of describe, the root and hashes left out
		implied []string
	}{
		{"kinds", []entry{
			dir("d/", 0o2750), with(file("d/f", "x"), owned(1, 2)), symlink("d/l", "/etc/passwd"), hardlink("d/h", "d/f"),
			{tar.Header{Typeflag: tar.TypeChar, Name: "null", Mode: 0o666, Devmajor: 1, Devminor: 3}, ""},
			{tar.Header{Typeflag: tar.TypeBlock, Name: "blk", Mode: 0o660, Gid: 6, Devmajor: 259, Devminor: 70000}, ""},
			{tar.Header{Typeflag: tar.TypeFifo, Name: "fifo", Mode: 0o622}, ""},
			with(file("suid", "s"), func(h *tar.Header) { h.Mode, h.Uid = 0o4755, 7 }),
		}, []string{
			"060660 0:6 blk dev 259:70000", "042750 0:0 d", "100644 1:2 d/f 2 links", "100644 1:2 d/h 2 links",
			"120777 0:0 d/l -> /etc/passwd", "010622 0:0 fifo", "020666 0:0 null dev 1:3", "104755 7:0 suid 1 links",
		}, nil},
		{"names", []entry{file("/abs", ""), file("./dot", ""), file("a//b/./c", ""), dir(".", 0o755)},
			[]string{"040755 0:0 a", "040755 0:0 a/b", "100644 0:0 a/b/c 1 links", "100644 0:0 abs 1 links", "100644 0:0 dot 1 links"},
			[]string{"a", "a/b"}},
		{"listed after it was implied", []entry{file("a/b/c", ""), dir("a", 0o700)},
			[]string{"040700 0:0 a", "040755 0:0 a/b", "100644 0:0 a/b/c 1 links"}, []string{"a/b"}},
		{"setgid is not inherited", []entry{with(dir("m", 0o2775), owned(0, 8)), file("m/f", ""), dir("m/d", 0o755)},
			[]string{"042775 0:8 m", "040755 0:0 m/d", "100644 0:0 m/f 1 links"}, nil},
		{"long name", []entry{file(strings.Repeat("n", 150)+"/"+strings.Repeat("m", 200), "")},
			[]string{"040755 0:0 " + strings.Repeat("n", 150),
				"100644 0:0 " + strings.Repeat("n", 150) + "/" + strings.Repeat("m", 200) + " 1 links"}, []string{strings.Repeat("n", 150)}},
		{"whiteouts", []entry{dir("d", 0o755), file("d/.wh.gone", ""), file("d/.wh..wh..opq", ""), file(".wh.top", ""), file(".wh..wh.plnk", "")},
			[]string{"040755 0:0 d opaque", "020000 0:0 d/gone dev 0:0", "020000 0:0 top dev 0:0"}, nil},
		{"whiteout and the same name", []entry{
			file("f", ""), file(".wh.f", ""), dir("d", 0o755), file("d/in", ""), file(".wh.d", ""),
			file(".wh.g", ""), file("g", ""), file(".wh.e", ""), dir("e", 0o755), file(".wh.i", ""), file("i/in", ""),
		}, []string{"040755 0:0 d opaque", "100644 0:0 d/in 1 links", "040755 0:0 e opaque", "100644 0:0 f 1 links",
			"100644 0:0 g 1 links", "040755 0:0 i opaque", "100644 0:0 i/in 1 links"}, nil},
		{"replacing", []entry{
			dir("a", 0o755), dir("a/b", 0o755), file("a/b/c", ""), file("a", "now a file"), file("b", ""), dir("b", 0o711),
			symlink("l", "b"), dir("l", 0o700), file("l/in", ""), file("x", "1"), file("x", "2"), file("p", ""), file("p/q", ""),
		}, []string{"100644 0:0 a 1 links", "040711 0:0 b", "040700 0:0 l", "100644 0:0 l/in 1 links", "040755 0:0 p",
			"100644 0:0 p/q 1 links", "100644 0:0 x 1 links"}, []string{"p"}},
		{"removing what the last parent was", []entry{
			dir("real", 0o755), symlink("via", "real"), file("via/one", ""), file("real", "gone"), file("via2/x", ""), file("real", "again"),
		}, []string{"100644 0:0 real 1 links", "120777 0:0 via -> real", "040755 0:0 via2", "100644 0:0 via2/x 1 links"}, []string{"via2"}},
		{"links as parents", []entry{
			symlink("lib", "usr/lib"), file("lib/a", ""), symlink("abs", "/usr/share"), file("abs/b", ""), symlink("up", "../../../usr"), file("up/c", ""),
		}, []string{"120777 0:0 abs -> /usr/share", "120777 0:0 lib -> usr/lib", "120777 0:0 up -> ../../../usr", "040755 0:0 usr",
			"100644 0:0 usr/c 1 links", "040755 0:0 usr/lib", "100644 0:0 usr/lib/a 1 links", "040755 0:0 usr/share", "100644 0:0 usr/share/b 1 links"},
			[]string{"usr", "usr/lib", "usr/share"}},
		{"link to itself", []entry{file("f", "x"), hardlink("f", "f"), hardlink("./f", "/f"), symlink("d", "."), hardlink("d/f", "f")},
			[]string{"120777 0:0 d -> .", "100644 0:0 f 1 links"}, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			root, res := mustApply(t, tc.entries...)
			var got []string
			for _, l := range describe(t, root)[1:] {
				if i := strings.Index(l, "links "); i >= 0 {
					l = l[:i+5]
				}
				got = append(got, l)
			}
			if !slices.Equal(got, tc.want) {
				t.Errorf("tree:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(tc.want, "\n"))
			}
			if !slices.Equal(res.Implied, tc.implied) {
				t.Errorf("implied %q, want %q", res.Implied, tc.implied)
			}
			if res.Entries != int64(len(tc.entries)) {
				t.Errorf("%d entries, want %d", res.Entries, len(tc.entries))
			}
		})
	}
}

func TestApplyMetadata(t *testing.T) {
	needRoot(t)
	const capNetRaw = "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
	attrs := func(m map[string]string) func(h *tar.Header) {
		return func(h *tar.Header) {
			h.PAXRecords = map[string]string{}
			for k, v := range m {
				h.PAXRecords[xattrRecord+k] = v
			}
		}
	}
	root, res := mustApply(t,
		with(dir("d", 0o755), attrs(map[string]string{"user.d": "1", "trusted.overlay.opaque": "y", "trusted.overlay.redirect": "/etc"})),
		file("d/later", "changes the time of d"),
		with(file("ping", "elf"), func(h *tar.Header) {
			attrs(map[string]string{capabilityXattr: capNetRaw, "user.k": "v", "user.overlay.opaque": "y", "security.selinux": "x"})(h)
			h.Uid = 12
		}))
	for _, c := range [][3]string{
		{"d", "user.d", "1"}, {"d", "trusted.overlay.opaque", ""}, {"d", "trusted.overlay.redirect", ""},
		{"ping", capabilityXattr, capNetRaw}, {"ping", "user.k", "v"}, {"ping", "user.overlay.opaque", ""},
	} {
		if got := xattr(filepath.Join(root, c[0]), c[1]); got != c[2] {
			t.Errorf("%s of %s: %q, want %q", c[1], c[0], got, c[2])
		}
	}
	if res.DroppedXattrs != 4 {
		t.Errorf("%d attributes dropped, want 4", res.DroppedXattrs)
	}
	for name, want := range map[string]time.Time{"d": time.Unix(1e9, 0), "ping": time.Unix(1e9, 5)} {
		st, err := os.Stat(filepath.Join(root, name))
		if err != nil {
			t.Fatal(err)
		}
		if !st.ModTime().Equal(want) {
			t.Errorf("time of %s: %s, want %s", name, st.ModTime(), want)
		}
	}
}

// TestApplySparse reads a GNU sparse archive (PAX 1.0): 1 MiB of hole, then "data".
func TestApplySparse(t *testing.T) {
	needRoot(t)
	const size = 1<<20 + 4
	body := "1\n1048576\n4\n"
	body += strings.Repeat("\x00", 512-len(body)) + "data"
	raw := sparseTar(t, "s", size, body)
	root := t.TempDir()
	if _, err := ApplyDir(context.Background(), root, bytes.NewReader(raw), Options{}); err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(root, "s"), &st); err != nil {
		t.Fatal(err)
	}
	if st.Size != size || st.Blocks*512 > 512<<10 {
		t.Errorf("size %d with %d bytes on disk, want %d with a hole", st.Size, st.Blocks*512, size)
	}
	b, err := os.ReadFile(filepath.Join(root, "s"))
	if err != nil {
		t.Fatal(err)
	}
	if string(b[size-4:]) != "data" || !allZero(b[:size-4]) {
		t.Error("contents differ")
	}
	huge := sparseTar(t, "s", 1<<50, "1\n1125899906842620\n4\n"+strings.Repeat("\x00", 512-21)+"data")
	if _, err := ApplyDir(context.Background(), t.TempDir(), bytes.NewReader(huge), Options{MaxBytes: 1 << 30}); !errors.Is(err, ErrTooLarge) {
		t.Errorf("huge sparse file: %v, want ErrTooLarge", err)
	}
}

// sparseTar builds by hand what archive/tar reads and does not write.
func sparseTar(t *testing.T, name string, realSize int64, body string) []byte {
	t.Helper()
	var records string
	for _, kv := range [][2]string{{"GNU.sparse.major", "1"}, {"GNU.sparse.minor", "0"}, {"GNU.sparse.name", name}, {"GNU.sparse.realsize", fmt.Sprint(realSize)}} {
		rec := " " + kv[0] + "=" + kv[1] + "\n"
		n := len(rec) + 2
		if len(fmt.Sprint(n)) != 2 {
			t.Fatalf("record %q does not have a length of two digits", rec)
		}
		records += fmt.Sprint(n) + rec
	}
	var b bytes.Buffer
	for _, m := range []struct {
		flag byte
		body string
	}{{'x', records}, {'0', body}} {
		block := make([]byte, 512)
		copy(block, name)
		copy(block[100:], "0000644\x000000000\x000000000\x00"+fmt.Sprintf("%011o\x00%011o\x00", len(m.body), 0))
		copy(block[148:], "        ")
		block[156] = m.flag
		copy(block[257:], "ustar\x0000")
		sum := 0
		for _, c := range block {
			sum += int(c)
		}
		copy(block[148:], fmt.Sprintf("%06o\x00 ", sum))
		b.Write(block)
		b.WriteString(m.body)
		b.Write(make([]byte, (512-len(m.body)%512)%512))
	}
	b.Write(make([]byte, 1024))
	return b.Bytes()
}

func TestApplyLimits(t *testing.T) {
	needRoot(t)
	many := make([]entry, 50)
	for i := range many {
		many[i] = file(fmt.Sprintf("f%d", i), "")
	}
	deep := file(strings.Repeat("d/", 100)+"f", "")
	for _, tc := range []struct {
		name    string
		entries []entry
		opts    Options
		text    string
	}{
		{"bytes", []entry{file("a", "12345"), file("b", "123456")}, Options{MaxBytes: 10}, "10 bytes"},
		{"entries", many, Options{MaxEntries: 49}, "49 entries"},
		{"directories not listed", []entry{deep}, Options{MaxEntries: 99}, "99 directories"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := ApplyDir(context.Background(), t.TempDir(), bytes.NewReader(mustTar(t, tc.entries...)), tc.opts)
			if !errors.Is(err, ErrTooLarge) || !strings.Contains(err.Error(), tc.text) {
				t.Errorf("got %v, want ErrTooLarge with %q", err, tc.text)
			}
		})
	}
}

func TestApplyRefuses(t *testing.T) {
	needRoot(t)
	for _, tc := range []struct {
		name    string
		entries []entry
		want    error
	}{
		{"dotdot", []entry{file("../x", "")}, ErrUnsafe},
		{"dotdot inside", []entry{file("a/../x", "")}, ErrUnsafe},
		{"link target dotdot", []entry{file("x", ""), hardlink("y", "../x")}, ErrUnsafe},
		{"link to root", []entry{hardlink("y", "/")}, ErrUnsafe},
		{"root as file", []entry{file(".", "")}, ErrUnsafe},
		{"whiteout of nothing", []entry{file(".wh.", "")}, ErrUnsafe},
		{"whiteout of parent", []entry{file("a/.wh...", "")}, ErrUnsafe},
		{"owner -1", []entry{with(file("x", ""), func(h *tar.Header) { h.Uid = 1<<32 - 1 })}, ErrUnsafe},
		{"long name", []entry{file(strings.Repeat("d/", 2100)+"f", "")}, ErrUnsafe},
		{"type", []entry{{tar.Header{Typeflag: 'V', Name: "volume"}, ""}}, ErrUnsupported},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := ApplyDir(context.Background(), t.TempDir(), bytes.NewReader(mustTar(t, tc.entries...)), Options{})
			if !errors.Is(err, tc.want) {
				t.Errorf("got %v, want %v", err, tc.want)
			}
		})
	}
	whole := mustTar(t, file("f", strings.Repeat("x", 5000)))
	for _, n := range []int{100, 3000} { // in a header, in the contents
		if _, err := ApplyDir(context.Background(), t.TempDir(), bytes.NewReader(whole[:n]), Options{}); !errors.Is(err, ErrCorrupt) {
			t.Errorf("cut at %d: %v, want ErrCorrupt", n, err)
		}
	}
	ctx, cancel := context.WithCancelCause(context.Background())
	why := errors.New("why")
	cancel(why)
	if _, err := ApplyDir(ctx, t.TempDir(), bytes.NewReader(whole), Options{}); !errors.Is(err, why) {
		t.Errorf("cancelled: %v, want the cause", err)
	}
}

func TestAdoptDirs(t *testing.T) {
	needRoot(t)
	below, _ := mustApply(t, with(dir("tmp", 0o1777), func(h *tar.Header) {
		h.PAXRecords = map[string]string{xattrRecord + "user.k": "v"}
		h.Gid = 5
	}), dir("usr", 0o755), dir("usr/lib", 0o711), symlink("lib", "usr/lib"), file("plain", ""))
	root, res := mustApply(t, file("tmp/x", ""), file("lib/y", ""), file("plain/z", ""), file("new/w", ""))
	b, r := mustOpen(t, below), mustOpen(t, root)
	if err := AdoptDirs(b, r, res.Implied); err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, l := range describe(t, root)[1:] {
		if strings.HasPrefix(l, "04") {
			got = append(got, l)
		}
	}
	want := []string{"040755 0:0 lib", "040755 0:0 new", "040755 0:0 plain", "041777 0:5 tmp"}
	if !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	if v := xattr(filepath.Join(root, "tmp"), "user.k"); v != "v" {
		t.Errorf("attribute %q, want v", v)
	}
}

func mustOpen(t testing.TB, dir string) *os.File {
	t.Helper()
	f, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}
