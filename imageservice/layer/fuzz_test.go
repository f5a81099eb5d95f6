package layer

import (
	"archive/tar"
	"bytes"
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// hostile are archives that try to reach something outside of the root.
func hostile(outside string) map[string][]entry {
	up := strings.Repeat("../", 20)
	return map[string][]entry{
		"dotdot":                   {file(up+outside+"/new", "")},
		"absolute":                 {file(outside+"/new", "")},
		"absolute link as parent":  {symlink("l", outside), file("l/new", ""), file("l/victim", "overwritten")},
		"relative link as parent":  {symlink("l", up+outside), file("l/new", "")},
		"link to a link":           {symlink("a", "/"), symlink("b", "a"+outside), file("b/victim", "overwritten")},
		"last component":           {symlink("v", outside+"/victim"), file("v", "overwritten")},
		"directory over link":      {symlink("v", outside), dir("v", 0o777), with(dir("v", 0o777), func(h *tar.Header) { h.Uid = 99 })},
		"metadata through link":    {dir("d", 0o755), with(dir("d", 0o700), func(h *tar.Header) { h.Uid = 9 }), symlink("d", outside)},
		"hardlink absolute":        {hardlink("h", outside+"/victim"), file("h", "overwritten")},
		"hardlink through link":    {symlink("l", outside), hardlink("h", "l/victim"), file("h", "overwritten")},
		"hardlink to link":         {symlink("l", outside+"/victim"), hardlink("h", "l"), file("h", "overwritten")},
		"hardlink dotdot":          {hardlink("h", up+outside+"/victim")},
		"whiteout through link":    {symlink("l", outside), file("l/.wh.victim", "")},
		"opaque through link":      {symlink("l", outside), file("l/.wh..wh..opq", "")},
		"whiteout dotdot":          {file(".wh..."+outside, ""), file(".wh...", "")},
		"remove through link":      {symlink("l", outside), dir("d", 0o755), file("d", ""), file("l", ""), dir("l", 0o755), file("l/victim", "")},
		"proc":                     {symlink("l", "/proc/self/root"+outside), file("l/new", ""), symlink("m", "/proc/self/cwd"), file("m/new", "")},
		"device":                   {{tar.Header{Typeflag: tar.TypeBlock, Name: "sda", Mode: 0o666, Devmajor: 8}, ""}, file("sda", "written to the disk?")},
		"fifo as file":             {{tar.Header{Typeflag: tar.TypeFifo, Name: "f", Mode: 0o666}, ""}, file("f", "must not block")},
		"fifo as parent":           {{tar.Header{Typeflag: tar.TypeFifo, Name: "f", Mode: 0o666}, ""}, file("f/x", "")},
		"link loop":                {symlink("a", "b"), symlink("b", "a"), file("a/x", ""), hardlink("c", "a/x")},
		"dangling link to the top": {symlink("a", "/"), symlink("b", "../../.."), file("a/x", ""), file("b/y", ""), file("a/a/a/b/b/z", "")},
		"root metadata":            {symlink(".", outside), dir("/", 0o4777), dir("./", 0o777)},
		"empty names":              {symlink("/", outside), symlink("//", outside), symlink("", outside), hardlink("./", outside+"/victim")},
		"hardlink to a directory":  {dir("d", 0o755), hardlink("h", "d"), file("h/x", ""), hardlink("r", "."), hardlink("o", outside)},
		"hardlink replaced":        {file("a", "1"), hardlink("b", "a"), symlink("a", outside+"/victim"), file("b", "2"), hardlink("c", "a"), file("c", "3")},
		"whiteouts of odd names": {file(".wh. ", ""), file(".wh..wh..wh.x", ""), file(".wh.\n", ""), file(".wh.\xff", ""), symlink(".wh.l", outside),
			dir(".wh.d", 0o755), file("d/.wh..wh..opq/x", ""), hardlink(".wh.h", "/victim"), file(".wh.l/victim", "overwritten")},
		"directory for a file":      {symlink("p", outside), dir("p", 0o755), file("p/victim", "inside"), file("p", ""), symlink("p", outside), file("p/victim", "out")},
		"file for a full directory": {dir("d", 0o755), symlink("d/l", outside), file("d/e/f/g", ""), file("d", "")},
		"devices": {{tar.Header{Typeflag: tar.TypeChar, Name: "c", Mode: 0o666, Devmajor: 1, Devminor: 1}, ""}, file("c/x", ""), hardlink("m", "c"), file("m", "x"),
			{tar.Header{Typeflag: tar.TypeChar, Name: "w", Mode: 0o666}, ""}, file("w/x", "")},
		"long link target":            {symlink("l", strings.Repeat("x", 5000)), file("l/x", "")},
		"names of 255 bytes and more": {file(strings.Repeat("n", 255), ""), file(strings.Repeat("n", 256), "")},
		"overlay attributes": {with(dir("d", 0o755), func(h *tar.Header) {
			h.PAXRecords = map[string]string{xattrRecord + "trusted.overlay.redirect": outside, xattrRecord + "trusted.overlay.metacopy": ""}
		})},
	}
}

// arena is a directory with a root to unpack into and things around it that must stay.
type arena struct{ top, root string }

func newArena(t testing.TB) arena {
	t.Helper()
	a := arena{top: t.TempDir()}
	a.root = filepath.Join(a.top, "layers", "root")
	for _, d := range []string{"outside/dir", "layers/root", "layers/other"} {
		if err := os.MkdirAll(filepath.Join(a.top, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, f := range []string{"outside/victim", "outside/dir/victim", "layers/other/victim"} {
		p := filepath.Join(a.top, f)
		if err := os.WriteFile(p, []byte("precious"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(p, time.Unix(1, 0), time.Unix(1, 0)); err != nil {
			t.Fatal(err)
		}
	}
	return a
}

// around describes all but what is below the root.
func (a arena) around(t testing.TB) []string {
	t.Helper()
	return slices.DeleteFunc(describe(t, a.top), func(l string) bool { return strings.Contains(l, " layers/root") })
}

func TestApplyHostile(t *testing.T) {
	needRoot(t)
	for name := range hostile("/x") {
		t.Run(name, func(t *testing.T) {
			a := newArena(t)
			before := a.around(t)
			raw := mustTar(t, hostile(filepath.Join(a.top, "outside"))[name]...)
			ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
			defer cancel()
			_, err := ApplyDir(ctx, a.root, bytes.NewReader(raw), Options{MaxBytes: 1 << 20, MaxEntries: 1000})
			if ctx.Err() != nil {
				t.Fatalf("took too long: %v", err)
			}
			if after := a.around(t); !slices.Equal(before, after) {
				t.Errorf("outside changed (error %v):\n%s\nwas:\n%s", err, strings.Join(after, "\n"), strings.Join(before, "\n"))
			}
		})
	}
}

// FuzzApply: whatever the archive, nothing outside of the root changes, what was made
// stays within the bounds, and is what the manifest says.
func FuzzApply(f *testing.F) {
	needRoot(f)
	for _, entries := range hostile("/outside") {
		f.Add(mustTar(f, entries...))
	}
	f.Add(mustTar(f, dir("d", 0o755), file("d/.wh.x", ""), file("d/.wh..wh..opq", ""), file("d/x", "1"), hardlink("y", "d/x")))
	f.Fuzz(func(t *testing.T, raw []byte) {
		a := newArena(t)
		before := a.around(t)
		const most = 1 << 20
		var manifest bytes.Buffer
		res, err := ApplyDir(context.Background(), a.root, bytes.NewReader(raw), Options{MaxBytes: most, MaxEntries: 200, Manifest: &manifest})
		if after := a.around(t); !slices.Equal(before, after) {
			t.Fatalf("outside changed (error %v):\n%s\nwas:\n%s", err, strings.Join(after, "\n"), strings.Join(before, "\n"))
		}
		if err == nil && res.Entries > 200 {
			t.Fatalf("%d entries in spite of the limit", res.Entries)
		}
		if err == nil {
			if _, got := mustVerify(t, a.root, manifest.Bytes(), VerifyOptions{Contents: true}); len(got) > 0 {
				t.Fatalf("just unpacked, and already different from its manifest: %q", got)
			}
		}
	})
}

// FuzzCleanName: a name is refused, or is a clean path below the root.
func FuzzCleanName(f *testing.F) {
	for _, s := range []string{"", ".", "/", "a/../b", "..", "a//b/", "./x", "\x00", "...", "a/..."} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		got, err := cleanName(s)
		if err != nil {
			return
		}
		if got != "" && !filepath.IsLocal(got) || filepath.Clean("/"+got) != "/"+got {
			t.Fatalf("%q became %q", s, got)
		}
	})
}
