package main

import (
	"context"
	"flag"
	"fmt"
	"strings"

	"github.com/berthd/berth/cri/admin/api"
)

func imageVerify(a *app, fs *flag.FlagSet) func(context.Context, []string) error {
	q := &api.VerifyRequest{}
	fs.BoolVar(&q.Repair, "repair", false, "fetch damaged layers again")
	fs.BoolVar(&q.Quick, "quick", false, "compare names, sizes, times and modes, and do not read files")
	return func(ctx context.Context, args []string) error {
		q.Refs = args
		c, err := a.client()
		if err != nil {
			return err
		}
		p := a.progress()
		defer p.clear()
		var sum api.Summary
		if err := c.workOn(ctx, api.PathVerify, q, func(rec api.Record) {
			if rec.Summary != nil {
				sum = *rec.Summary
			}
			p.verified(rec)
		}); err != nil {
			return err
		}
		p.clear()
		if !a.json {
			fmt.Fprintf(a.out, "%d images, %d layers, %s read: %s\n", sum.Images, sum.Layers, showBytes(sum.Bytes), verdict(sum))
		}
		if sum.Damaged > sum.Repaired {
			return fmt.Errorf("%w: %d layers", errDamage, sum.Damaged-sum.Repaired)
		}
		return nil
	}
}

func verdict(sum api.Summary) string {
	switch {
	case sum.Damaged == 0:
		return "all whole"
	case sum.Repaired == 0:
		return fmt.Sprintf("%d damaged", sum.Damaged)
	}
	return fmt.Sprintf("%d damaged, %d of them repaired", sum.Damaged, sum.Repaired)
}

// verified shows a record of a verification: damage as lines that stay.
func (p *progress) verified(rec api.Record) {
	l := rec.Layer
	if p.a.json || l == nil {
		if p.a.json {
			_ = printLine(p.a, rec)
		}
		return
	}
	where := fmt.Sprintf("%s: layer %d/%d", rec.Ref, l.Number, l.Of)
	if !l.Damaged && !l.Repaired {
		if p.width > 0 {
			p.draw(api.Record{Ref: rec.Ref, Stage: fmt.Sprintf("layer %d/%d whole", l.Number, l.Of)})
		}
		return
	}
	p.clear()
	say := func(s string) { fmt.Fprintln(p.a.out, printable(s)) }
	if l.Repaired {
		say(where + ": repaired")
		return
	}
	switch {
	case rec.Error != nil:
		say(where + ": damaged: " + strings.ReplaceAll(rec.Error.Text, "\n", "; "))
	case l.Count == 0:
		say(where + ": damaged: found so by the check at the start")
	default:
		say(fmt.Sprintf("%s: damaged: %d deviations", where, l.Count))
	}
	for _, d := range l.Deviations {
		say("  " + d)
	}
	if n := l.Count - int64(len(l.Deviations)); n > 0 && len(l.Deviations) > 0 {
		say(fmt.Sprintf("  and %d more", n))
	}
}
