package node

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Marks are the traces of a node on its machine, each as "kind: what".
type Marks map[string]bool

// Minus returns, sorted, what is in m and not in before.
func (m Marks) Minus(before Marks) []string {
	var out []string
	for _, k := range slices.Sorted(maps.Keys(m)) {
		if !before[k] {
			out = append(out, k)
		}
	}
	return out
}

// Marks looks at the machine and returns what is there of this node:
//
//   - file: entries of its run directory and, two levels deep, of its state
//     directory: sockets, bundles, pinned namespaces, snapshots, layers
//   - mount: at, or of something, below its directories
//   - interface: on its bridge
//   - address: files of host-local
//   - iptables: rules of its network or with one of its IDs
//   - cgroup: below its top cgroup, or named by one of its IDs
//   - process: shims, runtimes, plugins, container processes, zombies; not berthd itself
func (n *Node) Marks() (Marks, error) { return n.marks(n.ids.list()) }

func (n *Node) marks(ids []string) (Marks, error) {
	m := Marks{}
	var errs []error
	for _, look := range []func(Marks, []string) error{n.files, n.mounts, n.interfaces, n.iptables, n.cgroups, n.processes} {
		errs = append(errs, look(m, ids))
	}
	return m, errors.Join(errs...)
}

// Settle waits until nothing is left that was not there before, at most for
// the given time, and returns what is.
func (n *Node) Settle(ctx context.Context, before Marks, limit time.Duration) ([]string, error) {
	return settle(ctx, limit, func() ([]string, error) {
		m, err := n.Marks()
		return m.Minus(before), err
	})
}

// SettleIDs is Settle for the marks that bear one of the IDs.
func (n *Node) SettleIDs(ctx context.Context, limit time.Duration, ids ...string) ([]string, error) {
	return settle(ctx, limit, func() ([]string, error) {
		m, err := n.marks(ids)
		var out []string
		for k := range m {
			if containsAny(k, ids) {
				out = append(out, k)
			}
		}
		slices.Sort(out)
		return out, err
	})
}

func settle(ctx context.Context, limit time.Duration, look func() ([]string, error)) ([]string, error) {
	end := time.Now().Add(limit)
	for {
		left, err := look()
		if err != nil || len(left) == 0 || time.Now().After(end) || ctx.Err() != nil {
			return left, err
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func containsAny(s string, ids []string) bool {
	for _, id := range ids {
		if strings.Contains(s, id) {
			return true
		}
	}
	return false
}

func (n *Node) files(m Marks, _ []string) error {
	walk := func(root string, depth int) error {
		return filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			if errors.Is(err, os.ErrNotExist) || path == root {
				return nil
			}
			if err != nil {
				return err
			}
			if path == filepath.Join(root, "init") {
				return fs.SkipDir // whatever berthd runs has its own there
			}
			if path == filepath.Join(root, "place.json") {
				return nil // likewise, since the version that writes it
			}
			m["file: "+path] = true
			rel, err := filepath.Rel(root, path)
			if err == nil && d.IsDir() && strings.Count(rel, "/")+1 >= depth {
				return fs.SkipDir
			}
			return err
		})
	}
	addresses := filepath.Join(n.addressDir(), n.Name)
	entries, err := os.ReadDir(addresses)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	for _, e := range entries {
		// Beside the addresses there are host-local's own "lock" and "last_reserved_ip.N".
		if e.Name() != "lock" && !strings.HasPrefix(e.Name(), "last_reserved") {
			owner, err := os.ReadFile(filepath.Join(addresses, e.Name()))
			if err != nil {
				continue // given back this moment
			}
			id, _, _ := bytes.Cut(owner, []byte("\r\n"))
			m[fmt.Sprintf("address: %s of %s", e.Name(), id)] = true
		}
	}
	return errors.Join(walk(n.RunDir, 16), walk(n.StateDir, 2))
}

func (n *Node) mounts(m Marks, _ []string) error {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	for _, line := range strings.Split(string(b), "\n") {
		if strings.Contains(line, n.RunDir+"/") || strings.Contains(line, n.StateDir+"/") {
			f := strings.Fields(line)
			if len(f) > 4 {
				// Without the numbers, which change when a mount is made again.
				m["mount: "+strings.Join(f[3:], " ")] = true
			}
		}
	}
	return nil
}

func (n *Node) interfaces(m Marks, _ []string) error {
	entries, err := os.ReadDir("/sys/class/net/" + n.Name + "/brif")
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	for _, e := range entries {
		m["interface: "+e.Name()] = true
	}
	return err
}

func (n *Node) iptables(m Marks, ids []string) error {
	for _, prog := range []string{"iptables-save", "ip6tables-save"} {
		out, err := exec.Command(prog).Output()
		if errors.Is(err, exec.ErrNotFound) {
			continue
		}
		if err != nil {
			return fmt.Errorf("%s: %w", prog, err)
		}
		for _, line := range strings.Split(string(out), "\n") {
			if strings.Contains(line, `name: \"`+n.Name+`\"`) || containsAny(line, ids) {
				m["iptables: "+line] = true
			}
		}
	}
	return nil
}

func (n *Node) cgroups(m Marks, ids []string) error {
	roots, err := hierarchies()
	if err != nil {
		return err
	}
	for _, root := range roots {
		top := filepath.Join(root, n.Parent)
		err := walkCgroups(root, func(dir string) error {
			// The top itself is the tests' own.
			if strings.HasPrefix(dir, top+"/") || containsAny(filepath.Base(dir), ids) {
				m["cgroup: "+dir] = true
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// processes finds everything that runs for the node: by the directories in its
// command line and environment (shims, runtimes, plugins), by its cgroup (what
// runs in containers), and berthd's dead children.
func (n *Node) processes(m Marks, ids []string) error {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return err
	}
	daemon := n.Pid()
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() || pid == daemon {
			continue
		}
		if what, ok := n.owns(pid, daemon, ids); ok {
			m[fmt.Sprintf("process: %d %s", pid, what)] = true
		}
	}
	return nil
}

func (n *Node) owns(pid, daemon int, ids []string) (what string, ok bool) {
	read := func(name string) string {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", pid, name))
		if err != nil {
			return "" // ended this moment, or a kernel thread
		}
		return string(b)
	}
	stat := read("stat")
	_, after, found := strings.Cut(stat, ") ")
	f := strings.Fields(after)
	if !found || len(f) < 2 {
		return "", false
	}
	cmdline := strings.TrimSpace(strings.ReplaceAll(read("cmdline"), "\x00", " "))
	if f[0] == "Z" {
		return "zombie " + stat, daemon != 0 && f[1] == strconv.Itoa(daemon)
	}
	if env := read("environ"); strings.Contains(cmdline, n.RunDir+"/") || strings.Contains(env, n.RunDir+"/") || strings.Contains(cmdline, n.Dir+"/") {
		return cmdline, true
	}
	for _, line := range strings.Split(read("cgroup"), "\n") {
		if strings.Contains(line, ":"+n.Parent+"/") || containsAny(line, ids) {
			return cmdline + " in " + line, true
		}
	}
	return "", false
}

// Files returns how many file descriptors berthd holds.
func (n *Node) Files() (int, error) {
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", n.Pid()))
	return len(entries), err
}
