package sandbox

import (
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berthd/berth/shim"
)

func TestDecideContainer(t *testing.T) {
	now := time.Unix(1000, 0)
	record := &shim.Exit{Code: 7, At: time.Unix(900, 0)}
	for _, tc := range []struct {
		name string
		row  containerRow
		seen observed
		want verdict
	}{
		{"half made", containerRow{State: StateCreating}, observed{sameBoot: true, status: shim.StatusCreated}, verdict{destroy: true}},
		{"removal begun", containerRow{State: StateRunning, Removing: true}, observed{sameBoot: true, status: shim.StatusRunning}, verdict{destroy: true}},
		{"exited long ago", containerRow{State: StateExited}, observed{}, verdict{}},
		{"runs on", containerRow{State: StateRunning}, observed{sameBoot: true, status: shim.StatusRunning}, verdict{state: StateRunning}},
		{"start not recorded", containerRow{State: StateCreated}, observed{sameBoot: true, status: shim.StatusRunning}, verdict{state: StateRunning}},
		{"created", containerRow{State: StateCreated}, observed{sameBoot: true, status: shim.StatusCreated}, verdict{state: StateCreated}},
		{"exited meanwhile", containerRow{State: StateRunning}, observed{sameBoot: true, exit: record}, verdict{state: StateExited, exit: *record}},
		{"exited before the reboot", containerRow{State: StateRunning}, observed{exit: record}, verdict{state: StateExited, exit: *record, end: true}},
		{"exiting now", containerRow{State: StateRunning}, observed{sameBoot: true, status: shim.StatusExited}, verdict{state: StateRunning}},
		{"rebooted", containerRow{State: StateRunning}, observed{},
			verdict{state: StateExited, exit: shim.Exit{Code: 255, At: now, Reason: "the node was rebooted"}}},
		{"shim too slow to answer", containerRow{State: StateRunning}, observed{sameBoot: true, unsure: true}, verdict{state: StateRunning, ask: true}},
		{"shim killed", containerRow{State: StateRunning}, observed{sameBoot: true},
			verdict{state: StateExited, end: true, exit: shim.Exit{Code: 255, At: now, Reason: "the container's shim was lost and the container killed"}}},
	} {
		if got := decideContainer(tc.row, tc.seen, now); got != tc.want {
			t.Errorf("%s: got %+v, want %+v", tc.name, got, tc.want)
		}
	}
}

func TestDecidePod(t *testing.T) {
	well := podObserved{sameBoot: true, pinned: true}
	for _, tc := range []struct {
		name string
		row  podRow
		seen podObserved
		want podVerdict
	}{
		{"half made", podRow{State: StateCreating}, well, podVerdict{destroy: true}},
		{"removal begun", podRow{State: StateReady, Removing: true}, well, podVerdict{destroy: true}},
		{"ready", podRow{State: StateReady}, well, podVerdict{}},
		{"stopped", podRow{State: StateNotReady, Stopping: true, Torn: true}, podObserved{}, podVerdict{}},
		{"stop begun", podRow{State: StateNotReady, Stopping: true}, well, podVerdict{teardown: true, notReady: "stopped"}},
		{"rebooted", podRow{State: StateReady}, podObserved{}, podVerdict{teardown: true, notReady: "the node was rebooted"}},
		{"namespaces gone", podRow{State: StateReady}, podObserved{sameBoot: true}, podVerdict{teardown: true, notReady: "its namespaces are gone"}},
		{"init gone", podRow{State: StateReady, InitPid: 7}, well, podVerdict{notReady: "its init is gone"}},
		{"init well", podRow{State: StateReady, InitPid: 7}, podObserved{sameBoot: true, pinned: true, init: shim.StatusRunning}, podVerdict{}},
	} {
		if got := decidePod(tc.row, tc.seen); got != tc.want {
			t.Errorf("%s: got %+v, want %+v", tc.name, got, tc.want)
		}
	}
}

