package critest

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berthd/berth/test/stream"
)

var protocols = []string{stream.SPDY, stream.WebSocketV4, stream.WebSocketV5}

// halfClose are the protocols in which a client can end the input alone.
var halfClose = []string{stream.SPDY, stream.WebSocketV5}

// known skips a protocol that only berth is known to serve.
func (b *box) known(protocol string) {
	if protocol == stream.WebSocketV5 {
		b.ours()
	}
}

// with returns the container for a subtest.
func (c *container) with(t *testing.T) *container {
	return &container{pod: c.pod.with(t), id: c.id, cfg: c.cfg, log: c.log}
}

// session is an Exec or Attach with its output collected.
type session struct {
	*stream.Session
	b        *box
	out, err bytes.Buffer
	copies   sync.WaitGroup
	mu       sync.Mutex
}

func (c *container) execURL(o stream.Options, command ...string) string {
	c.Helper()
	r, err := c.client.Exec(c.ctx, &runtime.ExecRequest{ContainerId: c.id, Cmd: command, Stdin: o.Stdin, Stdout: o.Stdout, Stderr: o.Stderr, Tty: o.TTY})
	c.must(err)
	return r.Url
}

// stream begins an exec with the streams that a terminal's user would have.
func (c *container) stream(protocol string, tty bool, command ...string) *session {
	c.Helper()
	o := stream.Options{Stdin: true, Stdout: true, Stderr: !tty, TTY: tty}
	return c.session(protocol, c.execURL(o, command...), o)
}

func (c *container) attach(protocol string, o stream.Options) *session {
	c.Helper()
	r, err := c.client.Attach(c.ctx, &runtime.AttachRequest{ContainerId: c.id, Stdin: o.Stdin, Stdout: o.Stdout, Stderr: o.Stderr, Tty: o.TTY})
	c.must(err)
	return c.session(protocol, r.Url, o)
}

func (b *box) session(protocol, url string, o stream.Options) *session {
	b.Helper()
	st, err := stream.Dial(b.ctx, protocol, url, o)
	b.must(err)
	s := &session{Session: st, b: b}
	b.Cleanup(func() { st.Close() })
	collect := func(to *bytes.Buffer, from io.Reader) {
		buf := make([]byte, 32<<10)
		for {
			n, err := from.Read(buf)
			s.mu.Lock()
			to.Write(buf[:n])
			s.mu.Unlock()
			if err != nil {
				return
			}
		}
	}
	if o.Stdout {
		s.copies.Go(func() { collect(&s.out, st.Out) })
	}
	if o.Stderr {
		s.copies.Go(func() { collect(&s.err, st.Err) })
	}
	return s
}

// sees waits for text in the output.
func (s *session) sees(text string) {
	s.b.Helper()
	s.b.until(fmt.Sprintf("output with %q", text), func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return strings.Contains(s.out.String(), text)
	})
}

func (s *session) write(text string) {
	s.b.Helper()
	_, err := io.WriteString(s.In, text)
	s.b.must(err)
}

// wait returns how the session ended, with all output.
func (s *session) wait() (code int, out, errs string) {
	s.b.Helper()
	code, err := s.Wait()
	s.copies.Wait()
	s.b.must(err)
	return code, s.out.String(), s.err.String()
}

func TestStreamExec(t *testing.T) {
	b := open(t)
	c := b.pod().run(sh("sleep 300"), func(c *runtime.ContainerConfig) { c.WorkingDir = "/tmp" })
	for _, p := range protocols {
		t.Run(p, func(t *testing.T) {
			c := c.with(t)
			c.known(p)
			s := c.stream(p, false, "sh", "-c", "pwd; echo err >&2; exit 7")
			if code, out, errs := s.wait(); code != 7 || out != "/tmp\n" || errs != "err\n" {
				t.Errorf("code %d, stdout %q, stderr %q", code, out, errs)
			}
			s = c.stream(p, false, "sh", "-c", "read x; echo got $x")
			s.write("this\n")
			if code, out, _ := s.wait(); code != 0 || out != "got this\n" {
				t.Errorf("input: code %d, stdout %q", code, out)
			}
			s = c.stream(p, false, "sh", "-c", "kill -KILL $$")
			if code, _, _ := s.wait(); code != 137 {
				t.Errorf("killed: code %d, want 137", code)
			}
			s = c.stream(p, false, "/no/such/program")
			if _, err := s.Wait(); err == nil || !strings.Contains(err.Error(), "/no/such/program") {
				t.Errorf("no such program: %v", err)
			}
			s = c.session(p, c.execURL(stream.Options{Stdout: true}, "sh", "-c", "cat; echo out; echo lost >&2"), stream.Options{Stdout: true})
			if code, out, _ := s.wait(); code != 0 || out != "out\n" {
				t.Errorf("output only: code %d, stdout %q", code, out)
			}
		})
	}
	if text := c.text(); text != "" {
		t.Errorf("output of an exec is in the container's log: %q", text)
	}
}

