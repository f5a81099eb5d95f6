// Command streambench measures exec sessions of a CRI runtime that is running:
// bytes through a command's stdin and stdout, checked, and many sessions, with what
// they leave in the daemon: every other one is an exec that leaves a child behind,
// the others attach and drop the connection in the middle of the output.
//
//	streambench -endpoint unix:///run/berth/berth.sock -image IMAGE -pid PID bytes -n 10 -mib 500
//	streambench … sessions -n 2000
//
// The image needs sh, cat and sleep. With -metrics (the daemon's metrics_listen)
// goroutines are counted, too.
package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berthd/berth/test/node"
	"github.com/berthd/berth/test/stream"
)

type bench struct {
	client    *node.Client
	container string
	protocol  string
	pid       int
	metrics   string
}

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "streambench:", err)
		os.Exit(1)
	}
}

func run() error {
	var b bench
	endpoint := flag.String("endpoint", "unix:///run/berth/berth.sock", "CRI socket")
	image := flag.String("image", "", "image with sh, cat and sleep")
	flag.StringVar(&b.protocol, "protocol", stream.SPDY, "SPDY, v4.channel.k8s.io or v5.channel.k8s.io")
	flag.IntVar(&b.pid, "pid", 0, "the daemon's process ID, to count its descriptors")
	flag.StringVar(&b.metrics, "metrics", "", "URL of the daemon's metrics, to count its goroutines")
	n := flag.Int("n", 10, "repetitions")
	mib := flag.Int64("mib", 500, "bytes: MiB each time")
	at := flag.Int("parallel", 8, "sessions: how many at once")
	flag.Parse()
	dir, err := os.MkdirTemp("", "streambench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	ctx := context.Background()
	if b.client, err = node.Dial(*endpoint, nil); err != nil {
		return err
	}
	pod := node.PodConfig("streambench", dir, "/streambench")
	if err := os.MkdirAll(pod.LogDirectory, 0o755); err != nil {
		return err
	}
	if _, err := b.client.Pull(ctx, *image); err != nil {
		return err
	}
	id, err := b.client.Run(ctx, pod)
	if err != nil {
		return err
	}
	defer b.client.Destroy(ctx, id)
	b.container, err = b.client.Launch(ctx, id, node.ContainerConfig("c", *image, "sh", "-c", "while :; do echo tick; sleep 0.1; done"), pod)
	if err != nil {
		return err
	}
	switch flag.Arg(0) {
	case "bytes":
		return b.bytes(ctx, *n, *mib<<20)
	case "sessions":
		return b.sessions(ctx, *n, *at)
	}
	return errors.New("want bytes or sessions")
}

func (b *bench) exec(ctx context.Context, o stream.Options, cmd ...string) (*stream.Session, error) {
	r, err := b.client.Exec(ctx, &runtime.ExecRequest{ContainerId: b.container, Cmd: cmd, Stdin: o.Stdin, Stdout: o.Stdout, Stderr: o.Stderr})
	if err != nil {
		return nil, err
	}
	return stream.Dial(ctx, b.protocol, r.Url, o)
}

// bytes sends size bytes through cat, and compares sums.
func (b *bench) bytes(ctx context.Context, n int, size int64) error {
	var total time.Duration
	for i := range n {
		begun := time.Now()
		s, err := b.exec(ctx, stream.Options{Stdin: true, Stdout: true}, "cat")
		if err != nil {
			return err
		}
		sent, got := sha256.New(), sha256.New()
		go func() {
			defer s.In.Close()
			block := make([]byte, 64<<10)
			for left := size; left > 0; left -= int64(len(block)) {
				block = block[:min(left, int64(len(block)))]
				for j := 0; j < len(block); j += 64 {
					block[j] = byte(left>>(j%40)) + byte(i)
				}
				sent.Write(block)
				if _, err := s.In.Write(block); err != nil {
					return
				}
			}
		}()
		k, err := io.Copy(got, s.Out)
		if err != nil {
			return err
		}
		code, err := s.Wait()
		s.Close()
		if err != nil || code != 0 || k != size || !bytes.Equal(sent.Sum(nil), got.Sum(nil)) {
			return fmt.Errorf("run %d: %d of %d bytes, equal %t, code %d: %w", i, k, size, bytes.Equal(sent.Sum(nil), got.Sum(nil)), code, err)
		}
		total += time.Since(begun)
	}
	fmt.Printf("%d x %d MiB in and out, all equal: %.0f MiB/s each way\n", n, size>>20, float64(size>>20)*float64(n)/total.Seconds())
	return nil
}

// sessions runs sessions as they should not be: see the package.
func (b *bench) sessions(ctx context.Context, n, parallel int) error {
	if err := b.many(ctx, parallel, parallel); err != nil {
		return err
	}
	time.Sleep(3 * time.Second)
	before := b.held()
	begun := time.Now()
	if err := b.many(ctx, n, parallel); err != nil {
		return err
	}
	took := time.Since(begun)
	time.Sleep(3 * time.Second)
	fmt.Printf("%d sessions in %s, %.1f ms each with %d at once\nbefore: %s\nafter:  %s\n", n, took.Round(time.Millisecond),
		float64(took.Milliseconds())*float64(parallel)/float64(n), parallel, before, b.held())
	return nil
}

func (b *bench) many(ctx context.Context, n, parallel int) error {
	work, errs := make(chan int), make(chan error, parallel)
	var wg sync.WaitGroup
	for range parallel {
		wg.Go(func() {
			for i := range work {
				session := b.one
				if i%2 == 1 {
					session = b.attach
				}
				if err := session(ctx); err != nil {
					select {
					case errs <- err:
					default:
					}
				}
			}
		})
	}
	for i := range n {
		work <- i
	}
	close(work)
	wg.Wait()
	select {
	case err := <-errs:
		return err
	default:
		return nil
	}
}

func (b *bench) one(ctx context.Context) error {
	s, err := b.exec(ctx, stream.Options{Stdout: true, Stderr: true}, "sh", "-c", "sleep 2 & echo out; exit 3")
	if err != nil {
		return err
	}
	defer s.Close()
	go io.Copy(io.Discard, s.Err)
	out, err := io.ReadAll(s.Out)
	if err != nil {
		return err
	}
	code, err := s.Wait()
	if err == nil && (code != 3 || string(out) != "out\n") {
		err = fmt.Errorf("code %d, output %q", code, out)
	}
	return err
}

// attach follows the container's output for a moment.
func (b *bench) attach(ctx context.Context) error {
	r, err := b.client.Attach(ctx, &runtime.AttachRequest{ContainerId: b.container, Stdout: true, Stderr: true})
	if err != nil {
		return err
	}
	s, err := stream.Dial(ctx, b.protocol, r.Url, stream.Options{Stdout: true, Stderr: true})
	if err != nil {
		return err
	}
	defer s.Close()
	line := make([]byte, len("tick\n"))
	if _, err := io.ReadFull(s.Out, line); err != nil {
		return fmt.Errorf("attached: %w", err)
	}
	if string(line) != "tick\n" {
		return fmt.Errorf("attached: output %q", line)
	}
	return nil
}

// held is what the daemon and the container's shim have open.
func (b *bench) held() string {
	text := "?"
	if b.pid > 0 {
		fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", b.pid))
		text = fmt.Sprintf("daemon %d descriptors", len(fds))
		if err != nil {
			text = err.Error()
		}
	}
	shims, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, name := range shims {
		cmd, err := os.ReadFile(name)
		if err != nil || !strings.Contains(string(cmd), b.container) || !strings.HasPrefix(string(cmd), "berth-shim") {
			continue
		}
		fds, _ := os.ReadDir(filepath.Dir(name) + "/fd")
		rollup, _ := os.ReadFile(filepath.Dir(name) + "/smaps_rollup")
		text += fmt.Sprintf(", shim %d descriptors", len(fds))
		for line := range strings.Lines(string(rollup)) {
			if strings.HasPrefix(line, "Private_Dirty:") {
				text += ", " + strings.Join(strings.Fields(line), " ")
			}
		}
	}
	if b.metrics != "" {
		if r, err := http.Get(b.metrics); err == nil {
			defer r.Body.Close()
			m, _ := io.ReadAll(r.Body)
			for line := range strings.Lines(string(m)) {
				if strings.HasPrefix(line, "go_goroutines ") || strings.HasPrefix(line, "berth_stream_sessions") {
					text += ", " + strings.TrimSpace(line)
				}
			}
		}
	}
	return text
}
