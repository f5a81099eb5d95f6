package crash

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berthd/berth/test/images"
	"github.com/berthd/berth/test/node"
)

// wants checks an error for its code and for what it has to name.
func (r *rig) wants(err error, code codes.Code, parts ...string) {
	r.Helper()
	if err == nil || status.Code(err) != code {
		r.Errorf("got %v, want an error with code %v", err, code)
		return
	}
	for _, p := range parts {
		if !strings.Contains(err.Error(), p) {
			r.Errorf("error does not name %q: %v", p, err)
		}
	}
}

// condition returns a condition of the runtime's status.
func (r *rig) condition(name string) *runtime.RuntimeCondition {
	r.Helper()
	st, err := r.client.Status(r.ctx, &runtime.StatusRequest{})
	r.must(err)
	for _, c := range st.GetStatus().GetConditions() {
		if c.Type == name {
			return c
		}
	}
	r.Fatalf("status has no condition %s: %v", name, st)
	return nil
}

// script makes a program of a shell script.
func (r *rig) script(path, body string) {
	r.Helper()
	// Written aside: a plugin that is being written cannot be run.
	r.must(os.WriteFile(path+".new", []byte("#!/bin/sh\n"+body), 0o755))
	r.must(os.Rename(path+".new", path))
}

// plugins returns a directory for plugins of the test, and options of a node
// that uses one of them, "faulty", behind the usual bridge.
func plugins(t *testing.T) (dir string, opts node.Options) {
	t.Helper()
	dir = t.TempDir()
	return dir, node.Options{
		CNIBinDirs: append([]string{dir}, node.CNIBinDirs...),
		Config:     "cni_timeout = \"3s\"\n",
		CNIAfter:   `{"type": "faulty"}`,
	}
}

// Scripts of the plugin "faulty". Version 1.0.0 knows ADD, DEL and CHECK; a
// plugin at the end of a chain passes the result of those before it on.
const (
	pluginFine = `case $CNI_COMMAND in
VERSION) echo '{"cniVersion":"1.0.0","supportedVersions":["0.4.0","1.0.0"]}';;
ADD) exec sed -n 's/.*"prevResult":\({.*}\),"type".*/\1/p';;
esac
`
	pluginFails = `[ $CNI_COMMAND = ` + "%s" + ` ] && { echo '{"cniVersion":"1.0.0","code":117,"msg":"out of luck","details":"as the test wants"}'; exit 1; }
`
	pluginHangs = `[ $CNI_COMMAND = ` + "%s" + ` ] && { sleep 1234 & sleep 1235; }
`
)

// TestPluginFailsToAdd: the pod is refused with the plugin's own words, and
// what the plugins before it had set up is undone.
func TestPluginFailsToAdd(t *testing.T) {
	t.Parallel()
	dir, opts := plugins(t)
	r := newNode(t, opts)
	r.script(filepath.Join(dir, "faulty"), pluginFine)
	r.begin()
	r.script(filepath.Join(dir, "faulty"), fmt.Sprintf(pluginFails, "ADD")+pluginFine)
	_, err := r.client.Run(r.ctx, r.podConfig("unlucky"))
	r.wants(err, codes.Unknown, "faulty", "ADD", "out of luck", "as the test wants")
	r.unchanged()
	r.script(filepath.Join(dir, "faulty"), pluginFine)
	pod, cfg := r.pod("unlucky") // the same pod, asked for again
	r.launch(pod, cfg, "c", "sleep", "300")
}

