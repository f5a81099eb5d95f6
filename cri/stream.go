package cri

import (
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// The streaming lists (KEP-5825) answer what the unary ones answer, in several
// messages, so that no node is too big for the limit on one. The list is of one
// moment; each item is in exactly one message, no message is empty, and the end of
// the stream is the end of the list.

// Bounds of one message. One item that is bigger has a message of its own.
const (
	maxBatchBytes = 1 << 20
	maxBatchItems = 1000
)

// batches sends items in messages within the bounds, in their order.
func batches[T proto.Message](items []T, send func([]T) error) error {
	begin, size := 0, 0
	for i, item := range items {
		const framing = 8 // tag and length of an item, generously
		n := proto.Size(item) + framing
		if i > begin && (size+n > maxBatchBytes || i-begin == maxBatchItems) {
			if err := send(items[begin:i]); err != nil {
				return err
			}
			begin, size = i, 0
		}
		size += n
	}
	if begin == len(items) {
		return nil
	}
	return send(items[begin:])
}

func (s *runtimeService) StreamPodSandboxes(r *runtime.StreamPodSandboxesRequest, out grpc.ServerStreamingServer[runtime.StreamPodSandboxesResponse]) error {
	return batches(s.deps.Pods.ListPods(r.GetFilter()), func(l []*runtime.PodSandbox) error {
		return out.Send(&runtime.StreamPodSandboxesResponse{PodSandboxes: l})
	})
}

func (s *runtimeService) StreamContainers(r *runtime.StreamContainersRequest, out grpc.ServerStreamingServer[runtime.StreamContainersResponse]) error {
	return batches(s.deps.Observer.ListContainers(r.GetFilter()), func(l []*runtime.Container) error {
		return out.Send(&runtime.StreamContainersResponse{Containers: l})
	})
}

func (s *runtimeService) StreamContainerStats(r *runtime.StreamContainerStatsRequest, out grpc.ServerStreamingServer[runtime.StreamContainerStatsResponse]) error {
	list, err := s.deps.Observer.ListContainerStats(out.Context(), r.GetFilter())
	if err != nil {
		return err
	}
	return batches(list, func(l []*runtime.ContainerStats) error {
		return out.Send(&runtime.StreamContainerStatsResponse{ContainerStats: l})
	})
}

func (s *runtimeService) StreamPodSandboxStats(r *runtime.StreamPodSandboxStatsRequest, out grpc.ServerStreamingServer[runtime.StreamPodSandboxStatsResponse]) error {
	list, err := s.deps.Meter.ListPodStats(out.Context(), r.GetFilter())
	if err != nil {
		return err
	}
	return batches(list, func(l []*runtime.PodSandboxStats) error {
		return out.Send(&runtime.StreamPodSandboxStatsResponse{PodSandboxStats: l})
	})
}

func (s *runtimeService) StreamPodSandboxMetrics(_ *runtime.StreamPodSandboxMetricsRequest, out grpc.ServerStreamingServer[runtime.StreamPodSandboxMetricsResponse]) error {
	list, err := s.deps.Meter.ListPodMetrics(out.Context())
	if err != nil {
		return err
	}
	return batches(list, func(l []*runtime.PodSandboxMetrics) error {
		return out.Send(&runtime.StreamPodSandboxMetricsResponse{PodSandboxMetrics: l})
	})
}

func (s *imageService) StreamImages(r *runtime.StreamImagesRequest, out grpc.ServerStreamingServer[runtime.StreamImagesResponse]) error {
	list, err := s.ListImages(out.Context(), &runtime.ListImagesRequest{Filter: r.GetFilter()})
	if err != nil {
		return err
	}
	return batches(list.GetImages(), func(l []*runtime.Image) error {
		return out.Send(&runtime.StreamImagesResponse{Images: l})
	})
}