func TestApplyExit(t *testing.T) {
	at := time.Unix(50, 0)
	for _, tc := range []struct {
		name   string
		row    containerRow
		exit   shim.Exit
		code   int32
		reason string
	}{
		{"completed", containerRow{State: StateRunning}, shim.Exit{At: at}, 0, "Completed"},
		{"error", containerRow{State: StateRunning}, shim.Exit{Code: 3, At: at}, 3, "Error"},
		{"killed", containerRow{State: StateRunning}, shim.Exit{Code: 137, Signal: 9, At: at}, 137, "Error"},
		{"out of memory", containerRow{State: StateRunning}, shim.Exit{Code: 137, Signal: 9, OOMKilled: true, At: at}, 137, "OOMKilled"},
		{"not started", containerRow{State: StateCreated, Reason: reasonStart}, shim.Exit{Code: 137, At: at}, 128, "StartError"},
		{"started after all", containerRow{State: StateRunning, Reason: reasonStart}, shim.Exit{Code: 7, At: at}, 7, "Error"},
	} {
		r := tc.row
		if r.State == StateRunning {
			r.Started = at.Add(time.Hour).UnixNano() // the clock went back
		}
		applyExit(&r, tc.exit)
		if r.State != StateExited || r.ExitCode != tc.code || r.Reason != tc.reason {
			t.Errorf("%s: got state %s, code %d, reason %q; want exited, %d, %q", tc.name, r.State, r.ExitCode, r.Reason, tc.code, tc.reason)
		}
		if r.Finished <= r.Started {
			t.Errorf("%s: finished at %d, not after its start at %d", tc.name, r.Finished, r.Started)
		}
	}
}

func TestAfterIsMonotone(t *testing.T) {
	future := time.Now().Add(24 * time.Hour).UnixNano()
	if got := after(future); got != future+1 {
		t.Errorf("after a time in the future: got %d, want %d", got, future+1)
	}
	if got := after(0); got < time.Now().Add(-time.Minute).UnixNano() {
		t.Errorf("after 0: got %d, want about now", got)
	}
}

// Times of one pod grow also when the clock is set back, and over a restart. Those of
// others are what they are.
func TestClock(t *testing.T) {
	b := mustBook(t)
	now := time.Now().UnixNano()
	future := now + int64(24*time.Hour)
	config := func(name string) []byte {
		raw, err := proto.Marshal(&runtime.PodSandboxConfig{Metadata: &runtime.PodSandboxMetadata{Name: name, Namespace: "n", Uid: "u"}})
		if err != nil {
			t.Fatal(err)
		}
		return raw
	}
	p, err := b.insertPod(podRow{ID: newID(), State: StateReady, Created: future, Config: config("ahead")})
	if err != nil {
		t.Fatal(err)
	}
	other, err := b.insertPod(podRow{ID: newID(), State: StateReady, Created: now, Config: config("other")})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.insertContainer(containerRow{ID: newID(), PodID: p.ID, State: StateExited, Created: future + 5}); err != nil {
		t.Fatal(err)
	}
	again := newBook(b.st)
	if err := again.load(); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name      string
		got, want int64
	}{
		{"attempts of the pod", again.view().newestAttempt(p.config), future},
		{"attempts of another pod", again.view().newestAttempt(other.config), now},
		{"attempts of a pod that is not there", again.view().newestAttempt(&runtime.PodSandboxConfig{}), 0},
		{"what is in the pod", again.view().newestIn(p), future + 5},
		{"what is in another pod", again.view().newestIn(other), now},
	} {
		if tc.got != tc.want {
			t.Errorf("newest of %s: %d, want %d", tc.name, tc.got, tc.want)
		}
	}
	last := future
	for range 3 {
		got := again.events.clock.next()
		if got <= last {
			t.Errorf("time %d is not after %d", got, last)
		}
		last = got
	}
}

func TestCRISignal(t *testing.T) {
	for _, tc := range []struct {
		n           int
		asked, want runtime.Signal
	}{
		{15, runtime.Signal_SIGNAL_RUNTIME_DEFAULT, runtime.Signal_SIGNAL_SIGTERM},
		{6, runtime.Signal_SIGNAL_RUNTIME_DEFAULT, runtime.Signal_SIGNAL_SIGABRT},
		{6, runtime.Signal_SIGNAL_SIGIOT, runtime.Signal_SIGNAL_SIGIOT},
		{10, runtime.Signal_SIGNAL_SIGTERM, runtime.Signal_SIGNAL_SIGUSR1}, // of the image, say
		{0, runtime.Signal_SIGNAL_RUNTIME_DEFAULT, runtime.Signal_SIGNAL_RUNTIME_DEFAULT},
	} {
		for range 20 {
			if got := criSignal(tc.n, tc.asked); got != tc.want {
				t.Errorf("signal %d, asked for %v: got %v, want %v", tc.n, tc.asked, got, tc.want)
				break
			}
		}
	}
}
