package nri

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/nri/pkg/api"
	"github.com/containerd/nri/pkg/runtime-tools/generate"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// adjust changes a specification as plugins want. What cannot be is refused
// before anything is changed, but for devices of CDI.
func adjust(spec *specs.Spec, a *api.ContainerAdjustment, inject func(*specs.Spec, []string) error) error {
	if a == nil {
		return nil
	}
	if err := check(a); err != nil {
		return fmt.Errorf("%w: %w", ErrAdjustment, err)
	}
	g := generate.SpecGenerator(&generator{spec},
		generate.WithCDIDeviceInjector(inject),
		generate.WithBlockIOResolver(func(class string) (*specs.LinuxBlockIO, error) {
			return nil, fmt.Errorf("blockio_class %q: no classes are defined on this node", clip(class))
		}),
		generate.WithRdtResolver(func(class string) (*specs.LinuxIntelRdt, error) {
			return &specs.LinuxIntelRdt{ClosID: class}, nil
		}))
	if err := g.Adjust(a); err != nil {
		return fmt.Errorf("%w: %w", ErrAdjustment, err)
	}
	oneLimitEach(spec.Process)
	return nil
}

// dropEnv removes what plugins took out of the environment. The library (0.12)
// loses that on the way back, but for the message, whose environment is now as
// the last plugin left it.
func dropEnv(spec *specs.Spec, left []string) {
	keys := map[string]bool{}
	for _, e := range left {
		key, _, _ := strings.Cut(e, "=")
		keys[key] = true
	}
	spec.Process.Env = slices.DeleteFunc(spec.Process.Env, func(e string) bool {
		key, _, _ := strings.Cut(e, "=")
		return !keys[key]
	})
}

// oneLimitEach leaves of several limits of a kind the last one, a plugin's:
// runtimes refuse two.
func oneLimitEach(p *specs.Process) {
	var out []specs.POSIXRlimit
	for _, l := range p.Rlimits {
		out = slices.DeleteFunc(out, func(o specs.POSIXRlimit) bool { return o.Type == l.Type })
		out = append(out, l)
	}
	p.Rlimits = out
}

// check refuses what no container can have. Resources are checked with those of
// the CRI, where they end up.
func check(a *api.ContainerAdjustment) error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	for _, e := range a.GetEnv() {
		if key, _ := e.IsMarkedForRemoval(); key == "" || strings.ContainsAny(key, "=\x00") || strings.Contains(e.GetValue(), "\x00") {
			bad("env %q: want a name without '=', and no NUL", clip(e.GetKey()))
		}
	}
	for _, m := range a.GetMounts() {
		if err := checkMount(m); err != nil {
			errs = append(errs, err)
		}
	}
	for _, d := range a.GetLinux().GetDevices() {
		path, removal := d.IsMarkedForRemoval()
		switch {
		case !filepath.IsAbs(path):
			bad("device %q: not an absolute path", clip(path))
		case !removal && !slices.Contains([]string{"b", "c", "u", "p"}, d.GetType()):
			bad("device %q: type %q: want b, c, u or p", clip(path), clip(d.GetType()))
		}
	}
	for _, l := range a.GetRlimits() {
		switch {
		case !slices.Contains(rlimits, l.GetType()):
			bad("rlimit %q: want one of %s", clip(l.GetType()), strings.Join(rlimits, ", "))
		case l.GetSoft() > l.GetHard():
			bad("rlimit %s: soft %d: more than hard, %d", l.GetType(), l.GetSoft(), l.GetHard())
		}
	}
	h := a.GetHooks()
	for _, hook := range slices.Concat(h.GetPrestart(), h.GetCreateRuntime(), h.GetCreateContainer(), h.GetStartContainer(), h.GetPoststart(), h.GetPoststop()) {
		if !filepath.IsAbs(hook.GetPath()) {
			bad("hook %q: not an absolute path", clip(hook.GetPath()))
		}
	}
	if v := a.GetLinux().GetOomScoreAdj(); v != nil && (v.GetValue() < -1000 || v.GetValue() > 1000) {
		bad("oom_score_adj %d: not in -1000..1000", v.GetValue())
	}
	return errors.Join(errs...)
}

// rlimits are the kinds of getrlimit(2).
var rlimits = []string{"RLIMIT_AS", "RLIMIT_CORE", "RLIMIT_CPU", "RLIMIT_DATA", "RLIMIT_FSIZE", "RLIMIT_LOCKS", "RLIMIT_MEMLOCK", "RLIMIT_MSGQUEUE",
	"RLIMIT_NICE", "RLIMIT_NOFILE", "RLIMIT_NPROC", "RLIMIT_RSS", "RLIMIT_RTPRIO", "RLIMIT_RTTIME", "RLIMIT_SIGPENDING", "RLIMIT_STACK"}

func checkMount(m *api.Mount) error {
	dest, removal := m.IsMarkedForRemoval()
	if !filepath.IsAbs(dest) || strings.Contains(dest, "\x00") {
		return fmt.Errorf("mount %q: destination: not an absolute path", clip(dest))
	}
	bind := m.GetType() == "bind" || slices.Contains(m.GetOptions(), "bind") || slices.Contains(m.GetOptions(), "rbind")
	if removal || !bind {
		return nil
	}
	if !filepath.IsAbs(m.GetSource()) {
		return fmt.Errorf("mount %q: source %q: not an absolute path", clip(dest), clip(m.GetSource()))
	}
	if _, err := os.Stat(m.GetSource()); err != nil {
		return fmt.Errorf("mount %q: source: %w", clip(dest), err)
	}
	return nil
}

// clip bounds a value in an error.
func clip(s string) string { return s[:min(len(s), 200)] }
