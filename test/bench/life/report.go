package main

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"
)

// result is what one run of a case measured. The results of case "stage" are
// the stages of the density case; their Round is the number of pods.
type result struct {
	Case    string
	Target  string
	Round   int
	Figures figures
	At      float64 `json:",omitempty"` // seconds since the case began
}

// report prints medians and their ranges, and with several targets the ratio of
// each to the first one: the median of the ratios of the rounds.
func (b *bench) report(to io.Writer) {
	for _, t := range b.targets {
		fmt.Fprintf(to, "%s: %s\n", t.name, t.version)
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
			fmt.Fprintf(w, "%s\tfrom\tto\t", t.name)
			if i > 0 {
				fmt.Fprint(w, "ratio\t")
			}
		}
		fmt.Fprintln(w)
		for _, figure := range names {
			fmt.Fprintf(w, "%s\t", figure)
			base := b.values(name, b.targets[0].name, figure)
			for i, t := range b.targets {
				v := b.values(name, t.name, figure)
				fmt.Fprintf(w, "%s\t%s\t%s\t", number(quantile(v, 0.5)), number(quantile(v, 0)), number(quantile(v, 1)))
				if i > 0 {
					fmt.Fprintf(w, "%s\t", ratio(v, base))
				}
			}
			fmt.Fprintln(w)
		}
		w.Flush()
	}
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
	return number(quantile(r, 0.5))
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

func (b *bench) writeJSON(to string) error {
	if to == "" {
		return nil
	}
	text, err := json.MarshalIndent(b.results, "", " ")
	if err != nil {
		return err
	}
	if text = append(text, '\n'); to == "-" {
		_, err = os.Stdout.Write(text)
		return err
	}
	return os.WriteFile(to, text, 0o644)
}

// plot writes one picture for each figure of the stages of the density case.
func (b *bench) plot(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for _, figure := range b.figureNames("stage") {
		var lines []line
		for _, t := range b.targets {
			l := line{name: t.name}
			byPods := map[int][]float64{}
			for _, r := range b.results {
				if f, ok := r.Figures[figure]; ok && r.Case == "stage" && r.Target == t.name {
					byPods[r.Round] = append(byPods[r.Round], f)
				}
			}
			for _, n := range slices.Sorted(maps.Keys(byPods)) {
				l.points = append(l.points, xy{float64(n), quantile(byPods[n], 0.5)})
			}
			lines = append(lines, l)
		}
		name := strings.NewReplacer(", ", "-", " ", "-", "%", "share", "/", "-").Replace(figure) + ".svg"
		if err := os.WriteFile(filepath.Join(dir, name), []byte(svg(figure, "pods", lines)), 0o644); err != nil {
			return err
		}
	}
	return nil
}
