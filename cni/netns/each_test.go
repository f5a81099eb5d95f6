package netns

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

// TestEach: every pin is visited once, inside; what has no pin is left out, and
// no thread is left in a namespace.
func TestEach(t *testing.T) {
	p := mustPins(t)
	for _, id := range []string{"a", "b"} {
		if err := p.Create(t.Context(), id, []Kind{Net}, nil); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.MkdirAll(filepath.Dir(p.Path("file", Net)), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(p.Path("file", Net), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	var seen []string
	err := p.Each([]string{"absent", "a", "file", "b"}, Net, func(id string) {
		here, err := os.Stat("/proc/thread-self/ns/net")
		there, err2 := os.Stat(p.Path(id, Net))
		if err != nil || err2 != nil || !os.SameFile(here, there) {
			t.Errorf("%s: not inside: %v, %v", id, err, err2)
		}
		seen = append(seen, id)
	})
	if err != nil || !slices.Equal(seen, []string{"a", "b"}) {
		t.Errorf("visited %q, %v", seen, err)
	}
	eventually(t, "threads back on the host", func() bool { return len(strayThreads(t)) == 0 })
	if err := p.Each([]string{"../a"}, Net, func(string) { t.Error("visited a path") }); !errors.Is(err, ErrID) {
		t.Errorf("path as an ID: %v", err)
	}
	if err := p.Each([]string{"a"}, "mnt", func(string) { t.Error("visited a mount namespace") }); !errors.Is(err, ErrKind) {
		t.Errorf("unknown kind: %v", err)
	}
	if err := p.Each(nil, Net, nil); err != nil {
		t.Errorf("none: %v", err)
	}
}

func BenchmarkEach(b *testing.B) {
	if os.Geteuid() != 0 {
		b.Skip("needs root: namespaces and mounts")
	}
	root := b.TempDir()
	p, err := NewPins(root)
	if err != nil {
		b.Fatal(err)
	}
	var ids []string
	for i := range 20 {
		id := fmt.Sprint(i)
		if err := p.Create(b.Context(), id, []Kind{Net}, LoopbackUp); err != nil {
			b.Fatal(err)
		}
		defer p.Destroy(id)
		ids = append(ids, id)
	}
	for b.Loop() {
		if err := p.Each(ids, Net, func(string) {
			if _, err := os.ReadFile("/proc/thread-self/net/dev"); err != nil {
				b.Error(err)
			}
		}); err != nil {
			b.Fatal(err)
		}
	}
}
