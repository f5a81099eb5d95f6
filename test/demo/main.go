// Command demo shows berth at work on this machine, stage by stage: a pull, a
// pod, a daemon killed under it, and that nothing is lost or left behind. It
// uses directories, a socket and a registry of its own and ends with code 0
// only if every stage did what it should. `make demo` runs it.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/berthd/berth/test/images"
	"github.com/berthd/berth/test/node"
	"github.com/berthd/berth/test/registry"
)

// limit bounds the whole demo.
const limit = 5 * time.Minute

func main() {
	bin := flag.String("bin", "", "directory of berthd, berth-shim and berth-init; \"\" builds them")
	keep := flag.Bool("v", false, "print berthd's log if a stage fails")
	flag.Parse()
	if os.Geteuid() != 0 {
		fmt.Fprintln(os.Stderr, "demo: needs root: it starts berthd, namespaces and containers")
		os.Exit(1)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	if err := run(ctx, *bin, *keep); err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

// demo is what the stages share.
type demo struct {
	out      *printer
	dir, bin string
	registry *registry.Server
	node     *node.Node
	bridge   bool // berthd's own bridge is the demo's to remove
	client   *node.Client
	before   node.Marks
	image    string // reference on the local registry
	pod      string // ID
	ip       string
	web      string // container IDs
	ticker   string
	job      string
	pids     map[string]string // container ID -> verbose pid before the kill
}

func run(ctx context.Context, bin string, verbose bool) (err error) {
	dir, err := os.MkdirTemp("", "berth-demo-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	d := &demo{out: newPrinter(os.Stdout), dir: dir, bin: bin, pids: map[string]string{}}
	defer func() { err = errors.Join(err, d.close()) }()
	begun := time.Now()
	for _, s := range []struct {
		name string
		do   func(context.Context) error
	}{
		{"build the image", d.buildImage},
		{"start berthd", d.start},
		{"pull", d.pull},
		{"run a pod", d.runPod},
		{"two containers", d.runContainers},
		{"HTTP from the pod", d.http},
		{"logs", d.logs},
		{"exec", d.exec},
		{"stats", d.stats},
		{"kill -9 berthd", d.kill},
		{"start it again", d.restart},
		{"remove everything", d.remove},
		{"leaks", d.leaks},
	} {
		if err := d.out.stage(ctx, s.name, s.do); err != nil {
			if verbose && d.node != nil {
				text, _ := os.ReadFile(d.node.LogFile)
				os.Stderr.Write(text)
			}
			return fmt.Errorf("%s: %w", s.name, err)
		}
	}
	d.out.end(time.Since(begun))
	return nil
}

// buildImage makes a small image and serves it from this process.
func (d *demo) buildImage(ctx context.Context) error {
	root, err := node.Root()
	if err != nil {
		return err
	}
	guest, err := images.BuildGuest(ctx, root, d.dir)
	if err != nil {
		return err
	}
	all, err := images.Standard(ctx, guest)
	if err != nil {
		return err
	}
	if d.registry, err = registry.Start(); err != nil {
		return err
	}
	d.registry.Push(images.Busybox, images.Tag, all[images.Busybox])
	d.image = d.registry.Ref(images.Busybox, images.Tag)
	img := all[images.Busybox]
	d.out.say("%s, %d layers, %s compressed", d.image, len(img.Layers), bytesOf(uint64(img.Size())))
	if d.bin, err = d.binaries(ctx, root); err != nil {
		return err
	}
	return nil
}

func (d *demo) binaries(ctx context.Context, root string) (string, error) {
	if d.bin == "" {
		return node.Build(ctx, root, d.dir)
	}
	return filepath.Abs(d.bin)
}

// close takes down what the demo made, in whatever state it is.
func (d *demo) close() error {
	var errs []error
	if d.node != nil {
		errs = append(errs, d.node.Close(), d.removeBridge())
	}
	if d.registry != nil {
		errs = append(errs, d.registry.Close())
	}
	return errors.Join(errs...)
}
