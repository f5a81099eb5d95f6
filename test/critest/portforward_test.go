package critest

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berthd/berth/test/stream"
)

func (p *pod) forward(ports ...int32) string {
	p.Helper()
	r, err := p.client.PortForward(p.ctx, &runtime.PortForwardRequest{PodSandboxId: p.id, Port: ports})
	p.must(err)
	return r.Url
}

// get asks a web server over a forwarded connection.
func get(t *testing.T, data io.ReadWriteCloser) string {
	t.Helper()
	_, err := io.WriteString(data, "GET / HTTP/1.0\r\n\r\n")
	if err != nil {
		t.Error(err)
	}
	b, err := io.ReadAll(data)
	if err != nil || !bytes.HasPrefix(b, []byte("HTTP/1.0 200")) {
		t.Errorf("answer %.200q, %v", b, err)
	}
	return string(b)
}

func TestStreamPortForward(t *testing.T) {
	b := open(t)
	host := func(c *runtime.PodSandboxConfig) {
		c.Hostname = ""
		c.Linux.SecurityContext.NamespaceOptions.Network = runtime.NamespaceMode_NODE
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	b.must(err)
	free := l.Addr().(*net.TCPAddr).Port
	b.must(l.Close())
	for _, x := range []struct {
		name, address string
		port          int
		edit          []func(*runtime.PodSandboxConfig)
	}{
		{"IPv4", "127.0.0.1:8080", 8080, nil},
		{"IPv6", "[::1]:8080", 8080, nil},
		{"host network", fmt.Sprintf("127.0.0.1:%d", free), free, []func(*runtime.PodSandboxConfig){host}},
	} {
		t.Run(x.name, func(t *testing.T) {
			b := b.with(t)
			p := b.pod(x.edit...)
			c := p.run([]string{"/guest", "http", x.address, "text of " + x.name})
			c.sees("serving on")
			f, err := stream.DialForward(b.ctx, p.forward())
			b.must(err)
			defer f.Close()
			for range 3 { // one connection carries many
				data, _, err := f.Open(x.port)
				b.must(err)
				if got := get(t, data); !strings.Contains(got, "text of "+x.name) {
					t.Errorf("SPDY: %q", got)
				}
				b.must(data.Close())
			}
			data, _, err := stream.DialPort(b.ctx, p.forward(int32(x.port)))
			b.must(err)
			defer data.Close()
			if got := get(t, data); !strings.Contains(got, "text of "+x.name) {
				t.Errorf("WebSocket: %q", got)
			}
			if b.node != nil {
				f, err := stream.DialTunnel(b.ctx, p.forward())
				b.must(err)
				defer f.Close()
				data, _, err := f.Open(x.port)
				b.must(err)
				if got := get(t, data); !strings.Contains(got, "text of "+x.name) {
					t.Errorf("SPDY through a WebSocket: %q", got)
				}
			}
			_, fault, err := f.Open(9)
			b.must(err)
			if text, _ := io.ReadAll(fault); !strings.Contains(string(text), "refused") {
				t.Errorf("port without a server: %q", text)
			}
		})
	}
}

// TestStreamPortForwardHalfClose: either side may end what it sends first, and
// the stop of a pod ends connections into it, also of a client that does not read.
func TestStreamPortForwardHalfClose(t *testing.T) {
	b := open(t)
	p := b.pod()
	c := p.run(sh("nc -ll -p 90 -e wc -c & nc -ll -p 91 -e yes & sleep 1; echo ready; wait"))
	c.sees("ready")
	f, err := stream.DialForward(b.ctx, p.forward())
	b.must(err)
	defer f.Close()
	data, _, err := f.Open(90)
	b.must(err)
	_, err = io.WriteString(data, strings.Repeat("x", 100000))
	b.must(err)
	b.must(data.Close())
	if got, err := io.ReadAll(data); err != nil || string(got) != "100000\n" {
		t.Errorf("after half of it was closed: %q, %v", got, err)
	}
	if _, _, err := f.Open(91); err != nil { // nobody reads what comes
		t.Error(err)
	}
	time.Sleep(200 * time.Millisecond)
	begin := time.Now()
	p.stop()
	if d := time.Since(begin); d > time.Minute {
		t.Errorf("stop took %v", d)
	}
}
