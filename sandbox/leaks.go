package sandbox

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/berthd/berth/cni"
	"github.com/berthd/berth/cni/netns"
	"github.com/berthd/berth/shim"
	"github.com/berthd/berth/snapshotter"
	"github.com/berthd/berth/store"
)

// ErrUnsettled: who owns what is not known before a daemon has read the notes.
var ErrUnsettled = errors.New("the book was begun anew and no berthd has started with it since")

// kindAttachment is the kind of what the network plugins have to release.
const kindAttachment = "attachment"

// networkKinds are the kinds of findings whose removal runs network plugins.
var networkKinds = []string{kindAttachment, cni.TraceAddress, cni.TraceRules}

// maxCommand bounds what is read of a command line, in bytes. A process can make its
// own as large as its address space (PR_SET_MM_MAP of prctl(2)).
const maxCommand = 64 << 10

const (
	whyUnknown = "its ID is not in the book"
	whyOurs    = "its ID is one of this berthd's, and not in the book"
)

// Leaks tells of everything that was made for pods and containers, or by this
// package for itself, and that nobody owns; with fix it is removed where that is
// safe. What operations under way are making is owned by them. The error is about
// looking, or about what could not be looked at.
func (s *Service) Leaks(ctx context.Context, fix bool, report store.Report) error {
	if s.cfg.Observe && s.deps.Store.Rebuilt() {
		return fmt.Errorf("leaks: %w", ErrUnsettled)
	}
	var blind error // of the last look
	found, err := store.Confirm(ctx, store.SecondLook, func(ctx context.Context) (found []store.Finding, _ error) {
		found, blind = s.leaks(ctx)
		return found, ctx.Err()
	})
	if err != nil {
		return fmt.Errorf("leaks: %w", err)
	}
	if fix {
		s.sweepMu.Lock()
		defer s.sweepMu.Unlock()
	}
	err = store.Tell(ctx, found, fix, report)
	if fix && err == nil && len(found) > 0 && len(s.noted) == 0 { // whether those are attached only their notes say
		err = s.collectNetwork(ctx)
	}
	if err = errors.Join(blind, err); err != nil {
		return fmt.Errorf("leaks: %w", err)
	}
	return nil
}

func (s *Service) leaks(ctx context.Context) ([]store.Finding, error) {
	found := s.rowLeaks()
	left, err := s.leftovers(ctx)
	found = append(found, left...)
	own, err2 := s.ownLeaks(ctx)
	return append(found, own...), errors.Join(err, err2)
}

// known tells whether a pod or container has the ID, also one whose row will be
// read from its note by the next daemon.
func (s *Service) known(id string) bool {
	v := s.book.view()
	return v.pods[id] != nil || v.containers[id] != nil || s.noted[id]
}

// rowLeaks are rows that nobody works on and nobody can see: of objects that were
// not made to the end, and of those whose removal has not succeeded.
func (s *Service) rowLeaks() []store.Finding {
	var found []store.Finding
	// First the rows, then the operations, then the rows again: what is made or
	// removed now is either in operation or has changed.
	v := s.book.view()
	add := func(kind, id, why string, created int64, busy bool, mend func(context.Context) error) {
		if !busy {
			found = append(found, store.Finding{Kind: "row", ID: id, What: kind, Why: why, Since: time.Unix(0, created), Mend: mend})
		}
	}
	for id, p := range v.pods {
		if p.listed() {
			continue
		}
		busy := s.ops.active("run pod", podKey(p.config)) || s.ops.active("remove pod", id) || s.ops.active("stop pod", id)
		now := s.book.view().pods[id]
		add("pod", id, whyUnlisted(p.Removing, p.Failure), p.Created, busy || now == nil || now.Rev != p.Rev,
			func(ctx context.Context) error { return s.destroyPodOp(ctx, id) })
	}
	for id, c := range v.containers {
		why := "its pod is not in the book"
		if !c.listed() {
			why = whyUnlisted(c.Removing, c.Failure)
		} else if v.pods[c.PodID] != nil {
			continue
		}
		busy := s.ops.active("create container", containerKey(c.PodID, c.config)) || s.ops.active("remove container", id) || s.ops.active("remove pod", c.PodID)
		now := s.book.view().containers[id]
		add("container", id, why, c.Created, busy || now == nil || now.Rev != c.Rev,
			func(ctx context.Context) error { return s.destroyContainerOp(ctx, id) })
	}
	return found
}

