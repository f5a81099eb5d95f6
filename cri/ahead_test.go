package cri

import (
	"bytes"
	"io"
	"net"
	"testing"
	"time"
)

// While a write waits, what the other side sends is taken in, within bounds, and
// is read in its order afterwards.
func TestAheadReader(t *testing.T) {
	here, there := net.Pipe()
	defer here.Close()
	defer there.Close()
	r := newAheadReader(here, here)
	go func() {
		written := r.writing()
		here.Write([]byte("output")) // nobody reads it yet
		written()
	}()
	sent := make([]byte, minAhead+1<<20)
	for i := range sent {
		sent[i] = byte(i >> 8)
	}
	wrote := make(chan struct{})
	go func() {
		for b := sent; len(b) > 0; b = b[1<<16:] {
			there.Write(b[:1<<16])
			if len(b) == 1<<20+1<<16 {
				close(wrote) // all but the last MiB was taken
			}
		}
		there.Close()
	}()
	select {
	case <-wrote:
	case <-time.After(10 * time.Second):
		t.Fatal("nothing is read ahead")
	}
	time.Sleep(50 * time.Millisecond)
	r.mu.Lock()
	if n := len(r.ahead); n != minAhead {
		t.Errorf("%d bytes were read ahead, want %d", n, minAhead)
	}
	r.mu.Unlock()
	got, err := io.ReadAll(r)
	if err != nil || !bytes.Equal(got, sent) {
		t.Errorf("%d bytes, want %d, %v", len(got), len(sent), err)
	}
}

// Without a write that waits nothing is read that nobody asked for.
func TestAheadReaderIdle(t *testing.T) {
	here, there := net.Pipe()
	defer here.Close()
	defer there.Close()
	r := newAheadReader(here, here)
	go io.Copy(io.Discard, there)
	written := r.writing()
	if _, err := here.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	written()
	time.Sleep(2 * stuckAfter)
	there.SetWriteDeadline(time.Now().Add(50 * time.Millisecond))
	if _, err := there.Write([]byte("x")); err == nil {
		t.Error("input was taken in")
	}
}
