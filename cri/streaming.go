package cri

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"fmt"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Exec, Attach and PortForward are answered with a URL that is good for one
// session (session.go) within ticketTTL. What would fail then fails here, so
// that the caller gets a code and a field instead of a broken stream.

const (
	// ticketTTL is how long a URL may be used for the first and last time.
	ticketTTL = time.Minute
	// maxTickets bounds the URLs that were given out and not used yet.
	maxTickets = 1000
	// ticketLen is the length of the random part of a URL in bytes. Whoever
	// knows it may use it, so it cannot be guessed.
	ticketLen = 24
	// maxPorts bounds the ports of one PortForward.
	maxPorts = 128
)

func (s *runtimeService) Exec(_ context.Context, r *runtime.ExecRequest) (*runtime.ExecResponse, error) {
	err := first(
		func() error { return checkID("container_id", r.GetContainerId()) },
		func() error { return checkCommand(r.GetCmd()) },
		func() error { return checkStreams(r) },
		func() error { return s.deps.Streams.CheckExec(r.GetContainerId()) },
	)
	if err != nil {
		return nil, err
	}
	url, err := s.streams.url("exec", r)
	return &runtime.ExecResponse{Url: url}, err
}

func (s *runtimeService) Attach(_ context.Context, r *runtime.AttachRequest) (*runtime.AttachResponse, error) {
	err := first(
		func() error { return checkID("container_id", r.GetContainerId()) },
		func() error { return checkStreams(r) },
		func() error { return s.deps.Streams.CheckAttach(r.GetContainerId(), r.GetStdin(), r.GetTty()) },
	)
	if err != nil {
		return nil, err
	}
	url, err := s.streams.url("attach", r)
	return &runtime.AttachResponse{Url: url}, err
}

func (s *runtimeService) PortForward(ctx context.Context, r *runtime.PortForwardRequest) (*runtime.PortForwardResponse, error) {
	err := first(
		func() error { return checkID("pod_sandbox_id", r.GetPodSandboxId()) },
		func() error { return checkForwardPorts(r.GetPort()) },
		func() error { return s.checkReady(ctx, r.GetPodSandboxId()) },
	)
	if err != nil {
		return nil, err
	}
	url, err := s.streams.url("portforward", r)
	return &runtime.PortForwardResponse{Url: url}, err
}

// checkReady wants a pod that has its network.
func (s *runtimeService) checkReady(ctx context.Context, id string) error {
	r, err := s.deps.Pods.PodStatus(ctx, id, false)
	if err != nil {
		return err
	}
	if r.GetStatus().GetState() != runtime.PodSandboxState_SANDBOX_READY {
		return status.Errorf(codes.FailedPrecondition, "pod %s is not ready", clip(id, maxIDText))
	}
	return nil
}

// checkStreams checks what ExecRequest and AttachRequest have in common.
func checkStreams(r interface {
	GetStdin() bool
	GetStdout() bool
	GetStderr() bool
	GetTty() bool
}) error {
	if !r.GetStdin() && !r.GetStdout() && !r.GetStderr() {
		return invalid("stdin, stdout, stderr", "one of them must be true")
	}
	if r.GetTty() && r.GetStderr() {
		return invalid("stderr", "must be false when tty is true: a terminal has one output")
	}
	return nil
}

func checkForwardPorts(ports []int32) error {
	if len(ports) > maxPorts {
		return invalid("port", "%d ports, limit %d", len(ports), maxPorts)
	}
	for i, p := range ports {
		if p < 1 || p > maxPort {
			return invalid(at("port", i), "%d, limit 1 to %d", p, maxPort)
		}
	}
	return nil
}

// tickets are requests that wait for their client, by the secret in its URL.
type tickets struct {
	mu sync.Mutex
	m  map[string]ticket
}

type ticket struct {
	kind    string
	req     any
	expires time.Time
}

// issue keeps a request and returns its secret.
func (t *tickets) issue(kind string, req any, now time.Time) (string, error) {
	var secret [ticketLen]byte
	if _, err := rand.Read(secret[:]); err != nil {
		return "", fmt.Errorf("streaming token: %w", err)
	}
	key := base64.RawURLEncoding.EncodeToString(secret[:])
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.m == nil {
		t.m = map[string]ticket{}
	}
	for k, old := range t.m {
		if now.After(old.expires) {
			delete(t.m, k)
		}
	}
	if len(t.m) >= maxTickets {
		return "", status.Errorf(codes.ResourceExhausted, "%d streaming URLs were given out within %s and not used, limit %d", len(t.m), ticketTTL, maxTickets)
	}
	t.m[key] = ticket{kind, req, now.Add(ticketTTL)}
	return key, nil
}

// redeem returns the request for a secret, once.
func (t *tickets) redeem(kind, key string, now time.Time) (any, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	got, ok := t.m[key]
	delete(t.m, key)
	if !ok || got.kind != kind || now.After(got.expires) {
		return nil, false
	}
	return got.req, true
}
