package crash

import (
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/berthd/berth/store"
	"github.com/berthd/berth/test/images"
	"github.com/berthd/berth/test/node"
)

// finding is one of those that the tool prints as JSON.
type finding struct {
	Kind, ID, What, Why, Consequence, Remedy, Error string
	Mendable, Mended                                bool
}

// tool runs the administrator's tool and returns what it wrote and its exit code.
func (r *rig) tool(args ...string) (out, errOut string, code int) {
	r.Helper()
	out, errOut, code, err := r.Tool(r.ctx, args...)
	r.must(err)
	return out, errOut, code
}

// findings runs a verb that looks at the node and returns what it found, its exit code,
// and all that it wrote.
func (r *rig) findings(args ...string) (all []finding, code int, text string) {
	r.Helper()
	out, errOut, code := r.tool(append(args, "--json")...)
	var f struct{ Findings []finding }
	if err := json.Unmarshal([]byte(out), &f); err != nil {
		r.Fatalf("berth %s: exit %d: %v: %s%s", strings.Join(args, " "), code, err, out, errOut)
	}
	return f.Findings, code, out + errOut
}

// look is findings that come with the exit code.
func (r *rig) look(code int, args ...string) []finding {
	r.Helper()
	all, got, text := r.findings(args...)
	if got != code {
		r.Fatalf("berth %s: exit %d, want %d: %s", strings.Join(args, " "), got, code, text)
	}
	return all
}

// kindsOf lists the kinds of findings, each once and sorted.
func kindsOf(all []finding) (kinds []string) {
	for _, f := range all {
		kinds = append(kinds, f.Kind)
	}
	slices.Sort(kinds)
	return slices.Compact(kinds)
}

// finds checks which kinds of findings there are.
func (r *rig) finds(what string, got []finding, want ...string) {
	r.Helper()
	slices.Sort(want)
	if kinds := kindsOf(got); !slices.Equal(kinds, want) {
		r.Errorf("%s: %v, want %v: %+v", what, kinds, want, got)
	}
}

// removeRow deletes a row of a book that nobody has open.
func (r *rig) removeRow(table, key string) {
	r.Helper()
	st, err := store.Open(filepath.Join(r.StateDir, "book.db"))
	r.must(err)
	t := store.NewTable[json.RawMessage](table, 1)
	r.must(errors.Join(st.Update(func(tx *store.Tx) error { return t.Delete(tx, key) }), st.Close()))
}

// iptables changes or asks the table of translations.
func iptables(args ...string) error {
	args = append([]string{"-w", "20", "-t", "nat"}, args...)
	if out, err := exec.Command("iptables", args...).CombinedOutput(); err != nil {
		return fmt.Errorf("iptables %v: %w: %s", args, err, out)
	}
	return nil
}

// foreign plants what another runtime could have on the node, under an ID that this
// berthd has not made, and returns a function that tells what of it is gone.
func (r *rig) foreign() (gone func() []string) {
	r.Helper()
	var b [32]byte
	rand.Read(b[:])
	id := hex.EncodeToString(b[:])
	address := filepath.Join(r.Dir, "addresses", r.Name, "10.254.254.254")
	r.must(os.WriteFile(address, []byte(id+"\r\neth0"), 0o644))
	group := filepath.Join(node.Hierarchy("memory"), r.Parent, "other-runtime", id)
	r.must(os.MkdirAll(group, 0o755))
	sleep := exec.Command("sleep", "300")
	r.must(sleep.Start())
	r.must(os.WriteFile(filepath.Join(group, "cgroup.procs"), fmt.Append(nil, sleep.Process.Pid), 0))
	rule := func(verb string) error {
		return iptables(verb, "POSTROUTING", "-s", "203.0.113.77/32", "-m", "comment", "--comment", id, "-j", "ACCEPT")
	}
	r.must(rule("-A"))
	r.Cleanup(func() {
		sleep.Process.Kill()
		sleep.Wait()
		os.Remove(address)
		if err := errors.Join(rule("-D"), os.Remove(group), os.Remove(filepath.Dir(group))); err != nil {
			r.Error(err)
		}
	})
	return func() (gone []string) {
		for _, p := range []string{address, group} {
			if _, err := os.Stat(p); err != nil {
				gone = append(gone, p)
			}
		}
		if sleep.Process.Signal(unix.Signal(0)) != nil {
			gone = append(gone, "process")
		}
		if err := rule("-C"); err != nil {
			gone = append(gone, err.Error())
		}
		return gone
	}
}

