package failpoint

import (
	"context"
	"errors"
	"os"
	"slices"
	"testing"
	"time"
)

func mustMake(t *testing.T) Dir {
	t.Helper()
	d, err := Make(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func TestOrders(t *testing.T) {
	ctx := context.Background()
	d := mustMake(t)
	if err := d.Arm("run pod.network", Error, 2); err != nil {
		t.Fatal(err)
	}
	var got []bool
	for range 4 {
		got = append(got, errors.Is(d.Hit(ctx, "run pod.network"), ErrInjected))
	}
	if want := []bool{false, true, false, false}; !slices.Equal(got, want) {
		t.Errorf("the second pass once: failed %v, want %v", got, want)
	}
	if !d.WasHit("run pod.network") || d.WasHit("run pod.hosts") {
		t.Error("what was hit is not told")
	}
	if err := d.Arm("x.y", Error, 0); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if err := d.Hit(ctx, "x.y"); !errors.Is(err, ErrInjected) {
			t.Errorf("always: %v", err)
		}
	}
	trace, err := d.Trace()
	if err != nil || len(trace) != 7 || trace[0] != "run pod.network" || trace[6] != "x.y" {
		t.Errorf("trace %q, %v", trace, err)
	}
	if err := d.Reset(); err != nil {
		t.Fatal(err)
	}
	if err := d.Hit(ctx, "x.y"); err != nil || d.WasHit("run pod.network") {
		t.Errorf("after Reset: %v", err)
	}
}

func TestHangAndPause(t *testing.T) {
	d := mustMake(t)
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
	defer cancel()
	if err := d.Arm("a.b", Hang, 1); err != nil {
		t.Fatal(err)
	}
	if err := d.Hit(ctx, "a.b"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("hang: %v", err)
	}
	if err := d.Arm("a.c", Pause, 1); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- d.Hit(context.Background(), "a.c") }()
	for !d.WasHit("a.c") {
		time.Sleep(time.Millisecond)
	}
	select {
	case err := <-done:
		t.Fatalf("did not pause: %v", err)
	case <-time.After(20 * time.Millisecond):
	}
	if err := d.Go("a.c"); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Errorf("pause: %v", err)
	}
}

func TestNoDirectory(t *testing.T) {
	if err := Dir("").Hit(context.Background(), "a.b"); err != nil {
		t.Error(err)
	}
	d := mustMake(t)
	if err := d.Arm("a.b", "rubbish", 1); err != nil {
		t.Fatal(err)
	}
	if err := d.Hit(context.Background(), "a.b"); err == nil {
		t.Error("an unknown action did nothing")
	}
	if err := os.RemoveAll(string(d)); err != nil {
		t.Fatal(err)
	}
	if err := d.Hit(context.Background(), "a.b"); err != nil {
		t.Errorf("directory gone: %v", err)
	}
}
