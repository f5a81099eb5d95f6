package crash

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berthd/berth/test/node"
)

// about returns the findings about an object, or with "" all, and wants each to say
// what comes of it and what to do.
func (r *rig) about(all []finding, id string) (of []finding) {
	r.Helper()
	for _, f := range all {
		if f.Why == "" || f.Consequence == "" || f.Remedy == "" && !f.Mended {
			r.Errorf("says too little: %+v", f)
		}
		if id == "" || f.ID == id {
			of = append(of, f)
		}
	}
	return of
}

// deviates checks that there is a deviation of the object that names each of the words.
func (r *rig) deviates(all []finding, id string, words ...string) {
	r.Helper()
	of := r.about(all, id)
	for _, w := range words {
		found := false
		for _, f := range of {
			found = found || strings.Contains(f.What+": "+f.Why, w)
		}
		if !found {
			r.Errorf("nothing about %q of %.12s: %+v", w, id, all)
		}
	}
	if len(of) != len(words) {
		r.Errorf("%d deviations of %.12s, want %d: %+v", len(of), id, len(words), of)
	}
}

// checkup is look for "check", without the containers of shims that a busy machine
// keeps from an answer in time: they are healthy. stuck is the one that is not, or "".
func (r *rig) checkup(code int, stuck string, args ...string) []finding {
	r.Helper()
	all, got, text := r.findings(append([]string{"check"}, args...)...)
	found := slices.DeleteFunc(slices.Clone(all), func(f finding) bool {
		return f.ID != stuck && strings.HasPrefix(f.Why, "it does not answer") && strings.HasSuffix(f.What, "shim")
	})
	if len(found) < len(all) {
		r.Logf("shims were slow: %+v", all)
		if code == 0 {
			code = 5
		}
	}
	if got != code {
		r.Fatalf("berth check %s: exit %d, want %d: %s", strings.Join(args, " "), got, code, text)
	}
	return found
}

// agrees waits until the tool finds no deviation, and returns its text.
func (r *rig) agrees() (text string) {
	r.Helper()
	r.until("agreement", func() bool {
		out, _, code := r.tool("check")
		text = out
		return code == 0
	})
	return text
}

// rot changes a byte of everything in the book that has the text.
func (r *rig) rot(text string) {
	r.Helper()
	f, err := os.OpenFile(filepath.Join(r.StateDir, "book.db"), os.O_RDWR, 0)
	r.must(err)
	defer f.Close()
	b, err := os.ReadFile(f.Name())
	r.must(err)
	n := 0
	for at := 0; ; n++ {
		i := bytes.Index(b[at:], []byte(text))
		if i < 0 {
			break
		}
		_, err := f.WriteAt([]byte{b[at+i] ^ 1}, int64(at+i))
		r.must(err)
		at += i + len(text)
	}
	if n == 0 {
		r.Fatalf("%q is not in the book", text)
	}
}

