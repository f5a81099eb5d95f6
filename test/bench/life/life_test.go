package main

import (
	"encoding/xml"
	"errors"
	"io"
	"strings"
	"sync/atomic"
	"testing"
)

func TestParallel(t *testing.T) {
	var n atomic.Int32
	if err := parallel(100, 7, func(int) error { n.Add(1); return nil }); err != nil || n.Load() != 100 {
		t.Errorf("%d calls, %v", n.Load(), err)
	}
	bad := errors.New("bad")
	n.Store(0)
	err := parallel(1000, 3, func(i int) error {
		n.Add(1)
		if i >= 5 {
			return bad
		}
		return nil
	})
	if !errors.Is(err, bad) || n.Load() > 10 {
		t.Errorf("%d calls, %v", n.Load(), err)
	}
}

func TestSVGIsXML(t *testing.T) {
	text := svg("p50 <ms> & more", "pods", []line{{"a", []xy{{25, 1}, {100, 3.7}}}, {"b", nil}})
	d := xml.NewDecoder(strings.NewReader(text))
	for {
		if _, err := d.Token(); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
	}
	if strings.Contains(text, "NaN") || strings.Contains(text, "Inf") {
		t.Error("a number is none:", text)
	}
}

func TestStep(t *testing.T) {
	for most, want := range map[float64]float64{0: 1, 1: 0.2, 100: 20, 500: 100, 7: 2, 0.03: 0.005} {
		if got := step(most); got < want*0.999 || got > want*1.001 {
			t.Errorf("%v: %v, want %v", most, got, want)
		}
	}
}

func TestRatio(t *testing.T) {
	if got := ratio([]float64{2, 6, 9}, []float64{1, 2, 0}); got != "2.50" {
		t.Error(got)
	}
	if ratio([]float64{1}, nil) != "" {
		t.Error("of nothing")
	}
}
