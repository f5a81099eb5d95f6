package shim_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berthd/berth/shim"
)

// pipeFor returns a pipe, of which the end that goes to the shim is blocking.
func pipeFor(t testing.TB) (r, w *os.File) {
	t.Helper()
	r, w, err := os.Pipe()
	mustT(t, err)
	t.Cleanup(func() { r.Close(); w.Close() })
	return r, w
}

// A session is a streaming exec under way.
type session struct {
	in       *os.File
	out, err *os.File
	started  chan struct{}
	done     chan sessionEnd
}

type sessionEnd struct {
	code int
	err  error
}

func (c *container) stream(ctx context.Context, args ...string) *session {
	c.t.Helper()
	process, err := json.Marshal(processOf(args...))
	mustT(c.t, err)
	s := &session{started: make(chan struct{}), done: make(chan sessionEnd, 1)}
	var r shim.StreamRequest
	r.Process = process
	r.Stdio[0], s.in = pipeFor(c.t)
	s.out, r.Stdio[1] = pipeFor(c.t)
	s.err, r.Stdio[2] = pipeFor(c.t)
	go func() {
		code, err := c.c.ExecStream(ctx, r, func() { close(s.started) })
		s.done <- sessionEnd{code, err}
	}()
	return s
}

func TestExecStream(t *testing.T) {
	c := newContainer(t, "/bin/sleep", "1000").run()
	s := c.stream(ctxFor(t, time.Minute), "sh", "-c", "echo err >&2; cat; exit 7")
	<-s.started
	if _, err := s.in.Write([]byte("hello\n")); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 6)
	if _, err := io.ReadFull(s.out, b); err != nil || string(b) != "hello\n" {
		t.Errorf("while it runs: %q, %v", b, err)
	}
	s.in.Close() // half of it: what comes back is still read
	out, err := io.ReadAll(s.out)
	mustT(t, err)
	text, err := io.ReadAll(s.err)
	mustT(t, err)
	if end := <-s.done; end.err != nil || end.code != 7 || len(out) != 0 || string(text) != "err\n" {
		t.Errorf("got %+v, stdout %q, stderr %q", end, out, text)
	}
}

// What goes through a process comes back byte for byte.
func TestExecStreamBytes(t *testing.T) {
	const size = 64 << 20
	c := newContainer(t, "/bin/sleep", "1000").run()
	s := c.stream(ctxFor(t, time.Minute), "cat")
	sent, got := sha256.New(), sha256.New()
	go func() {
		defer s.in.Close()
		block := make([]byte, 1<<20)
		for i := 0; i < size; i += len(block) {
			for j := range block {
				block[j] = byte(i>>20 + j*7)
			}
			sent.Write(block)
			if _, err := s.in.Write(block); err != nil {
				return
			}
		}
	}()
	n, err := io.Copy(got, s.out)
	end := <-s.done
	if err != nil || n != size || end.err != nil || end.code != 0 || !bytes.Equal(sent.Sum(nil), got.Sum(nil)) {
		t.Errorf("%d of %d bytes, equal %v, %+v, %v", n, size, bytes.Equal(sent.Sum(nil), got.Sum(nil)), end, err)
	}
}

// The answer comes with the end of the process, though a child of it goes on.
func TestExecStreamBackgroundChild(t *testing.T) {
	c := newContainer(t, "/bin/sleep", "1000").run()
	began := time.Now()
	s := c.stream(ctxFor(t, time.Minute), "sh", "-c", "sleep 100 & echo out")
	if end := <-s.done; end.err != nil || end.code != 0 {
		t.Errorf("got %+v", end)
	}
	if d := time.Since(began); d > 5*time.Second {
		t.Errorf("took %v", d)
	}
	b := make([]byte, 4)
	if _, err := io.ReadFull(s.out, b); err != nil || string(b) != "out\n" {
		t.Errorf("output %q, %v", b, err)
	}
}

