package sandbox

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/klog/v2"

	"github.com/berthd/berth/sandbox/cgroup"
)

// ociRuntime is an OCI runtime: a program with the command line of runc. Create,
// start, kill and exec go through the shim; this is the rest. It is a value.
type ociRuntime struct {
	*prober
	root   string
	driver string // of cgroups: cgroup.Cgroupfs or cgroup.Systemd
}

// Bounds on what an OCI runtime may take and say.
const (
	gentleTimeout  = 10 * time.Second
	maxRuntimeText = 256 << 10 // bytes of output kept
)

// bin is the program, found in PATH at the first use.
func (r ociRuntime) bin(ctx context.Context) (string, error) {
	f, err := r.now(ctx)
	return f.Path, err
}

// has tells whether the runtime has state of a container of that ID: a directory
// of that name (runc, crun, youki), or files that begin with it (runsc).
func (r ociRuntime) has(id string) bool {
	if _, err := os.Lstat(filepath.Join(r.root, id)); err == nil {
		return true
	}
	return slices.Contains(r.ids(), id)
}

// ids lists the containers that the runtime has state of.
func (r ociRuntime) ids() []string {
	entries, err := os.ReadDir(r.root)
	if err != nil {
		return nil
	}
	var ids []string
	for _, e := range entries {
		name := e.Name()
		if len(name) > 64 && (name[64] == '_' || name[64] == '.') {
			name = name[:64]
		}
		if validID(name) && !slices.Contains(ids, name) {
			ids = append(ids, name)
		}
	}
	return ids
}

// delete kills what runs of the container and removes its cgroup and state. A
// container that does not exist is no error.
func (r ociRuntime) delete(ctx context.Context, id string) error {
	if !r.has(id) {
		return nil
	}
	bin, err := r.bin(ctx)
	if err != nil {
		return err
	}
	// Without --force first: with it, runc sleeps for 100 ms before it looks
	// whether the container is dead.
	gentle, cancel := context.WithTimeout(ctx, gentleTimeout)
	defer cancel()
	if _, err := output(gentle, nil, bin, r.args("delete", id)...); err == nil {
		return nil
	}
	if _, err := output(ctx, nil, bin, r.args("delete", "--force", id)...); err != nil {
		return fmt.Errorf("runtime delete: %w", err)
	}
	return nil
}

// forget removes by hand the state of a container that delete could not, for the
// reason given.
func (r ociRuntime) forget(ctx context.Context, id string, why error) error {
	klog.FromContext(ctx).Info("Runtime state removed by hand", "id", id, "err", why)
	if err := os.RemoveAll(filepath.Join(r.root, id)); err != nil {
		return fmt.Errorf("runtime state: %w", err)
	}
	return nil
}

// update sets resources of a live container, all or none.
func (r ociRuntime) update(ctx context.Context, id string, res *specs.LinuxResources) error {
	bin, err := r.bin(ctx)
	if err != nil {
		return err
	}
	in, err := json.Marshal(res)
	if err != nil {
		return fmt.Errorf("runtime update: %w", err)
	}
	if _, err := output(ctx, in, bin, r.args("update", "--resources", "-", id)...); err != nil {
		return fmt.Errorf("runtime update: %w", err)
	}
	return nil
}

func (r ociRuntime) args(verb ...string) []string {
	return append(append([]string{"--root", r.root}, r.global()...), verb...)
}

// global are the options before the verb, besides --root.
func (r ociRuntime) global() []string {
	if r.driver == cgroup.Systemd {
		return []string{"--systemd-cgroup"}
	}
	return nil
}

// output runs a program in a process group of its own and returns its standard
// output. When ctx ends the whole group is killed, so that no grandchild that
// holds the pipes can keep the caller.
func output(ctx context.Context, stdin []byte, name string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = time.Second
	if stdin != nil {
		cmd.Stdin = bytes.NewReader(stdin)
	}
	var out, errOut limitedBuffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	err := cmd.Run()
	what := strings.TrimSpace(filepath.Base(name) + " " + verbOf(args))
	if ctx.Err() != nil {
		return nil, fmt.Errorf("%s: %w", what, context.Cause(ctx))
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w: %s", what, err, lastLine(errOut.Bytes()))
	}
	if out.cut {
		return nil, fmt.Errorf("%s: output exceeds %d bytes", what, maxRuntimeText)
	}
	return out.Bytes(), nil
}

// verbOf finds the verb behind the global options, for error texts.
func verbOf(args []string) string {
	for i := 0; i < len(args); i++ {
		switch {
		case args[i] == "--root":
			i++
		case args[i] == "--version" || !strings.HasPrefix(args[i], "-"):
			return args[i]
		}
	}
	return ""
}

// lastLine returns the last line of text that is not empty, bounded. Of a line of
// a log, as runc writes it, that is its message.
func lastLine(text []byte) string {
	text = bytes.TrimSpace(text)
	if i := bytes.LastIndexByte(text, '\n'); i >= 0 {
		text = text[i+1:]
	}
	line := string(text)
	if _, quoted, ok := strings.Cut(line, " level=error msg="); ok {
		if prefix, err := strconv.QuotedPrefix(quoted); err == nil {
			line, _ = strconv.Unquote(prefix)
		} else {
			line = quoted
		}
	}
	return line[:min(len(line), 2048)]
}

// limitedBuffer keeps the first maxRuntimeText bytes and drops the rest.
type limitedBuffer struct {
	bytes.Buffer
	cut bool
}

func (b *limitedBuffer) Write(p []byte) (int, error) {
	n := len(p)
	if room := maxRuntimeText - b.Len(); n > room {
		p, b.cut = p[:room], true
	}
	b.Buffer.Write(p)
	return n, nil
}

