package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// logBuffer is a log that can be read while it is written.
type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// TestDaemon runs the whole daemon in this process, without pods: it starts
// with an unusable OCI runtime and no network, says so, serves, reloads, and
// ends on SIGTERM.
func TestDaemon(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes a mount and namespaces")
	}
	run := fmt.Sprintf("/run/berthd-test-%d", os.Getpid())
	t.Cleanup(func() {
		_ = unix.Unmount(run, unix.MNT_DETACH)
		_ = os.RemoveAll(run)
	})
	src := mustWrite(t, map[string]string{"bin/berth-shim": "", "bin/berth-init": "not started here", "cni/net.d/.keep": ""})
	dir := filepath.Dir(src.file)
	for _, name := range []string{"berth-shim", "berth-init"} {
		if err := os.Chmod(filepath.Join(dir, "bin", name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	body := fmt.Sprintf(`
state_dir = %[1]q
run_dir = %[2]q
shim_path = %[3]q
init_path = %[4]q
cni_conf_dir = %[5]q
cni_fallback_subnet = ""
cgroup_driver = "cgroupfs"
oom_score_adj = 0
metrics_listen = "unix:%[2]s/metrics.sock"
[runtimes.runc]
path = "/no/such/runc"
`, filepath.Join(dir, "state"), run, filepath.Join(dir, "bin", "berth-shim"), filepath.Join(dir, "bin", "berth-init"), filepath.Join(dir, "cni", "net.d"))
	if err := os.WriteFile(src.file, []byte(body), 0o600); err != nil {
		t.Fatal(err)
	}
	m := mustManager(t, filepath.Join(dir, "notify"))
	log := new(logBuffer)
	ended := make(chan error, 1)
	go func() { ended <- serve(src, log) }()

	expect := func(prefix string, descriptors int) {
		t.Helper()
		if got, fds := m.mustRead(t); !strings.HasPrefix(got, prefix) || fds != descriptors {
			t.Fatalf("the manager got %q with %d descriptors, want %q with %d\n%s", got, fds, prefix, descriptors, log)
		}
	}
	expect("STATUS=Starting", 0)
	expect("FDSTOREREMOVE=1", 0)
	expect("FDSTORE=1", 1)
	expect("READY=1\nSTATUS=Serving on "+run+"/berth.sock", 0)

	for path, want := range map[string]os.FileMode{
		filepath.Join(dir, "state"): os.ModeDir | 0o700,
		run:                         os.ModeDir | 0o700,
		run + "/berth.sock":         os.ModeSocket | 0o600,
		run + "/metrics.sock":       os.ModeSocket | 0o600,
	} {
		if st, err := os.Lstat(path); err != nil || st.Mode() != want {
			t.Errorf("%s: %v, %v, want %v", path, st, err, want)
		}
	}
	checkServing(t, run+"/berth.sock")

	if err := syscall.Kill(os.Getpid(), syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	expect("RELOADING=1\nMONOTONIC_USEC=", 0)
	expect("READY=1", 0)

	if err := syscall.Kill(os.Getpid(), syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	expect("STOPPING=1", 0)
	select {
	case err := <-ended:
		if err != nil {
			t.Errorf("ended with %v\n%s", err, log)
		}
	case <-time.After(20 * time.Second):
		t.Fatalf("did not end on SIGTERM\n%s\n%s", log, stacks())
	}
	if _, err := os.Lstat(run + "/berth.sock"); err != nil {
		t.Errorf("the socket that the manager keeps is gone: %v", err)
	}
}

// checkServing asks a daemon without a runtime and a network about itself.
func checkServing(t *testing.T, socket string) {
	t.Helper()
	conn, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	client := runtime.NewRuntimeServiceClient(conn)
	st, err := client.Status(t.Context(), &runtime.StatusRequest{Verbose: true})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range st.GetStatus().GetConditions() {
		if c.GetStatus() || c.GetReason() == "" || c.GetMessage() == "" {
			t.Errorf("condition %v, want false with a reason", c)
		}
		if c.GetType() == runtime.RuntimeReady && !strings.Contains(c.GetMessage(), "/no/such/runc") {
			t.Errorf("%q does not name the runtime", c.GetMessage())
		}
	}
	if !strings.Contains(st.GetInfo()["config"], `"run_dir":"`+filepath.Dir(socket)+`"`) {
		t.Errorf("config in info: %s", st.GetInfo()["config"])
	}
	if l, err := client.ListPodSandbox(t.Context(), &runtime.ListPodSandboxRequest{}); err != nil || len(l.GetItems()) != 0 {
		t.Errorf("pods: %v, %v", l, err)
	}
}
