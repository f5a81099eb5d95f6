package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berthd/berth/test/node"
)

// The demo's node has no CNI configuration, so berthd brings its own bridge. If
// that bridge is there already it belongs to somebody else, and the demo
// configures one of its own.
const bridge = "berth0"

func bridgeExists() bool {
	_, err := net.InterfaceByName(bridge)
	return err == nil
}

func (d *demo) start(ctx context.Context) error {
	opts := node.Options{Bin: d.bin, Registries: []string{d.registry.Addr()}, CNI: node.NoCNI}
	network := "its own bridge " + bridge + ": the node has no CNI configuration"
	if bridgeExists() {
		opts.CNI = ""
		network = "a CNI configuration of the demo, as " + bridge + " is in use"
	}
	n, err := node.New(opts)
	if err != nil {
		return err
	}
	d.node, d.bridge = n, opts.CNI == node.NoCNI
	if err := n.Start(ctx); err != nil {
		return err
	}
	if d.client, err = n.Client(); err != nil {
		return err
	}
	v, err := d.client.Version(ctx, &runtime.VersionRequest{})
	if err != nil {
		return err
	}
	d.out.say("%s %s, CRI %s on %s", v.RuntimeName, v.RuntimeVersion, v.RuntimeApiVersion, n.Socket)
	d.out.say("network: %s", network)
	return d.conditions(ctx)
}

func (d *demo) conditions(ctx context.Context) error {
	st, err := d.client.Status(ctx, &runtime.StatusRequest{})
	if err != nil {
		return err
	}
	for _, c := range st.Status.Conditions {
		if !c.Status {
			return fmt.Errorf("%s is false: %s: %s", c.Type, c.Reason, c.Message)
		}
		d.out.say("%s", c.Type)
	}
	return nil
}

func (d *demo) pull(ctx context.Context) error {
	id, err := d.client.Pull(ctx, d.image)
	if err != nil {
		return err
	}
	st, err := d.client.Images.ImageStatus(ctx, &runtime.ImageStatusRequest{Image: &runtime.ImageSpec{Image: d.image}})
	if err != nil {
		return err
	}
	if st.Image.GetId() != id {
		return fmt.Errorf("pulled %s, status says %s", id, st.Image.GetId())
	}
	d.out.say("%.19s…, %s unpacked", id, bytesOf(st.Image.Size))
	// host-local's directory comes with the first pod and stays; whether an
	// address is left in it is looked at in the end.
	if err := os.MkdirAll(d.addresses(), 0o700); err != nil {
		return err
	}
	d.before, err = d.node.Marks()
	return err
}

// addresses is where the built-in network keeps the addresses in use.
func (d *demo) addresses() string { return filepath.Join(d.node.StateDir, "cni", "fallback") }

func (d *demo) podConfig() *runtime.PodSandboxConfig {
	return node.PodConfig("demo", d.node.LogDir, d.node.Parent)
}

func (d *demo) runPod(ctx context.Context) error {
	cfg := d.podConfig()
	if err := os.MkdirAll(cfg.LogDirectory, 0o755); err != nil {
		return err
	}
	var err error
	if d.pod, err = d.client.Run(ctx, cfg); err != nil {
		return err
	}
	st, err := d.client.PodSandboxStatus(ctx, &runtime.PodSandboxStatusRequest{PodSandboxId: d.pod})
	if err != nil {
		return err
	}
	if d.ip = st.Status.GetNetwork().GetIp(); d.ip == "" {
		return errors.New("the pod has no address")
	}
	d.out.say("%.13s, address %s, no sandbox process", d.pod, d.ip)
	return nil
}

// The guest adds the pod's host name to its answer.
const (
	greeting = "hello"
	answer   = "hello from demo"
)

func (d *demo) runContainers(ctx context.Context) (err error) {
	if d.web, err = d.launch(ctx, "web", "/guest", "http", ":8080", greeting); err != nil {
		return err
	}
	if d.ticker, err = d.launch(ctx, "ticker", "/guest", "lines", "0", "20000"); err != nil {
		return err
	}
	for _, id := range []string{d.web, d.ticker} {
		if d.pids[id], err = d.pid(ctx, id); err != nil {
			return err
		}
	}
	d.out.say("web %.13s pid %s, ticker %.13s pid %s", d.web, d.pids[d.web], d.ticker, d.pids[d.ticker])
	return nil
}

func (d *demo) launch(ctx context.Context, name string, command ...string) (string, error) {
	return d.client.Launch(ctx, d.pod, node.ContainerConfig(name, d.image, command...), d.podConfig())
}

