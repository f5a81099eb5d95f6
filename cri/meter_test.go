package cri

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berthd/berth/imageservice"
	"github.com/berthd/berth/sandbox"
)

func (n *node) PodStats(_ context.Context, id string) (*runtime.PodSandboxStats, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return &runtime.PodSandboxStats{Attributes: &runtime.PodSandboxAttributes{Id: id}}, n.havePodLocked(id)
}

func (n *node) ListPodStats(_ context.Context, f *runtime.PodSandboxStatsFilter) ([]*runtime.PodSandboxStats, error) {
	var out []*runtime.PodSandboxStats
	for _, p := range n.ListPods(nil) {
		if f.GetId() == "" || f.GetId() == p.Id {
			out = append(out, &runtime.PodSandboxStats{Attributes: &runtime.PodSandboxAttributes{Id: p.Id}})
		}
	}
	return out, nil
}

func (n *node) MetricDescriptors() []*runtime.MetricDescriptor {
	return []*runtime.MetricDescriptor{{Name: "container_last_seen", Help: "When.", LabelKeys: []string{"id"}}}
}

func (n *node) ListPodMetrics(context.Context) ([]*runtime.PodSandboxMetrics, error) {
	var out []*runtime.PodSandboxMetrics
	for _, p := range n.ListPods(nil) {
		out = append(out, &runtime.PodSandboxMetrics{PodSandboxId: p.Id})
	}
	return out, nil
}

func (n *node) UpdatePodResources(_ context.Context, r *runtime.UpdatePodSandboxResourcesRequest) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.resources = r
	return n.havePodLocked(r.GetPodSandboxId())
}

func (n *node) FollowEvents(ctx context.Context, begun func() error, send func(*runtime.ContainerEventResponse) error) error {
	if err := begun(); err != nil {
		return err
	}
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case e, ok := <-n.events:
			if !ok {
				return n.eventsErr
			}
			if err := send(e); err != nil {
				return err
			}
		}
	}
}

func TestPodStats(t *testing.T) {
	e := mustEdge(t, newNode())
	pod := mustRun(t, e)
	r, err := e.PodSandboxStats(t.Context(), &runtime.PodSandboxStatsRequest{PodSandboxId: pod})
	if err != nil || r.GetStats().GetAttributes().GetId() != pod {
		t.Errorf("got %v, %v", r, err)
	}
	if _, err := e.PodSandboxStats(t.Context(), &runtime.PodSandboxStatsRequest{PodSandboxId: "absent"}); status.Code(err) != codes.NotFound {
		t.Errorf("absent pod: %v", err)
	}
	if _, err := e.PodSandboxStats(t.Context(), &runtime.PodSandboxStatsRequest{}); status.Code(err) != codes.InvalidArgument {
		t.Errorf("no ID: %v", err)
	}
	l, err := e.ListPodSandboxStats(t.Context(), &runtime.ListPodSandboxStatsRequest{Filter: &runtime.PodSandboxStatsFilter{Id: "other"}})
	if err != nil || len(l.GetStats()) != 0 {
		t.Errorf("list of another pod: %v, %v", l, err)
	}
	m, err := e.ListPodSandboxMetrics(t.Context(), &runtime.ListPodSandboxMetricsRequest{})
	if err != nil || len(m.GetPodMetrics()) != 1 {
		t.Errorf("metrics: %v, %v", m, err)
	}
}

