package cni

import (
	"errors"
	"reflect"
	"slices"
	"strings"
	"testing"

	types100 "github.com/containernetworking/cni/pkg/types/100"
)

func TestBadPod(t *testing.T) {
	tests := []struct {
		name string
		edit func(*Pod)
		want string
	}{
		{"no ID", func(p *Pod) { p.ID = "" }, `pod ID: ""`},
		{"path as ID", func(p *Pod) { p.ID = "../x" }, "pod ID"},
		{"long ID", func(p *Pod) { p.ID = strings.Repeat("a", 129) }, "at most 128"},
		{"name speaks for another key", func(p *Pod) { p.Name = "x;K8S_POD_NAMESPACE=kube-system" }, `K8S_POD_NAME: "x;`},
		{"equals sign", func(p *Pod) { p.UID = "a=b" }, "K8S_POD_UID"},
		{"newline", func(p *Pod) { p.Namespace = "a\nb" }, "K8S_POD_NAMESPACE"},
		{"NUL", func(p *Pod) { p.Namespace = "a\x00b" }, "K8S_POD_NAMESPACE"},
		{"long name", func(p *Pod) { p.Name = strings.Repeat("a", 254) }, "K8S_POD_NAME: 254 bytes, at most 253"},
		{"host port", func(p *Pod) { p.PortMappings = []PortMapping{{HostPort: 65536, ContainerPort: 1}} }, "port mapping 0: host port: 65536"},
		{"container port", func(p *Pod) { p.PortMappings = []PortMapping{{}, {HostPort: 1}} }, "port mapping 1: container port: 0"},
		{"protocol", func(p *Pod) {
			p.PortMappings = []PortMapping{{HostPort: 1, ContainerPort: 1, Protocol: "ICMP"}}
		}, `protocol: "ICMP"`},
		{"host IP", func(p *Pod) {
			p.PortMappings = []PortMapping{{HostPort: 1, ContainerPort: 1, HostIP: "localhost"}}
		}, `host IP: "localhost"`},
		{"too many ports", func(p *Pod) { p.PortMappings = make([]PortMapping, 1025) }, "1025 of them, at most 1024"},
		{"bandwidth", func(p *Pod) { p.Annotations = map[string]string{egressBandwidth: "fast"} }, `annotation kubernetes.io/egress-bandwidth: invalid value: bandwidth "fast"`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			pod := thePod("p1")
			tt.edit(&pod)
			if _, err := pod.runtimeConf(); !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %q in it", err, tt.want)
			}
		})
	}
}

func TestCapabilities(t *testing.T) {
	caps, err := Pod{ID: "p", PortMappings: []PortMapping{{ContainerPort: 80}}}.capabilities()
	if err != nil || len(caps) != 0 {
		t.Errorf("nothing asked for: got %v, %v", caps, err)
	}
	caps, err = Pod{
		ID:           "p",
		PortMappings: []PortMapping{{ContainerPort: 53, HostPort: 53, Protocol: "UDP", HostIP: "::1"}},
		Annotations:  map[string]string{ingressBandwidth: "1M", egressBandwidth: "10G", "other": "x"},
		DNS:          DNS{Searches: []string{"local"}},
		CgroupPath:   "/x",
	}.capabilities()
	want := map[string]any{
		"portMappings": []portMap{{53, 53, "udp", "::1"}},
		"bandwidth":    map[string]uint64{"ingressRate": 1e6, "ingressBurst": 4 << 20, "egressRate": 1e10, "egressBurst": 1e9},
		"dns":          map[string][]string{"servers": nil, "searches": {"local"}, "options": nil},
		"cgroupPath":   "/x",
	}
	if err != nil || !reflect.DeepEqual(caps, want) {
		t.Errorf("got %v, %v, want %v", caps, err, want)
	}
}

func TestParseRate(t *testing.T) {
	good := map[string]uint64{
		"1k": 1000, "1000": 1000, "1Ki": 1024, "10M": 10e6, "1.5M": 1500000, ".5G": 5e8, "2.G": 2e9,
		"1e6": 1e6, "1E+6": 1e6, "1P": 1e15, "1000000000000000": 1e15, "1.0009k": 1000,
	}
	for s, want := range good {
		if got, err := parseRate(s); err != nil || got != want {
			t.Errorf("%q: got %d, %v, want %d", s, got, err, want)
		}
	}
	bad := []string{"", "k", "-1M", "+1M", " 1M", "1M ", "999", "1.1P", "1Pi", "1E", "1Ei", "1m", "1e-3", "1e99", "1e999", "1/2M", "0x10M", "inf", "1MM", "1kk", ".", "99999999999999999999"}
	for _, s := range bad {
		if got, err := parseRate(s); !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), "1k to 1P") {
			t.Errorf("%q: got %d, %v, want ErrInvalid with the limits", s, got, err)
		}
	}
}

