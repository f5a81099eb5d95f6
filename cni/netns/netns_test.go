package netns

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: namespaces and mounts")
	}
}

// mustPins is a directory of pins on a private mount of the test's own.
func mustPins(t *testing.T) *Pins {
	t.Helper()
	needRoot(t)
	root := t.TempDir()
	if err := PrivateMount(root); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(root, unix.MNT_DETACH); err != nil {
			t.Errorf("unmount %s: %v", root, err)
		}
	})
	p, err := NewPins(filepath.Join(root, "ns"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ids, err := p.List()
		if err != nil {
			t.Error(err)
		}
		for _, id := range ids {
			if err := p.Destroy(id); err != nil {
				t.Error(err)
			}
		}
	})
	return p
}

func mustRead(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(b))
}

func mustInode(t *testing.T, path string) uint64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	return st.Ino
}

// strayThreads are this process's threads that are outside the namespaces of the
// first one.
func strayThreads(t *testing.T) []string {
	t.Helper()
	var stray []string
	tasks, err := os.ReadDir("/proc/self/task")
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range []Kind{Net, IPC, UTS} {
		want := mustInode(t, "/proc/self/ns/"+string(k))
		for _, task := range tasks {
			var st unix.Stat_t
			path := fmt.Sprintf("/proc/self/task/%s/ns/%s", task.Name(), k)
			if unix.Stat(path, &st) == nil && st.Ino != want {
				stray = append(stray, path)
			}
		}
	}
	return stray
}

// eventually waits for what the kernel does in its own time.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("after 10 s still not: %s", what)
		}
	}
}

func TestCreate(t *testing.T) {
	p := mustPins(t)
	const (
		portStart = "/proc/sys/net/ipv4/ip_unprivileged_port_start"
		shmForced = "/proc/sys/kernel/shm_rmid_forced"
	)
	hostName, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	host := []string{mustRead(t, portStart), mustRead(t, shmForced)}
	forced := "1"
	if host[1] == "1" {
		forced = "0"
	}

	kinds := []Kind{Net, IPC, UTS}
	err = p.Create(t.Context(), "pod-1", kinds, func() error {
		return errors.Join(
			unix.Sethostname([]byte("inside")),
			os.WriteFile(portStart, []byte("79"), 0),
			os.WriteFile(shmForced, []byte(forced), 0),
			LoopbackUp(),
		)
	})
	if err != nil {
		t.Fatal(err)
	}

	inside := func(k Kind, fn func() (string, error)) string {
		t.Helper()
		var got string
		err := p.Do("pod-1", k, func() (err error) {
			got, err = fn()
			return err
		})
		if err != nil {
			t.Fatalf("%s: %v", k, err)
		}
		return strings.TrimSpace(got)
	}
	read := func(path string) func() (string, error) {
		return func() (string, error) {
			b, err := os.ReadFile(path)
			return string(b), err
		}
	}
	if got := inside(UTS, os.Hostname); got != "inside" {
		t.Errorf("host name inside: got %q", got)
	}
	if got := inside(Net, read(portStart)); got != "79" {
		t.Errorf("%s inside: got %q", portStart, got)
	}
	if got := inside(IPC, read(shmForced)); got != forced {
		t.Errorf("%s inside: got %q, want %q", shmForced, got, forced)
	}
	if got := inside(Net, dialLoopback); got != "hello" {
		t.Errorf("over the loopback inside: got %q", got)
	}

	if got, err := os.Hostname(); err != nil || got != hostName {
		t.Errorf("host name of the host: got %q, %v, want %q", got, err, hostName)
	}
	if got := []string{mustRead(t, portStart), mustRead(t, shmForced)}; !slices.Equal(got, host) {
		t.Errorf("sysctls of the host: got %v, want %v", got, host)
	}
	for _, k := range kinds {
		if !p.Pinned("pod-1", k) {
			t.Errorf("%s: not pinned", k)
		}
		if mustInode(t, p.Path("pod-1", k)) == mustInode(t, "/proc/self/ns/"+string(k)) {
			t.Errorf("%s: the pin is the host's namespace", k)
		}
	}
	if err := p.Create(t.Context(), "pod-1", kinds, nil); !errors.Is(err, ErrExists) {
		t.Errorf("second Create: got %v, want ErrExists", err)
	}
	if !p.Pinned("pod-1", Net) {
		t.Error("the second Create removed the first one's pin")
	}
}

