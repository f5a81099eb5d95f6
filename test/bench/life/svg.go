package main

import (
	"fmt"
	"html"
	"math"
	"strings"
)

type xy struct{ x, y float64 }

type line struct {
	name   string
	points []xy
}

// The size of a plot and of what surrounds it, in pixels.
const (
	plotWidth, plotHeight = 560, 300
	plotLeft, plotTop     = 60, 40
)

var colours = []string{"#1b6ca8", "#c8553d", "#4f772d", "#6a4c93"}

// svg draws lines over x from 0 and y from 0.
func svg(title, xName string, lines []line) string {
	var maxX, maxY float64
	for _, l := range lines {
		for _, p := range l.points {
			maxX, maxY = max(maxX, p.x), max(maxY, p.y)
		}
	}
	stepX, stepY := step(maxX), step(maxY)
	maxX, maxY = math.Ceil(maxX/stepX)*stepX, math.Ceil(maxY/stepY)*stepY
	at := func(p xy) (x, y float64) {
		return plotLeft + p.x/maxX*plotWidth, plotTop + plotHeight - p.y/maxY*plotHeight
	}
	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" font-family="sans-serif" font-size="12">`+"\n",
		plotLeft+plotWidth+20, plotTop+plotHeight+50)
	fmt.Fprintf(&b, `<rect width="100%%" height="100%%" fill="white"/><text x="%d" y="20" font-size="14">%s</text>`+"\n", plotLeft, html.EscapeString(title))
	for v := 0.0; v <= maxY*1.001; v += stepY {
		_, y := at(xy{0, v})
		fmt.Fprintf(&b, `<path d="M%d %.1fh%d" stroke="#ddd"/><text x="%d" y="%.1f" text-anchor="end">%s</text>`+"\n", plotLeft, y, plotWidth, plotLeft-6, y+4, short(v))
	}
	for v := 0.0; v <= maxX*1.001; v += stepX {
		x, _ := at(xy{v, 0})
		fmt.Fprintf(&b, `<text x="%.1f" y="%d" text-anchor="middle">%s</text>`+"\n", x, plotTop+plotHeight+18, short(v))
	}
	fmt.Fprintf(&b, `<text x="%d" y="%d" text-anchor="middle">%s</text>`+"\n", plotLeft+plotWidth/2, plotTop+plotHeight+38, html.EscapeString(xName))
	for i, l := range lines {
		colour := colours[i%len(colours)]
		var path strings.Builder
		for j, p := range l.points {
			x, y := at(p)
			fmt.Fprintf(&path, "%c%.1f %.1f", "ML"[min(j, 1)], x, y)
			fmt.Fprintf(&b, `<circle cx="%.1f" cy="%.1f" r="3" fill="%s"/>`+"\n", x, y, colour)
		}
		fmt.Fprintf(&b, `<path d="%s" fill="none" stroke="%s" stroke-width="2"/>`+"\n", path.String(), colour)
		fmt.Fprintf(&b, `<text x="%d" y="%d" fill="%s">%s</text>`+"\n", plotLeft+10, plotTop+14+16*i, colour, html.EscapeString(l.name))
	}
	b.WriteString("</svg>\n")
	return b.String()
}

// step is a round number of which most make about five.
func step(most float64) float64 {
	if most <= 0 {
		return 1
	}
	size := math.Pow(10, math.Floor(math.Log10(most/5)))
	for _, m := range []float64{1, 2, 5} {
		if most/(m*size) <= 6 {
			return m * size
		}
	}
	return 10 * size
}

func short(v float64) string { return strings.TrimSuffix(fmt.Sprintf("%.4g", v), ".0") }
