package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"
	"k8s.io/klog/v2/textlogger"
)

// manager is a service manager's notify socket.
type manager struct {
	conn *net.UnixConn
}

func mustManager(t *testing.T, address string) *manager {
	t.Helper()
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: address, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	t.Setenv("NOTIFY_SOCKET", address)
	return &manager{c}
}

// mustRead is the next message and the number of descriptors that came with
// it, which are closed.
func (m *manager) mustRead(t *testing.T) (string, int) {
	t.Helper()
	b, oob := make([]byte, 4096), make([]byte, 256)
	_ = m.conn.SetReadDeadline(time.Now().Add(5 * time.Second))
	n, on, _, _, err := m.conn.ReadMsgUnix(b, oob)
	if err != nil {
		t.Fatal(err)
	}
	fds := 0
	if msgs, err := unix.ParseSocketControlMessage(oob[:on]); err == nil {
		for _, c := range msgs {
			if got, err := unix.ParseUnixRights(&c); err == nil {
				for _, fd := range got {
					fds++
					_ = unix.Close(fd)
				}
			}
		}
	}
	return string(b[:n]), fds
}

func TestNotify(t *testing.T) {
	for name, address := range map[string]string{
		"path":     filepath.Join(t.TempDir(), "notify"),
		"abstract": "@berth-test-" + strconv.Itoa(os.Getpid()),
	} {
		t.Run(name, func(t *testing.T) {
			m := mustManager(t, address)
			n, err := newNotifier()
			if err != nil {
				t.Fatal(err)
			}
			if _, ok := os.LookupEnv("NOTIFY_SOCKET"); ok {
				t.Error("children would see NOTIFY_SOCKET")
			}
			n.ready("Serving")
			if got, _ := m.mustRead(t); got != "READY=1\nSTATUS=Serving" {
				t.Errorf("ready: %q", got)
			}
			n.stopping()
			if got, _ := m.mustRead(t); !strings.HasPrefix(got, "STOPPING=1\n") {
				t.Errorf("stopping: %q", got)
			}
			n.reloading()
			got, _ := m.mustRead(t)
			usec, ok := strings.CutPrefix(got, "RELOADING=1\nMONOTONIC_USEC=")
			if v, err := strconv.ParseInt(usec, 10, 64); !ok || err != nil || v <= 0 {
				t.Errorf("reloading: %q", got)
			}
		})
	}
}

func TestNotifyNobody(t *testing.T) {
	t.Setenv("NOTIFY_SOCKET", "")
	n, err := newNotifier()
	if err != nil {
		t.Fatal(err)
	}
	n.ready("x") // has nobody to tell, and must not mind
	if n.store("x", nil) {
		t.Error("stored with nobody")
	}
	t.Setenv("NOTIFY_SOCKET", "vsock:2:1")
	if _, err := newNotifier(); err == nil || !strings.Contains(err.Error(), "vsock:2:1") {
		t.Errorf("a bad address: %v", err)
	}
}

func TestWatchdogInterval(t *testing.T) {
	for _, tc := range []struct {
		pid, usec string
		want      time.Duration
	}{
		{"", "", 0},
		{"", "60000000", 30 * time.Second},
		{strconv.Itoa(os.Getpid()), "2000000", time.Second},
		{"1", "2000000", 0},
		{"", "soon", 0},
	} {
		t.Setenv("WATCHDOG_PID", tc.pid)
		t.Setenv("WATCHDOG_USEC", tc.usec)
		if got := watchdogInterval(); got != tc.want {
			t.Errorf("pid %q, usec %q: %v, want %v", tc.pid, tc.usec, got, tc.want)
		}
		if os.Getenv("WATCHDOG_USEC") != "" {
			t.Error("children would see WATCHDOG_USEC")
		}
	}
}

// The watchdog is fed as long as the daemon answers, and not when it hangs.
func TestWatchdog(t *testing.T) {
	m := mustManager(t, filepath.Join(t.TempDir(), "notify"))
	n, err := newNotifier()
	if err != nil {
		t.Fatal(err)
	}
	d := &daemon{manager: n}
	hang := make(chan struct{})
	stop := background(t.Context(), "watchdog", func(ctx context.Context) error {
		answers := 2
		return d.watchdog(ctx, time.Millisecond, func() {
			if answers--; answers < 0 {
				<-hang
			}
		})
	})
	for range 2 {
		if got, _ := m.mustRead(t); got != "WATCHDOG=1" {
			t.Errorf("got %q", got)
		}
	}
	_ = m.conn.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
	if n, err := m.conn.Read(make([]byte, 64)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("%d bytes, %v from a daemon that hangs", n, err)
	}
	close(hang)
	stop()
}