// dialLoopback sends a word to itself over TCP in the current network namespace.
// net.Listen and net.Dial by address stay on the calling thread.
func dialLoopback() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer l.Close()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		return "", err
	}
	defer c.Close()
	s, err := l.Accept()
	if err != nil {
		return "", err
	}
	defer s.Close()
	if _, err := c.Write([]byte("hello")); err != nil {
		return "", err
	}
	buf := make([]byte, 5)
	n, err := s.Read(buf)
	return string(buf[:n]), err
}

func TestCreateOnlyWhatIsAsked(t *testing.T) {
	p := mustPins(t)
	if err := p.Create(t.Context(), "a", []Kind{UTS}, nil); err != nil {
		t.Fatal(err)
	}
	if !p.Pinned("a", UTS) || p.Pinned("a", Net) {
		t.Error("want a UTS namespace and no network namespace")
	}
	if err := p.Do("a", Net, func() error { return nil }); !errors.Is(err, ErrNotPinned) {
		t.Errorf("Do: got %v, want ErrNotPinned", err)
	}
	want := errors.New("fn's own")
	if err := p.Do("a", UTS, func() error { return want }); err != want {
		t.Errorf("Do: got %v, want the function's error as it is", err)
	}
}

func TestCreateUndone(t *testing.T) {
	p := mustPins(t)
	cause := errors.New("no such sysctl")
	ctx, cancel := context.WithCancel(t.Context())
	tests := []struct {
		name  string
		setup func() error
		want  error
	}{
		{"setup fails", func() error { return cause }, cause},
		{"caller gives up during setup", func() error { cancel(); return nil }, context.Canceled},
		{"caller gave up before", func() error { panic("must not run") }, context.Canceled},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			err := p.Create(ctx, "x", []Kind{Net, IPC, UTS}, tt.setup)
			if !errors.Is(err, tt.want) {
				t.Errorf("got %v, want %v", err, tt.want)
			}
			if ids, err := p.List(); err != nil || len(ids) != 0 {
				t.Errorf("left behind: %v, %v", ids, err)
			}
		})
	}
	eventually(t, "threads back on the host", func() bool { return len(strayThreads(t)) == 0 })
}

func TestBadArguments(t *testing.T) {
	dir := t.TempDir()
	p, err := NewPins(filepath.Join(dir, "ns"))
	if err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(filepath.Join(dir, "ns")); err != nil || st.Mode().Perm() != 0o700 {
		t.Errorf("pin directory: %v, %v", st.Mode(), err)
	}
	for _, id := range []string{"", ".", "..", "a/b", "../x", "a\x00", strings.Repeat("x", 256)} {
		if err := p.Create(t.Context(), id, []Kind{Net}, nil); !errors.Is(err, ErrID) {
			t.Errorf("Create %q: got %v, want ErrID", id, err)
		}
		if err := p.Destroy(id); !errors.Is(err, ErrID) {
			t.Errorf("Destroy %q: got %v, want ErrID", id, err)
		}
		if p.Pinned(id, Net) {
			t.Errorf("Pinned %q", id)
		}
	}
	for _, kinds := range [][]Kind{nil, {"mnt"}, {Net, Net}, {""}} {
		if err := p.Create(t.Context(), "a", kinds, nil); !errors.Is(err, ErrKind) {
			t.Errorf("Create %q: got %v, want ErrKind", kinds, err)
		}
	}
	if err := p.Do("a", "user", nil); !errors.Is(err, ErrKind) {
		t.Errorf("Do: got %v, want ErrKind", err)
	}
	if ids, err := p.List(); err != nil || len(ids) != 0 {
		t.Errorf("List: %v, %v", ids, err)
	}
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := NewPins(file); err == nil {
		t.Error("NewPins on a file: no error")
	}
}

