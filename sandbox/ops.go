package sandbox

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"k8s.io/klog/v2"
)

// ops runs operations. One is known by its verb and its object, and there is at
// most one of a kind: a caller that comes while it runs joins it. It belongs to
// the object and not to the caller, so it goes on when the caller gives up.
type ops struct {
	mu      sync.Mutex
	running map[string]*op
	shown   map[*op]bool // background work, see show
	closed  bool
	all     sync.WaitGroup
}

// op is one operation under way or done.
type op struct {
	verb, object string
	began        time.Time
	done         chan struct{} // closed when result and err are set
	result       string
	err          error
	waiters      atomic.Int32 // callers

	mu    sync.Mutex
	step  string // what it is doing
	since time.Time
}

func newOps() *ops { return &ops{running: map[string]*op{}, shown: map[*op]bool{}} }

// errClosing: the daemon is going down.
var errClosing = fmt.Errorf("%w: the daemon is stopping", ErrBusy)

// do runs fn as the operation verb on object, or joins the one that runs, and
// returns its result. fn runs under a deadline of its own; ctx bounds only how
// long this caller waits, and after that the error is ErrBusy with the step.
func (o *ops) do(ctx context.Context, verb, object string, limit time.Duration, fn func(context.Context, *op) (string, error)) (string, error) {
	key := verb + " " + object
	o.mu.Lock()
	if o.closed {
		o.mu.Unlock()
		return "", errClosing
	}
	p, joined := o.running[key]
	if !joined {
		now := time.Now()
		p = &op{verb: verb, object: object, began: now, since: now, step: "begin", done: make(chan struct{})}
		o.running[key] = p
		o.all.Add(1)
		go o.run(ctx, key, p, limit, fn)
	}
	p.waiters.Add(1)
	o.mu.Unlock()
	defer p.waiters.Add(-1)
	select {
	case <-p.done:
		return p.result, p.err
	case <-ctx.Done():
		return "", p.busy(ctx.Err())
	}
}

func (o *ops) run(ctx context.Context, key string, p *op, limit time.Duration, fn func(context.Context, *op) (string, error)) {
	defer o.all.Done()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), limit)
	defer cancel()
	defer func() {
		if r := recover(); r != nil {
			p.err = fmt.Errorf("%s: panic: %v", p.verb, r)
			klog.FromContext(ctx).Error(p.err, "Operation panicked", "object", p.object, "stack", stack())
		}
		o.mu.Lock()
		delete(o.running, key)
		o.mu.Unlock()
		close(p.done)
	}()
	p.result, p.err = fn(ctx, p)
	if p.err == nil {
		p.err = failpoint(ctx, p.verb, "answer")
	}
	if errors.Is(p.err, context.DeadlineExceeded) {
		p.err = fmt.Errorf("%w (limit %s)", p.err, limit)
	}
}

// wait waits for the operation verb on object to end, if there is one.
func (o *ops) wait(ctx context.Context, verb, object string) error {
	o.mu.Lock()
	p := o.running[verb+" "+object]
	o.mu.Unlock()
	if p == nil {
		return nil
	}
	select {
	case <-p.done:
		return nil
	case <-ctx.Done():
		return p.busy(ctx.Err())
	}
}

// active tells whether the operation verb on object is under way.
func (o *ops) active(verb, object string) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.running[verb+" "+object] != nil
}

// close refuses new operations and waits for those that run, until ctx ends.
func (o *ops) close(ctx context.Context) error {
	o.mu.Lock()
	o.closed = true
	o.mu.Unlock()
	done := make(chan struct{})
	go func() { o.all.Wait(); close(done) }()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("operations: %w", ctx.Err())
	}
}

// show has background work on object listed while it lasts: until end is called. Several
// may be at the same.
func (o *ops) show(verb, object string) (p *op, end func()) {
	now := time.Now()
	p = &op{verb: verb, object: object, began: now, since: now, step: "begin"}
	o.mu.Lock()
	o.shown[p] = true
	o.mu.Unlock()
	return p, func() {
		o.mu.Lock()
		delete(o.shown, p)
		o.mu.Unlock()
	}
}