func TestUpdatePodResources(t *testing.T) {
	n := newNode()
	e := mustEdge(t, n)
	pod := mustRun(t, e)
	update := func(r *runtime.UpdatePodSandboxResourcesRequest) error {
		_, err := e.UpdatePodSandboxResources(t.Context(), r)
		return err
	}
	if err := update(&runtime.UpdatePodSandboxResourcesRequest{PodSandboxId: pod, Resources: &runtime.LinuxContainerResources{CpuShares: 512}}); err != nil {
		t.Fatal(err)
	}
	if n.resources.GetResources().GetCpuShares() != 512 || n.resources.Overhead != nil {
		t.Errorf("passed on: %v", n.resources)
	}
	for name, tt := range map[string]struct {
		req  *runtime.UpdatePodSandboxResourcesRequest
		code codes.Code
		text string
	}{
		"no ID":      {&runtime.UpdatePodSandboxResourcesRequest{}, codes.InvalidArgument, "pod_sandbox_id"},
		"absent":     {&runtime.UpdatePodSandboxResourcesRequest{PodSandboxId: "absent"}, codes.NotFound, "absent"},
		"overhead":   {&runtime.UpdatePodSandboxResourcesRequest{PodSandboxId: pod, Overhead: &runtime.LinuxContainerResources{CpuPeriod: 1}}, codes.InvalidArgument, "overhead.cpu_period"},
		"resources ": {&runtime.UpdatePodSandboxResourcesRequest{PodSandboxId: pod, Resources: &runtime.LinuxContainerResources{MemoryLimitInBytes: -2}}, codes.InvalidArgument, "resources.memory_limit_in_bytes"},
	} {
		if err := update(tt.req); status.Code(err) != tt.code || !strings.Contains(err.Error(), tt.text) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestEvents(t *testing.T) {
	n := newNode()
	n.events = make(chan *runtime.ContainerEventResponse)
	n.eventsErr = fmt.Errorf("%w: 7 events wait for it", sandbox.ErrBehind)
	e := mustEdge(t, n)
	st, err := e.GetContainerEvents(t.Context(), &runtime.GetEventsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := st.Header(); err != nil { // it follows
		t.Fatal(err)
	}
	n.events <- &runtime.ContainerEventResponse{ContainerId: "a"}
	if r, err := st.Recv(); err != nil || r.GetContainerId() != "a" {
		t.Fatalf("got %v, %v", r, err)
	}
	close(n.events)
	if _, err := st.Recv(); status.Code(err) != codes.ResourceExhausted || !strings.Contains(err.Error(), "too slow") {
		t.Errorf("slow reader: %v", err)
	}
}

// TestEventsStop: a stream of events does not hold up the end of the server.
func TestEventsStop(t *testing.T) {
	e := mustEdge(t, newNode())
	e.server.cfg.StopTimeout = time.Minute
	st, err := e.GetContainerEvents(t.Context(), &runtime.GetEventsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := st.Header(); err != nil {
		t.Fatal(err)
	}
	go e.server.stop()
	if _, err := st.Recv(); status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "stopping") {
		t.Errorf("got %v", err)
	}
}

func TestBatches(t *testing.T) {
	item := func(size int) *runtime.PodSandbox { return &runtime.PodSandbox{Id: strings.Repeat("x", size)} }
	many := func(n, size int) (l []*runtime.PodSandbox) {
		for range n {
			l = append(l, item(size))
		}
		return l
	}
	for name, tt := range map[string]struct {
		items []*runtime.PodSandbox
		want  []int
	}{
		"none":                   {nil, nil},
		"one":                    {many(1, 10), []int{1}},
		"as many as may be":      {many(maxBatchItems, 1), []int{maxBatchItems}},
		"one more":               {many(maxBatchItems+1, 1), []int{maxBatchItems, 1}},
		"big ones":               {many(3, maxBatchBytes/2), []int{1, 1, 1}},
		"two fit":                {many(5, maxBatchBytes/2-100), []int{2, 2, 1}},
		"bigger than a message":  {append(many(1, 3*maxBatchBytes), many(2, 1)...), []int{1, 2}},
		"bigger ones at the end": {append(many(2, 1), many(2, 3*maxBatchBytes)...), []int{2, 1, 1}},
	} {
		var got []int
		seen := 0
		err := batches(tt.items, func(l []*runtime.PodSandbox) error {
			got = append(got, len(l))
			for _, i := range l {
				if i != tt.items[seen] {
					t.Errorf("%s: item %d is not in its place", name, seen)
				}
				seen++
			}
			return nil
		})
		if err != nil || fmt.Sprint(got) != fmt.Sprint(tt.want) || seen != len(tt.items) {
			t.Errorf("%s: batches of %v with %d items, %v, want %v", name, got, seen, err, tt.want)
		}
	}
	broken := errors.New("client gone")
	calls := 0
	if err := batches(many(3*maxBatchItems, 1), func([]*runtime.PodSandbox) error { calls++; return broken }); err != broken || calls != 1 {
		t.Errorf("after an error: %v, %d calls", err, calls)
	}
}

// TestStreams: each streaming list has what the unary one has, and ends cleanly
// when there is nothing.
func TestStreams(t *testing.T) {
	n := newNode()
	e := mustEdge(t, n)
	count := func() map[string]int {
		got := map[string]int{}
		pods, err := e.StreamPodSandboxes(t.Context(), &runtime.StreamPodSandboxesRequest{})
		got["pods"] = drain(t, pods, err, (*runtime.StreamPodSandboxesResponse).GetPodSandboxes)
		containers, err := e.StreamContainers(t.Context(), &runtime.StreamContainersRequest{})
		got["containers"] = drain(t, containers, err, (*runtime.StreamContainersResponse).GetContainers)
		stats, err := e.StreamContainerStats(t.Context(), &runtime.StreamContainerStatsRequest{})
		got["stats"] = drain(t, stats, err, (*runtime.StreamContainerStatsResponse).GetContainerStats)
		podStats, err := e.StreamPodSandboxStats(t.Context(), &runtime.StreamPodSandboxStatsRequest{})
		got["pod stats"] = drain(t, podStats, err, (*runtime.StreamPodSandboxStatsResponse).GetPodSandboxStats)
		metrics, err := e.StreamPodSandboxMetrics(t.Context(), &runtime.StreamPodSandboxMetricsRequest{})
		got["metrics"] = drain(t, metrics, err, (*runtime.StreamPodSandboxMetricsResponse).GetPodSandboxMetrics)
		images, err := e.images.StreamImages(t.Context(), &runtime.StreamImagesRequest{})
		got["images"] = drain(t, images, err, (*runtime.StreamImagesResponse).GetImages)
		return got
	}
	for name, got := range count() {
		if got != 0 {
			t.Errorf("%s: %d of an empty node", name, got)
		}
	}
	for i := range maxBatchItems + 5 { // more than fit into one message
		n.pods[fmt.Sprintf("%064x", i)] = podConfig()
	}
	n.containers["c"] = nil
	n.images["example.org/a:1"] = imageservice.Image{ID: "sha256:1"}
	want := map[string]int{"pods": len(n.pods), "containers": 1, "stats": 0, "pod stats": len(n.pods), "metrics": len(n.pods), "images": 1}
	for name, got := range count() {
		if got != want[name] {
			t.Errorf("%s: %d, want %d", name, got, want[name])
		}
	}
	st, err := e.images.StreamImages(t.Context(), &runtime.StreamImagesRequest{Filter: &runtime.ImageFilter{Image: &runtime.ImageSpec{Image: "UPPER/case"}}})
	if err == nil {
		_, err = st.Recv()
	}
	if status.Code(err) != codes.InvalidArgument {
		t.Errorf("malformed filter: %v", err)
	}
}

// drain counts the items of a stream, which must have no empty message.
func drain[R, I any](t *testing.T, st interface{ Recv() (*R, error) }, err error, items func(*R) []I) int {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	for n := 0; ; {
		r, err := st.Recv()
		if errors.Is(err, io.EOF) {
			return n
		}
		if err != nil {
			t.Fatal(err)
		}
		if len(items(r)) == 0 {
			t.Errorf("an empty message after %d items", n)
		}
		n += len(items(r))
	}
}
