package critest

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berthd/berth/test/images"
	"github.com/berthd/berth/test/node"
)

// box is one test's view of the suite.
type box struct {
	*testing.T
	*suite
	ctx context.Context
}

// patience bounds every single test, not what it measures.
const patience = 4 * time.Minute

// open begins a test that may run beside others.
func open(t *testing.T) *box {
	t.Helper()
	if shared == nil {
		t.Skip(node.NeedsRoot)
	}
	t.Parallel()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	return &box{T: t, suite: shared, ctx: ctx}
}

// ours skips a test of what berth promises beyond the CRI.
func (b *box) ours() {
	b.Helper()
	if b.node == nil {
		b.Skip("a promise of berth's own; BERTH_ENDPOINT names another runtime")
	}
}

// with returns the box for a subtest.
func (b *box) with(t *testing.T) *box { return &box{T: t, suite: b.suite, ctx: b.ctx} }

// must ends the test on an error.
func (b *box) must(err error) {
	b.Helper()
	if err != nil {
		b.Fatal(err)
	}
}

// refused checks that err has the code and that its message names every part.
func (b *box) refused(err error, want codes.Code, parts ...string) {
	b.Helper()
	if got := status.Code(err); got != want {
		b.Errorf("code %v, want %v: %v", got, want, err)
		return
	}
	for _, p := range parts {
		if !strings.Contains(err.Error(), p) {
			b.Errorf("error does not name %q: %v", p, err)
		}
	}
	b.once(err)
}

// once checks that an error does not say the same thing twice.
func (b *box) once(err error) {
	b.Helper()
	if strings.Contains(err.Error(), "invalid argument: invalid argument") {
		b.Errorf("error repeats itself: %v", err)
	}
}

var podNumber atomic.Int64

// podConfig returns the configuration of a pod of this test.
func (b *box) podConfig(edits ...func(*runtime.PodSandboxConfig)) *runtime.PodSandboxConfig {
	b.Helper()
	name := fmt.Sprintf("p%d", podNumber.Add(1))
	cfg := node.PodConfig(name, b.logs, b.parent)
	b.must(os.MkdirAll(cfg.LogDirectory, 0o755))
	for _, e := range edits {
		e(cfg)
	}
	return cfg
}

// pod is a sandbox of a test.
type pod struct {
	*box
	id  string
	cfg *runtime.PodSandboxConfig
	all *[]string // IDs of the pod and of all its containers
}

// with returns the pod for a subtest.
func (p *pod) with(t *testing.T) *pod {
	return &pod{box: p.box.with(t), id: p.id, cfg: p.cfg, all: p.all}
}

// pod runs a pod, which is gone after the test with all that it brought.
func (b *box) pod(edits ...func(*runtime.PodSandboxConfig)) *pod {
	b.Helper()
	cfg := b.podConfig(edits...)
	id, err := b.client.Run(b.ctx, cfg)
	b.must(err)
	return b.adopt(id, cfg)
}

// adopt makes the test responsible for a pod that runs.
func (b *box) adopt(id string, cfg *runtime.PodSandboxConfig) *pod {
	p := &pod{box: b, id: id, cfg: cfg, all: &[]string{id}}
	b.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if err := b.client.Destroy(ctx, id); err != nil {
			b.Errorf("clean-up: pod %.12s: %v", id, err)
		}
		if b.node == nil {
			return
		}
		left, err := b.node.SettleIDs(ctx, 5*time.Second, *p.all...)
		for _, l := range left {
			b.Errorf("leak: %s", l)
		}
		if err != nil {
			b.Errorf("leak check: %v", err)
		}
	})
	return p
}

// status returns the pod's status.
func (p *pod) status() *runtime.PodSandboxStatus {
	p.Helper()
	r, err := p.client.PodSandboxStatus(p.ctx, &runtime.PodSandboxStatusRequest{PodSandboxId: p.id})
	p.must(err)
	return r.Status
}

