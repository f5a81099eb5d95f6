package cri

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berthd/berth/sandbox"
	"github.com/berthd/berth/test/stream"
)

// The fake's commands: "cat" copies its input, "size" prints the first size of
// its terminal, "exit" ends with code 7, "fail" cannot be started, "hang" goes on
// until its client has gone.
func (n *node) Exec(ctx context.Context, id string, cmd []string, s sandbox.Streams) (int, error) {
	switch cmd[0] {
	case "cat":
		_, err := io.Copy(s.Out, s.In)
		return 0, errors.Join(err, s.Out.Close())
	case "size":
		size := <-s.Resize
		_, err := fmt.Fprintf(s.Out, "%d x %d", size.Width, size.Height)
		return 0, errors.Join(err, s.Out.Close())
	case "exit":
		_, err := io.WriteString(s.Err, "sorry")
		return 7, err
	case "hang":
		n.begun <- true
		<-ctx.Done()
		n.hung <- ctx.Err()
		return 0, ctx.Err()
	}
	return 0, fmt.Errorf("container %s: no such command", id)
}

func (n *node) Attach(_ context.Context, _ string, s sandbox.Streams) error {
	_, err := io.WriteString(s.Out, "attached")
	return errors.Join(err, s.Out.Close())
}

func (n *node) PortForward(ctx context.Context, _ string, port int32, s io.ReadWriteCloser) error {
	if port == 1 {
		return errors.New("connection refused")
	}
	if port == 2 {
		n.begun <- true
		<-ctx.Done()
		n.hung <- ctx.Err()
		return nil
	}
	b := make([]byte, 4)
	if _, err := io.ReadFull(s, b); err != nil {
		return err
	}
	_, err := fmt.Fprintf(s, "%s from %d", b, port)
	return err
}

func (n *node) CheckExec(id string) error { return n.haveContainer(id) }

func (n *node) CheckAttach(id string, _, _ bool) error { return n.haveContainer(id) }

// mustStreams serves the sessions of an edge that has one container.
func mustStreams(t *testing.T, cfg StreamConfig, secure *tls.Config) (e *edge, pod, container string, stop func()) {
	t.Helper()
	e = mustEdge(t, newNode())
	e.server.streams.cfg = newStreamServer(e.server, cfg).cfg
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	if err := e.server.StreamsAt(l.Addr(), secure != nil); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- e.server.ServeStreams(ctx, l, secure) }()
	ended := false
	stop = func() {
		if ended {
			return
		}
		ended = true
		cancel()
		if err := <-served; err != nil {
			t.Errorf("ServeStreams: %v", err)
		}
	}
	t.Cleanup(stop)
	pod = mustRun(t, e)
	r, err := e.CreateContainer(t.Context(), createRequest(pod))
	if err != nil {
		t.Fatal(err)
	}
	return e, pod, r.GetContainerId(), stop
}

func (e *edge) execURL(t *testing.T, id string, tty bool, cmd ...string) string {
	t.Helper()
	r, err := e.Exec(t.Context(), &runtime.ExecRequest{ContainerId: id, Cmd: cmd, Stdin: true, Stdout: true, Stderr: !tty, Tty: tty})
	if err != nil {
		t.Fatal(err)
	}
	return r.GetUrl()
}

var protocols = []string{stream.SPDY, stream.WebSocketV4, stream.WebSocketV5}

