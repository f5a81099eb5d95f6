package endpoint

import (
	"encoding/json"
	"net"
	"os"
	"path/filepath"
	"testing"
)

func TestQuantile(t *testing.T) {
	v := []float64{5, 1, 4, 2, 3}
	for q, want := range map[float64]float64{0: 1, 0.5: 3, 0.75: 4, 0.9: 4.6, 1: 5} {
		if got := Quantile(v, q); got < want-1e-9 || got > want+1e-9 {
			t.Errorf("%v: %v, want %v", q, got, want)
		}
	}
	if got := Quantile([]float64{1, 2, 4, 8}, 0.5); got != 3 {
		t.Errorf("median of an even number: %v, want 3", got)
	}
	if v[0] != 5 || Quantile(nil, 0.5) != 0 || Quantile([]float64{7}, 0.99) != 7 {
		t.Error("sorted in place, or wrong for none or one")
	}
}

func TestList(t *testing.T) {
	var all []string
	add := List(&all)
	for _, good := range []string{"a=unix:///run/a.sock", "b=/run/b=c.sock"} {
		if err := add(good); err != nil {
			t.Errorf("%q: %v", good, err)
		}
	}
	for _, bad := range []string{"", "a", "=x", "a="} {
		if add(bad) == nil {
			t.Errorf("%q: taken", bad)
		}
	}
	if len(all) != 2 {
		t.Errorf("%q", all)
	}
}

func TestListener(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if pid, err := listener(socket); err != nil || pid != os.Getpid() {
		t.Errorf("process %d, %v, want %d", pid, err, os.Getpid())
	}
	if _, err := listener(socket + "x"); err == nil {
		t.Error("nobody listens there")
	}
}

func TestProc(t *testing.T) {
	if Value("/proc/self/status", "VmRSS") <= 0 || Value("/proc/self/status", "Nonsense") != 0 || Value("/nonsense", "VmRSS") != 0 {
		t.Error("values of files")
	}
	own := CPU(os.Getpid())
	if all := CPUWithChildren(os.Getpid()); all < own || CPU(1<<30) != 0 {
		t.Errorf("processor time: %v s, with children %v s", own, all)
	}
}

func TestWriteJSON(t *testing.T) {
	to := filepath.Join(t.TempDir(), "f")
	if err := WriteJSON(to, []int{1, 2}); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(to)
	var got []int
	if err != nil || json.Unmarshal(text, &got) != nil || len(got) != 2 {
		t.Errorf("%q, %v", text, err)
	}
	if err := WriteJSON("", func() {}); err != nil {
		t.Errorf("nowhere: %v", err)
	}
	if WriteJSON(to, func() {}) == nil {
		t.Error("a function has no JSON")
	}
}
