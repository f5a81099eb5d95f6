package store

import (
	"fmt"
	"sync"
)

// group makes one commit out of the Updates that arrive while another commit
// is being written. There is no goroutine: one of the callers leads, runs the
// functions of all that wait in the order of their arrival, commits once, and
// passes the lead to the first that came meanwhile.
type group struct {
	mu      sync.Mutex // guards what is below
	leading bool
	waiting []*call

	reserved int64 // bytes of the file known to be allocated; the leader's alone
}

// call is one Update under way.
type call struct {
	fn    func(*Tx) error
	err   error
	panic any
	wake  chan bool // true: lead now; false: err and panic are set
}

// Update runs fn in a writable transaction and commits it. It returns nil when
// the change is durable, or the error of fn, wrapped or not as fn made it, with
// nothing changed. fn may run more than once; see the package's caveats.
// A panic of fn is passed on to its own caller only.
func (s *Store) Update(fn func(*Tx) error) error {
	c := &call{fn: fn, wake: make(chan bool, 1)}
	g := &s.group
	g.mu.Lock()
	g.waiting = append(g.waiting, c)
	lead := !g.leading
	g.leading = true
	g.mu.Unlock()

	if lead || <-c.wake {
		s.lead(c)
	}
	if c.panic != nil {
		panic(c.panic)
	}
	return c.err
}

// lead serves all that wait, self among them, and hands the lead on.
func (s *Store) lead(self *call) {
	g := &s.group
	g.mu.Lock()
	batch := g.waiting
	g.waiting = nil
	g.mu.Unlock()

	found := s.commit(batch)
	s.reserve()

	for _, c := range batch {
		if c != self {
			c.wake <- false
		}
	}
	g.mu.Lock()
	if len(g.waiting) == 0 {
		g.leading = false
	} else {
		g.waiting[0].wake <- true
	}
	g.mu.Unlock()
	s.putAside(found) // an Update of its own, so only after the lead is passed on
}

// commit gives every call of the batch its result. A function that fails, or a
// batch that cannot be written, must not spoil the others: what failed is taken
// out and run again alone, after the rest, so that its error is about the book
// as it is on disk and not about neighbours that might never have been written.
// It returns the unreadable rows that were met.
func (s *Store) commit(batch []*call) (found []unreadable) {
	var alone []*call
	for len(batch) > 1 {
		i, err := s.attempt(batch, &found)
		if err == nil {
			batch = nil
			break
		}
		if i < 0 { // the write itself: one too large may be among them
			alone, batch = append(batch, alone...), nil
			break
		}
		alone = append(alone, batch[i])
		batch = append(batch[:i:i], batch[i+1:]...)
	}
	for _, c := range append(batch, alone...) {
		c.panic = nil
		_, c.err = s.attempt([]*call{c}, &found)
	}
	return found
}

// attempt runs the batch in one transaction. On error nothing is changed, and
// the index is that of the call whose function failed, or -1 if it was the
// database.
func (s *Store) attempt(batch []*call, found *[]unreadable) (failed int, err error) {
	tx, err := s.db.Begin(true)
	if err != nil {
		return -1, fmt.Errorf("book %s: %w", s.path, err)
	}
	t := &Tx{tx: tx}
	defer func() { *found = append(*found, t.unreadable...) }()
	for i, c := range batch {
		if err := c.run(t); err != nil {
			_ = tx.Rollback() // its only error is that the transaction has ended
			return i, err
		}
	}
	if err := s.finish(t); err != nil {
		return -1, fmt.Errorf("book %s: commit: %w", s.path, err)
	}
	return 0, nil
}

// run calls the function and keeps its panic for the goroutine that it belongs
// to.
func (c *call) run(t *Tx) (err error) {
	defer func() {
		if p := recover(); p != nil {
			c.panic = p
			err = fmt.Errorf("panic: %v", p)
		}
	}()
	return c.fn(t)
}

// finish commits. bbolt panics when it meets pages that contradict each other;
// then the transaction is still open and would block all others.
func (s *Store) finish(t *Tx) (err error) {
	defer func() {
		if p := recover(); p != nil {
			_ = t.tx.Rollback()
			err = fmt.Errorf("%w: %v", ErrCorrupt, p)
		}
	}()
	return t.tx.Commit()
}
