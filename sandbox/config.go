package sandbox

import (
	"context"
	"errors"
	"fmt"
	"path"
	"path/filepath"
	"slices"
	"time"

	"github.com/berthd/berth/cni"
	"github.com/berthd/berth/cni/netns"
	"github.com/berthd/berth/imageservice"
	"github.com/berthd/berth/sandbox/cgroup"
	"github.com/berthd/berth/snapshotter"
	"github.com/berthd/berth/store"
)

// Runtime is an OCI runtime by configuration: a program with runc's command
// line, version 1.1 or newer in the case of runc.
type Runtime struct {
	// Path of the program; one without a slash is looked up in PATH.
	Path string
	// Root is the directory for the runtime's own state, "" for
	// <run dir>/oci/<handler>.
	Root string
	// CgroupDriver is "" for the one of Config.
	CgroupDriver string
	// PodAnnotations and ContainerAnnotations are patterns (path.Match) of the
	// keys of annotations that the runtime is told: those of a pod, for each of
	// its containers and its init, and those of a container. Where both have a
	// key, the container's counts. None are told by default: a runtime may let
	// them change what a pod is allowed.
	PodAnnotations, ContainerAnnotations []string
}

// Config is what the daemon tells this package. All paths are absolute.
type Config struct {
	// StateDir outlives a reboot, RunDir need not. RunDir is a private mount
	// (netns.PrivateMount) of at most 40 bytes: sockets below it have to fit
	// into the 108 bytes of a unix socket address.
	StateDir, RunDir string
	// ShimBinary is berth-shim, InitBinary is berth-init.
	ShimBinary, InitBinary string
	// Runtimes by handler name; DefaultRuntime is the one for handler "".
	Runtimes       map[string]Runtime
	DefaultRuntime string
	// CgroupDriver is "cgroupfs" or "systemd".
	CgroupDriver string
	// PodTimeout bounds RunPodSandbox, StopPodSandbox and RemovePodSandbox,
	// ContainerTimeout the calls on containers; zero is 4 min and 2 min, the
	// kubelet's own.
	PodTimeout, ContainerTimeout time.Duration
	// ExecOutputLimit bounds each stream of an ExecSync in bytes, zero is
	// 16 MiB. ExecDrain is how long its output is waited for after the
	// command has ended, zero is 2 s.
	ExecOutputLimit int64
	ExecDrain       time.Duration
	// NativeExec lets shims start processes in containers without the OCI
	// runtime, where that comes to the same.
	NativeExec bool
	// MaxLogLine is the length in bytes at which a line of a container's
	// output is split in its log; zero is 16384.
	MaxLogLine int
	// UnprivilegedPorts lets every process of a pod listen below port 1024,
	// UnprivilegedICMP lets it send pings without capabilities.
	UnprivilegedPorts, UnprivilegedICMP bool
	// StatsTTL is how old stats of the writable layer may be, zero is 10 s.
	StatsTTL time.Duration
	// CDISpecDirs are the directories of CDI specifications, the last one counts
	// most; none turns CDI off.
	CDISpecDirs []string
	// BootID identifies this boot of the machine; "" reads it from the kernel.
	BootID string
	// Observe is for a look at what an earlier daemon has left, by a process that
	// is none: New reads the book, takes charge of nothing and changes nothing.
	Observe bool
}

// Images is what this package needs of the images of the node.
type Images interface {
	Get(ref string) (imageservice.Image, error)
	// GC frees the layers of images that were removed while in use.
	GC(ctx context.Context) error
}

// Network attaches pods to networks.
type Network interface {
	Attach(ctx context.Context, pod cni.Pod) (cni.Result, error)
	Detach(ctx context.Context, pod cni.Pod) error
	GC(ctx context.Context, keep []cni.Pod) error
	Attachments() ([]string, error)
	Traces(ctx context.Context) ([]cni.Trace, error)
}

// Deps are the parts that a Service stands on. It owns none of them.
type Deps struct {
	Store     *store.Store
	Images    Images
	Snapshots snapshotter.Snapshotter
	Network   Network
	Pins      *netns.Pins
	Plugins   Plugins // nil for none
}

// maxRunDir leaves room in a unix socket address for "/s/" and an ID.
const maxRunDir = 40

func (c *Config) complete() error {
	set := func(d *time.Duration, v time.Duration) {
		if *d == 0 {
			*d = v
		}
	}
	set(&c.PodTimeout, 4*time.Minute)
	set(&c.ContainerTimeout, 2*time.Minute)
	set(&c.ExecDrain, 2*time.Second)
	set(&c.StatsTTL, 10*time.Second)
	if c.ExecOutputLimit == 0 {
		c.ExecOutputLimit = 16 << 20
	}
	if c.MaxLogLine == 0 {
		c.MaxLogLine = 16384
	}
	if len(c.RunDir) > maxRunDir {
		return fmt.Errorf("run_dir %q: %d bytes, limit %d", c.RunDir, len(c.RunDir), maxRunDir)
	}
	for _, p := range []string{c.StateDir, c.RunDir, c.ShimBinary, c.InitBinary} {
		if !filepath.IsAbs(p) {
			return fmt.Errorf("path %q is not absolute", p)
		}
	}
	if _, ok := c.Runtimes[c.DefaultRuntime]; !ok {
		return fmt.Errorf("default_runtime %q: no such runtime configured", c.DefaultRuntime)
	}
	if err := checkDriver(c.CgroupDriver); err != nil {
		return err
	}
	for name, r := range c.Runtimes {
		if err := r.check(); err != nil {
			return fmt.Errorf("runtimes.%s: %w", name, err)
		}
	}
	if c.BootID == "" {
		return errors.New("boot ID unknown")
	}
	return nil
}

func (r Runtime) check() error {
	if r.CgroupDriver != "" {
		if err := checkDriver(r.CgroupDriver); err != nil {
			return err
		}
	}
	for _, p := range slices.Concat(r.PodAnnotations, r.ContainerAnnotations) {
		if _, err := path.Match(p, ""); err != nil || p == "" {
			return fmt.Errorf("annotations: pattern %q: %w", p, path.ErrBadPattern)
		}
	}
	return nil
}

func checkDriver(d string) error {
	if d != cgroup.Cgroupfs && d != cgroup.Systemd {
		return fmt.Errorf("cgroup_driver %q: want %s or %s", d, cgroup.Cgroupfs, cgroup.Systemd)
	}
	return nil
}
