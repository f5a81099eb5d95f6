package store

import (
	"errors"
	"fmt"
	"runtime/debug"
	"sync"

	"go.etcd.io/bbolt"
	"golang.org/x/sys/unix"
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
	broken   error // why there can be no transaction any more; the leader's alone
}

// call is one Update under way.
type call struct {
	fn    func(*Tx) error
	alone bool // in a transaction of its own
	err   error
	panic any
	wake  chan bool // true: lead now; false: err and panic are set
}

// Update runs fn in a writable transaction and commits it. It returns nil when
// the change is durable, or the error of fn, wrapped or not as fn made it, with
// nothing changed. fn may run more than once; see the package's caveats.
// A panic of fn is passed on to its own caller only.
func (s *Store) Update(fn func(*Tx) error) error {
	return s.serve(&call{fn: fn, wake: make(chan bool, 1)})
}

// unchanged runs fn as Update does, but alone, and gives the transaction up.
func (s *Store) unchanged(fn func(*Tx) error) error {
	err := s.serve(&call{alone: true, wake: make(chan bool, 1), fn: func(tx *Tx) error {
		if err := fn(tx); err != nil {
			return err
		}
		return errGiveUp
	}})
	if errors.Is(err, errGiveUp) {
		return nil
	}
	return err
}

// errGiveUp ends a transaction that is not to be written.
var errGiveUp = errors.New("nothing to write")

// serve waits until the call has been served, or leads.
func (s *Store) serve(c *call) error {
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
	var alone, together []*call
	for _, c := range batch {
		if c.alone {
			alone = append(alone, c)
		} else {
			together = append(together, c)
		}
	}
	batch = together
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
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	tx, err := s.begin()
	if err != nil {
		return -1, fmt.Errorf("book %s: %w", s.path, err)
	}
	t := &Tx{tx: tx}
	defer func() { *found = append(*found, t.unreadable...) }()
	for i, c := range batch {
		if err := c.run(t); err != nil {
			s.rollback(tx)
			return i, err
		}
	}
	if err := s.finish(t); err != nil {
		return -1, fmt.Errorf("book %s: commit: %w", s.path, err)
	}
	return 0, nil
}

// begin begins a transaction. bbolt does not give its lock back when that fails in
// the middle: a next one would wait for ever.
func (s *Store) begin() (tx *bbolt.Tx, err error) {
	if s.group.broken != nil {
		return nil, s.group.broken
	}
	defer func() {
		if p := recover(); p != nil {
			err = panicked(p)
			s.group.broken = err
		}
	}()
	return s.db.Begin(true)
}

// rollback gives a transaction up.
func (s *Store) rollback(tx *bbolt.Tx) {
	defer func() {
		if p := recover(); p != nil {
			s.group.broken = panicked(p)
		}
	}()
	_ = tx.Rollback() // its only error is that the transaction has ended
}

// run calls the function and keeps its panic for the goroutine that it belongs
// to.
func (c *call) run(t *Tx) (err error) {
	defer func() {
		if p := recover(); p != nil {
			if err = fault(p); err == nil {
				c.panic = p
				err = fmt.Errorf("panic: %v", p)
			}
		}
	}()
	return c.fn(t)
}

// fault is the error for a panic that came of reading a page of the file that the
// disk does not give, nil for any other. The file is mapped, so what is EIO
// elsewhere is a signal here, which would end the daemon.
func fault(p any) error {
	if f, ok := p.(interface {
		error
		Addr() uintptr
	}); ok {
		return fmt.Errorf("page of the file not readable: %w (%w)", unix.EIO, f)
	}
	return nil
}

// panicked is the error for a panic of bbolt.
func panicked(p any) error {
	if err := fault(p); err != nil {
		return err
	}
	return fmt.Errorf("%w: %v", ErrCorrupt, p)
}

// finish commits. bbolt panics when it meets pages that contradict each other;
// then the transaction is still open and would block all others.
func (s *Store) finish(t *Tx) (err error) {
	defer func() {
		if p := recover(); p != nil {
			s.rollback(t.tx)
			err = panicked(p)
		}
	}()
	return t.tx.Commit()
}
