package sandbox

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"k8s.io/klog/v2"

	"github.com/berthd/berth/cni/netns"
	"github.com/berthd/berth/shim"
	"github.com/berthd/berth/store"
)

// observed is what is found of a container or an init after a restart.
type observed struct {
	sameBoot bool
	status   string     // the shim's word, "" if no shim answers
	unsure   bool       // there is a shim, but it does not answer now
	exit     *shim.Exit // the exit record, if there is one
}

// verdict is what is to be done about an object.
type verdict struct {
	destroy bool
	state   State     // the state it is in; "" leaves it
	exit    shim.Exit // with StateExited
	end     bool      // kill what is left of it first
	ask     bool      // go on asking its shim
}

// decideContainer is the whole of recovery's wisdom about containers.
func decideContainer(r containerRow, o observed, now time.Time) verdict {
	switch {
	case r.Removing || r.State == StateCreating:
		return verdict{destroy: true}
	case r.State == StateExited:
		return verdict{}
	case o.exit != nil:
		return verdict{state: StateExited, exit: *o.exit, end: !o.sameBoot}
	case !o.sameBoot:
		return verdict{state: StateExited, exit: shim.Exit{Code: codeUnknown, At: now, Reason: "the node was rebooted"}}
	case o.unsure:
		return verdict{state: r.State, ask: true}
	case o.status == shim.StatusRunning:
		return verdict{state: StateRunning}
	case o.status == shim.StatusCreated:
		return verdict{state: StateCreated}
	case o.status == shim.StatusExited:
		// The record is on its way: the shim tells when it is there.
		return verdict{state: r.State}
	}
	return verdict{state: StateExited, end: true,
		exit: shim.Exit{Code: codeUnknown, At: now, Reason: reasonLost}}
}

// podObserved is what is found of a pod after a restart.
type podObserved struct {
	sameBoot bool
	pinned   bool   // all its namespaces are there
	init     string // the word of its init's shim
}

// podVerdict is what is to be done about a pod.
type podVerdict struct {
	destroy, teardown bool
	notReady          string // why the pod is not ready any more
}

func decidePod(r podRow, o podObserved) podVerdict {
	switch {
	case r.Removing || r.State == StateCreating:
		return podVerdict{destroy: true}
	case r.Torn:
		return podVerdict{}
	case !o.sameBoot:
		return podVerdict{teardown: true, notReady: "the node was rebooted"}
	case r.Stopping:
		return podVerdict{teardown: true, notReady: "stopped"}
	case !o.pinned:
		return podVerdict{teardown: true, notReady: "its namespaces are gone"}
	case r.State == StateReady && r.InitPid != 0 && o.init != shim.StatusRunning:
		return podVerdict{notReady: "its init is gone"}
	}
	return podVerdict{}
}

// endLimit bounds how long the start waits for the end of what a lost shim has
// left.
const endLimit = 5 * time.Second

// connectLimit bounds how long a shim may take to answer a new daemon.
const connectLimit = 3 * time.Second

// recover compares the book with the machine. Everything that a reader can see
// is right when it returns; what is to be undone is left to the janitor.
func (s *Service) recover(ctx context.Context) error {
	log := klog.FromContext(ctx)
	begun := time.Now()
	if s.deps.Store.Rebuilt() {
		if err := s.rebuild(ctx); err != nil {
			return err
		}
	}
	err := s.book.load()
	if err != nil {
		return err
	}
	if s.restore(ctx) > 0 {
		if err := s.book.load(); err != nil {
			return err
		}
	}
	v := s.book.view()
	containers := make([]*container, 0, len(v.containers))
	for _, c := range v.containers {
		containers = append(containers, c)
	}
	pods := make([]*pod, 0, len(v.pods))
	for _, p := range v.pods {
		pods = append(pods, p)
		p.reserveLabels()
	}
	err = errors.Join(
		parallel(containers, 32, func(c *container) error { return s.recoverContainer(ctx, c) }),
		parallel(pods, 32, func(p *pod) error { return s.recoverPod(ctx, p) }))
	if err != nil {
		// Not fatal: a node with a full disk has to come up to be emptied.
		log.Error(err, "Some states are not recorded yet")
	}
	log.Info("State recovered", "pods", len(pods), "containers", len(containers), "took", time.Since(begun))
	s.kick()
	return nil
}

