package sandbox

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/opencontainers/runtime-spec/specs-go/features"
)

// ociRuntime is an OCI runtime: a program with the command line of runc. Create,
// start, kill and exec go through the shim; this is the rest.
type ociRuntime struct {
	handler string
	path    string // as configured
	root    string
	systemd bool

	mu     sync.Mutex
	probed time.Time
	facts  runtimeFacts
	err    error // why it cannot be used
}

// runtimeFacts is what a probe found out.
type runtimeFacts struct {
	Path     string // resolved
	Version  string // first line of --version
	Features *features.Features
}

// Bounds on what an OCI runtime may take and say.
const (
	probeTimeout   = 5 * time.Second
	probeAgain     = 5 * time.Second // after a failed probe
	gentleTimeout  = 10 * time.Second
	maxRuntimeText = 256 << 10 // bytes of output kept
)

// probe returns the facts about the runtime. A failed probe is tried again after
// a while, so that an installed or mended runtime needs no restart.
func (r *ociRuntime) probe(ctx context.Context) (runtimeFacts, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.probed.IsZero() || (r.err != nil && time.Since(r.probed) > probeAgain) {
		r.facts, r.err = r.ask(ctx)
		r.probed = time.Now()
	}
	return r.facts, r.err
}

func (r *ociRuntime) ask(ctx context.Context) (runtimeFacts, error) {
	var f runtimeFacts
	path, err := exec.LookPath(r.path)
	if err != nil {
		return f, fmt.Errorf("%w: handler %q: %w", ErrRuntime, r.handler, err)
	}
	f.Path = path
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	out, err := output(ctx, nil, path, "--version")
	if err != nil {
		return f, fmt.Errorf("%w: handler %q: %w", ErrRuntime, r.handler, err)
	}
	f.Version, _, _ = strings.Cut(strings.TrimSpace(string(out)), "\n")
	if err := checkVersion(f.Version); err != nil {
		return f, fmt.Errorf("%w: handler %q: %s: %w", ErrRuntime, r.handler, path, err)
	}
	// The verb came with runc 1.1; other runtimes may lack it.
	if out, err = output(ctx, nil, path, "features"); err == nil {
		f.Features = new(features.Features)
		if json.Unmarshal(out, f.Features) != nil {
			f.Features = nil
		}
	}
	return f, nil
}

var runcVersion = regexp.MustCompile(`^runc version v?(\d+)\.(\d+)`)

// checkVersion refuses a runc that is older than 1.1. What other runtimes call
// themselves is not judged.
func checkVersion(line string) error {
	m := runcVersion.FindStringSubmatch(line)
	if m == nil {
		return nil
	}
	major, _ := strconv.Atoi(m[1])
	minor, _ := strconv.Atoi(m[2])
	if major < 1 || (major == 1 && minor < 1) {
		return fmt.Errorf("%q is too old: 1.1 or newer is needed", line)
	}
	return nil
}

// recursiveReadOnly tells whether the runtime knows the mount option "rro".
func (f runtimeFacts) recursiveReadOnly() bool {
	return f.Features != nil && slices.Contains(f.Features.MountOptions, "rro")
}

// bin is the program, found in PATH at the first use.
func (r *ociRuntime) bin(ctx context.Context) (string, error) {
	f, err := r.probe(ctx)
	return f.Path, err
}

// has tells whether the runtime has state of a container of that ID.
func (r *ociRuntime) has(id string) bool {
	_, err := os.Lstat(filepath.Join(r.root, id))
	return err == nil
}

// ids lists the containers that the runtime has state of.
func (r *ociRuntime) ids() []string {
	entries, err := os.ReadDir(r.root)
	if err != nil {
		return nil
	}
	var ids []string
	for _, e := range entries {
		if validID(e.Name()) {
			ids = append(ids, e.Name())
		}
	}
	return ids
}

// delete kills what runs of the container and removes its cgroup and state. A
// container that does not exist is no error.
func (r *ociRuntime) delete(ctx context.Context, id string) error {
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

// update sets resources of a live container, all or none.
func (r *ociRuntime) update(ctx context.Context, id string, res *specs.LinuxResources) error {
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

func (r *ociRuntime) args(verb ...string) []string {
	return append(append([]string{"--root", r.root}, r.global()...), verb...)
}

// global are the options before the verb, besides --root.
func (r *ociRuntime) global() []string {
	if r.systemd {
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
	if ctx.Err() != nil {
		return nil, fmt.Errorf("%s %s: %w", filepath.Base(name), verbOf(args), context.Cause(ctx))
	}
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w: %s", filepath.Base(name), verbOf(args), err, lastLine(errOut.Bytes()))
	}
	if out.cut {
		return nil, fmt.Errorf("%s %s: output exceeds %d bytes", filepath.Base(name), verbOf(args), maxRuntimeText)
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

// lastLine returns the last line of text that is not empty, bounded.
func lastLine(text []byte) string {
	text = bytes.TrimSpace(text)
	if i := bytes.LastIndexByte(text, '\n'); i >= 0 {
		text = text[i+1:]
	}
	if len(text) > 2048 {
		text = text[:2048]
	}
	return string(text)
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
func (s *Service) handler(name string) (*ociRuntime, error) {
	if name == "" {
		name = s.cfg.DefaultRuntime
	}
	r, ok := s.runtimes[name]
	if !ok {
		return nil, fmt.Errorf("%w: runtime_handler %q: not in the configuration", ErrUnknownHandler, name)
	}
	return r, nil
}

// runtimeOf is the runtime that an object was made with. One that has gone from
// the configuration since is a program that cannot be run, so that the object can
// still be undone, by its cgroup and by hand.
func (s *Service) runtimeOf(name string) *ociRuntime {
	if r, err := s.handler(name); err == nil {
		return r
	}
	return &ociRuntime{handler: name, path: "/nonexistent/" + name, root: filepath.Join(s.cfg.RunDir, "oci", name)}
}

// RuntimeReady tells why no container can be run with the default runtime; nil
// if they can.
func (s *Service) RuntimeReady() error {
	ctx, cancel := context.WithTimeout(context.Background(), probeTimeout)
	defer cancel()
	r, err := s.handler("")
	if err != nil {
		return err
	}
	if _, err = r.probe(ctx); err != nil {
		return err
	}
	if _, err := os.Stat(s.cfg.ShimBinary); err != nil {
		return errors.Join(ErrRuntime, fmt.Errorf("shim: %w", err))
	}
	return nil
}
