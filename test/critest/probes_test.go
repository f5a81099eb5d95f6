package critest

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/berthd/berth/test/images"
	"github.com/berthd/berth/test/node"
)

// probes is how many commands TestProbes runs: as many as BERTH_PROBES says.
const probes = 400

// holding is what a daemon and the shim of a container have taken.
type holding struct {
	goroutines, daemonFiles, shimFiles, zombies int
}

// TestProbes: a container that was probed long leaves nothing: no zombie, no file
// descriptor, no goroutine. The probes succeed, fail, leave a child behind that keeps
// their output, and are killed when their time is up.
func TestProbes(t *testing.T) {
	b := open(t)
	b.ours()
	n := probes
	if text := os.Getenv("BERTH_PROBES"); text != "" {
		var err error
		n, err = strconv.Atoi(text)
		b.must(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience+time.Duration(n)*200*time.Millisecond)
	defer cancel()
	metrics := filepath.Join(b.TempDir(), "m")
	b = b.ownNode(ctx, node.Options{Config: fmt.Sprintf("metrics_listen = \"unix:%s\"\nexec_drain = \"50ms\"\n", metrics)})
	b.pulled(images.Busybox)
	c := b.pod().run(sh("while true; do sleep 1; done")) // its process 1 waits for orphans
	c.probe(40)
	before := c.holds(metrics)
	c.probe(n)
	var after holding
	b.until(fmt.Sprintf("as little as before the probes, %+v", before), func() bool {
		after = c.holds(metrics)
		return after.zombies == 0 && after.goroutines <= before.goroutines+3 && after.daemonFiles <= before.daemonFiles && after.shimFiles <= before.shimFiles
	})
	t.Logf("%d probes: before %+v, after %+v", n, before, after)
	if got := c.exec("ps", "-o", "args"); strings.Contains(got, "sleep 0.") || strings.Contains(got, "sleep 50") {
		t.Errorf("processes of probes are left: %s", got)
	}
}

// ownNode is a box with a daemon that no other test uses, and that has no image yet.
func (b *box) ownNode(ctx context.Context, o node.Options) *box {
	b.Helper()
	own := *b.suite
	o.Bin, o.Registries = b.bin, []string{b.registry.Addr()}
	var err error
	own.node, err = node.New(o)
	b.must(err)
	b.Cleanup(func() {
		if err := own.node.Close(); err != nil {
			b.Errorf("clean-up: %v", err)
		}
	})
	b.must(own.node.Start(ctx))
	own.client, err = own.node.Client()
	b.must(err)
	own.endpoint, own.parent, own.logs = own.node.Socket, own.node.Parent, own.node.LogDir
	return &box{T: b.T, suite: &own, ctx: ctx}
}

// probe runs n commands, some at a time.
func (c *container) probe(n int) {
	c.Helper()
	kinds := []struct {
		command []string
		code    int32
	}{
		{[]string{"true"}, 0}, {[]string{"false"}, 1}, {sh("sleep 0.3 & exit 0"), 0}, {sh("sleep 0.1 | cat; exit 7"), 7},
		{sh("setsid sleep 0.3 >/dev/null 2>&1 & kill -9 $$"), 137},
	}
	next := make(chan int)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for i := range next {
				if i%100 == 99 {
					if _, err := c.tryExec(1, "sh", "-c", "sleep 50 & sleep 50"); err == nil {
						c.Error("a probe that hangs has no error")
					}
					continue
				}
				k := kinds[i%len(kinds)]
				if r, err := c.tryExec(30, k.command...); err != nil || r.ExitCode != k.code {
					c.Errorf("probe %d: exit code %d, want %d, %v", i, r.GetExitCode(), k.code, err)
				}
			}
		})
	}
	for i := range n {
		next <- i
	}
	close(next)
	wg.Wait()
}

// holds counts. The connection that it asks over is part of the count each time.
func (c *container) holds(metrics string) holding {
	c.Helper()
	var info struct{ ShimPid int }
	c.info(&info)
	files, err := c.node.Files()
	c.must(err)
	shim, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", info.ShimPid))
	c.must(err)
	goroutines, err := node.Goroutines(metrics)
	c.must(err)
	return holding{goroutines, files, len(shim), c.zombies(c.node.Pid(), info.ShimPid)}
}

// zombies counts the dead children that these processes, or any of the container,
// have not waited for.
func (c *container) zombies(parents ...int) int {
	c.Helper()
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	c.must(err)
	n := 0
	for _, name := range stats {
		text, err := os.ReadFile(name)
		if err != nil {
			continue
		}
		f := strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))
		if f[0] != "Z" {
			continue
		}
		group, _ := os.ReadFile(filepath.Join(filepath.Dir(name), "cgroup"))
		ours := strings.Contains(string(group), c.id)
		for _, p := range parents {
			ours = ours || f[1] == strconv.Itoa(p)
		}
		if ours {
			n++
		}
	}
	return n
}