// pid returns the process of a running container, from its verbose status.
func (d *demo) pid(ctx context.Context, id string) (string, error) {
	r, err := d.client.ContainerStatus(ctx, &runtime.ContainerStatusRequest{ContainerId: id, Verbose: true})
	if err != nil {
		return "", err
	}
	if r.Status.State != runtime.ContainerState_CONTAINER_RUNNING {
		return "", fmt.Errorf("container %s is %s: %s %s", r.Status.Metadata.GetName(), r.Status.State, r.Status.Reason, r.Status.Message)
	}
	var info struct {
		Pid int `json:"pid"`
	}
	if err := json.Unmarshal([]byte(r.Info["info"]), &info); err != nil || info.Pid == 0 {
		return "", fmt.Errorf("verbose status of %s has no pid: %v", id, err)
	}
	return strconv.Itoa(info.Pid), nil
}

func (d *demo) http(ctx context.Context) error {
	url := "http://" + net.JoinHostPort(d.ip, "8080") + "/"
	client := &http.Client{Timeout: 2 * time.Second}
	var last error
	for range 50 { // the server may need a moment to listen
		q, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
		if err != nil {
			return err
		}
		r, err := client.Do(q)
		if err != nil {
			last = err
			time.Sleep(50 * time.Millisecond)
			continue
		}
		body, err := io.ReadAll(io.LimitReader(r.Body, 1<<10))
		r.Body.Close()
		if err != nil || strings.TrimSpace(string(body)) != answer {
			return fmt.Errorf("GET %s: %s %q, %v; want %q", url, r.Status, body, err, answer)
		}
		d.out.say("GET %s: %s, %q", url, r.Status, strings.TrimSpace(string(body)))
		return nil
	}
	return last
}

func (d *demo) logFile(name string) string {
	return filepath.Join(d.podConfig().LogDirectory, name+".log")
}

func (d *demo) logs(ctx context.Context) error {
	n, text, err := d.count()
	if err != nil {
		return err
	}
	lines := strings.SplitN(text, "\n", 4)
	d.out.say("%s\n%s\n%s\n… %d lines, none missing", lines[0], lines[1], lines[2], n)
	return nil
}

// count reads the ticker's log and checks that its lines count up by one.
func (d *demo) count() (int, string, error) {
	for range 100 {
		text, err := os.ReadFile(d.logFile("ticker"))
		if err != nil {
			return 0, "", err
		}
		n := 0
		for l := range strings.Lines(string(text)) {
			f := strings.Fields(l) // time stream tag "line" number
			if !strings.HasSuffix(l, "\n") {
				break // being written
			}
			if len(f) != 5 || f[1] != "stdout" || f[2] != "F" || f[3] != "line" || f[4] != strconv.Itoa(n+1) {
				return 0, "", fmt.Errorf("line %d of the log is %q", n+1, l)
			}
			n++
		}
		if n >= 3 {
			return n, string(text), nil
		}
		time.Sleep(20 * time.Millisecond)
	}
	return 0, "", errors.New("the log stays empty")
}

func (d *demo) exec(ctx context.Context) error {
	r, err := d.client.ExecSync(ctx, &runtime.ExecSyncRequest{ContainerId: d.web, Cmd: []string{"sh", "-c", "id -u; hostname; exit 3"}, Timeout: 10})
	if err != nil {
		return err
	}
	if got := string(r.Stdout); got != "0\ndemo\n" || r.ExitCode != 3 {
		return fmt.Errorf("output %q, code %d; want \"0\\ndemo\\n\", 3", got, r.ExitCode)
	}
	d.out.say("sh -c 'id -u; hostname; exit 3': %q, exit code %d", strings.Fields(string(r.Stdout)), r.ExitCode)
	return nil
}

func (d *demo) stats(ctx context.Context) error {
	r, err := d.client.ListContainerStats(ctx, &runtime.ListContainerStatsRequest{Filter: &runtime.ContainerStatsFilter{PodSandboxId: d.pod}})
	if err != nil {
		return err
	}
	if len(r.Stats) != 2 {
		return fmt.Errorf("%d containers, want 2", len(r.Stats))
	}
	for _, s := range r.Stats {
		cpu, mem := s.GetCpu().GetUsageCoreNanoSeconds().GetValue(), s.GetMemory().GetWorkingSetBytes().GetValue()
		if cpu == 0 || mem == 0 {
			return fmt.Errorf("%s: no figures: %v", s.Attributes.GetMetadata().GetName(), s)
		}
		d.out.say("%-6s  %8s CPU  %9s memory  %9s written", s.Attributes.GetMetadata().GetName(),
			round(time.Duration(cpu)), bytesOf(mem), bytesOf(s.GetWritableLayer().GetUsedBytes().GetValue()))
	}
	return nil
}

