// Package cri is the gRPC edge of berth: RuntimeService and ImageService of
// the Kubernetes container runtime interface, version v1.
//
// It knows six things and keeps no state of its own about pods, containers
// or images:
//
//   - a handler checks a request (validate.go), calls one method of a service
//     behind it and translates the answer; it is a few lines long.
//   - an observation (observe.go) is what surrounds every call: the request's
//     keys on the logger, its number, its duration, its metrics, and the one
//     place where a panic ends.
//   - the error table (errors.go) turns sentinels into gRPC codes. Handlers
//     return the errors of the services as they are.
//   - limits: no message exceeds MaxMessage, no call waits for another
//     client, and what a call asks for is bounded before it goes further in.
//   - a [Server] serves listeners until its context ends.
//   - a session (session.go) is one connection of Exec, Attach or PortForward,
//     on a listener of its own, for a URL that was given out once.
//
// An RPC that berth does not have yet is answered Unimplemented by gRPC
// itself. Stop and Remove of what does not exist succeed, as the interface
// demands; ImageStatus of an absent image is an empty answer; Status of an
// absent pod or container is NotFound.
package cri

import (
	"context"
	"errors"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berthd/berth/imageservice"
)

// MaxMessage bounds a gRPC message in either direction, in bytes. It is the
// limit that the kubelet's own client has.
const MaxMessage = 16 << 20

// Pods are the pod sandboxes of this node.
type Pods interface {
	RunPod(ctx context.Context, cfg *runtime.PodSandboxConfig, handler string) (string, error)
	StopPod(ctx context.Context, id string) error
	RemovePod(ctx context.Context, id string) error
	PodStatus(ctx context.Context, id string, verbose bool) (*runtime.PodSandboxStatusResponse, error)
	ListPods(f *runtime.PodSandboxFilter) []*runtime.PodSandbox
}

// Containers change containers.
type Containers interface {
	CreateContainer(ctx context.Context, podID string, cfg *runtime.ContainerConfig, podCfg *runtime.PodSandboxConfig) (string, error)
	StartContainer(ctx context.Context, id string) error
	StopContainer(ctx context.Context, id string, timeout time.Duration) error
	RemoveContainer(ctx context.Context, id string) error
	UpdateResources(ctx context.Context, r *runtime.UpdateContainerResourcesRequest) error
}

// Observer reads containers. None of its methods waits for an operation.
type Observer interface {
	ContainerStatus(ctx context.Context, id string, verbose bool) (*runtime.ContainerStatusResponse, error)
	ListContainers(f *runtime.ContainerFilter) []*runtime.Container
	ContainerStats(ctx context.Context, id string) (*runtime.ContainerStats, error)
	ListContainerStats(ctx context.Context, f *runtime.ContainerStatsFilter) ([]*runtime.ContainerStats, error)
}

// Execer reaches into running containers.
type Execer interface {
	ExecSync(ctx context.Context, id string, cmd []string, timeout time.Duration) (*runtime.ExecSyncResponse, error)
	ReopenLog(ctx context.Context, id string) error
}

// Node tells about the runtime as a whole.
type Node interface {
	// RuntimeReady and the others answer from memory.
	RuntimeReady() error
	RuntimeHandlers() []*runtime.RuntimeHandler
	CgroupDriver() string
	// Info is diagnostic: JSON values by key.
	Info() map[string]string
}

// Network tells whether pods can be attached to a network, from memory.
type Network interface {
	Ready() error
}

// Images are the images of this node.
type Images interface {
	Pull(ctx context.Context, ref string, auth *imageservice.Auth) (imageservice.Image, error)
	Get(ref string) (imageservice.Image, error)
	List() []imageservice.Image
	Remove(ctx context.Context, ref string) error
	FsUsage() (imageservice.FsUsage, error)
}

// Deps are the services behind the edge. All are required; one value may serve
// as several of them.
type Deps struct {
	Pods       Pods
	Containers Containers
	Observer   Observer
	Exec       Execer
	Streams    Streams
	Meter      Meter
	Resizer    Resizer
	Events     Events
	Node       Node
	Network    Network
	Images     Images
}

// Config of a [Server].
type Config struct {
	// Version is berth's own, in the form of semantic versioning.
	Version string
	// Info adds diagnostic values to a verbose Status, by key; each function
	// returns something that encoding/json can write and answers from memory.
	Info   map[string]func() any
	Stream StreamConfig
	// StopTimeout is how long calls under way may go on when Serve is told to
	// stop; 0 is 5 s.
	StopTimeout time.Duration
}

// Server is the gRPC server. It is safe for concurrent use.
type Server struct {
	cfg     Config
	deps    Deps
	grpc    *grpc.Server
	metrics *metrics
	streams *streamServer
	// podCIDR is what the kubelet last told; CNI configurations bring their
	// own ranges, so it is only shown.
	podCIDR atomic.Pointer[string]
	nextID  atomic.Uint64
	calls   calls
	// life ends when the server stops, and with it the streams of events, which
	// have no end of their own.
	life context.Context
	end  context.CancelFunc
}

// New builds a server with both services registered; Serve makes it reachable.
// The logger of ctx is the parent of the logger of every call.
func New(ctx context.Context, cfg Config, deps Deps) (*Server, error) {
	if deps.Pods == nil || deps.Containers == nil || deps.Observer == nil || deps.Exec == nil ||
		deps.Streams == nil || deps.Meter == nil || deps.Resizer == nil || deps.Events == nil || deps.Node == nil || deps.Network == nil || deps.Images == nil {
		return nil, errors.New("cri server: a service behind it is missing")
	}
	if cfg.StopTimeout == 0 {
		cfg.StopTimeout = 5 * time.Second
	}
	s := &Server{cfg: cfg, deps: deps, metrics: newMetrics()}
	s.life, s.end = context.WithCancel(context.WithoutCancel(ctx))
	s.streams = newStreamServer(s, cfg.Stream)
	s.grpc = grpc.NewServer(s.options(ctx)...)
	runtime.RegisterRuntimeServiceServer(s.grpc, &runtimeService{Server: s})
	runtime.RegisterImageServiceServer(s.grpc, &imageService{Server: s})
	return s, nil
}

// runtimeService implements RuntimeService. Its embedded parent answers
// Unimplemented for what is not written here.
type runtimeService struct {
	runtime.UnimplementedRuntimeServiceServer
	*Server
}

// imageService implements ImageService in the same way.
type imageService struct {
	runtime.UnimplementedImageServiceServer
	*Server
}
