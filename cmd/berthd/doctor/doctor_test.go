package doctor

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berthd/berth/cni"
	"github.com/berthd/berth/cri/admin/api"
)

// checks are what an exam has told.
type checks []api.Check

// exam returns one that tells into the list.
func (c *checks) exam(n Node) *exam {
	return &exam{Node: n, tell: func(check api.Check) { *c = append(*c, check) }, root: os.Geteuid() == 0}
}

func (c checks) level(name string) api.Level {
	i := slices.IndexFunc(c, func(c api.Check) bool { return c.Name == name })
	if i < 0 {
		return ""
	}
	return c[i].Level
}

// complain finds checks that do not say what to do.
func (c checks) complain(t *testing.T) {
	t.Helper()
	for _, k := range c {
		if k.Name == "" || k.Seen == "" || k.Level != api.LevelOK && (k.Want == "" || k.Remedy == "") {
			t.Errorf("%+v: without what is wanted and what to do", k)
		}
	}
}

func TestKernelVersion(t *testing.T) {
	for release, want := range map[string]api.Level{
		"6.1.0-13-amd64": api.LevelOK, "5.6": api.LevelOK, "5.6-rc1": api.LevelOK, "10.0.1": api.LevelOK,
		"5.5.19": api.LevelError, "4.19.0": api.LevelError, "": api.LevelError, "linux": api.LevelError, "6": api.LevelError,
	} {
		var c checks
		c.exam(Node{}).kernelVersion(release)
		if got := c.level("kernel version"); got != want {
			t.Errorf("%q: %s, want %s", release, got, want)
		}
		c.complain(t)
	}
}

func TestDrivers(t *testing.T) {
	for _, c := range []struct {
		driver  string
		systemd bool
		want    api.Level
	}{
		{"systemd", true, api.LevelOK}, {"cgroupfs", false, api.LevelOK},
		{"systemd", false, api.LevelError}, {"cgroupfs", true, api.LevelWarning},
	} {
		var found checks
		found.exam(Node{Drivers: map[string]string{"a": c.driver, "b": c.driver}}).drivers(c.systemd)
		if len(found) != 1 || found[0].Level != c.want {
			t.Errorf("%s, systemd %v: %v, want one %s", c.driver, c.systemd, found, c.want)
		}
		found.complain(t)
	}
}

func TestFixedRunc(t *testing.T) {
	for line, want := range map[string]string{
		"runc version 1.1.5+ds1": "1.2.8", "runc version 1.2.7": "1.2.8", "runc version 1.2.8": "", "runc version 1.2.9": "",
		"runc version 1.3.0": "1.3.3", "runc version v1.3.3": "", "runc version 1.4.0": "", "runc version 2.0.0": "", "runc version 0.1.1": "1.2.8",
	} {
		if got, runc := fixedRunc(line); got != want || !runc {
			t.Errorf("%s: %q, %v; want %q", line, got, runc, want)
		}
	}
	for _, line := range []string{"crun version 1.8.1", "", "runc version 1.2", "runc version 99999999999999999999.0.0"} {
		if got, runc := fixedRunc(line); runc {
			t.Errorf("%q: a runc, %q", line, got)
		}
	}
}

