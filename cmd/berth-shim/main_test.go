package main

import (
	"os/exec"
	"strings"
	"testing"
)

// There is a shim for each container of a node: what it links, each of them has
// in memory. These packages bring more than the shim needs.
func TestDependencies(t *testing.T) {
	out, err := exec.Command("go", "list", "-deps", ".").Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	banned := map[string]bool{"fmt": true, "os": true, "net": true, "log": true, "context": true, "os/exec": true, "os/signal": true,
		"encoding/json": true, "runtime/debug": true, "regexp": true, "k8s.io/klog/v2": true}
	deps := strings.Fields(string(out))
	for _, dep := range deps {
		if banned[dep] {
			t.Errorf("links %s", dep)
		}
		if strings.Contains(dep, ".") && !strings.HasPrefix(dep, "github.com/berthd/berth/") && !strings.HasPrefix(dep, "golang.org/x/sys/") {
			t.Errorf("links %s", dep)
		}
	}
	if len(deps) > 70 {
		t.Errorf("links %d packages, limit 70", len(deps))
	}
}