func TestExecStreamFails(t *testing.T) {
	c := newContainer(t, "/bin/sleep", "1000")
	mustT(t, c.create())
	if end := <-c.stream(ctxFor(t, time.Minute), "true").done; !errors.Is(end.err, shim.ErrState) {
		t.Errorf("before the start: %v, want ErrState", end.err)
	}
	mustT(t, c.c.Start(ctxFor(t, time.Minute)))
	s := c.stream(ctxFor(t, time.Minute), "/bin/nothing")
	if end := <-s.done; !errors.Is(end.err, shim.ErrRuntime) || !strings.Contains(end.err.Error(), "/bin/nothing") {
		t.Errorf("no such executable: %v, want ErrRuntime", end.err)
	}
	select {
	case <-s.started:
		t.Error("started was called")
	default:
	}
	if _, err := c.c.ExecStream(ctxFor(t, time.Minute), shim.StreamRequest{}, nil); !errors.Is(err, shim.ErrInvalid) {
		t.Errorf("no process: %v, want ErrInvalid", err)
	}
}

// A process whose caller has gone is killed with what it started.
func TestExecStreamAbandoned(t *testing.T) {
	c := newContainer(t, "/bin/sleep", "1000").run()
	command := []string{"sh", "-c", "trap '' HUP PIPE; sleep 300 & sleep 301; sleep 302"}
	gone := func() {
		t.Helper()
		waitFor(t, "the exec's end", func() bool {
			r, err := c.exec(shim0, "ps", "-o", "args")
			mustT(t, err)
			return !strings.Contains(string(r.Stdout), "sleep 30")
		})
	}
	ctx, cancel := context.WithCancel(context.Background())
	s := c.stream(ctx, command...)
	<-s.started
	cancel()
	if end := <-s.done; !errors.Is(end.err, context.Canceled) {
		t.Errorf("got %+v", end)
	}
	gone()
	s = c.stream(context.Background(), command...)
	<-s.started
	c.c.Close() // or died
	if end := <-s.done; !errors.Is(end.err, shim.ErrGone) {
		t.Errorf("got %+v", end)
	}
	var err error
	c.c, err = shim.Connect(ctxFor(t, time.Minute), c.l.Socket)
	mustT(t, err)
	gone()
}

// console listens for a pty, as berthd does.
func console(t testing.TB) (path string, master <-chan *os.File) {
	t.Helper()
	path = t.TempDir() + "/tty"
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	mustT(t, err)
	t.Cleanup(func() { l.Close() })
	ch := make(chan *os.File, 1)
	go func() {
		conn, err := l.AcceptUnix()
		if err != nil {
			return
		}
		defer conn.Close()
		oob := make([]byte, 64)
		_, n, _, _, err := conn.ReadMsgUnix(make([]byte, 64), oob)
		if err != nil {
			return
		}
		m, err := unix.ParseSocketControlMessage(oob[:n])
		if err != nil || len(m) == 0 {
			return
		}
		if fds, err := unix.ParseUnixRights(&m[0]); err == nil {
			unix.SetNonblock(fds[0], true)
			ch <- os.NewFile(uintptr(fds[0]), "pty")
		}
	}()
	return path, ch
}

func TestExecStreamTerminal(t *testing.T) {
	c := newContainer(t, "/bin/sleep", "1000").run()
	p := processOf("sh", "-c", "stty size; read x; stty size; echo got $x; exit 3")
	p["terminal"] = true
	process, err := json.Marshal(p)
	mustT(t, err)
	path, master := console(t)
	done := make(chan sessionEnd, 1)
	go func() {
		code, err := c.c.ExecStream(ctxFor(t, time.Minute), shim.StreamRequest{Process: process, Console: path}, nil)
		done <- sessionEnd{code, err}
	}()
	var tty *os.File
	select {
	case tty = <-master:
	case end := <-done:
		t.Fatalf("ended: %+v", end)
	}
	defer tty.Close()
	mustT(t, unix.IoctlSetWinsize(int(tty.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: 33, Col: 111}))
	mustT(t, unix.SetNonblock(int(tty.Fd()), true))
	_, err = tty.Write([]byte("in\n"))
	mustT(t, err)
	if end := <-done; end.err != nil || end.code != 3 {
		t.Errorf("got %+v", end)
	}
	out, _ := io.ReadAll(tty) // a pty ends with EIO
	if s := string(out); !strings.Contains(s, "33 111\r\n") || !strings.Contains(s, "got in\r\n") {
		t.Errorf("output %q", out)
	}
}

// attached is one client of a container's output.
type attached struct {
	out, err *os.File
	done     chan error
}

