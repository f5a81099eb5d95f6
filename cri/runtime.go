package cri

import (
	"context"
	"fmt"
	"time"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berthd/berth/sandbox"
)

func (s *runtimeService) RunPodSandbox(ctx context.Context, r *runtime.RunPodSandboxRequest) (*runtime.RunPodSandboxResponse, error) {
	if err := checkRunPod(r); err != nil {
		return nil, err
	}
	id, err := s.deps.Pods.RunPod(ctx, r.GetConfig(), r.GetRuntimeHandler())
	if err != nil {
		return nil, err
	}
	return &runtime.RunPodSandboxResponse{PodSandboxId: id}, nil
}

func (s *runtimeService) StopPodSandbox(ctx context.Context, r *runtime.StopPodSandboxRequest) (*runtime.StopPodSandboxResponse, error) {
	if err := checkID("pod_sandbox_id", r.GetPodSandboxId()); err != nil {
		return nil, err
	}
	err := ignore(s.deps.Pods.StopPod(ctx, r.GetPodSandboxId()), sandbox.ErrNotFound)
	return &runtime.StopPodSandboxResponse{}, err
}

func (s *runtimeService) RemovePodSandbox(ctx context.Context, r *runtime.RemovePodSandboxRequest) (*runtime.RemovePodSandboxResponse, error) {
	if err := checkID("pod_sandbox_id", r.GetPodSandboxId()); err != nil {
		return nil, err
	}
	err := ignore(s.deps.Pods.RemovePod(ctx, r.GetPodSandboxId()), sandbox.ErrNotFound)
	return &runtime.RemovePodSandboxResponse{}, err
}

func (s *runtimeService) PodSandboxStatus(ctx context.Context, r *runtime.PodSandboxStatusRequest) (*runtime.PodSandboxStatusResponse, error) {
	if err := checkID("pod_sandbox_id", r.GetPodSandboxId()); err != nil {
		return nil, err
	}
	return s.deps.Pods.PodStatus(ctx, r.GetPodSandboxId(), r.GetVerbose())
}

func (s *runtimeService) ListPodSandbox(_ context.Context, r *runtime.ListPodSandboxRequest) (*runtime.ListPodSandboxResponse, error) {
	return &runtime.ListPodSandboxResponse{Items: s.deps.Pods.ListPods(r.GetFilter())}, nil
}

func (s *runtimeService) CreateContainer(ctx context.Context, r *runtime.CreateContainerRequest) (*runtime.CreateContainerResponse, error) {
	if err := checkCreateContainer(r); err != nil {
		return nil, err
	}
	id, err := s.deps.Containers.CreateContainer(ctx, r.GetPodSandboxId(), r.GetConfig(), r.GetSandboxConfig())
	if err != nil {
		return nil, err
	}
	return &runtime.CreateContainerResponse{ContainerId: id}, nil
}

func (s *runtimeService) StartContainer(ctx context.Context, r *runtime.StartContainerRequest) (*runtime.StartContainerResponse, error) {
	if err := checkID("container_id", r.GetContainerId()); err != nil {
		return nil, err
	}
	return &runtime.StartContainerResponse{}, s.deps.Containers.StartContainer(ctx, r.GetContainerId())
}

func (s *runtimeService) StopContainer(ctx context.Context, r *runtime.StopContainerRequest) (*runtime.StopContainerResponse, error) {
	if err := checkID("container_id", r.GetContainerId()); err != nil {
		return nil, err
	}
	grace, err := seconds("timeout", r.GetTimeout())
	if err != nil {
		return nil, err
	}
	err = ignore(s.deps.Containers.StopContainer(ctx, r.GetContainerId(), grace), sandbox.ErrNotFound)
	return &runtime.StopContainerResponse{}, err
}

func (s *runtimeService) RemoveContainer(ctx context.Context, r *runtime.RemoveContainerRequest) (*runtime.RemoveContainerResponse, error) {
	if err := checkID("container_id", r.GetContainerId()); err != nil {
		return nil, err
	}
	err := ignore(s.deps.Containers.RemoveContainer(ctx, r.GetContainerId()), sandbox.ErrNotFound)
	return &runtime.RemoveContainerResponse{}, err
}

