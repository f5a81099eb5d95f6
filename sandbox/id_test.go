package sandbox

import (
	"path/filepath"
	"testing"

	"github.com/berthd/berth/store"
)

// newID is an ID of the zero key.
func newID() string { return idKey{}.newID() }

// An ID is recognized by the key that made it, in the state directory that it was
// made in, and by no other.
func TestIDKey(t *testing.T) {
	path := filepath.Join(t.TempDir(), "book.db")
	st, err := store.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	key, err := openIDKey(st, "/a")
	if err != nil {
		t.Fatal(err)
	}
	id := key.newID()
	if !validID(id) || !key.made(id) {
		t.Errorf("%q is no ID, or not recognized", id)
	}
	again, err := openIDKey(st, "/a")
	if err != nil || !again.made(id) {
		t.Errorf("with the key of the book: %v, not recognized", err)
	}
	if copied, err := openIDKey(st, "/b"); err != nil || copied.made(id) {
		t.Errorf("in another state directory: %v, recognized", err)
	}
	if cloned := (idKey{secret: key.secret, stateDir: key.stateDir, node: "another machine"}); cloned.made(id) {
		t.Error("on a clone of the machine: recognized")
	}
	flip := func(i int) string {
		b := []byte(id)
		if b[i]++; b[i] > 'f' || b[i] > '9' && b[i] < 'a' {
			b[i] = '0'
		}
		return string(b)
	}
	for name, other := range map[string]string{
		"random":      newID(),
		"first digit": flip(0),
		"last digit":  flip(63),
		"shorter":     id[:63],
		"empty":       "",
	} {
		if key.made(other) {
			t.Errorf("%s: %q is recognized", name, other)
		}
	}
	if err := st.Close(); err != nil {
		t.Fatal(err)
	}
	// A book that cannot be written, or has no key, is no reason to fail.
	read, err := store.Inspect(path)
	if err != nil {
		t.Fatal(err)
	}
	defer read.Close()
	if k, err := openIDKey(read, "/a"); err != nil || !k.made(id) {
		t.Errorf("book that is only read: %v", err)
	}
}

// The mark of a node stays, and a copy of the directory has another one.
func TestNodeMark(t *testing.T) {
	a, b := t.TempDir(), t.TempDir()
	if one, again := nodeMark(a), nodeMark(a); one != again {
		t.Errorf("%q, then %q", one, again)
	}
	if one, two := nodeMark(a), nodeMark(b); one == two {
		t.Errorf("two directories have the mark %q", one)
	}
}