// TestCheckRunning: what is damaged under a daemon is found, and put right as far as
// that goes.
func TestCheckRunning(t *testing.T) {
	t.Parallel()
	r := startNode(t, node.Options{})
	a, cfgA := r.pod("a")
	inA := r.launch(a, cfgA, "in-a", "sleep", "300")
	rotten := r.launch(a, cfgA, "rotten", "sleep", "300")
	b, cfgB := r.pod("b")
	inB := r.launch(b, cfgB, "in-b", "sleep", "300")
	if found := r.checkup(0, ""); len(found) > 0 {
		t.Errorf("a healthy node: %+v", found)
	}
	if out := r.agrees(); !strings.Contains(out, "book and node agree") {
		t.Errorf("as text: %s", out)
	}
	notes := filepath.Join(r.RunDir, "pods", a, "note.json")
	hosts := filepath.Join(r.RunDir, "pods", a, "hosts")
	r.must(errors.Join(os.Remove(notes), os.Remove(hosts),
		os.WriteFile(filepath.Join(r.RunDir, "c", inA, "note.json"), []byte("{}"), 0o600),
		os.Rename(filepath.Join(r.RunDir, "c", inA, "config.json"), filepath.Join(r.RunDir, "c", inA, "config.old")),
		unix.Unmount(filepath.Join(r.RunDir, "ns", b, "ipc"), unix.MNT_DETACH)))
	// The name of its log is in no other row.
	r.rot(filepath.Base(r.state(rotten).LogPath))
	found := r.checkup(5, "")
	r.deviates(found, a, "note.json: it is missing", "hosts: the file is missing")
	r.deviates(found, inA, "note.json: it does not say", "config.json: the file is missing")
	r.deviates(found, b, "namespaces: not all are pinned")
	r.deviates(found, rotten, "containers: checksum")
	if out, _, code := r.tool("check"); code != 5 || !strings.Contains(out, "consequence: ") || !strings.Contains(out, "remedy: remove the pod") {
		t.Errorf("as text: exit %d: %s", code, out)
	}
	for _, f := range r.checkup(5, "", "--repair") {
		if f.Mended != (f.Kind == "row" || strings.Contains(f.What, "note.json") || f.What == "namespaces") || f.Error != "" {
			t.Errorf("after the repair: %+v", f)
		}
	}
	r.until("end of a pod without its namespaces", func() bool {
		st, err := r.client.PodSandboxStatus(r.ctx, &runtime.PodSandboxStatusRequest{PodSandboxId: b})
		r.must(err)
		return st.Status.State != ready && r.state(inB).State == exited
	})
	r.must(errors.Join(os.WriteFile(hosts, nil, 0o644),
		os.Rename(filepath.Join(r.RunDir, "c", inA, "config.old"), filepath.Join(r.RunDir, "c", inA, "config.json"))))
	r.agrees()
	// What was rotten can be read by the next daemon.
	r.must(r.Restart(r.ctx))
	for _, id := range []string{inA, rotten} {
		if st := r.state(id); st.State != running {
			t.Errorf("container %s is %v", st.Metadata.Name, st.State)
		}
	}
	if found := r.checkup(0, ""); len(found) > 0 {
		t.Errorf("after a restart: %+v", found)
	}
}

// TestCheckStuckShim: a shim that does not answer is a deviation of its container only.
func TestCheckStuckShim(t *testing.T) {
	t.Parallel()
	r := startNode(t, node.Options{})
	pod, cfg := r.pod("a")
	stuck := r.launch(pod, cfg, "stuck", "sleep", "300")
	r.launch(pod, cfg, "other", "sleep", "300")
	pid := r.shimPid(stuck)
	r.must(unix.Kill(pid, unix.SIGSTOP))
	found := r.checkup(5, stuck, "--repair")
	r.must(unix.Kill(pid, unix.SIGCONT))
	r.deviates(found, stuck, "shim: it does not answer")
	r.deviates(found, "", "shim: it does not answer")
	r.agrees()
}

// hasEnded tells whether a process is no more, whether or not its parent, which may
// be any init, has asked for its exit code.
func hasEnded(pid int) bool {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	return err != nil && errors.Is(unix.Kill(pid, 0), unix.ESRCH) || strings.Contains(string(text), "\nState:\tZ")
}

