package crash

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/berthd/berth/test/node"
)

// soakEnv is for how long TestSoak goes on, as a duration; make soak sets 15m.
const soakEnv = "BERTH_SOAK"

// soakClients is how many clients there are at once, soakPuller the one that pulls
// and removes images beside its pods.
const (
	soakClients = 10
	soakPuller  = 0
)

// The pauses between kills, on average; the real one is between nothing and
// twice as long.
const (
	daemonPause = 1200 * time.Millisecond
	shimPause   = 4 * time.Second
	childPause  = 1500 * time.Millisecond
)

// soakProgress is how many calls succeed before berthd is killed again.
const soakProgress = 4

// soak is what its clients and its killers share.
type soak struct {
	*rig
	*history
	seed    uint64
	calls   atomic.Int64
	done    atomic.Int64 // of them by the present berthd, with success
	retried atomic.Int64
	pods    atomic.Int64
	conts   atomic.Int64
	pulls   atomic.Int64
	problem atomic.Pointer[error] // the first call that did not succeed in time

	killsMu sync.Mutex
	kills   map[string]int
}

// TestSoak lets ten clients work at random while berthd, shims, plugins and
// runtimes are killed at random. Each answer is held against a sequential model.
// Then, without kills, berthd and the machine must not have grown.
func TestSoak(t *testing.T) {
	text := os.Getenv(soakEnv)
	if text == "" {
		t.Skipf("a load of its own: make soak, or %s=15m", soakEnv)
	}
	length, err := time.ParseDuration(text)
	if err != nil || length < 5*time.Second {
		t.Fatalf("%s=%q: want a duration from 5s", soakEnv, text)
	}
	metrics := filepath.Join(t.TempDir(), "metrics.sock")
	s := &soak{history: newHistory(), seed: uint64(time.Now().UnixNano()), kills: map[string]int{}}
	s.rig = newSoakNode(t, limits+fmt.Sprintf("metrics_listen = %q\n", "unix:"+metrics))
	t.Logf("%v, seed %d", length, s.seed)
	calm := max(length/20, 3*time.Second)

	s.work(calm, false)
	s.empty()
	before := s.sample(metrics)
	begun := time.Now()
	s.work(length, true)
	chaos := time.Since(begun)
	s.empty()
	s.work(calm, false)
	s.empty()
	after := s.sample(metrics)

	t.Logf("%v of kills %v; %d calls, %d repeated, %d answers held against the model; %d pods, %d containers, %d pulls",
		chaos.Round(time.Second), s.kills, s.calls.Load(), s.retried.Load(), s.answers, s.pods.Load(), s.conts.Load(), s.pulls.Load())
	t.Logf("before %+v", before)
	t.Logf("after  %+v", after)
	for _, v := range s.violations {
		t.Errorf("violation: %s", v)
	}
	if p := s.problem.Load(); p != nil {
		t.Errorf("gave up: %v", *p)
	}
	after.compare(t, before)
	left, err := s.Clean(s.ctx, s.before)
	s.must(err)
	for _, l := range left {
		t.Errorf("leak: %s", l)
	}
}

// plainNetwork is a bridge without masquerading: the plugins are killed at
// random, and the rules of iptables that the bridge plugin loses then are its own
// (docs/reliability.md).
const plainNetwork = `{"cniVersion": "1.0.0", "name": "NAME", "plugins": [
  {"type": "bridge", "bridge": "NAME", "isGateway": true,
   "ipam": {"type": "host-local", "dataDir": "ADDRESSES", "ranges": [[{"subnet": "SUBNET"}]]}}]}
`

// newSoakNode starts a node on such a network.
func newSoakNode(t *testing.T, config string) *rig {
	t.Helper()
	r := newNode(t, node.Options{Config: config, CNI: node.NoCNI})
	text := strings.NewReplacer("NAME", r.Name, "ADDRESSES", filepath.Join(r.Dir, "addresses"), "SUBNET", r.Subnet).Replace(plainNetwork)
	r.must(os.WriteFile(filepath.Join(r.CNIDir, "10-soak.conflist"), []byte(text), 0o600))
	r.warm()
	return r
}

// work lets the clients work for a while, with or without kills.
func (s *soak) work(length time.Duration, kill bool) {
	s.Helper()
	ctx, cancel := context.WithTimeout(s.ctx, length)
	defer cancel()
	var clients, killers sync.WaitGroup
	if kill {
		killers.Go(func() { s.killDaemon(ctx) })
		killers.Go(func() { s.killShims(ctx) })
		killers.Go(func() { s.killChildren(ctx) })
	}
	for i := range soakClients {
		s.seed++
		c := &client{soak: s, number: i, rnd: rand.New(rand.NewPCG(s.seed, uint64(i)))}
		clients.Go(func() { c.work(ctx) })
	}
	killers.Wait()
	clients.Wait() // they end their pods first, with nobody killed any more
	s.revive()
}