func (c *container) attach(ctx context.Context, r shim.AttachRequest, stdout, stderr bool) *attached {
	c.t.Helper()
	a := &attached{done: make(chan error, 1)}
	if stdout {
		a.out, r.Stdout = pipeFor(c.t)
	}
	if stderr {
		a.err, r.Stderr = pipeFor(c.t)
	}
	began := make(chan struct{})
	go func() { a.done <- c.c.Attach(ctx, r, func() { close(began) }) }()
	select {
	case <-began:
	case err := <-a.done:
		c.t.Fatalf("attach: %v", err)
	}
	return a
}

// Every client gets all output from its attachment on, and the log gets it too.
func TestAttach(t *testing.T) {
	c := newContainer(t, "/bin/sh", "-c", "echo early; read x; seq 1 50000; echo err >&2; read x; echo late; exit 4")
	c.l.Stdin = true
	c.run()
	waitFor(t, "the early output", func() bool { return strings.Contains(c.log(), "early") })
	ctx := ctxFor(t, time.Minute)
	var clients []*attached
	for range 3 {
		clients = append(clients, c.attach(ctx, shim.AttachRequest{}, true, true))
	}
	mustT(t, c.c.WriteStdin(ctx, []byte("\n"), false))
	var want strings.Builder
	for i := 1; i <= 50000; i++ {
		fmt.Fprintln(&want, i)
	}
	outs := make(chan string)
	for _, a := range clients {
		go func() {
			b, _ := io.ReadAll(a.out)
			e, _ := io.ReadAll(a.err)
			outs <- string(b) + string(e)
		}()
	}
	waitFor(t, "the output", func() bool { return strings.Contains(c.log(), "err") })
	mustT(t, c.c.WriteStdin(ctx, []byte("\n"), false))
	for _, a := range clients {
		if got := <-outs; got != want.String()+"late\nerr\n" {
			t.Errorf("%d bytes, want %d", len(got), want.Len()+9)
		}
		if err := <-a.done; err != nil {
			t.Error(err)
		}
	}
	if e := c.exit(); e.Code != 4 {
		t.Errorf("got %+v", e)
	}
	if got := output(t, c.log(), "stdout"); got != "early\n"+want.String()+"late\n" {
		t.Errorf("log has %d bytes", len(got))
	}
}

// A client that does not read is cut off, and nobody else notices.
func TestAttachSlowReader(t *testing.T) {
	c := newContainer(t, "/bin/sh", "-c", "read x; seq 1 300000; read x; echo end")
	c.l.Stdin = true
	c.run()
	ctx := ctxFor(t, time.Minute)
	slow := c.attach(ctx, shim.AttachRequest{}, true, true)
	good := c.attach(ctx, shim.AttachRequest{}, true, false)
	var want strings.Builder
	for i := 1; i <= 300000; i++ {
		fmt.Fprintln(&want, i)
	}
	got := make([]byte, want.Len())
	began := time.Now()
	read := make(chan error, 1)
	go func() { // it reads from the start, or it would be slow as well
		_, err := io.ReadFull(good.out, got)
		read <- err
	}()
	mustT(t, c.c.WriteStdin(ctx, []byte("\n"), false))
	if err := <-read; err != nil || string(got) != want.String() {
		t.Errorf("other client: %v", err)
	}
	if d := time.Since(began); d > 10*time.Second {
		t.Errorf("other client waited %v", d)
	}
	select {
	case err := <-slow.done:
		if !errors.Is(err, shim.ErrSlow) {
			t.Errorf("got %v, want ErrSlow", err)
		}
	case <-time.After(10 * time.Second):
		t.Error("slow client was not cut off")
	}
	mustT(t, c.c.WriteStdin(ctx, []byte("\n"), false))
	if e := c.exit(); e.Code != 0 {
		t.Errorf("got %+v", e)
	}
	if got := output(t, c.log(), "stdout"); got != want.String()+"end\n" {
		t.Errorf("log has %d bytes", len(got))
	}
}