// TestLeaksOfLostRows: pods whose rows are gone are leaks with all that they have, found
// and removed while no daemon runs; the others, and what is not berth's, stay.
func TestLeaksOfLostRows(t *testing.T) {
	t.Parallel()
	r := startNode(t, node.Options{})
	lost, cfg := r.pod("lost")
	inLost := r.launch(lost, cfg, "c", "sleep", "300")
	kept, cfgKept := r.pod("kept")
	inKept := r.launch(kept, cfgKept, "c", "sleep", "300")
	r.finds("a healthy node", r.look(0, "leaks"))
	r.must(r.Kill())
	r.finds("without its daemon", r.look(0, "leaks"))
	r.removeRow("pods", lost)
	found := r.look(5, "leaks")
	r.finds("a container without its pod", found, "address", "attachment", "iptables", "namespaces", "pod files", "row")
	for _, f := range found {
		if f.Kind == "row" && (f.ID != inLost || f.Why != "its pod is not in the book") {
			t.Errorf("row: %+v", f)
		}
	}
	r.removeRow("containers", inLost)
	gone := r.foreign()
	want := []string{"address", "attachment", "bundle", "cgroup", "container state", "iptables", "namespaces", "pod files",
		"runtime state", "shim", "snapshot", "socket"}
	found = r.look(5, "leaks")
	r.finds("lost rows", found, want...)
	for _, f := range found {
		if f.ID != lost && f.ID != inLost {
			t.Errorf("not theirs: %+v", f)
		}
	}
	if out, _, code := r.tool("leaks"); code != 5 || !strings.Contains(out, "berthd does not run") || !strings.Contains(out, lost[:13]) {
		t.Errorf("as text: exit %d: %s", code, out)
	}
	r.finds("removed", r.look(0, "leaks", "--fix"), want...)
	r.finds("after that", r.look(0, "leaks"))
	if left, err := r.SettleIDs(r.ctx, 0, lost, inLost); err != nil || len(left) > 0 {
		t.Errorf("on the machine: %v, %v", left, err)
	}
	if g := gone(); len(g) > 0 {
		t.Errorf("what is another's: %v", g)
	}
	r.must(r.Start(r.ctx))
	if st := r.state(inKept); st.State != running {
		t.Errorf("the other container is %v", st.State)
	}
	if got := r.exec(inKept, "echo alive"); got != "alive\n" {
		t.Errorf("exec: %q", got)
	}
	r.forgiveParent(cfg)
}

// plant puts one leak of each kind on a node, as of a pod that was removed.
func (r *rig) plant(id string) {
	r.Helper()
	dir := func(parts ...string) string {
		d := filepath.Join(parts...)
		r.must(os.MkdirAll(d, 0o700))
		return d
	}
	file := func(text string, parts ...string) {
		r.must(os.WriteFile(filepath.Join(parts...), []byte(text), 0o600))
	}
	dir(r.RunDir, "pods", id)
	rootfs := dir(r.RunDir, "c", id, "rootfs")
	r.must(unix.Mount("none", rootfs, "tmpfs", 0, ""))
	file("", dir(r.RunDir, "oci", "runc", id), "state.json")
	dir(r.StateDir, "containers", id)
	l, err := net.Listen("unix", filepath.Join(r.RunDir, "s", "x"))
	r.must(err)
	r.must(errors.Join(os.Rename(filepath.Join(r.RunDir, "s", "x"), filepath.Join(r.RunDir, "s", id)), l.Close()))
	pin := filepath.Join(dir(r.RunDir, "ns", id), "net")
	file("", pin)
	r.must(unix.Mount("/proc/self/ns/net", pin, "", unix.MS_BIND, ""))
	file(id+"\r\neth0", r.Dir, "addresses", r.Name, "10.254.254.253")
	dir(r.StateDir, "layers", "99999")
	shown := dir(r.StateDir, "layers", "99998")
	r.must(unix.Mount("none", shown, "tmpfs", 0, ""))
	file("", r.StateDir, "manifests", "extract-1-1.tmp")
	dir(r.RunDir, "init", ".new-1")
	file("{", r.StateDir, "cni", "cache", "attachments", id+".json")
	file("", r.RunDir, "c", "notes.txt")
	r.must(os.MkdirAll(filepath.Join(node.Hierarchy("memory"), r.Parent, id), 0o755))
	// A runtime is known by its command line; this one waits for input.
	runc := exec.Command("sh", "-c", "read line", "--root", filepath.Join(r.RunDir, "oci", "runc"), "create", id)
	in, err := runc.StdinPipe()
	r.must(err)
	r.must(runc.Start())
	ended := make(chan struct{})
	go func() { runc.Wait(); close(ended) }()
	r.Cleanup(func() { in.Close(); <-ended })
	chain := "CNI-" + id[:24]
	for _, args := range []string{"-N " + chain, "-A " + chain + " -j ACCEPT", "-A POSTROUTING -s 203.0.113.78 -m comment --comment " + id + " -j " + chain} {
		r.must(iptables(strings.Fields(args)...))
	}
}

