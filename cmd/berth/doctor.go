package main

import (
	"context"
	"errors"
	"flag"
	"fmt"

	"github.com/berthd/berth/cri/admin/api"
)

// errFindings: the doctor found what keeps the node from working.
var errFindings = errors.New("the node has errors")

// doctor has berthd's program, which knows the configuration and how to try things, look
// at the node. Whether a daemon runs makes no difference to that.
func doctor(a *app, fs *flag.FlagSet) func(context.Context, []string) error {
	quiet := fs.Bool("quiet", false, "show warnings and errors only")
	return func(ctx context.Context, _ []string) error {
		if a.socket != "" {
			return fmt.Errorf("--socket: the doctor looks where the configuration says, see --config: %w", errUsage)
		}
		out, err := a.lookAlone(ctx, "doctor")
		if err != nil {
			return err
		}
		r := report{Checks: []api.Check{}}
		err = records(ctx, out, func(rec api.Record) {
			if rec.Check != nil {
				r.add(*rec.Check, *quiet)
			}
		})
		if a.json {
			err = errors.Join(err, a.printJSON(r))
		} else if len(r.Checks) > 0 || err == nil {
			a.showReport(r)
		}
		if err == nil && r.Errors > 0 {
			return errFindings
		}
		return err
	}
}

// report is what the doctor has found.
type report struct {
	Checks   []api.Check `json:"checks"`
	Errors   int         `json:"errors"`
	Warnings int         `json:"warnings"`
	Notes    int         `json:"notes"`
	OK       int         `json:"ok"`
}

func (r *report) add(c api.Check, quiet bool) {
	switch c.Level {
	case api.LevelError:
		r.Errors++
	case api.LevelWarning:
		r.Warnings++
	case api.LevelNote:
		r.Notes++
	default:
		r.OK++
	}
	if !quiet || c.Level == api.LevelError || c.Level == api.LevelWarning {
		r.Checks = append(r.Checks, c)
	}
}

// showReport prints a line for each check, and below it what is wanted and what to do if
// it is not well.
func (a *app) showReport(r report) {
	width := 0
	for _, c := range r.Checks {
		width = max(width, len(c.Name))
	}
	for _, c := range r.Checks {
		fmt.Fprintf(a.out, "%-8s %-*s  %s\n", c.Level, width, printable(c.Name), printable(c.Seen))
		for _, more := range []struct{ title, text string }{{"want", c.Want}, {"do", c.Remedy}} {
			if more.text == "" {
				continue
			}
			for i, line := range wrap(printable(more.text), 72) {
				title := ""
				if i == 0 {
					title = more.title + ":"
				}
				fmt.Fprintf(a.out, "%*s %s\n", width+10, title, line)
			}
		}
	}
	fmt.Fprintf(a.out, "errors %d, warnings %d, notes %d, ok %d\n", r.Errors, r.Warnings, r.Notes, r.OK)
}
