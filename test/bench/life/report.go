package main

import (
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/berthd/berth/test/bench/endpoint"
)

// result is what one run of a case measured.
type result struct {
	Case    string
	Target  string
	Round   int
	Figures figures
}

// stageResult is what was measured while there were so many pods.
type stageResult struct {
	Case    string
	Target  string
	Pods    int
	Figures figures
}

// written is the form of the JSON.
type written struct {
	Results []result
	Stages  []stageResult
}

// report prints medians and their ranges, and with several targets the ratio of
// each to the first one: the median of the ratios of the rounds.
func (b *bench) report(to io.Writer) {
	for _, t := range b.targets {
		fmt.Fprintf(to, "%s: %s\n", t.Name, t.Version)
	}
	for _, name := range b.o.cases {
		names := b.figureNames(name)
		if len(names) == 0 {
			continue
		}
		fmt.Fprintf(to, "\n%s, %d rounds\n", name, b.o.rounds)
		w := tabwriter.NewWriter(to, 0, 0, 2, ' ', tabwriter.AlignRight)
		fmt.Fprint(w, "\t")
		for i, t := range b.targets {
			fmt.Fprintf(w, "%s\tfrom\tto\t", t.Name)
			if i > 0 {
				fmt.Fprint(w, "ratio\t")
			}
		}
		fmt.Fprintln(w)
		for _, figure := range names {
			fmt.Fprintf(w, "%s\t", figure)
			base := b.values(name, b.targets[0].Name, figure)
			for i, t := range b.targets {
				v := b.values(name, t.Name, figure)
				fmt.Fprintf(w, "%s\t%s\t%s\t", number(endpoint.Quantile(v, 0.5)), number(endpoint.Quantile(v, 0)), number(endpoint.Quantile(v, 1)))
				if i > 0 {
					fmt.Fprintf(w, "%s\t", ratio(v, base))
				}
			}
			fmt.Fprintln(w)
		}
		w.Flush()
		b.reportStages(to, name)
	}
}

// reportStages prints the medians of a case by the number of pods.
func (b *bench) reportStages(to io.Writer, name string) {
	for _, t := range b.targets {
		lines := b.curves(name, t.Name)
		if len(lines) == 0 {
			continue
		}
		fmt.Fprintf(to, "\n%s, %s by the number of pods\n", name, t.Name)
		w := tabwriter.NewWriter(to, 0, 0, 2, ' ', tabwriter.AlignRight)
		for i, l := range lines {
			if i == 0 {
				fmt.Fprint(w, "\t")
				for _, p := range l.points {
					fmt.Fprintf(w, "%.0f\t", p.x)
				}
				fmt.Fprintln(w)
			}
			fmt.Fprintf(w, "%s\t", l.name)
			for _, p := range l.points {
				fmt.Fprintf(w, "%s\t", number(p.y))
			}
			fmt.Fprintln(w)
		}
		w.Flush()
	}
}

// curves are the medians of the figures of a case over the number of pods, one for
// each figure that all stages have, by name.
func (b *bench) curves(name, target string) (out []line) {
	stages := map[int]bool{}
	values := map[string]map[int][]float64{}
	for _, r := range b.stages {
		if r.Case != name || r.Target != target {
			continue
		}
		stages[r.Pods] = true
		for f, v := range r.Figures {
			if values[f] == nil {
				values[f] = map[int][]float64{}
			}
			values[f][r.Pods] = append(values[f][r.Pods], v)
		}
	}
	for _, f := range slices.Sorted(maps.Keys(values)) {
		if len(values[f]) < len(stages) {
			continue
		}
		l := line{name: f}
		for _, n := range slices.Sorted(maps.Keys(values[f])) {
			l.points = append(l.points, xy{float64(n), endpoint.Quantile(values[f][n], 0.5)})
		}
		out = append(out, l)
	}
	return out
}

func ratio(v, base []float64) string {
	if len(v) != len(base) {
		return ""
	}
	var r []float64
	for i := range v {
		if base[i] > 0 {
			r = append(r, v[i]/base[i])
		}
	}
	if len(r) == 0 {
		return ""
	}
	return number(endpoint.Quantile(r, 0.5))
}

func number(v float64) string {
	switch {
	case v >= 100:
		return fmt.Sprintf("%.0f", v)
	case v >= 10:
		return fmt.Sprintf("%.1f", v)
	}
	return fmt.Sprintf("%.2f", v)
}

func (b *bench) figureNames(name string) []string {
	all := map[string]bool{}
	for _, r := range b.results {
		if r.Case == name {
			for f := range r.Figures {
				all[f] = true
			}
		}
	}
	return slices.Sorted(maps.Keys(all))
}

// values are those of a figure, in the order of the rounds.
func (b *bench) values(name, target, figure string) (v []float64) {
	for _, r := range b.results {
		if r.Case == name && r.Target == target {
			if f, ok := r.Figures[figure]; ok {
				v = append(v, f)
			}
		}
	}
	return v
}

// plot writes one picture for each figure of the stages of a case, with a line for
// each target.
func (b *bench) plot(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for _, name := range b.o.cases {
		pictures := map[string][]line{}
		for _, t := range b.targets {
			for _, l := range b.curves(name, t.Name) {
				pictures[l.name] = append(pictures[l.name], line{name: t.Name, points: l.points})
			}
		}
		for figure, lines := range pictures {
			to := filepath.Join(dir, name+"-"+fileName(figure)+".svg")
			if err := os.WriteFile(to, []byte(svg(name+": "+figure, "pods", lines)), 0o644); err != nil {
				return err
			}
		}
	}
	return nil
}

// fileName makes a name for a file of that of a figure.
func fileName(figure string) string {
	words := strings.FieldsFunc(figure, func(r rune) bool { return strings.ContainsRune(" ,:/", r) })
	return strings.ReplaceAll(strings.Join(words, "-"), "%", "share")
}