// TestLeaksPlanted: what is planted is found, by its kind, with a daemon and without,
// and removed but for what nobody knows.
func TestLeaksPlanted(t *testing.T) {
	t.Parallel()
	for name, up := range map[string]bool{"daemon": true, "none": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			startNode(t, node.Options{}).leaksPlanted(up)
		})
	}
}

func (r *rig) leaksPlanted(up bool) {
	pod, _ := r.pod("gone")
	r.must(r.client.Destroy(r.ctx, pod))
	r.finds("before", r.look(0, "leaks"))
	if !up {
		r.must(r.Stop(r.ctx))
	}
	gone := r.foreign()
	r.plant(pod)
	want := []string{"address", "attachment", "bundle", "cgroup", "container state", "init", "iptables", "layer manifest", "mount", "namespaces",
		"pod files", "runtime", "runtime state", "snapshot directory", "socket", "stranger"}
	r.finds("planted", r.look(5, "leaks"), want...)
	fixed := r.look(5, "leaks", "--fix")
	r.finds("fixed", fixed, want...)
	for _, f := range fixed {
		if f.Mended != (f.Kind != "stranger") {
			r.Errorf("%+v", f)
		}
	}
	left := r.look(5, "leaks")
	r.finds("left", left, "stranger")
	for _, f := range left {
		r.must(os.RemoveAll(f.What))
	}
	r.finds("after", r.look(0, "leaks"))
	if g := gone(); len(g) > 0 {
		r.Errorf("what is another's: %v", g)
	}
	if out, err := exec.Command("iptables-save", "-t", "nat").Output(); err != nil || strings.Contains(string(out), pod[:24]) {
		r.Errorf("rules: %v: %s", err, out)
	}
	if !up {
		r.must(r.Start(r.ctx))
	}
}

// TestLeaksBusy: what is being made and removed is nobody's leak.
func TestLeaksBusy(t *testing.T) {
	t.Parallel()
	r := startNode(t, node.Options{})
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for i := range 3 {
		wg.Go(func() {
			for n := 0; ; n++ {
				select {
				case <-stop:
					return
				default:
				}
				cfg := r.podConfig(fmt.Sprintf("busy-%d-%d", i, n))
				id, err := r.client.Run(r.ctx, cfg)
				if err == nil {
					_, err = r.client.Launch(r.ctx, id, node.ContainerConfig("c", refs[images.Busybox], "sleep", "300"), cfg)
				}
				if err = errors.Join(err, r.client.Destroy(r.ctx, id)); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	for range 8 {
		r.finds("a busy node", r.look(0, "leaks"))
	}
	close(stop)
	wg.Wait()
}

// TestLeaksRefused: without knowing who owns what, nothing is said nor done.
func TestLeaksRefused(t *testing.T) {
	t.Parallel()
	r := newNode(t, node.Options{})
	refuse := func(want string, code int, args ...string) {
		t.Helper()
		out, errOut, got := r.tool(args...)
		if got != code || !strings.Contains(errOut, want) || strings.Contains(out, "nothing without") {
			t.Errorf("berth %v: exit %d, %q, %q; want %d and %q", args, got, out, errOut, code, want)
		}
	}
	refuse("no berthd has run", 1, "leaks", "--fix")
	if entries, err := os.ReadDir(r.StateDir); err != nil || len(entries) > 0 {
		t.Errorf("a node was made: %v, %v", entries, err)
	}
	r.must(r.Start(r.ctx))
	out, err := exec.Command(filepath.Join(bin, "berthd"), "--config", r.Config, "--inspect", "leaks").Output()
	if err != nil || !strings.Contains(string(out), "held by another process") {
		t.Errorf("beside a daemon: %v: %s", err, out)
	}
	r.must(r.Stop(r.ctx))
	refuse("berthd not reachable", 3, "leaks", "--socket", filepath.Join(r.RunDir, "admin.sock"))
	r.must(os.WriteFile(filepath.Join(r.StateDir, "book.db"), bytes.Repeat([]byte("x"), 1<<16), 0o600))
	refuse("corrupt", 1, "leaks", "--fix")
	aside, err := filepath.Glob(filepath.Join(r.StateDir, "book.db.*"))
	if err != nil || len(aside) > 0 {
		t.Errorf("the book was set aside: %v, %v", aside, err)
	}
}