// whyUnlisted tells why a row is not listed: it is being removed, or else made.
func whyUnlisted(removing bool, failure string) string {
	if !removing {
		return "it was not made to the end, and no operation is at it"
	}
	return "its removal was begun and has not succeeded: " + cmp.Or(failure, "the daemon ended in between")
}

// leftovers are what is there and is not in the book: set differences, one for each
// kind of effect, in the order in which they are to be removed. What is there is
// looked at first and the book then, as rows come before all else and go after it.
func (s *Service) leftovers(ctx context.Context) ([]store.Finding, error) {
	l := &leftovers{s: s}
	var errs []error
	for _, look := range []func(context.Context) error{
		l.shims, l.runtimes, l.states, l.mounts, l.directories, l.snapshots, l.attachments, l.traces, l.pins, l.podFiles, l.cgroups,
	} {
		errs = append(errs, look(ctx))
	}
	return l.found, errors.Join(errs...)
}

// leftovers collects findings.
type leftovers struct {
	s       *Service
	foreign map[string]int // shims of all berthds, by ID; read once
	found   []store.Finding
}

func (l *leftovers) add(kind, id, what, why string, since time.Time, mend func(context.Context) error) {
	if validID(id) && !l.s.known(id) {
		l.found = append(l.found, store.Finding{Kind: kind, ID: id, What: what, Why: why, Since: since, Mend: mend})
	}
}

// ours tells whether an ID that was found where other runtimes have theirs as well
// is one of this berthd.
func (l *leftovers) ours(id string) bool {
	if !l.s.ids.made(id) {
		return false
	}
	if l.foreign == nil {
		l.foreign, _ = shim.ListShims("/") // without the list nobody is spared but by the sum
	}
	pid, lives := l.foreign[id]
	return !lives || shim.Is(pid, l.s.socket(id), id)
}

func (l *leftovers) shims(context.Context) error {
	shims, err := shim.ListShims(filepath.Join(l.s.cfg.RunDir, "s"))
	for id, pid := range shims {
		l.add("shim", id, fmt.Sprintf("process %d", pid), whyUnknown, processStart(pid),
			func(ctx context.Context) error { return l.s.endShim(ctx, id, pid) })
	}
	return err
}

// roots are the directories with the state of OCI runtimes, also of those that left
// the configuration.
func (s *Service) roots() []ociRuntime {
	handlers := names(filepath.Join(s.cfg.RunDir, "oci"))
	for name := range s.runtimes {
		handlers = append(handlers, name)
	}
	slices.Sort(handlers)
	var out []ociRuntime
	for _, name := range slices.Compact(handlers) {
		out = append(out, s.runtimeOf(name, rowRuntime{}, ""))
	}
	return out
}

func (l *leftovers) states(context.Context) error {
	for _, rt := range l.s.roots() {
		for _, id := range rt.ids() {
			if l.s.ownState(rt, id) {
				path := filepath.Join(rt.root, id)
				l.add("runtime state", id, path, whyUnknown, madeAt(path), func(ctx context.Context) error { return l.s.deleteState(ctx, rt, id) })
			}
		}
	}
	return nil
}

// deleteState has the runtime forget a container of which nothing else is known. What
// it cannot read itself is removed by hand when nothing runs any more.
func (s *Service) deleteState(ctx context.Context, rt ociRuntime, id string) error {
	err := rt.delete(ctx, id)
	if err == nil {
		return nil
	}
	groups, _ := s.hier.Find(func(name string) bool { return name == id })
	for _, g := range groups {
		if procs, e := g.Procs(); e != nil || len(procs) > 0 {
			return err
		}
	}
	return rt.forget(ctx, id, err)
}

