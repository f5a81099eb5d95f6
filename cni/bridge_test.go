package cni

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/berthd/berth/cni/netns"
	"golang.org/x/sys/unix"
)

// pluginDirs are where distributions and the upstream release put plugins.
var pluginDirs = []string{"/opt/cni/bin", "/usr/lib/cni", "/usr/libexec/cni"}

// realNode is a network with the fallback configuration and real plugins, and
// two namespaces: "host", which plays the node, and "pod". The machine's own
// network is not touched.
type realNode struct {
	t       *testing.T
	pins    *netns.Pins
	network *Network
}

func newRealNode(t *testing.T, subnet string) *realNode {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: namespaces, bridges and packet filter rules")
	}
	r := &runner{}
	for _, p := range []string{"bridge", "host-local", "portmap"} {
		if _, err := r.FindInPath(p, pluginDirs); err != nil {
			t.Skipf("needs CNI plugins: %v", err)
		}
	}
	for _, p := range []string{"iptables", "iptables-save"} {
		if _, err := exec.LookPath(p); err != nil {
			t.Skipf("needs iptables: %v", err)
		}
	}
	dir := t.TempDir()
	if err := netns.PrivateMount(dir); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	pins, err := netns.NewPins(filepath.Join(dir, "ns"))
	if err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{"host", "pod"} {
		if err := pins.Create(t.Context(), id, []netns.Kind{netns.Net}, netns.LoopbackUp); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := pins.Destroy(id); err != nil {
				t.Error(err)
			}
		})
	}
	network, err := New(Config{
		ConfDir: filepath.Join(dir, "net.d"), BinDirs: pluginDirs, CacheDir: filepath.Join(dir, "cache"),
		FallbackSubnet: subnet, FallbackDataDir: filepath.Join(dir, "ipam"),
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := network.Ready(); err != nil {
		t.Fatal(err)
	}
	return &realNode{t: t, pins: pins, network: network}
}

// onHost runs fn on the thread that is in the node's namespace; plugins that it
// starts are there too.
func (n *realNode) onHost(fn func() error) {
	n.t.Helper()
	if err := n.pins.Do("host", netns.Net, fn); err != nil {
		n.t.Fatal(err)
	}
}

func (n *realNode) pod() Pod {
	pod := thePod("0123456789abcdef")
	pod.NetNS = n.pins.Path("pod", netns.Net)
	pod.PortMappings = []PortMapping{{Protocol: "TCP", ContainerPort: 80, HostPort: 8080}}
	return pod
}

// serve answers HTTP inside the pod.
func (n *realNode) serve() {
	n.t.Helper()
	var l net.Listener
	err := n.pins.Do("pod", netns.Net, func() (err error) {
		l, err = net.Listen("tcp", ":80")
		return err
	})
	if err != nil {
		n.t.Fatal(err)
	}
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.WriteString(w, "hello from the pod") })}
	go srv.Serve(l)
	n.t.Cleanup(func() { srv.Close() })
}

// fetch is a GET on the calling thread; http.Client would dial on another.
func fetch(addr string) error {
	c, err := net.DialTimeout("tcp", addr, 2*time.Second)
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(5 * time.Second))
	if _, err := io.WriteString(c, "GET / HTTP/1.0\r\n\r\n"); err != nil {
		return err
	}
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil || string(body) != "hello from the pod" {
		return fmt.Errorf("%s: got %q, %v", addr, body, err)
	}
	return nil
}

// leftovers are what is still there of a pod: addresses, interfaces and rules.
// The bridge and portmap's own base chains are the node's and stay.
func (n *realNode) leftovers(result Result) []string {
	n.t.Helper()
	var left []string
	for _, path := range filesBelow(n.t, n.network.cfg.FallbackDataDir) {
		if name := filepath.Base(path); name != "lock" && !strings.HasPrefix(name, "last_reserved_ip") {
			left = append(left, path)
		}
	}
	left = append(left, filesBelow(n.t, n.network.cfg.CacheDir)...)
	n.onHost(func() error {
		devs, err := os.ReadFile("/proc/thread-self/net/dev")
		if err != nil {
			return err
		}
		for line := range strings.Lines(string(devs)) {
			if name, _, ok := strings.Cut(strings.TrimSpace(line), ":"); ok && strings.HasPrefix(name, "veth") {
				left = append(left, name)
			}
		}
		for _, cmd := range []string{"iptables-save", "ip6tables-save"} {
			rules, err := exec.Command(cmd).Output()
			if err != nil {
				return fmt.Errorf("%s: %w", cmd, err)
			}
			for line := range strings.Lines(string(rules)) {
				if strings.Contains(line, result.IPs[0]) || strings.Contains(line, "0123456789abcdef") || strings.Contains(line, "8080") {
					left = append(left, line)
				}
			}
		}
		return nil
	})
	return left
}

