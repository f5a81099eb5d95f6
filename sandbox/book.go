package sandbox

import (
	"errors"
	"fmt"
	"hash/maphash"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berthd/berth/store"
)

// view is the state of all pods and containers at one moment. It never changes;
// a commit replaces it.
type view struct {
	pods       map[string]*pod
	containers map[string]*container
	byPod      map[string][]*container // oldest first
}

// book holds the rows: in the store for good, and as a view for readers.
type book struct {
	st  *store.Store
	cur atomic.Pointer[view]

	// rows orders the changes of one row: a change is committed and then
	// published under its lock, so that no older state is published later.
	rows [256]sync.Mutex
	seed maphash.Seed

	mu sync.Mutex // for publishing

	events *hub
}

func newBook(st *store.Store) *book {
	b := &book{st: st, seed: maphash.MakeSeed(), events: newHub()}
	b.cur.Store(&view{})
	return b
}

func (b *book) view() *view { return b.cur.Load() }

func (b *book) row(id string) *sync.Mutex {
	return &b.rows[maphash.String(b.seed, id)%uint64(len(b.rows))]
}

// load reads every row. Those that cannot be decoded are moved to quarantine, by
// the store or here, and left out.
func (b *book) load() error {
	v := &view{pods: map[string]*pod{}, containers: map[string]*container{}}
	err := b.st.View(func(tx *store.Tx) error {
		return errors.Join(
			loadTable(tx, podTable, decodePod, func(p *pod) string { return p.ID }, func(p *pod) {
				v.pods[p.ID] = p
				b.events.clock.atLeast(p.Created)
			}),
			loadTable(tx, containerTable, decodeContainer, func(c *container) string { return c.ID }, func(c *container) {
				v.containers[c.ID] = c
				b.events.clock.atLeast(max(c.Created, c.Started, c.Finished))
			}))
	})
	if err != nil {
		return fmt.Errorf("book: %w", err)
	}
	v.index()
	b.cur.Store(v)
	return nil
}

// loadTable gives each row of a table, decoded by all processors, to take.
func loadTable[R, T any](tx *store.Tx, table store.Table[R], decode func(R) (T, error), id func(T) string, take func(T)) error {
	type loaded struct {
		key string
		row R
		v   T
		err error
	}
	var all []*loaded
	err := table.Each(tx, func(key string, r R) error { all = append(all, &loaded{key: key, row: r}); return nil })
	if err != nil {
		return err
	}
	eachCPU(all, func(l *loaded) error { l.v, l.err = decode(l.row); return nil })
	for _, l := range all {
		switch {
		case l.err != nil:
			table.Reject(tx, l.key, fmt.Errorf("row: %w", l.err))
		case id(l.v) != l.key:
			table.Reject(tx, l.key, fmt.Errorf("row of %.64q: %w", id(l.v), errForeignRow))
		default:
			take(l.v)
		}
	}
	return nil
}

// errForeignRow: a row says that it is about another object than its key.
var errForeignRow = errors.New("under another ID")

func (v *view) index() {
	v.byPod = make(map[string][]*container, len(v.pods))
	for _, c := range v.containers {
		v.byPod[c.PodID] = append(v.byPod[c.PodID], c)
	}
	for _, l := range v.byPod {
		sortContainers(l)
	}
}

// newestAttempt is when the newest attempt of a pod was made, 0 for none.
func (v *view) newestAttempt(cfg *runtime.PodSandboxConfig) (newest int64) {
	m := cfg.GetMetadata()
	for _, p := range v.pods {
		if o := p.config.GetMetadata(); o.GetUid() == m.GetUid() && o.GetName() == m.GetName() && o.GetNamespace() == m.GetNamespace() {
			newest = max(newest, p.Created)
		}
	}
	return newest
}

// newestIn is when the newest thing of a pod was made: it, or a container.
func (v *view) newestIn(p *pod) (newest int64) {
	newest = p.Created
	for _, c := range v.byPod[p.ID] {
		newest = max(newest, c.Created)
	}
	return newest
}

