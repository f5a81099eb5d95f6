package cni

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestAttachDetach(t *testing.T) {
	for _, version := range []string{"", "0.3.1", "0.4.0", "1.0.0", "1.1.0"} {
		t.Run("cniVersion "+version, func(t *testing.T) {
			node := newNode(t)
			result := ""
			if version == "" {
				result = `{"ip4":{"ip":"10.1.0.2/24"},"ip6":{"ip":"fd00::2/64"}}`
			}
			if version == "0.3.1" || version == "0.4.0" {
				result = `{"cniVersion":"` + version + `","interfaces":[{"name":"br0"},{"name":"eth0","sandbox":"/x"}],
					"ips":[{"version":"4","interface":1,"address":"10.1.0.2/24"},{"version":"6","interface":1,"address":"fd00::2/64"}]}`
			}
			node.conf("10-net.conflist", node.list("pods", version, fake{typ: "fake-a", result: result}, fake{typ: "fake-b"}))
			network := node.start()

			pod := thePod("p1")
			pod.PortMappings = []PortMapping{{Protocol: "TCP", ContainerPort: 80, HostPort: 8080, HostIP: "127.0.0.1"}, {ContainerPort: 81}}
			pod.Annotations = map[string]string{ingressBandwidth: "10M"}
			pod.DNS = DNS{Servers: []string{"10.0.0.10"}}
			pod.CgroupPath = "/kubepods/p1"
			got, err := network.Attach(t.Context(), pod)
			if err != nil {
				t.Fatal(err)
			}
			if want := []string{"10.1.0.2", "fd00::2"}; !slices.Equal(got.IPs, want) || got.Interface != "eth0" {
				t.Errorf("got %v on %s, want %v on eth0", got.IPs, got.Interface, want)
			}
			if !json.Valid(got.Raw) || !strings.Contains(string(got.Raw), "10.1.0.2/24") {
				t.Errorf("raw result: %s", got.Raw)
			}
			if ids, err := network.Attachments(); err != nil || !slices.Equal(ids, []string{"p1"}) {
				t.Errorf("attachments: %v, %v", ids, err)
			}

			if err := network.Detach(t.Context(), Pod{ID: "p1"}); err != nil {
				t.Fatal(err)
			}
			calls := node.calls()
			if got, want := node.verbs(), []string{"ADD fake-a p1", "ADD fake-b p1", "DEL fake-b p1", "DEL fake-a p1"}; !slices.Equal(got, want) {
				t.Fatalf("calls: got %v, want %v", got, want)
			}
			const ports = `[{"containerPort":80,"hostIP":"127.0.0.1","hostPort":8080,"protocol":"tcp"}]`
			for i, c := range calls {
				if want := "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;K8S_POD_INFRA_CONTAINER_ID=p1;K8S_POD_UID=u-p1"; c.Args != want {
					t.Errorf("call %d: CNI_ARGS: got %s, want %s", i, c.Args, want)
				}
				if b, _ := json.Marshal(c.Runtime["portMappings"]); string(b) != ports {
					t.Errorf("call %d: port mappings: got %s, want %s", i, b, ports)
				}
				for _, key := range []string{"bandwidth", "dns", "cgroupPath"} {
					if c.Runtime[key] == nil {
						t.Errorf("call %d: no %s", i, key)
					}
				}
				if c.NetNS != "/proc/self/ns/net" || c.IfName != "eth0" {
					t.Errorf("call %d: namespace %q, interface %q", i, c.NetNS, c.IfName)
				}
			}
			if wantPrev := version != "" && version != "0.3.1"; calls[3].Prev != wantPrev {
				t.Errorf("DEL got the result of ADD: %v, want %v", calls[3].Prev, wantPrev)
			}
			if ids, err := network.Attachments(); err != nil || len(ids) != 0 {
				t.Errorf("attachments after Detach: %v, %v", ids, err)
			}
			if left := filesBelow(t, node.cfg.CacheDir); len(left) != 0 {
				t.Errorf("files after Detach: %v", left)
			}
		})
	}
}

func filesBelow(t *testing.T, dir string) []string {
	t.Helper()
	var files []string
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			files = append(files, path)
		}
		return err
	})
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	return files
}

