// Package critest is berth's conformance suite: what the CRI says about every
// RPC that berth serves, checked over the socket with the plain cri-api client
// and by looking at the host, never inside berthd.
//
// It starts a berthd of its own (package test/node) and needs root. With
// BERTH_ENDPOINT=unix:///... it runs against any CRI runtime that is already
// there and reaches 127.0.0.1 over plain HTTP; tests of berth's own promises
// are skipped then.
//
// A test opens a box, runs pods in it, and looks. When a test ends its pods
// are removed and nothing that bears their IDs may be left on the host; when
// all ended, nothing at all.
package critest

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/berthd/berth/test/images"
	"github.com/berthd/berth/test/node"
	"github.com/berthd/berth/test/registry"
)

// suite is what all tests share.
type suite struct {
	client   *node.Client
	node     *node.Node // nil when BERTH_ENDPOINT is set
	registry *registry.Server
	images   map[string]*registry.Image
	guest    string // path of the guest program on the host
	logs     string
	parent   string
	endpoint string
	bin      string // directory of the built programs
	cdi      string // directory of CDI specifications; a test makes it
}

var shared *suite // nil: not root

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	if os.Geteuid() != 0 {
		return m.Run() // each test skips itself and says why
	}
	node.CloseOnSignal()
	dir, err := os.MkdirTemp("", "critest-")
	if err != nil {
		fmt.Fprintln(os.Stderr, "critest:", err)
		return 1
	}
	defer os.RemoveAll(dir)
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	s, err := newSuite(ctx, dir)
	if s != nil {
		defer s.close()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "critest:", err)
		return 1
	}
	shared = s
	var before node.Marks
	files := 0
	if s.node != nil {
		if before, err = s.node.Marks(); err == nil {
			files, err = s.node.Files()
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, "critest:", err)
			return 1
		}
	}
	code := m.Run()
	if s.node != nil && !s.clean(before, files) {
		code = 1
	}
	return code
}

func newSuite(ctx context.Context, dir string) (*suite, error) {
	root, err := node.Root()
	if err != nil {
		return nil, err
	}
	s := &suite{logs: filepath.Join(dir, "pods"), parent: fmt.Sprintf("/critest%d", os.Getpid()), endpoint: os.Getenv("BERTH_ENDPOINT"), cdi: filepath.Join(dir, "cdi")}
	if s.guest, err = images.BuildGuest(ctx, root, dir); err != nil {
		return s, err
	}
	if s.images, err = images.Standard(ctx, s.guest); err != nil {
		return s, err
	}
	if s.registry, err = registry.Start(); err != nil {
		return s, err
	}
	images.Push(s.registry, s.images)
	if s.endpoint == "" {
		if s.bin, err = node.Build(ctx, root, dir); err != nil {
			return s, err
		}
		if s.node, err = node.New(node.Options{Bin: s.bin, Registries: []string{s.registry.Addr()},
			Config: fmt.Sprintf("cdi_spec_dirs = [%q]\n", s.cdi)}); err != nil {
			return s, err
		}
		s.endpoint, s.parent, s.logs = s.node.Socket, s.node.Parent, s.node.LogDir
		if err := s.node.Start(ctx); err != nil {
			return s, err
		}
		if s.client, err = s.node.Client(); err != nil {
			return s, err
		}
	} else if s.client, err = node.Dial(s.endpoint, nil); err != nil {
		return s, err
	}
	for _, name := range []string{images.Busybox, images.Guest, images.Settings, images.Layers, images.Numeric} {
		if _, err := s.client.Pull(ctx, s.ref(name)); err != nil {
			return s, fmt.Errorf("pull of %s: %w", name, err)
		}
	}
	return s, s.warm(ctx)
}

// warm runs one pod, so that what comes with the first pod for good (the
// bridge, iptables' top chains) is there before the first look at the host.
func (s *suite) warm(ctx context.Context) error {
	cfg := node.PodConfig("warm", s.logs, s.parent)
	if err := os.MkdirAll(cfg.LogDirectory, 0o755); err != nil {
		return err
	}
	id, err := s.client.Run(ctx, cfg)
	if err != nil {
		return fmt.Errorf("first pod: %w", err)
	}
	return s.client.Destroy(ctx, id)
}

// clean reports on standard error what the whole suite has left behind.
func (s *suite) clean(before node.Marks, files int) bool {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	now, err := s.node.Files()
	if err == nil && now > files+16 {
		fmt.Fprintf(os.Stderr, "LEAK: berthd holds %d file descriptors, %d before the suite\n", now, files)
	}
	fine := err == nil && now <= files+16
	left, err := s.node.Clean(ctx, before)
	for _, l := range left {
		fmt.Fprintln(os.Stderr, "LEAK:", l)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "leak check:", err)
	}
	fine = fine && err == nil && len(left) == 0
	if fine {
		fmt.Println("leak check: nothing left: no namespace, mount, interface, address, rule, cgroup, process, file or row")
	}
	return fine
}

func (s *suite) close() {
	if s.client != nil && s.node == nil {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := s.client.DestroyAll(ctx, false); err != nil {
			fmt.Fprintln(os.Stderr, "critest: clean-up:", err)
		}
	}
	if s.node != nil {
		if err := s.node.Close(); err != nil {
			fmt.Fprintln(os.Stderr, "critest: clean-up:", err)
		}
	}
	if s.registry != nil {
		_ = s.registry.Close() // the process ends anyway
	}
}

// ref returns the reference of one of the standard images.
func (s *suite) ref(name string) string { return s.registry.Ref(name, images.Tag) }