// TestPluginHangsInAdd: the plugin is killed with its children after the
// configured time; reads are answered meanwhile.
func TestPluginHangsInAdd(t *testing.T) {
	t.Parallel()
	dir, opts := plugins(t)
	r := newNode(t, opts)
	r.script(filepath.Join(dir, "faulty"), pluginFine)
	r.begin()
	r.script(filepath.Join(dir, "faulty"), fmt.Sprintf(pluginHangs, "ADD")+pluginFine)
	begin := time.Now()
	done := call(func() error { _, err := r.client.Run(r.ctx, r.podConfig("waiting")); return err })
	time.Sleep(500 * time.Millisecond)
	read := time.Now()
	_, err := r.client.ListPodSandbox(r.ctx, &runtime.ListPodSandboxRequest{})
	r.must(err)
	r.condition("NetworkReady")
	if d := time.Since(read); d > time.Second {
		t.Errorf("a list and a status took %v beside a plugin that hangs", d)
	}
	err = <-done
	if d := time.Since(begin); d < 2500*time.Millisecond || d > 10*time.Second {
		t.Errorf("answered after %v, cni_timeout is 3 s", d)
	}
	r.wants(err, status.Code(err), "faulty", "ADD")
	if c := status.Code(err); c != codes.DeadlineExceeded && c != codes.Unavailable {
		t.Errorf("code %v: %v", c, err)
	}
	r.unchanged()
}

// TestCallerGivesUp: a kubelet whose deadline passes is told the step that is
// slow, and its next call joins the work that went on.
func TestCallerGivesUp(t *testing.T) {
	t.Parallel()
	dir, opts := plugins(t)
	r := newNode(t, opts)
	r.script(filepath.Join(dir, "faulty"), pluginFine)
	r.begin()
	r.script(filepath.Join(dir, "faulty"), "[ $CNI_COMMAND = ADD ] && sleep 1.5\n"+pluginFine)
	cfg := r.podConfig("patient")
	ctx, cancel := context.WithTimeout(r.ctx, 500*time.Millisecond)
	defer cancel()
	_, err := r.client.Run(ctx, cfg)
	if c := status.Code(err); c != codes.DeadlineExceeded {
		t.Errorf("got %v, want code DeadlineExceeded", err)
	}
	begin := time.Now()
	id, err := r.client.Run(r.ctx, cfg)
	r.must(err)
	if d := time.Since(begin); d > 1400*time.Millisecond {
		t.Errorf("the second call took %v: it began anew", d)
	}
	ps, err := r.client.ListPodSandbox(r.ctx, &runtime.ListPodSandboxRequest{})
	r.must(err)
	if len(ps.Items) != 1 || ps.Items[0].Id != id {
		t.Errorf("pods %v, want the one", ps.Items)
	}
}

// TestPluginFailsToDel: a pod goes away although its network cannot be
// released, and the release is tried again until it succeeds.
func TestPluginFailsToDel(t *testing.T) {
	t.Parallel()
	dir, opts := plugins(t)
	r := newNode(t, opts)
	r.script(filepath.Join(dir, "faulty"), pluginFine)
	r.begin()
	pod, cfg := r.pod("sticky")
	id := r.launch(pod, cfg, "c", "sleep", "300")
	r.script(filepath.Join(dir, "faulty"), fmt.Sprintf(pluginFails, "DEL")+pluginFine)
	if err := r.client.Destroy(r.ctx, pod); err != nil {
		// An error is right too, as long as it tells why and the pod goes with
		// the next call.
		r.wants(err, status.Code(err), "out of luck")
	}
	if pids := r.processes(id); len(pids) != 0 {
		t.Errorf("processes %v of the container still run", pids)
	}
	r.script(filepath.Join(dir, "faulty"), pluginFine)
	r.must(r.client.Destroy(r.ctx, pod))
	left, err := r.Settle(r.ctx, r.before, 20*time.Second)
	r.must(err)
	for _, l := range left {
		t.Errorf("20 s after the plugin was mended: %s", l)
	}
}

// TestNetworkReady: without a configuration the status tells why not; a new
// one is found by itself, and a broken one does not replace it.
func TestNetworkReady(t *testing.T) {
	t.Parallel()
	r := newNode(t, node.Options{CNI: node.NoCNI, Config: "cni_fallback_subnet = \"\"\n"})
	r.must(r.Start(r.ctx))
	if c := r.condition("NetworkReady"); c.Status || !strings.Contains(c.Message, r.CNIDir) {
		t.Errorf("without a configuration: %v, want false and the directory named", c)
	}
	_, err := r.client.Run(r.ctx, r.podConfig("early"))
	r.wants(err, codes.Unknown, "network not ready", r.CNIDir)
	conf := filepath.Join(r.CNIDir, "10-late.conflist")
	r.must(os.WriteFile(conf, []byte(r.Conflist()), 0o600))
	r.until("ready network", func() bool { return r.condition("NetworkReady").Status })
	pod, _ := r.pod("first")
	r.must(r.client.Destroy(r.ctx, pod))
	r.before, err = r.Marks()
	r.must(err)
	r.must(os.WriteFile(conf, []byte(`{"cniVersion": "1.0.0", "name": `), 0o600))
	time.Sleep(time.Second) // longer than a change is waited for to settle
	r.pod("second")
	r.nothingLeft()
}