func sortContainers(l []*container) {
	slices.SortFunc(l, func(a, b *container) int {
		if a.Created != b.Created {
			return int(min(max(a.Created-b.Created, -1), 1))
		}
		return strings.Compare(a.ID, b.ID)
	})
}

// insertPod writes a new row.
func (b *book) insertPod(r podRow) (*pod, error) {
	mu := b.row(r.ID)
	mu.Lock()
	defer mu.Unlock()
	p, err := decodePod(r)
	if err != nil {
		return nil, err
	}
	err = b.st.Update(func(tx *store.Tx) error { return podTable.Put(tx, r.ID, r) })
	if err != nil {
		return nil, fmt.Errorf("book: pod %s: %w", r.ID, err)
	}
	b.publishPod(r.ID, p)
	return p, nil
}

// updatePod changes a row in a transaction. fn gets the row as it is in the
// book, may refuse with an error, and may be called more than once.
func (b *book) updatePod(id string, fn func(r *podRow) error) (*pod, error) {
	mu := b.row(id)
	mu.Lock()
	defer mu.Unlock()
	var r podRow
	err := b.st.Update(func(tx *store.Tx) (err error) {
		if r, err = podTable.Get(tx, id); err != nil {
			return err
		}
		if err := fn(&r); err != nil {
			return err
		}
		r.Rev++
		return podTable.Put(tx, id, r)
	})
	if err != nil {
		return nil, fmt.Errorf("book: pod %s: %w", id, err)
	}
	p, err := decodePod(r)
	if err != nil {
		return nil, err
	}
	b.publishPod(id, p)
	return p, nil
}

// deletePod deletes the row; that it is absent is no error.
func (b *book) deletePod(id string) error {
	mu := b.row(id)
	mu.Lock()
	defer mu.Unlock()
	if err := b.st.Update(func(tx *store.Tx) error { return podTable.Delete(tx, id) }); err != nil {
		return fmt.Errorf("book: pod %s: %w", id, err)
	}
	b.publishPod(id, nil)
	return nil
}

// insertContainer writes a new row, unless its pod is not ready by then: so no
// container can appear in a pod that is being stopped.
func (b *book) insertContainer(r containerRow) (*container, error) {
	mu := b.row(r.ID)
	mu.Lock()
	defer mu.Unlock()
	c, err := decodeContainer(r)
	if err != nil {
		return nil, err
	}
	err = b.st.Update(func(tx *store.Tx) error {
		if err := podReady(tx, r.PodID); err != nil {
			return err
		}
		return containerTable.Put(tx, r.ID, r)
	})
	if err != nil {
		return nil, fmt.Errorf("book: container %s: %w", r.ID, err)
	}
	b.publishContainer(r.ID, c)
	return c, nil
}

func podReady(tx *store.Tx, id string) error {
	p, err := podTable.Get(tx, id)
	if err != nil {
		return fmt.Errorf("pod %s: %w", id, err)
	}
	if p.State != StateReady || p.Removing {
		return fmt.Errorf("%w: pod %s is not ready", ErrState, id)
	}
	return nil
}

// updateContainer is for containers what updatePod is for pods.
func (b *book) updateContainer(id string, fn func(tx *store.Tx, r *containerRow) error) (*container, error) {
	mu := b.row(id)
	mu.Lock()
	defer mu.Unlock()
	var r containerRow
	err := b.st.Update(func(tx *store.Tx) (err error) {
		if r, err = containerTable.Get(tx, id); err != nil {
			return err
		}
		if err := fn(tx, &r); err != nil {
			return err
		}
		r.Rev++
		return containerTable.Put(tx, id, r)
	})
	if err != nil {
		return nil, fmt.Errorf("book: container %s: %w", id, err)
	}
	c, err := decodeContainer(r)
	if err != nil {
		return nil, err
	}
	b.publishContainer(id, c)
	return c, nil
}

func (b *book) deleteContainer(id string) error {
	mu := b.row(id)
	mu.Lock()
	defer mu.Unlock()
	if err := b.st.Update(func(tx *store.Tx) error { return containerTable.Delete(tx, id) }); err != nil {
		return fmt.Errorf("book: container %s: %w", id, err)
	}
	b.publishContainer(id, nil)
	return nil
}

