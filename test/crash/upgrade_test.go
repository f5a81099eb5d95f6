package crash

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berthd/berth/store"
	"github.com/berthd/berth/test/images"
	"github.com/berthd/berth/test/node"
)

// oldCommits are the last commits of each older version of the shim's protocol,
// by version. Their programs are built and replaced under live pods.
var oldCommits = map[string]string{
	"1": "5fa413f0e9790a6d12d51c0d8bb83d8dffdf121c",
}

// buildOld builds the programs of a commit into a directory. The test is skipped
// where the history is not there.
func buildOld(t *testing.T, commit string) string {
	t.Helper()
	if bin == "" {
		t.Skip(node.NeedsRoot)
	}
	root, err := node.Root()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	if err := exec.CommandContext(ctx, "git", "-C", root, "cat-file", "-e", commit+"^{commit}").Run(); err != nil {
		t.Skipf("commit %.12s is not in the history of this checkout: %v", commit, err)
	}
	dir := t.TempDir()
	src, out := filepath.Join(dir, "src"), filepath.Join(dir, "bin")
	if err := os.Mkdir(src, 0o700); err != nil {
		t.Fatal(err)
	}
	// An archive, not a work tree: the repository is to stay as it is.
	archive := exec.CommandContext(ctx, "sh", "-c", "git -C \"$1\" archive \"$2\" | tar -x -C \"$3\"", "sh", root, commit, src)
	if b, err := archive.CombinedOutput(); err != nil {
		t.Fatalf("git archive: %v: %s", err, b)
	}
	build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false", "-tags", "containers_image_openpgp",
		"-ldflags=-s -w", "-o", out+"/", "./cmd/berthd", "./cmd/berth-shim", "./cmd/berth-init")
	build.Dir, build.Env = src, append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=")
	if b, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build of %.12s: %v: %s", commit, err, b)
	}
	return out
}

// TestUpgrade replaces a berthd of an older protocol by the present one under
// live pods: with a command running, a log being written, a container that has
// been created and not started, and one that ends while nobody looks.
func TestUpgrade(t *testing.T) {
	t.Parallel()
	for version, commit := range oldCommits {
		t.Run("protocol "+version, func(t *testing.T) {
			old := buildOld(t, commit)
			links := filepath.Join(t.TempDir(), "bin")
			// The old one does not know the keys.
			r := newNode(t, node.Options{Bin: links, Without: []string{"nri_socket_path", "nri_plugin_path", "nri_plugin_config_path"}})
			r.must(os.Symlink(old, links))
			r.begin()
			pod, cfg := r.pod("upgrade")
			talker := r.launch(pod, cfg, "talker", "/guest", "lines", "0", "2000")
			quiet := r.launch(pod, cfg, "quiet", "sh", "-c", script)
			brief := r.launch(pod, cfg, "brief", "sh", "-c", "sleep 1.5; echo bye; exit 42")
			made, err := r.client.CreateContainer(r.ctx, &runtime.CreateContainerRequest{PodSandboxId: pod, SandboxConfig: cfg,
				Config: node.ContainerConfig("made", refs[images.Busybox], "sh", "-c", "echo started; sleep 300")})
			r.must(err)
			pids := r.processes(talker)
			cut := call(func() error {
				_, err := r.client.ExecSync(r.ctx, &runtime.ExecSyncRequest{ContainerId: quiet, Cmd: []string{"sleep", "60"}, Timeout: 60})
				return err
			})
			r.until("command", func() bool { return len(r.processes(quiet)) > 2 })
			r.must(r.Kill())
			if err := <-cut; err == nil {
				t.Error("a command whose daemon was killed succeeded")
			}
			r.must(os.Remove(links))
			r.must(os.Symlink(bin, links))
			conf, err := os.ReadFile(r.Config)
			r.must(err)
			r.must(os.WriteFile(r.Config, append([]byte("nri = false\n"), conf...), 0o600))
			time.Sleep(2 * time.Second) // the brief one ends
			r.must(r.Start(r.ctx))
			r.upgraded(pod, cfg, talker, quiet, brief, made.ContainerId, pids)
		})
	}
}