// TestStreamExecBytes: what goes in comes out, to the last byte, and the end of
// the input goes through.
func TestStreamExecBytes(t *testing.T) {
	b := open(t)
	c := b.pod().run(sh("sleep 300"))
	for _, p := range halfClose {
		t.Run(p, func(t *testing.T) {
			c := c.with(t)
			b := c.box
			b.known(p)
			const size = 16 << 20
			o := stream.Options{Stdin: true, Stdout: true}
			st, err := stream.Dial(b.ctx, p, c.execURL(o, "cat"), o)
			b.must(err)
			defer st.Close()
			sent, got := sha256.New(), sha256.New()
			go func() {
				block := make([]byte, 30000)
				for left := size; left > 0; left -= len(block) {
					block = block[:min(left, len(block))]
					for i := range block {
						block[i] = byte(left>>8 + i*i)
					}
					sent.Write(block)
					if _, err := st.In.Write(block); err != nil {
						return
					}
				}
				st.In.Close()
			}()
			n, err := io.Copy(got, st.Out)
			code, e := st.Wait()
			if err != nil || e != nil || code != 0 || n != size || !bytes.Equal(sent.Sum(nil), got.Sum(nil)) {
				t.Errorf("%d of %d bytes, code %d, %v, %v", n, size, code, err, e)
			}
		})
	}
}

func TestStreamExecTerminal(t *testing.T) {
	b := open(t)
	c := b.pod().run(sh("sleep 300"))
	for _, p := range protocols {
		t.Run(p, func(t *testing.T) {
			c := c.with(t)
			b := c.box
			b.known(p)
			s := c.stream(p, true, "sh")
			b.must(s.Resize(101, 31))
			s.write("tty; stty size\n")
			s.sees("/dev/pts/")
			s.sees("31 101")
			b.must(s.Resize(77, 22))
			// The size travels on a way of its own.
			b.until("new size", func() bool {
				s.write("stty size\n")
				time.Sleep(50 * time.Millisecond)
				s.mu.Lock()
				defer s.mu.Unlock()
				return strings.Contains(s.out.String(), "22 77")
			})
			s.write("exit 3\n")
			if code, _, _ := s.wait(); code != 3 {
				t.Errorf("code %d, want 3", code)
			}
		})
	}
}

// TestStreamExecUser: a command that is not root may open its own streams.
func TestStreamExecUser(t *testing.T) {
	b := open(t)
	c := b.pod().run(sh("sleep 300"), security(func(s *runtime.LinuxContainerSecurityContext) { s.RunAsUser = &runtime.Int64Value{Value: 1234} }))
	s := c.stream(stream.SPDY, false, "sh", "-c", "id -u >/dev/stdout; echo err >/dev/stderr")
	if code, out, errs := s.wait(); code != 0 || out != "1234\n" || errs != "err\n" {
		t.Errorf("code %d, stdout %q, stderr %q", code, out, errs)
	}
}

// TestStreamExecClientGone: a command ends with its client.
func TestStreamExecClientGone(t *testing.T) {
	b := open(t)
	b.ours()
	c := b.pod().run(sh("sleep 300"))
	for _, p := range protocols {
		for _, tty := range []bool{false, true} {
			s := c.stream(p, tty, "sh", "-c", "echo up; trap '' HUP; sleep 4321; sleep 4321")
			s.sees("up")
			b.must(s.Close())
			b.until("end of the command", func() bool { return !strings.Contains(c.exec("ps", "-o", "args"), "sleep 4321") })
		}
	}
}

