package main

import (
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berthd/berth/cri/admin/api"
)

// progress shows records as they come: on a terminal as one line that changes, with a bar
// where the end is known; elsewhere as a line per stage; with --json as they are.
type progress struct {
	a     *app
	width int // of the terminal; 0 for none
	stage string
	drawn bool
	last  time.Time // of a line without a terminal
}

// lineEvery is how often progress within a stage gets a line where there is no terminal.
const lineEvery = 10 * time.Second

func (a *app) progress() *progress {
	p := &progress{a: a}
	if f, ok := a.err.(*os.File); ok && !a.json {
		if ws, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ); err == nil && ws.Col > 20 {
			p.width = int(ws.Col)
		}
	}
	return p
}

func (p *progress) show(rec api.Record) {
	switch {
	case p.a.json:
		_ = printLine(p.a, rec)
	case rec.Image != nil:
		p.clear()
		name := rec.Image.ID
		if len(rec.Image.Tags) > 0 {
			name += " " + strings.Join(rec.Image.Tags, " ")
		}
		fmt.Fprintln(p.a.out, printable(strings.TrimSpace(rec.Note+" "+name)))
	case rec.Error != nil && !rec.Done:
		p.clear()
		fmt.Fprintln(p.a.err, printable(rec.Ref+": "+rec.Error.Text))
	case rec.Stage == "":
	case p.width > 0:
		p.draw(rec)
	case rec.Ref+rec.Stage != p.stage || time.Since(p.last) >= lineEvery:
		p.stage, p.last = rec.Ref+rec.Stage, time.Now()
		fmt.Fprintln(p.a.err, printable(line(rec)))
	}
}

// line is a record in words.
func line(rec api.Record) string {
	s := rec.Ref + ": " + rec.Stage
	switch {
	case rec.Total > 0:
		s += fmt.Sprintf(", %s of %s", showBytes(rec.Bytes), showBytes(rec.Total))
	case rec.Bytes > 0:
		s += ", " + showBytes(rec.Bytes)
	}
	if rec.Rate > 0 {
		s += ", " + showBytes(rec.Rate) + "/s"
	}
	return s
}

// draw replaces the line on the terminal.
func (p *progress) draw(rec api.Record) {
	s := []rune(printable(line(rec)))
	const bar = 20
	if room := p.width - 1; rec.Total > 0 && room > 2*bar {
		full := int(float64(bar) * min(1, float64(rec.Bytes)/float64(rec.Total)))
		head := "[" + strings.Repeat("=", full) + strings.Repeat(" ", bar-full) + "] "
		s = append([]rune(head), s...)
	}
	if len(s) > p.width-1 {
		s = s[:p.width-1]
	}
	fmt.Fprintf(p.a.err, "\r\x1b[K%s", string(s))
	p.drawn = true
}

// clear takes the line off the terminal.
func (p *progress) clear() {
	if p.drawn {
		fmt.Fprint(p.a.err, "\r\x1b[K")
		p.drawn = false
	}
}