// upgraded works with what an older daemon has left.
func (r *rig) upgraded(pod string, cfg *runtime.PodSandboxConfig, talker, quiet, brief, made string, pids []int) {
	r.Helper()
	if now := r.processes(talker); !slices.Equal(now, pids) || r.state(talker).State != running {
		r.Errorf("processes %v, were %v", now, pids)
	}
	if got := r.exec(quiet, "echo alive"); got != "alive\n" {
		r.Errorf("exec: %q", got)
	}
	if st := r.state(brief); st.State != exited || st.ExitCode != 42 {
		r.Errorf("a container that ended meanwhile: %v, %d, %q", st.State, st.ExitCode, st.Message)
	}
	_, err := r.client.StartContainer(r.ctx, &runtime.StartContainerRequest{ContainerId: made})
	r.must(err)
	log := filepath.Join(cfg.LogDirectory, "talker.log")
	r.must(os.Rename(log, log+".1"))
	_, err = r.client.ReopenContainerLog(r.ctx, &runtime.ReopenContainerLogRequest{ContainerId: talker})
	r.must(err)
	r.until("new log", func() bool { b, err := os.ReadFile(log); return err == nil && len(b) > 1000 })
	_, err = r.client.UpdateContainerResources(r.ctx, &runtime.UpdateContainerResourcesRequest{ContainerId: quiet,
		Linux: &runtime.LinuxContainerResources{MemoryLimitInBytes: newLimit}})
	r.must(err)
	for id, timeout := range map[string]int64{talker: 0, quiet: 5} {
		_, err = r.client.StopContainer(r.ctx, &runtime.StopContainerRequest{ContainerId: id, Timeout: timeout})
		r.must(err)
	}
	if st := r.state(quiet); st.ExitCode != scriptCode {
		r.Errorf("stopped with code %d, want %d", st.ExitCode, scriptCode)
	}
	all := append(r.lines(log+".1"), r.lines(log)...)
	for i, l := range all {
		if l != "line "+strconv.Itoa(i+1) {
			r.Fatalf("line %d of the log in two files is %q", i+1, l)
		}
	}
	next := r.launch(pod, cfg, "next", "sleep", "300") // a new shim in an old pod
	if r.state(next).State != running {
		r.Error("a new container in an old pod does not run")
	}
}

// TestNewerBook: a berthd that meets the book of a later one says so and leaves
// it alone; what runs goes on.
func TestNewerBook(t *testing.T) {
	t.Parallel()
	r := startNode(t, node.Options{})
	pod, cfg := r.pod("newer")
	id := r.launch(pod, cfg, "c", "sleep", "300")
	pids := r.processes(id)
	r.must(r.Stop(r.ctx))
	book := filepath.Join(r.StateDir, "book.db")
	present, err := os.ReadFile(book)
	r.must(err)
	st, err := store.Open(book)
	r.must(err)
	r.must(st.SetMeta(store.MetaSchema, "99"))
	r.must(st.Close())
	before, err := os.ReadFile(book)
	r.must(err)
	err = r.Start(r.ctx)
	if err == nil || !strings.Contains(err.Error(), "99") || !strings.Contains(err.Error(), "newer") || !strings.Contains(err.Error(), book) {
		t.Errorf("got %v, want a refusal that names the book, its schema and that it is newer", err)
	}
	if after, err := os.ReadFile(book); err != nil || !slices.Equal(before, after) {
		t.Errorf("the book was changed: %v", err)
	}
	if now := r.processes(id); !slices.Equal(now, pids) {
		t.Errorf("processes %v, were %v", now, pids)
	}
	r.must(os.WriteFile(book, present, 0o600))
	r.must(r.Start(r.ctx))
	if r.state(id).State != running {
		t.Error("the container does not run any more")
	}
}
