package main

import (
	"context"
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
		c, err := a.client()
		if err != nil {
			return err
		}
		list := []api.Op{}
		if err := c.ask(ctx, http.MethodGet, api.PathOps, nil, nil, &list); err != nil {
			return err
		}
		list = slices.DeleteFunc(list, func(o api.Op) bool { return o.Age < *older || !*calls && o.Kind == api.KindCall })
		if a.json {
			return a.printJSON(list)
		}
		if len(list) == 0 {
			_, err := fmt.Fprintln(a.out, "nothing is under way")
			return err
		}
		return a.opsTable(list)
	}
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
		if step == "" {
			during = ""
		}
		t.row(showAge(o.Age), o.Kind, o.What, object, step, during, waiters)
	}
	return t.flush()
}
