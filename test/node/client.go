package node

import (
	"context"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Client is the two CRI services behind one socket.
type Client struct {
	runtime.RuntimeServiceClient
	Images runtime.ImageServiceClient
	conn   *grpc.ClientConn
	ids    *idSet
}

// idSet holds the IDs of all pods and containers that a client was given.
type idSet struct {
	mu  sync.Mutex
	all map[string]bool
}

func (s *idSet) add(id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.all == nil {
		s.all = map[string]bool{}
	}
	if id != "" {
		s.all[id] = true
	}
}

func (s *idSet) list() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Sorted(maps.Keys(s.all))
}

// Dial connects to a CRI endpoint: a socket's path or a unix:// address. ids
// may be nil. Calls made while nobody listens wait for their context's end.
func Dial(endpoint string, ids *idSet) (*Client, error) {
	if ids == nil {
		ids = &idSet{}
	}
	target := "unix://" + strings.TrimPrefix(endpoint, "unix://")
	remember := func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		err := invoke(ctx, method, req, reply, cc, opts...)
		switch r := reply.(type) {
		case *runtime.RunPodSandboxResponse:
			ids.add(r.GetPodSandboxId())
		case *runtime.CreateContainerResponse:
			ids.add(r.GetContainerId())
		}
		return err
	}
	conn, err := grpc.NewClient(target,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithUnaryInterceptor(remember),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(64<<20)),
		// A restarted berthd is to be found at once.
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 5 * time.Millisecond, Multiplier: 1.3, MaxDelay: 100 * time.Millisecond},
			MinConnectTimeout: time.Second,
		}))
	if err != nil {
		return nil, fmt.Errorf("client %s: %w", endpoint, err)
	}
	return &Client{
		RuntimeServiceClient: runtime.NewRuntimeServiceClient(conn), Images: runtime.NewImageServiceClient(conn), conn: conn, ids: ids,
	}, nil
}

// Close drops the connection.
func (c *Client) Close() error { return c.conn.Close() }

// Reset drops a broken connection's back-off, so that the next call connects.
func (c *Client) Reset() { c.conn.ResetConnectBackoff() }

// Pull pulls ref without credentials and returns the image's ID.
func (c *Client) Pull(ctx context.Context, ref string) (string, error) {
	r, err := c.Images.PullImage(ctx, &runtime.PullImageRequest{Image: &runtime.ImageSpec{Image: ref}})
	return r.GetImageRef(), err
}

// Run runs a pod and returns its ID.
func (c *Client) Run(ctx context.Context, cfg *runtime.PodSandboxConfig) (string, error) {
	r, err := c.RunPodSandbox(ctx, &runtime.RunPodSandboxRequest{Config: cfg})
	return r.GetPodSandboxId(), err
}

// Launch creates a container and starts it, and returns its ID, also together
// with an error of the start.
func (c *Client) Launch(ctx context.Context, pod string, cfg *runtime.ContainerConfig, podCfg *runtime.PodSandboxConfig) (string, error) {
	r, err := c.CreateContainer(ctx, &runtime.CreateContainerRequest{PodSandboxId: pod, Config: cfg, SandboxConfig: podCfg})
	if err != nil {
		return "", err
	}
	_, err = c.StartContainer(ctx, &runtime.StartContainerRequest{ContainerId: r.ContainerId})
	return r.ContainerId, err
}

// Status returns a container's status.
func (c *Client) ContainerState(ctx context.Context, id string) (*runtime.ContainerStatus, error) {
	r, err := c.ContainerStatus(ctx, &runtime.ContainerStatusRequest{ContainerId: id})
	return r.GetStatus(), err
}

// WaitExited polls until the container is reported as exited.
func (c *Client) WaitExited(ctx context.Context, id string) (*runtime.ContainerStatus, error) {
	for {
		st, err := c.ContainerState(ctx, id)
		if err != nil {
			return nil, err
		}
		if st.State == runtime.ContainerState_CONTAINER_EXITED {
			return st, nil
		}
		select {
		case <-ctx.Done():
			return st, fmt.Errorf("container %.12s: %v: %w", id, st.State, ctx.Err())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// Destroy stops and removes a pod with all its containers.
func (c *Client) Destroy(ctx context.Context, pod string) error {
	if _, err := c.StopPodSandbox(ctx, &runtime.StopPodSandboxRequest{PodSandboxId: pod}); err != nil {
		return err
	}
	_, err := c.RemovePodSandbox(ctx, &runtime.RemovePodSandboxRequest{PodSandboxId: pod})
	return err
}

// DestroyAll stops and removes every pod of the endpoint whose ID this client
// was given, and every pod at all if all is true.
func (c *Client) DestroyAll(ctx context.Context, all bool) error {
	pods, err := c.ListPodSandbox(ctx, &runtime.ListPodSandboxRequest{})
	if err != nil {
		return err
	}
	known := c.ids.list()
	for _, p := range pods.Items {
		if !all && !slices.Contains(known, p.Id) {
			continue
		}
		if err := c.Destroy(ctx, p.Id); err != nil {
			return fmt.Errorf("pod %.12s: %w", p.Id, err)
		}
	}
	return nil
}

// PodConfig returns the configuration of a plain pod. Its logs go to a
// directory below logDir, its cgroup below parent.
func PodConfig(name, logDir, parent string) *runtime.PodSandboxConfig {
	return &runtime.PodSandboxConfig{
		Metadata:     &runtime.PodSandboxMetadata{Name: name, Namespace: "berth-test", Uid: "uid-" + name, Attempt: 0},
		Hostname:     strings.ToLower(name),
		LogDirectory: filepath.Join(logDir, name),
		Labels:       map[string]string{"pod": name},
		Linux: &runtime.LinuxPodSandboxConfig{
			CgroupParent:    filepath.Join(parent, "pod-"+name),
			SecurityContext: &runtime.LinuxSandboxSecurityContext{NamespaceOptions: &runtime.NamespaceOption{Pid: runtime.NamespaceMode_CONTAINER}},
		},
	}
}

// ContainerConfig returns the configuration of a plain container that runs
// command in image.
func ContainerConfig(name, image string, command ...string) *runtime.ContainerConfig {
	return &runtime.ContainerConfig{
		Metadata: &runtime.ContainerMetadata{Name: name, Attempt: 0},
		Image:    &runtime.ImageSpec{Image: image, UserSpecifiedImage: image},
		Command:  command,
		LogPath:  name + ".log",
		Labels:   map[string]string{"container": name},
		Linux: &runtime.LinuxContainerConfig{
			Resources:       &runtime.LinuxContainerResources{},
			SecurityContext: &runtime.LinuxContainerSecurityContext{NamespaceOptions: &runtime.NamespaceOption{Pid: runtime.NamespaceMode_CONTAINER}},
		},
	}
}