// What a crash between the record and the end of ADD leaves is detached with the
// configuration and port mappings of then.
func TestDetachAfterCrash(t *testing.T) {
	node := newNode(t)
	node.conf("10-net.conflist", node.list("pods", "1.0.0", fake{typ: "fake-a"}))
	crashed := node.start()
	pod := thePod("p1")
	pod.PortMappings = []PortMapping{{ContainerPort: 80, HostPort: 8080}}
	rt, err := pod.runtimeConf()
	if err != nil {
		t.Fatal(err)
	}
	if err := crashed.records.put(newRecord(pod, rt, crashed.view.Load().inUse)); err != nil {
		t.Fatal(err)
	}
	half := filepath.Join(crashed.records.dir, "p2.json.tmp")
	if err := os.WriteFile(half, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}

	node.conf("10-net.conflist", "") // and the node has no configuration any more
	network := node.start()
	if _, err := os.Stat(half); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("unfinished record: %v", err)
	}
	if ids, err := network.Attachments(); err != nil || !slices.Equal(ids, []string{"p1"}) {
		t.Errorf("attachments: %v, %v", ids, err)
	}
	if err := network.Detach(t.Context(), Pod{ID: "p1", NetNS: "/absent"}); err != nil {
		t.Fatal(err)
	}
	calls := node.calls()
	if len(calls) != 1 || calls[0].Verb != "DEL" || calls[0].Runtime["portMappings"] == nil {
		t.Errorf("calls: %+v", calls)
	}
	node.verbs()
	for range 2 {
		if err := network.Detach(t.Context(), Pod{ID: "p1"}); err != nil {
			t.Fatal(err)
		}
	}
	if got := node.verbs(); len(got) != 0 {
		t.Errorf("calls for a pod without attachment and configuration: %v", got)
	}
}

func TestDetachByOtherMeans(t *testing.T) {
	old, current := "OLD", "NEW"
	tests := []struct {
		name  string
		spoil func(t *testing.T, node *node)
		conf  bool   // is there a configuration by then
		want  string // of the configuration that DEL is called with; "" no call
	}{
		{"record", func(*testing.T, *node) {}, true, old},
		{"record, no configuration", func(*testing.T, *node) {}, false, old},
		{"record gone, result cached", dropRecord, true, old},
		{"record garbled, result cached", garbleRecord, false, old},
		{"both gone", func(t *testing.T, n *node) { dropRecord(t, n); dropResults(t, n) }, true, current},
		{"record garbled, result gone", func(t *testing.T, n *node) { garbleRecord(t, n); dropResults(t, n) }, true, current},
		{"both gone, no configuration", func(t *testing.T, n *node) { dropRecord(t, n); dropResults(t, n) }, false, ""},
		{"both gone, plugin missing", func(t *testing.T, n *node) {
			dropRecord(t, n)
			dropResults(t, n)
			if err := os.Remove(filepath.Join(n.cfg.BinDirs[1], "fake-b")); err != nil {
				t.Fatal(err)
			}
		}, true, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			node := newNode(t)
			node.conf("10-net.conflist", node.list(old, "1.0.0", fake{typ: "fake-a"}))
			if _, err := node.start().Attach(t.Context(), thePod("p1")); err != nil {
				t.Fatal(err)
			}
			node.conf("10-net.conflist", "")
			if tt.conf {
				node.conf("10-net.conflist", node.list(current, "1.0.0", fake{typ: "fake-b"}))
			}
			node.verbs()
			tt.spoil(t, node)
			network := node.start()
			if err := network.Detach(t.Context(), thePod("p1")); err != nil {
				t.Fatal(err)
			}
			want := map[string][]string{old: {"DEL fake-a p1"}, current: {"DEL fake-b p1"}}[tt.want]
			if got := node.verbs(); !slices.Equal(got, want) {
				t.Errorf("calls: got %v, want %v", got, want)
			}
			if left := filesBelow(t, node.cfg.CacheDir); len(left) != 0 {
				t.Errorf("files afterwards: %v", left)
			}
		})
	}
}

