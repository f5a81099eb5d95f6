package cri

import (
	"context"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Meter measures pods. None of its methods waits for an operation.
type Meter interface {
	PodStats(ctx context.Context, id string) (*runtime.PodSandboxStats, error)
	ListPodStats(ctx context.Context, f *runtime.PodSandboxStatsFilter) ([]*runtime.PodSandboxStats, error)
	MetricDescriptors() []*runtime.MetricDescriptor
	ListPodMetrics(ctx context.Context) ([]*runtime.PodSandboxMetrics, error)
}

// Resizer changes what is on record of a pod.
type Resizer interface {
	UpdatePodResources(ctx context.Context, r *runtime.UpdatePodSandboxResourcesRequest) error
}

func (s *runtimeService) PodSandboxStats(ctx context.Context, r *runtime.PodSandboxStatsRequest) (*runtime.PodSandboxStatsResponse, error) {
	if err := checkID("pod_sandbox_id", r.GetPodSandboxId()); err != nil {
		return nil, err
	}
	stats, err := s.deps.Meter.PodStats(ctx, r.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	return &runtime.PodSandboxStatsResponse{Stats: stats}, nil
}

func (s *runtimeService) ListPodSandboxStats(ctx context.Context, r *runtime.ListPodSandboxStatsRequest) (*runtime.ListPodSandboxStatsResponse, error) {
	stats, err := s.deps.Meter.ListPodStats(ctx, r.GetFilter())
	if err != nil {
		return nil, err
	}
	return &runtime.ListPodSandboxStatsResponse{Stats: stats}, nil
}

func (s *runtimeService) ListMetricDescriptors(context.Context, *runtime.ListMetricDescriptorsRequest) (*runtime.ListMetricDescriptorsResponse, error) {
	return &runtime.ListMetricDescriptorsResponse{Descriptors: s.deps.Meter.MetricDescriptors()}, nil
}

func (s *runtimeService) ListPodSandboxMetrics(ctx context.Context, _ *runtime.ListPodSandboxMetricsRequest) (*runtime.ListPodSandboxMetricsResponse, error) {
	metrics, err := s.deps.Meter.ListPodMetrics(ctx)
	if err != nil {
		return nil, err
	}
	return &runtime.ListPodSandboxMetricsResponse{PodMetrics: metrics}, nil
}

func (s *runtimeService) UpdatePodSandboxResources(ctx context.Context, r *runtime.UpdatePodSandboxResourcesRequest) (*runtime.UpdatePodSandboxResourcesResponse, error) {
	err := first(
		func() error { return checkID("pod_sandbox_id", r.GetPodSandboxId()) },
		func() error { return checkResources("overhead", r.GetOverhead()) },
		func() error { return checkResources("resources", r.GetResources()) },
	)
	if err != nil {
		return nil, err
	}
	return &runtime.UpdatePodSandboxResourcesResponse{}, s.deps.Resizer.UpdatePodResources(ctx, r)
}
