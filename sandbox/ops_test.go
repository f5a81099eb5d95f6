package sandbox

import (
	"context"
	"errors"
	"maps"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestOpsJoin(t *testing.T) {
	o := newOps()
	var runs atomic.Int32
	release := make(chan struct{})
	fn := func(ctx context.Context, p *op) (string, error) {
		runs.Add(1)
		p.enter("slow")
		<-release
		return "id", nil
	}
	var wg sync.WaitGroup
	for range 10 {
		wg.Go(func() {
			if got, err := o.do(context.Background(), "make", "x", time.Minute, fn); got != "id" || err != nil {
				t.Errorf("got %q, %v; want id", got, err)
			}
		})
	}
	for len(o.list()) == 0 || o.list()[0].Step != "slow" {
		time.Sleep(time.Millisecond)
	}
	time.Sleep(10 * time.Millisecond) // let the others join
	close(release)
	wg.Wait()
	if n := runs.Load(); n != 1 {
		t.Errorf("ran %d times, want once", n)
	}
	if l := o.list(); len(l) != 0 {
		t.Errorf("left over: %v", l)
	}
}

func TestOpsOutliveTheirCaller(t *testing.T) {
	o := newOps()
	release := make(chan struct{})
	fn := func(ctx context.Context, p *op) (string, error) {
		p.enter("network")
		<-release
		return "id", ctx.Err()
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Millisecond)
	defer cancel()
	_, err := o.do(ctx, "run pod", "a/b", time.Minute, fn)
	if !errors.Is(err, ErrBusy) || !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("got %v, want ErrBusy and the deadline", err)
	}
	for _, want := range []string{"run pod", "a/b", `"network"`} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("error %q does not name %s", err, want)
		}
	}
	go func() { time.Sleep(5 * time.Millisecond); close(release) }()
	got, err := o.do(context.Background(), "run pod", "a/b", time.Minute, fn)
	if got != "id" || err != nil {
		t.Errorf("joined: got %q, %v; want the result of the first call", got, err)
	}
}

// TestOpsListed: callers are counted while they wait, and background work is listed until
// its end, several of a kind at the same time.
func TestOpsListed(t *testing.T) {
	o := newOps()
	_, end1 := o.show("sweep", "")
	p, end2 := o.show("sweep", "")
	p.enter("mounts")
	release := make(chan struct{})
	ctx, giveUp := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			_, _ = o.do(ctx, "run pod", "a/b", time.Minute, func(context.Context, *op) (string, error) { <-release; return "", nil })
		})
	}
	find := func(verb string) (found []Op) {
		for _, l := range o.list() {
			if l.Verb == verb {
				found = append(found, l)
			}
		}
		return found
	}
	for l := find("run pod"); len(l) == 0 || l[0].Waiters < 2; l = find("run pod") {
		time.Sleep(time.Millisecond)
	}
	if l := find("run pod"); l[0].Background || l[0].Object != "a/b" || l[0].Began.IsZero() {
		t.Errorf("operation: %+v", l[0])
	}
	giveUp()
	wg.Wait()
	if l := find("run pod"); len(l) != 1 || l[0].Waiters != 0 {
		t.Errorf("after its callers gave up: %+v, want no waiters", l)
	}
	close(release)
	if l := find("sweep"); len(l) != 2 || l[0].Step != "begin" || l[1].Step != "mounts" || !l[0].Background {
		t.Errorf("two sweeps: %+v", l)
	}
	end1()
	if l := find("sweep"); len(l) != 1 || l[0].Step != "mounts" {
		t.Errorf("one sweep: %+v", l)
	}
	end2()
	if l := find("sweep"); len(l) != 0 {
		t.Errorf("no sweep: %+v", l)
	}
}

func TestDescribe(t *testing.T) {
	s := &Service{book: newBook(nil)}
	id, other := strings.Repeat("a", 64), strings.Repeat("b", 64)
	p := &pod{podRow: podRow{ID: id}, config: &runtime.PodSandboxConfig{Metadata: &runtime.PodSandboxMetadata{Namespace: "ns", Name: "web"}}}
	s.book.cur.Store(&view{pods: map[string]*pod{id: p}})
	for _, c := range []struct{ key, object, name string }{
		{id, id, "ns/web"},
		{other, other, ""},
		{id + " to 77ab", id, "ns/web"},
		{id + "/app/0", id + "/app/0", "ns/web/app"},
		{"ns/new/uid/0", "ns/new/uid/0", "ns/new"},
		{"", "", ""},
	} {
		if object, name := s.describe(c.key); object != c.object || name != c.name {
			t.Errorf("%q: %q, %q; want %q, %q", c.key, object, name, c.object, c.name)
		}
	}
}