func dropRecord(t *testing.T, n *node) {
	t.Helper()
	if err := os.Remove(filepath.Join(n.cfg.CacheDir, "attachments", "p1.json")); err != nil {
		t.Fatal(err)
	}
}

func garbleRecord(t *testing.T, n *node) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(n.cfg.CacheDir, "attachments", "p1.json"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
}

func dropResults(t *testing.T, n *node) {
	t.Helper()
	if err := os.RemoveAll(filepath.Join(n.cfg.CacheDir, "results")); err != nil {
		t.Fatal(err)
	}
}

func TestDetachRetried(t *testing.T) {
	node := newNode(t)
	node.conf("10-net.conflist", node.list("pods", "1.0.0", fake{typ: "fake-a", do: "DEL=error"}))
	network := node.start()
	if _, err := network.Attach(t.Context(), thePod("p1")); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		var perr *PluginError
		if err := network.Detach(t.Context(), thePod("p1")); !errors.As(err, &perr) || perr.Verb != "DEL" || perr.Code != 11 {
			t.Errorf("got %v, want the plugin's error", err)
		}
	}
	if ids, err := network.Attachments(); err != nil || !slices.Equal(ids, []string{"p1"}) {
		t.Errorf("attachments after failed Detach: %v, %v", ids, err)
	}
	// A second Attach removes what the first left, and says so if it cannot.
	if _, err := network.Attach(t.Context(), thePod("p1")); err == nil || !strings.Contains(err.Error(), "earlier attachment") {
		t.Errorf("Attach over an attachment that cannot be removed: %v", err)
	}
}

func TestAttachTwice(t *testing.T) {
	node := newNode(t)
	node.conf("10-net.conflist", node.list("pods", "1.0.0", fake{typ: "fake-a"}))
	network := node.start()
	for range 2 {
		if _, err := network.Attach(t.Context(), thePod("p1")); err != nil {
			t.Fatal(err)
		}
	}
	want := []string{"ADD fake-a p1", "DEL fake-a p1", "ADD fake-a p1"}
	if got := node.verbs(); !slices.Equal(got, want) {
		t.Errorf("calls: got %v, want %v", got, want)
	}
}

func TestAttachRefused(t *testing.T) {
	node := newNode(t)
	network := node.start()
	if _, err := network.Attach(t.Context(), thePod("p1")); !errors.Is(err, ErrNotReady) || !strings.Contains(err.Error(), node.cfg.ConfDir) {
		t.Errorf("without configuration: got %v", err)
	}
	node.conf("10-net.conflist", node.list("pods", "1.0.0", fake{typ: "absent"}))
	network.Reload()
	_, err := network.Attach(t.Context(), thePod("p1"))
	if !errors.Is(err, ErrPluginMissing) || !strings.Contains(err.Error(), `"absent" in `+strings.Join(node.cfg.BinDirs, ", ")) {
		t.Errorf("without plugin: got %v", err)
	}
	pod := thePod("p1")
	pod.NetNS = node.cfg.ConfDir
	if _, err := network.Attach(t.Context(), pod); !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), node.cfg.ConfDir) {
		t.Errorf("without namespace: got %v", err)
	}
	if ids, err := network.Attachments(); err != nil || len(ids) != 0 {
		t.Errorf("attachments: %v, %v", ids, err)
	}
	if err := network.Detach(t.Context(), thePod("p1")); err != nil {
		t.Errorf("Detach after an Attach that was refused: %v", err)
	}
	if err := network.Detach(t.Context(), Pod{ID: "../x"}); !errors.Is(err, ErrInvalid) {
		t.Errorf("Detach of a bad ID: %v", err)
	}
}