func mustSession(t *testing.T, protocol, url string, tty bool) *stream.Session {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	s, err := stream.Dial(ctx, protocol, url, stream.Options{Stdin: true, Stdout: true, Stderr: !tty, TTY: tty})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func TestStreamExec(t *testing.T) {
	for _, secure := range []*tls.Config{nil, testTLS(t)} {
		e, _, id, _ := mustStreams(t, StreamConfig{}, secure)
		for _, p := range protocols {
			t.Run(fmt.Sprintf("%s TLS %t", p, secure != nil), func(t *testing.T) {
				s := mustSession(t, p, e.execURL(t, id, false, "exit"), false)
				go io.Copy(io.Discard, s.Out)
				text := make([]byte, 5)
				if _, err := io.ReadFull(s.Err, text); err != nil || string(text) != "sorry" {
					t.Errorf("stderr %q, %v", text, err)
				}
				go io.Copy(io.Discard, s.Err)
				if code, err := s.Wait(); err != nil || code != 7 {
					t.Errorf("code %d, %v; want 7", code, err)
				}
				s = mustSession(t, p, e.execURL(t, id, false, "fail"), false)
				go io.Copy(io.Discard, s.Out)
				go io.Copy(io.Discard, s.Err)
				if _, err := s.Wait(); err == nil || !strings.Contains(err.Error(), "no such command") {
					t.Errorf("got %v, want the error of the service", err)
				}
				s = mustSession(t, p, e.execURL(t, id, true, "size"), true)
				if err := s.Resize(123, 45); err != nil {
					t.Fatal(err)
				}
				out, err := io.ReadAll(s.Out)
				if code, e := s.Wait(); err != nil || e != nil || code != 0 || string(out) != "123 x 45" {
					t.Errorf("terminal: %q, code %d, %v, %v", out, code, err, e)
				}
			})
		}
	}
}

// The end of the input comes through, where the protocol knows it, and output
// that was written after it comes back.
func TestStreamHalfClose(t *testing.T) {
	e, _, id, _ := mustStreams(t, StreamConfig{}, nil)
	for _, p := range []string{stream.SPDY, stream.WebSocketV5} {
		s := mustSession(t, p, e.execURL(t, id, false, "cat"), false)
		go io.Copy(io.Discard, s.Err)
		want := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
		go func() {
			for b := want; len(b) > 0; b = b[1<<15:] {
				s.In.Write(b[:1<<15])
			}
			s.In.Close()
		}()
		got, err := io.ReadAll(s.Out)
		if code, e := s.Wait(); err != nil || e != nil || code != 0 || !bytes.Equal(got, want) {
			t.Errorf("%s: %d bytes, want %d; code %d, %v, %v", p, len(got), len(want), code, err, e)
		}
	}
}

// The context of a session ends with its client, though nothing is written.
func TestStreamClientGone(t *testing.T) {
	e, pod, id, stop := mustStreams(t, StreamConfig{}, nil)
	hung := func(what string) {
		t.Helper()
		select {
		case err := <-e.node.hung:
			if !errors.Is(err, context.Canceled) {
				t.Errorf("%s: %v", what, err)
			}
		case <-time.After(10 * time.Second):
			t.Fatalf("%s: the session goes on", what)
		}
	}
	// A client that goes before its command runs leaves nothing to end.
	begun := func() { <-e.node.begun }
	for _, p := range protocols {
		s := mustSession(t, p, e.execURL(t, id, false, "hang"), false)
		begun()
		s.Close()
		hung(p)
	}
	// One that has sent more than the command takes: its end is behind that.
	s := mustSession(t, stream.WebSocketV5, e.execURL(t, id, false, "hang"), false)
	if _, err := s.In.Write(make([]byte, 1<<16)); err != nil {
		t.Fatal(err)
	}
	begun()
	time.Sleep(50 * time.Millisecond)
	s.Close()
	for deadline := time.Now().Add(20 * time.Second); len(e.node.hung) == 0 && time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		eachSession(e, func(x *session) { x.check(time.Hour) })
	}
	hung("client that sent too much")
	url := e.forwardURL(t, pod, 2)
	f, err := stream.DialForward(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := f.Open(2); err != nil {
		t.Fatal(err)
	}
	begun()
	f.Close()
	hung("port forward")
	mustSession(t, stream.SPDY, e.execURL(t, id, false, "hang"), false)
	begun()
	stop()
	hung("server's end")
}

func eachSession(e *edge, f func(*session)) {
	t := e.server.streams
	t.mu.Lock()
	defer t.mu.Unlock()
	for x := range t.sessions {
		f(x)
	}
}

func TestStreamIdle(t *testing.T) {
	e, _, id, _ := mustStreams(t, StreamConfig{}, nil)
	mustSession(t, stream.SPDY, e.execURL(t, id, false, "hang"), false)
	for deadline := time.Now().Add(10 * time.Second); len(e.node.hung) == 0; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("idle session goes on")
		}
		eachSession(e, func(x *session) { x.check(100 * time.Millisecond) })
	}
}

