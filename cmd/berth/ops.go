package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"

	"github.com/berthd/berth/cri/admin/api"
)

// showOps lists what berthd is doing.
func showOps(a *app, fs *flag.FlagSet) func(context.Context, []string) error {
	older := fs.Duration("older", 0, "leave out what has lasted for less than this `time`, such as 10s")
	calls := fs.Bool("calls", true, "show CRI calls, too, and not only the work that they wait for")
	return func(ctx context.Context, _ []string) error {
		list, down := a.askOps(ctx)
		if down != nil && list == nil {
			return down
		}
		list = slices.DeleteFunc(list, func(o api.Op) bool { return o.Age < *older || !*calls && o.Kind == api.KindCall })
		var err error
		switch {
		case a.json:
			err = a.printJSON(list)
		case len(list) > 0:
			err = a.opsTable(list)
		case down == nil:
			_, err = fmt.Fprintln(a.out, "nothing is under way")
		default:
			_, err = fmt.Fprintln(a.out, "nothing was left unfinished")
		}
		return errors.Join(err, down)
	}
}

// askOps is what is under way or, if no berthd runs and the user did not name a socket,
// what the book has as unfinished, with the error that tells of that.
func (a *app) askOps(ctx context.Context) ([]api.Op, error) {
	c, err := a.client()
	if err != nil {
		return nil, err
	}
	list := []api.Op{}
	err = c.ask(ctx, http.MethodGet, api.PathOps, nil, nil, &list)
	if err == nil {
		return list, nil
	}
	if !errors.Is(err, errDown) || a.socket != "" {
		return nil, err
	}
	out, e := a.lookAlone(ctx, "ops")
	if e != nil {
		return nil, err // it said why
	}
	e = records(ctx, out, func(r api.Record) {
		if r.Op != nil {
			list = append(list, *r.Op)
		}
	})
	if e != nil {
		return nil, fmt.Errorf("%w; its book: %w", err, e)
	}
	return list, err
}

func (a *app) opsTable(list []api.Op) error {
	t := a.table("AGE", "KIND", "WHAT", "OBJECT", "STEP", "FOR", "WAITERS")
	for _, o := range list {
		object, step, waiters := o.Name, o.Step, ""
		switch {
		case object == "":
			object = o.Object
		case len(o.Object) >= 12 && !strings.Contains(o.Object, "/"): // an ID
			object += " (" + o.Object[:12] + ")"
		}
		if o.Kind == api.KindOperation || o.Kind == api.KindPull {
			waiters = strconv.Itoa(o.Waiters)
		}
		during := showAge(o.StepAge)
		if step == "" || o.Kind == api.KindUnfinished {
			during = ""
		}
		age := showAge(o.Age)
		if o.Began.IsZero() && o.Kind == api.KindUnfinished {
			age = "-"
		}
		t.row(age, o.Kind, o.What, object, step, during, waiters)
	}
	return t.flush()
}