// TestStreamExecBackgroundChild: a child that keeps the output open holds the
// session up for a moment only, and nothing is lost of what the command wrote.
func TestStreamExecBackgroundChild(t *testing.T) {
	b := open(t)
	b.ours()
	c := b.pod().run(sh("sleep 300"))
	for range 10 {
		begin := time.Now()
		s := c.stream(stream.SPDY, false, "sh", "-c", "sleep 60 & seq 1 5000")
		code, out, _ := s.wait()
		if code != 0 || !strings.HasSuffix(out, "\n4999\n5000\n") {
			t.Errorf("code %d, output ends %q", code, out[max(0, len(out)-20):])
		}
		if d := time.Since(begin); d > 30*time.Second {
			t.Errorf("took %v", d)
		}
	}
}

// TestStreamUnread: a client that does not read holds up nothing but its own
// command: not the container, its log, other clients, or the stop.
func TestStreamUnread(t *testing.T) {
	b := open(t)
	c := b.pod().run([]string{"/guest", "lines", "0", "100"})
	o := stream.Options{Stdout: true}
	for _, p := range protocols {
		if p == stream.WebSocketV5 && b.node == nil {
			continue
		}
		unread, err := stream.Dial(b.ctx, p, c.execURL(o, "yes"), o)
		b.must(err)
		defer unread.Close()
	}
	r, err := c.client.Attach(c.ctx, &runtime.AttachRequest{ContainerId: c.id, Stdout: true})
	b.must(err)
	unread, err := stream.Dial(b.ctx, stream.SPDY, r.Url, o)
	b.must(err)
	defer unread.Close()
	reader := c.attach(stream.SPDY, o)
	reader.sees("line ")
	time.Sleep(time.Second)
	lines := strings.Count(c.text(), "\n")
	b.until("growing log", func() bool { return strings.Count(c.text(), "\n") >= lines+100 })
	if _, out, _ := c.stream(stream.SPDY, false, "echo", "hello").wait(); out != "hello\n" {
		t.Errorf("another exec: %q", out)
	}
	begin := time.Now()
	c.stop(1)
	if d := time.Since(begin); d > time.Minute {
		t.Errorf("stop took %v", d)
	}
	reader.wait()
}

// TestStreamAttachSlow: a client that falls far behind is cut off, and told so;
// the container and its log go on meanwhile.
func TestStreamAttachSlow(t *testing.T) {
	b := open(t)
	b.ours()
	const size = 60 << 20
	c := b.pod().run(sh(fmt.Sprintf("read x; /guest flood %d 64; exit 3", size)), func(c *runtime.ContainerConfig) { c.Stdin = true })
	o := stream.Options{Stdin: true, Stdout: true}
	r, err := c.client.Attach(c.ctx, &runtime.AttachRequest{ContainerId: c.id, Stdin: true, Stdout: true})
	b.must(err)
	slow, err := stream.Dial(b.ctx, stream.SPDY, r.Url, o)
	b.must(err)
	defer slow.Close()
	_, err = io.WriteString(slow.In, "\n")
	b.must(err)
	// A log that has grown past what the client, its connection and berthd hold tells
	// that it was cut off. It does not wait for the end: it has half a minute to learn why.
	for fi, err := os.Stat(c.log); err != nil || fi.Size() < size+size/4; fi, err = os.Stat(c.log) {
		b.must(b.ctx.Err())
		time.Sleep(10 * time.Millisecond)
	}
	n, _ := io.Copy(io.Discard, slow.Out)
	if _, err := slow.Wait(); err == nil || !strings.Contains(err.Error(), "too slowly") || n >= size {
		t.Errorf("after %d of %d bytes: %v, want to be told", n, size, err)
	}
	if st := c.wait(); st.ExitCode != 3 {
		t.Errorf("exit code %d, want 3", st.ExitCode)
	}
	if n := len(c.text()); n != size {
		t.Errorf("log has %d bytes of output, want %d", n, size)
	}
}

func TestStreamAttach(t *testing.T) {
	b := open(t)
	for _, p := range protocols {
		t.Run(p, func(t *testing.T) {
			b := b.with(t)
			b.known(p)
			c := b.pod().run(sh("echo early; while read x; do echo got $x; echo err $x >&2; [ $x = end ] && exit 5; done"), func(c *runtime.ContainerConfig) { c.Stdin = true })
			c.sees("early")
			all := stream.Options{Stdin: true, Stdout: true, Stderr: true}
			first, second := c.attach(p, all), c.attach(p, all)
			second.write("zero\n") // the answer tells that it is attached
			second.sees("got zero")
			first.write("one\n")
			first.sees("got one")
			b.must(first.Close())
			third := c.attach(p, all)
			third.write("two\n")
			third.sees("got two")
			third.write("end\n")
			_, out, errs := third.wait()
			if out != "got two\ngot end\n" || errs != "err two\nerr end\n" {
				t.Errorf("third client: stdout %q, stderr %q", out, errs)
			}
			if _, out, _ := second.wait(); out != "got zero\ngot one\ngot two\ngot end\n" {
				t.Errorf("second client: stdout %q", out)
			}
			if st := c.wait(); st.ExitCode != 5 {
				t.Errorf("exit code %d, want 5", st.ExitCode)
			}
			if text := c.text(); !strings.Contains(text, "early\ngot zero\n") || !strings.Contains(text, "err end\n") {
				t.Errorf("log %q", text)
			}
		})
	}
}

