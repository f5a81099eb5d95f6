package wire

import (
	"bytes"
	"encoding/binary"
	"slices"
	"strings"
	"testing"
	"unsafe"
)

func mustImage(t testing.TB, m ExecImage) []byte {
	t.Helper()
	b, err := m.Append(nil)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func smallImage() ExecImage {
	adj, mask := -12, uint32(0o27)
	return ExecImage{
		Args: []string{"sh", "", "-c"}, Env: []string{"A=1", "B="}, Files: []string{"/bin/sh", "/usr/bin/sh"}, Dir: "/work",
		Keyring: "_ses.x", Cgroups: []string{"/a/cgroup.procs"}, OOMScoreAdj: &adj, UID: 1, GID: 4294967295,
		Groups: []uint32{3, 4, 5}, Rlimits: []Rlimit{{7, 8, 9}}, Bounding: 1, Effective: 2, Permitted: 3, Inheritable: 4, Ambient: 5,
		NoNewPrivs: true, Seccomp: true, SeccompFlags: 4, Umask: &mask,
	}
}

// words is b as the reader maps it.
func words(b []byte) []uint64 {
	w := make([]uint64, len(b)/8+1) // aligned, and holds all of b
	copy(unsafe.Slice((*byte)(unsafe.Pointer(&w[0])), len(w)*8), b)
	return w[:len(b)/8]
}

func TestImage(t *testing.T) {
	b := mustImage(t, smallImage())
	w := words(b)
	const base = 1 << 40
	if err := Relocate(w, len(b), base); err != nil {
		t.Fatal(err)
	}
	text := func(p uint64) string {
		s, _, ok := bytes.Cut(b[p-base:], []byte{0})
		if !ok {
			t.Fatalf("string at %d without an end", p-base)
		}
		return string(s)
	}
	table := func(word int) (list []string) {
		for i := (w[word] - base) / 8; w[i] != 0; i++ {
			list = append(list, text(w[i]))
		}
		return list
	}
	want := smallImage()
	for _, test := range []struct {
		word int
		want []string
	}{{WordArgs, want.Args}, {WordEnv, want.Env}, {WordFiles, want.Files}, {WordCgroups, want.Cgroups}} {
		if got := table(test.word); !slices.Equal(got, test.want) {
			t.Errorf("table %d: %q, want %q", test.word, got, test.want)
		}
	}
	if text(w[WordDir]) != "/work" || text(w[WordKeyring]) != "_ses.x" || text(w[WordOOM]) != "-12" {
		t.Errorf("texts: %q %q %q", text(w[WordDir]), text(w[WordKeyring]), text(w[WordOOM]))
	}
	groups := b[w[WordGroups]-base:][:12]
	if w[WordGroupCount] != 3 || binary.NativeEndian.Uint32(groups[8:]) != 5 {
		t.Errorf("%d groups: %x", w[WordGroupCount], groups)
	}
	if w[WordRlimitCount] != 1 || binary.NativeEndian.Uint64(b[w[WordRlimits]-base+16:]) != 9 {
		t.Error("rlimits")
	}
	if got := w[WordBounding : WordAmbient+1]; !slices.Equal(got, []uint64{1, 2, 3, 4, 5}) {
		t.Errorf("capabilities %v", got)
	}
	if w[WordFlags] != ImageNoNewPrivs|ImageSeccomp|ImageUmask || w[WordSeccompFlags] != 4 || w[WordUmask] != 0o27 ||
		w[WordUID] != 1 || w[WordGID] != 1<<32-1 {
		t.Errorf("header %v", w[:ImageWords])
	}
}

func TestImageLimits(t *testing.T) {
	tests := []struct {
		name   string
		change func(*ExecImage)
		want   error
	}{
		{"zero byte", func(m *ExecImage) { m.Args[1] = "a\x00b" }, ErrFrame},
		{"no arguments", func(m *ExecImage) { m.Args = nil }, ErrSize},
		{"no program", func(m *ExecImage) { m.Files = nil }, ErrSize},
		{"groups", func(m *ExecImage) { m.Groups = make([]uint32, maxImageGroups+1) }, ErrSize},
		{"rlimits", func(m *ExecImage) { m.Rlimits = make([]Rlimit, maxImageRlimits+1) }, ErrSize},
		{"size", func(m *ExecImage) { m.Env = []string{strings.Repeat("x", MaxImage)} }, ErrSize},
	}
	for _, test := range tests {
		m := smallImage()
		test.change(&m)
		if b, err := m.Append([]byte("kept")); err != test.want || string(b) != "kept" {
			t.Errorf("%s: %d bytes, %v; want %v", test.name, len(b), err, test.want)
		}
	}
}

// Whatever is in an image, what it points to after Relocate is inside of it.
func FuzzRelocate(f *testing.F) {
	good := mustImage(f, smallImage())
	f.Add(good)
	f.Add(mustImage(f, ExecImage{Args: []string{"a"}, Files: []string{"/a"}, Dir: "/"}))
	f.Add(good[:ImageWords*8])
	f.Fuzz(func(t *testing.T, b []byte) {
		w := words(b)
		if len(w) > WordSize {
			w[WordMagic], w[WordSize] = ImageMagic, uint64(len(b)) // else nothing is tried
		}
		const base = 1 << 40
		if Relocate(w, len(b), base) != nil {
			return
		}
		within := func(what int, p, n uint64) {
			if p < base+ImageWords*8 || p+n > base+uint64(len(b)) || p+n < p {
				t.Fatalf("word %d: %#x and %d bytes, of %d", what, p, n, len(b))
			}
		}
		for _, word := range []int{WordArgs, WordEnv, WordFiles, WordCgroups} {
			within(word, w[word], 8)
			for i := (w[word] - base) / 8; w[i] != 0; i++ {
				within(word, w[i], 1)
			}
		}
		within(WordDir, w[WordDir], 1)
		within(WordGroups, w[WordGroups], w[WordGroupCount]*4)
		within(WordRlimits, w[WordRlimits], w[WordRlimitCount]*24)
	})
}
