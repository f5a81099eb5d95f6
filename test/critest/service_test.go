package critest

import (
	"encoding/json"
	"os"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestVersion(t *testing.T) {
	b := open(t)
	r, err := b.client.Version(b.ctx, &runtime.VersionRequest{Version: "0.1.0"})
	b.must(err)
	if r.Version != "0.1.0" || r.RuntimeApiVersion != "v1" || r.RuntimeName == "" || r.RuntimeVersion == "" {
		t.Errorf("got %v", r)
	}
	if b.node != nil && r.RuntimeName != "berth" {
		t.Errorf("runtime name %q, want berth", r.RuntimeName)
	}
}

func TestStatus(t *testing.T) {
	b := open(t)
	r, err := b.client.Status(b.ctx, &runtime.StatusRequest{})
	b.must(err)
	conditions := map[string]bool{}
	for _, c := range r.GetStatus().GetConditions() {
		conditions[c.Type] = c.Status
		if !c.Status && strings.HasSuffix(c.Type, "Ready") {
			t.Errorf("%s is false: %s: %s", c.Type, c.Reason, c.Message)
		}
	}
	if len(conditions) < 2 || !conditions["RuntimeReady"] || !conditions["NetworkReady"] {
		t.Errorf("conditions %v, want RuntimeReady and NetworkReady", conditions)
	}
	names := []string{}
	for _, h := range r.RuntimeHandlers {
		names = append(names, h.Name)
		if h.Features == nil {
			t.Errorf("handler %q: no features", h.Name)
		}
	}
	if !slices.Contains(names, "") || !slices.Contains(names, "runc") {
		t.Errorf("runtime handlers %q, want the default one, which has no name, and runc", names)
	}
	if !r.GetFeatures().GetSupplementalGroupsPolicy() {
		t.Errorf("features %v, want supplemental_groups_policy, which is tested here", r.Features)
	}
	if len(r.Info) != 0 {
		t.Errorf("info %v, want it only when verbose", r.Info)
	}
}

func TestStatusVerbose(t *testing.T) {
	b := open(t)
	r, err := b.client.Status(b.ctx, &runtime.StatusRequest{Verbose: true})
	b.must(err)
	if len(r.Info) == 0 {
		t.Error("info is empty")
	}
	structured := false
	for _, v := range r.Info {
		structured = structured || strings.HasPrefix(v, "{") && json.Valid([]byte(v))
	}
	if !structured {
		t.Errorf("no value of info is a JSON object: %v", r.Info)
	}
}

func TestRuntimeConfig(t *testing.T) {
	b := open(t)
	r, err := b.client.RuntimeConfig(b.ctx, &runtime.RuntimeConfigRequest{})
	b.must(err)
	if got := r.GetLinux().GetCgroupDriver(); got != runtime.CgroupDriver_CGROUPFS {
		t.Errorf("cgroup driver %v, want %v as configured", got, runtime.CgroupDriver_CGROUPFS)
	}
}

func TestUpdateRuntimeConfig(t *testing.T) {
	b := open(t)
	_, err := b.client.UpdateRuntimeConfig(b.ctx, &runtime.UpdateRuntimeConfigRequest{
		RuntimeConfig: &runtime.RuntimeConfig{NetworkConfig: &runtime.NetworkConfig{PodCidr: "10.1.0.0/24"}},
	})
	b.must(err)
	_, err = b.client.UpdateRuntimeConfig(b.ctx, &runtime.UpdateRuntimeConfigRequest{})
	b.must(err)
}

// TestUnimplemented holds that what berth does not serve yet is refused by
// gRPC itself and never answered with a success that did nothing.
func TestUnimplemented(t *testing.T) {
	b := open(t)
	b.ours()
	for name, call := range map[string]func() error{
		"CheckpointContainer": func() error {
			_, err := b.client.CheckpointContainer(b.ctx, &runtime.CheckpointContainerRequest{})
			return err
		},
		"RestorePod": func() error {
			_, err := b.client.RestorePod(b.ctx, &runtime.RestorePodRequest{})
			return err
		},
		"CheckpointPod": func() error {
			_, err := b.client.CheckpointPod(b.ctx, &runtime.CheckpointPodRequest{})
			return err
		},
	} {
		if err := call(); status.Code(err) != codes.Unimplemented {
			t.Errorf("%s: got %v, want code Unimplemented", name, err)
		}
	}
}

// TestUnknownIDs: what is not there is told by NotFound and by its ID, or, for
// what is idempotent, is no error at all.
func TestUnknownIDs(t *testing.T) {
	b := open(t)
	const id = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
	for name, call := range map[string]func() error{
		"PodSandboxStatus": func() error {
			_, err := b.client.PodSandboxStatus(b.ctx, &runtime.PodSandboxStatusRequest{PodSandboxId: id})
			return err
		},
		"CreateContainer": func() error {
			p := &pod{box: b, id: id, cfg: b.podConfig(), all: &[]string{}}
			_, err := p.tryCreate(sh("true"))
			return err
		},
		"StartContainer": func() error {
			_, err := b.client.StartContainer(b.ctx, &runtime.StartContainerRequest{ContainerId: id})
			return err
		},
		"ContainerStatus": func() error { _, err := b.client.ContainerState(b.ctx, id); return err },
		"ExecSync": func() error {
			_, err := b.client.ExecSync(b.ctx, &runtime.ExecSyncRequest{ContainerId: id, Cmd: []string{"true"}})
			return err
		},
		"ReopenContainerLog": func() error {
			_, err := b.client.ReopenContainerLog(b.ctx, &runtime.ReopenContainerLogRequest{ContainerId: id})
			return err
		},
		"UpdateContainerResources": func() error {
			_, err := b.client.UpdateContainerResources(b.ctx, &runtime.UpdateContainerResourcesRequest{ContainerId: id, Linux: &runtime.LinuxContainerResources{CpuShares: 100}})
			return err
		},
		"ContainerStats": func() error {
			_, err := b.client.ContainerStats(b.ctx, &runtime.ContainerStatsRequest{ContainerId: id})
			return err
		},
	} {
		t.Run(name, func(t *testing.T) { b.with(t).refused(call(), codes.NotFound, id[:12]) })
	}
	for name, call := range map[string]func() error{
		"StopPodSandbox": func() error {
			_, err := b.client.StopPodSandbox(b.ctx, &runtime.StopPodSandboxRequest{PodSandboxId: id})
			return err
		},
		"RemovePodSandbox": func() error {
			_, err := b.client.RemovePodSandbox(b.ctx, &runtime.RemovePodSandboxRequest{PodSandboxId: id})
			return err
		},
		"StopContainer": func() error {
			_, err := b.client.StopContainer(b.ctx, &runtime.StopContainerRequest{ContainerId: id})
			return err
		},
		"RemoveContainer": func() error {
			_, err := b.client.RemoveContainer(b.ctx, &runtime.RemoveContainerRequest{ContainerId: id})
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			if err := call(); err != nil {
				t.Errorf("got %v, want no error: the call is idempotent", err)
			}
		})
	}
}

