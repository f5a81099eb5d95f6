package fuse

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// mount gives a test a file system.
func mount(t *testing.T) *FS {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: mounts a file system")
	}
	f, err := New(filepath.Join(t.TempDir(), "fuse"))
	if errors.Is(err, ErrNone) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func TestAnswers(t *testing.T) {
	f := mount(t)
	for path, dir := range map[string]bool{f.Dir: true, f.Volume(): true, f.File(): false} {
		if fi, err := os.Stat(path); err != nil || fi.IsDir() != dir {
			t.Errorf("%s: %v, %v", path, fi, err)
		}
	}
	if b, err := os.ReadFile(f.File()); err != nil || len(b) != 0 {
		t.Errorf("file: %q, %v; want it empty", b, err)
	}
	if _, err := os.Stat(filepath.Join(f.Dir, "other")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a file that is not there: %v", err)
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(f.Volume()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("after the end: %v", err)
	}
}

// TestHangs: who looks waits until the server answers again, or has ended.
func TestHangs(t *testing.T) {
	for name, end := range map[string]func(*FS) error{
		"answers again": func(f *FS) error { f.Resume(); return nil },
		"ends":          (*FS).Close,
	} {
		t.Run(name, func(t *testing.T) {
			f := mount(t)
			f.Hang()
			looked := make(chan error, 1)
			go func() {
				var st unix.Stat_t
				looked <- unix.Stat(f.Volume(), &st)
			}()
			for f.Waiting() == 0 {
				time.Sleep(time.Millisecond)
			}
			select {
			case err := <-looked:
				t.Fatalf("did not wait: %v", err)
			case <-time.After(50 * time.Millisecond):
			}
			if err := end(f); err != nil {
				t.Fatal(err)
			}
			if err := <-looked; (err == nil) != (name == "answers again") {
				t.Errorf("look: %v", err)
			}
			if name == "answers again" {
				if err := f.Close(); err != nil {
					t.Error(err)
				}
			}
		})
	}
}
