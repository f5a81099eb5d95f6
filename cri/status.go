package cri

import (
	"context"
	"encoding/json"
	goruntime "runtime"
	"slices"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/klog/v2"
)

// What Version answers. The kubelet refuses a runtime whose "version" is not
// this constant, whatever version it sent itself.
const (
	kubeletVersion = "0.1.0"
	runtimeName    = "berth"
	apiVersion     = "v1"
)

func (s *runtimeService) Version(context.Context, *runtime.VersionRequest) (*runtime.VersionResponse, error) {
	return &runtime.VersionResponse{
		Version:           kubeletVersion,
		RuntimeName:       runtimeName,
		RuntimeVersion:    s.cfg.Version,
		RuntimeApiVersion: apiVersion,
	}, nil
}

func (s *runtimeService) Status(_ context.Context, r *runtime.StatusRequest) (*runtime.StatusResponse, error) {
	handlers := s.deps.Node.RuntimeHandlers()
	userNS := slices.ContainsFunc(handlers, func(h *runtime.RuntimeHandler) bool { return h.GetFeatures().GetUserNamespaces() })
	resp := &runtime.StatusResponse{
		Status: &runtime.RuntimeStatus{Conditions: []*runtime.RuntimeCondition{
			condition(runtime.RuntimeReady, "RuntimeUnusable", s.deps.Node.RuntimeReady()),
			condition(runtime.NetworkReady, "NetworkPluginNotReady", s.deps.Network.Ready()),
		}},
		RuntimeHandlers: handlers,
		Features:        &runtime.RuntimeFeatures{SupplementalGroupsPolicy: true, MountOptions: true, UserNamespacesHostNetwork: userNS},
	}
	if r.GetVerbose() {
		resp.Info = s.info()
	}
	return resp, nil
}

// condition is true if err is nil; otherwise it tells why not.
func condition(kind, reason string, err error) *runtime.RuntimeCondition {
	if err != nil {
		return &runtime.RuntimeCondition{Type: kind, Reason: reason, Message: clip(err.Error(), maxErrorText)}
	}
	return &runtime.RuntimeCondition{Type: kind, Status: true}
}

// info gathers the diagnostic values: JSON each, as the interface wants them.
func (s *Server) info() map[string]string {
	info := make(map[string]string)
	add := func(key string, v any) {
		b, err := json.Marshal(v)
		if err != nil {
			b, _ = json.Marshal(err.Error())
		}
		info[key] = string(b)
	}
	for k, v := range s.deps.Node.Info() {
		if json.Valid([]byte(v)) {
			info[k] = v
		} else {
			add(k, v)
		}
	}
	for k, f := range s.cfg.Info {
		add(k, f())
	}
	add("versions", map[string]string{
		runtimeName: s.cfg.Version,
		"cri":       apiVersion,
		"go":        goruntime.Version(),
	})
	if cidr := s.podCIDR.Load(); cidr != nil {
		add("podCIDR", *cidr)
	}
	return info
}

func (s *runtimeService) RuntimeConfig(context.Context, *runtime.RuntimeConfigRequest) (*runtime.RuntimeConfigResponse, error) {
	driver := runtime.CgroupDriver_CGROUPFS
	if s.deps.Node.CgroupDriver() == "systemd" {
		driver = runtime.CgroupDriver_SYSTEMD
	}
	return &runtime.RuntimeConfigResponse{Linux: &runtime.LinuxRuntimeConfiguration{CgroupDriver: driver}}, nil
}

// UpdateRuntimeConfig takes note of the range of the node's pods. It changes
// nothing: CNI configurations carry their own ranges.
func (s *runtimeService) UpdateRuntimeConfig(ctx context.Context, r *runtime.UpdateRuntimeConfigRequest) (*runtime.UpdateRuntimeConfigResponse, error) {
	cidr := r.GetRuntimeConfig().GetNetworkConfig().GetPodCidr()
	if err := checkPodCIDR(cidr); err != nil {
		return nil, err
	}
	if old := s.podCIDR.Swap(&cidr); cidr != "" && (old == nil || *old != cidr) {
		klog.FromContext(ctx).Info("Pod CIDR noted, the CNI configuration decides about addresses", "podCIDR", cidr)
	}
	return &runtime.UpdateRuntimeConfigResponse{}, nil
}
