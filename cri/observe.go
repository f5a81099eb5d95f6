package cri

import (
	"context"
	"errors"
	"fmt"
	"path"
	"runtime/debug"
	"strconv"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/klog/v2"
)

// Verbosity of the line that ends a call: what changes something is logged by
// default, what only reads is not.
const (
	lifecycleV = 2
	readV      = 4
)

// lifecycle are the methods that change something. ExecSync is not among them:
// probes call it every few seconds.
var lifecycle = map[string]bool{
	"RunPodSandbox": true, "StopPodSandbox": true, "RemovePodSandbox": true,
	"CreateContainer": true, "StartContainer": true, "StopContainer": true, "RemoveContainer": true,
	"UpdateContainerResources": true, "UpdatePodSandboxResources": true, "ReopenContainerLog": true, "UpdateRuntimeConfig": true,
	"PullImage": true, "RemoveImage": true,
}

// unary surrounds every call: see observe.
func (s *Server) unary(log klog.Logger) grpc.UnaryServerInterceptor {
	return func(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (resp any, err error) {
		err = s.observe(ctx, log, info.FullMethod, req, func(ctx context.Context) (err error) {
			resp, err = handler(ctx, req)
			return err
		})
		if err != nil {
			return nil, err
		}
		return resp, nil
	}
}

// stream surrounds every streaming call in the same way; its requests are not
// seen here.
func (s *Server) stream(log klog.Logger) grpc.StreamServerInterceptor {
	return func(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
		return s.observe(ss.Context(), log, info.FullMethod, nil, func(ctx context.Context) error {
			return handler(srv, contextStream{ServerStream: ss, ctx: ctx})
		})
	}
}

// contextStream is a stream whose context carries the logger of its call.
type contextStream struct {
	grpc.ServerStream
	ctx context.Context
}

func (c contextStream) Context() context.Context { return c.ctx }

// observe runs one call: with the request's keys and a number on its logger,
// counted and timed, its error translated by the table, a panic in it turned
// into codes.Internal, and one log line at its end. Requests and answers are
// never logged: they contain environments and credentials.
func (s *Server) observe(ctx context.Context, log klog.Logger, fullMethod string, req any, call func(context.Context) error) error {
	method := path.Base(fullMethod)
	id := strconv.FormatUint(s.nextID.Add(1), 10)
	about := requestKeys(req)
	log = log.WithValues(append([]any{"method", method, "call", id}, about...)...)
	done := s.metrics.begin(method)
	start := time.Now()
	c := &underWay{method: method, number: id, about: about, began: start}
	s.calls.begin(c)
	defer s.calls.end(c)
	err := toStatus(s.guard(log, method, id, func() error { return call(klog.NewContext(ctx, log)) }))
	took := time.Since(start)
	code := status.Code(err)
	done(code, took)
	logEnd(log, method, code, took, err)
	return err
}

// errPanic marks the status of a call that panicked, whose stack is already in
// the log.
type errPanic struct{ error }

func (e errPanic) GRPCStatus() *status.Status { return status.Convert(e.error) }

// guard turns a panic into an error. One broken call must not end the daemon,
// but the stack goes to the log, once.
func (s *Server) guard(log klog.Logger, method, id string, call func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			s.metrics.panics.WithLabelValues(method).Inc()
			log.Error(nil, "Panic in a call", "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
			err = errPanic{status.Errorf(codes.Internal, "%s: internal error in call %s, see the log of berthd", method, id)}
		}
	}()
	return call()
}

// logEnd writes the line that ends a call. This is the one place where the
// errors of calls are logged.
func logEnd(log klog.Logger, method string, code codes.Code, took time.Duration, err error) {
	v := readV
	if lifecycle[method] {
		v = lifecycleV
	}
	switch {
	case code == codes.OK:
		log.V(v).Info("Call", "took", took)
	case errors.As(err, new(errPanic)):
	case code == codes.Unimplemented || code == codes.NotFound || code == codes.Canceled:
		// What a client asks to learn, or no longer wants, is no news.
		log.V(v).Info("Call", "took", took, "code", code.String(), "err", err)
	default:
		log.Info("Call failed", "took", took, "code", code.String(), "err", err)
	}
}

// requestKeys are the log keys of a request: what it is about, never what it
// contains.
func requestKeys(req any) []any {
	var kv []any
	if r, ok := req.(interface {
		GetConfig() *runtime.PodSandboxConfig
	}); ok {
		kv = append(kv, podKeys(r.GetConfig().GetMetadata())...)
	}
	if r, ok := req.(interface{ GetPodSandboxId() string }); ok {
		kv = append(kv, "sandboxID", logged(r.GetPodSandboxId()))
	}
	if r, ok := req.(interface {
		GetSandboxConfig() *runtime.PodSandboxConfig
	}); ok {
		kv = append(kv, podKeys(r.GetSandboxConfig().GetMetadata())...)
	}
	if r, ok := req.(interface {
		GetConfig() *runtime.ContainerConfig
	}); ok {
		m := r.GetConfig().GetMetadata()
		kv = append(kv, "container", logged(m.GetName()), "attempt", m.GetAttempt())
	}
	if r, ok := req.(interface{ GetContainerId() string }); ok {
		kv = append(kv, "containerID", logged(r.GetContainerId()))
	}
	if r, ok := req.(interface{ GetImage() *runtime.ImageSpec }); ok {
		kv = append(kv, "image", logged(r.GetImage().GetImage()))
	}
	return kv
}

// podKeys are the log keys of a pod, nil if it is not told.
func podKeys(m *runtime.PodSandboxMetadata) []any {
	if m == nil {
		return nil
	}
	return []any{"pod", klog.KRef(logged(m.GetNamespace()), logged(m.GetName())), "podUID", logged(m.GetUid())}
}

// logged bounds a value that a client chose and that was not checked yet.
func logged(s string) string { return clip(s, 256) }
