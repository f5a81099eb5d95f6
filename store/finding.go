package store

import (
	"context"
	"time"
)

// Finding is what somebody found who compared the book with the world, or with
// itself: a thing without an owner, or a row that is not what it should be.
type Finding struct {
	Kind string // of thing: "mount", "container", "layer"
	ID   string // of the object that it is about, "" if there is none
	What string // a path, a number or a name, by which an administrator finds it
	Why  string // it has no owner, or what is wrong with it
	// Consequence is what comes of it, Remedy what an administrator can do; "" goes
	// without saying.
	Consequence, Remedy string
	Since               time.Time // when it was made; zero if nothing tells
	// Mend removes the thing or puts it right, and does nothing if that has been
	// done. It is nil where that is not for berth to do.
	Mend func(context.Context) error
}

// Report is told of a finding, and if it was to be mended what came of that.
type Report func(f Finding, mended bool, err error)

// Key is the same for findings of two looks that are about the same.
func (f Finding) Key() string { return f.Kind + "\x00" + f.ID + "\x00" + f.What }

// mendLimit bounds the mending of one thing.
const mendLimit = time.Minute

// Tell reports findings, each after it was mended if it is to be and can be. It
// ends early when ctx does, with its error.
func Tell(ctx context.Context, found []Finding, mend bool, report Report) error {
	for _, f := range found {
		if err := ctx.Err(); err != nil {
			return err
		}
		if !mend || f.Mend == nil {
			report(f, false, nil)
			continue
		}
		one, cancel := context.WithTimeout(ctx, mendLimit)
		err := f.Mend(one)
		cancel()
		report(f, err == nil, err)
	}
	return nil
}

// SecondLook is how long after a first look at what seems to be nobody's, or wrong, a
// second one is taken: operations under way change things meanwhile.
const SecondLook = time.Second

// Examine tells of what two looks have found, SecondLook apart, as Tell does.
func Examine(ctx context.Context, look func(context.Context) ([]Finding, error), mend bool, report Report) error {
	found, err := Confirm(ctx, SecondLook, look)
	if err != nil {
		return err
	}
	return Tell(ctx, found, mend, report)
}

// Confirm keeps those of the findings that a second look, a while after the first,
// has as well: what was only changing just then has changed. It costs nothing when
// there are none.
func Confirm(ctx context.Context, after time.Duration, look func(context.Context) ([]Finding, error)) ([]Finding, error) {
	first, err := look(ctx)
	if err != nil || len(first) == 0 {
		return nil, err
	}
	select {
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-time.After(after):
	}
	second, err := look(ctx)
	if err != nil {
		return nil, err
	}
	seen := make(map[string]bool, len(first))
	for _, f := range first {
		seen[f.Key()] = true
	}
	var both []Finding
	for _, f := range second {
		if seen[f.Key()] {
			both = append(both, f)
		}
	}
	return both, nil
}
