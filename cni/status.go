package cni

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"k8s.io/klog/v2"
)

// statusTimeout bounds a STATUS round, which is asked for again soon anyway.
const statusTimeout = 10 * time.Second

// view is what readers see of the configuration; it is replaced, never changed.
type view struct {
	inUse    *network // nil: none
	since    time.Time
	problems []string // files that cannot be used, and the like
	missing  error    // plugins that are not installed
	asked    bool     // STATUS was answered for inUse, or it has no such verb
	status   error    // its answer
	statusAt time.Time
}

// ready is nil or the reason why not.
func (v *view) ready(confDir string) error {
	switch {
	case v.inUse == nil && len(v.problems) > 0:
		return fmt.Errorf("%w: no valid configuration in %s: %s", ErrNotReady, confDir, v.problems[0])
	case v.inUse == nil:
		return fmt.Errorf("%w: no configuration in %s", ErrNotReady, confDir)
	case v.missing != nil:
		return fmt.Errorf("%w: %w", ErrNotReady, v.missing)
	case v.status != nil:
		return fmt.Errorf("%w: %w", ErrNotReady, v.status)
	case !v.asked:
		return fmt.Errorf("%w: network %s: plugins not yet asked for their status", ErrNotReady, v.inUse.list.Name)
	}
	return nil
}

// Ready is nil if pods can be attached, else an error that wraps ErrNotReady and
// says why. It answers from memory.
//
// A broken file beside a configuration that serves does not make the network
// unready; Info names it.
func (n *Network) Ready() error { return n.view.Load().ready(n.cfg.ConfDir) }

// Info describes the configuration in use, for a verbose status. It answers from
// memory and can be marshalled to JSON.
type Info struct {
	File       string    `json:"file"` // "" without a configuration or with the fallback
	Fallback   bool      `json:"fallback"`
	Network    string    `json:"network"`
	CNIVersion string    `json:"cniVersion"`
	Plugins    []string  `json:"plugins"` // their binaries, address plugins included
	Since      time.Time `json:"since"`   // when it came into use
	Ready      bool      `json:"ready"`
	Reason     string    `json:"reason,omitempty"`   // why it is not ready
	Problems   []string  `json:"problems,omitempty"` // what is wrong with other files
	StatusAt   time.Time `json:"statusAt,omitzero"`  // the last answer to STATUS
}

// Info describes the configuration in use.
func (n *Network) Info() Info {
	v := n.view.Load()
	info := Info{Since: v.since, StatusAt: v.statusAt, Problems: slices.Clone(v.problems), Plugins: []string{}}
	if nw := v.inUse; nw != nil {
		info.File, info.Fallback = nw.file, nw.fallback
		info.Network, info.CNIVersion = nw.list.Name, nw.list.CNIVersion
		info.Plugins = nw.binaries()
	}
	if err := v.ready(n.cfg.ConfDir); err != nil {
		info.Reason = err.Error()
	} else {
		info.Ready = true
	}
	return info
}

// Reload reads the configuration directory now and lets Run ask the plugins for
// their status.
func (n *Network) Reload() {
	n.load(context.Background())
	n.askSoon()
}

// Ask has the plugins of the network in use asked for their status, which takes 10 s at
// most. Run does it by itself.
func (n *Network) Ask(ctx context.Context) { n.askStatus(ctx) }

// askSoon wakes the loop that asks for the status.
func (n *Network) askSoon() {
	select {
	case n.recheck <- struct{}{}:
	default: // it is already to wake up
	}
}

// load reads the directory and replaces the view. It tells whether the network
// in use changed.
func (n *Network) load(ctx context.Context) (changed bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	old := n.view.Load()
	found, err := readConfDir(n.cfg.ConfDir)
	now := *old
	now.problems = problems(found, err)
	if err == nil || len(found) > 0 || old.inUse == nil {
		now.inUse = choose(old.inUse, found, n.fallback)
	}
	changed = now.inUse != old.inUse
	if changed {
		now.since = time.Now()
		// Until its plugins answer, the new one is as ready as the old one was:
		// an edited file must not make the node flap.
		now.asked = now.inUse != nil && (!now.inUse.hasStatus() || old.inUse != nil && old.asked)
		if now.inUse == nil || !now.inUse.hasStatus() {
			now.status, now.statusAt = nil, time.Time{}
		}
	}
	now.missing = nil
	if now.inUse != nil {
		now.missing = now.inUse.missing(n.cfg.BinDirs)
	}
	n.publish(ctx, old, &now)
	return changed
}

func problems(found []candidate, err error) []string {
	var out []string
	if err != nil {
		out = append(out, err.Error())
	}
	for _, c := range found {
		if c.err != nil {
			out = append(out, clip(c.err.Error()))
		}
	}
	return out
}

// publish replaces the view and logs what an operator wants to know of it. The
// caller holds mu.
func (n *Network) publish(ctx context.Context, old, now *view) {
	n.view.Store(now)
	log := klog.FromContext(ctx)
	if now.inUse != old.inUse {
		if now.inUse == nil {
			log.Info("CNI configuration gone", "confDir", n.cfg.ConfDir)
		} else {
			log.Info("CNI configuration in use", "source", now.inUse.source(), "network", now.inUse.list.Name, "cniVersion", now.inUse.list.CNIVersion)
		}
	}
	for _, p := range now.problems {
		if !slices.Contains(old.problems, p) {
			log.Info("CNI configuration cannot be used", "reason", p)
		}
	}
	before, after := old.ready(n.cfg.ConfDir), now.ready(n.cfg.ConfDir)
	switch {
	case after != nil && (before == nil || before.Error() != after.Error()):
		log.Info("Network not ready", "reason", after.Error())
	case after == nil && before != nil:
		log.Info("Network ready")
	}
}

// askStatus runs the STATUS verb of the network in use, if it has it.
func (n *Network) askStatus(ctx context.Context) {
	nw := n.view.Load().inUse
	if nw == nil || !nw.hasStatus() {
		return
	}
	start := time.Now()
	verbCtx, cancel := context.WithTimeout(ctx, min(statusTimeout, n.cfg.Timeout))
	defer cancel()
	err := n.lib.GetStatusNetworkList(verbCtx, nw.list)
	if ctx.Err() != nil {
		return
	}
	if err != nil {
		err = n.verbError("cni", nw, "STATUS", start, err)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	old := n.view.Load()
	if old.inUse != nw {
		return // the answer is about another network
	}
	now := *old
	now.asked, now.status, now.statusAt = true, err, time.Now()
	// The time of a failure is of no interest to a reader who compares reasons.
	if err != nil && old.status != nil && sameFailure(err, old.status) {
		now.status = old.status
	}
	n.publish(ctx, old, &now)
}

// sameFailure compares two answers but for the time that they took.
func sameFailure(a, b error) bool {
	var x, y *PluginError
	if !errors.As(a, &x) || !errors.As(b, &y) {
		return a.Error() == b.Error()
	}
	p, q := *x, *y
	p.Elapsed, q.Elapsed = 0, 0
	return p.Error() == q.Error()
}