func TestListen(t *testing.T) {
	ctx := t.Context()
	socket := filepath.Join(t.TempDir(), "s")
	old := syscall.Umask(0)
	defer syscall.Umask(old)
	l, err := listen(ctx, socket, nil, notifier{})
	if err != nil {
		t.Fatal(err)
	}
	st, err := os.Stat(socket)
	if err != nil || st.Mode().Perm() != 0o600 {
		t.Fatalf("mode %v, %v, want 0600 whatever the umask", st.Mode(), err)
	}
	if _, err := listen(ctx, socket, nil, notifier{}); err == nil || !strings.Contains(err.Error(), "another process listens") {
		t.Errorf("a living socket was replaced: %v", err)
	}
	l.SetUnlinkOnClose(false)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if l, err = listen(ctx, socket, nil, notifier{}); err != nil {
		t.Fatalf("a dead socket is in the way: %v", err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(socket); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket stays after a close: %v", err)
	}
	if err := os.WriteFile(socket, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := listen(ctx, socket, nil, notifier{}); err == nil || !strings.Contains(err.Error(), "another kind") {
		t.Errorf("a file was replaced: %v", err)
	}
}

// A listener that the service manager kept is used again if it is still the
// one at the path, and its socket is never taken away.
func TestListenInherited(t *testing.T) {
	ctx := t.Context()
	dir := t.TempDir()
	socket, other := filepath.Join(dir, "s"), filepath.Join(dir, "o")
	first, err := listenUnix(ctx, socket)
	if err != nil {
		t.Fatal(err)
	}
	defer first.Close()
	unrelated, err := listenUnix(ctx, other)
	if err != nil {
		t.Fatal(err)
	}
	defer unrelated.Close()
	l, err := listen(ctx, socket, []*os.File{mustFile(t, unrelated), mustFile(t, first)}, notifier{})
	if err != nil {
		t.Fatal(err)
	}
	c, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_ = l.SetDeadline(time.Now().Add(5 * time.Second))
	if _, err := l.Accept(); err != nil {
		t.Errorf("the inherited listener does not answer: %v", err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(socket); err != nil {
		t.Errorf("the socket of the manager is gone: %v", err)
	}

	// Somebody replaced the file: the kept listener is no use.
	kept := mustFile(t, first)
	_ = first.Close()
	l, err = listen(ctx, socket, []*os.File{kept}, notifier{})
	if err != nil {
		t.Fatal(err)
	}
	if c, err := net.Dial("unix", socket); err != nil {
		t.Errorf("the new listener does not answer: %v", err)
	} else {
		_ = c.Close()
	}
	_ = l.Close()
}

func mustFile(t *testing.T, l *net.UnixListener) *os.File {
	t.Helper()
	f, err := l.File()
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func TestStore(t *testing.T) {
	m := mustManager(t, filepath.Join(t.TempDir(), "notify"))
	n, err := newNotifier()
	if err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(t.TempDir(), "s")
	l, err := listen(t.Context(), socket, nil, n)
	if err != nil {
		t.Fatal(err)
	}
	if got, fds := m.mustRead(t); got != "FDSTOREREMOVE=1\nFDNAME=cri" || fds != 0 {
		t.Errorf("got %q with %d descriptors", got, fds)
	}
	if got, fds := m.mustRead(t); got != "FDSTORE=1\nFDNAME=cri" || fds != 1 {
		t.Errorf("got %q with %d descriptors", got, fds)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(socket); err != nil {
		t.Errorf("a stored socket has to stay: %v", err)
	}
}

func TestInherited(t *testing.T) {
	for _, tc := range []struct {
		pid, fds, err string
	}{
		{"", "", ""},
		{"1", "3", ""},
		{strconv.Itoa(os.Getpid()), "0", ""},
		{strconv.Itoa(os.Getpid()), "many", "LISTEN_FDS \"many\""},
		{strconv.Itoa(os.Getpid()), "65", "LISTEN_FDS \"65\""},
	} {
		t.Setenv("LISTEN_PID", tc.pid)
		t.Setenv("LISTEN_FDS", tc.fds)
		files, err := inherited()
		if len(files) != 0 || (err == nil) != (tc.err == "") || err != nil && !strings.Contains(err.Error(), tc.err) {
			t.Errorf("%+v: %v, %v", tc, files, err)
		}
		if _, ok := os.LookupEnv("LISTEN_FDS"); ok {
			t.Error("children would see LISTEN_FDS")
		}
	}
}

func TestMakePrivate(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: directories of others")
	}
	dir := t.TempDir()
	for name, tc := range map[string]struct {
		prepare func(p string) error
		want    string
	}{
		"absent":  {func(string) error { return nil }, ""},
		"present": {func(p string) error { return os.Mkdir(p, 0o700) }, ""},
		"open":    {func(p string) error { return errors.Join(os.Mkdir(p, 0o700), os.Chmod(p, 0o1777)) }, ""},
		"foreign": {func(p string) error { return errors.Join(os.Mkdir(p, 0o700), os.Chown(p, 12345, 0)) }, "belongs to user 12345"},
		"link":    {func(p string) error { return os.Symlink("/etc", p) }, "want a directory"},
		"file":    {func(p string) error { return os.WriteFile(p, nil, 0o600) }, "want a directory"},
	} {
		p := filepath.Join(dir, name)
		if err := tc.prepare(p); err != nil {
			t.Fatal(err)
		}
		err := makePrivate(p)
		if tc.want != "" {
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("%s: got %v, want %q", name, err, tc.want)
			}
			continue
		}
		st, serr := os.Stat(p)
		if err != nil || serr != nil || st.Mode() != os.ModeDir|0o700 {
			t.Errorf("%s: %v, %v, mode %v", name, err, serr, st.Mode())
		}
	}
}

func TestLockDir(t *testing.T) {
	dir := t.TempDir()
	old := lockTimeout
	defer func() { lockTimeout = old }()
	lockTimeout = 60 * time.Millisecond
	first, err := lockDir(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := lockDir(t.Context(), dir); err == nil || !strings.Contains(err.Error(), "another berthd") {
		t.Errorf("two locks: %v", err)
	}
	// A daemon that is about to end is waited for.
	lockTimeout = 5 * time.Second
	time.AfterFunc(60*time.Millisecond, func() { _ = first.Close() })
	second, err := lockDir(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	_ = second.Close()
}

func TestFindProgram(t *testing.T) {
	dir := t.TempDir()
	p := filepath.Join(dir, "berth-shim")
	if err := os.WriteFile(p, []byte("#!/bin/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	if got, err := findProgram("shim_path", p, "berth-shim"); err != nil || got != p {
		t.Errorf("configured: %q, %v", got, err)
	}
	t.Setenv("PATH", dir)
	if got, err := findProgram("shim_path", "", "berth-shim"); err != nil || got != p {
		t.Errorf("in PATH: %q, %v", got, err)
	}
	if _, err := findProgram("init_path", "", "berth-init"); err == nil || !strings.HasPrefix(err.Error(), "init_path: ") {
		t.Errorf("absent: %v", err)
	}

	self, libexec := filepath.Join(dir, "bin", "berthd"), filepath.Join(dir, "libexec", "berth")
	for _, d := range []string{filepath.Dir(self), libexec} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if got := installed(self, "berth-shim"); got != "" {
		t.Errorf("not installed: %q", got)
	}
	for _, want := range []string{filepath.Join(libexec, "berth-shim"), filepath.Join(filepath.Dir(self), "berth-shim")} {
		if err := os.WriteFile(want, []byte("#!/bin/sh\n"), 0o755); err != nil {
			t.Fatal(err)
		}
		if got := installed(self, "berth-shim"); got != want {
			t.Errorf("installed: %q, want %q", got, want)
		}
	}
}

func mustDaemon(t *testing.T, src source, log io.Writer) (*daemon, context.Context) {
	t.Helper()
	c, err := src.load()
	if err != nil {
		t.Fatal(err)
	}
	logs := textlogger.NewConfig(textlogger.Output(log), textlogger.Verbosity(int(c.LogLevel)))
	ctx, stop := context.WithCancel(klog.NewContext(t.Context(), textlogger.NewLogger(logs)))
	t.Cleanup(stop)
	d := &daemon{source: src, config: c, logs: logs, stop: stop}
	d.onReload("log", d.setLogLevel)
	return d, ctx
}

func TestReload(t *testing.T) {
	src := mustWrite(t, map[string]string{"berth.toml": "log_level = 2\n"})
	var log bytes.Buffer
	d, ctx := mustDaemon(t, src, &log)
	told := 0
	d.onReload("test", func(*config) error { told++; return errors.New("told-why-not") })
	mustFileBody := func(body string) {
		t.Helper()
		if err := os.WriteFile(src.file, []byte(body), 0o644); err != nil {
			t.Fatal(err)
		}
	}

	mustFileBody("log_level = 4\npod_timeout = \"3m\"\n")
	d.handle(ctx, syscall.SIGHUP)
	if d.config.LogLevel != 4 || d.logs.Verbosity().String() != "4" || told != 1 {
		t.Errorf("level %d, verbosity %v, told %d times", d.config.LogLevel, d.logs.Verbosity(), told)
	}
	if !strings.Contains(log.String(), "told-why-not") {
		t.Errorf("the error of a part is not in\n%s", log.String())
	}
	if d.config.PodTimeout != 4*time.Minute {
		t.Errorf("pod_timeout changed to %v in a running daemon", d.config.PodTimeout)
	}
	if !strings.Contains(log.String(), `"Changes that wait for a restart" keys="pod_timeout"`) {
		t.Errorf("pod_timeout is not named in\n%s", log.String())
	}

	mustFileBody("log_level = 6\nnonsense = 1\n")
	d.handle(ctx, syscall.SIGHUP)
	if d.config.LogLevel != 4 || told != 1 {
		t.Errorf("a bad file changed something: level %d, told %d times", d.config.LogLevel, told)
	}
	if !strings.Contains(log.String(), src.file+":2: nonsense: unknown key") {
		t.Errorf("the error is not in\n%s", log.String())
	}
}

func TestSignals(t *testing.T) {
	src := mustWrite(t, map[string]string{"berth.toml": ""})
	var log bytes.Buffer
	d, ctx := mustDaemon(t, src, &log)
	d.handle(ctx, syscall.SIGUSR1)
	if !strings.Contains(log.String(), "TestSignals") {
		t.Errorf("no stacks in\n%s", log.String())
	}
	d.handle(ctx, syscall.SIGPIPE)
	if ctx.Err() != nil {
		t.Error("SIGPIPE ended the daemon")
	}
	d.handle(ctx, syscall.SIGTERM)
	if ctx.Err() == nil {
		t.Error("SIGTERM did not end the daemon")
	}
}

func TestCommand(t *testing.T) {
	src := mustWrite(t, map[string]string{"berth.toml": "log_level = 3\n", "bad.toml": "x = 1\n"})
	bad := filepath.Join(filepath.Dir(src.file), "bad.toml")
	for _, tc := range []struct {
		args        []string
		status      int
		out, errOut string
	}{
		{[]string{"--version"}, 0, "berthd " + version() + " (", ""},
		{[]string{"--print-config"}, 0, "#state_dir = \"/var/lib/berth\"\n", ""},
		{[]string{"--check-config", "--config", src.file}, 0, "configuration is valid", ""},
		{[]string{"--check-config", "--config", bad}, 1, "", bad + ":1: x: unknown key"},
		{[]string{"--check-config", "--config", "/no/such/file"}, 1, "", "/no/such/file"},
		{[]string{"--check-config", "--config", src.file, "-v", "11"}, 1, "", "--v: 11: want 0 to 10"},
		{[]string{"--check-config", "--config", src.file, "--socket", "s"}, 1, "", "--socket: \"s\": want an absolute path"},
		{[]string{"-v", "x"}, 2, "", "invalid value"},
		{[]string{"--nonsense"}, 2, "", "not defined"},
		{[]string{"start"}, 2, "", "unexpected argument \"start\""},
		{[]string{"--help"}, 0, "", "-print-config"},
	} {
		var out, errOut bytes.Buffer
		got := command(tc.args, &out, &errOut)
		if got != tc.status || !strings.Contains(out.String(), tc.out) || !strings.Contains(errOut.String(), tc.errOut) {
			t.Errorf("%v: %d, want %d\n%s%s", tc.args, got, tc.status, out.String(), errOut.String())
		}
	}
}

func TestVersion(t *testing.T) {
	if v := version(); v == "" || v[0] < '0' || v[0] > '9' {
		t.Errorf("%q is not a semantic version", v)
	}
	if !strings.Contains(versionText(), runtime.Version()) {
		t.Errorf("%q", versionText())
	}
}