func (s *Service) recoverContainer(ctx context.Context, c *container) error {
	o := s.observe(ctx, c.ID, c.BootID, s.exitFile(c.ID), c.State)
	v := decideContainer(c.containerRow, o, time.Now())
	if s.book.view().pods[c.PodID] == nil {
		v = verdict{destroy: true} // its pod was lost, and is swept
	}
	if v.destroy || v.state == "" {
		return s.markRemoving(c, v.destroy)
	}
	if v.ask {
		s.bg.Go(func() { s.shimLost(s.ctx, c.ID, nil) })
		return nil
	}
	if v.end {
		end, cancel := context.WithTimeout(ctx, endLimit)
		defer cancel()
		if err := s.endContainer(end, c); err != nil && o.sameBoot {
			klog.FromContext(ctx).Error(err, "Rest of a container is not ended yet", "containerID", c.ID)
			s.bg.Go(func() { s.shimLost(s.ctx, c.ID, nil) })
			return nil
		}
	}
	if client := s.live.get(c.ID); client != nil && v.state == StateCreated {
		s.bg.Go(func() { s.settle(s.ctx, c.ID, client.client) })
	}
	if v.state == c.State {
		return nil
	}
	if v.state == StateExited {
		s.missed.Store(c.ID, true)
	}
	_, err := s.book.updateContainer(c.ID, func(_ *store.Tx, r *containerRow) error {
		switch {
		case r.State == StateExited: // the watch was faster
		case v.state == StateExited:
			applyExit(r, v.exit)
		default:
			r.State = v.state
			if v.state == StateRunning {
				r.Reason, r.Message = "", ""
				if r.Started == 0 {
					r.Started = after(r.Created)
				}
			}
		}
		return nil
	})
	if err != nil && v.state == StateExited {
		s.bg.Go(func() { s.markEnded(c.ID, v.exit) })
	}
	return err
}

// restore puts the notes of objects into the book whose rows were unreadable, and
// returns how many. One without a note is swept with all that belongs to it.
func (s *Service) restore(ctx context.Context) (n int) {
	log := klog.FromContext(ctx)
	v := s.book.view()
	for _, q := range s.deps.Store.Quarantined() {
		var err error
		switch {
		case !validID(q.Key):
			continue
		case q.Table == podTable.Name() && v.pods[q.Key] == nil:
			err = restoreRow(s.deps.Store, podTable, q.Key, s.podDir(q.Key), func(r podRow) error {
				_, err := decodePod(r)
				return err
			})
		case q.Table == containerTable.Name() && v.containers[q.Key] == nil:
			err = restoreRow(s.deps.Store, containerTable, q.Key, s.bundleDir(q.Key), func(r containerRow) error {
				_, err := decodeContainer(r)
				return err
			})
		default:
			continue
		}
		switch {
		case err == nil:
			n++
			log.Info("Row restored from its note", "table", q.Table, "id", q.Key, "reason", q.Reason)
		case errors.Is(err, os.ErrNotExist):
		default:
			log.Error(err, "Row not restored", "table", q.Table, "id", q.Key, "reason", q.Reason)
		}
	}
	return n
}

// markRemoving hides an object that is to be destroyed; the janitor does it.
func (s *Service) markRemoving(c *container, destroy bool) error {
	if !destroy || c.Removing {
		return nil
	}
	_, err := s.book.updateContainer(c.ID, func(_ *store.Tx, r *containerRow) error { r.Removing = true; return nil })
	if err != nil {
		s.retryUndo(c.ID)
	}
	return err
}

func (s *Service) recoverPod(ctx context.Context, p *pod) error {
	o := podObserved{sameBoot: p.BootID == s.cfg.BootID, pinned: s.pinned(p)}
	if p.Init && o.sameBoot {
		init := s.observe(ctx, p.ID, p.BootID, s.initExit(p.ID), StateRunning)
		if o.init = init.status; init.unsure {
			o.init = shim.StatusRunning
			s.bg.Go(func() { s.shimLost(s.ctx, p.ID, nil) })
		}
	}
	v := decidePod(p.podRow, o)
	if !v.destroy && !v.teardown && v.notReady == "" {
		return nil
	}
	_, err := s.book.updatePod(p.ID, func(r *podRow) error {
		r.Removing = r.Removing || v.destroy
		r.Stopping = r.Stopping || v.teardown
		if v.notReady != "" && r.State == StateReady {
			r.State, r.Failure = StateNotReady, v.notReady
		}
		return nil
	})
	if err != nil && v.destroy {
		s.retryUndo(p.ID)
	}
	return err
}