func TestDestroy(t *testing.T) {
	p := mustPins(t)
	for _, id := range []string{"b", "a"} {
		if err := p.Create(t.Context(), id, []Kind{Net, IPC}, nil); err != nil {
			t.Fatal(err)
		}
	}
	// What a crash in the middle of Create, or a reboot on a disk, leaves.
	half := filepath.Join(p.dir, "half")
	if err := os.Mkdir(half, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(half, "net"), nil, 0o400); err != nil {
		t.Fatal(err)
	}
	if p.Pinned("half", Net) {
		t.Error("a plain file counts as a pin")
	}
	if err := p.Do("half", Net, func() error { return nil }); !errors.Is(err, ErrNotPinned) {
		t.Errorf("Do on a plain file: got %v, want ErrNotPinned", err)
	}
	// And a pin mounted twice on one path.
	if err := unix.Mount(p.Path("b", Net), p.Path("b", Net), "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}

	got, err := p.List()
	if want := []string{"a", "b", "half"}; err != nil || !slices.Equal(got, want) {
		t.Errorf("List: got %v, %v, want %v", got, err, want)
	}
	for _, id := range []string{"a", "b", "half", "a", "never"} {
		if err := p.Destroy(id); err != nil {
			t.Errorf("Destroy %s: %v", id, err)
		}
	}
	if got, err := p.List(); err != nil || len(got) != 0 {
		t.Errorf("List afterwards: %v, %v", got, err)
	}
	if m := mountsBelow(t, "self", p.dir); len(m) != 0 {
		t.Errorf("mounts afterwards: %v", m)
	}
	if err := p.Create(t.Context(), "a", []Kind{Net}, nil); err != nil {
		t.Errorf("Create after Destroy: %v", err)
	}
}

// mountsBelow are the mount points below dir that the process sees.
func mountsBelow(t *testing.T, pid, dir string) []string {
	t.Helper()
	var found []string
	for line := range strings.Lines(mustRead(t, "/proc/"+pid+"/mountinfo")) {
		if f := strings.Fields(line); strings.HasPrefix(f[4], dir+"/") {
			found = append(found, f[4])
		}
	}
	return found
}

// otherNamespace starts a process in a mount namespace of its own, a peer of
// this one as far as propagation allows, and returns its process ID.
func otherNamespace(t *testing.T) string {
	t.Helper()
	// No Pdeathsig: it would come with the end of the thread that started it, which may be
	// one that somebody threw away.
	cmd := exec.Command("sleep", "100")
	cmd.SysProcAttr = &unix.SysProcAttr{Unshareflags: unix.CLONE_NEWNS}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	return fmt.Sprint(cmd.Process.Pid)
}

func TestPrivateMount(t *testing.T) {
	needRoot(t)
	// A shared mount, as systemd makes every mount of the host.
	outer := t.TempDir()
	if err := unix.Mount("tmpfs", outer, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC|unix.MS_NOSYMFOLLOW, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(outer, unix.MNT_DETACH) })
	if err := unix.Mount("", outer, "", unix.MS_SHARED, ""); err != nil {
		t.Fatal(err)
	}
	root := filepath.Join(outer, "berth")
	if err := os.Mkdir(root, 0o700); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if err := PrivateMount(root); err != nil {
			t.Fatal(err)
		}
	}
	var mounts int
	noSymFollow := false // Linux 5.10
	for line := range strings.Lines(mustRead(t, "/proc/self/mountinfo")) {
		f := strings.Fields(line)
		if f[4] == outer && !strings.Contains(f[5], "noexec") {
			t.Errorf("the mount above has lost its flags: %s", line)
		}
		noSymFollow = noSymFollow || f[4] == outer && strings.Contains(f[5], "nosymfollow")
		if f[4] == root {
			mounts++
			if noSymFollow && !strings.Contains(f[5], "nosymfollow") {
				t.Errorf("flags %s, want nosymfollow as above", f[5])
			}
			if o := "," + f[5] + ","; strings.Contains(o, ",noexec,") || !strings.Contains(o, ",nosuid,") || !strings.Contains(o, ",nodev,") {
				t.Errorf("flags %s, want nosuid and nodev as above, and no noexec", f[5])
			}
			if strings.Contains(line, "shared:") || strings.Contains(line, "master:") {
				t.Errorf("not private: %s", line)
			}
		}
	}
	if mounts != 1 {
		t.Errorf("mounts on %s after three calls: %d, want 1", root, mounts)
	}

	script := filepath.Join(root, "run")
	if err := os.WriteFile(script, []byte("#!/bin/sh\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(script).CombinedOutput(); err != nil {
		t.Errorf("a program below it: %v: %s", err, out)
	}

	p, err := NewPins(filepath.Join(root, "ns"))
	if err != nil {
		t.Fatal(err)
	}
	before := otherNamespace(t)
	if err := p.Create(t.Context(), "a", []Kind{Net}, nil); err != nil {
		t.Fatal(err)
	}
	if m := mountsBelow(t, before, p.dir); len(m) != 0 {
		t.Errorf("propagated to another namespace: %v", m)
	}
	// A namespace cloned now has copies; removing the pin has to take them along.
	after := otherNamespace(t)
	if m := mountsBelow(t, after, p.dir); len(m) != 1 {
		t.Fatalf("pins in a cloned namespace: %v, want 1", m)
	}
	if err := p.Destroy("a"); err != nil {
		t.Fatal(err)
	}
	if m := mountsBelow(t, after, p.dir); len(m) != 0 {
		t.Errorf("still pinned in another namespace: %v", m)
	}
	if err := PrivateMount(filepath.Join(outer, "absent")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("absent directory: got %v", err)
	}
}

