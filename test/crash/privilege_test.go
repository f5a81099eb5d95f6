package crash

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berthd/berth/test/images"
	"github.com/berthd/berth/test/node"
)

// TestUmask: whatever mask berthd is started with, its own things are for root
// alone, and those of a container for its user.
func TestUmask(t *testing.T) {
	t.Parallel()
	for _, mask := range []string{"0777", "0000"} {
		t.Run(mask, func(t *testing.T) {
			if bin == "" {
				t.Skip(node.NeedsRoot)
			}
			dir := t.TempDir()
			for _, name := range []string{"berth-shim", "berth-init"} {
				if err := os.Symlink(filepath.Join(bin, name), filepath.Join(dir, name)); err != nil {
					t.Fatal(err)
				}
			}
			text := fmt.Sprintf("#!/bin/sh\numask %s\nexec %s/berthd \"$@\"\n", mask, bin)
			if err := os.WriteFile(filepath.Join(dir, "berthd"), []byte(text), 0o755); err != nil {
				t.Fatal(err)
			}
			r := startNode(t, node.Options{Bin: dir})
			pod, cfg := r.pod("mask")
			id := r.launchAs(pod, cfg, "user", 1000, "cat /etc/hosts /etc/resolv.conf /etc/passwd >/dev/null && ls / >/dev/null && touch /dev/shm/x /tmp/y && umask && sleep 300")
			log := filepath.Join(cfg.LogDirectory, "user.log")
			r.until("line of the container", func() bool {
				b, err := os.ReadFile(log)
				return err == nil && len(b) > 0
			})
			if got := r.lines(log); !slices.Equal(got, []string{"0022"}) {
				t.Errorf("a container's user cannot work, or has another mask: %q", got)
			}
			if got := r.exec(id, "umask; touch /tmp/z && stat -c %a /tmp/z"); got != "0022\n644\n" {
				t.Errorf("an exec's mask and file: %q", got)
			}
			if fi, err := os.Stat(log); err != nil || fi.Mode().Perm()&0o022 != 0 || fi.Mode().Perm()&0o400 == 0 {
				t.Errorf("log: %v, %v; want it readable for root, writable for nobody else", fi.Mode(), err)
			}
			r.private()
		})
	}
}

// launchAs runs a shell script as a user.
func (r *rig) launchAs(pod string, podCfg *runtime.PodSandboxConfig, name string, uid int64, script string) string {
	r.Helper()
	cfg := node.ContainerConfig(name, refs[images.Busybox], "sh", "-c", script)
	cfg.Linux.SecurityContext.RunAsUser = &runtime.Int64Value{Value: uid}
	id, err := r.client.Launch(r.ctx, pod, cfg, podCfg)
	r.must(err)
	return id
}

// private checks the modes of the node's directories and of all its sockets.
func (r *rig) private() {
	r.Helper()
	mode := func(path string, want os.FileMode) {
		if fi, err := os.Lstat(path); err != nil || fi.Mode().Perm() != want {
			r.Errorf("%s: %v, %v; want %v", path, fi.Mode(), err, want)
		}
	}
	sockets := 0
	for _, dir := range []string{r.StateDir, r.RunDir} {
		mode(dir, 0o700)
		entries, err := os.ReadDir(dir)
		r.must(err)
		for _, e := range entries {
			if e.IsDir() {
				mode(filepath.Join(dir, e.Name()), 0o700)
			} else {
				mode(filepath.Join(dir, e.Name()), 0o600)
			}
		}
	}
	for _, path := range append(mustGlob(r.RunDir+"/*.sock"), mustGlob(r.RunDir+"/s/*")...) {
		sockets++
		mode(path, 0o600)
	}
	if sockets < 2 {
		r.Errorf("%d sockets: they are looked for in a wrong way", sockets)
	}
}

