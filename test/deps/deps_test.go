// Package deps holds the structure of the program: who may import whom, which
// library may be used where, and how many packages each binary is made of.
package deps

import (
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/berthd/berth/"

// allowed is the table of docs/architecture.md: what each package may import of
// berth. A package that is not in it fails the test.
var allowed = map[string][]string{
	"cmd/berthd": {"cmd/berthd/doctor", "cri", "cri/admin", "cri/admin/api", "sandbox", "sandbox/spec", "sandbox/cgroup", "sandbox/nri", "imageservice", "imageservice/layer", "imageservice/preload", "snapshotter", "snapshotter/overlay",
		"store", "cni", "cni/netns", "shim"},
	"cmd/berthd/doctor":         {"cri/admin/api", "sandbox", "sandbox/cgroup", "cni", "snapshotter/overlay"},
	"cmd/berth":                 {"cri/admin/api"},
	"cmd/berth-shim":            {"shim/shimd"},
	"cmd/berth-init":            {},
	"cri":                       {"sandbox", "sandbox/spec", "imageservice"},
	"cri/admin":                 {"cri/admin/api", "imageservice"},
	"cri/admin/api":             {},
	"sandbox":                   {"imageservice", "cni", "cni/netns", "shim", "sandbox/spec", "sandbox/cgroup", "sandbox/nri", "snapshotter", "store"},
	"sandbox/spec":              {},
	"sandbox/cgroup":            {},
	"sandbox/nri":               {},
	"imageservice/archive":      {},
	"imageservice/preload":      {"imageservice", "store"},
	"imageservice":              {"imageservice/archive", "imageservice/layer", "imageservice/registry", "snapshotter", "store"},
	"imageservice/layer":        {"imageservice/layer/gunzip"},
	"imageservice/layer/gunzip": {},
	"imageservice/registry":     {},
	"snapshotter":               {},
	"snapshotter/overlay":       {"snapshotter", "store"},
	"snapshotter/snapshottest":  {"snapshotter"},
	"cni":                       {"cni/netns"},
	"cni/netns":                 {},
	"shim":                      {"shim/wire"},
	"shim/shimd":                {"shim/wire", "shim/crilog"},
	"shim/wire":                 {},
	"shim/crilog":               {},
	"store":                     {},
}

// fences are libraries that may be used in few places, each for its reason.
var fences = map[string][]string{
	"go.etcd.io/bbolt":                   {"store"},             // one book, one owner
	"github.com/containernetworking/cni": {"cni"},               // plugins are never trusted, and one package sees to it
	"github.com/containers/image":        {"imageservice"},      // its size and its settings stay in one place
	"google.golang.org/grpc":             {"cri", "cmd/berthd"}, // no codes below the edge: errors are errors
	"k8s.io/cri-api":                     {"cri", "sandbox", "sandbox/spec"},
	"k8s.io/cri-streaming":               {"cri"},
	"k8s.io/streaming":                   {"cri"},
	"github.com/prometheus":              {"cri", "cmd/berthd"},
	"github.com/BurntSushi/toml":         {"cmd/berthd", "cmd/berth", "imageservice"}, // imageservice: hosts.toml
	"github.com/opencontainers/selinux":  {"sandbox"},
	"github.com/containerd/nri":          {"sandbox/nri"}, // settings of the whole process have one owner
	"tags.cncf.io":                       {"sandbox"},
}

// closed are trees that import nothing of others but x/sys: the shim's size is
// a feature, and so is what process 1 of a pod is made of.
var closed = []string{"shim/shimd", "shim/wire", "shim/crilog", "cmd/berth-shim", "cmd/berth-init"}

// The most packages that a binary may consist of, the standard library included.
// Raise a number only for a dependency that has earned its place.
var counts = map[string]int{"cmd/berthd": 640, "cmd/berth": 200, "cmd/berth-shim": 64, "cmd/berth-init": 60}

type goPackage struct {
	ImportPath string
	Imports    []string
	Deps       []string
	Standard   bool
}

func mustList(t *testing.T) map[string]goPackage {
	t.Helper()
	// The Makefile's tags, whatever the caller's environment says.
	cmd := exec.Command("go", "list", "-tags=containers_image_openpgp,nri_no_wasm", "-json=ImportPath,Imports,Deps,Standard", "./...")
	cmd.Dir = "../.."
	out, err := cmd.Output()
	if err != nil {
		var e *exec.ExitError
		if errors.As(err, &e) {
			t.Fatalf("go list: %v: %s", err, e.Stderr)
		}
		t.Fatal(err)
	}
	list := map[string]goPackage{}
	for dec := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p goPackage
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			return list
		} else if err != nil {
			t.Fatal(err)
		}
		if name, ok := strings.CutPrefix(p.ImportPath, module); ok {
			list[name] = p
		}
	}
}

func TestImportTable(t *testing.T) {
	for name, p := range mustList(t) {
		if strings.HasPrefix(name, "test/") {
			continue
		}
		may, ok := allowed[name]
		if !ok {
			t.Errorf("%s is not in the table", name)
			continue
		}
		for _, imp := range p.Imports {
			if own, ok := strings.CutPrefix(imp, module); ok && !slices.Contains(may, own) {
				t.Errorf("%s imports %s, which is not below it in the table", name, own)
			}
		}
	}
}

func TestFences(t *testing.T) {
	for name, p := range mustList(t) {
		if strings.HasPrefix(name, "test/") {
			continue
		}
		for _, imp := range p.Imports {
			for lib, where := range fences {
				if within(imp, lib) && !slices.Contains(where, name) {
					t.Errorf("%s imports %s, which belongs in %s only", name, imp, strings.Join(where, ", "))
				}
			}
			if slices.Contains(closed, name) && strings.Contains(strings.Split(imp, "/")[0], ".") &&
				!within(imp, "golang.org/x/sys") && !strings.HasPrefix(imp, module) {
				t.Errorf("%s imports %s; it may use the standard library and golang.org/x/sys", name, imp)
			}
			if strings.HasPrefix(name, "shim") && within(imp, "k8s.io/klog") {
				t.Errorf("%s imports klog", name)
			}
		}
	}
}

func within(imp, lib string) bool { return imp == lib || strings.HasPrefix(imp, lib+"/") }

func TestDependencyCounts(t *testing.T) {
	list := mustList(t)
	for name, most := range counts {
		if n := len(list[name].Deps); n > most {
			t.Errorf("%s is made of %d packages, limit %d", name, n, most)
		} else if n == 0 {
			t.Errorf("%s: no dependencies listed", name)
		} else {
			t.Logf("%s: %d packages of at most %d", name, n, most)
		}
	}
}

// TestNoFailpointsInProduction: programs are made of no package of the tests,
// unless they are built with the tag "failpoint".
func TestNoFailpointsInProduction(t *testing.T) {
	for name, p := range mustList(t) {
		if !strings.HasPrefix(name, "cmd/") {
			continue
		}
		for _, d := range p.Deps {
			if strings.HasPrefix(d, module+"test/") {
				t.Errorf("%s is made of %s", name, d)
			}
		}
	}
	cmd := exec.Command("go", "list", "-deps", "-tags", "containers_image_openpgp,nri_no_wasm,failpoint", "./cmd/berthd")
	cmd.Dir = "../.."
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(out), module+"test/failpoint\n") {
		t.Error("berthd has no failpoints with the tag either: this test looks in a wrong way")
	}
}
