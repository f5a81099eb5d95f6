package crash

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berthd/berth/store"
	"github.com/berthd/berth/test/images"
	"github.com/berthd/berth/test/node"
)

// edit changes a row of a book that nobody has open.
func (r *rig) edit(table, key string, change func(row map[string]any)) {
	r.Helper()
	st, err := store.Open(filepath.Join(r.StateDir, "book.db"))
	r.must(err)
	defer st.Close()
	t := store.NewTable[json.RawMessage](table, 1)
	r.must(st.Update(func(tx *store.Tx) error {
		raw, err := t.Get(tx, key)
		if err != nil {
			return err
		}
		row := map[string]any{}
		if err := json.Unmarshal(raw, &row); err != nil {
			return err
		}
		change(row)
		if raw, err = json.Marshal(row); err != nil {
			return err
		}
		return t.Put(tx, key, raw)
	}))
}

// forgiveParent takes the parent cgroup of a pod whose row was lost out of the check:
// only the row said that it was made for the pod.
func (r *rig) forgiveParent(cfg *runtime.PodSandboxConfig) {
	r.Helper()
	made, err := filepath.Glob("/sys/fs/cgroup/*" + cfg.Linux.CgroupParent)
	r.must(err)
	for _, dir := range append(made, "/sys/fs/cgroup"+cfg.Linux.CgroupParent) {
		r.before["cgroup: "+dir] = true
	}
}

// TestRowsLost: a pod and a container whose rows cannot be read are what they
// were, by their notes; one without a note is gone with all that it had.
func TestRowsLost(t *testing.T) {
	t.Parallel()
	r := startNode(t, node.Options{})
	podA, cfgA := r.pod("a")
	podB, cfgB := r.pod("b")
	podC, cfgC := r.pod("c")
	unreadable := r.launch(podA, cfgA, "unreadable", "sleep", "300")
	senseless := r.launch(podA, cfgA, "senseless", "sleep", "300")
	ended := r.launch(podB, cfgB, "ended", "sh", "-c", "exit 7")
	layer := r.launch(podB, cfgB, "layer", "sleep", "300")
	orphan := r.launch(podC, cfgC, "orphan", "sleep", "300")
	_, err := r.client.WaitExited(r.ctx, ended)
	r.must(err)
	// Of a pod with the host's namespaces there is nothing that is gone when it is stopped.
	cfgD := r.podConfig("d")
	host := runtime.NamespaceMode_NODE
	cfgD.Hostname, cfgD.Linux.SecurityContext = "", &runtime.LinuxSandboxSecurityContext{NamespaceOptions: &runtime.NamespaceOption{Network: host, Ipc: host, Pid: host}}
	podD, err := r.client.Run(r.ctx, cfgD)
	r.must(err)
	_, err = r.client.StopPodSandbox(r.ctx, &runtime.StopPodSandboxRequest{PodSandboxId: podD})
	r.must(err)
	r.must(r.Kill())
	wrongType := func(row map[string]any) { row["State"] = 7 }
	r.edit("containers", unreadable, wrongType)
	r.edit("containers", senseless, func(row map[string]any) { row["Config"] = []byte("\xff\xff\xff\xff") })
	r.edit("containers", ended, wrongType)
	r.edit("pods", podA, wrongType)
	r.edit("snapshots", layer, func(row map[string]any) { row["Kind"] = "?" })
	r.edit("pods", podC, wrongType)
	r.edit("pods", podD, wrongType)
	r.must(os.Remove(filepath.Join(r.RunDir, "pods", podC, "note.json")))
	r.must(r.Start(r.ctx))

	for _, id := range []string{unreadable, senseless, layer} {
		if st := r.state(id); st.State != running {
			t.Errorf("container %s is %v", st.GetMetadata().GetName(), st.State)
		}
		if got := r.exec(id, "echo alive"); got != "alive\n" {
			t.Errorf("exec: %q", got)
		}
	}
	if st := r.state(ended); st.State != exited || st.ExitCode != 7 || st.Reason != "Error" {
		t.Errorf("container that had ended: %v, %d, %q", st.State, st.ExitCode, st.Reason)
	}
	p, err := r.client.PodSandboxStatus(r.ctx, &runtime.PodSandboxStatusRequest{PodSandboxId: podA})
	r.must(err)
	if p.Status.State != ready || p.Status.GetNetwork().GetIp() == "" {
		t.Errorf("pod: %v", p.Status)
	}
	if p, err = r.client.PodSandboxStatus(r.ctx, &runtime.PodSandboxStatusRequest{PodSandboxId: podD}); err != nil || p.Status.State == ready {
		t.Errorf("pod that was stopped: %v, %v", p.GetStatus(), err)
	}
	more := r.launch(podA, cfgA, "more", "sleep", "300")
	if st := r.state(more); st.State != running {
		t.Errorf("a new container of a restored pod is %v", st.State)
	}
	r.until("end of a pod without a note and of its container", func() bool {
		left, err := r.SettleIDs(r.ctx, time.Millisecond, podC, orphan)
		r.must(err)
		return len(left) == 0
	})
	r.forgiveParent(cfgC)
	cs, err := r.client.ListContainers(r.ctx, &runtime.ListContainersRequest{})
	r.must(err)
	if len(cs.Containers) != 5 {
		t.Errorf("%d containers, want 5", len(cs.Containers))
	}
	st, err := r.client.Status(r.ctx, &runtime.StatusRequest{Verbose: true})
	r.must(err)
	if !strings.Contains(st.Info["sandbox"], senseless) {
		t.Errorf("status does not name the rows that were lost: %s", st.Info["sandbox"])
	}
	// The lost snapshot is swept when its container has gone.
	r.must(r.client.Destroy(r.ctx, podB))
	_, err = r.client.Pull(r.ctx, refs[images.Busybox])
	r.must(err)
}