func (p *pod) stop() {
	p.Helper()
	_, err := p.client.StopPodSandbox(p.ctx, &runtime.StopPodSandboxRequest{PodSandboxId: p.id})
	p.must(err)
}

// container is a container of a test.
type container struct {
	*pod
	id  string
	cfg *runtime.ContainerConfig
	log string // path on the host
}

var containerNumber atomic.Int64

// edit is a change to a container's usual configuration: busybox with a
// command.
type edit = func(*runtime.ContainerConfig)

// config returns the configuration of a container that runs command.
func (p *pod) config(command []string, edits ...edit) *runtime.ContainerConfig {
	cfg := node.ContainerConfig(fmt.Sprintf("c%d", containerNumber.Add(1)), p.ref(images.Busybox), command...)
	for _, e := range edits {
		e(cfg)
	}
	return cfg
}

// tryCreate creates a container and returns what the runtime said.
func (p *pod) tryCreate(command []string, edits ...edit) (*container, error) {
	cfg := p.config(command, edits...)
	r, err := p.client.CreateContainer(p.ctx, &runtime.CreateContainerRequest{PodSandboxId: p.id, Config: cfg, SandboxConfig: p.cfg})
	if err != nil {
		return nil, err
	}
	*p.all = append(*p.all, r.ContainerId)
	return &container{pod: p, id: r.ContainerId, cfg: cfg, log: filepath.Join(p.cfg.LogDirectory, cfg.LogPath)}, nil
}

// create creates a container.
func (p *pod) create(command []string, edits ...edit) *container {
	p.Helper()
	c, err := p.tryCreate(command, edits...)
	p.must(err)
	return c
}

// run creates and starts a container.
func (p *pod) run(command []string, edits ...edit) *container {
	p.Helper()
	c := p.create(command, edits...)
	c.start()
	return c
}

// refuses checks that a container cannot be had: create, or else start, ends
// with an error that names the parts.
func (p *pod) refuses(command []string, e edit, parts ...string) {
	p.Helper()
	c, err := p.tryCreate(command, e)
	if err == nil {
		_, err = p.client.StartContainer(p.ctx, &runtime.StartContainerRequest{ContainerId: c.id})
	}
	if err == nil {
		p.Errorf("container %v: created and started, want an error that names %q", command, parts)
		return
	}
	if c := status.Code(err); c == codes.DeadlineExceeded || c == codes.Internal {
		p.Errorf("code %v for bad input: %v", c, err)
	}
	for _, part := range parts {
		if !strings.Contains(err.Error(), part) {
			p.Errorf("error does not name %q: %v", part, err)
		}
	}
	p.once(err)
}

// output runs a container to its end, which must be exit code 0, and returns
// what it printed.
func (p *pod) output(command []string, edits ...edit) string {
	p.Helper()
	c := p.run(command, edits...)
	st := c.wait()
	out := c.text()
	if st.ExitCode != 0 {
		p.Fatalf("%v: exit code %d (%s %s), printed %q", command, st.ExitCode, st.Reason, st.Message, out)
	}
	return out
}

func (c *container) start() {
	c.Helper()
	_, err := c.client.StartContainer(c.ctx, &runtime.StartContainerRequest{ContainerId: c.id})
	c.must(err)
}

func (c *container) stop(grace int64) {
	c.Helper()
	_, err := c.client.StopContainer(c.ctx, &runtime.StopContainerRequest{ContainerId: c.id, Timeout: grace})
	c.must(err)
}

func (c *container) remove() {
	c.Helper()
	_, err := c.client.RemoveContainer(c.ctx, &runtime.RemoveContainerRequest{ContainerId: c.id})
	c.must(err)
}

func (c *container) status() *runtime.ContainerStatus {
	c.Helper()
	st, err := c.client.ContainerState(c.ctx, c.id)
	c.must(err)
	return st
}

// wait waits for the container's end.
func (c *container) wait() *runtime.ContainerStatus {
	c.Helper()
	st, err := c.client.WaitExited(c.ctx, c.id)
	c.must(err)
	return st
}

