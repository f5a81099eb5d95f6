package layer

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// mustWriteBack writes a layer as an archive and unpacks that again; it returns the new
// directory and the archive.
func mustWriteBack(t testing.TB, root string, opaqueRoot bool) (string, []byte, Result) {
	t.Helper()
	var b bytes.Buffer
	if err := Write(context.Background(), mustOpen(t, root), &b, opaqueRoot); err != nil {
		t.Fatal(err)
	}
	again := t.TempDir()
	res, err := ApplyDir(context.Background(), again, bytes.NewReader(b.Bytes()), Options{})
	if err != nil {
		t.Fatal(err)
	}
	return again, b.Bytes(), res
}

// TestWrite: what is written from a layer makes the same layer, as its manifest says, and
// twice the same bytes.
func TestWrite(t *testing.T) {
	needRoot(t)
	for name, entries := range map[string][]entry{"everything": everything(), "replaced": replaced(), "nothing": nil} {
		for _, opaque := range []bool{false, true} {
			root, m := mustRecord(t, entries...)
			again, archive, res := mustWriteBack(t, root, opaque)
			if _, got := mustVerify(t, again, m, VerifyOptions{Contents: true}); len(got) > 0 {
				t.Errorf("%s: deviations %q", name, got)
			}
			if res.OpaqueRoot != opaque || len(res.Implied) > 0 {
				t.Errorf("%s: opaque root %v, want %v; implied %q", name, res.OpaqueRoot, opaque, res.Implied)
			}
			var b bytes.Buffer
			if err := Write(context.Background(), mustOpen(t, again), &b, opaque); err != nil || !bytes.Equal(b.Bytes(), archive) {
				t.Errorf("%s: %d bytes the second time, %v; want the same %d", name, b.Len(), err, len(archive))
			}
		}
	}
}

// TestWriteEnds: with the context, with the writer's error, and at a socket it goes on.
func TestWriteEnds(t *testing.T) {
	needRoot(t)
	root, _ := mustRecord(t, everything()...)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := Write(ctx, mustOpen(t, root), io.Discard, false); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer full.Close()
	if err := Write(context.Background(), mustOpen(t, root), full, false); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("to a full device: %v", err)
	}
	if err := unix.Mknod(root+"/socket", unix.S_IFSOCK|0o600, 0); err != nil {
		t.Fatal(err)
	}
	if again, _, _ := mustWriteBack(t, root, false); again != "" {
		if _, err := os.Lstat(again + "/socket"); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("a socket was written: %v", err)
		}
	}
}
