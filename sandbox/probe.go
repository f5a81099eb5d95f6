package sandbox

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go/features"
	"golang.org/x/sys/unix"
)

// prober knows what an OCI runtime can do. It asks in the background, so that a
// runtime which hangs keeps nobody from an answer; it asks again when the program
// has become another one, and after a failure.
type prober struct {
	life    context.Context // of background work
	handler string
	path    string // as configured

	mu    sync.Mutex
	look  chan struct{} // closed when the look under way ends; nil if there is none
	asked time.Time     // zero before the first answer
	of    stamp         // the program that facts and err are about
	facts runtimeFacts
	err   error // why the runtime cannot be used
}

// runtimeFacts is what a probe found out.
type runtimeFacts struct {
	Path     string // resolved
	Version  string // first line of --version
	Features *features.Features
}

// stamp tells one program from another under the same name.
type stamp struct {
	path         string
	dev, ino     uint64
	size         int64
	mtime, ctime unix.Timespec
}

// Bounds of probing.
const (
	probeTimeout = 5 * time.Second
	probeAgain   = 5 * time.Second // after a failed probe
	firstProbe   = 2 * time.Second // what those wait who ask just after the start
)

func newProber(life context.Context, handler, path string) *prober {
	return &prober{life: life, handler: handler, path: path,
		err: fmt.Errorf("%w: handler %q: %s: not probed yet", ErrRuntime, handler, path)}
}

// verdict returns at once what is known, and has it looked at anew.
func (p *prober) verdict() (runtimeFacts, error) {
	p.refresh()
	return p.known()
}

func (p *prober) known() (runtimeFacts, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.facts, p.err
}

// now returns what is true now, for who is about to run the program. It waits
// for a probe if there has to be one.
func (p *prober) now(ctx context.Context) (runtimeFacts, error) {
	select {
	case <-p.refresh():
		return p.known()
	case <-ctx.Done():
		return runtimeFacts{}, fmt.Errorf("%w: handler %q: %s: does not answer yet: %w", ErrRuntime, p.handler, p.path, ctx.Err())
	}
}

// refresh has the verdict looked at, unless somebody is at it, and returns what
// is closed at the end of that.
func (p *prober) refresh() <-chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.look == nil {
		p.look = make(chan struct{})
		go p.renew(p.look)
	}
	return p.look
}

// renew asks the program if what is known of it does not hold any more.
func (p *prober) renew(done chan struct{}) {
	defer close(done)
	path, now, err := lookUp(p.path)
	p.mu.Lock()
	fresh := !p.asked.IsZero() && p.of == now && (p.err == nil || time.Since(p.asked) < probeAgain)
	if fresh {
		p.look = nil
	}
	p.mu.Unlock()
	if fresh {
		return
	}
	var facts runtimeFacts
	if err == nil {
		ctx, cancel := context.WithTimeout(p.life, probeTimeout)
		facts, err = ask(ctx, path)
		cancel()
	}
	if err != nil {
		facts, err = runtimeFacts{}, fmt.Errorf("%w: handler %q: %w", ErrRuntime, p.handler, err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.look, p.of, p.asked, p.facts, p.err = nil, now, time.Now(), facts, err
}

// lookUp finds a program in PATH and takes its stamp. One that is not there has
// the zero stamp.
func lookUp(name string) (string, stamp, error) {
	path, err := exec.LookPath(name)
	if err != nil {
		return "", stamp{}, err
	}
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return "", stamp{}, fmt.Errorf("%s: %w", path, err)
	}
	return path, stamp{path: path, dev: uint64(st.Dev), ino: st.Ino, size: st.Size, mtime: st.Mtim, ctime: st.Ctim}, nil //nolint:unconvert // Dev differs between architectures
}

// ask runs the program for what it says about itself.
func ask(ctx context.Context, path string) (runtimeFacts, error) {
	f := runtimeFacts{Path: path}
	out, err := output(ctx, nil, path, "--version")
	if err != nil {
		return f, err
	}
	f.Version, _, _ = strings.Cut(strings.TrimSpace(string(out)), "\n")
	if err := checkVersion(f.Version); err != nil {
		return f, fmt.Errorf("%s: %w", path, err)
	}
	// The verb came with runc 1.1; other runtimes may lack it.
	out, err = output(ctx, nil, path, "features")
	if errors.Is(err, context.DeadlineExceeded) {
		return f, err
	}
	if err == nil {
		f.Features = new(features.Features)
		if json.Unmarshal(out, f.Features) != nil {
			f.Features = nil
		}
	}
	return f, nil
}

var runcLine = regexp.MustCompile(`^runc version v?(\d+)\.(\d+)`)

// runcVersion tells whether a line of --version is runc's, and if so whether of
// this version or a later one.
func runcVersion(line string, major, minor int) (recent, runc bool) {
	m := runcLine.FindStringSubmatch(line)
	if m == nil {
		return false, false
	}
	a, _ := strconv.Atoi(m[1])
	b, _ := strconv.Atoi(m[2])
	return a > major || a == major && b >= minor, true
}

// checkVersion refuses a runc that is older than 1.1. What other runtimes call
// themselves is not judged.
func checkVersion(line string) error {
	if recent, runc := runcVersion(line, 1, 1); runc && !recent {
		return fmt.Errorf("%q is too old: 1.1 or newer is needed", line)
	}
	return nil
}

// runc tells whether it is runc, of this version or a later one.
func (f runtimeFacts) runc(major, minor int) bool {
	recent, _ := runcVersion(f.Version, major, minor)
	return recent
}

// recursiveReadOnly tells whether the runtime knows the mount option "rro".
func (f runtimeFacts) recursiveReadOnly() bool {
	return f.Features != nil && slices.Contains(f.Features.MountOptions, "rro")
}
