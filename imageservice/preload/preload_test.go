package preload

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"k8s.io/klog/v2"
	"k8s.io/klog/v2/textlogger"

	"github.com/berthd/berth/imageservice"
	"github.com/berthd/berth/store"
)

// shelf takes archives whose content is "image <id>".
type shelf struct {
	mu      sync.Mutex
	images  map[string]imageservice.Image
	imports []string
}

func (s *shelf) Import(_ context.Context, f *os.File, o imageservice.ImportOptions) ([]imageservice.Image, error) {
	name := f.Name()
	if st, err := f.Stat(); err == nil && st.IsDir() {
		name = filepath.Join(name, "index.json")
	}
	b, err := os.ReadFile(name)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.imports = append(s.imports, filepath.Base(f.Name()))
	id, ok := strings.CutPrefix(string(b), "image ")
	if !ok {
		return nil, fmt.Errorf("%w: %s", imageservice.ErrInvalidImage, b)
	}
	img := imageservice.Image{ID: id, Pinned: o.Pin}
	s.images[id] = img
	return []imageservice.Image{img}, nil
}

func (s *shelf) Get(ref string) (imageservice.Image, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	img, ok := s.images[ref]
	if !ok {
		return img, imageservice.ErrNotFound
	}
	return img, nil
}

// waitFor waits until as many imports have been tried.
func (s *shelf) waitFor(t *testing.T, want ...string) {
	t.Helper()
	var got []string
	for range 200 {
		s.mu.Lock()
		got = slices.Clone(s.imports)
		s.mu.Unlock()
		if len(got) >= len(want) {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	if !slices.Equal(got, want) {
		t.Fatalf("imports %q, want %q", got, want)
	}
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

var _ io.Writer = (*lockedBuffer)(nil)

func mustPut(t *testing.T, dir, name, text string) {
	t.Helper()
	p := filepath.Join(dir, name)
	if err := os.MkdirAll(filepath.Dir(p), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(p, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestPreload(t *testing.T) {
	dir := t.TempDir()
	mustPut(t, dir, "a.tar", "image a")
	mustPut(t, dir, "broken.tar.gz", "no image")
	mustPut(t, dir, "layout/index.json", "image l")
	mustPut(t, dir, ".hidden.tar", "image h")
	mustPut(t, dir, "README", "image r")
	mustPut(t, dir, "empty/x", "")
	book, err := store.Open(filepath.Join(t.TempDir(), "book.db"))
	if err != nil {
		t.Fatal(err)
	}
	defer book.Close()
	s, log := &shelf{images: map[string]imageservice.Image{}}, new(lockedBuffer)
	run := func() (stop func()) {
		ctx, cancel := context.WithCancel(klog.NewContext(context.Background(), textlogger.NewLogger(textlogger.NewConfig(textlogger.Output(log)))))
		done := make(chan error, 1)
		go func() { done <- New(dir, true, book, s).Run(ctx) }()
		return func() {
			cancel()
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
	}
	stop := run()
	s.waitFor(t, "a.tar", "broken.tar.gz", "layout")
	if img, err := s.Get("a"); err != nil || !img.Pinned {
		t.Errorf("image a: %+v, %v", img, err)
	}
	// What comes while it runs, with changes under way, is imported once.
	mustPut(t, dir, "b.tgz", "im")
	time.Sleep(quiet / 2)
	mustPut(t, dir, "b.tgz", "image b")
	s.waitFor(t, "a.tar", "broken.tar.gz", "layout", "b.tgz")
	// What is there is not imported again, what is broken neither, until it is mended.
	mustPut(t, dir, "broken.tar.gz", "image mended")
	s.waitFor(t, "a.tar", "broken.tar.gz", "layout", "b.tgz", "broken.tar.gz")
	time.Sleep(3 * quiet / 2)
	s.waitFor(t, "a.tar", "broken.tar.gz", "layout", "b.tgz", "broken.tar.gz")
	if n := strings.Count(log.String(), "Archive of images not imported"); n != 1 {
		t.Errorf("reported %d times, want once: %s", n, log.String())
	}
	stop()

	// After a restart only what is missing is read; a removed archive is forgotten.
	s.imports = nil
	delete(s.images, "l")
	if err := os.Remove(filepath.Join(dir, "b.tgz")); err != nil {
		t.Fatal(err)
	}
	stop = run()
	s.waitFor(t, "layout")
	stop()
	err = book.View(func(tx *store.Tx) error {
		return rows.Each(tx, func(name string, _ row) error {
			if name == "b.tgz" {
				t.Error("the row of a removed archive is still there")
			}
			return nil
		})
	})
	if err != nil {
		t.Error(err)
	}
}

// TestNoDirectory: it may come later.
func TestNoDirectory(t *testing.T) {
	book, err := store.Open(filepath.Join(t.TempDir(), "book.db"))
	if err != nil {
		t.Fatal(err)
	}
	defer book.Close()
	d := New(filepath.Join(t.TempDir(), "later"), false, book, &shelf{})
	if d.scan(context.Background()) || len(d.failed) != 0 {
		t.Errorf("a missing directory is a failure: %v", d.failed)
	}
}
