package cri

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/klog/v2"
)

// TestCalls: each call is listed from its beginning to its end, in whatever order they
// end, with what it is about.
func TestCalls(t *testing.T) {
	var l calls
	methods := func() (out []string) {
		for _, c := range l.list() {
			out = append(out, c.Method)
		}
		return out
	}
	var running []*underWay
	for _, m := range []string{"a", "b", "c", "d"} {
		c := &underWay{method: m, began: time.Now()}
		l.begin(c)
		running = append(running, c)
	}
	for i, want := range [][]string{{"d", "c", "b", "a"}, {"d", "c", "a"}, {"c", "a"}, {"c"}, nil} {
		if got := methods(); !slices.Equal(got, want) {
			t.Errorf("after %d ends: %v, want %v", i, got, want)
		}
		if i < len(running) {
			l.end(running[[]int{1, 3, 0, 2}[i]])
		}
	}
}

func TestCallsAbout(t *testing.T) {
	meta := &runtime.PodSandboxMetadata{Name: "web", Namespace: "shop", Uid: "u"}
	for _, c := range []struct {
		req       any
		id, about string
	}{
		{&runtime.RunPodSandboxRequest{Config: &runtime.PodSandboxConfig{Metadata: meta}}, "", "shop/web"},
		{&runtime.StopContainerRequest{ContainerId: "c1"}, "c1", ""},
		{&runtime.StopPodSandboxRequest{PodSandboxId: "p1"}, "p1", ""},
		{&runtime.CreateContainerRequest{PodSandboxId: "p1", Config: &runtime.ContainerConfig{Metadata: &runtime.ContainerMetadata{Name: "app"}},
			SandboxConfig: &runtime.PodSandboxConfig{Metadata: meta}}, "p1", "shop/web/app"},
		{&runtime.PullImageRequest{Image: &runtime.ImageSpec{Image: "h/a:1"}, Auth: &runtime.AuthConfig{Password: "secret"}}, "", "h/a:1"},
		{&runtime.VersionRequest{}, "", ""},
		{nil, "", ""},
	} {
		d := (&underWay{about: requestKeys(c.req), began: time.Now()}).describe()
		if d.ID != c.id || d.About != c.about {
			t.Errorf("%T: ID %q, about %q; want %q and %q", c.req, d.ID, d.About, c.id, c.about)
		}
	}
}

// TestCallsOfTheEdge: a call that hangs is listed, and one that was answered is not.
func TestCallsOfTheEdge(t *testing.T) {
	e := mustEdge(t, newNode())
	pod := mustRun(t, e)
	if l := e.server.Calls(); len(l) != 0 {
		t.Errorf("answered and still listed: %v", l)
	}
	var during []Call
	err := e.server.observe(t.Context(), klog.Background(), "/x/StopPodSandbox", &runtime.StopPodSandboxRequest{PodSandboxId: pod}, func(context.Context) error {
		during = e.server.Calls()
		panic("oops") // ends the call as an answer does
	})
	if len(during) != 1 || during[0].Method != "StopPodSandbox" || during[0].ID != pod || during[0].Number == "" || during[0].Session {
		t.Errorf("during the call: %+v", during)
	}
	if l := e.server.Calls(); err == nil || len(l) != 0 {
		t.Errorf("after a panic: %v, listed %v", err, l)
	}
}

// BenchmarkCalls is what the list costs each call.
func BenchmarkCalls(b *testing.B) {
	var l calls
	about := requestKeys(&runtime.StopContainerRequest{ContainerId: "c1"})
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			c := &underWay{method: "StopContainer", number: "1", about: about}
			l.begin(c)
			l.end(c)
		}
	})
}

// TestAsk: what a client sees of a node that is ready, of one that is not, and of none.
func TestAsk(t *testing.T) {
	n := newNode()
	n.networkReady = errors.New("no plugin")
	e := mustEdge(t, n)
	got, err := Ask(t.Context(), e.socket)
	if err != nil || len(got) != 2 {
		t.Fatalf("%v, %v", got, err)
	}
	for _, c := range got {
		if want := c.Type == "RuntimeReady"; c.Holds != want || !want && !strings.Contains(c.Why, "no plugin") {
			t.Errorf("%+v", c)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if got, err := Ask(ctx, e.socket+".absent"); err == nil {
		t.Errorf("nobody answers %v", got)
	}
}