// TestRuntimeMissingOrOld: a node whose default runtime cannot be used says so
// in its status and in every refusal.
func TestRuntimeMissingOrOld(t *testing.T) {
	t.Parallel()
	old := filepath.Join(t.TempDir(), "old-runc")
	for _, c := range []struct {
		name, path string
		parts      []string
	}{
		{"missing", "/no/such/runc", []string{"/no/such/runc"}},
		{"too old", old, []string{old, "1.0.0", "1.1"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newNode(t, node.Options{Runtimes: map[string]string{"runc": c.path}})
			r.script(old, "echo 'runc version 1.0.0'\n")
			r.must(r.Start(r.ctx))
			cond := r.condition("RuntimeReady")
			if cond.Status {
				t.Errorf("status tells that the runtime is ready")
			}
			for _, p := range c.parts {
				if !strings.Contains(cond.Message, p) {
					t.Errorf("status does not name %q: %q", p, cond.Message)
				}
			}
			_, err := r.client.Pull(r.ctx, refs[images.Busybox])
			r.must(err)
			cfg := r.podConfig("p")
			pod, err := r.client.Run(r.ctx, cfg)
			if err == nil {
				_, err = r.client.Launch(r.ctx, pod, node.ContainerConfig("c", refs[images.Busybox], "true"), cfg)
			}
			r.wants(err, codes.Unavailable, c.parts...)
			if pod != "" {
				r.must(r.client.Destroy(r.ctx, pod))
			}
		})
	}
}

// TestConfigRefused: berthd does not start on a configuration that it does not
// understand, and names file, line, key and limit.
func TestConfigRefused(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name, config string
		without      string
		parts        []string
	}{
		{"unknown key", "# a comment\nstate_dri = \"/x\"\n", "", []string{"berth.toml:2", "state_dri", "state_dir"}},
		{"value out of range", "max_concurrent_layers = 1000\n", "", []string{"berth.toml:1", "max_concurrent_layers", "64"}},
		{"value of another type", "cni_timeout = true\n", "", []string{"berth.toml:1", "cni_timeout"}},
		{"run_dir too long", "run_dir = \"/run/" + strings.Repeat("x", 50) + "\"\n", "run_dir", []string{"berth.toml:1", "run_dir", "40"}},
		{"no TOML", "state_dir = /x\n", "", []string{"berth.toml:1"}},
		{"unknown default runtime", "default_runtime = \"kata\"\n", "", []string{"default_runtime", "kata"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			opts := node.Options{Config: c.config}
			if c.without != "" {
				opts.Without = []string{c.without}
			}
			r := newNode(t, opts)
			err := r.Start(r.ctx)
			if err == nil {
				t.Fatal("berthd started")
			}
			for _, p := range c.parts {
				if !strings.Contains(err.Error(), p) {
					t.Errorf("last words do not name %q: %v", p, err)
				}
			}
		})
	}
}

// unchanged checks that a failed operation has left nothing.
func (r *rig) unchanged() {
	r.Helper()
	left, err := r.Settle(r.ctx, r.before, 5*time.Second)
	r.must(err)
	for _, l := range left {
		r.Errorf("after a failure: %s", l)
	}
	ps, err := r.client.ListPodSandbox(r.ctx, &runtime.ListPodSandboxRequest{})
	r.must(err)
	if len(ps.Items) != 0 {
		r.Errorf("after a failure: pods %v", ps.Items)
	}
}