// TestModesAreMended: what somebody has opened while berthd was down is closed at
// its start, and what somebody else owns is refused by name.
func TestModesAreMended(t *testing.T) {
	t.Parallel()
	r := startNode(t, node.Options{})
	pod, cfg := r.pod("modes")
	r.launch(pod, cfg, "c", "sleep", "300")
	r.must(r.Kill())
	for _, path := range []string{r.StateDir, r.RunDir, r.StateDir + "/layers", r.StateDir + "/containers", r.RunDir + "/s", r.RunDir + "/c"} {
		r.must(os.Chmod(path, 0o777))
	}
	r.must(os.Chmod(r.StateDir+"/book.db", 0o666))
	r.must(r.Start(r.ctx))
	r.private()
	r.must(r.Kill())
	stolen := filepath.Join(r.RunDir, "s")
	r.must(os.Chown(stolen, 4242, 4242))
	if err := r.Start(r.ctx); err == nil || !strings.Contains(err.Error(), stolen) || !strings.Contains(err.Error(), "4242") {
		t.Errorf("a directory of somebody else: %v, want it refused by name and owner", err)
	}
	r.must(os.Chown(stolen, 0, 0))
	r.must(r.Start(r.ctx))
	r.private()
}

// TestDescriptors: no descriptor above 2 of berthd, its shims or the test gets
// into an OCI runtime, a container or an exec.
func TestDescriptors(t *testing.T) {
	t.Parallel()
	if bin == "" {
		t.Skip(node.NeedsRoot)
	}
	dir := t.TempDir()
	real, err := exec.LookPath("runc")
	if err != nil {
		t.Fatal(err)
	}
	list, wrapper := filepath.Join(dir, "list"), filepath.Join(dir, "runc")
	// A child gets what the shell was given, but not what the shell opens.
	text := fmt.Sprintf("#!/bin/sh\necho \"$*\" >%[1]s.$$\nls -l /proc/self/fd >>%[1]s.$$\nexec %[2]s \"$@\"\n", list, real)
	if err := os.WriteFile(wrapper, []byte(text), 0o755); err != nil {
		t.Fatal(err)
	}
	stray, err := unix.Open("/dev/null", unix.O_RDONLY, 0) // not close-on-exec: berthd inherits it
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(stray)
	r := startNode(t, node.Options{Runtimes: map[string]string{"runc": wrapper}})
	pod, cfg := r.pod("fds")
	id := r.launch(pod, cfg, "c", "sh", "-c", "ls /proc/self/fd | tr '\\n' ' '; echo; sleep 300")
	log := filepath.Join(cfg.LogDirectory, "c.log")
	r.until("line of the container", func() bool { b, err := os.ReadFile(log); return err == nil && len(b) > 0 })
	// The listing has one descriptor itself, for the directory.
	if got := r.lines(log); !slices.Equal(got, []string{"0 1 2 3 "}) {
		t.Errorf("descriptors of a container: %q", got)
	}
	if got := r.exec(id, "ls /proc/self/fd | tr '\\n' ' '"); got != "0 1 2 3 " {
		t.Errorf("descriptors of an exec: %q", got)
	}
	_, err = r.client.UpdateContainerResources(r.ctx, &runtime.UpdateContainerResourcesRequest{ContainerId: id,
		Linux: &runtime.LinuxContainerResources{MemoryLimitInBytes: newLimit}})
	r.must(err)
	r.must(r.client.Destroy(r.ctx, pod))
	verbs := map[string]bool{}
	for _, path := range mustGlob(list + ".*") {
		b, err := os.ReadFile(path)
		r.must(err)
		args, rest, _ := strings.Cut(string(b), "\n")
		for _, v := range []string{"create", "start", "update", "delete"} {
			if slices.Contains(strings.Fields(args), v) {
				verbs[v] = true
			}
		}
		for line := range strings.Lines(rest) {
			link, target, found := strings.Cut(strings.TrimSpace(line), " -> ")
			fd := link[strings.LastIndexByte(link, ' ')+1:]
			// The listing has its directory open.
			if found && !slices.Contains([]string{"0", "1", "2"}, fd) && !strings.HasPrefix(target, "/proc/") {
				t.Errorf("%s: the runtime has %s, which is %s", args, fd, target)
			}
		}
	}
	if len(verbs) != 4 {
		t.Errorf("verbs that were seen: %v", verbs)
	}
}
