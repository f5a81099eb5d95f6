package crash

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/berthd/berth/test/failpoint"
	"github.com/berthd/berth/test/node"
)

// failpointBin builds the programs with failpoints when the first test wants
// them, and returns their directory.
var failpointBin = sync.OnceValues(func() (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	root, err := node.Root()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(scratch, "failpoint")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return "", err
	}
	return dir, node.BuildFailpoints(ctx, root, dir)
})

// limits are the deadlines of operations in the tests of failpoints: what hangs
// is not to take long.
const limits = `pod_timeout = "3s"
container_timeout = "3s"
cni_timeout = "2s"
pull_timeout = "3s"
`

// faulty is a node with failpoints, a runtime and plugins that fail on order.
type faulty struct {
	*rig
	points failpoint.Dir
}

// newFaulty lays out such a node, starts it and gets it ready, as startNode does.
// The runtime and the plugins are the machine's own behind test/fakes.
func newFaulty(t *testing.T) *faulty {
	t.Helper()
	if bin == "" {
		t.Skip(node.NeedsRoot)
	}
	bin, err := failpointBin()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	points, err := failpoint.Make(filepath.Join(dir, "points"))
	if err != nil {
		t.Fatal(err)
	}
	fakes, err := layFakes(dir, bin)
	if err != nil {
		t.Fatal(err)
	}
	opts := node.Options{Bin: bin, Config: limits, Env: []string{failpoint.Env + "=" + string(points)},
		CNIBinDirs: append([]string{fakes}, node.CNIBinDirs...), Runtimes: map[string]string{"runc": filepath.Join(fakes, "runc")}}
	f := &faulty{rig: newNode(t, opts), points: points}
	f.warm()
	return f
}

// layFakes makes the directory that test/fakes wants.
func layFakes(dir, bin string) (string, error) {
	fakes := filepath.Join(dir, "fakes")
	errs := []error{os.MkdirAll(filepath.Join(fakes, "real"), 0o700), os.Symlink(filepath.Join(dir, "points"), filepath.Join(fakes, "points"))}
	runc, err := exec.LookPath("runc")
	errs = append(errs, err)
	real := map[string]string{"runc": runc}
	for _, name := range []string{"bridge", "portmap"} {
		for _, d := range node.CNIBinDirs {
			if p := filepath.Join(d, name); fileExists(p) {
				real[name] = p
			}
		}
	}
	program, err := os.ReadFile(filepath.Join(bin, "fakes"))
	errs = append(errs, err)
	for name, path := range real {
		errs = append(errs, os.Symlink(path, filepath.Join(fakes, "real", name)), os.WriteFile(filepath.Join(fakes, name), program, 0o755))
	}
	return fakes, errors.Join(errs...)
}

func fileExists(path string) bool { _, err := os.Stat(path); return err == nil }

// with is the same node for a test below that of f.
func (f *faulty) with(t *testing.T, ctx context.Context) *faulty {
	r := *f.rig
	r.T, r.ctx = t, ctx
	return &faulty{rig: &r, points: f.points}
}

// revive starts berthd if it has ended.
func (r *rig) revive() {
	r.Helper()
	if r.Ended() {
		r.must(r.Start(r.ctx))
	}
}

// interfere waits until a program pauses at the point, kills what is to die, and
// lets it go on. It gives up when ctx ends.
func (f *faulty) interfere(ctx context.Context, point, victim string) {
	for !f.points.WasHit(point) {
		select {
		case <-ctx.Done():
			return
		case <-time.After(time.Millisecond):
		}
	}
	switch victim {
	case victimShim:
		shims, err := f.Shims()
		if err != nil {
			f.Errorf("shims: %v", err)
		}
		for _, pid := range shims {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
	case victimDaemon:
		if err := f.Signal(syscall.SIGKILL); err != nil {
			f.Errorf("kill: %v", err)
		}
	}
	if err := f.points.Go(point); err != nil {
		f.Errorf("point %s: %v", point, err)
	}
}

// passes numbers a trace: the nth pass of each point.
func passes(trace []string) []pass {
	count := map[string]int{}
	var out []pass
	for _, p := range trace {
		count[p]++
		out = append(out, pass{p, count[p]})
	}
	return out
}

// pass is the nth pass of a point.
type pass struct {
	point string
	nth   int
}

func (p pass) String() string { return fmt.Sprintf("%s#%d", p.point, p.nth) }

// verb is the operation, or the program, of a point.
func (p pass) verb() string { v, _, _ := strings.Cut(p.point, "."); return v }
