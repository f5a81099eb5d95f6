package crash

import (
	"go/ast"
	"go/parser"
	"go/token"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/berthd/berth/test/node"
)

// sourceIsPassed checks that every step that the source names was passed: a new
// one that no scenario gets to is found here.
func sourceIsPassed(t *testing.T, passed map[string]bool) {
	t.Helper()
	root, err := node.Root()
	if err != nil {
		t.Fatal(err)
	}
	points := slices.Collect(maps.Keys(passed))
	total := 0
	for _, dir := range []string{"sandbox", "imageservice", "snapshotter/overlay", "shim/shimd"} {
		for _, name := range stepsIn(t, filepath.Join(root, dir)) {
			total++
			found := slices.ContainsFunc(points, func(p string) bool { return strings.HasSuffix(p, "."+name) })
			if !found {
				t.Errorf("%s: the step %q is passed in no scenario of the matrix", dir, name)
			}
		}
	}
	if total < 50 {
		t.Errorf("the source names %d steps: they are looked for in a wrong way", total)
	}
}

// stepsIn returns the names of all steps and failpoints in a package: the first
// element of each literal in a []step, and the last argument of each call of
// failpoint, point, reach and record, if it is a constant.
func stepsIn(t *testing.T, dir string) []string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*.go"))
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	constants := map[string]string{}
	var parsed []*ast.File
	for _, path := range files {
		if strings.HasSuffix(path, "_test.go") || strings.HasPrefix(filepath.Base(path), "failpoint") {
			continue
		}
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		f, err := parser.ParseFile(token.NewFileSet(), path, text, 0)
		if err != nil {
			t.Fatal(err)
		}
		parsed = append(parsed, f)
		ast.Inspect(f, func(n ast.Node) bool {
			if v, ok := n.(*ast.ValueSpec); ok && len(v.Values) == len(v.Names) {
				for i, name := range v.Names {
					if s, ok := literal(v.Values[i], nil); ok {
						constants[name.Name] = s
					}
				}
			}
			return true
		})
	}
	for _, f := range parsed {
		ast.Inspect(f, func(n ast.Node) bool {
			for _, e := range namedBy(n) {
				if s, ok := literal(e, constants); ok {
					names = append(names, s)
				}
			}
			return true
		})
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// namedBy returns the expressions of a node that name steps.
func namedBy(n ast.Node) []ast.Expr {
	switch n := n.(type) {
	case *ast.CompositeLit:
		list, ok := n.Type.(*ast.ArrayType)
		if !ok {
			return nil
		}
		if of, ok := list.Elt.(*ast.Ident); !ok || of.Name != "step" {
			return nil
		}
		var out []ast.Expr
		for _, e := range n.Elts {
			if s, ok := e.(*ast.CompositeLit); ok && len(s.Elts) > 0 {
				out = append(out, s.Elts[0])
			}
		}
		return out
	case *ast.CallExpr:
		name := ""
		switch f := n.Fun.(type) {
		case *ast.Ident:
			name = f.Name
		case *ast.SelectorExpr:
			name = f.Sel.Name
		}
		if at, ok := map[string]int{"failpoint": 2, "point": 0, "reach": 1, "record": 1}[name]; ok && len(n.Args) > at {
			return n.Args[at : at+1]
		}
	}
	return nil
}

func literal(e ast.Expr, constants map[string]string) (string, bool) {
	switch e := e.(type) {
	case *ast.BasicLit:
		if e.Kind == token.STRING {
			s, err := strconv.Unquote(e.Value)
			return s, err == nil
		}
	case *ast.Ident:
		s, ok := constants[e.Name]
		return s, ok
	}
	return "", false
}