// exec runs a command, which must succeed, and returns its standard output.
func (c *container) exec(command ...string) string {
	c.Helper()
	r, err := c.client.ExecSync(c.ctx, &runtime.ExecSyncRequest{ContainerId: c.id, Cmd: command, Timeout: 30})
	c.must(err)
	if r.ExitCode != 0 {
		c.Fatalf("exec %v: exit code %d, stderr %q", command, r.ExitCode, r.Stderr)
	}
	return string(r.Stdout)
}

// sees waits until the container's log has text in it.
func (c *container) sees(text string) {
	c.Helper()
	c.until(fmt.Sprintf("log with %q", text), func() bool {
		b, err := os.ReadFile(c.log)
		return err == nil && strings.Contains(string(b), text)
	})
}

// until polls a condition.
func (b *box) until(what string, fn func() bool) {
	b.Helper()
	for end := time.Now().Add(20 * time.Second); !fn(); {
		if time.Now().After(end) {
			b.Fatalf("after 20 s still no %s", what)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// entry is one record of a CRI log.
type entry struct {
	at     time.Time
	stream string
	tag    string // P or F
	text   string
}

// readLog parses a CRI log file, strictly.
func (b *box) readLog(path string) []entry {
	b.Helper()
	raw, err := os.ReadFile(path)
	b.must(err)
	var out []entry
	for i, line := range strings.SplitAfter(string(raw), "\n") {
		if line == "" {
			continue
		}
		f := strings.SplitN(line, " ", 4)
		if len(f) != 4 || !strings.HasSuffix(line, "\n") {
			b.Fatalf("%s: record %d is %.80q, want four fields and a newline", path, i, line)
		}
		at, err := time.Parse(time.RFC3339Nano, f[0])
		if err != nil {
			b.Fatalf("%s: record %d: %v", path, i, err)
		}
		if f[1] != "stdout" && f[1] != "stderr" || f[2] != "P" && f[2] != "F" {
			b.Fatalf("%s: record %d: stream %q, tag %q", path, i, f[1], f[2])
		}
		out = append(out, entry{at, f[1], f[2], strings.TrimSuffix(f[3], "\n")})
	}
	return out
}

// join puts the entries of a stream together to what the process wrote.
func join(entries []entry, stream string) string {
	var b strings.Builder
	for _, e := range entries {
		if stream != "" && e.stream != stream {
			continue
		}
		b.WriteString(e.text)
		if e.tag == "F" {
			b.WriteByte('\n')
		}
	}
	return b.String()
}

// text returns what the container has written so far, on both streams.
func (c *container) text() string {
	c.Helper()
	return join(c.readLog(c.log), "")
}

func sh(script string) []string { return []string{"/bin/sh", "-c", script} }

// image makes a container run another of the standard images, with that
// image's own entry point.
func (b *box) image(name string) edit {
	return func(cfg *runtime.ContainerConfig) {
		cfg.Image = &runtime.ImageSpec{Image: b.ref(name), UserSpecifiedImage: b.ref(name)}
	}
}

// security changes a container's security context.
func security(fn func(*runtime.LinuxContainerSecurityContext)) edit {
	return func(cfg *runtime.ContainerConfig) { fn(cfg.Linux.SecurityContext) }
}

// field returns the value of a "name: value" line, as in /proc/self/status.
func field(text, name string) string {
	for _, line := range strings.Split(text, "\n") {
		if v, ok := strings.CutPrefix(line, name+":"); ok {
			return strings.TrimSpace(v)
		}
	}
	return ""
}

// dropImage removes an image, which need not be there.
func (b *box) dropImage(ref string) {
	b.Helper()
	// With a context of its own: it also runs after the test.
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if _, err := b.client.Images.RemoveImage(ctx, &runtime.RemoveImageRequest{Image: &runtime.ImageSpec{Image: ref}}); err != nil {
		b.Errorf("removal of image %s: %v", ref, err)
	}
}