// BenchmarkShow is what it costs to have background work listed.
func BenchmarkShow(b *testing.B) {
	o := newOps()
	b.ReportAllocs()
	for b.Loop() {
		_, end := o.show("record exit", "x")
		end()
	}
}

func TestOpsDeadlineAndPanic(t *testing.T) {
	o := newOps()
	_, err := o.do(context.Background(), "a", "x", time.Millisecond, func(ctx context.Context, p *op) (string, error) {
		<-ctx.Done()
		return "", ctx.Err()
	})
	if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "limit 1ms") {
		t.Errorf("got %v, want the limit named", err)
	}
	_, err = o.do(context.Background(), "a", "x", time.Second, func(context.Context, *op) (string, error) { panic("oops") })
	if err == nil || !strings.Contains(err.Error(), "oops") {
		t.Errorf("got %v, want the panic as an error", err)
	}
	if err := o.close(context.Background()); err != nil {
		t.Fatal(err)
	}
	if _, err := o.do(context.Background(), "a", "x", time.Second, nil); !errors.Is(err, errClosing) {
		t.Errorf("after close: got %v, want %v", err, errClosing)
	}
}

func TestSteps(t *testing.T) {
	boom := errors.New("boom")
	var did []string
	mk := func(name string, err error) step {
		return step{name, func(context.Context) error { did = append(did, name); return err }}
	}
	p := &op{verb: "v"}
	if err := p.steps(context.Background(), []step{mk("a", nil), mk("b", boom), mk("c", nil)}); !errors.Is(err, boom) || !strings.HasPrefix(err.Error(), "b: ") {
		t.Errorf("got %v, want b: boom", err)
	}
	if got := strings.Join(did, ""); got != "ab" {
		t.Errorf("steps ran %s, want ab", got)
	}
	did = nil
	crash := step{"d", func(context.Context) error { panic("oops") }}
	if err := p.allSteps(context.Background(), []step{crash, mk("e", nil)}); err == nil || err.Error() != "d: panic: oops" {
		t.Errorf("got %v, want the panic as the step's error", err)
	}
	if got := strings.Join(did, ""); got != "e" {
		t.Errorf("steps ran %s after a panic, want e", got)
	}
	did = nil
	if err := p.allSteps(context.Background(), []step{mk("a", boom), mk("b", nil), mk("c", boom)}); !errors.Is(err, boom) {
		t.Errorf("got %v, want boom", err)
	}
	if got := strings.Join(did, ""); got != "abc" {
		t.Errorf("steps ran %s, want abc", got)
	}
}

func TestOnlyDetach(t *testing.T) {
	d := &detachError{errors.New("plugin")}
	other := errors.New("other")
	for _, tc := range []struct {
		err  error
		want bool
	}{
		{d, true}, {errors.Join(d, d), true}, {errors.Join(d, other), false}, {other, false},
		{wrap(errors.Join(wrap(d))), true}, {wrap(errors.Join(wrap(d), wrap(other))), false},
	} {
		if got := onlyDetach(tc.err); got != tc.want {
			t.Errorf("%v: got %v, want %v", tc.err, got, tc.want)
		}
	}
}

func wrap(err error) error { return &wrapped{err} }

type wrapped struct{ error }

func (w *wrapped) Unwrap() error { return w.error }

func TestOpsInfo(t *testing.T) {
	got := opsInfo([]Op{{Verb: "sweep", Step: "look", Background: true}, {Verb: "create container", Object: "p/c/0", Step: "launch", Age: 1234567 * time.Microsecond, StepAge: 400 * time.Microsecond}})
	want := map[string]string{"verb": "create container", "object": "p/c/0", "step": "launch", "age": "1.235s", "stepAge": "0s"}
	if len(got) != 1 || !maps.Equal(got[0], want) {
		t.Errorf("%v, want %v", got, want)
	}
	if none := opsInfo(nil); none == nil {
		t.Error("no operations are null, want an empty list")
	}
}

func TestTurns(t *testing.T) {
	var turn turns
	var inside, most, count atomic.Int32
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			done, err := turn.take(t.Context(), "a")
			if err != nil {
				t.Error(err)
				return
			}
			most.Store(max(most.Load(), inside.Add(1)))
			time.Sleep(time.Millisecond)
			inside.Add(-1)
			count.Add(1)
			done()
		})
	}
	wg.Wait()
	if most.Load() != 1 || count.Load() != 20 {
		t.Errorf("%d at once, %d in all; want 1 and 20", most.Load(), count.Load())
	}
	done, err := turn.take(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	other, err := turn.take(t.Context(), "b") // is not in its way
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if _, err := turn.take(ctx, "a"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a turn that does not come: got %v, want the deadline", err)
	}
	done()
	other()
	if len(turn.busy) != 0 {
		t.Errorf("left over: %v", turn.busy)
	}
}
