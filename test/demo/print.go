package main

import (
	"context"
	"fmt"
	"os"
	"strings"
	"time"
)

// printer writes the stages: a name, what was seen, how long it took.
type printer struct {
	to    *os.File
	color bool
	lines []string
}

func newPrinter(to *os.File) *printer {
	fi, err := to.Stat()
	tty := err == nil && fi.Mode()&os.ModeCharDevice != 0 && os.Getenv("NO_COLOR") == ""
	return &printer{to: to, color: tty}
}

// say adds a line to the stage that runs.
func (p *printer) say(format string, args ...any) {
	p.lines = append(p.lines, strings.Split(strings.TrimRight(fmt.Sprintf(format, args...), "\n"), "\n")...)
}

// stage runs one stage and prints it when it is over.
func (p *printer) stage(ctx context.Context, name string, do func(context.Context) error) error {
	p.lines = nil
	begun := time.Now()
	err := do(ctx)
	took := time.Since(begun)
	mark, tint := "ok", "32"
	if err != nil {
		mark, tint = "FAILED", "31"
		p.say("%v", err)
	}
	fmt.Fprintf(p.to, "%s  %s  %10s\n", p.paint(tint, fmt.Sprintf("%-6s", mark)), p.paint("1", fmt.Sprintf("%-20s", name)), round(took))
	for _, l := range p.lines {
		fmt.Fprintf(p.to, "        %s\n", l)
	}
	return err
}

func (p *printer) end(took time.Duration) {
	fmt.Fprintf(p.to, "\n%s in %s: nothing lost, nothing left.\n", p.paint("32;1", "All of it worked"), round(took))
}

func (p *printer) paint(code, text string) string {
	if !p.color {
		return text
	}
	return "\x1b[" + code + "m" + text + "\x1b[0m"
}

func round(d time.Duration) time.Duration {
	if d < 100*time.Millisecond {
		return d.Round(100 * time.Microsecond)
	}
	return d.Round(time.Millisecond)
}

// bytesOf writes a number of bytes in binary units.
func bytesOf(n uint64) string {
	switch {
	case n >= 1<<20:
		return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20))
	case n >= 1<<10:
		return fmt.Sprintf("%.1f KiB", float64(n)/(1<<10))
	}
	return fmt.Sprintf("%d B", n)
}
