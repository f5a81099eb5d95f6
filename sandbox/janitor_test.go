package sandbox

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berthd/berth/cni"
	"github.com/berthd/berth/cni/netns"
	"github.com/berthd/berth/snapshotter"
)

// traced is a network that only has traces.
type traced struct {
	Network
	traces    []cni.Trace
	blind     error         // of looking
	collected time.Duration // what GC had left
}

func (*traced) Attachments() ([]string, error) { return nil, nil }

func (n *traced) Traces(context.Context) ([]cni.Trace, error) { return n.traces, n.blind }

func (n *traced) GC(ctx context.Context, _ []cni.Pod) error {
	n.collected = left(ctx)
	return nil
}

func left(ctx context.Context) time.Duration {
	end, ok := ctx.Deadline()
	if !ok {
		return time.Hour
	}
	return time.Until(end)
}

// noLayers is a snapshotter without snapshots.
type noLayers struct{ snapshotter.Snapshotter }

func (noLayers) Walk(context.Context, func(context.Context, snapshotter.Info) error, ...string) error {
	return nil
}

// TestSweep: what is left has to be swept again, what cannot be looked at not; and the
// network has one budget for all.
func TestSweep(t *testing.T) {
	stuck := errors.New("stuck")
	for _, tt := range []struct {
		name   string
		blind  error
		remove error
	}{
		{"blind", errors.New("iptables-save"), nil},
		{"stuck", nil, stuck},
		{"both", errors.New("iptables-save"), stuck},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s, _ := initService(t)
			pins, err := netns.NewPins(filepath.Join(s.cfg.RunDir, "ns"))
			if err != nil {
				t.Fatal(err)
			}
			var had time.Duration
			n := &traced{blind: tt.blind, traces: []cni.Trace{{Kind: cni.TraceAddress, What: "10.0.0.2", Remove: func(ctx context.Context) error {
				had = left(ctx)
				return tt.remove
			}}}}
			s.cfg.StateDir, s.initDir = t.TempDir(), filepath.Join(s.cfg.RunDir, "init/now")
			s.ops, s.deps = newOps(), Deps{Store: s.book.st, Snapshots: noLayers{}, Network: n, Pins: pins}
			if err := s.sweep(t.Context()); !errors.Is(err, tt.remove) {
				t.Errorf("got %v, want %v", err, tt.remove)
			}
			if had > sweepNetworkLimit || n.collected > had {
				t.Errorf("an address has %s, and the plugins then %s, of %s", had, n.collected, sweepNetworkLimit)
			}
		})
	}
}

// TestRest: something new ends the pause, what the janitor itself has told does not.
func TestRest(t *testing.T) {
	s := &Service{wake: make(chan struct{}, 1)}
	over, cancel := context.WithTimeout(t.Context(), janitorFirst+janitorFirst/4)
	defer cancel()
	s.kick()
	if s.rest(over, time.Hour) {
		t.Error("woken by what it had told itself")
	}
	kicked := make(chan struct{})
	go func() {
		for {
			select {
			case <-kicked:
				return
			case <-time.After(10 * time.Millisecond):
				s.kick()
			}
		}
	}()
	if !s.rest(t.Context(), time.Hour) {
		t.Error("not woken")
	}
	close(kicked)
}

// TestRemoveUnmounted: what is mounted below a directory is not emptied with it.
func TestRemoveUnmounted(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: mounts")
	}
	dir, other := t.TempDir(), t.TempDir()
	kept := filepath.Join(other, "kept")
	point := filepath.Join(dir, "id", "a b")
	if err := errors.Join(os.WriteFile(kept, nil, 0o600), os.MkdirAll(point, 0o700)); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(other, point, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(point, unix.MNT_DETACH) })
	if err := removeUnmounted(filepath.Join(dir, "id")); err != nil {
		t.Error(err)
	}
	if exists(filepath.Join(dir, "id")) || !exists(kept) {
		t.Errorf("directory there: %v, what was mounted there: %v", exists(filepath.Join(dir, "id")), exists(kept))
	}
}

// TestCommandLine: a process does not get to choose how much is read of it.
func TestCommandLine(t *testing.T) {
	text, err := commandLine(os.Getpid())
	if want := os.Args[0] + "\x00"; err != nil || !strings.HasPrefix(string(text), want) {
		t.Errorf("got %q, %v; want it to begin with %q", text, err, want)
	}
	cmd := exec.Command("sleep", "300")
	cmd.Args = append(cmd.Args, strings.Repeat("0", maxCommand))
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { cmd.Process.Kill(); cmd.Wait() }()
	text = nil
	for err == nil && len(text) == 0 { // the kernel sets it after Start has seen the exec
		text, err = commandLine(cmd.Process.Pid)
	}
	if err == nil {
		t.Errorf("%d bytes of a command line longer than %d", len(text), maxCommand)
	}
}
