package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync/atomic"

	"github.com/berthd/berth/cri"
)

// serveStreams begins to serve Exec, Attach and PortForward, unless that is
// switched off. stop cuts their sessions off.
func (d *daemon) serveStreams(ctx context.Context, edge *cri.Server) (stop func(), err error) {
	c := d.config
	if c.StreamListen == "" {
		return func() {}, nil
	}
	var secure *tls.Config
	if c.StreamCertFile != "" {
		cert := new(certificate)
		if err := cert.load(c); err != nil {
			return nil, c.wrong("stream_cert_file", "%q: %w", c.StreamCertFile, err)
		}
		d.onReload("stream certificate", cert.load)
		secure = &tls.Config{MinVersion: tls.VersionTLS12, GetCertificate: cert.get, NextProtos: []string{"http/1.1"}}
	}
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", c.StreamListen)
	if err != nil {
		return nil, c.wrong("stream_listen", "%q: %w", c.StreamListen, err)
	}
	// URLs are given out from here on, so that no call comes too early.
	if err := edge.StreamsAt(l.Addr(), secure != nil); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return background(ctx, "streams", func(ctx context.Context) error { return edge.ServeStreams(ctx, l, secure) }), nil
}

// certificate is the server's, which a reload reads again.
type certificate struct {
	now atomic.Pointer[tls.Certificate]
}

func (t *certificate) load(c *config) error {
	if c.StreamCertFile == "" {
		return errors.New("taken away; it stays in use until a restart")
	}
	pair, err := tls.LoadX509KeyPair(c.StreamCertFile, c.StreamKeyFile)
	if err != nil {
		return err
	}
	t.now.Store(&pair)
	return nil
}

func (t *certificate) get(*tls.ClientHelloInfo) (*tls.Certificate, error) { return t.now.Load(), nil }

func checkStreamListen(s string) error {
	if s == "" {
		return nil
	}
	if _, err := netip.ParseAddrPort(s); err != nil {
		return fmt.Errorf("want an IP address and a port, such as 127.0.0.1:0: %w", err)
	}
	return nil
}

// checkStreams holds the keys about streams against each other.
func (c *config) checkStreams() error {
	if (c.StreamCertFile == "") != (c.StreamKeyFile == "") {
		return c.wrong("stream_key_file", "%q: stream_cert_file is %q; want both or neither", c.StreamKeyFile, c.StreamCertFile)
	}
	if a, err := netip.ParseAddrPort(c.StreamListen); err == nil && !a.Addr().IsLoopback() && c.StreamCertFile == "" {
		// A URL is a secret, and so is what flows.
		return c.wrong("stream_listen", "%q: not a loopback address, which needs stream_cert_file", c.StreamListen)
	}
	return nil
}
