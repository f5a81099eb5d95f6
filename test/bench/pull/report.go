package main

import (
	"fmt"
	"io"
	"text/tabwriter"

	"github.com/berthd/berth/test/bench/endpoint"
)

// metrics are the columns of the table.
var metrics = []struct {
	name  string
	of    func(sample) float64
	ratio bool
}{
	{"pull s", func(s sample) float64 { return s.PullSeconds }, true},
	{"CPU s", func(s sample) float64 { return s.PullCPU }, true},
	{"written MiB", func(s sample) float64 { return float64(s.Written) / (1 << 20) }, true},
	{"growth MiB", func(s sample) float64 { return float64(s.Growth) / (1 << 20) }, false},
	{"removal s", func(s sample) float64 { return s.RemoveSeconds }, true},
	{"freed s", func(s sample) float64 { return s.FreedSeconds }, true},
	{"removal CPU s", func(s sample) float64 { return s.RemoveCPU }, false},
}

// report prints medians, and with several targets what each has in comparison
// with the last one. The ratio is the median of the ratios of each round, in
// which the two ran one after the other.
func report(to io.Writer, c *corpus, targets []*target, samples []sample) {
	for _, t := range targets {
		fmt.Fprintf(to, "%s: %s\n", t.Name, t.Version)
	}
	for _, img := range c.Images {
		var size int64
		for _, l := range img.Layers {
			size += l.Size
		}
		fmt.Fprintf(to, "\n%s: %d layers, %d entries, %.1f MiB, %.1f MiB unpacked\n",
			img.Name, len(img.Layers), img.Files, float64(size)/(1<<20), float64(img.Unpacked)/(1<<20))
		w := tabwriter.NewWriter(to, 0, 0, 2, ' ', tabwriter.AlignRight)
		fmt.Fprint(w, "\t")
		for _, m := range metrics {
			fmt.Fprintf(w, "%s\t", m.name)
		}
		fmt.Fprintln(w)
		for _, t := range targets {
			row(w, t.Name, img.Name, t.Name, "", samples)
		}
		last := targets[len(targets)-1].Name
		for _, t := range targets[:len(targets)-1] {
			row(w, t.Name+" / "+last, img.Name, t.Name, last, samples)
		}
		w.Flush()
	}
}

func row(w io.Writer, title, image, target, by string, samples []sample) {
	fmt.Fprintf(w, "%s\t", title)
	for _, m := range metrics {
		var values, base []float64
		for _, s := range samples {
			switch {
			case s.Image != image:
			case s.Target == target:
				values = append(values, m.of(s))
			case s.Target == by:
				base = append(base, m.of(s))
			}
		}
		if by != "" && (!m.ratio || len(base) != len(values)) {
			fmt.Fprint(w, "\t")
			continue
		}
		for i := range base {
			values[i] /= max(base[i], 1e-9)
		}
		fmt.Fprintf(w, "%.2f\t", endpoint.Quantile(values, 0.5))
	}
	fmt.Fprintln(w)
}
