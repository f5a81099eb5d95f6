package sandbox

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berthd/berth/cni/netns"
	"github.com/berthd/berth/shim"
	"github.com/berthd/berth/snapshotter"
	"github.com/berthd/berth/store"
)

// Check compares the book with the world and with itself, and tells of what differs:
// its pages, what it could not read, and each pod and container that is alive by its
// row with namespaces, files, network, shim, process, control group, bundle, note and
// snapshots. With repair it is put right where that is safe. Rows that the next start
// will settle by itself, after a reboot or when a container has ended while no daemon
// ran, are no deviations. The error is about looking.
func (s *Service) Check(ctx context.Context, repair bool, report store.Report) error {
	if err := store.Examine(ctx, s.check, repair, report); err != nil {
		return fmt.Errorf("check: %w", err)
	}
	s.kick() // a removal may have become due
	return nil
}

// check may be called while everything changes: a second look follows.
func (s *Service) check(ctx context.Context) ([]store.Finding, error) {
	found := s.checkBook()
	attached, err := s.deps.Network.Attachments()
	if err != nil {
		return nil, err
	}
	points, err := mountPoints()
	if err != nil {
		return nil, err
	}
	v := s.book.view()
	for _, id := range slices.Sorted(maps.Keys(v.pods)) {
		c := &checks{s: s, kind: "pod", id: id}
		c.pod(ctx, v.pods[id], attached, points)
		found = append(found, c.found...)
	}
	var all []*checks
	for _, id := range slices.Sorted(maps.Keys(v.containers)) {
		all = append(all, &checks{s: s, kind: "container", id: id})
	}
	// Side by side, as shims that do not answer take their time.
	_ = parallel(all, 32, func(c *checks) error { c.container(ctx, v, v.containers[c.id]); return nil })
	for _, c := range all {
		found = append(found, c.found...)
	}
	return found, ctx.Err()
}

// checkBook looks at the file and at what it could not read.
func (s *Service) checkBook() (found []store.Finding) {
	st := s.deps.Store
	err := st.Check()
	if err != nil {
		found = append(found, store.Finding{Kind: "book", What: st.Path(), Why: err.Error(),
			Consequence: "what it says cannot be relied on; the next start sets it aside, and finds pods and containers again by their notes",
			Remedy:      "drain the node, and restart berthd"})
	}
	if st.Rebuilt() {
		found = append(found, store.Finding{Kind: "book", What: st.Path() + " begun anew", Why: "the one before it could not be read",
			Consequence: "images have to be pulled again; layers of before stay on disk while containers of before are there",
			Remedy:      "remove those containers; then it ends by itself"})
	}
	if !errors.Is(err, unix.EIO) { // a disk that does not give a page is not asked for it again
		found = append(found, s.checkRows()...)
	}
	return append(found, s.checkQuarantine()...)
}

// checkRows looks for rows that have become unreadable since they were read.
func (s *Service) checkRows() (found []store.Finding) {
	v := s.book.view()
	for _, q := range s.deps.Store.Unreadable() {
		f := store.Finding{Kind: "row", ID: q.Key, What: q.Table, Why: q.Reason, Consequence: "what it says is lost when berthd ends or changes it",
			Remedy: "restart berthd, which puts it aside"}
		p, c := v.pods[q.Key], v.containers[q.Key]
		switch {
		case q.Table == podTable.Name() && p != nil:
			f.Remedy, f.Mend = "--repair writes it anew, as berthd still knows it", func(context.Context) error { return s.book.rewritePod(q.Key) }
		case q.Table == containerTable.Name() && c != nil:
			f.Remedy, f.Mend = "--repair writes it anew, as berthd still knows it", func(context.Context) error { return s.book.rewriteContainer(q.Key) }
		}
		found = append(found, f)
	}
	return found
}

