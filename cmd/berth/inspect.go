package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"strings"
	"time"

	"github.com/berthd/berth/cri/admin/api"
)

// findings are what a look at the node has found.
type findings struct {
	Findings []api.Finding `json:"findings"`
	Mended   int           `json:"mended"`
	Left     int           `json:"left"`
	// Daemon tells who looked: berthd, or a process of its own while none runs.
	Daemon bool `json:"daemon"`
}

func (f *findings) add(rec api.Record) {
	if rec.Finding == nil {
		return
	}
	f.Findings = append(f.Findings, *rec.Finding)
	if rec.Finding.Mended {
		f.Mended++
	} else {
		f.Left++
	}
}

// inspect has berthd look at the node or, if none runs and the user did not name a
// socket, starts its program for that.
func (a *app) inspect(ctx context.Context, path, what string, mend bool) (*findings, error) {
	f := &findings{Findings: []api.Finding{}, Daemon: true}
	c, err := a.client()
	if err != nil {
		return nil, err
	}
	err = c.workOn(ctx, path, api.InspectRequest{Mend: mend}, f.add)
	if errors.Is(err, errUnreachable) && (!errors.Is(err, errDown) || a.socket != "") {
		return nil, err
	}
	if !errors.Is(err, errDown) {
		return f, err
	}
	f.Daemon = false
	var more []string
	if mend {
		more = []string{"--mend"}
	}
	out, err := a.lookAlone(ctx, what, more...)
	if err != nil {
		return nil, err
	}
	return f, records(ctx, out, f.add)
}

// conclude ends a verb: what is left is exit code 5.
func (a *app) conclude(f *findings, nothing, found, mended string) error {
	if a.json {
		if err := a.printJSON(f); err != nil {
			return err
		}
	} else {
		text := nothing
		switch {
		case len(f.Findings) > 0 && f.Mended > 0:
			text = fmt.Sprintf("%d %s, %d %s", len(f.Findings), found, f.Mended, mended)
		case len(f.Findings) > 0:
			text = fmt.Sprintf("%d %s", len(f.Findings), found)
		}
		if !f.Daemon {
			text += " (berthd does not run)"
		}
		fmt.Fprintln(a.out, text)
	}
	if f.Left > 0 {
		return fmt.Errorf("%w: %d", errLeft, f.Left)
	}
	return nil
}

// errLeft: something was found and is still there.
var errLeft = errors.New("still there")

func leaks(a *app, fs *flag.FlagSet) func(context.Context, []string) error {
	fix := fs.Bool("fix", false, "remove what can be removed safely")
	return func(ctx context.Context, _ []string) error {
		f, err := a.inspect(ctx, api.PathLeaks, "leaks", *fix)
		if f == nil || err != nil && len(f.Findings) == 0 {
			return err
		}
		if !a.json && len(f.Findings) > 0 {
			t := a.table("KIND", "OF", "AGE", "STATE", "WHY", "WHAT")
			for _, l := range f.Findings {
				t.row(l.Kind, cmp.Or(l.ID[:min(len(l.ID), 13)], "-"), ageOf(l.Since), stateOf(l, *fix), outcome(l), cmp.Or(l.What, "-"))
			}
			if err := t.flush(); err != nil {
				return err
			}
		}
		// Also after an error: what was seen until then has been done, or is there.
		return errors.Join(err, a.conclude(f, "nothing without an owner", "without an owner", "removed"))
	}
}

func check(a *app, fs *flag.FlagSet) func(context.Context, []string) error {
	repair := fs.Bool("repair", false, "put right what can be put right safely")
	return func(ctx context.Context, _ []string) error {
		f, err := a.inspect(ctx, api.PathCheck, "check", *repair)
		if f == nil || err != nil && len(f.Findings) == 0 {
			return err
		}
		if !a.json {
			for _, d := range f.Findings {
				a.deviation(d)
			}
		}
		return errors.Join(err, a.conclude(f, "book and node agree", "deviations", "put right"))
	}
}

// deviation prints a finding of check with what comes of it.
func (a *app) deviation(f api.Finding) {
	line := func(indent, s string) {
		for i, l := range wrap(printable(s), 160) {
			if i > 0 {
				indent = "    "
			}
			fmt.Fprintln(a.out, indent+l)
		}
	}
	line("", strings.Join(strings.Fields(f.Kind+" "+f.ID+" "+f.What), " ")+": "+f.Why)
	switch {
	case f.Mended:
		line("  ", "put right")
	case f.Error != "":
		line("  ", "not put right: "+f.Error)
	}
	if f.Consequence != "" && !f.Mended {
		line("  ", "consequence: "+f.Consequence)
	}
	if f.Remedy != "" && !(f.Mended && strings.HasPrefix(f.Remedy, "--repair")) {
		line("  ", "remedy: "+f.Remedy)
	}
}

func ageOf(t time.Time) string {
	if t.IsZero() {
		return "-"
	}
	return showAge(time.Since(t))
}

// stateOf is whether something is still there.
func stateOf(f api.Finding, mend bool) string {
	switch {
	case f.Mended:
		return "removed"
	case mend:
		return "stays"
	case f.Mendable:
		return "--fix"
	}
	return "by hand"
}

// outcome is why something is a finding, and what there is to say of its removal.
func outcome(f api.Finding) string {
	switch {
	case f.Error != "":
		return f.Why + "; not removed: " + f.Error
	case f.Remedy != "":
		return f.Why + "; " + f.Remedy
	}
	return f.Why
}