func TestFallbackNetwork(t *testing.T) {
	n := newRealNode(t, "10.213.77.0/24")
	n.serve()
	for round := range 2 {
		var got Result
		n.onHost(func() (err error) {
			got, err = n.network.Attach(t.Context(), n.pod())
			return err
		})
		if !slices.Equal(got.IPs, []string{fmt.Sprintf("10.213.77.%d", 2+round)}) || got.Interface != "eth0" {
			t.Fatalf("got %v on %s", got.IPs, got.Interface)
		}
		if left := n.leftovers(got); len(left) < 4 {
			t.Fatalf("this test would not see what is left of a pod: %q", left)
		}
		n.onHost(func() error { return fetch(got.IPs[0] + ":80") })
		n.onHost(func() error { return fetch("10.213.77.1:8080") })
		n.onHost(func() error { return fetch("127.0.0.1:8080") })
		for range 2 {
			n.onHost(func() error { return n.network.Detach(t.Context(), n.pod()) })
		}
		if left := n.leftovers(got); len(left) != 0 {
			t.Errorf("left behind: %q", left)
		}
		n.onHost(func() error {
			if c, err := net.DialTimeout("tcp", "127.0.0.1:8080", time.Second); err == nil {
				c.Close()
				return errors.New("host port still answers")
			}
			return nil
		})
	}
}

func TestFallbackNetworkIPv6(t *testing.T) {
	n := newRealNode(t, "fd00:213:77::/64")
	n.serve()
	var got Result
	n.onHost(func() (err error) {
		got, err = n.network.Attach(t.Context(), n.pod())
		return err
	})
	if !slices.Equal(got.IPs, []string{"fd00:213:77::2"}) {
		t.Fatalf("got %v", got.IPs)
	}
	// The kernel does not use a new bridge's address before it knows that nobody
	// else has it (RFC 4862, "Duplicate Address Detection"), which takes seconds.
	eventually(t, "an answer from the pod", func() bool {
		return n.pins.Do("host", netns.Net, func() error { return fetch("[" + got.IPs[0] + "]:80") }) == nil
	})
	n.onHost(func() error { return n.network.Detach(t.Context(), n.pod()) })
	if left := n.leftovers(got); len(left) != 0 {
		t.Errorf("left behind: %q", left)
	}
}

// The namespace is gone, as after a reboot, and so is what was in it. What is in
// files must not stay.
func TestFallbackNetworkAfterReboot(t *testing.T) {
	n := newRealNode(t, "10.213.77.0/24")
	n.onHost(func() error {
		_, err := n.network.Attach(t.Context(), n.pod())
		return err
	})
	for _, id := range []string{"pod", "host"} {
		if err := n.pins.Destroy(id); err != nil {
			t.Fatal(err)
		}
	}
	if err := n.pins.Create(t.Context(), "host", []netns.Kind{netns.Net}, netns.LoopbackUp); err != nil {
		t.Fatal(err)
	}
	n.onHost(func() error { return n.network.Detach(context.Background(), Pod{ID: n.pod().ID}) })
	if left := n.leftovers(Result{IPs: []string{"10.213.77.2"}}); len(left) != 0 {
		t.Errorf("left behind: %q", left)
	}
}

// The daemon dies in the middle of ADD: the bridge plugin has done its part, the
// rest has not run.
func TestFallbackNetworkHalfAttached(t *testing.T) {
	n := newRealNode(t, "10.213.77.0/24")
	pod := n.pod()
	half := Result{IPs: []string{"10.213.77.2"}}
	n.onHost(func() error {
		rt, err := pod.runtimeConf()
		if err != nil {
			return err
		}
		full := n.network.view.Load().inUse
		if err := n.network.records.put(newRecord(pod, rt, full)); err != nil {
			return err
		}
		first := *full.list
		first.Plugins = first.Plugins[:1]
		_, err = n.network.lib.AddNetworkList(t.Context(), &first, rt)
		return err
	})
	dropResultsOf(t, n.network)
	if left := n.leftovers(half); len(left) < 3 {
		t.Fatalf("nothing was made: %q", left)
	}
	n.onHost(func() error { return n.network.Detach(t.Context(), pod) })
	if left := n.leftovers(half); len(left) != 0 {
		t.Errorf("left behind: %q", left)
	}
}

func dropResultsOf(t *testing.T, n *Network) {
	t.Helper()
	if err := os.RemoveAll(filepath.Join(n.cfg.CacheDir, "results")); err != nil {
		t.Fatal(err)
	}
}