func TestPrograms(t *testing.T) {
	dir := t.TempDir()
	script := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte("#!/bin/sh\n"+text+"\n"), 0o755); err != nil {
			t.Fatal(err)
		}
		return path
	}
	if mountFlags(dir)&unix.ST_NOEXEC != 0 {
		t.Skip("programs in " + dir + " cannot be run")
	}
	good := script("good", `case $1 in features) echo '{"mountOptions":["rro"],"linux":{"namespaces":["user"],"mountExtensions":{"idmap":{"enabled":true}}}}';; *) echo runc version 1.3.4;; esac`)
	odd := script("odd", `[ $1 = --version ] && echo other version 7`)
	broken := script("broken", "echo no such thing >&2; exit 1")
	var c checks
	x := c.exam(Node{Shim: good, InitErr: os.ErrNotExist, DefaultRuntime: "broken",
		Runtimes: map[string]string{"good": good, "odd": odd, "broken": broken, "absent": filepath.Join(dir, "absent")}})
	x.programs(t.Context())
	for name, want := range map[string]api.Level{
		"berth-shim": api.LevelOK, "berth-init": api.LevelError,
		"runtime good": api.LevelOK, "runtime good features": api.LevelOK, "runtime good age": "",
		"runtime odd": api.LevelOK, "runtime odd features": api.LevelNote,
		"runtime broken": api.LevelError, "runtime broken features": "", "runtime absent": api.LevelWarning,
	} {
		if got := c.level(name); got != want {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
	c.complain(t)
}

func TestNetwork(t *testing.T) {
	// Of its own: tests of other packages look, too, at the same time.
	t.Setenv("TMPDIR", t.TempDir())
	bin, conf := t.TempDir(), t.TempDir()
	network := cni.Config{ConfDir: conf, BinDirs: []string{bin}}
	look := func() checks {
		var c checks
		c.exam(Node{Network: network}).network(t.Context())
		c.complain(t)
		return c
	}
	if got := look().level("network"); got != api.LevelError {
		t.Errorf("without a configuration: %q", got)
	}
	write := func(name, text string, mode os.FileMode) {
		if err := os.WriteFile(name, []byte(text), mode); err != nil {
			t.Fatal(err)
		}
	}
	write(filepath.Join(conf, "10.conflist"), `{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"some"}]}`, 0o600)
	if got := look().level("network"); got != api.LevelError {
		t.Errorf("without the plugin: %q", got)
	}
	write(filepath.Join(bin, "some"), "#!/bin/sh\n", 0o755)
	if got := look().level("network"); got != api.LevelOK {
		t.Errorf("with all: %q", got)
	}
	write(filepath.Join(conf, "20.conflist"), `{`, 0o600)
	c := look()
	if c.level("network") != api.LevelOK || c.level("network configuration") != api.LevelWarning {
		t.Errorf("with a broken file: %v", c)
	}
	network.BinDirs = nil
	if got := look().level("network"); got != api.LevelError {
		t.Errorf("with a wrong configuration of berth: %q", got)
	}
	if left, err := filepath.Glob(filepath.Join(os.TempDir(), "berth-doctor-*")); err != nil || len(left) > 0 {
		t.Errorf("left over: %v, %v", left, err)
	}
}

func TestDirectories(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: owners")
	}
	top := t.TempDir()
	at := func(name string) string { return filepath.Join(top, name) }
	for name, mode := range map[string]os.FileMode{"good": 0o700, "passing": 0o711, "open": 0o755, "theirs": 0o700, "file": 0o600} {
		var err error
		if name == "file" {
			err = os.WriteFile(at(name), nil, mode)
		} else {
			err = os.Mkdir(at(name), mode)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chown(at("theirs"), 12345, 0); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("good", at("link")); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]api.Level{
		"good": api.LevelOK, "passing": api.LevelOK, "absent": api.LevelOK, "absent/two": api.LevelOK, "open": api.LevelNote,
		"theirs": api.LevelError, "file": api.LevelError, "link": api.LevelError, "file/x": api.LevelError,
	} {
		var c checks
		c.exam(Node{}).owner("state_dir", at(name))
		if got := c.level("state_dir"); got != want {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
		c.complain(t)
	}
	if err := os.Chmod(at("open"), 0o777); err != nil {
		t.Fatal(err)
	}
	var c checks
	c.exam(Node{}).owner("state_dir", at("open/x"))
	if got := c.level("state_dir path"); got != api.LevelWarning {
		t.Errorf("below a directory of everybody's: %q", got)
	}
}

func TestLevels(t *testing.T) {
	for _, k := range []struct {
		isError, isWarning bool
		want               api.Level
	}{{false, false, api.LevelOK}, {false, true, api.LevelWarning}, {true, true, api.LevelError}, {true, false, api.LevelError}} {
		var c checks
		c.exam(Node{}).level("x", "seen", k.isError, k.isWarning, "want", "do")
		if c.level("x") != k.want {
			t.Errorf("%+v: %v", k, c)
		}
		c.complain(t)
	}
}

func TestJournalled(t *testing.T) {
	dir := t.TempDir()
	st, err := stat(dir)
	if err != nil {
		t.Fatal(err)
	}
	link, err := os.Readlink(fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(uint64(st.Dev)), unix.Minor(uint64(st.Dev)))) //nolint:unconvert // Dev differs between architectures
	if err != nil {
		t.Skip("the directory for tests is on no block device")
	}
	shown := t.TempDir()
	if journalled(dir, shown) {
		t.Error("a device without a journal has one")
	}
	if err := os.Mkdir(filepath.Join(shown, filepath.Base(link)+"-8"), 0o700); err != nil {
		t.Fatal(err)
	}
	if !journalled(dir, shown) {
		t.Error("a device with a journal has none")
	}
	if !journalled(filepath.Join(dir, "absent"), t.TempDir()) {
		t.Error("what cannot be looked at is without a journal")
	}
}

func TestMountOptions(t *testing.T) {
	if got := mountOptions("/proc"); !strings.Contains(","+got+",", ",rw,") && !strings.Contains(","+got+",", ",ro,") {
		t.Errorf("/proc: %q", got)
	}
	if got := mountOptions(filepath.Join(t.TempDir(), "absent")); got != "" {
		t.Errorf("nothing: %q", got)
	}
}

func TestCapabilities(t *testing.T) {
	for _, k := range []struct {
		status string
		want   map[string]api.Level
	}{
		{"Name:\tx\nCapEff:\t000001ffffffffff\nNoNewPrivs:\t0\nSeccomp:\t0\n", map[string]api.Level{"capabilities": api.LevelOK, "no_new_privs": "", "seccomp filter": ""}},
		{"CapEff:\t000001fffeffffff\n", map[string]api.Level{"capabilities": api.LevelWarning}}, // without SYS_RESOURCE
		{"CapEff:\t00000000a80425fb\nNoNewPrivs:\t1\nSeccomp:\t2\n", map[string]api.Level{"capabilities": api.LevelError, "no_new_privs": api.LevelWarning, "seccomp filter": api.LevelNote}},
		{"CapEff:\tmany\n", map[string]api.Level{"capabilities": api.LevelWarning}},
		{"", map[string]api.Level{"capabilities": api.LevelWarning}},
	} {
		var c checks
		c.exam(Node{}).capabilities("berthd", []byte(k.status))
		for name, want := range k.want {
			if got := c.level(name); got != want {
				t.Errorf("%q: %s is %q, want %q", k.status, name, got, want)
			}
		}
		c.complain(t)
	}
}

func TestOpenFiles(t *testing.T) {
	for limits, want := range map[string]uint64{
		"Limit  Soft Limit  Hard Limit  Units\nMax open files            1024                 1048576              files     \n": 1048576,
		"Max open files            1024                 unlimited            files     \n":                                       1 << 63,
		"Max open files\n": 0, "": 0, "Max open files a b files\n": 0,
	} {
		if got, _ := openFiles([]byte(limits)); got != want {
			t.Errorf("%q: %d, want %d", limits, got, want)
		}
	}
}

func TestLeastPids(t *testing.T) {
	mount := t.TempDir()
	for name, text := range map[string]string{"pids.max": "max\n", "a/pids.max": "500\n", "a/b/pids.max": "9000\n", "pids/c/pids.max": "77\n", "d/pids.max": "max\n"} {
		path := filepath.Join(mount, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for cgroup, want := range map[string]int64{
		"0::/a/b\n": 500, "0::/d\n": -1, "0::/\n": -1, "": -1, "rubbish\n": -1,
		"4:memory:/a\n3:pids:/c\n0::/d\n": 77, "0::/../../a\n": 500,
	} {
		if _, got := leastPids(mount, cgroup); got != want {
			t.Errorf("%q: %d, want %d", cgroup, got, want)
		}
	}
}

func TestSocket(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: owners")
	}
	dir, err := os.MkdirTemp("", "s")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	path := filepath.Join(dir, "berth.sock")
	look := func(n Node) api.Level {
		var c checks
		c.exam(n).socket(path)
		c.complain(t)
		return c.level("socket berth.sock")
	}
	if got := look(Node{}); got != api.LevelOK {
		t.Errorf("before the start: %q", got)
	}
	if got := look(Node{PID: 1}); got != api.LevelError {
		t.Errorf("removed from a daemon: %q", got)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	for mode, want := range map[os.FileMode]api.Level{0o600: api.LevelOK, 0o666: api.LevelWarning} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		if got := look(Node{Held: true}); got != want {
			t.Errorf("mode %#o: %q, want %q", mode, got, want)
		}
	}
	if err := os.Chmod(path, 0o600); err != nil {
		t.Fatal(err)
	}
	if got := look(Node{}); got != api.LevelError {
		t.Errorf("somebody else's: %q", got)
	}
	l.Close()
	if got := look(Node{}); got != api.LevelOK {
		t.Errorf("of a daemon that has ended: %q", got)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if got := look(Node{}); got != api.LevelError {
		t.Errorf("a file: %q", got)
	}
}

func TestClock(t *testing.T) {
	for shift, want := range map[time.Duration]api.Level{-time.Hour: api.LevelOK, time.Minute: api.LevelOK, 24 * time.Hour: api.LevelWarning} {
		dir := t.TempDir()
		if err := os.Chtimes(dir, time.Time{}, time.Now().Add(shift)); err != nil {
			t.Fatal(err)
		}
		var c checks
		c.exam(Node{StateDir: dir}).clock()
		if got := c.level("clock"); got != want {
			t.Errorf("a file %v from now: %q, want %q", shift, got, want)
		}
		c.complain(t)
	}
}

// TestExamine: an exam looks at everything, also for a node that has nothing, and leaves
// nothing behind.
func TestExamine(t *testing.T) {
	dir := t.TempDir()
	var c checks
	Examine(t.Context(), Node{StateDir: filepath.Join(dir, "state", "berth"), RunDir: filepath.Join(dir, "run"), Socket: filepath.Join(dir, "run", "berth.sock"),
		ShimErr: os.ErrNotExist, InitErr: os.ErrNotExist, DefaultRuntime: "none", Runtimes: map[string]string{"none": filepath.Join(dir, "none")},
		Drivers: map[string]string{"none": "cgroupfs"}, Network: cni.Config{ConfDir: dir, BinDirs: []string{dir}}}, func(k api.Check) { c = append(c, k) })
	for _, name := range []string{"berth-shim", "berth-init", "runtime none", "network"} {
		if got := c.level(name); got != api.LevelError {
			t.Errorf("%s: %q, want an error", name, got)
		}
	}
	for _, name := range []string{"kernel version", "state_dir", "state_dir space", "run_dir", "clock"} {
		if c.level(name) == "" {
			t.Errorf("%s was not looked at", name)
		}
	}
	c.complain(t)
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}
