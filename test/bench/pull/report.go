package main

import (
	"fmt"
	"io"
	"slices"
	"text/tabwriter"
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
	{"removal CPU s", func(s sample) float64 { return s.RemoveCPU }, false},
}

// report prints medians, and with several targets what each has in comparison
// with the last one. The ratio is the median of the ratios of each round, in
// which the two ran one after the other.
func report(to io.Writer, c *corpus, targets []*target, samples []sample) {
	for _, t := range targets {
		fmt.Fprintf(to, "%s: %s\n", t.name, t.version)
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
			row(w, t.name, img.Name, t.name, "", samples)
		}
		last := targets[len(targets)-1].name
		for _, t := range targets[:len(targets)-1] {
			row(w, t.name+" / "+last, img.Name, t.name, last, samples)
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
		fmt.Fprintf(w, "%.2f\t", median(values))
	}
	fmt.Fprintln(w)
}

func median(v []float64) float64 {
	if len(v) == 0 {
		return 0
	}
	slices.Sort(v)
	if n := len(v); n%2 == 0 {
		return (v[n/2-1] + v[n/2]) / 2
	}
	return v[len(v)/2]
}