// wait sleeps between zero and twice the pause; false when ctx has ended.
func (s *soak) wait(ctx context.Context, rnd *rand.Rand, pause time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(time.Duration(rnd.Int64N(int64(2 * pause)))):
		return true
	}
}

func (s *soak) count(victim string) {
	s.killsMu.Lock()
	defer s.killsMu.Unlock()
	s.kills[victim]++
}

func (s *soak) killDaemon(ctx context.Context) {
	rnd := rand.New(rand.NewPCG(s.seed, 1<<32))
	for s.wait(ctx, rnd, daemonPause) && s.progress(ctx) {
		if err := s.Kill(); err != nil {
			s.Errorf("kill: %v", err)
		}
		s.done.Store(0)
		s.count("berthd")
		if err := s.Start(s.ctx); err != nil {
			s.Errorf("berthd does not start again: %v", err)
			return
		}
	}
}

// progress waits until the present berthd has done something for somebody: on a
// machine that is slow at the moment it would be killed before, for ever.
func (s *soak) progress(ctx context.Context) bool {
	for s.done.Load() < soakProgress {
		select {
		case <-ctx.Done():
			return false
		case <-time.After(5 * time.Millisecond):
		}
	}
	return true
}

func (s *soak) killShims(ctx context.Context) {
	rnd := rand.New(rand.NewPCG(s.seed, 2<<32))
	for s.wait(ctx, rnd, shimPause) {
		shims, err := s.Shims()
		if err != nil || len(shims) == 0 {
			continue
		}
		ids := slices.Sorted(maps.Keys(shims))
		id := ids[rnd.IntN(len(ids))]
		s.kill(id) // before: the answer to it may be faster than this goroutine
		if syscall.Kill(shims[id], syscall.SIGKILL) == nil {
			s.count("shim")
		}
	}
}

// killChildren kills what berthd and the shims run: plugins, OCI runtimes.
func (s *soak) killChildren(ctx context.Context) {
	rnd := rand.New(rand.NewPCG(s.seed, 3<<32))
	for s.wait(ctx, rnd, childPause) {
		// They live for moments: look until there is one.
		for end := time.Now().Add(time.Second); time.Now().Before(end) && ctx.Err() == nil; time.Sleep(2 * time.Millisecond) {
			if name := s.killChild(rnd); name != "" {
				s.count(name)
				break
			}
		}
	}
}

// killChild kills one child of berthd or of a shim that is no shim itself, and
// returns its name.
func (s *soak) killChild(rnd *rand.Rand) string {
	parents := map[int]bool{}
	shims, err := s.Shims()
	if err != nil {
		return ""
	}
	for _, pid := range shims {
		parents[pid] = true
	}
	type victim struct {
		pid  int
		name string
	}
	var all []victim
	for _, d := range mustGlob("/proc/[0-9]*/stat") {
		b, err := os.ReadFile(d)
		if err != nil {
			continue
		}
		head, rest, _ := strings.Cut(string(b), " (")
		name, rest, _ := strings.Cut(rest, ") ")
		f := strings.Fields(rest)
		pid, err1 := strconv.Atoi(head)
		if len(f) < 2 || err1 != nil || !slices.Contains(killable, name) {
			continue
		}
		// Plugins are berthd's, of which the pid changes; they bear its mark.
		ppid, err := strconv.Atoi(f[1])
		if env, e := os.ReadFile(filepath.Join(filepath.Dir(d), "environ")); err == nil && (parents[ppid] || e == nil && strings.Contains(string(env), s.RunDir+"/")) {
			all = append(all, victim{pid, name})
		}
	}
	if len(all) == 0 {
		return ""
	}
	v := all[rnd.IntN(len(all))]
	if syscall.Kill(v.pid, syscall.SIGKILL) != nil {
		return ""
	}
	return v.name
}

// killable are the programs that killChildren kills. A container's first process
// is a child of its shim too, and runs something else.
var killable = []string{"runc", "bridge", "host-local"}

func mustGlob(pattern string) []string {
	list, err := filepath.Glob(pattern)
	if err != nil {
		panic(err) // the pattern is a constant
	}
	return list
}

// empty waits until nothing is there that was not at the beginning.
func (s *soak) empty() {
	s.Helper()
	left, err := s.Settle(s.ctx, s.before, time.Minute)
	s.must(err)
	for _, l := range left {
		// host-local, killed between the making of its file and the writing of the
		// owner's name into it: nobody can tell whose address that was.
		if strings.HasPrefix(l, "address:") && strings.HasSuffix(l, " of ") && s.kills["host-local"]+s.kills["bridge"] > 0 {
			s.Logf("left by a killed plugin: %s", l)
			s.before[l] = true
			continue
		}
		s.Errorf("leak: %s", l)
	}
	s.forget(time.Now())
}

// giveUp notes the first call that did not succeed.
func (s *soak) giveUp(err error) {
	s.problem.CompareAndSwap(nil, &err)
}

var errGaveUp = errors.New("gave up")