// A URL serves once, for its own kind of request, by the right methods.
func TestStreamToken(t *testing.T) {
	e, _, id, stop := mustStreams(t, StreamConfig{}, nil)
	get := func(method, url string) int {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), method, url, nil)
		if err != nil {
			t.Fatal(err)
		}
		r, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer r.Body.Close()
		return r.StatusCode
	}
	url := e.execURL(t, id, false, "exit")
	s := mustSession(t, stream.WebSocketV5, url, false)
	go io.Copy(io.Discard, s.Out)
	go io.Copy(io.Discard, s.Err)
	if _, err := s.Wait(); err != nil {
		t.Fatal(err)
	}
	if code := get(http.MethodPost, url); code != http.StatusNotFound {
		t.Errorf("second use: HTTP %d, want 404", code)
	}
	if _, err := stream.Dial(t.Context(), stream.SPDY, url, stream.Options{Stdout: true}); err == nil {
		t.Error("second use by SPDY succeeded")
	}
	if code := get(http.MethodPost, strings.Replace(e.execURL(t, id, false, "cat"), "/exec/", "/attach/", 1)); code != http.StatusNotFound {
		t.Errorf("other kind: HTTP %d, want 404", code)
	}
	if code := get(http.MethodDelete, e.execURL(t, id, false, "cat")); code != http.StatusMethodNotAllowed {
		t.Errorf("DELETE: HTTP %d, want 405", code)
	}
	if code := get(http.MethodPost, e.execURL(t, id, false, "cat")); code != http.StatusBadRequest && code != http.StatusForbidden {
		t.Errorf("no upgrade: HTTP %d, want a refusal", code)
	}
	stop()
	if _, err := e.Exec(t.Context(), &runtime.ExecRequest{ContainerId: id, Cmd: []string{"cat"}, Stdout: true}); status.Code(err) != codes.Unavailable {
		t.Errorf("without a server: %v, want Unavailable", err)
	}
}

func TestTickets(t *testing.T) {
	var k tickets
	now := time.Unix(1000, 0)
	key, err := k.issue("exec", 1, now)
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := k.redeem("exec", key, now.Add(ticketTTL+1)); ok {
		t.Error("used after its time")
	}
	for i := range maxTickets {
		if _, err := k.issue("exec", i, now); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := k.issue("exec", 1, now); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("one too many: %v, want ResourceExhausted", err)
	}
	if _, err := k.issue("exec", 1, now.Add(ticketTTL+1)); err != nil {
		t.Errorf("after they expired: %v", err)
	}
	if len(k.m) != 1 {
		t.Errorf("%d tickets are kept, want 1", len(k.m))
	}
}

func (e *edge) forwardURL(t *testing.T, pod string, ports ...int32) string {
	t.Helper()
	r, err := e.PortForward(t.Context(), &runtime.PortForwardRequest{PodSandboxId: pod, Port: ports})
	if err != nil {
		t.Fatal(err)
	}
	return r.GetUrl()
}

func TestStreamAttachAndForward(t *testing.T) {
	e, pod, id, _ := mustStreams(t, StreamConfig{}, nil)
	for _, p := range protocols {
		r, err := e.Attach(t.Context(), &runtime.AttachRequest{ContainerId: id, Stdout: true})
		if err != nil {
			t.Fatal(err)
		}
		s, err := stream.Dial(t.Context(), p, r.GetUrl(), stream.Options{Stdout: true})
		if err != nil {
			t.Fatal(err)
		}
		out, err := io.ReadAll(s.Out)
		if code, e := s.Wait(); err != nil || e != nil || code != 0 || string(out) != "attached" {
			t.Errorf("%s: attach: %q, %d, %v, %v", p, out, code, err, e)
		}
		s.Close()
	}
	for _, dial := range []func(context.Context, string) (*stream.Forward, error){stream.DialForward, stream.DialTunnel} {
		f, err := dial(t.Context(), e.forwardURL(t, pod))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		for range 3 {
			data, _, err := f.Open(8080)
			if err != nil {
				t.Fatal(err)
			}
			io.WriteString(data, "ping")
			got, err := io.ReadAll(data)
			if err != nil || string(got) != "ping from 8080" {
				t.Errorf("got %q, %v", got, err)
			}
		}
		_, fault, err := f.Open(1)
		for range 10 { // a port that refuses at once may be reset before Open returns
			if err == nil {
				break
			}
			_, fault, err = f.Open(1)
		}
		if err != nil {
			t.Fatal(err)
		}
		if text, _ := io.ReadAll(fault); !strings.Contains(string(text), "connection refused") {
			t.Errorf("error stream %q", text)
		}
	}
	data, _, err := stream.DialPort(t.Context(), e.forwardURL(t, pod, 81))
	if err != nil {
		t.Fatal(err)
	}
	defer data.Close()
	io.WriteString(data, "ping")
	if got, err := io.ReadAll(data); err != nil || string(got) != "ping from 81" {
		t.Errorf("WebSocket: got %q, %v", got, err)
	}
}

