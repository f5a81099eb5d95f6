package cri

import (
	"bytes"
	"io"
	"net"
	"sync/atomic"
	"testing"
	"time"
)

// While a write waits, what the other side sends is taken in, within bounds, and
// is read in its order afterwards.
func TestAheadReader(t *testing.T) {
	here, there := net.Pipe()
	defer here.Close()
	defer there.Close()
	r := newAheadReader(here, here, new(atomic.Int64))
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
	eventually(t, "read ahead to the limit", func() bool {
		r.mu.Lock()
		defer r.mu.Unlock()
		return len(r.ahead) == minAhead
	})
	got, err := io.ReadAll(r)
	if err != nil || !bytes.Equal(got, sent) {
		t.Errorf("%d bytes, want %d, %v", len(got), len(sent), err)
	}
}

// eventually waits for something to come true.
func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !is(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("not so after 10 s: ", what)
		}
	}
}

// Without a write that waits nothing is read that nobody asked for.
func TestAheadReaderIdle(t *testing.T) {
	here, there := net.Pipe()
	defer here.Close()
	defer there.Close()
	r := newAheadReader(here, here, new(atomic.Int64))
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

// A reader that stops after the write has begun to wait is stood in for, too.
func TestAheadReaderStopsLater(t *testing.T) {
	here, there := net.Pipe()
	defer here.Close()
	defer there.Close()
	var all atomic.Int64
	r := newAheadReader(here, here, &all)
	go func() {
		defer r.writing()()
		here.Write([]byte("output")) // nobody reads it yet
	}()
	read := make(chan error, 1)
	go func() { _, err := r.Read(make([]byte, 8)); read <- err }()
	time.Sleep(3 * stuckAfter) // that read waits when the write is looked at
	for range 20 {
		there.SetWriteDeadline(time.Now().Add(10 * time.Second))
		if _, err := there.Write([]byte("12345678")); err != nil {
			t.Fatal("nothing is read ahead: ", err)
		}
	}
	if err := <-read; err != nil {
		t.Error(err)
	}
	eventually(t, "what was read ahead, and a further block, are counted", func() bool { return all.Load() == 19*8+aheadBlock })
	here.Close()
	r.end()
	eventually(t, "nothing is counted after the end", func() bool { return all.Load() == 0 })
	if _, err := r.Read(make([]byte, 8)); err == nil {
		t.Error("a read after the end has no error")
	}
}

// All sessions together have a bound.
func TestAheadReaderBound(t *testing.T) {
	here, there := net.Pipe()
	defer here.Close()
	defer there.Close()
	var all atomic.Int64
	all.Store(maxAhead - aheadBlock)
	r := newAheadReader(here, here, &all)
	go func() {
		defer r.writing()()
		here.Write([]byte("output"))
	}()
	block := make([]byte, aheadBlock)
	there.SetWriteDeadline(time.Now().Add(10 * time.Second))
	if _, err := there.Write(block); err != nil {
		t.Fatal("nothing is read ahead: ", err)
	}
	there.SetWriteDeadline(time.Now().Add(3 * stuckAfter))
	if _, err := there.Write(block); err == nil {
		t.Error("more is read ahead than all sessions may hold")
	}
}