// TestStreamStdinOnce: the input ends with the first client that has it, by the
// end of its input or its connection.
func TestStreamStdinOnce(t *testing.T) {
	b := open(t)
	once := func(c *runtime.ContainerConfig) { c.Stdin, c.StdinOnce = true, true }
	o := stream.Options{Stdin: true, Stdout: true}
	for _, p := range halfClose {
		if p == stream.WebSocketV5 && b.node == nil {
			continue
		}
		c := b.pod().run(sh("cat; echo end"), once)
		s := c.attach(p, o)
		s.write("some\n")
		b.must(s.In.Close())
		if _, out, _ := s.wait(); out != "some\nend\n" {
			t.Errorf("%s: half closed: %q", p, out)
		}
		c.wait()
	}
	c := b.pod().run(sh("cat; echo end"), once)
	s := c.attach(stream.SPDY, o)
	s.write("some\n")
	s.sees("some")
	b.must(s.Close())
	if st := c.wait(); st.ExitCode != 0 || c.text() != "some\nend\n" {
		t.Errorf("connection closed: exit code %d, log %q", st.ExitCode, c.text())
	}
	// Without it the input goes on after a client.
	c = b.pod().run(sh("cat"), func(c *runtime.ContainerConfig) { c.Stdin = true })
	s = c.attach(stream.SPDY, o)
	s.write("some\n")
	s.sees("some")
	b.must(s.Close())
	s = c.attach(stream.SPDY, o)
	s.write("more\n")
	s.sees("more")
	if st := c.status(); st.State != running {
		t.Errorf("container is %v", st.State)
	}
}

func TestStreamAttachTerminal(t *testing.T) {
	b := open(t)
	c := b.pod().run([]string{"sh"}, func(c *runtime.ContainerConfig) { c.Stdin, c.Tty = true, true })
	s := c.attach(stream.SPDY, stream.Options{Stdin: true, Stdout: true, TTY: true})
	b.must(s.Resize(99, 33))
	b.until("size", func() bool {
		s.write("stty size\n")
		time.Sleep(50 * time.Millisecond)
		s.mu.Lock()
		defer s.mu.Unlock()
		return strings.Contains(s.out.String(), "33 99")
	})
	s.write("exit 4\n")
	s.wait()
	if st := c.wait(); st.ExitCode != 4 {
		t.Errorf("exit code %d, want 4", st.ExitCode)
	}
}

// TestStreamToken: a URL is good for one session.
func TestStreamToken(t *testing.T) {
	b := open(t)
	c := b.pod().run(sh("sleep 300"))
	o := stream.Options{Stdout: true}
	url := c.execURL(o, "echo", "once")
	if _, out, _ := c.session(stream.SPDY, url, o).wait(); out != "once\n" {
		t.Errorf("got %q", out)
	}
	for _, p := range protocols {
		if s, err := stream.Dial(b.ctx, p, url, o); err == nil {
			s.Close()
			t.Errorf("%s: used a second time", p)
		}
	}
	for _, bad := range []string{url[:len(url)-1], url[:strings.LastIndex(url, "/")], strings.Replace(c.execURL(o, "echo"), "/exec/", "/attach/", 1)} {
		if s, err := stream.Dial(b.ctx, stream.SPDY, bad, o); err == nil {
			s.Close()
			t.Errorf("URL %s was accepted", bad)
		}
	}
}

