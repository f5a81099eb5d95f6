package crash

import (
	"strings"
	"testing"
	"time"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestHistory: the checker of the soak finds what it is there for.
func TestHistory(t *testing.T) {
	past := func() time.Time { return time.Now().Add(-time.Second) }
	later := func() time.Time { return time.Now().Add(time.Second) }
	ended := func(code int32, reason, message string) *runtime.ContainerStatus {
		return &runtime.ContainerStatus{State: exited, CreatedAt: 1, StartedAt: 2, FinishedAt: 3, ExitCode: code, Reason: reason, Message: message}
	}
	up := &runtime.ContainerStatus{State: running, CreatedAt: 1, StartedAt: 2}
	start := func(h *history) { h.note("c", func(o *object) { o.starting = true }) }
	for _, tc := range []struct {
		name string
		do   func(h *history)
		want string // in the violation; "" for none
	}{
		{"a whole life", func(h *history) {
			start(h)
			h.container("c", up, past())
			h.alive("c", past())
			h.stop("c")
			h.container("c", ended(7, "Error", ""), past())
			h.list(false, []string{"c"}, later(), later())
			h.doom("c")
			h.bury("c")
			h.list(false, nil, later(), later())
		}, ""},
		{"back", func(h *history) { start(h); h.container("c", ended(7, "", ""), past()); h.container("c", up, past()) }, "went back"},
		{"strange code", func(h *history) { start(h); h.container("c", ended(9, "", ""), past()) }, "exit code 9"},
		{"killed without a stop", func(h *history) { start(h); h.container("c", ended(137, "", ""), past()) }, "exit code 137"},
		{"killed by a stop", func(h *history) { start(h); h.stop("p"); h.container("c", ended(137, "", ""), past()) }, ""},
		{"lost with its shim", func(h *history) { h.kill("c"); h.container("c", ended(255, "Error", "the shim was lost"), past()) }, ""},
		{"lost without", func(h *history) { start(h); h.container("c", ended(255, "Error", "the shim was lost"), past()) }, "exit code 255"},
		{"code changed", func(h *history) {
			start(h)
			h.stop("c")
			h.container("c", ended(7, "", ""), past())
			h.container("c", ended(137, "", ""), past())
		}, "became 137"},
		{"time changed", func(h *history) {
			start(h)
			h.container("c", up, past())
			h.container("c", &runtime.ContainerStatus{State: running, CreatedAt: 1, StartedAt: 5}, past())
		}, "was started"},
		{"missing in a list", func(h *history) { h.list(false, nil, later(), later()) }, "missing"},
		{"made meanwhile", func(h *history) { h.list(false, nil, past(), later()) }, ""},
		{"listed twice", func(h *history) { h.list(false, []string{"c", "c"}, past(), later()) }, "twice"},
		{"listed after its removal", func(h *history) { h.doom("p"); h.bury("p"); h.list(false, []string{"c"}, later(), later()) }, "after its removal"},
		{"answered after its removal", func(h *history) { start(h); h.doom("c"); h.bury("c"); h.container("c", up, later()) }, "after its removal"},
		{"exec after the end", func(h *history) { start(h); h.container("c", ended(7, "", ""), past()); h.alive("c", later()) }, "ran a command"},
		{"address twice", func(h *history) {
			h.bear("q", object{})
			h.podIs("p", "10.0.0.2", true, past())
			h.podIs("q", "10.0.0.2", true, past())
		}, "both have"},
		{"address changed", func(h *history) { h.podIs("p", "10.0.0.2", true, past()); h.podIs("p", "10.0.0.3", true, past()) }, "was \"10.0.0.2\""},
		{"not ready by itself", func(h *history) { h.podIs("p", "", false, past()) }, "nobody has stopped"},
		{"made again", func(h *history) { h.doom("p"); h.bear("p", object{}) }, "told as made"},
	} {
		h := newHistory()
		h.bear("p", object{})
		h.bear("c", object{pod: "p", code: 7})
		tc.do(h)
		got := strings.Join(h.violations, "; ")
		if tc.want == "" && got != "" || !strings.Contains(got, tc.want) {
			t.Errorf("%s: violations %q, want %q", tc.name, got, tc.want)
		}
	}
}
