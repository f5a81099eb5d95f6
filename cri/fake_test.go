package cri

import (
	"context"
	"fmt"
	"net"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/klog/v2"
	"k8s.io/klog/v2/textlogger"

	"github.com/berthd/berth/imageservice"
	"github.com/berthd/berth/sandbox"
)

// node is a small node in memory: pods and containers with IDs that count up,
// and hooks for what a test wants to go wrong.
type node struct {
	mu         sync.Mutex
	pods       map[string]*runtime.PodSandboxConfig
	containers map[string]*runtime.ContainerConfig
	images     map[string]imageservice.Image
	grace      time.Duration
	auth       *imageservice.Auth

	runPod       func(ctx context.Context) error
	exec         func(ctx context.Context) (*runtime.ExecSyncResponse, error)
	pullErr      error
	runtimeReady error
	userNS       bool
	networkReady error
	driver       string
	podState     runtime.PodSandboxState
	begun        chan bool  // gets that the fake's command "hang" runs
	hung         chan error // gets why the fake's command "hang" ended
	resources    *runtime.UpdatePodSandboxResourcesRequest
	events       chan *runtime.ContainerEventResponse // nil: none come
	eventsErr    error                                // ends the stream after events is closed
}

func newNode() *node {
	return &node{
		pods:       map[string]*runtime.PodSandboxConfig{},
		containers: map[string]*runtime.ContainerConfig{},
		images:     map[string]imageservice.Image{},
		driver:     "cgroupfs",
		begun:      make(chan bool, 16),
		hung:       make(chan error, 16),
	}
}

func (n *node) RunPod(ctx context.Context, cfg *runtime.PodSandboxConfig, handler string) (string, error) {
	if n.runPod != nil {
		if err := n.runPod(ctx); err != nil {
			return "", err
		}
	}
	if handler != "" && handler != "runc" {
		return "", fmt.Errorf("runtime_handler %q: %w", handler, sandbox.ErrUnknownHandler)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	id := fmt.Sprintf("%064x", len(n.pods)+1)
	n.pods[id] = cfg
	return id, nil
}

func (n *node) StopPod(_ context.Context, id string) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.havePodLocked(id)
}

func (n *node) RemovePod(_ context.Context, id string) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	err := n.havePodLocked(id)
	delete(n.pods, id)
	return err
}

func (n *node) havePodLocked(id string) error {
	if n.pods[id] == nil {
		return fmt.Errorf("pod %q: %w", id, sandbox.ErrNotFound)
	}
	return nil
}

func (n *node) PodStatus(_ context.Context, id string, _ bool) (*runtime.PodSandboxStatusResponse, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if err := n.havePodLocked(id); err != nil {
		return nil, err
	}
	return &runtime.PodSandboxStatusResponse{Status: &runtime.PodSandboxStatus{Id: id, Metadata: n.pods[id].GetMetadata(), State: n.podState}}, nil
}

func (n *node) ListPods(*runtime.PodSandboxFilter) []*runtime.PodSandbox {
	n.mu.Lock()
	defer n.mu.Unlock()
	var out []*runtime.PodSandbox
	for id, c := range n.pods {
		out = append(out, &runtime.PodSandbox{Id: id, Metadata: c.GetMetadata()})
	}
	return out
}

func (n *node) CreateContainer(_ context.Context, podID string, cfg *runtime.ContainerConfig, _ *runtime.PodSandboxConfig) (string, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if err := n.havePodLocked(podID); err != nil {
		return "", err
	}
	id := fmt.Sprintf("%064x", len(n.containers)+1000)
	n.containers[id] = cfg
	return id, nil
}

func (n *node) haveContainer(id string) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.containers[id] == nil {
		return fmt.Errorf("container %q: %w", id, sandbox.ErrNotFound)
	}
	return nil
}

func (n *node) StartContainer(_ context.Context, id string) error { return n.haveContainer(id) }

func (n *node) StopContainer(_ context.Context, id string, grace time.Duration) error {
	n.mu.Lock()
	n.grace = grace
	n.mu.Unlock()
	return n.haveContainer(id)
}

func (n *node) RemoveContainer(_ context.Context, id string) error { return n.haveContainer(id) }

func (n *node) UpdateResources(_ context.Context, r *runtime.UpdateContainerResourcesRequest) error {
	return n.haveContainer(r.GetContainerId())
}

func (n *node) ContainerStatus(_ context.Context, id string, _ bool) (*runtime.ContainerStatusResponse, error) {
	return &runtime.ContainerStatusResponse{Status: &runtime.ContainerStatus{Id: id}}, n.haveContainer(id)
}

func (n *node) ListContainers(*runtime.ContainerFilter) []*runtime.Container {
	n.mu.Lock()
	defer n.mu.Unlock()
	var out []*runtime.Container
	for id := range n.containers {
		out = append(out, &runtime.Container{Id: id})
	}
	return out
}