func (s *runtimeService) ContainerStatus(ctx context.Context, r *runtime.ContainerStatusRequest) (*runtime.ContainerStatusResponse, error) {
	if err := checkID("container_id", r.GetContainerId()); err != nil {
		return nil, err
	}
	return s.deps.Observer.ContainerStatus(ctx, r.GetContainerId(), r.GetVerbose())
}

func (s *runtimeService) ListContainers(_ context.Context, r *runtime.ListContainersRequest) (*runtime.ListContainersResponse, error) {
	return &runtime.ListContainersResponse{Containers: s.deps.Observer.ListContainers(r.GetFilter())}, nil
}

func (s *runtimeService) UpdateContainerResources(ctx context.Context, r *runtime.UpdateContainerResourcesRequest) (*runtime.UpdateContainerResourcesResponse, error) {
	if err := checkUpdateResources(r); err != nil {
		return nil, err
	}
	return &runtime.UpdateContainerResourcesResponse{}, s.deps.Containers.UpdateResources(ctx, r)
}

func (s *runtimeService) ReopenContainerLog(ctx context.Context, r *runtime.ReopenContainerLogRequest) (*runtime.ReopenContainerLogResponse, error) {
	if err := checkID("container_id", r.GetContainerId()); err != nil {
		return nil, err
	}
	return &runtime.ReopenContainerLogResponse{}, s.deps.Exec.ReopenLog(ctx, r.GetContainerId())
}

func (s *runtimeService) ExecSync(ctx context.Context, r *runtime.ExecSyncRequest) (*runtime.ExecSyncResponse, error) {
	timeout, err := checkExecSync(r)
	if err != nil {
		return nil, err
	}
	resp, err := s.deps.Exec.ExecSync(ctx, r.GetContainerId(), r.GetCmd(), timeout)
	if err != nil {
		return nil, err
	}
	return fitExec(resp, MaxMessage-execFraming), nil
}

// execFraming is what an ExecSyncResponse needs beside its output, in bytes,
// generously.
const execFraming = 64

// fitExec cuts output so that the answer can be sent, and says so at the end of
// stderr: each stream is allowed 16 MiB by the interface, and so is the whole
// message by gRPC. The longer stream loses first; the interface wants output cut
// without an error.
func fitExec(r *runtime.ExecSyncResponse, budget int) *runtime.ExecSyncResponse {
	if len(r.GetStdout())+len(r.GetStderr()) <= budget {
		return r
	}
	note := fmt.Sprintf("\n[output cut off at %d bytes of both streams]\n", budget)
	budget -= len(note)
	over := len(r.GetStdout()) + len(r.GetStderr()) - budget
	long, short := &r.Stdout, &r.Stderr
	if len(*short) > len(*long) {
		long, short = short, long
	}
	if n := len(*long) - over; n >= len(*short) {
		*long = (*long)[:n]
	} else {
		*long, *short = (*long)[:budget/2], (*short)[:budget/2]
	}
	r.Stderr = append(r.Stderr, note...)
	return r
}

func (s *runtimeService) ContainerStats(ctx context.Context, r *runtime.ContainerStatsRequest) (*runtime.ContainerStatsResponse, error) {
	if err := checkID("container_id", r.GetContainerId()); err != nil {
		return nil, err
	}
	stats, err := s.deps.Observer.ContainerStats(ctx, r.GetContainerId())
	if err != nil {
		return nil, err
	}
	return &runtime.ContainerStatsResponse{Stats: stats}, nil
}

func (s *runtimeService) ListContainerStats(ctx context.Context, r *runtime.ListContainerStatsRequest) (*runtime.ListContainerStatsResponse, error) {
	stats, err := s.deps.Observer.ListContainerStats(ctx, r.GetFilter())
	if err != nil {
		return nil, err
	}
	return &runtime.ListContainerStatsResponse{Stats: stats}, nil
}

// maxSeconds is more than any caller waits and fits into a time.Duration.
const maxSeconds = int64(100 * 365 * 24 * time.Hour / time.Second)

// seconds is a timeout of a request as a duration. Very long ones, which the
// kubelet passes on as users wrote them, become a hundred years.
func seconds(field string, n int64) (time.Duration, error) {
	if n < 0 {
		return 0, invalid(field, "%d s is negative", n)
	}
	return time.Duration(min(n, maxSeconds)) * time.Second, nil
}