// runtimes are OCI runtimes at work on containers that are not there.
func (l *leftovers) runtimes(context.Context) error {
	roots := l.s.roots()
	own, err := os.Readlink("/proc/self/ns/pid")
	if err != nil {
		return err
	}
	for _, name := range names("/proc") {
		pid, err := strconv.Atoi(name)
		if err != nil {
			continue
		}
		// A process in a container can choose its command line, how large that is and
		// how long it takes to read it, but not this.
		if ns, err := os.Readlink("/proc/" + name + "/ns/pid"); err != nil || ns != own {
			continue
		}
		text, err := commandLine(pid)
		args := strings.Split(string(text), "\x00")
		i := slices.Index(args, "--root")
		if err != nil || i < 0 || i+1 >= len(args) {
			continue
		}
		at := slices.IndexFunc(roots, func(rt ociRuntime) bool { return rt.root == args[i+1] })
		last := slices.IndexFunc(args, validID)
		if at < 0 || last < 0 {
			continue
		}
		id := args[last]
		if filepath.Dir(roots[at].root) == filepath.Join(l.s.cfg.RunDir, "oci") || l.ours(id) {
			l.add("runtime", id, fmt.Sprintf("process %d: %s", pid, clip(strings.Join(args, " "))), whyUnknown, processStart(pid),
				func(context.Context) error { return killCommand(pid, text) })
		}
	}
	return nil
}

func (l *leftovers) directories(context.Context) error {
	for _, d := range []struct {
		kind, dir string
		mend      func(id string) error
	}{
		{"socket", filepath.Join(l.s.cfg.RunDir, "s"), func(id string) error { return os.RemoveAll(l.s.socket(id)) }},
		{"bundle", filepath.Join(l.s.cfg.RunDir, "c"), l.s.removeBundle},
		{"container state", filepath.Join(l.s.cfg.StateDir, "containers"), func(id string) error { return removeUnmounted(l.s.stateDir(id)) }},
	} {
		l.each(d.kind, d.dir, d.mend)
	}
	return nil
}

func (l *leftovers) podFiles(context.Context) error {
	l.each("pod files", filepath.Join(l.s.cfg.RunDir, "pods"), l.s.removePodFiles)
	return nil
}

// each adds the entries of a directory whose names are IDs.
func (l *leftovers) each(kind, dir string, mend func(id string) error) {
	for _, id := range names(dir) {
		path := filepath.Join(dir, id)
		l.add(kind, id, path, whyUnknown, madeAt(path), func(context.Context) error { return mend(id) })
	}
}

func (l *leftovers) snapshots(ctx context.Context) error {
	if l.s.deps.Store.Rebuilt() {
		return nil
	}
	var all []snapshotter.Info
	err := l.s.deps.Snapshots.Walk(ctx, func(_ context.Context, i snapshotter.Info) error {
		if i.Kind != snapshotter.KindCommitted {
			all = append(all, i)
		}
		return nil
	})
	for _, i := range all {
		l.add("snapshot", snapshotOwner(i.Name), i.Name, whyUnknown, i.Created, func(ctx context.Context) error {
			if err := l.s.deps.Snapshots.Remove(ctx, i.Name); !errors.Is(err, snapshotter.ErrNotFound) {
				return err
			}
			return nil
		})
	}
	return err
}

// pins also tells of the interfaces on the host that go with a network namespace.
func (l *leftovers) pins(context.Context) error {
	ids, err := l.s.deps.Pins.List()
	for _, id := range ids {
		path := filepath.Dir(l.s.deps.Pins.Path(id, pidKind))
		why := whyUnknown
		if !l.s.known(id) {
			if peers, err := l.s.deps.Pins.Peers(id); err == nil && len(peers) > 0 {
				why += "; with it go the interfaces " + strings.Join(peers, ", ")
			}
		}
		l.add("namespaces", id, path, why, madeAt(path), func(context.Context) error { return l.s.deps.Pins.Destroy(id) })
	}
	return err
}

