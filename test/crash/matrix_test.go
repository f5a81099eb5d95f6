package crash

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/berthd/berth/test/failpoint"
	"github.com/berthd/berth/test/node"
)

// matrixEnv is how large a part of the matrix TestMatrix does: one cell of so
// many. make crash sets 1, all of it.
const matrixEnv = "BERTH_CRASH_MATRIX"

// cellsEnv is a regular expression for the names of the cells to do instead.
const cellsEnv = "BERTH_CRASH_CELLS"

// The victims of a kill that comes from outside, while a program stands at a
// point.
const (
	victimShim   = "kill shim"
	victimDaemon = "kill berthd"
)

// scenario is a life, with what is broken from the start so that further points
// are passed.
type scenario struct {
	name   string
	shared bool
	image  bool
	broken string // point whose first pass fails
}

// clientRetries is passed by a life when it has to repeat a call.
const clientRetries = "client.retries"

// scenarios, of which each is there for the points that those before it do not
// pass.
var scenarios = []scenario{
	{name: "life"},
	{name: "life, shared PID namespace", shared: true},
	{name: "undo of a pod", shared: true, broken: "run pod.ready"},
	{name: "undo of a container", broken: "create container.created"},
	{name: "undo of a start", broken: "start container.running"},
	{name: "undo of an update", broken: "update container.record"},
	{name: "image", image: true},
	{name: "undo of a layer", image: true, broken: "pull layer.commit"},
}

// live lives the scenario once.
func (s scenario) live(f *faulty, l *life) {
	f.Helper()
	l.rig, l.shared = f.rig, s.shared
	l.onRetry = func() { f.points.Pass(clientRetries) }
	if s.broken != "" {
		f.must(f.points.Arm(s.broken, failpoint.Error, 1))
	}
	if s.image {
		l.image()
	} else {
		l.run()
	}
}

// cell is one point of the matrix and what happens there.
type cell struct {
	scenario
	pass
	action string
}

func (c cell) String() string { return fmt.Sprintf("%s, %s: %s", c.scenario.name, c.pass, c.action) }

// actionsAt are the columns of the matrix: what can happen at a point, by whose it
// is.
func actionsAt(p pass, shims bool) []string {
	switch name, _, _ := strings.Cut(p.verb(), " "); {
	case name == "shim":
		return []string{failpoint.Error, failpoint.Hang, failpoint.Kill, victimDaemon}
	case p.point == "runc start.run" || p.point == "runc delete.run":
		// No rubbish: nobody can tell that a runtime has not done what it says.
		return []string{failpoint.Error, failpoint.Hang, failpoint.Kill, failpoint.Sleep, "halfway", "lose"}
	case programs[name] && strings.HasSuffix(p.point, ".run"):
		return []string{failpoint.Error, failpoint.Hang, failpoint.Kill, failpoint.Sleep, "halfway", "lose", "rubbish"}
	case programs[name]:
		return []string{failpoint.Error, failpoint.Hang, failpoint.Kill}
	case shims:
		return []string{failpoint.Error, failpoint.Hang, failpoint.Kill, victimShim}
	}
	return []string{failpoint.Error, failpoint.Hang, failpoint.Kill}
}

var programs = map[string]bool{"runc": true, "bridge": true, "portmap": true}

// cells lets a node live each scenario undisturbed and makes the matrix of the
// points that it passes.
func (f *faulty) cells() (all []cell, passed map[string]bool) {
	f.Helper()
	passed = map[string]bool{}
	known := map[pass]bool{}
	for i, s := range scenarios {
		f.must(f.points.Reset())
		s.live(f, &life{name: fmt.Sprintf("calm%d", i)})
		f.settled("calm")
		trace, err := f.points.Trace()
		f.must(err)
		shims, broken := false, false
		if i := slices.Index(trace, clientRetries); i >= 0 {
			trace = trace[:i] // from here on it is a life like any other
		}
		for _, p := range passes(trace) {
			passed[p.point] = true
			shims = shims || p.verb() == "shim"
			if p.point == s.broken && p.nth == 1 {
				broken = true
				continue
			}
			// The undo is another matter than the work, also at the same point.
			if known[p] && !broken || broken != (s.broken != "") {
				continue
			}
			known[p] = true
			for _, a := range actionsAt(p, shims) {
				all = append(all, cell{s, p, a})
			}
		}
		if s.broken != "" && !f.points.WasHit(s.broken) {
			f.Errorf("%s: %s is never passed", s.name, s.broken)
		}
	}
	f.must(f.points.Reset())
	return all, passed
}