// A rate is in range or an error.
func FuzzParseRate(f *testing.F) {
	for _, s := range []string{"10M", "1e6", "1.5Gi", "", "1e99", "0x1"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		n, err := parseRate(s)
		if (err == nil) != (n >= minRate && n <= maxRate) {
			t.Errorf("%q: %d, %v", s, n, err)
		}
		if b := burst(n); b == 0 || b > 1<<32-1 {
			t.Errorf("%q: burst %d", s, b)
		}
	})
}

// Whatever the pod's fields hold, CNI_ARGS has the five keys and no other.
func FuzzArgs(f *testing.F) {
	f.Add("web-0", "shop", "uid")
	f.Add("a;b=c", "\n", "")
	f.Fuzz(func(t *testing.T, name, namespace, uid string) {
		args, err := Pod{ID: "p", Name: name, Namespace: namespace, UID: uid}.args()
		if err != nil {
			return
		}
		var joined []string
		for _, kv := range args {
			joined = append(joined, kv[0]+"="+kv[1])
		}
		var keys []string
		for pair := range strings.SplitSeq(strings.Join(joined, ";"), ";") {
			parts := strings.Split(pair, "=")
			if len(parts) != 2 {
				t.Errorf("pair %q", pair)
			}
			keys = append(keys, parts[0])
		}
		want := []string{"IgnoreUnknown", "K8S_POD_NAMESPACE", "K8S_POD_NAME", "K8S_POD_INFRA_CONTAINER_ID", "K8S_POD_UID"}
		if !slices.Equal(keys, want) {
			t.Errorf("keys %q", keys)
		}
	})
}

func TestResult(t *testing.T) {
	tests := []struct {
		name, json string
		want       []string
		err        string
	}{
		{"eth0 of several", `"interfaces":[{"name":"eth1","sandbox":"/x"},{"name":"eth0","sandbox":"/x"},{"name":"eth0"}],
			"ips":[{"interface":0,"address":"10.0.0.1/8"},{"interface":2,"address":"10.0.0.3/8"},{"interface":1,"address":"fd00::2/64"},{"interface":1,"address":"10.0.0.2/8"}]`,
			[]string{"fd00::2", "10.0.0.2"}, ""},
		{"another name", `"interfaces":[{"name":"net0","sandbox":"/x"}],"ips":[{"interface":0,"address":"10.0.0.1/8"}]`, []string{"10.0.0.1"}, ""},
		{"no interfaces", `"ips":[{"address":"10.0.0.1/8"}]`, []string{"10.0.0.1"}, ""},
		{"host's address only", `"interfaces":[{"name":"br0"}],"ips":[{"interface":0,"address":"10.0.0.1/8"}]`, nil, "0 addresses"},
		{"index too high", `"interfaces":[{"name":"eth0","sandbox":"/x"}],"ips":[{"interface":1,"address":"10.0.0.1/8"}]`, nil, "ips[0]: interface 1 of 1"},
		{"index negative", `"ips":[{"interface":-1,"address":"10.0.0.1/8"}]`, nil, "interface -1 of 0"},
		{"too many", `"ips":[` + strings.Repeat(`{"address":"10.0.0.1/8"},`, 64) + `{"address":"10.0.0.1/8"}]`, nil, "65 addresses for the pod, want 1 to 64"},
		{"too large", `"ips":[{"address":"10.0.0.1/8"}],"dns":{"domain":"` + strings.Repeat("x", maxRawResult) + `"}`, nil, "at most 65536"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			raw, err := types100.NewResult([]byte(`{"cniVersion":"1.0.0",` + tt.json + `}`))
			if err != nil {
				t.Fatal(err)
			}
			got, err := newResult(raw)
			if !slices.Equal(got.IPs, tt.want) {
				t.Errorf("got %v, want %v", got.IPs, tt.want)
			}
			if (err != nil) != (tt.err != "") || err != nil && (!errors.Is(err, ErrBadResult) || !strings.Contains(err.Error(), tt.err)) {
				t.Errorf("got %v, want %q", err, tt.err)
			}
		})
	}
}

// A result is refused or has usable addresses; it does not panic.
func FuzzResult(f *testing.F) {
	f.Add([]byte(`{"cniVersion":"1.0.0","interfaces":[{"name":"eth0","sandbox":"/x"}],"ips":[{"interface":0,"address":"10.0.0.1/8"}]}`))
	f.Add([]byte(`{"cniVersion":"1.0.0","ips":[null]}`))
	f.Add([]byte(`{"cniVersion":"1.0.0","ips":[{}]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		if checkResult(b) != nil {
			return
		}
		raw, err := types100.NewResult(b)
		if err != nil {
			return
		}
		if got, err := newResult(raw); err == nil && (len(got.IPs) == 0 || slices.Contains(got.IPs, "<nil>")) {
			t.Errorf("addresses %q", got.IPs)
		}
	})
}
