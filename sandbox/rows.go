package sandbox

import (
	"encoding/json"
	"fmt"
	"time"

	"google.golang.org/protobuf/proto"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berthd/berth/store"
)

// State is where an object stands in its life. The words are stored; they never
// change.
type State string

// The states of pods (Creating, Ready, NotReady) and of containers (Creating,
// Created, Running, Exited). Creating is before the object is usable: it is not
// listed, and a crash leads to destroy.
const (
	StateCreating State = "creating"
	StateReady    State = "ready"
	StateNotReady State = "notready"
	StateCreated  State = "created"
	StateRunning  State = "running"
	StateExited   State = "exited"
)

// podRow is the record of a pod.
type podRow struct {
	ID      string
	Rev     uint64 // counts the changes of this row
	State   State
	Created int64  // ns since 1970, increasing from attempt to attempt even if the clock is not
	Handler string // runtime handler as asked for, "" for the default
	OCI     rowRuntime
	Config  []byte // PodSandboxConfig, verbatim
	BootID  string // of the boot that its effects belong to

	HostNetwork bool
	Init        bool            // it has, or had, an init container
	InitPid     int             // 0 while there is none
	Attached    bool            // CNI ADD was begun and DEL has not succeeded
	IPs         []string        // primary first
	CNI         json.RawMessage // the network's own result
	Cgroups     []string        // directories made for it, innermost last
	Labels      labelRow

	Stopping bool   // StopPodSandbox has begun, and is carried on if need be
	Torn     bool   // StopPodSandbox has released everything
	Removing bool   // destroy has begun; the row goes when it succeeds
	Failure  string // why the last destroy did not succeed
}

// containerRow is the record of a container.
type containerRow struct {
	ID      string
	PodID   string
	Rev     uint64
	State   State
	Config  []byte // ContainerConfig, verbatim
	BootID  string
	Handler string
	OCI     rowRuntime

	ImageID     string // "sha256:…"
	ImageRef    string // by which the kubelet asked for it
	ImageName   string // a tag, else a digest, else ImageRef: for people
	ImageDigest string // repo@digest, or ImageID if it was never pulled
	Volumes     []volumeRow
	Labels      labelRow
	Resources   []byte // LinuxContainerResources in force
	User        rowUser

	CgroupPath string // as the OCI runtime takes it
	LogPath    string // absolute, "" for none
	StopSignal int    // its number
	PrivatePID bool
	Pid        int
	ShimPid    int

	// ns since 1970, 0 for not yet. Created is later than that of the pod and of the
	// containers that were in it, even if the clock was set back.
	Created, Started, Finished int64
	ExitCode                   int32
	Reason, Message            string

	Removing bool
	Failure  string
}

// rowUser is the user that a container's first process runs as.
type rowUser struct {
	UID, GID uint32
	Groups   []uint32
}

var (
	podTable       = store.NewTable[podRow]("pods", 1)
	containerTable = store.NewTable[containerRow]("containers", 1)
)

// pod is a row as readers see it, with its configuration decoded. It and all
// that it points to never change.
type pod struct {
	podRow
	config *runtime.PodSandboxConfig
	userNS *userNS // nil is the node's
}

// container is a row as readers see it. It never changes.
type container struct {
	containerRow
	config    *runtime.ContainerConfig
	resources *runtime.LinuxContainerResources
}

func (p *pod) listed() bool       { return p.State != StateCreating && !p.Removing }
func (c *container) listed() bool { return c.State != StateCreating && !c.Removing }

// pidMode is the PID namespace mode of the pod; POD if nothing says otherwise.
func (p *pod) pidMode() runtime.NamespaceMode {
	return p.config.GetLinux().GetSecurityContext().GetNamespaceOptions().GetPid()
}

func (p *pod) hostIPC() bool {
	return p.config.GetLinux().GetSecurityContext().GetNamespaceOptions().GetIpc() == runtime.NamespaceMode_NODE
}

func decodePod(r podRow) (*pod, error) {
	p := &pod{podRow: r, config: new(runtime.PodSandboxConfig)}
	if err := proto.Unmarshal(r.Config, p.config); err != nil {
		return nil, fmt.Errorf("pod %s: config: %w", r.ID, err)
	}
	u := p.config.GetLinux().GetSecurityContext().GetNamespaceOptions().GetUsernsOptions()
	if u == nil || u.GetMode() == runtime.NamespaceMode_NODE {
		return p, nil
	}
	var err error
	if p.userNS, err = userNSOf(u); err != nil {
		return nil, fmt.Errorf("pod %s: config: %w", r.ID, err)
	}
	return p, nil
}

func decodeContainer(r containerRow) (*container, error) {
	c := &container{containerRow: r, config: new(runtime.ContainerConfig)}
	if err := proto.Unmarshal(r.Config, c.config); err != nil {
		return nil, fmt.Errorf("container %s: config: %w", r.ID, err)
	}
	if len(r.Resources) > 0 {
		c.resources = new(runtime.LinuxContainerResources)
		if err := proto.Unmarshal(r.Resources, c.resources); err != nil {
			return nil, fmt.Errorf("container %s: resources: %w", r.ID, err)
		}
	}
	return c, nil
}

// validID tells whether s can be an ID made by newID, and so a file name.
func validID(s string) bool {
	if len(s) != 64 {
		return false
	}
	for i := range len(s) {
		if c := s[i]; (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return true
}

// fullName is "namespace/name".
func (p *pod) fullName() string {
	m := p.config.GetMetadata()
	return m.GetNamespace() + "/" + m.GetName()
}

func podKey(c *runtime.PodSandboxConfig) string {
	m := c.GetMetadata()
	return fmt.Sprintf("%s/%s/%s/%d", m.GetNamespace(), m.GetName(), m.GetUid(), m.GetAttempt())
}

func containerKey(podID string, c *runtime.ContainerConfig) string {
	m := c.GetMetadata()
	return fmt.Sprintf("%s/%s/%d", podID, m.GetName(), m.GetAttempt())
}

// after returns a time in ns that is now, or just after last if the clock went
// back: the kubelet orders attempts by these times. last is of the same pod: with one
// time for all, a clock that was ahead once would put all pods to come into the future.
func after(last int64) int64 { return max(time.Now().UnixNano(), last+1) }