// mounts are those in directories of IDs, so that what removes these does not
// reach through them. Pins and shm go with their directories; the former not before
// the network is released.
func (l *leftovers) mounts(context.Context) error {
	points, err := mountPoints()
	for _, m := range slices.Backward(points) { // the last one is on top
		rel, below := strings.CutPrefix(m.point, l.s.cfg.RunDir+"/")
		if !below {
			continue
		}
		parts := strings.Split(rel, "/")
		shm := parts[0] == "pods" && len(parts) == 3 && parts[2] == dirShm
		if i := slices.IndexFunc(parts, validID); i >= 0 && parts[0] != "ns" && !shm {
			l.add("mount", parts[i], m.point, whyUnknown, time.Time{}, func(context.Context) error { return netns.UnmountAll(m.point) })
		}
	}
	return err
}

// mount is a line of proc_pid_mountinfo(5).
type mount struct{ point, kind, options string }

func mountPoints() ([]mount, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	unescape := strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)
	var out []mount
	sc := bufio.NewScanner(io.LimitReader(f, maxMountTab))
	sc.Buffer(nil, 1<<20)
	for sc.Scan() {
		before, after, ok := strings.Cut(sc.Text(), " - ")
		fields, tail := strings.Fields(before), strings.Fields(after)
		if ok && len(fields) > 5 && len(tail) > 2 {
			out = append(out, mount{unescape.Replace(fields[4]), tail[0], tail[2]})
		}
	}
	return out, sc.Err()
}

// removeUnmounted removes a directory with all that is in it, but not what somebody has
// mounted there: that it unmounts first.
func removeUnmounted(dir string) error {
	points, err := mountPoints()
	if err != nil {
		return fmt.Errorf("remove %s: mounts: %w", dir, err)
	}
	for _, m := range slices.Backward(points) {
		if within(m.point, dir) {
			if err := netns.UnmountAll(m.point); err != nil {
				return err
			}
		}
	}
	return os.RemoveAll(dir)
}

func (l *leftovers) attachments(context.Context) error {
	ids, err := l.s.deps.Network.Attachments()
	for _, id := range ids {
		l.add(kindAttachment, id, "to a network", whyUnknown, time.Time{},
			func(ctx context.Context) error { return l.s.deps.Network.Detach(ctx, cni.Pod{ID: id}) })
	}
	return err
}

// traces are what network plugins keep by ID where other runtimes' plugins do, too.
func (l *leftovers) traces(ctx context.Context) error {
	traces, err := l.s.deps.Network.Traces(ctx)
	for _, t := range traces {
		switch {
		case t.PodID == "":
			l.found = append(l.found, store.Finding{Kind: t.Kind, What: t.What, Why: "it names no pod, and nobody else can have made it", Since: t.Since, Mend: t.Remove})
		case l.ours(t.PodID):
			l.add(t.Kind, t.PodID, t.What, whyOurs, t.Since, t.Remove)
		}
	}
	return err
}

func (l *leftovers) cgroups(context.Context) error {
	groups, ids := l.s.hier.Find(validID)
	for i, g := range groups {
		if !l.ours(ids[i]) || g.Foreign() { // of a berthd in another PID namespace, as it may be
			continue
		}
		what := g.Path()
		if procs, err := g.Procs(); err == nil && len(procs) > 0 {
			what += fmt.Sprintf(", with %d processes", len(procs))
		}
		l.add("cgroup", ids[i], what, whyOurs, madeAt(g.Dirs()[0]), func(ctx context.Context) error {
			g.Thaw() // else SIGKILL would be in vain
			if !g.Exists() {
				return nil
			}
			if err := killGroup(ctx, g); err != nil {
				return fmt.Errorf("cgroup: %w", err)
			}
			return g.Remove()
		})
	}
	return nil
}