// rewritePod writes a row as readers see it, over one that cannot be read any more.
func (b *book) rewritePod(id string) error {
	mu := b.row(id)
	mu.Lock()
	defer mu.Unlock()
	p := b.view().pods[id]
	if p == nil {
		return nil
	}
	return b.st.Update(func(tx *store.Tx) error { return podTable.Put(tx, id, p.podRow) })
}

// rewriteContainer is for containers what rewritePod is for pods.
func (b *book) rewriteContainer(id string) error {
	mu := b.row(id)
	mu.Lock()
	defer mu.Unlock()
	c := b.view().containers[id]
	if c == nil {
		return nil
	}
	return b.st.Update(func(tx *store.Tx) error { return containerTable.Put(tx, id, c.containerRow) })
}

// publishPod makes p, or with nil its absence, visible to readers, and tells
// followers what that means.
func (b *book) publishPod(id string, p *pod) {
	b.mu.Lock()
	defer b.mu.Unlock()
	old := b.cur.Load()
	next := *old
	next.pods = maps.Clone(next.pods)
	if p == nil {
		delete(next.pods, id)
	} else {
		next.pods[id] = p
	}
	b.cur.Store(&next)
	b.events.publish(podEvents(id, old, &next))
}

// publishContainer makes c, or with nil its absence, visible to readers.
func (b *book) publishContainer(id string, c *container) {
	b.mu.Lock()
	defer b.mu.Unlock()
	prev := b.cur.Load()
	next := *prev
	old := next.containers[id]
	next.containers = maps.Clone(next.containers)
	next.byPod = maps.Clone(next.byPod)
	if old != nil {
		rest := slices.Clone(next.byPod[old.PodID])
		rest = slices.DeleteFunc(rest, func(o *container) bool { return o.ID == id })
		if len(rest) == 0 {
			delete(next.byPod, old.PodID)
		} else {
			next.byPod[old.PodID] = rest
		}
	}
	if c == nil {
		delete(next.containers, id)
	} else {
		next.containers[id] = c
		l := append(slices.Clone(next.byPod[c.PodID]), c)
		sortContainers(l)
		next.byPod[c.PodID] = l
	}
	b.cur.Store(&next)
	b.events.publish(containerEvents(id, prev, &next))
}

// pod finds a pod by its ID or a unique prefix of it.
func (v *view) pod(id string) (*pod, error) {
	p, err := find(v.pods, id)
	if err != nil {
		return nil, fmt.Errorf("pod %q: %w", id, err)
	}
	return p, nil
}

// container finds a container by its ID or a unique prefix of it.
func (v *view) container(id string) (*container, error) {
	c, err := find(v.containers, id)
	if err != nil {
		return nil, fmt.Errorf("container %q: %w", id, err)
	}
	return c, nil
}

// anyPod is like pod, and finds a pod that is being removed, too, by its whole
// ID: who calls Stop or Remove again is to join that, not to be told that all
// is well.
func (v *view) anyPod(id string) (*pod, error) {
	if p, ok := v.pods[id]; ok && p.State != StateCreating {
		return p, nil
	}
	return v.pod(id)
}

// anyContainer is for containers what anyPod is for pods.
func (v *view) anyContainer(id string) (*container, error) {
	if c, ok := v.containers[id]; ok && c.State != StateCreating {
		return c, nil
	}
	return v.container(id)
}

func find[T interface{ listed() bool }](m map[string]T, id string) (T, error) {
	var none T
	if o, ok := m[id]; ok && o.listed() {
		return o, nil
	}
	if len(id) == 0 || len(id) >= 64 {
		return none, ErrNotFound
	}
	var found T
	n := 0
	for k, o := range m {
		if o.listed() && strings.HasPrefix(k, id) {
			found = o
			n++
		}
	}
	switch n {
	case 0:
		return none, ErrNotFound
	case 1:
		return found, nil
	}
	return none, fmt.Errorf("%w: %d objects", ErrAmbiguous, n)
}
