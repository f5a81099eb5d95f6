package node

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.etcd.io/bbolt"
	"golang.org/x/sys/unix"
)

// Close kills berthd and removes everything of the node, whatever state it is
// in: processes, cgroups, mounts, the bridge, the directories.
func (n *Node) Close() error {
	var errs []error
	if n.client != nil {
		errs = append(errs, n.client.Close())
	}
	errs = append(errs, n.Kill(), n.killProcesses(), n.killParent(), n.unmount())
	if _, err := os.Stat("/sys/class/net/" + n.Name); err == nil {
		if out, err := exec.Command("ip", "link", "del", n.Name).CombinedOutput(); err != nil {
			errs = append(errs, fmt.Errorf("bridge %s: %w: %s", n.Name, err, out))
		}
	}
	live.Delete(n)
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	return errors.Join(append(errs, n.dropRules(ctx), os.RemoveAll(n.RunDir), os.RemoveAll(n.Dir))...)
}

// live holds the nodes that are not closed.
var live sync.Map

// ending is set when the process is about to end by a signal: nothing new is
// started then.
var ending atomic.Bool

// CloseOnSignal removes all nodes and ends the process when it is interrupted
// or terminated: a test that somebody stops is not to leave daemons behind.
func CloseOnSignal() {
	c := make(chan os.Signal, 1)
	signal.Notify(c, unix.SIGINT, unix.SIGTERM)
	go func() {
		<-c
		ending.Store(true)
		live.Range(func(key, _ any) bool {
			if err := key.(*Node).remains().Close(); err != nil {
				fmt.Fprintln(os.Stderr, "clean-up:", err)
			}
			return true
		})
		os.Exit(130)
	}()
}

// remains is the node as it is on the machine, without the handles that the
// tests are using at this moment: its berthd is one more process to kill.
func (n *Node) remains() *Node {
	r := &Node{Name: n.Name, Dir: n.Dir, StateDir: n.StateDir, RunDir: n.RunDir, Parent: n.Parent}
	for _, id := range n.ids.list() {
		r.ids.add(id)
	}
	return r
}

// Reboot does to the node what a power cut does: berthd, shims and containers
// die, namespaces, mounts, cgroups, the run directory and the rules of iptables are
// gone. Then it starts berthd with another boot ID.
func (n *Node) Reboot(ctx context.Context, bootID string) error {
	if err := errors.Join(n.Kill(), n.killProcesses(), n.killParent(), n.unmount(), n.dropRules(ctx), os.RemoveAll(n.RunDir)); err != nil {
		return err
	}
	n.opts.Env = append(n.opts.Env, "BERTH_TEST_BOOT_ID="+bootID)
	return n.Start(ctx)
}

// dropRules removes the rules of the node's network from iptables, and the
// chains that they leave empty.
func (n *Node) dropRules(ctx context.Context) error {
	out, err := exec.CommandContext(ctx, "iptables-save", "-t", "nat").Output()
	if err != nil {
		return fmt.Errorf("iptables-save: %w", err)
	}
	chains := map[string]bool{}
	for line := range strings.Lines(string(out)) {
		rule, ok := strings.CutPrefix(strings.TrimSpace(line), "-A ")
		if !ok || !strings.Contains(rule, `name: \"`+n.Name+`\"`) {
			continue
		}
		// iptables-save quotes as a shell does.
		if out, err := exec.CommandContext(ctx, "sh", "-c", "iptables -w -t nat -D "+rule).CombinedOutput(); err != nil {
			return fmt.Errorf("iptables -D %s: %w: %s", rule, err, out)
		}
		if chain, _, _ := strings.Cut(rule, " "); strings.HasPrefix(chain, "CNI-") {
			chains[chain] = true
		}
	}
	for c := range chains {
		if out, err := exec.CommandContext(ctx, "iptables", "-w", "-t", "nat", "-X", c).CombinedOutput(); err != nil {
			return fmt.Errorf("iptables -X %s: %w: %s", c, err, out)
		}
	}
	return nil
}

