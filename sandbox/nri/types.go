package nri

import (
	"context"
	"errors"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// Errors of this package, tested with errors.Is.
var (
	// ErrAdjustment: plugins want something of a container that cannot be. The
	// text names the field, the value and the limit.
	ErrAdjustment = errors.New("NRI adjustment unusable")
	// ErrWait: the caller's time was up before its turn came. The text tells
	// what the plugins are at.
	ErrWait = errors.New("NRI plugins busy")
)

// Event is what plugins are told of by [Host.Tell].
type Event int

// The events, by the names that plugins know them under. RunPodSandbox,
// CreateContainer and UpdateContainer are methods of [Host].
const (
	UpdatePodSandbox     Event = iota + 1 // Pod.Overhead, Pod.Resources are to be set
	PostUpdatePodSandbox                  // they are
	StopPodSandbox                        // its containers have ended, its network is there
	RemovePodSandbox
	PostCreateContainer
	StartContainer
	PostStartContainer
	PostUpdateContainer
	StopContainer // it has ended
	RemoveContainer
)

// State is where a container stands.
type State int

// The states that plugins know.
const (
	Unknown State = iota
	Created
	Running
	Stopped
)

// Pod is what plugins are told of a pod. Maps and slices in it are only read.
type Pod struct {
	ID, Name, UID, Namespace, Handler string
	Labels, Annotations               map[string]string
	CgroupParent                      string
	// Overhead and Resources are those of the pod as a whole, nil for none.
	Overhead, Resources *specs.LinuxResources
	// Namespaces are the pod's pinned ones.
	Namespaces []specs.LinuxNamespace
	IPs        []string
	Pid        int // of the pod's init, 0 for none
}

// Container is what plugins are told of a container. Maps and slices in it are
// only read.
type Container struct {
	ID, PodID, Name          string
	Labels, Annotations      map[string]string
	State                    State
	Pid                      int
	Created, Started, Ended  int64 // ns since 1970, 0 for not yet
	ExitCode                 int32
	Reason, Message          string
	CDI                      []string // names of devices asked for
	ImageName, ImageDigest   string
	ImageID                  string
	SeccompKind, SeccompFile string // "RuntimeDefault", "Unconfined" or "Localhost", "" for none
	// Spec returns the container's OCI specification, with its resources in
	// force. It is called only when somebody is to see it; nil, or an error,
	// leaves out what would be in it.
	Spec func() (*specs.Spec, error)
}

// Draft is a container's specification before the container is made.
type Draft struct {
	Spec *specs.Spec
	// Inject adds CDI devices, by name.
	Inject func(spec *specs.Spec, names []string) error
	// Accept looks at what has become of Spec, may refuse it with an error and
	// may complete it. It is called if plugins had a say.
	Accept func() error
}

// Update is a change of resources that a plugin wants. What is not set in
// Resources stays as it is.
type Update struct {
	ID            string
	Resources     *specs.LinuxResources
	IgnoreFailure bool
}

// Node is what the host's plugins see and change.
type Node interface {
	// Snapshot returns the pods and containers that plugins are to know of. Of
	// containers that have stopped, plugins are told the end thereafter.
	Snapshot() ([]Pod, []Container)
	// Apply makes the changes in order. All those that do not ignore failure are
	// made, or none. It returns what is not in force afterwards, and an error
	// unless that may be ignored. It is called in a turn and must not ask for
	// another one. undo takes back what was made, as far as nobody has changed
	// it since; it is never nil.
	Apply(ctx context.Context, updates []Update) (failed []Update, undo func(context.Context) error, err error)
}

// Said is what plugins say to an update ([Host.Update]).
type Said struct {
	// Own is what they made of the update, nil if they left it as it was.
	Own *specs.LinuxResources
	// Undo takes back what was made of others. It is never nil.
	Undo func(context.Context) error
}

// Config is what the daemon tells this package.
type Config struct {
	// Socket is where plugins connect, at most 107 bytes; "" for nowhere.
	Socket string
	// PluginDir holds programs called NN-name that are started, PluginConfigDir
	// their configurations, NN-name.conf or name.conf. Neither need exist.
	PluginDir, PluginConfigDir string
	// Version is that of the runtime, for plugins.
	Version string
	// RegistrationTimeout bounds how long a plugin that has connected may take
	// to say who it is, RequestTimeout how long it may take over one request,
	// SyncTimeout how long over being synchronised. Zero is 5 s, 2 s and 10 s.
	RegistrationTimeout, RequestTimeout, SyncTimeout time.Duration
}

func (c *Config) complete() {
	set := func(d *time.Duration, v time.Duration) {
		if *d == 0 {
			*d = v
		}
	}
	set(&c.RegistrationTimeout, 5*time.Second)
	set(&c.RequestTimeout, 2*time.Second)
	set(&c.SyncTimeout, 10*time.Second)
}