// Op describes an operation, or background work, under way.
type Op struct {
	Verb   string // such as "run pod"
	Object string // an ID, or names if it has none yet; "" for all
	Name   string // of the object: "namespace/pod" or "namespace/pod/container"; "" if it is not in the book
	Step   string
	Began  time.Time
	// Age is the time since Began, StepAge since the step began, whatever was done to
	// the clock.
	Age, StepAge time.Duration
	Waiters      int  // callers; 0 when they have given up
	Background   bool // nobody called for it
}

// list has the oldest first.
func (o *ops) list() []Op {
	o.mu.Lock()
	running := make([]*op, 0, len(o.running)+len(o.shown))
	for _, p := range o.running {
		running = append(running, p)
	}
	for p := range o.shown {
		running = append(running, p)
	}
	o.mu.Unlock()
	out := make([]Op, 0, len(running))
	for _, p := range running {
		step, age := p.at()
		out = append(out, Op{Verb: p.verb, Object: p.object, Step: step, Began: p.began, Age: time.Since(p.began), StepAge: age,
			Waiters: int(p.waiters.Load()), Background: p.done == nil})
	}
	slices.SortFunc(out, func(a, b Op) int { return cmp.Compare(b.Age, a.Age) })
	return out
}

func (p *op) at() (step string, age time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.step, time.Since(p.since)
}

func (p *op) enter(step string) {
	p.mu.Lock()
	p.step, p.since = step, time.Now()
	p.mu.Unlock()
}

func (p *op) busy(cause error) error {
	step, age := p.at()
	return fmt.Errorf("%w: %s of %s is at step %q for %s, begun %s ago: %w", ErrBusy, p.verb, p.object,
		step, age.Round(time.Millisecond), time.Since(p.began).Round(time.Millisecond), cause)
}

// step is one named, idempotent effect of an operation.
type step struct {
	name string
	do   func(ctx context.Context) error
}

// steps runs the steps in order up to the first error. It is the one place that
// times and logs them.
func (p *op) steps(ctx context.Context, list []step) error {
	for _, s := range list {
		if err := p.one(ctx, s); err != nil {
			return err
		}
	}
	return nil
}

// allSteps runs every step, whatever the others say, and joins the errors.
func (p *op) allSteps(ctx context.Context, list []step) error {
	var errs []error
	for _, s := range list {
		errs = append(errs, p.one(ctx, s))
	}
	return errors.Join(errs...)
}

func (p *op) one(ctx context.Context, s step) error {
	p.enter(s.name)
	begun := time.Now()
	err := failpoint(ctx, p.verb, s.name)
	if err == nil {
		err = p.safely(ctx, s)
	}
	log := klog.FromContext(ctx).V(4)
	if err != nil {
		log.Info("Step failed", "verb", p.verb, "step", s.name, "object", p.object, "took", time.Since(begun), "err", err)
		return fmt.Errorf("%s: %w", s.name, err)
	}
	log.Info("Step done", "verb", p.verb, "step", s.name, "object", p.object, "took", time.Since(begun))
	return nil
}

// safely runs a step. A panic is an error like others, so that what the operation
// has made is undone.
func (p *op) safely(ctx context.Context, s step) (err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("panic: %v", r)
			klog.FromContext(ctx).Error(err, "Step panicked", "verb", p.verb, "step", s.name, "object", p.object, "stack", stack())
		}
	}()
	return s.do(ctx)
}

// turns lets those who work on one object go one after the other. Its zero value is
// ready for use.
type turns struct {
	mu   sync.Mutex
	busy map[string]chan struct{} // by object; closed at the end of the turn
}

// take waits for a turn at an object, in no particular order, until ctx ends. The
// turn ends when done is called.
func (t *turns) take(ctx context.Context, object string) (done func(), err error) {
	for {
		t.mu.Lock()
		other := t.busy[object]
		if other == nil {
			mine := make(chan struct{})
			if t.busy == nil {
				t.busy = map[string]chan struct{}{}
			}
			t.busy[object] = mine
			t.mu.Unlock()
			return func() {
				t.mu.Lock()
				delete(t.busy, object)
				t.mu.Unlock()
				close(mine)
			}, nil
		}
		t.mu.Unlock()
		select {
		case <-other:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// parallel runs fn for each item at the same time, at most limit at once, and
// joins the errors.
func parallel[T any](items []T, limit int, fn func(T) error) error {
	errs := make([]error, len(items))
	slots := make(chan struct{}, limit)
	var wg sync.WaitGroup
	for i, it := range items {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			errs[i] = fn(it)
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}
