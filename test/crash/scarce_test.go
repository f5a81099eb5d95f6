package crash

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berthd/berth/test/disk"
	"github.com/berthd/berth/test/images"
	"github.com/berthd/berth/test/node"
)

// onDisk lays out a node whose state, logs and addresses are on a small file
// system of their own, in MiB, with options of mkfs.ext4. It is not started yet.
func onDisk(t *testing.T, opts node.Options, size int64, mkfs ...string) (*rig, *disk.Disk) {
	t.Helper()
	r := newNode(t, opts)
	d, err := disk.New(r.Dir, "ext4", size<<20, mkfs...)
	if errors.Is(err, disk.ErrNone) {
		t.Skip(err)
	}
	r.must(err)
	r.Cleanup(func() {
		r.must(r.Kill())
		if err := d.Close(); err != nil {
			t.Errorf("disk: %v", err)
		}
	})
	r.move(d.Dir)
	return r, d
}

// move puts the state and the logs of a node that is laid out into another
// directory.
func (r *rig) move(dir string) {
	r.Helper()
	b, err := os.ReadFile(r.Config)
	r.must(err)
	state := filepath.Join(dir, "state")
	r.must(os.WriteFile(r.Config, []byte(strings.ReplaceAll(string(b), strconv.Quote(r.StateDir), strconv.Quote(state))), 0o600))
	r.StateDir, r.LogDir = state, filepath.Join(dir, "pods")
	r.must(errors.Join(os.Mkdir(r.StateDir, 0o700), os.Mkdir(r.LogDir, 0o755)))
}

// names checks that there is an error and that it tells what is missing.
func (r *rig) names(what string, err error, causes ...string) {
	r.Helper()
	if err == nil {
		r.Errorf("%s: no error", what)
		return
	}
	for _, c := range causes {
		if strings.Contains(err.Error(), c) {
			return
		}
	}
	r.Errorf("%s: the error does not tell %q: %v", what, causes, err)
}

// noSpace is what the kernel says when there are no blocks, and no inodes.
const noSpace = "no space left on device"

// TestFullDisk: nothing new can be made on a disk without a free byte, or without
// a free inode; the error says so, and nothing is left of the attempt. What runs goes on, is
// listed, executed in and ends with its own code; all of it can be removed, also by a
// berthd that was started on the full disk, and once there is room everything works
// as before, without a restart.
func TestFullDisk(t *testing.T) {
	t.Parallel()
	for name, fill := range map[string]func(*disk.Disk) error{"bytes": (*disk.Disk).Fill, "inodes": (*disk.Disk).FillInodes} {
		t.Run(name, func(t *testing.T) {
			r, d := onDisk(t, node.Options{}, 64, "-N", "2048")
			r.begin()
			pod, cfg := r.pod("full")
			stays := r.launch(pod, cfg, "stays", "sleep", "300")
			code := r.launch(pod, cfg, "code", "sh", "-c", "while [ ! -e /dev/shm/go ]; do sleep 0.05; done; exit 5")
			r.must(fill(d))

			_, err := r.client.Pull(r.ctx, refs[images.Layers])
			r.names("pull", err, noSpace)
			_, err = r.client.CreateContainer(r.ctx, &runtime.CreateContainerRequest{PodSandboxId: pod,
				Config: node.ContainerConfig("new", refs[images.Busybox], "true"), SandboxConfig: cfg})
			r.names("create", err, noSpace)
			if got := r.exec(stays, "touch /dev/shm/go; echo alive"); got != "alive\n" {
				t.Errorf("exec: %q", got)
			}
			if st, err := r.client.WaitExited(r.ctx, code); err != nil || st.ExitCode != 5 {
				t.Errorf("a container that ended on a full disk: %v, %v; want code 5", st, err)
			}
			r.reads(stays)
			r.must(r.Restart(r.ctx))
			if st := r.state(code); st.State != exited || st.ExitCode != 5 {
				t.Errorf("after a restart on the full disk: %v, code %d; want 5", st.State, st.ExitCode)
			}
			if st := r.state(stays); st.State != running {
				t.Errorf("after a restart on the full disk: %v", st.State)
			}
			// To remove is what makes room.
			_, err = r.client.StopContainer(r.ctx, &runtime.StopContainerRequest{ContainerId: stays})
			r.must(err)
			_, err = r.client.RemoveContainer(r.ctx, &runtime.RemoveContainerRequest{ContainerId: stays})
			r.must(err)
			r.must(r.client.Destroy(r.ctx, pod))
			_, err = r.client.Images.RemoveImage(r.ctx, &runtime.RemoveImageRequest{Image: &runtime.ImageSpec{Image: refs[images.Busybox]}})
			r.must(err)
			r.must(d.Free())
			pid := r.Pid()
			_, err = r.client.Pull(r.ctx, refs[images.Busybox])
			r.must(err)
			r.works("room")
			if r.Pid() != pid {
				t.Error("berthd was started anew")
			}
			r.forgiveLayers()
		})
	}
}

