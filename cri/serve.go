package cri

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"
	"k8s.io/klog/v2"
)

const (
	// maxStreams bounds the calls in flight of one connection. The kubelet
	// has one connection for the runtime and one for images, with a worker
	// per pod.
	maxStreams = 4096
	// pingEvery and pingTimeout find clients that are gone without a close or
	// that were stopped: their calls and buffers are let go.
	pingEvery   = 30 * time.Second
	pingTimeout = 20 * time.Second
	// minPing is how often a client may ping; a faster one is disconnected.
	minPing = 5 * time.Second
	// handshakeTimeout bounds a connection that never says anything.
	handshakeTimeout = 20 * time.Second
)

// options of the gRPC server. Every call has its goroutine and its own flow
// control, so a client that does not read its answer holds that answer and
// nothing else.
func (s *Server) options(ctx context.Context) []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.MaxRecvMsgSize(MaxMessage),
		grpc.MaxSendMsgSize(MaxMessage),
		grpc.MaxConcurrentStreams(maxStreams),
		grpc.ConnectionTimeout(handshakeTimeout),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: pingEvery, Timeout: pingTimeout}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: minPing, PermitWithoutStream: true}),
		grpc.UnaryInterceptor(s.unary(klog.FromContext(ctx))),
		grpc.StreamInterceptor(s.stream(klog.FromContext(ctx))),
	}
}

// Serve answers on the listeners until ctx ends or one of them fails. Then no
// new call is taken, those under way have Config.StopTimeout to end, and what
// is left is cut off; operations on objects go on without their caller. The
// listeners are closed. The error is nil when ctx ended it.
func (s *Server) Serve(ctx context.Context, listeners ...net.Listener) error {
	failed := make(chan error, len(listeners))
	for _, l := range listeners {
		go func() { failed <- s.grpc.Serve(l) }()
	}
	var err error
	left := len(listeners)
	select {
	case <-ctx.Done():
	case err = <-failed:
		left--
		err = fmt.Errorf("serve cri: %w", err)
	}
	s.stop()
	for range left {
		if e := <-failed; e != nil && !errors.Is(e, grpc.ErrServerStopped) && err == nil && ctx.Err() == nil {
			err = fmt.Errorf("serve cri: %w", e)
		}
	}
	return err
}

// stop ends the server: gracefully, or after the timeout at once.
func (s *Server) stop() {
	s.end()
	cut := time.AfterFunc(s.cfg.StopTimeout, s.grpc.Stop)
	defer cut.Stop()
	s.grpc.GracefulStop()
}
