package cri

import (
	"bufio"
	"errors"
	"net"
	"net/http"

	"golang.org/x/net/websocket"
	"k8s.io/cri-streaming/pkg/streaming/portforward"
	"k8s.io/streaming/pkg/httpstream"
	"k8s.io/streaming/pkg/httpstream/spdy"
	"k8s.io/streaming/pkg/httpstream/wsstream"
)

// Clients of PortForward that speak WebSocket send SPDY through it, as binary
// messages whose bounds mean nothing. The name of that protocol:
const tunnelProtocol = spdy.HeaderSpdy31 + "+" + portforward.ProtocolV1Name

func isTunnel(r *http.Request) bool { return wsstream.IsWebSocketRequestWithTunnelingProtocol(r) }

// serveTunnel opens the WebSocket and has serve answer a request for SPDY that
// comes over it.
func serveTunnel(w http.ResponseWriter, r *http.Request, serve func(http.ResponseWriter, *http.Request)) {
	websocket.Server{
		Handshake: func(c *websocket.Config, _ *http.Request) error {
			for _, p := range c.Protocol {
				if p == tunnelProtocol {
					c.Protocol = []string{p}
					return nil
				}
			}
			return errors.New("protocol not supported, want " + tunnelProtocol)
		},
		Handler: func(ws *websocket.Conn) {
			ws.PayloadType = websocket.BinaryFrame
			inner := r.Clone(r.Context())
			inner.Header = http.Header{}
			inner.Header.Set(httpstream.HeaderConnection, httpstream.HeaderUpgrade)
			inner.Header.Set(httpstream.HeaderUpgrade, spdy.HeaderSpdy31)
			inner.Header.Set(httpstream.HeaderProtocolVersion, portforward.ProtocolV1Name)
			serve(tunnel{ws, http.Header{}}, inner)
		},
	}.ServeHTTP(w, r)
}

// tunnel is the ResponseWriter of the request for SPDY: all that is wanted of
// it is the connection.
type tunnel struct {
	ws     *websocket.Conn
	header http.Header
}

func (t tunnel) Header() http.Header         { return t.header }
func (t tunnel) WriteHeader(int)             {}
func (t tunnel) Write(p []byte) (int, error) { return len(p), nil }

func (t tunnel) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	return t.ws, bufio.NewReadWriter(bufio.NewReader(t.ws), bufio.NewWriter(t.ws)), nil
}