// checkQuarantine tells of rows that were put aside. Once their objects are settled,
// restored or removed, nothing but a copy is needed of them.
func (s *Service) checkQuarantine() (found []store.Finding) {
	v, st := s.book.view(), s.deps.Store
	settled := func(q store.Quarantine) bool {
		known := v.pods[q.Key] != nil || v.containers[q.Key] != nil
		return q.Table != "snapshots" && (known || !s.cfg.Observe) // snapshots' are needed until their layers are swept
	}
	drop := func(context.Context) error {
		path := filepath.Join(s.cfg.StateDir, fmt.Sprintf("quarantine-%d.json", time.Now().UnixNano()))
		_, err := st.ForgetWithCopy(path, settled)
		return err
	}
	for _, q := range st.Quarantined() {
		f := store.Finding{Kind: "quarantine", ID: q.Key, What: cmp.Or(q.File, q.Table+" row"), Why: q.Reason, Since: q.At,
			Consequence: "what it said is lost, but for what a note or a new pull brings back",
			Remedy:      "--repair, or the next start of berthd, restores it from its note, or removes what belongs to it"}
		if settled(q) {
			f.Remedy, f.Mend = "--repair drops the entry, with a copy in "+s.cfg.StateDir, drop
		} else if q.Table == "snapshots" {
			f.Remedy = "remove the containers of before; then it ends by itself"
		}
		found = append(found, f)
	}
	return found
}

// checks collects what is found about one object.
type checks struct {
	s        *Service
	kind, id string
	found    []store.Finding
}

func (c *checks) add(what, why, consequence, remedy string, mend func(context.Context) error) {
	c.found = append(c.found, store.Finding{Kind: c.kind, ID: c.id, What: what, Why: why, Consequence: consequence, Remedy: remedy, Mend: mend})
}

// Remedies that several have.
const (
	takeAgain = "--repair records what has become of it, as a restart of berthd does"
	removePod = "remove the pod; what it belongs to makes another one"
)

// pod looks at a pod that is ready by its row.
func (c *checks) pod(ctx context.Context, p *pod, attached []string, points []mount) {
	s := c.s
	if !p.listed() || p.Stopping || p.State != StateReady || p.BootID != s.cfg.BootID {
		return
	}
	again := func(ctx context.Context) error {
		defer s.greetAll()
		return s.recoverPod(ctx, p)
	}
	if !s.pinned(p) {
		c.add("namespaces", "not all are pinned below "+filepath.Dir(s.deps.Pins.Path(p.ID, netns.Net)),
			"no container can be started in it, and its network cannot be released in full", takeAgain, again)
	}
	if p.InitPid != 0 {
		if _, status, err := s.ask(ctx, p.ID); err != nil || status != shim.StatusRunning {
			c.add("init", fmt.Sprintf("process %d shares its PIDs with the containers, and its shim says %q: %v", p.InitPid, status, err),
				"the containers are dead or about to be", takeAgain, again)
		} else if !s.deps.Pins.Pinned(p.ID, pidKind) {
			c.add("init", "its PID namespace is not pinned", "no container can be started in it", removePod, nil)
		}
	}
	for _, name := range []string{fileHosts, fileHostname, fileResolv} {
		if path := s.podFile(p.ID, name); !exists(path) {
			c.add(path, "the file is missing", "no container can be started in it", removePod, nil)
		}
	}
	shm := s.podFile(p.ID, dirShm)
	if !p.hostIPC() && !slices.ContainsFunc(points, func(m mount) bool { return m.point == shm && m.kind == "tmpfs" }) {
		c.add(shm, "nothing is mounted there", "new containers have no /dev/shm of their own", removePod, nil)
	}
	if p.Attached && !slices.Contains(attached, p.ID) {
		c.add("network", "there is no record of its attachment", "it will be released by today's configuration, which may be another one",
			"remove the pod before the configuration changes", nil)
	}
	note, err := readNote[podRow](s.podDir(p.ID))
	if err != nil || note.ID != p.ID || note.State != p.State || note.Init != p.Init || note.BootID != p.BootID || !bytes.Equal(note.Config, p.Config) {
		c.note(s.podDir(p.ID), err, func(context.Context) error { return s.writePodNote(p.ID) })
	}
}

func (c *checks) note(dir string, err error, write func(context.Context) error) {
	why := "it does not say what the row does"
	switch {
	case errors.Is(err, os.ErrNotExist):
		why = "it is missing"
	case err != nil:
		why = err.Error()
	}
	c.add(filepath.Join(dir, noteFile), why, "if the row were lost, it would be removed, or come back as it was", "--repair writes it anew", write)
}

