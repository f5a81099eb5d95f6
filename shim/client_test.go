package shim_test

import (
	"context"
	"errors"
	"net"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/berthd/berth/shim"
	"github.com/berthd/berth/shim/wire"
)

// listen answers each connection with what answer writes to it.
func listen(t *testing.T, answer func(net.Conn)) (socket string) {
	t.Helper()
	socket = filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	mustT(t, err)
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			c.Read(make([]byte, 64)) // the client's hello
			answer(c)
		}
	}()
	return socket
}

func hello(version, oldest uint64) []byte {
	var b wire.Builder
	wire.Hello{Version: version, Min: oldest, ShimPID: 1, ID: "x"}.Append(&b, 1)
	return b.Buf
}

func TestConnectVersions(t *testing.T) {
	tests := []struct {
		version, oldest uint64
		want            error
	}{
		{1, 1, nil},
		{3, 2, nil},
		{5, 1, nil}, // a later shim that still speaks version 1
		{5, 3, shim.ErrUnsupported},
		{0, 0, shim.ErrUnsupported},
	}
	for _, test := range tests {
		socket := listen(t, func(c net.Conn) { c.Write(hello(test.version, test.oldest)) })
		c, err := shim.Connect(ctxFor(t, 10*time.Second), socket)
		if !errors.Is(err, test.want) {
			t.Errorf("version %d, min %d: %v, want %v", test.version, test.oldest, err, test.want)
		}
		if err == nil {
			c.Close()
		}
	}
}

func TestConnectToSomethingElse(t *testing.T) {
	tests := map[string]func(net.Conn){
		"closes":      func(c net.Conn) { c.Close() },
		"large frame": func(c net.Conn) { c.Write([]byte{255, 255, 255, 255}) },
		"no frame":    func(c net.Conn) { c.Write([]byte("HTTP/1.1 400 Bad Request\r\n")) },
	}
	for name, answer := range tests {
		if _, err := shim.Connect(ctxFor(t, 10*time.Second), listen(t, answer)); !errors.Is(err, shim.ErrGone) {
			t.Errorf("%s: %v, want ErrGone", name, err)
		}
	}
	if _, err := shim.Connect(ctxFor(t, time.Second), t.TempDir()+"/none"); !errors.Is(err, shim.ErrGone) {
		t.Errorf("no socket: %v, want ErrGone", err)
	}
	long := t.TempDir() + strings.Repeat("/long", 40) + "/s"
	if _, err := shim.Connect(ctxFor(t, time.Second), long); !errors.Is(err, shim.ErrGone) {
		t.Errorf("no directory: %v, want ErrGone", err)
	}
}

// Reach needs nothing of the shim but that it lives.
func TestReach(t *testing.T) {
	silent := listen(t, func(net.Conn) {})
	r, err := shim.Reach(silent)
	mustT(t, err)
	if _, err := r.Client(ctxFor(t, 50*time.Millisecond)); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a shim that does not answer: %v, want DeadlineExceeded", err)
	}
	r, err = shim.Reach(silent)
	mustT(t, err)
	mustT(t, r.Close())
	r, err = shim.Reach(listen(t, func(c net.Conn) { c.Write(hello(1, 1)) }))
	mustT(t, err)
	c, err := r.Client(ctxFor(t, 10*time.Second))
	mustT(t, err)
	mustT(t, c.Close())
	for _, path := range []string{t.TempDir() + "/none", t.TempDir() + strings.Repeat("/long", 40) + "/s"} {
		if _, err := shim.Reach(path); !errors.Is(err, shim.ErrGone) {
			t.Errorf("%s: %v, want ErrGone", path, err)
		}
	}
	// The socket of a shim that was killed.
	dead := t.TempDir() + "/s"
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: dead})
	mustT(t, err)
	l.SetUnlinkOnClose(false)
	mustT(t, l.Close())
	if _, err := shim.Reach(dead); !errors.Is(err, shim.ErrGone) {
		t.Errorf("nobody listens: %v, want ErrGone", err)
	}
}

// A shim that does not answer holds a caller no longer than its context, and a
// closed client leaves no goroutine.
func TestDeadlines(t *testing.T) {
	before := runtime.NumGoroutine()
	silent := listen(t, func(net.Conn) {})
	if _, err := shim.Connect(ctxFor(t, 50*time.Millisecond), silent); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("connect: %v, want DeadlineExceeded", err)
	}
	c, err := shim.Connect(ctxFor(t, time.Second), listen(t, func(c net.Conn) { c.Write(hello(1, 1)) }))
	mustT(t, err)
	ctx := ctxFor(t, 50*time.Millisecond)
	if err := c.Start(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("start: %v, want DeadlineExceeded", err)
	}
	// More than the socket holds: the write itself has to end.
	for i := 0; i < 100 && err == nil; i++ {
		err = c.WriteStdin(ctxFor(t, 20*time.Millisecond), make([]byte, wire.MaxChunk), false)
		if errors.Is(err, context.DeadlineExceeded) {
			err = nil
		}
	}
	if !errors.Is(err, shim.ErrGone) {
		t.Errorf("full socket: %v, want ErrGone", err)
	}
	c.Close()
	c.Close()
	// Two listeners' goroutines remain until the test's end.
	waitFor(t, "the goroutines' end", func() bool { return runtime.NumGoroutine() <= before+2 })
}