// settled checks the invariant: nothing is there that was not before.
func (f *faulty) settled(what string) {
	f.Helper()
	left, err := f.Settle(f.ctx, f.before, 15*time.Second)
	f.must(err)
	for _, l := range left {
		f.Errorf("%s: leak: %s", what, l)
	}
}

// outcome counts what became of cells, by action.
type outcome struct {
	cells, retried, recreated, restarted, lost, failed int
}

// outcomes is what all workers count together.
type outcomes struct {
	mu    sync.Mutex
	byRow map[string]map[string]*outcome // verb, action
	rules int                            // of iptables, that a killed plugin has left
	loss  []string
}

func (o *outcomes) add(c cell, l *life, restarted, failed bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	verb := c.verb()
	if o.byRow[verb] == nil {
		o.byRow[verb] = map[string]*outcome{}
	}
	if o.byRow[verb][c.action] == nil {
		o.byRow[verb][c.action] = &outcome{}
	}
	n := o.byRow[verb][c.action]
	n.cells++
	if l != nil && l.retries > 0 {
		n.retried++
	}
	if l != nil && l.recreated > 0 {
		n.recreated++
	}
	if restarted {
		n.restarted++
	}
	if failed {
		n.failed++
	}
	if l != nil && len(l.lost) > 0 {
		n.lost++
		o.loss = append(o.loss, fmt.Sprintf("%s: %s", c, strings.Join(l.lost, "; ")))
	}
}

func (o *outcomes) pluginLeft(rules int) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.rules += rules
}

// TestMatrix breaks each pass of each point in each way, with a life around it
// that has to get through, and checks after each that nothing is left. The
// points come from what the programs themselves pass.
func TestMatrix(t *testing.T) {
	part := numberOf(t, matrixEnv, 10)
	begun := time.Now()
	f := newFaulty(t)
	all, passed := f.cells()
	sourceIsPassed(t, passed)
	t.Logf("%d points, %d cells, of which one in %d is done", len(passed), len(all), part)
	if only := os.Getenv(cellsEnv); only != "" {
		re, err := regexp.Compile(only)
		if err != nil {
			t.Fatalf("%s: %v", cellsEnv, err)
		}
		all, part = slices.DeleteFunc(all, func(c cell) bool { return !re.MatchString(c.String()) }), 1
	}
	all = share(all, part)
	queue := make(chan cell, len(all))
	for _, c := range all {
		queue <- c
	}
	close(queue)
	results := &outcomes{byRow: map[string]map[string]*outcome{}}
	var workers sync.WaitGroup
	for i := range matrixWorkers { // not by t.Parallel, which knows processors only
		workers.Go(func() {
			t.Run(fmt.Sprintf("worker%d", i), func(t *testing.T) { work(t, queue, results) })
		})
	}
	workers.Wait()
	results.print(t)
	t.Logf("%d cells in %v", len(all), time.Since(begun).Round(time.Second))
}

// matrixWorkers is how many nodes share the matrix. Many cells wait for a
// deadline most of their time.
const matrixWorkers = 5

// share chooses one cell of so many, another choice each day, so that in time all
// of them are done by everybody's tests.
func share(all []cell, part int) []cell {
	var out []cell
	day := int(time.Now().Unix() / 86400)
	for i, c := range all {
		if (i+day)%part == 0 {
			out = append(out, c)
		}
	}
	return out
}

// TestProductionHasNoFailpoints: what users run has not even the words.
func TestProductionHasNoFailpoints(t *testing.T) {
	if bin == "" {
		t.Skip(node.NeedsRoot)
	}
	with, err := failpointBin()
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"berthd", "berth-shim"} {
		for dir, want := range map[string]bool{bin: false, with: true} {
			b, err := os.ReadFile(filepath.Join(dir, name))
			if err != nil {
				t.Fatal(err)
			}
			if got := bytes.Contains(b, []byte(failpoint.Env)); got != want {
				t.Errorf("%s in %s: has failpoints: %v, want %v", name, dir, got, want)
			}
		}
	}
}