// container looks at a container that is alive by its row.
func (c *checks) container(ctx context.Context, v *view, r *container) {
	s := c.s
	if !r.listed() {
		return
	}
	if v.pods[r.PodID] == nil {
		c.add("pod "+r.PodID, "the book has no such pod", "nobody removes the container", "--repair removes it",
			func(ctx context.Context) error { return s.destroyContainerOp(ctx, r.ID) })
		return
	}
	for _, key := range r.snapshots() {
		if _, err := s.deps.Snapshots.Stat(ctx, key); errors.Is(err, snapshotter.ErrNotFound) {
			c.add("snapshot "+key, "the book has no such snapshot", "its size is not known; layers below it are not swept", "remove the container", nil)
		}
	}
	if r.State == StateExited || r.BootID != s.cfg.BootID {
		return
	}
	if ended := c.process(ctx, r); ended {
		return
	}
	if g := s.groupOf(r); !g.Exists() {
		c.add("cgroup "+g.Path(), "there is none", "it has neither limits nor statistics", "remove the container", nil)
	}
	config := filepath.Join(s.bundleDir(r.ID), "config.json")
	if !exists(config) {
		c.add(config, "the file is missing", "commands cannot be run in it", "remove the container", nil)
	}
	note, err := readNote[containerRow](s.bundleDir(r.ID))
	if err != nil || note.ID != r.ID || note.PodID != r.PodID || note.BootID != r.BootID || !bytes.Equal(note.Config, r.Config) {
		c.note(s.bundleDir(r.ID), err, func(context.Context) error {
			if exists(s.bundleDir(r.ID)) {
				return writeNote(s.bundleDir(r.ID), r.containerRow)
			}
			return nil
		})
	}
}

// process asks the shim, as the start of a daemon does, and tells whether the
// container is not alive any more.
func (c *checks) process(ctx context.Context, r *container) (ended bool) {
	s := c.s
	o := observed{sameBoot: true}
	pid := 0
	var asked error
	pid, o.status, asked = s.ask(ctx, r.ID)
	if e, err := shim.ReadExit(s.exitFile(r.ID)); err == nil {
		o.exit = &e
	} else if asked != nil {
		o.unsure = s.shimLives(r.ID)
	}
	if o.exit != nil && s.cfg.Observe {
		return true // the next start takes it from the record
	}
	again := func(ctx context.Context) error {
		defer s.greetAll()
		return s.recoverContainer(ctx, r)
	}
	v := decideContainer(r.containerRow, o, time.Now())
	switch {
	case v.ask:
		c.add("shim", fmt.Sprintf("it does not answer: %v", asked), "stop, exec and attach wait for it", fmt.Sprintf("look at process %d", r.ShimPid), nil)
	case v.state == StateExited && o.exit == nil:
		c.add("shim", "it is gone and has left no exit record", fmt.Sprintf("the container counts as %s, and nobody starts it again", r.State), takeAgain, again)
	case v.state != r.State:
		c.add("state", fmt.Sprintf("the row says %s, and it is %s", r.State, v.state), "the kubelet is told a wrong state", takeAgain, again)
	case pid != 0 && errors.Is(unix.Kill(pid, 0), unix.ESRCH):
		c.add("process", fmt.Sprintf("process %d is gone, and its shim has not noticed", pid), "the container counts as "+string(r.State), "remove the container", nil)
	}
	return v.state == StateExited
}

// ask asks a shim how its container is: over the connection that is there, or over
// one for the moment.
func (s *Service) ask(ctx context.Context, id string) (pid int, status string, err error) {
	ctx, cancel := context.WithTimeout(ctx, connectLimit)
	defer cancel()
	var client *shim.Client
	if h := s.live.get(id); h != nil && h.alive() {
		client = h.client
	} else {
		if client, err = shim.Connect(ctx, s.socket(id)); err != nil {
			return 0, "", err
		}
		defer client.Close()
	}
	st, err := client.State(ctx)
	return st.Pid, st.Status, err
}
