package sandbox

import (
	"errors"
	"strings"
	"testing"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestResolvConf(t *testing.T) {
	got, err := resolvConf(&runtime.DNSConfig{Servers: []string{"10.0.0.10", "fd00::a"},
		Searches: []string{"a.svc", "svc"}, Options: []string{"ndots:5"}})
	want := "search a.svc svc\nnameserver 10.0.0.10\nnameserver fd00::a\noptions ndots:5\n"
	if err != nil || string(got) != want {
		t.Errorf("got %q, %v; want %q", got, err, want)
	}
	for _, c := range []*runtime.DNSConfig{
		{Servers: []string{"1.1.1.1\nnameserver 6.6.6.6"}},
		{Searches: []string{"a b"}},
		{Options: []string{""}},
		{Options: []string{strings.Repeat("x", maxDNSItem+1)}},
		{Servers: make([]string, maxDNSItems+1)},
	} {
		if _, err := resolvConf(c); !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), "dns_config.") {
			t.Errorf("%.80v: got %v, want ErrInvalid naming the field", c, err)
		}
	}
}

func TestHostname(t *testing.T) {
	if got, err := hostnameOf(&runtime.PodSandboxConfig{Hostname: "web-0.a_b"}, false); got != "web-0.a_b" || err != nil {
		t.Errorf("got %q, %v", got, err)
	}
	for _, h := range []string{"a b", "a\nb", strings.Repeat("x", 65), "a/b"} {
		if _, err := hostnameOf(&runtime.PodSandboxConfig{Hostname: h}, false); !errors.Is(err, ErrInvalid) {
			t.Errorf("%q: got %v, want ErrInvalid", h, err)
		}
	}
	if _, err := hostnameOf(&runtime.PodSandboxConfig{Hostname: "a b"}, true); err != nil {
		t.Errorf("on the host's network: got %v, want the node's name", err)
	}
}

func TestIDs(t *testing.T) {
	id := newID()
	if !validID(id) {
		t.Errorf("own ID %q is not valid", id)
	}
	for _, bad := range []string{"", id[1:], strings.ToUpper(id), "../" + id[3:], id[:63] + "g"} {
		if bad != id && validID(bad) && bad != strings.ToUpper(id) {
			t.Errorf("%q is valid", bad)
		}
	}
	v := &view{pods: map[string]*pod{}}
	for _, id := range []string{"aa" + id[2:], "ab" + id[2:]} {
		v.pods[id] = &pod{podRow: podRow{ID: id, State: StateReady}}
	}
	if _, err := v.pod("a"); !errors.Is(err, ErrAmbiguous) {
		t.Errorf("prefix of two: got %v, want ErrAmbiguous", err)
	}
	if p, err := v.pod("aa"); err != nil || p.ID[:2] != "aa" {
		t.Errorf("unique prefix: got %v, %v", p, err)
	}
	if _, err := v.pod("ac"); !errors.Is(err, ErrNotFound) {
		t.Errorf("unknown: got %v, want ErrNotFound", err)
	}
	if _, err := v.pod(""); !errors.Is(err, ErrNotFound) {
		t.Errorf("empty: got %v, want ErrNotFound", err)
	}
}
