// Command life measures what pods cost behind a CRI endpoint: the time, the
// memory and the processor time of starting them, having them, asking about them,
// running commands in them, reading what they print, and removing them.
//
//	life -endpoint berth=unix:///run/berth/berth.sock -endpoint peer=unix:///run/containerd/containerd.sock
//	life -cases scale -scale 500 -plots plots
//
// With no endpoint, or one with the address "own", it starts a berthd of its own. With
// several, they take turns in
// every round, the first one last in every second, so that a machine's moods
// meet all of them. Medians are given, and the ratios to the first endpoint.
//
// Nouns: a case is one kind of load, which yields figures; a round is one
// run of a case at each target; a target is an endpoint with the processes behind
// it.
//
// Caveats: processor time is that of the whole machine less that of this program:
// keep it quiet. Put the daemon's state on a file system of its own: removals
// of one daemon slow the creation of files by another on an ext4 without a
// journal. The pods are as the kubelet makes them for a best-effort pod.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/berthd/berth/test/bench/endpoint"
)

// options are what the flags say.
type options struct {
	endpoints       []string
	restart         map[string]string // commands by the names of endpoints
	cases           []string
	rounds          int
	pods, start     int
	scale           int
	churn, workers  int
	execs           int
	logMiB, line    int
	calls           int
	idle            time.Duration
	image           string
	registries      string
	hostNetwork     bool
	dir, bin        string
	config          string
	json, plots     string
	settle, timeout time.Duration
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, parse()); err != nil {
		fmt.Fprintln(os.Stderr, "life:", err)
		os.Exit(1)
	}
}

func parse() *options {
	o := &options{}
	flag.Func("endpoint", "name=unix:///socket of a CRI runtime, or name=own for a berthd that is started here; may be given again", endpoint.List(&o.endpoints))
	var restarts []string
	flag.Func("restart", "name=command that starts the daemon of that endpoint, in the foreground, after it was killed; may be given again", endpoint.List(&restarts))
	list := flag.String("cases", "start,churn,exec,logs,density,restart", "which of "+strings.Join(caseNames(), ", ")+", in this order; restart is left out where no -restart is given and it is no berthd of its own")
	flag.IntVar(&o.rounds, "rounds", 3, "runs of each case at each endpoint, 1 to 1000")
	flag.IntVar(&o.start, "n", 20, "start: pods, one after the other")
	flag.IntVar(&o.churn, "churn", 60, "churn: pods in all")
	flag.IntVar(&o.workers, "workers", 10, "churn, exec: how many at once")
	flag.IntVar(&o.pods, "pods", 100, "density, restart: pods that exist at once")
	flag.IntVar(&o.scale, "scale", 500, "scale: pods that exist at once, of two containers each")
	flag.DurationVar(&o.idle, "idle", 10*time.Second, "density: how long idle processes are watched")
	flag.IntVar(&o.calls, "calls", 100, "density, scale: calls of each kind")
	flag.IntVar(&o.execs, "execs", 60, "exec: commands, one after the other and then again in parallel")
	flag.IntVar(&o.logMiB, "log-mib", 512, "logs: MiB that a container prints")
	flag.IntVar(&o.line, "line", 100, "logs: bytes of a line")
	flag.StringVar(&o.image, "image", "", "image with a shell; \"\" is a busybox that is served here")
	flag.StringVar(&o.registries, "registries-conf", "", "registries.conf for a berthd of its own, to pull -image by")
	flag.BoolVar(&o.hostNetwork, "host-network", false, "pods have the host's network")
	flag.StringVar(&o.dir, "dir", "", "where the state of a berthd of its own goes; \"\" means a temporary directory")
	flag.StringVar(&o.bin, "bin", "", "directory of a built berthd; \"\" means to build it")
	flag.StringVar(&o.config, "config", "", "TOML put into the configuration of a berthd of its own")
	flag.StringVar(&o.json, "json", "", "file for all figures; \"-\" means standard output")
	flag.StringVar(&o.plots, "plots", "", "directory for plots (SVG) of density and scale over the number of pods")
	flag.DurationVar(&o.settle, "settle", 300*time.Millisecond, "pause before each run")
	flag.DurationVar(&o.timeout, "timeout", 2*time.Minute, "longest time of a call")
	flag.Parse()
	o.cases = strings.Split(*list, ",")
	o.restart = map[string]string{}
	for _, r := range restarts {
		name, command, _ := strings.Cut(r, "=")
		o.restart[name] = command
	}
	return o
}