// kill kills berthd, with a job under way that ends while it is dead.
func (d *demo) kill(ctx context.Context) (err error) {
	if d.job, err = d.launch(ctx, "job", "sh", "-c", "sleep 1; echo done; exit 7"); err != nil {
		return err
	}
	n, _, err := d.count()
	if err != nil {
		return err
	}
	if err := d.node.Kill(); err != nil {
		return err
	}
	time.Sleep(1500 * time.Millisecond)
	after, _, err := d.count()
	if err != nil {
		return err
	}
	if after <= n {
		return fmt.Errorf("the log stands still at line %d", after)
	}
	d.out.say("log at line %d when it died, at %d after 1.5 s without it", n, after)
	return d.http(ctx)
}

func (d *demo) restart(ctx context.Context) error {
	begun := time.Now()
	if err := d.node.Start(ctx); err != nil {
		return err
	}
	d.client.Reset()
	l, err := d.client.ListContainers(ctx, &runtime.ListContainersRequest{})
	if err != nil {
		return err
	}
	d.out.say("socket answers after %s, lists %d containers", round(time.Since(begun)), len(l.Containers))
	for _, id := range []string{d.web, d.ticker} {
		pid, err := d.pid(ctx, id)
		if err != nil {
			return err
		}
		if pid != d.pids[id] {
			return fmt.Errorf("pid %s has become %s", d.pids[id], pid)
		}
	}
	st, err := d.client.WaitExited(ctx, d.job)
	if err != nil {
		return err
	}
	if st.ExitCode != 7 || st.Reason != "Error" {
		return fmt.Errorf("job: exit code %d, reason %s; want 7, Error", st.ExitCode, st.Reason)
	}
	n, _, err := d.count()
	if err != nil {
		return err
	}
	d.out.say("same processes; job that ended meanwhile: exit code %d; log complete to line %d", st.ExitCode, n)
	if err := d.exec(ctx); err != nil {
		return err
	}
	return d.http(ctx)
}

func (d *demo) remove(ctx context.Context) error {
	if err := d.client.Destroy(ctx, d.pod); err != nil {
		return err
	}
	pods, err := d.client.ListPodSandbox(ctx, &runtime.ListPodSandboxRequest{})
	if err != nil {
		return err
	}
	if len(pods.Items) != 0 {
		return fmt.Errorf("%d pods are left", len(pods.Items))
	}
	return nil
}

// leaks looks for anything that the pod has left, then removes the image and
// looks again.
func (d *demo) leaks(ctx context.Context) error {
	left, err := d.node.Settle(ctx, d.before, 5*time.Second)
	if err != nil {
		return err
	}
	addresses, err := filepath.Glob(filepath.Join(d.addresses(), "*", "[0-9]*.*"))
	if err != nil {
		return err
	}
	if left = append(left, addresses...); len(left) > 0 {
		return fmt.Errorf("left behind:\n%s", strings.Join(left, "\n"))
	}
	d.out.say("no namespace, mount, interface, address, iptables rule, cgroup, process, socket or directory")
	if _, err := d.client.Images.RemoveImage(ctx, &runtime.RemoveImageRequest{Image: &runtime.ImageSpec{Image: d.image}}); err != nil {
		return err
	}
	if left, err = d.node.Clean(ctx, d.before); err != nil {
		return err
	}
	layers, err := filepath.Glob(filepath.Join(d.node.StateDir, "layers", "*"))
	if err != nil {
		return err
	}
	if left = append(left, layers...); len(left) > 0 {
		return fmt.Errorf("left behind:\n%s", strings.Join(left, "\n"))
	}
	rows, err := d.node.Rows()
	if err != nil {
		return err
	}
	if len(rows) > 0 {
		return fmt.Errorf("left in the book:\n%s", strings.Join(rows, "\n"))
	}
	d.out.say("no image, layer or row")
	return nil
}

// removeBridge removes berthd's own bridge if the demo brought it.
func (d *demo) removeBridge() error {
	if !d.bridge || !bridgeExists() {
		return nil
	}
	if out, err := exec.Command("ip", "link", "delete", bridge).CombinedOutput(); err != nil {
		return fmt.Errorf("remove bridge %s: %w: %s", bridge, err, out)
	}
	return nil
}