// handler returns the runtime for a name that the kubelet gave.
func (s *Service) handler(name string) (ociRuntime, error) {
	if name == "" {
		name = s.cfg.DefaultRuntime
	}
	r, ok := s.runtimes[name]
	if !ok {
		return r, fmt.Errorf("%w: runtime_handler %q: not in the configuration, which has %s",
			ErrUnknownHandler, clip(name), strings.Join(slices.Sorted(maps.Keys(s.runtimes)), ", "))
	}
	return r, nil
}

// rowRuntime is what a row keeps about the OCI runtime that its object was made
// with: what the configuration says may have changed by the time that it is
// updated or removed. Rows of early versions have none.
type rowRuntime struct {
	Name   string // the handler, also if it was the default one
	Path   string // the program as configured
	Root   string
	Driver string // of cgroups
}

func (r ociRuntime) row() rowRuntime {
	return rowRuntime{Name: r.handler, Path: r.path, Root: r.root, Driver: r.driver}
}

// runtimeOf is the runtime that an object was made with. One that has gone from
// the configuration since is run from where it was; if it is not there any more,
// the object can still be undone, by its cgroup and by hand.
func (s *Service) runtimeOf(handler string, o rowRuntime, driver string) ociRuntime {
	name := cmp.Or(o.Name, handler)
	r, err := s.handler(name)
	if err != nil {
		r = ociRuntime{prober: newProber(s.ctx, name, cmp.Or(o.Path, "/nonexistent/"+name)), root: filepath.Join(s.cfg.RunDir, "oci", name)}
	}
	if o.Root != "" {
		r.root = o.Root
	}
	r.driver = driver
	return r
}

// The runtime and the cgroup of a container, and of the pod's init.

func (s *Service) runtimeOfContainer(c *container) ociRuntime {
	return s.runtimeOf(c.Handler, c.OCI, c.driver())
}

func (s *Service) runtimeOfPod(p *pod) ociRuntime {
	return s.runtimeOf(p.Handler, p.OCI, s.driverOf(p))
}

func (s *Service) groupOf(c *container) cgroup.Group { return s.hier.Group(c.driver(), c.CgroupPath) }

// driver is the cgroup driver that the container was made with.
func (c *container) driver() string {
	switch {
	case c.OCI.Driver != "":
		return c.OCI.Driver
	case strings.Contains(c.CgroupPath, ":"): // which a plain path never has
		return cgroup.Systemd
	}
	return cgroup.Cgroupfs
}

// driverOf is the cgroup driver that the pod was made with. Of a row without one
// the parent tells, which each driver wants in a form of its own; without that it
// can only be the node's.
func (s *Service) driverOf(p *pod) string {
	parent := p.config.GetLinux().GetCgroupParent()
	switch {
	case p.OCI.Driver != "":
		return p.OCI.Driver
	case parent == "":
		return s.cfg.CgroupDriver
	case cgroup.IsSlice(parent):
		return cgroup.Systemd
	}
	return cgroup.Cgroupfs
}

// annotations are those that the OCI runtime of a handler is told about a pod,
// and, if cfg is not nil, a container of it. A handler that has left the
// configuration is told none.
func (s *Service) annotations(handler string, pod *runtime.PodSandboxConfig, cfg *runtime.ContainerConfig) map[string]string {
	r := s.cfg.Runtimes[handler]
	out := allowed(pod.GetAnnotations(), r.PodAnnotations)
	for k, v := range allowed(cfg.GetAnnotations(), r.ContainerAnnotations) {
		if out == nil {
			out = map[string]string{}
		}
		out[k] = v
	}
	return out
}

// allowed returns the annotations whose keys match one of the patterns, nil if
// there are none.
func allowed(notes map[string]string, patterns []string) map[string]string {
	var out map[string]string
	for k, v := range notes {
		if !slices.ContainsFunc(patterns, func(p string) bool { ok, _ := path.Match(p, k); return ok }) {
			continue
		}
		if out == nil {
			out = map[string]string{}
		}
		out[k] = v
	}
	return out
}

// clip bounds what an error repeats of its input.
func clip(s string) string {
	const most = 128
	if len(s) > most {
		return s[:most] + "…"
	}
	return s
}

// RuntimeReady tells why no container can be run with the default runtime; nil
// if they can. It answers at once, from what the last probe has found, but for the
// first 2 s of the daemon, in which it waits for the first probe.
func (s *Service) RuntimeReady() error {
	s.probed.wait()
	r, err := s.handler("")
	if err != nil {
		return err
	}
	if _, err = r.verdict(); err != nil {
		return err
	}
	if _, err := os.Stat(s.cfg.ShimBinary); err != nil {
		return errors.Join(ErrRuntime, fmt.Errorf("shim: %w", err))
	}
	return nil
}

// firstVerdicts is closed when the first probe of every runtime has ended, though it
// does not wait for one that hangs.
type firstVerdicts chan struct{}

// wait is for whoever tells what the runtimes can do: the kubelet, which asks at
// once, would reject pods for features that nobody knows of yet.
func (f firstVerdicts) wait() {
	if f != nil {
		<-f
	}
}

// probe has everything looked at that firstVerdicts is about.
func (s *Service) probe(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, firstProbe)
	defer cancel()
	defer close(s.probed)
	for _, r := range s.runtimes {
		_, _ = r.now(ctx) // what is wrong with it is for Status to say
	}
	select {
	case <-s.lookAtUserNS():
	case <-ctx.Done():
	}
}