func TestConcurrency(t *testing.T) {
	node := newNode(t)
	node.cfg.MaxConcurrent = 2
	node.conf("10-net.conflist", node.list("pods", "1.0.0", fake{typ: "fake-a", do: "ADD=slow"}))
	network := node.start()
	errs := make(chan error)
	const pods = 6
	for i := range pods {
		go func() {
			_, err := network.Attach(t.Context(), thePod(fmt.Sprintf("p%d", i)))
			errs <- err
		}()
	}
	for range pods {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	calls := node.calls()
	most := 0
	for _, a := range calls {
		n := 0
		for _, b := range calls {
			if !b.Start.After(a.Start) && b.End.After(a.Start) {
				n++
			}
		}
		most = max(most, n)
	}
	if len(calls) != pods || most != 2 {
		t.Errorf("%d calls, %d at once; want %d and 2", len(calls), most, pods)
	}
}

func TestWaitingEnds(t *testing.T) {
	node := newNode(t)
	node.cfg.MaxConcurrent = 1
	node.conf("10-net.conflist", node.list("pods", "1.0.0", fake{typ: "fake-a", do: "ADD=hang"}))
	network := node.start()
	hanging, stop := context.WithCancel(t.Context())
	done := make(chan error)
	go func() {
		_, err := network.Attach(hanging, thePod("p1"))
		done <- err
	}()
	for len(node.calls()) == 0 {
		time.Sleep(5 * time.Millisecond)
	}
	for id, want := range map[string]string{"p1": "another operation on its network", "p2": "one of 1 network operations to end"} {
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		err := network.Detach(ctx, thePod(id))
		cancel()
		if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want %q", id, err, want)
		}
	}
	start := time.Now()
	network.Ready()
	network.Info()
	if d := time.Since(start); d > time.Second {
		t.Errorf("Ready and Info waited %v for a plugin", d)
	}
	stop()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

func TestGC(t *testing.T) {
	for _, version := range []string{"1.0.0", "1.1.0"} {
		t.Run(version, func(t *testing.T) {
			node := newNode(t)
			node.conf("10-net.conflist", node.list("old", version, fake{typ: "fake-a"}))
			before := node.start()
			for _, id := range []string{"keep", "stale", "stale-result"} {
				if _, err := before.Attach(t.Context(), thePod(id)); err != nil {
					t.Fatal(err)
				}
			}
			if err := before.records.remove("stale-result"); err != nil {
				t.Fatal(err)
			}
			node.conf("10-net.conflist", node.list("new", version, fake{typ: "fake-b"}))
			network := node.start()
			if _, err := network.Attach(t.Context(), thePod("born-meanwhile")); err != nil {
				t.Fatal(err)
			}
			node.verbs()
			if err := network.GC(t.Context(), []Pod{{ID: "keep"}}); err != nil {
				t.Fatal(err)
			}
			calls := node.calls()
			got := node.verbs()
			want := []string{"DEL fake-a stale", "DEL fake-a stale-result"}
			slices.Sort(got[:2])
			if version == "1.1.0" {
				want = append(want, "GC fake-b")
				var valid []string
				for _, v := range calls[len(calls)-1].Valid {
					valid = append(valid, v["containerID"]+"/"+v["ifname"])
				}
				if want := []string{"born-meanwhile/eth0", "keep/eth0"}; !slices.Equal(valid, want) {
					t.Errorf("GC: valid attachments: got %v, want %v", valid, want)
				}
			}
			if !slices.Equal(got, want) {
				t.Errorf("calls: got %v, want %v", got, want)
			}
			if ids, err := network.Attachments(); err != nil || !slices.Equal(ids, []string{"born-meanwhile", "keep"}) {
				t.Errorf("attachments: %v, %v", ids, err)
			}
		})
	}
}

func TestGCErrors(t *testing.T) {
	node := newNode(t)
	node.conf("10-net.conflist", node.list("pods", "1.1.0", fake{typ: "fake-a", do: "DEL=error GC=stderr"}))
	before := node.start()
	for _, id := range []string{"p1", "p2"} {
		if _, err := before.Attach(t.Context(), thePod(id)); err != nil {
			t.Fatal(err)
		}
	}
	err := node.start().GC(t.Context(), nil)
	if err == nil {
		t.Fatal("no error")
	}
	for _, part := range []string{"pod p1: ", "pod p2: ", "fake-a: GC: "} {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("got %v, want %q in it", err, part)
		}
	}
}

// A plugin of a daemon that was killed is ended by the next daemon on the same
// cache directory, and by no other.
// A plugin binary that is being written is waited for.