func TestStreamBadRequests(t *testing.T) {
	e, pod, id, _ := mustStreams(t, StreamConfig{}, nil)
	exec := func(r *runtime.ExecRequest) error { _, err := e.Exec(t.Context(), r); return err }
	attach := func(r *runtime.AttachRequest) error { _, err := e.Attach(t.Context(), r); return err }
	forward := func(r *runtime.PortForwardRequest) error { _, err := e.PortForward(t.Context(), r); return err }
	for _, test := range []struct {
		err  error
		code codes.Code
		want string
	}{
		{exec(&runtime.ExecRequest{Cmd: []string{"x"}, Stdout: true}), codes.InvalidArgument, "container_id"},
		{exec(&runtime.ExecRequest{ContainerId: id, Stdout: true}), codes.InvalidArgument, "cmd"},
		{exec(&runtime.ExecRequest{ContainerId: id, Cmd: []string{"x\x00"}, Stdout: true}), codes.InvalidArgument, "cmd[0]"},
		{exec(&runtime.ExecRequest{ContainerId: id, Cmd: []string{"x"}}), codes.InvalidArgument, "stdin, stdout, stderr"},
		{exec(&runtime.ExecRequest{ContainerId: id, Cmd: []string{"x"}, Stdout: true, Stderr: true, Tty: true}), codes.InvalidArgument, "stderr"},
		{exec(&runtime.ExecRequest{ContainerId: "none", Cmd: []string{"x"}, Stdout: true}), codes.NotFound, "none"},
		{attach(&runtime.AttachRequest{Stdout: true}), codes.InvalidArgument, "container_id"},
		{attach(&runtime.AttachRequest{ContainerId: id}), codes.InvalidArgument, "stdin, stdout, stderr"},
		{attach(&runtime.AttachRequest{ContainerId: "none", Stdout: true}), codes.NotFound, "none"},
		{forward(&runtime.PortForwardRequest{}), codes.InvalidArgument, "pod_sandbox_id"},
		{forward(&runtime.PortForwardRequest{PodSandboxId: pod, Port: []int32{80, 65536}}), codes.InvalidArgument, "port[1]"},
		{forward(&runtime.PortForwardRequest{PodSandboxId: pod, Port: []int32{0}}), codes.InvalidArgument, "port[0]"},
		{forward(&runtime.PortForwardRequest{PodSandboxId: pod, Port: make([]int32, maxPorts+1)}), codes.InvalidArgument, "limit 128"},
		{forward(&runtime.PortForwardRequest{PodSandboxId: "none"}), codes.NotFound, "none"},
	} {
		if status.Code(test.err) != test.code || !strings.Contains(test.err.Error(), test.want) {
			t.Errorf("got %v, want %v naming %q", test.err, test.code, test.want)
		}
	}
	e.node.podState = runtime.PodSandboxState_SANDBOX_NOTREADY
	if err := forward(&runtime.PortForwardRequest{PodSandboxId: pod}); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("pod that is not ready: %v, want FailedPrecondition", err)
	}
}

func TestStreamsAt(t *testing.T) {
	for addr, want := range map[string]string{
		"127.0.0.1:80": "http://127.0.0.1:80", "0.0.0.0:81": "http://127.0.0.1:81",
		"[::]:82": "http://127.0.0.1:82", "[::1]:83": "http://[::1]:83", "192.0.2.1:84": "http://192.0.2.1:84",
	} {
		a, err := net.ResolveTCPAddr("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		s := &Server{}
		s.streams = newStreamServer(s, StreamConfig{})
		if err := s.StreamsAt(a, false); err != nil || s.StreamURL() != want {
			t.Errorf("%s: %q, %v; want %q", addr, s.StreamURL(), err, want)
		}
	}
}

func testTLS(t *testing.T) *tls.Config {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}, NextProtos: []string{"http/1.1"}}
}