// killProcesses kills what still runs for this node, and waits for the end.
func (n *Node) killProcesses() error {
	for range 1000 {
		m := Marks{}
		if err := n.processes(m, n.ids.list()); err != nil {
			return err
		}
		if len(m) == 0 {
			return nil
		}
		for k := range m {
			pid, err := strconv.Atoi(strings.Fields(k)[1])
			if err != nil {
				return err
			}
			if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
				return fmt.Errorf("%s: %w", k, err)
			}
		}
		time.Sleep(20 * time.Millisecond)
	}
	return errors.New("node: processes do not end on SIGKILL")
}

func killIn(dir string) error {
	b, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
	if err != nil {
		return nil // gone, or a threaded cgroup
	}
	for _, f := range strings.Fields(string(b)) {
		if pid, err := strconv.Atoi(f); err == nil && pid > 0 {
			if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
				return fmt.Errorf("%s: process %d: %w", dir, pid, err)
			}
		}
	}
	return nil
}

// removeCgroup removes an empty cgroup; the last killed process needs a moment.
func removeCgroup(dir string) error {
	var err error
	for range 2000 {
		if err = unix.Rmdir(dir); err == nil || errors.Is(err, unix.ENOENT) {
			return nil
		}
		time.Sleep(10 * time.Millisecond)
	}
	return fmt.Errorf("cgroup %s: %w", dir, err)
}

func (n *Node) unmount() error {
	for range 64 { // mounts may be stacked
		b, err := os.ReadFile("/proc/self/mountinfo")
		if err != nil {
			return err
		}
		again := false
		for _, line := range strings.Split(string(b), "\n") {
			f := strings.Fields(line)
			if len(f) > 4 && (strings.HasPrefix(f[4]+"/", n.RunDir+"/") || strings.HasPrefix(f[4]+"/", n.Dir+"/")) {
				again = true
				if err := unix.Unmount(f[4], unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
					return fmt.Errorf("unmount %s: %w", f[4], err)
				}
			}
		}
		if !again {
			return nil
		}
	}
	return errors.New("node: mounts come back")
}

// Rows returns the keys of all rows of the book as "table/key", without the
// book's own bookkeeping. berthd must not run.
func (n *Node) Rows() ([]string, error) {
	db, err := bbolt.Open(filepath.Join(n.StateDir, "book.db"), 0o600, &bbolt.Options{ReadOnly: true, Timeout: 20 * time.Second})
	if err != nil {
		return nil, fmt.Errorf("book: %w", err)
	}
	defer db.Close()
	var rows []string
	err = db.View(func(tx *bbolt.Tx) error {
		return tx.ForEach(func(name []byte, b *bbolt.Bucket) error { return rowsOf(&rows, string(name), b) })
	})
	return rows, err
}

// rowsOf appends the rows of a bucket and of those in it.
func rowsOf(rows *[]string, path string, b *bbolt.Bucket) error {
	return b.ForEach(func(k, v []byte) error {
		name := path + "/" + string(k)
		if v == nil {
			return rowsOf(rows, name, b.Bucket(k))
		}
		if filepath.Base(path) != "meta" {
			*rows = append(*rows, fmt.Sprintf("row: %q", name))
		}
		return nil
	})
}

// Clean removes all pods, then looks for whatever else is left since before,
// in the book too, and returns it. berthd is stopped at the end.
func (n *Node) Clean(ctx context.Context, before Marks) ([]string, error) {
	c, err := n.Client()
	if err != nil {
		return nil, err
	}
	if err := c.DestroyAll(ctx, true); err != nil {
		return nil, err
	}
	left, err := n.Settle(ctx, before, 30*time.Second)
	if err != nil {
		return left, err
	}
	if err := n.Stop(ctx); err != nil {
		return left, err
	}
	rows, err := n.Rows()
	for _, r := range rows {
		if containsAny(r, n.ids.list()) {
			left = append(left, r)
		}
	}
	return left, err
}