// TestPrivateMountLocked: in a user namespace the flags of the mounts that come from
// outside are locked.
func TestPrivateMountLocked(t *testing.T) {
	if dir := os.Getenv("NETNS_TEST_LOCKED"); dir != "" {
		if err := PrivateMount(dir); !errors.Is(err, ErrNoexec) || !errors.Is(err, unix.EPERM) {
			t.Errorf("got %v, want %v", err, ErrNoexec)
		}
		if o := mustRead(t, "/proc/self/mountinfo"); !strings.Contains(o, " "+dir+" ") {
			t.Errorf("%s is no mount:\n%s", dir, o)
		}
		return
	}
	needRoot(t)
	outer := t.TempDir()
	if err := unix.Mount("tmpfs", outer, "tmpfs", unix.MS_NOEXEC, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(outer, unix.MNT_DETACH) })
	root := filepath.Join(outer, "berth")
	if err := os.Mkdir(root, 0o700); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe", "-test.run=^TestPrivateMountLocked$", "-test.count=1")
	cmd.Env = append(os.Environ(), "NETNS_TEST_LOCKED="+root)
	all := []syscall.SysProcIDMap{{ContainerID: 0, HostID: 0, Size: 1}}
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWUSER | unix.CLONE_NEWNS, UidMappings: all, GidMappings: all}
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Skipf("no user namespaces: %v", err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("%v: %s", err, out.String())
	}
}

func TestNothingLeaks(t *testing.T) {
	p := mustPins(t)
	cycle := func() {
		t.Helper()
		err := p.Create(t.Context(), "a", []Kind{Net, IPC, UTS}, LoopbackUp)
		if err == nil {
			err = p.Do("a", Net, func() error { return nil })
		}
		if err := errors.Join(err, p.Destroy("a")); err != nil {
			t.Fatal(err)
		}
	}
	count := func(dir string) int {
		entries, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		return len(entries)
	}
	cycle()
	fds, threads := count("/proc/self/fd"), count("/proc/self/task")
	for range 50 {
		cycle()
	}
	if got := count("/proc/self/fd"); got > fds {
		t.Errorf("file descriptors: %d, before %d", got, fds)
	}
	// The runtime keeps a few idle threads of its own; 100 were used up here.
	eventually(t, "threads gone", func() bool { return count("/proc/self/task") <= threads+8 })
	eventually(t, "threads back on the host", func() bool { return len(strayThreads(t)) == 0 })
}

func TestConcurrent(t *testing.T) {
	p := mustPins(t)
	errs := make(chan error)
	const n = 16
	for i := range n {
		go func() {
			id, name := fmt.Sprintf("pod-%d", i), fmt.Sprintf("host-%d", i)
			err := p.Create(t.Context(), id, []Kind{UTS}, func() error { return unix.Sethostname([]byte(name)) })
			if err == nil {
				err = p.Do(id, UTS, func() error {
					if got, err := os.Hostname(); err != nil || got != name {
						return fmt.Errorf("host name of %s: %q, %v", id, got, err)
					}
					return nil
				})
			}
			errs <- errors.Join(err, p.Destroy(id))
		}()
	}
	for range n {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
}

// The function given to Create or Do may end its goroutine, as t.FailNow does.
func TestGoexit(t *testing.T) {
	p := mustPins(t)
	err := p.Create(t.Context(), "a", []Kind{UTS}, func() error {
		(&testing.T{}).SkipNow()
		return nil
	})
	if !errors.Is(err, errAborted) {
		t.Errorf("got %v, want %v", err, errAborted)
	}
	if ids, err := p.List(); err != nil || len(ids) != 0 {
		t.Errorf("left behind: %v, %v", ids, err)
	}
}