// With StdinOnce the input ends with the first client that had it.
func TestAttachStdinOnce(t *testing.T) {
	for _, test := range []struct {
		name string
		once bool
		end  func(c *container, cancel func())
	}{
		{"cancelled", true, func(_ *container, cancel func()) { cancel() }},
		{"half closed", true, func(c *container, _ func()) { mustT(c.t, c.c.WriteStdin(ctxFor(c.t, time.Minute), nil, true)) }},
		{"kept", false, func(_ *container, cancel func()) { cancel() }},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := newContainer(t, "/bin/sh", "-c", "cat; echo end")
			c.l.Stdin, c.l.StdinOnce = true, test.once
			c.run()
			ctx, cancel := context.WithCancel(ctxFor(t, time.Minute))
			a := c.attach(ctx, shim.AttachRequest{Stdin: true}, true, false)
			mustT(t, c.c.WriteStdin(ctx, []byte("x\n"), false))
			b := make([]byte, 2)
			if _, err := io.ReadFull(a.out, b); err != nil || string(b) != "x\n" {
				t.Errorf("got %q, %v", b, err)
			}
			test.end(c, cancel)
			if test.once {
				if e := c.exit(); e.Code != 0 {
					t.Errorf("got %+v", e)
				}
				if got := output(t, c.log(), "stdout"); got != "x\nend\n" {
					t.Errorf("log %q", got)
				}
				return
			}
			<-a.done
			mustT(t, c.c.WriteStdin(ctxFor(t, time.Minute), []byte("y\n"), false))
			waitFor(t, "the second client's input", func() bool { return strings.Contains(c.log(), "y") })
		})
	}
}

func TestAttachTerminal(t *testing.T) {
	c := newContainer(t, "/bin/sh", "-c", "read x; stty size; read x; exit 6")
	c.l.Terminal, c.l.Stdin = true, true
	c.process["terminal"] = true
	c.run()
	ctx := ctxFor(t, time.Minute)
	if err := c.c.Attach(ctx, shim.AttachRequest{Stderr: os.NewFile(uintptr(mustDup(t)), "x")}, nil); !errors.Is(err, shim.ErrInvalid) {
		t.Errorf("stderr of a terminal: %v, want ErrInvalid", err)
	}
	a := c.attach(ctx, shim.AttachRequest{Stdin: true}, true, false)
	mustT(t, c.c.Resize(ctx, 123, 45))
	mustT(t, c.c.WriteStdin(ctx, []byte("\n"), false))
	var got []byte
	for b := make([]byte, 100); !bytes.Contains(got, []byte("45 123\r\n")); {
		n, err := a.out.Read(b)
		if err != nil {
			t.Fatalf("output %q, %v", got, err)
		}
		got = append(got, b[:n]...)
	}
	mustT(t, c.c.WriteStdin(ctx, []byte("\n"), false))
	if e := c.exit(); e.Code != 6 {
		t.Errorf("got %+v", e)
	}
	if err := <-a.done; err != nil {
		t.Error(err)
	}
}

func mustDup(t testing.TB) int {
	fd, err := unix.Dup(0)
	mustT(t, err)
	return fd
}

func TestAttachFails(t *testing.T) {
	c := newContainer(t, "/bin/sleep", "1000").run()
	ctx := ctxFor(t, time.Minute)
	if err := c.c.Attach(ctx, shim.AttachRequest{Stdin: true}, nil); !errors.Is(err, shim.ErrState) {
		t.Errorf("container without stdin: %v, want ErrState", err)
	}
	if err := c.c.Attach(ctx, shim.AttachRequest{}, nil); !errors.Is(err, shim.ErrInvalid) {
		t.Errorf("no stream: %v, want ErrInvalid", err)
	}
	if err := c.c.Resize(ctx, 1, 1); !errors.Is(err, shim.ErrState) {
		t.Errorf("resize without a terminal: %v, want ErrState", err)
	}
}

// Many sessions, each with a child that is left behind, leave nothing in the
// shim.
func TestManyStreams(t *testing.T) {
	c := newContainer(t, "/bin/sleep", "1000").run()
	run := func(n int) {
		for range n {
			s := c.stream(ctxFor(t, time.Minute), "sh", "-c", "sleep 1 & exit 5")
			if end := <-s.done; end.err != nil || end.code != 5 {
				t.Fatalf("got %+v", end)
			}
			s.in.Close()
			s.out.Close()
			s.err.Close()
			a := c.attach(ctxFor(t, time.Minute), shim.AttachRequest{}, true, true)
			a.out.Close()
			a.err.Close()
		}
	}
	run(16)
	c.c.Close() // ends the attachments
	var err error
	c.c, err = shim.Connect(ctxFor(t, time.Minute), c.l.Socket)
	mustT(t, err)
	before := descriptors(t, c.up.ShimPID)
	run(40)
	c.c.Close()
	c.c, err = shim.Connect(ctxFor(t, time.Minute), c.l.Socket)
	mustT(t, err)
	waitFor(t, "the descriptors' end", func() bool { return len(descriptors(t, c.up.ShimPID)) <= len(before) })
}
