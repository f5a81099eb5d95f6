package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/berthd/berth/cmd/berthd/doctor"
	"github.com/berthd/berth/cri"
	"github.com/berthd/berth/cri/admin/api"
)

// checkup examines the node for --inspect doctor: the configuration, the daemon if one
// runs, and what it stands on. It needs no lock: nothing of the daemon's is changed.
func checkup(ctx context.Context, src source, tell func(api.Check)) {
	klog.SetLoggerWithOptions(klog.Logger{}, klog.ContextualLogger(true)) // discards: what is found is told otherwise
	c, err := src.load()
	if err != nil {
		tell(api.Check{Name: "configuration", Level: api.LevelError, Seen: err.Error(), Want: "a valid one: berthd does not start",
			Remedy: "correct it, and look with berth config validate; all other checks here are about the defaults"})
		c = defaults()
		if c.finish() != nil {
			return // the defaults are in order
		}
	} else {
		tell(api.Check{Name: "configuration", Level: api.LevelOK, Seen: described(src.file)})
	}
	d := &daemonCheck{config: c, tell: tell}
	n := c.node()
	n.PID, n.Held = d.admin(ctx)
	if n.PID != 0 {
		d.cri(ctx)
	}
	doctor.Examine(ctx, n, tell)
}

func described(file string) string {
	if _, err := os.Stat(file); errors.Is(err, fs.ErrNotExist) {
		return "the defaults, " + file + " is not there"
	}
	return file + " is valid"
}

// node is the configuration for the doctor.
func (c *config) node() doctor.Node {
	n := doctor.Node{StateDir: c.StateDir, RunDir: c.RunDir, Socket: c.Socket, DefaultRuntime: c.DefaultRuntime,
		Runtimes: map[string]string{}, Drivers: map[string]string{}, Network: c.network(), OOMScoreAdj: c.OOMScoreAdj}
	n.Shim, n.ShimErr = findProgram("shim_path", c.ShimPath, "berth-shim")
	n.Init, n.InitErr = findProgram("init_path", c.InitPath, "berth-init")
	driver := cgroupDriver(c.CgroupDriver)
	for h, r := range c.Runtimes {
		n.Runtimes[h], n.Drivers[h] = r.program(h), cmp.Or(r.CgroupDriver, driver)
	}
	return n
}

// daemonCheck asks the daemon.
type daemonCheck struct {
	config *config
	tell   func(api.Check)
}

// Bounds of asking.
const (
	answerTimeout = 10 * time.Second
	maxAnswer     = 16 << 20 // bytes
	// stuckAfter is the age of a step that an administrator should know of.
	stuckAfter = 2 * time.Minute
)

// admin asks the daemon who it is and what it is at. It returns its process ID, 0 if none
// answers, and whether there is one nevertheless.
func (d *daemonCheck) admin(ctx context.Context) (pid int, held bool) {
	path := filepath.Join(d.config.RunDir, "admin.sock")
	var v api.Version
	err := askAdmin(ctx, path, api.PathVersion, &v)
	switch {
	case err == nil:
	case errors.Is(err, fs.ErrPermission):
		d.tell(api.Check{Name: "berthd", Level: api.LevelNote, Seen: err.Error(), Want: "root, whom it answers", Remedy: "run berth doctor as root"})
		return 0, true
	case d.held():
		d.tell(api.Check{Name: "berthd", Level: api.LevelError, Seen: "a process holds " + d.config.RunDir + " and does not answer: " + err.Error(), Want: "an answer",
			Remedy: "if it has not just been started: kill -USR1 has it write its stacks to the log, then restart it; containers go on"})
		return 0, true
	default:
		d.tell(api.Check{Name: "berthd", Level: api.LevelNote, Seen: "does not run", Remedy: "systemctl start berthd, once this list has no errors"})
		return 0, false
	}
	seen := fmt.Sprintf("%s, process %d", v.Version, v.PID)
	if v.Version != version() {
		d.tell(api.Check{Name: "berthd", Level: api.LevelNote, Seen: seen, Want: version() + ", which is installed", Remedy: "systemctl restart berthd; containers go on"})
	} else {
		d.tell(api.Check{Name: "berthd", Level: api.LevelOK, Seen: seen})
	}
	d.stuck(ctx, path)
	return v.PID, true
}

// stuck tells of steps that have lasted for long.
func (d *daemonCheck) stuck(ctx context.Context, path string) {
	var ops []api.Op
	if err := askAdmin(ctx, path, api.PathOps, &ops); err != nil {
		d.tell(api.Check{Name: "operations", Level: api.LevelWarning, Seen: err.Error(), Want: "the list of what is under way", Remedy: "restart berthd if it is older than this program"})
		return
	}
	long := 0
	for _, o := range ops {
		if (o.Kind == api.KindOperation || o.Kind == api.KindBackground || o.Kind == api.KindPull) && o.StepAge > stuckAfter {
			long++
			d.tell(api.Check{Name: "operations", Level: api.LevelWarning, Seen: fmt.Sprintf("%s of %s%s is at step %q for %s", o.What, o.Name, o.Object, o.Step, o.StepAge.Round(time.Second)),
				Want: "steps of less than " + stuckAfter.String(), Remedy: "look at what the step needs: a network plugin, the OCI runtime, a registry, a volume that hangs; berth ops shows it all"})
		}
	}
	if long == 0 {
		d.tell(api.Check{Name: "operations", Level: api.LevelOK, Seen: strconv.Itoa(len(ops)) + " under way, none is slow"})
	}
}

// held tells whether a process has the lock of the run directory.
func (d *daemonCheck) held() bool {
	f, err := os.Open(d.config.RunDir)
	if err != nil {
		return false
	}
	defer f.Close()
	return errors.Is(unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB), unix.EWOULDBLOCK)
}

// askAdmin gets an answer from the admin socket.
func askAdmin(ctx context.Context, socket, path string, v any) error {
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	t := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}}
	defer t.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://berthd"+path, nil)
	if err != nil {
		return err
	}
	resp, err := t.RoundTrip(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("berthd answers %s", resp.Status)
	}
	return json.NewDecoder(io.LimitReader(resp.Body, maxAnswer)).Decode(v)
}

// cri asks what the kubelet would.
func (d *daemonCheck) cri(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	conditions, err := cri.Ask(ctx, d.config.Socket)
	if err != nil {
		d.tell(api.Check{Name: "CRI", Level: api.LevelError, Seen: err.Error(), Want: "an answer", Remedy: "restart berthd; containers go on"})
		return
	}
	for _, c := range conditions {
		if c.Holds {
			d.tell(api.Check{Name: "CRI " + c.Type, Level: api.LevelOK, Seen: "yes"})
			continue
		}
		d.tell(api.Check{Name: "CRI " + c.Type, Level: api.LevelError, Seen: c.Why, Want: "ready: the kubelet starts no pod", Remedy: "see the checks of runtimes and network below"})
	}
}