// TestEmptyIDs: an empty ID must never be taken for a prefix of every ID.
func TestEmptyIDs(t *testing.T) {
	b := open(t)
	p := b.pod()
	c := p.run(sh("sleep 300"))
	for name, call := range map[string]func() error{
		"PodSandboxStatus": func() error {
			_, err := b.client.PodSandboxStatus(b.ctx, &runtime.PodSandboxStatusRequest{})
			return err
		},
		"ContainerStatus": func() error { _, err := b.client.ContainerState(b.ctx, ""); return err },
		"StartContainer": func() error {
			_, err := b.client.StartContainer(b.ctx, &runtime.StartContainerRequest{})
			return err
		},
		"ExecSync": func() error {
			_, err := b.client.ExecSync(b.ctx, &runtime.ExecSyncRequest{Cmd: []string{"true"}})
			return err
		},
	} {
		if err := call(); err == nil {
			t.Errorf("%s without an ID: no error", name)
		}
	}
	if st := c.status(); st.State != runtime.ContainerState_CONTAINER_RUNNING {
		t.Errorf("container is %v after calls without an ID", st.State)
	}
}

// TestSocketIsPrivate: the socket means root on the machine. The run directory may
// be passed through, but not looked into, once there are pods with user namespaces.
func TestSocketIsPrivate(t *testing.T) {
	b := open(t)
	b.ours()
	for path, want := range map[string]os.FileMode{b.node.Socket: 0o600, b.node.RunDir: 0o700, b.node.StateDir: 0o700} {
		st, err := os.Stat(path)
		b.must(err)
		if got := st.Mode().Perm(); got != want && !(path == b.node.RunDir && got == 0o711) {
			t.Errorf("%s has mode %04o, want %04o", path, got, want)
		}
	}
}
