// Package spec decides what the OCI runtime is told: it turns a CRI container
// configuration, an image configuration and facts about the host into an OCI
// runtime specification. It is pure. Nothing here reads a file, asks the
// kernel or knows the time; whatever has to be looked up is looked up by the
// caller and handed in, so that equal input gives equal output and every rule
// can be tested with a golden file.
//
// # Vocabulary
//
//   - A [Container] is everything that is known about one container before it
//     exists: CRI messages as the kubelet sent them, plus resolved values.
//   - [Host] holds facts about the node, [Image] the few fields of an image
//     configuration that reach a process, [User] a resolved identity.
//   - [Build] folds a list of rules over an empty specification, each of which
//     looks after one concern. [Init] does the same for the init process of a
//     pod that shares its PID namespace, [Process] derives an exec.
//
// # Caveats
//
// Mount sources and device nodes must be resolved before they come here. The
// inheritable capability set is empty unless ambient capabilities are asked for. Data of the image (labels, for
// one) never becomes an annotation: a runtime may act on annotations.
// Sysctls are not part of the specification either, since a pod's namespaces
// are set up once and before its first container.
package spec

import (
	"errors"
	"slices"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// ErrInvalid is wrapped by every error about input that can not be honoured:
// the request is at fault and would fail again.
var ErrInvalid = errors.New("invalid argument")

// Image holds the fields of an OCI image configuration that have a say in the
// process: defaults only, the container configuration wins.
type Image struct {
	Env        []string // NAME=value
	Entrypoint []string
	Cmd        []string
	WorkingDir string
	User       string // user[:group], names or numbers
	StopSignal string // "SIGTERM", "TERM" or a number; not used by Build
}

// Namespace says where a process finds a namespace of some kind: the host's
// if Host, the pinned one at Path (absolute, on the host) if that is not
// empty, and a new one of its own otherwise.
type Namespace struct {
	Host bool
	Path string
}

// UserNS is the user namespace that all containers of a pod join: the pinned one
// at Path, and what it maps, which is what uid_map and gid_map in it say.
type UserNS struct {
	Path       string // absolute, on the host
	UIDs, GIDs []specs.LinuxIDMapping
}

// mapped tells whether an ID of the container has one on the host.
func mapped(list []specs.LinuxIDMapping, id uint32) bool {
	return slices.ContainsFunc(list, func(m specs.LinuxIDMapping) bool { return id >= m.ContainerID && id-m.ContainerID < m.Size })
}

// Host has the facts about the node that decide what can be promised.
type Host struct {
	CgroupV2     bool     // the unified hierarchy has the controllers
	CgroupFlags  []string // super block options of the host's cgroup2 mount, "nsdelegate" and the like
	Seccomp      bool     // the kernel filters system calls
	RRO          bool     // kernel and OCI runtime can make mounts recursively read-only
	SELinux      bool     // SELinux is on; if not, labels are ignored
	MQueue       bool     // /dev/mqueue is mounted
	Swap         bool     // swap is accounted by cgroup
	HugePages    []string // page sizes with a hugetlb controller, as "2MB", "1GB"
	Capabilities []string // every capability that can be given, "CAP_" prefixed
}

// Mount is a bind mount whose source has been looked up.
type Mount struct {
	Source            string // absolute host path, symbolic links evaluated
	Destination       string // absolute path in the container
	Readonly          bool
	RecursiveReadonly bool     // needs Readonly, "rprivate" and Host.RRO
	Propagation       string   // "rprivate", "rslave" or "rshared"; "" is "rprivate"
	Options           []string // "noexec", "nodev", "nosuid", … , see mountOptions
	// Owners of files on the source appear as these map them: ContainerID is
	// on the source, HostID what it is shown as to the host.
	UIDMappings, GIDMappings []specs.LinuxIDMapping
}

// Device is a device node to create, with what the container may do to it:
// a non-empty subset of "rwm" (read, write, mknod).
type Device struct {
	specs.LinuxDevice
	Access string
	Source string // its path on the host
}

// Container is the input of [Build]. The CRI messages are only read.
type Container struct {
	ID, PodID string
	Pod       *runtime.PodSandboxConfig
	Config    *runtime.ContainerConfig
	Image     Image
	User      User
	Host      Host

	Network, IPC, UTS, PID Namespace
	UserNS                 *UserNS // nil is the host's

	CgroupsPath string // as cgroup.OCIPath gives it
	Rootfs      string // relative to the bundle or absolute; "" is "rootfs"
	Hostname    string // of the pod, for $HOSTNAME, and for a new UTS namespace

	// Files of the pod on the host, mounted at their usual place unless the
	// configuration mounts something else there; "" leaves the mount out.
	// Without ShmDir, /dev/shm is a 64 MiB tmpfs of the container's own.
	HostsFile, ResolvConf, HostnameFile, ShmDir string

	Mounts   []Mount
	Devices  []Device
	Seccomp  *specs.LinuxSeccomp // nil is unconfined; privileged containers ignore it
	AppArmor string              // profile name, "" for none; privileged containers ignore it
	Rlimits  []specs.POSIXRlimit

	// SELinux labels, "" on a host without; privileged containers ignore that
	// of the process. MountLabel is for what the runtime itself mounts.
	ProcessLabel, MountLabel string

	Annotations map[string]string // for the runtime; the caller has filtered them

	// OOMScoreMin is the lowest oom_score_adj that this daemon may set, nil
	// for no limit. Lower values are raised to it.
	OOMScoreMin *int
}

// InitPod is the input of [Init].
type InitPod struct {
	PodID             string
	Network, IPC, UTS Namespace
	UserNS            *UserNS // nil is the host's
	CgroupsPath       string
	Rootfs            string // relative to the bundle or absolute; "" is "rootfs"
	Binary            string // host path of the static berth-init; "" if the root file system has it at /berth-init
	Arch              string // of the seccomp profile, as runtime.GOARCH
	Host              Host
	OOMScoreAdj       int // clamped to OOMScoreMin as in Container
	OOMScoreMin       *int
	Annotations       map[string]string
}