// work does cells on a node of its own until none is left. A node on which a
// cell failed is not used again.
func work(t *testing.T, queue <-chan cell, results *outcomes) {
	var f *faulty
	names := 0
	for c := range queue {
		if f == nil {
			f = newFaulty(t)
		}
		names++
		ok := t.Run(c.String(), func(t *testing.T) {
			ctx, cancel := context.WithTimeout(f.ctx, 3*time.Minute)
			defer cancel()
			f.with(t, ctx).breakAt(c, fmt.Sprintf("cell%d", names), results)
		})
		if !ok {
			keepLog(t, f, c)
			f = nil // its clean-up comes at the end of the test
		}
	}
	if f != nil {
		f.noRows(t)
	}
}

// keepLog puts the end of berthd's log into the test's.
func keepLog(t *testing.T, f *faulty, c cell) {
	if b, err := os.ReadFile(f.LogFile); err == nil {
		t.Logf("%s: berthd's log ends with\n%s", c, b[max(0, len(b)-6000):])
	}
}

// noRows stops the node and checks that its book is as empty as it can be.
func (f *faulty) noRows(t *testing.T) {
	left, err := f.Clean(f.ctx, f.before)
	if err != nil {
		t.Error(err)
	}
	for _, l := range left {
		t.Errorf("at the end: leak: %s", l)
	}
}

// breakAt does one cell.
func (f *faulty) breakAt(c cell, name string, results *outcomes) {
	f.Helper()
	f.must(f.points.Reset())
	var l *life
	pid := f.Pid()
	defer func() {
		results.add(c, l, f.Pid() != pid, f.Failed())
		if l != nil && f.Failed() {
			f.Logf("calls that failed:\n%s", strings.Join(l.notes, "\n"))
		}
	}()
	order, victim := c.action, ""
	if c.action == victimShim || c.action == victimDaemon {
		order, victim = failpoint.Pause, c.action
	}
	f.must(f.points.Arm(c.point, order, c.nth))
	ctx, cancel := context.WithCancel(f.ctx)
	var killer sync.WaitGroup
	if victim != "" {
		killer.Go(func() { f.interfere(ctx, c.point, victim) })
	}
	l = &life{name: name, excused: c.action == victimShim || c.verb() == "shim", slow: c.verb() == "shim" && c.action == failpoint.Hang}
	c.live(f, l)
	cancel()
	killer.Wait()
	// Layers are made in parallel: how often is not the same each time.
	if parallel := c.image && (c.broken != "" || c.nth > 1); !parallel && !f.points.WasHit(c.point) {
		f.Errorf("the point was not passed %d times", c.nth)
	}
	f.revive()
	f.must(f.points.Reset())
	if c.point == "bridge DEL.run" && c.action == "halfway" {
		results.pluginLeft(f.forgivePlugin())
	}
	f.settled("after the cell")
}

// forgivePlugin takes the rules of iptables that are left out of the check, and
// tells how many they are. The bridge plugin removes the interface first; killed
// after that, it does not know, when it is called again, for which addresses it
// had masqueraded, and nobody but the plugin knows that the rules are its own.
func (f *faulty) forgivePlugin() (rules int) {
	f.Helper()
	left, err := f.Settle(f.ctx, f.before, 5*time.Second)
	f.must(err)
	for _, l := range left {
		if strings.HasPrefix(l, "iptables:") {
			f.before[l] = true
			rules++
		}
	}
	return rules
}

// print writes the matrix as a table in Markdown.
func (o *outcomes) print(t *testing.T) {
	t.Helper()
	var b strings.Builder
	b.WriteString("| operation | what happened | cells | call repeated | container made anew | berthd restarted | losses |\n|---|---|---|---|---|---|---|\n")
	total := outcome{}
	for _, verb := range slices.Sorted(maps.Keys(o.byRow)) {
		for _, action := range slices.Sorted(maps.Keys(o.byRow[verb])) {
			n := o.byRow[verb][action]
			fmt.Fprintf(&b, "| %s | %s | %d | %d | %d | %d | %d |\n", verb, action, n.cells, n.retried, n.recreated, n.restarted, n.lost)
			total.cells += n.cells
			total.retried += n.retried
			total.recreated += n.recreated
			total.restarted += n.restarted
			total.lost += n.lost
			total.failed += n.failed
		}
	}
	t.Logf("%s%+v; %d rules of iptables left by a plugin that was killed", b.String(), total, o.rules)
	for _, l := range o.loss {
		t.Logf("lost with a killed shim: %s", l)
	}
}