// forgiveLayers takes the layers as they are now out of the check: an image that was
// pulled anew has others.
func (r *rig) forgiveLayers() {
	r.Helper()
	now, err := r.Marks()
	r.must(err)
	for k := range now {
		if strings.HasPrefix(k, "file: "+filepath.Join(r.StateDir, "layers")) || strings.HasPrefix(k, "file: "+filepath.Join(r.StateDir, "manifests")) {
			r.before[k] = true
		}
	}
}

// TestBrokenDisk: a disk that gives nothing but errors, or that the kernel has made
// read-only after one, ends neither berthd nor what runs. Errors name the cause. With the
// disk mended, a new berthd finds everything as it is.
func TestBrokenDisk(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		broken func(*disk.Disk) error
		cause  string
	}{
		"errors":    {(*disk.Disk).Cut, "input/output error"},
		"read-only": {(*disk.Disk).Fail, "read-only file system"},
	} {
		t.Run(name, func(t *testing.T) {
			r, d := onDisk(t, node.Options{}, 64, "-e", "remount-ro")
			r.begin()
			pod, cfg := r.pod("broken")
			id := r.launch(pod, cfg, "c", "sh", "-c", "while [ ! -e /dev/shm/go ]; do sleep 0.05; done; exit 6")
			stays := r.launch(pod, cfg, "stays", "sleep", "300")
			if err := tc.broken(d); errors.Is(err, disk.ErrNone) {
				t.Skip(err)
			} else {
				r.must(err)
			}
			_, err := r.client.Run(r.ctx, r.podConfigOnly("late"))
			r.names("run", err, tc.cause, "input/output error")
			_, err = r.client.CreateContainer(r.ctx, &runtime.CreateContainerRequest{PodSandboxId: pod,
				Config: node.ContainerConfig("new", refs[images.Busybox], "true"), SandboxConfig: cfg})
			r.names("create", err, tc.cause, "input/output error")
			_, err = r.client.Pull(r.ctx, refs[images.Layers])
			r.names("pull", err, tc.cause, "input/output error")
			r.reads(stays)
			if p := r.Pid(); p == 0 || r.Ended() {
				t.Fatal("berthd has ended")
			}
			r.must(os.WriteFile(filepath.Join(r.RunDir, "pods", pod, "shm", "go"), nil, 0o600))
			// Neither the shim nor berthd can write down how it ended.
			r.until("end of the process", func() bool { return len(r.processes(id)) == 0 })
			r.must(r.Kill())
			r.must(d.Restore())
			r.must(r.Start(r.ctx))
			_, err = r.client.WaitExited(r.ctx, id)
			r.must(err)
			if st := r.state(stays); st.State != running {
				t.Errorf("with the disk mended: %v", st.State)
			}
			if st := r.state(id); st.State != exited || st.ExitCode != 6 {
				t.Errorf("with the disk mended: %v with code %d", st.State, st.ExitCode)
			}
			r.works("mended")
		})
	}
}

// podConfigOnly is podConfig without a directory for logs.
func (r *rig) podConfigOnly(name string) *runtime.PodSandboxConfig {
	cfg := node.PodConfig(name, r.LogDir, r.Parent)
	cfg.LogDirectory = ""
	return cfg
}

// TestNoDescriptors: a berthd that may not open another file says so, answers what
// needs none, and works on when it may.
func TestNoDescriptors(t *testing.T) {
	t.Parallel()
	r := startNode(t, node.Options{})
	pod, cfg := r.pod("files")
	id := r.launch(pod, cfg, "c", "sleep", "300")
	var was unix.Rlimit
	r.must(unix.Prlimit(r.Pid(), unix.RLIMIT_NOFILE, nil, &was))
	r.must(unix.Prlimit(r.Pid(), unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 3, Max: was.Max}, nil))
	const cause = "too many open files"
	_, err := r.client.Run(r.ctx, r.podConfig("late"))
	r.names("run", err, cause)
	_, err = r.client.CreateContainer(r.ctx, &runtime.CreateContainerRequest{PodSandboxId: pod,
		Config: node.ContainerConfig("new", refs[images.Busybox], "true"), SandboxConfig: cfg})
	r.names("create", err, cause)
	_, err = r.client.Pull(r.ctx, refs[images.Layers])
	r.names("pull", err, cause)
	_, err = r.client.ListPodSandbox(r.ctx, &runtime.ListPodSandboxRequest{})
	r.must(err)
	if st := r.state(id); st.State != running {
		t.Errorf("container is %v", st.State)
	}
	// One that wants to connect waits.
	second, err := node.Dial(r.Socket, nil)
	r.must(err)
	defer second.Close()
	version := call(func() error {
		_, err := second.Version(r.ctx, &runtime.VersionRequest{})
		return err
	})
	time.Sleep(100 * time.Millisecond)
	r.must(unix.Prlimit(r.Pid(), unix.RLIMIT_NOFILE, &was, nil))
	r.must(<-version)
	r.works("enough")
	_, err = r.client.Pull(r.ctx, refs[images.Layers])
	r.must(err)
	_, err = r.client.Images.RemoveImage(r.ctx, &runtime.RemoveImageRequest{Image: &runtime.ImageSpec{Image: refs[images.Layers]}})
	r.must(err)
	if st := r.state(id); st.State != running {
		t.Errorf("container is %v", st.State)
	}
}