func (o *options) check() error {
	for _, n := range []struct {
		name        string
		v, min, max int
	}{
		{"rounds", o.rounds, 1, 1000}, {"n", o.start, 1, 10000}, {"churn", o.churn, 1, 100000}, {"workers", o.workers, 1, 200},
		{"pods", o.pods, 4, 1000}, {"scale", o.scale, 5, 1000}, {"calls", o.calls, 1, 100000}, {"execs", o.execs, 1, 100000},
		{"log-mib", o.logMiB, 1, 1 << 20}, {"line", o.line, 2, 1 << 20},
	} {
		if n.v < n.min || n.v > n.max {
			return fmt.Errorf("-%s %d: must be %d to %d", n.name, n.v, n.min, n.max)
		}
	}
	for name := range o.restart {
		if !slices.ContainsFunc(o.endpoints, func(e string) bool { return strings.HasPrefix(e, name+"=") }) {
			return fmt.Errorf("-restart %s=…: no endpoint has that name", name)
		}
	}
	for _, c := range o.cases {
		if !slices.Contains(caseNames(), c) {
			return fmt.Errorf("-cases %q: want some of %s", c, strings.Join(caseNames(), ", "))
		}
	}
	return nil
}

func run(ctx context.Context, o *options) error {
	if err := o.check(); err != nil {
		return err
	}
	b, err := open(ctx, o)
	defer b.close()
	if err != nil {
		return err
	}
	for _, name := range o.cases {
		c := caseOf(name)
		for round := range o.rounds {
			order := slices.Clone(b.targets)
			if round%2 == 1 {
				slices.Reverse(order)
			}
			for _, t := range order {
				if c.restarts && !t.restarts() {
					continue
				}
				time.Sleep(o.settle)
				f, err := c.run(ctx, b, t)
				if err != nil {
					return fmt.Errorf("%s: %s, round %d: %w", t.Name, name, round+1, err)
				}
				b.results = append(b.results, result{Case: name, Target: t.Name, Round: round + 1, Figures: f})
				fmt.Fprintf(os.Stderr, "%-8s %-10s round %d/%d\n", name, t.Name, round+1, o.rounds)
			}
		}
	}
	b.report(os.Stdout)
	if o.plots != "" {
		if err := b.plot(o.plots); err != nil {
			return err
		}
	}
	return endpoint.WriteJSON(o.json, written{Results: b.results, Stages: b.stages})
}

// A benchCase is one kind of load.
type benchCase struct {
	name     string
	restarts bool // needs a daemon that can be started again
	run      func(context.Context, *bench, *target) (figures, error)
}

var cases = []benchCase{
	{"start", false, startCase},
	{"churn", false, churnCase},
	{"exec", false, execCase},
	{"logs", false, logsCase},
	{"density", false, densityCase},
	{"restart", true, restartCase},
	{"scale", false, scaleCase},
}

func caseNames() (names []string) {
	for _, c := range cases {
		names = append(names, c.name)
	}
	return names
}

func caseOf(name string) benchCase {
	return cases[slices.IndexFunc(cases, func(c benchCase) bool { return c.name == name })]
}

// logDir is where pods of a target log.
func (b *bench) logDir(t *target) string { return filepath.Join(b.dir, "logs-"+t.Name) }