func (n *node) ContainerStats(_ context.Context, id string) (*runtime.ContainerStats, error) {
	return &runtime.ContainerStats{Attributes: &runtime.ContainerAttributes{Id: id}}, n.haveContainer(id)
}

func (n *node) ListContainerStats(context.Context, *runtime.ContainerStatsFilter) ([]*runtime.ContainerStats, error) {
	return []*runtime.ContainerStats{}, nil
}

func (n *node) ExecSync(ctx context.Context, id string, _ []string, _ time.Duration) (*runtime.ExecSyncResponse, error) {
	if n.exec != nil {
		return n.exec(ctx)
	}
	return &runtime.ExecSyncResponse{}, n.haveContainer(id)
}

func (n *node) ReopenLog(_ context.Context, id string) error { return n.haveContainer(id) }

func (n *node) RuntimeReady() error { return n.runtimeReady }

func (n *node) RuntimeHandlers() []*runtime.RuntimeHandler {
	return []*runtime.RuntimeHandler{{Name: ""}, {Name: "runc", Features: &runtime.RuntimeHandlerFeatures{UserNamespaces: n.userNS}}}
}

func (n *node) CgroupDriver() string { return n.driver }

func (n *node) Info() map[string]string {
	return map[string]string{"runtimes": `{"runc":"1.1.5"}`, "note": "not JSON"}
}

func (n *node) Ready() error { return n.networkReady }

func (n *node) Pull(_ context.Context, ref string, auth *imageservice.Auth) (imageservice.Image, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.auth = auth
	if n.pullErr != nil {
		return imageservice.Image{}, n.pullErr
	}
	img := imageservice.Image{ID: "sha256:" + fmt.Sprintf("%064x", 7), RepoTags: []string{ref}, Size: 5, Config: imageservice.ImageConfig{User: "1000:5"}}
	n.images[ref] = img
	return img, nil
}

func (n *node) Get(ref string) (imageservice.Image, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if ref == "UPPER/case" {
		return imageservice.Image{}, fmt.Errorf("%q: %w", ref, imageservice.ErrInvalidReference)
	}
	img, ok := n.images[ref]
	if !ok {
		return img, fmt.Errorf("%q: %w", ref, imageservice.ErrNotFound)
	}
	return img, nil
}

func (n *node) List() []imageservice.Image {
	n.mu.Lock()
	defer n.mu.Unlock()
	var out []imageservice.Image
	for _, img := range n.images {
		out = append(out, img)
	}
	return out
}

func (n *node) Remove(_ context.Context, ref string) error {
	_, err := n.Get(ref)
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.images, ref)
	return err
}

func (n *node) FsUsage() (imageservice.FsUsage, error) {
	return imageservice.FsUsage{Mountpoint: "/var/lib/berth/layers", Bytes: 3, Inodes: 2, At: time.Unix(1, 0)}, nil
}

// edge is a server on a socket of its own and a connection to it.
type edge struct {
	runtime.RuntimeServiceClient
	images runtime.ImageServiceClient
	conn   *grpc.ClientConn
	socket string
	server *Server
	node   *node
	log    *lockedBuffer
}

func mustEdge(t *testing.T, n *node) *edge {
	t.Helper()
	e := &edge{node: n, log: new(lockedBuffer), socket: filepath.Join(t.TempDir(), "s")}
	logger := textlogger.NewLogger(textlogger.NewConfig(textlogger.Output(e.log), textlogger.Verbosity(4)))
	ctx, cancel := context.WithCancel(klog.NewContext(context.Background(), logger))
	var err error
	e.server, err = New(ctx, Config{
		Version:     "1.2.3",
		Info:        map[string]func() any{"cni": func() any { return []string{"berth"} }},
		StopTimeout: 100 * time.Millisecond,
	}, Deps{Pods: n, Containers: n, Observer: n, Exec: n, Streams: n, Meter: n, Resizer: n, Events: n, Node: n, Network: n, Images: n})
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", e.socket)
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- e.server.Serve(ctx, l) }()
	e.conn = mustDial(t, e.socket)
	e.RuntimeServiceClient, e.images = runtime.NewRuntimeServiceClient(e.conn), runtime.NewImageServiceClient(e.conn)
	t.Cleanup(func() {
		cancel()
		if err := <-served; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	return e
}

func mustDial(t *testing.T, socket string) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(MaxMessage), grpc.MaxCallSendMsgSize(MaxMessage+1<<20)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// lockedBuffer is a log that can be read while it is written.
type lockedBuffer struct {
	mu sync.Mutex
	b  []byte
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.b = append(l.b, p...)
	return len(p), nil
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return string(l.b)
}