// setPidsLimit bounds the processes and threads of a cgroup; "max" is none.
func (r *rig) setPidsLimit(dir, limit string) {
	r.Helper()
	err := os.WriteFile(filepath.Join(dir, "pids.max"), []byte(limit), 0)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) {
		r.Skipf("no limit of processes can be set here: %v", err)
	}
	r.must(err)
}

// TestPidsLimitOfPod: in a pod that has all the processes that it may have, no
// container can be made, and the answer says why; nothing is left of it. The others
// go on and can be stopped.
func TestPidsLimitOfPod(t *testing.T) {
	t.Parallel()
	r := startNode(t, node.Options{})
	pod, cfg := r.pod("crowded")
	id := r.launch(pod, cfg, "c", "sleep", "300")
	dir, err := node.FindCgroup("pids", id)
	if errors.Is(err, os.ErrNotExist) {
		t.Skipf("no cgroups that count processes: %v", err)
	}
	r.must(err)
	before, err := r.Marks()
	r.must(err)
	dir = filepath.Dir(dir)
	r.setPidsLimit(dir, "1")
	new := node.ContainerConfig("new", refs[images.Busybox], "sleep", "300")
	_, err = r.client.CreateContainer(r.ctx, &runtime.CreateContainerRequest{PodSandboxId: pod, Config: new, SandboxConfig: cfg})
	r.names("create", err, "of at most 1 processes")
	left, err := r.Settle(r.ctx, before, 20*time.Second)
	r.must(err)
	for _, l := range left {
		t.Errorf("left of a container that could not be made: %s", l)
	}
	if st := r.state(id); st.State != running {
		t.Errorf("container is %v", st.State)
	}
	r.setPidsLimit(dir, "max")
	_, err = r.client.Launch(r.ctx, pod, new, cfg)
	r.must(err)
	r.setPidsLimit(dir, "1")
	_, err = r.client.StopContainer(r.ctx, &runtime.StopContainerRequest{ContainerId: id})
	r.must(err)
}

// TestNoProcesses: a berthd that may not start another process or thread, with all
// that it starts, says so or is ended by Go, which cannot do without a thread. What runs is untouched, nothing
// is left of what was begun, and all works as before when processes can be had.
func TestNoProcesses(t *testing.T) {
	t.Parallel()
	r := startNode(t, node.Options{})
	pod, cfg := r.pod("processes")
	id := r.launch(pod, cfg, "c", "sleep", "300")
	group := r.pidsGroup()
	r.must(os.WriteFile(filepath.Join(group, "cgroup.procs"), []byte(strconv.Itoa(r.Pid())), 0))
	count, err := os.ReadFile(filepath.Join(group, "pids.current"))
	r.must(err)
	r.setPidsLimit(group, strings.TrimSpace(string(count)))
	_, err = r.client.Run(r.ctx, r.podConfig("late"))
	if r.survives() {
		r.names("run", err, "resource temporarily unavailable", "OS thread", "bridge", "connection")
	} else {
		t.Log("Go could not do without another thread: berthd has ended")
	}
	r.setPidsLimit(group, "max")
	r.survives() // or has ended since
	r.revive()
	if st := r.state(id); st.State != running {
		t.Errorf("container is %v", st.State)
	}
	r.works("enough")
}

// survives waits until berthd answers or has ended, and tells which it is.
func (r *rig) survives() bool {
	r.Helper()
	r.until("answer or end of berthd", func() bool {
		if r.Ended() {
			return true
		}
		ctx, cancel := context.WithTimeout(r.ctx, 10*time.Second)
		defer cancel()
		_, err := r.client.Version(ctx, &runtime.VersionRequest{})
		return err == nil
	})
	return !r.Ended()
}

// pidsGroup makes a cgroup of the test's own that counts processes, for berthd
// alone.
func (r *rig) pidsGroup() string {
	r.Helper()
	root := node.Hierarchy("pids")
	dir := filepath.Join(root, r.Name+"-berthd")
	if err := os.Mkdir(dir, 0o755); err != nil {
		r.Skipf("no cgroup that counts processes: %v", err)
	}
	if _, err := os.Stat(filepath.Join(dir, "pids.max")); err != nil {
		r.must(unix.Rmdir(dir))
		r.Skipf("cgroups do not count processes here: %v", err)
	}
	r.Cleanup(func() {
		// berthd, and what it has started since.
		r.until("end of the cgroup", func() bool {
			text, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
			r.must(err)
			for _, pid := range strings.Fields(string(text)) {
				_ = os.WriteFile(filepath.Join(root, "cgroup.procs"), []byte(pid), 0) // it may have ended
			}
			return unix.Rmdir(dir) == nil
		})
	})
	return dir
}