func TestStreamBadRequests(t *testing.T) {
	b := open(t)
	p := b.pod()
	c := p.run(sh("sleep 300"))
	ended := p.run(sh("exit 0"))
	ended.wait()
	exec := func(r *runtime.ExecRequest) error { _, err := b.client.Exec(b.ctx, r); return err }
	attach := func(r *runtime.AttachRequest) error { _, err := b.client.Attach(b.ctx, r); return err }
	forward := func(r *runtime.PortForwardRequest) error { _, err := b.client.PortForward(b.ctx, r); return err }
	cmd := []string{"true"}
	for _, x := range []struct {
		name string
		err  error
		code codes.Code
		ours bool
	}{
		{"exec: container_id", exec(&runtime.ExecRequest{Cmd: cmd, Stdout: true}), codes.InvalidArgument, true},
		{"exec: no stream", exec(&runtime.ExecRequest{ContainerId: c.id, Cmd: cmd}), codes.InvalidArgument, true},
		{"exec: tty and stderr", exec(&runtime.ExecRequest{ContainerId: c.id, Cmd: cmd, Tty: true, Stdout: true, Stderr: true}), codes.InvalidArgument, true},
		{"exec: cmd", exec(&runtime.ExecRequest{ContainerId: c.id, Stdout: true}), codes.InvalidArgument, true},
		{"exec: unknown", exec(&runtime.ExecRequest{ContainerId: "0123456789ab", Cmd: cmd, Stdout: true}), codes.NotFound, false},
		{"exec: exited", exec(&runtime.ExecRequest{ContainerId: ended.id, Cmd: cmd, Stdout: true}), codes.FailedPrecondition, true},
		{"attach: no stream", attach(&runtime.AttachRequest{ContainerId: c.id}), codes.InvalidArgument, true},
		{"attach: tty", attach(&runtime.AttachRequest{ContainerId: c.id, Stdout: true, Tty: true}), codes.InvalidArgument, true},
		{"attach: stdin", attach(&runtime.AttachRequest{ContainerId: c.id, Stdin: true}), codes.FailedPrecondition, true},
		{"attach: unknown", attach(&runtime.AttachRequest{ContainerId: "0123456789ab", Stdout: true}), codes.NotFound, false},
		{"attach: exited", attach(&runtime.AttachRequest{ContainerId: ended.id, Stdout: true}), codes.FailedPrecondition, true},
		{"forward: unknown", forward(&runtime.PortForwardRequest{PodSandboxId: "0123456789ab"}), codes.NotFound, false},
		{"forward: port", forward(&runtime.PortForwardRequest{PodSandboxId: p.id, Port: []int32{65536}}), codes.InvalidArgument, true},
	} {
		if x.err == nil {
			t.Errorf("%s: accepted", x.name)
		} else if !x.ours || b.node != nil {
			t.Run(x.name, func(t *testing.T) { b.with(t).refused(x.err, x.code) })
		}
	}
	p.stop()
	if err := forward(&runtime.PortForwardRequest{PodSandboxId: p.id, Port: []int32{80}}); err == nil {
		t.Error("forward to a stopped pod: accepted")
	}
}

// TestStreamManySessions: sessions at once do not disturb one another.
func TestStreamManySessions(t *testing.T) {
	b := open(t)
	c := b.pod().run(sh("sleep 300"))
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			p := protocols[i%2]
			s := c.stream(p, false, "sh", "-c", fmt.Sprintf("read x; echo $x %d; exit %d", i, i))
			s.write("number\n")
			if code, out, _ := s.wait(); code != i || out != fmt.Sprintf("number %d\n", i) {
				t.Errorf("session %d: code %d, output %q", i, code, out)
			}
		})
	}
	wg.Wait()
}

// TestStreamServer: what comes to the port without a URL is turned away.
func TestStreamServer(t *testing.T) {
	b := open(t)
	b.ours()
	c := b.pod().run(sh("sleep 300"))
	url := c.execURL(stream.Options{Stdout: true}, "true")
	if !strings.HasPrefix(url, "http://127.0.0.1:") {
		t.Errorf("URL %s, want the loopback address", url)
	}
	base := url[:strings.Index(url, "/exec/")]
	for _, path := range []string{"/", "/exec/", "/exec/x", "/portforward/x", "/metrics"} {
		ctx, cancel := context.WithTimeout(b.ctx, 5*time.Second)
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, base+path, nil)
		b.must(err)
		r, err := http.DefaultClient.Do(req)
		b.must(err)
		r.Body.Close()
		cancel()
		if r.StatusCode != http.StatusNotFound {
			t.Errorf("%s: HTTP %d, want 404", path, r.StatusCode)
		}
	}
}
