// Command pull measures how image pulls and removals go through CRI: wall
// time, processor time, bytes written and memory of the daemon behind each
// endpoint.
//
//	pull -endpoint berth=unix:///run/berth/berth.sock -endpoint peer=unix:///run/containerd/containerd.sock
//
// With no endpoint it starts a berthd of its own, whose state is below -dir.
// With several, they take turns for every round, so that a machine's moods
// meet all of them. The images are made of copies of this machine's files, the
// same ones for all endpoints, and come from a registry on the loopback
// address.
//
// Nouns:
//
//   - corpus: the images, kept in a directory and made when it is empty.
//   - target: an endpoint and the process behind it.
//   - round: one pull and one removal of one image at each target.
//   - sample: what one round measured at one target.
//
// Caveats: processor time is what the daemon and its children used, to 10 ms;
// the kernel's own threads, which write dirty pages back, are not in it. What
// is dirty is written back before each measurement, outside of it: else one
// target would pay for another. A removal may be answered before its files are gone: it
// counts as over, and the next measurement begins, when the daemon has come to rest.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berthd/berth/test/bench/endpoint"
)

// options are what the flags say.
type options struct {
	endpoints []string
	images    []string
	corpus    string
	source    string
	dir       string
	bin       string
	config    string
	rounds    int
	timeout   time.Duration
	json      string
	serve     string
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "pull:", err)
		os.Exit(1)
	}
}

func parse() options {
	var o options
	flag.Func("endpoint", "name=unix:///socket of a CRI runtime; may be given again; the last one is what the others are compared with", endpoint.List(&o.endpoints))
	images := flag.String("images", strings.Join(imageNames, ","), "which images, by name")
	flag.StringVar(&o.corpus, "corpus", filepath.Join(os.TempDir(), "berth-bench-pull"), "directory of the images; about 700 MiB are written into it once")
	flag.StringVar(&o.source, "source", "/usr", "directory whose files the images are made of")
	flag.StringVar(&o.dir, "dir", "", "where the state of a berthd of its own goes: \"\" means a temporary directory")
	flag.StringVar(&o.bin, "bin", "", "directory of a built berthd; \"\" means to build it")
	flag.StringVar(&o.config, "config", "", "TOML put into the configuration of a berthd of its own")
	flag.IntVar(&o.rounds, "rounds", 5, "pulls of each image at each endpoint, 1 to 1000")
	flag.DurationVar(&o.timeout, "timeout", 10*time.Minute, "longest time of a pull or a removal")
	flag.StringVar(&o.json, "json", "", "file for all samples; \"-\" means standard output")
	flag.StringVar(&o.serve, "serve", "", "address to serve the images at until interrupted, measuring nothing")
	flag.Parse()
	o.images = strings.Split(*images, ",")
	return o
}

func run(ctx context.Context) error {
	o := parse()
	if o.rounds < 1 || o.rounds > 1000 {
		return fmt.Errorf("-rounds %d: must be 1 to 1000", o.rounds)
	}
	c, err := openCorpus(ctx, o.corpus, o.source, o.images)
	if err != nil {
		return err
	}
	reg, err := serve(c, o.serve)
	if err != nil {
		return err
	}
	defer reg.close()
	if o.serve != "" {
		for _, i := range c.Images {
			fmt.Println(reg.ref(i.Name))
		}
		<-ctx.Done()
		return nil
	}
	targets, closeAll, err := openTargets(ctx, o, reg)
	defer closeAll()
	if err != nil {
		return err
	}
	samples, err := measure(ctx, o, c, reg, targets)
	if err != nil {
		return err
	}
	report(os.Stdout, c, targets, samples)
	return endpoint.WriteJSON(o.json, samples)
}

// measure runs all rounds. The first of each image is not counted: it brings
// the image's blobs into the page cache of the registry's side and each daemon
// to its working size.
func measure(ctx context.Context, o options, c *corpus, reg *registry, targets []*target) ([]sample, error) {
	var samples []sample
	for _, img := range c.Images {
		for round := 0; round <= o.rounds; round++ {
			for _, t := range targets {
				s, err := t.round(ctx, o.timeout, img, reg.ref(img.Name))
				if err != nil {
					return nil, fmt.Errorf("%s: image %s: %w", t.Name, img.Name, err)
				}
				s.Round = round
				fmt.Fprintf(os.Stderr, "%-9s %-9s %d/%d  pull %.2fs cpu %.2fs written %d MiB peak %d MiB  remove %.2fs freed %.2fs\n",
					img.Name, t.Name, round, o.rounds, s.PullSeconds, s.PullCPU, s.Written>>20, s.PeakRSS>>20, s.RemoveSeconds, s.FreedSeconds)
				if round > 0 {
					samples = append(samples, s)
				}
			}
		}
	}
	return samples, nil
}

// settle writes back what is dirty and gives the disk a moment.
func settle() {
	unix.Sync()
	time.Sleep(200 * time.Millisecond)
}