// TestCheckStopped: without a daemon nothing is changed by a look, what the next start
// settles is no deviation, and a repair does what a start does.
func TestCheckStopped(t *testing.T) {
	t.Parallel()
	r := startNode(t, node.Options{})
	a, cfgA := r.pod("a")
	ends := r.launch(a, cfgA, "ends", "sh", "-c", "sleep 300; exit 3")
	lost := r.launch(a, cfgA, "lost", "sleep", "300")
	unreadable := r.launch(a, cfgA, "unreadable", "sleep", "300")
	unlisted := r.launch(a, cfgA, "unlisted", "sleep", "300")
	b, cfgB := r.pod("b")
	orphan := r.launch(b, cfgB, "orphan", "sleep", "300")
	r.must(r.Stop(r.ctx))
	r.until("exit record", func() bool {
		for _, pid := range r.processes(ends) {
			if text, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid)); err == nil && strings.HasPrefix(string(text), "sleep\x00") {
				unix.Kill(pid, unix.SIGKILL)
			}
		}
		_, err := os.Stat(filepath.Join(r.StateDir, "containers", ends, "exit"))
		return err == nil
	})
	if found := r.checkup(0, ""); len(found) > 0 {
		t.Errorf("nothing but an exit has happened: %+v", found)
	}
	shim := r.shimPid(lost)
	r.must(unix.Kill(shim, unix.SIGKILL))
	r.until("end of a shim", func() bool { return hasEnded(shim) })
	r.edit("containers", unreadable, func(row map[string]any) { row["State"] = 7 })
	var parent string
	r.edit("snapshots", unlisted, func(row map[string]any) { parent = row["Parent"].(string) })
	r.removeRow("snapshot-children", parent+"\x00"+unlisted)
	r.removeRow("pods", b)
	book := filepath.Join(r.StateDir, "book.db")
	before, err := os.ReadFile(book)
	r.must(err)
	found := r.checkup(5, "")
	r.deviates(found, lost, "shim: it is gone")
	r.deviates(found, unreadable, "containers row: json")
	r.deviates(found, unlisted, "index of children: it is on")
	r.deviates(found, orphan, "the book has no such pod")
	if after, err := os.ReadFile(book); err != nil || !bytes.Equal(before, after) {
		t.Errorf("the book has changed: %v", err)
	}
	for _, f := range r.checkup(0, "", "--repair") {
		if !f.Mended {
			t.Errorf("after the repair: %+v", f)
		}
	}
	if found := r.checkup(0, ""); len(found) > 0 {
		t.Errorf("a second look: %+v", found)
	}
	r.finds("and nothing is left over", r.look(0, "leaks"))
	copies, err := filepath.Glob(filepath.Join(r.StateDir, "quarantine-*.json"))
	if err != nil || len(copies) != 1 {
		t.Fatalf("copies of the quarantine: %v, %v", copies, err)
	}
	if text, err := os.ReadFile(copies[0]); err != nil || !strings.Contains(string(text), unreadable) {
		t.Errorf("copy: %v: %s", err, text)
	}
	r.must(os.Remove(copies[0]))
	r.must(r.Start(r.ctx))
	for id, code := range map[string]int32{ends: 3, lost: 255} {
		if st := r.state(id); st.State != exited || st.ExitCode != code {
			t.Errorf("container %s: %v, %d", st.Metadata.Name, st.State, st.ExitCode)
		}
	}
	for _, id := range []string{unreadable, unlisted} {
		if got := r.exec(id, "echo alive"); got != "alive\n" {
			t.Errorf("exec: %q", got)
		}
	}
	r.forgiveParent(cfgB)
}

// TestCheckBook: a book that cannot be read is told, left as it is, and with repair set
// aside and made anew from the notes.
func TestCheckBook(t *testing.T) {
	t.Parallel()
	r := startNode(t, node.Options{})
	pod, cfg := r.pod("a")
	id := r.launch(pod, cfg, "c", "sleep", "300")
	r.must(r.Kill())
	book := filepath.Join(r.StateDir, "book.db")
	r.must(os.WriteFile(book, bytes.Repeat([]byte("x"), 1<<16), 0o600))
	found := r.checkup(5, "")
	r.deviates(found, "", "corrupt")
	if aside, err := filepath.Glob(book + ".*"); err != nil || len(aside) > 0 {
		t.Errorf("set aside by a look: %v, %v", aside, err)
	}
	for _, f := range r.checkup(5, "", "--repair") {
		if !f.Mended && !strings.Contains(f.What, "begun anew") && f.Kind != "snapshot" && f.Kind != "container" && f.Kind != "image" {
			t.Errorf("after the repair: %+v", f)
		}
	}
	r.must(r.Start(r.ctx))
	if got := r.exec(id, "echo alive"); got != "alive\n" {
		t.Errorf("exec: %q", got)
	}
	found = r.checkup(5, "")
	r.deviates(found, id, "snapshot "+id)
	r.deviates(found, "", "begun anew", "snapshot "+id, "row: containers were made from it")
	r.must(r.client.Destroy(r.ctx, pod))
	r.agrees()
	for _, pattern := range []string{"book.db.corrupt-*", "quarantine-*.json"} {
		files, err := filepath.Glob(filepath.Join(r.StateDir, pattern))
		if err != nil || len(files) != 1 {
			t.Errorf("%s: %v, %v", pattern, files, err)
		}
		for _, f := range files {
			r.must(os.Remove(f))
		}
	}
}
