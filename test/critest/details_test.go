package critest

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berthd/berth/test/node"
)

// TestContainerVerboseStatus: the information is JSON, and true.
func TestContainerVerboseStatus(t *testing.T) {
	b := open(t)
	b.ours()
	p := b.pod()
	c := p.run(sh("exec sleep 4323"), func(cfg *runtime.ContainerConfig) { cfg.Labels = map[string]string{"seen": "yes"} })
	verbose := func() map[string]string {
		r, err := b.client.ContainerStatus(b.ctx, &runtime.ContainerStatusRequest{ContainerId: c.id, Verbose: true})
		b.must(err)
		return r.Info
	}
	var info struct {
		SandboxID, State, Cgroup, Snapshot, Bundle string
		Pid, ShimPid                               int
		Config                                     struct{ Labels map[string]string }
		RuntimeSpec                                struct {
			Process struct{ Args []string }
			Linux   struct{ CgroupsPath string }
		}
	}
	err := json.Unmarshal([]byte(verbose()["info"]), &info)
	b.must(err)
	if info.SandboxID != p.id || info.State != "running" || info.Config.Labels["seen"] != "yes" || len(info.RuntimeSpec.Process.Args) != 3 {
		t.Errorf("information %+v", info)
	}
	// The runtime starts a container by telling its init, which then becomes the program.
	var cmdline []byte
	b.until("program in place of the runtime's init", func() bool {
		cmdline, err = os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", info.Pid))
		return err != nil || !strings.HasSuffix(string(cmdline), "init\x00")
	})
	if err != nil || !strings.Contains(string(cmdline), "4323") {
		t.Errorf("pid %d is %q, %v; want the container's process", info.Pid, cmdline, err)
	}
	cmdline, err = os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", info.ShimPid))
	if err != nil || !strings.Contains(string(cmdline), c.id) {
		t.Errorf("shimPid %d is %q, %v; want the container's shim", info.ShimPid, cmdline, err)
	}
	groups, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", info.Pid))
	if err != nil || info.Cgroup == "" || info.Cgroup != info.RuntimeSpec.Linux.CgroupsPath || !strings.Contains(string(groups), info.Cgroup) {
		t.Errorf("cgroup %q, specified %q; the process is in %s (%v)", info.Cgroup, info.RuntimeSpec.Linux.CgroupsPath, groups, err)
	}
	plain, err := b.client.ContainerStatus(b.ctx, &runtime.ContainerStatusRequest{ContainerId: c.id})
	b.must(err)
	if len(plain.Info) != 0 {
		t.Errorf("information that nobody asked for: %v", plain.Info)
	}
	c.stop(0)
	if !json.Valid([]byte(verbose()["info"])) {
		t.Errorf("information of an exited container: %v", verbose())
	}
}

// TestStartError: a container that the OCI runtime cannot start has ended, with
// the reason that the kubelet knows, and is removed like others.
func TestStartError(t *testing.T) {
	b := open(t)
	b.ours()
	c := b.pod().create(sh("sleep 300"))
	// The runtime has forgotten it.
	b.must(os.RemoveAll(filepath.Join(b.node.RunDir, "oci", "runc", c.id)))
	_, err := b.client.StartContainer(b.ctx, &runtime.StartContainerRequest{ContainerId: c.id})
	if err == nil || status.Code(err) == codes.OK {
		t.Fatal("started without the runtime's state")
	}
	st := c.wait()
	if st.Reason != "StartError" || st.ExitCode != 128 || st.Message == "" || st.FinishedAt <= st.CreatedAt {
		t.Errorf("status %v, want StartError, 128 and a message", st)
	}
	_, err = b.client.StartContainer(b.ctx, &runtime.StartContainerRequest{ContainerId: c.id})
	b.refused(err, codes.FailedPrecondition, c.id)
	c.stop(5) // has nothing to do
	c.remove()
}

// TestTimestamps: attempts are in the order in which they were made, and what
// happens to a container is too.
func TestTimestamps(t *testing.T) {
	b := open(t)
	p := b.pod()
	var last, told int64
	for attempt := range uint32(4) {
		c := p.run(sh("exit 0"), func(cfg *runtime.ContainerConfig) { cfg.Metadata.Name, cfg.Metadata.Attempt = "same", attempt })
		st := c.wait()
		if st.CreatedAt <= last || st.StartedAt <= st.CreatedAt || st.FinishedAt <= st.StartedAt {
			t.Errorf("attempt %d: created %d, started %d, finished %d; the one before was created at %d",
				attempt, st.CreatedAt, st.StartedAt, st.FinishedAt, last)
		}
		last = st.CreatedAt
		r, err := b.client.PodSandboxStatus(b.ctx, &runtime.PodSandboxStatusRequest{PodSandboxId: p.id})
		b.must(err)
		if r.Timestamp <= told || r.Timestamp < st.FinishedAt || r.Timestamp > time.Now().Add(time.Minute).UnixNano() {
			t.Errorf("status of the pod at %d, after one at %d and an end at %d", r.Timestamp, told, st.FinishedAt)
		}
		told = r.Timestamp
	}
}

// TestStopUnkillable: processes that do not die of SIGKILL, here because an
// administrator has frozen the pod, are reported as that, keep nobody else from
// stopping, and are gone when they can be.
func TestStopUnkillable(t *testing.T) {
	b := open(t)
	b.ours()
	if node.Unified() {
		t.Skip("on cgroup v2 SIGKILL reaches frozen processes")
	}
	p, other := b.pod(), b.pod()
	c, beside := p.run(sh("sleep 300")), other.run(sh("sleep 300"))
	dir, err := node.FindCgroup("freezer", c.id)
	b.must(err)
	state := filepath.Join(filepath.Dir(dir), "freezer.state")
	b.must(os.WriteFile(state, []byte("FROZEN"), 0))
	thaw := func() error { return os.WriteFile(state, []byte("THAWED"), 0) }
	defer thaw()
	stopped := make(chan error, 1)
	go func() {
		_, err := b.client.StopContainer(b.ctx, &runtime.StopContainerRequest{ContainerId: c.id})
		stopped <- err
	}()
	begin := time.Now()
	beside.stop(0)
	if d := time.Since(begin); d > time.Minute {
		t.Errorf("the stop of another container took %v", d)
	}
	if st := c.status(); st.State != runtime.ContainerState_CONTAINER_RUNNING {
		t.Errorf("container is %v", st.State)
	}
	select {
	case err = <-stopped:
		b.refused(err, codes.Unavailable, "do not die", "frozen", "pid ")
	case <-time.After(60 * time.Second):
		t.Error("no answer after 60 s")
	}
	b.must(thaw())
	c.stop(0)
	if st := c.status(); st.State != runtime.ContainerState_CONTAINER_EXITED || st.ExitCode != 137 {
		t.Errorf("container is %v with exit code %d", st.State, st.ExitCode)
	}
}