// pinned tells whether all namespaces that the pod should have are there.
func (s *Service) pinned(p *pod) bool {
	kinds := []netns.Kind{}
	if !p.HostNetwork {
		kinds = append(kinds, netns.Net, netns.UTS)
	}
	if !p.hostIPC() {
		kinds = append(kinds, netns.IPC)
	}
	if p.userNS != nil {
		kinds = append(kinds, netns.User)
	}
	for _, k := range kinds {
		if !s.deps.Pins.Pinned(p.ID, k) {
			return false
		}
	}
	return true
}

// observe looks for the shim of an object that the book has in a state, and follows
// it from here on. For one that runs it is enough that the shim lives and has
// written no exit record: there is nothing else that it could say, and a
// thousand of them need not be woken for it before the first answer.
func (s *Service) observe(ctx context.Context, id, boot, exitFile string, state State) observed {
	o := observed{sameBoot: boot == s.cfg.BootID}
	if e, err := shim.ReadExit(exitFile); err == nil {
		o.exit = &e
	} else if !errors.Is(err, os.ErrNotExist) {
		klog.FromContext(ctx).Error(err, "Exit record unreadable", "id", id)
	}
	if !o.sameBoot || state == StateExited || o.exit != nil {
		return o
	}
	reached, err := shim.Reach(s.socket(id))
	switch {
	case err == nil && state == StateRunning:
		s.reached.add(id, reached)
		o.status = shim.StatusRunning
		return o
	case err == nil:
		o.status, err = s.askState(ctx, id, reached)
	}
	if err != nil {
		if e, err := shim.ReadExit(exitFile); err == nil { // it ended just now
			o.exit = &e
			return o
		}
		o.unsure = s.shimLives(id)
	}
	return o
}

// askState asks a shim how its container is, and follows it.
func (s *Service) askState(ctx context.Context, id string, r *shim.Reached) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, connectLimit)
	defer cancel()
	c, err := r.Client(ctx)
	if err != nil {
		return "", err
	}
	st, err := c.State(ctx)
	if err != nil {
		c.Close()
		return "", err
	}
	return st.Status, s.follow(id, c)
}

// reached are the shims that lived at the start and have not been talked to yet.
type reached struct {
	mu  sync.Mutex
	all []reachedShim
}

type reachedShim struct {
	id   string
	conn *shim.Reached
}

func (r *reached) add(id string, c *shim.Reached) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.all = append(r.all, reachedShim{id, c})
}

func (r *reached) take() []reachedShim {
	r.mu.Lock()
	defer r.mu.Unlock()
	all := r.all
	r.all = nil
	return all
}

// greetings is how many shims are begun to be talked to at once, while calls are
// answered already.
const greetings = 8

// greetAll begins to talk to the shims that were reached at the start, or since.
func (s *Service) greetAll() {
	_ = parallel(s.reached.take(), greetings, func(r reachedShim) error { s.greet(r.id, r.conn); return nil })
}

// greet begins to talk to a shim and follows it, unless somebody who had something
// to say to it has done so before.
func (s *Service) greet(id string, r *shim.Reached) {
	ctx, cancel := context.WithTimeout(s.ctx, connectLimit)
	defer cancel()
	c, err := r.Client(ctx)
	if err != nil {
		s.bg.Go(func() { s.shimLost(s.ctx, id, nil) })
		return
	}
	if h := s.live.add(id, c); h != nil {
		s.watch(id, h)
	}
}

// rebuild fills a new book from the notes beside the bundles, after the old one
// could not be read.
func (s *Service) rebuild(ctx context.Context) error {
	log := klog.FromContext(ctx)
	pods, errs := readNotes[podRow](filepath.Join(s.cfg.RunDir, "pods"))
	containers, more := readNotes[containerRow](filepath.Join(s.cfg.RunDir, "c"))
	for _, e := range append(errs, more...) {
		log.Error(e, "Note unreadable: what it describes will be removed")
	}
	err := s.deps.Store.Update(func(tx *store.Tx) error {
		for _, r := range pods {
			if _, err := podTable.Get(tx, r.ID); !errors.Is(err, store.ErrNotFound) {
				continue
			}
			if !r.Init && exists(s.bundleDir(r.ID)) {
				r.Init = true // made after the note, and not finished
			}
			if err := podTable.Put(tx, r.ID, r); err != nil {
				return err
			}
		}
		for _, r := range containers {
			if _, err := containerTable.Get(tx, r.ID); !errors.Is(err, store.ErrNotFound) {
				continue
			}
			if err := containerTable.Put(tx, r.ID, r); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("rebuild: %w", err)
	}
	log.Info("Book rebuilt from notes", "pods", len(pods), "containers", len(containers))
	return nil
}
