package cni

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"time"

	"github.com/containernetworking/cni/libcni"
	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"
)

// Attach puts the pod on the network and returns where it is. The record is
// written before the first plugin runs: whatever the error, call Detach, which
// also cleans up half an attachment. An attachment that the ID already has, from
// an Attach that nobody saw the end of, is removed first.
//
// It waits for a free slot as long as ctx allows; the plugins then have
// Config.Timeout. Errors: ErrInvalid (a field of the pod), ErrNotReady (no
// configuration), ErrPluginMissing, ErrBadResult, or a *PluginError.
func (n *Network) Attach(ctx context.Context, pod Pod) (Result, error) {
	rt, err := pod.runtimeConf()
	if err == nil && firstNamespace(pod.NetNS) == "" {
		err = fmt.Errorf("%w: network namespace: none at %q", ErrInvalid, pod.NetNS)
	}
	if err != nil {
		return Result{}, fmt.Errorf("%s: %w", pod.label(), err)
	}
	release, err := n.turn(ctx, pod)
	if err != nil {
		return Result{}, err
	}
	defer release()
	if err := n.removeEarlier(ctx, pod); err != nil {
		return Result{}, err
	}
	nw := n.view.Load().inUse
	if nw == nil {
		return Result{}, fmt.Errorf("%s: %w", pod.label(), n.Ready())
	}
	// Before the record, so that a node without plugins leaves nothing to undo.
	if err := nw.missing(n.cfg.BinDirs); err != nil {
		return Result{}, fmt.Errorf("%s: network %s: %w", pod.label(), nw.list.Name, err)
	}
	n.setLive(pod.ID, true)
	if err := n.records.put(newRecord(pod, rt, nw)); err != nil {
		return Result{}, fmt.Errorf("%s: %w", pod.label(), err)
	}
	return n.add(ctx, pod, nw, rt)
}

func (n *Network) add(ctx context.Context, pod Pod, nw *network, rt *libcni.RuntimeConf) (Result, error) {
	start := time.Now()
	verbCtx, cancel := context.WithTimeout(ctx, n.cfg.Timeout)
	defer cancel()
	raw, err := n.lib.AddNetworkList(verbCtx, nw.list, rt)
	if err != nil {
		return Result{}, n.verbError(pod.label(), nw, "ADD", start, err)
	}
	res, err := newResult(raw)
	if err != nil {
		return Result{}, n.verbError(pod.label(), nw, "ADD", start, err)
	}
	return res, nil
}

// Detach takes the pod off the network. It uses the configuration, arguments and
// port mappings of the record; of pod only ID and NetNS are then needed. Without
// a usable record it uses libcni's cached result, else the configuration in use
// and all of pod, else it has nothing to do. It is idempotent, and a pod that was
// never attached is no error. After an error the record stays: call again.
func (n *Network) Detach(ctx context.Context, pod Pod) error {
	if err := checkID(pod.ID); err != nil {
		return err
	}
	release, err := n.turn(ctx, pod)
	if err != nil {
		return err
	}
	defer release()
	n.setLive(pod.ID, false)
	return n.detachLocked(ctx, pod)
}

// removeEarlier detaches what the ID has a record of. The caller has the turn.
func (n *Network) removeEarlier(ctx context.Context, pod Pod) error {
	_, _, err := n.records.get(pod.ID)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err := n.detachLocked(ctx, pod); err != nil {
		return fmt.Errorf("earlier attachment: %w", err)
	}
	return nil
}

// detachLocked is Detach for a caller who has the turn.
func (n *Network) detachLocked(ctx context.Context, pod Pod) error {
	r, nw, err := n.knownAttachment(ctx, pod)
	if err != nil {
		return fmt.Errorf("%s: %w", pod.label(), err)
	}
	if nw == nil {
		return n.records.remove(pod.ID)
	}
	rt := r.runtimeConf()
	rt.NetNS = firstNamespace(pod.NetNS, r.NetNS)
	start := time.Now()
	verbCtx, cancel := context.WithTimeout(ctx, n.cfg.Timeout)
	defer cancel()
	if err := n.lib.DelNetworkList(verbCtx, nw.list, rt); err != nil {
		return n.verbError(pod.label(), nw, "DEL", start, err)
	}
	return n.records.remove(pod.ID)
}

// knownAttachment finds what to call DEL with; no network means nothing to do.
func (n *Network) knownAttachment(ctx context.Context, pod Pod) (record, *network, error) {
	r, nw, err := n.records.get(pod.ID)
	if err == nil {
		return r, nw, nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		klog.FromContext(ctx).Info("CNI record unusable; detaching by other means", "podID", pod.ID, "reason", err.Error())
	}
	if r, nw, ok := n.cachedByLibrary(pod.ID); ok {
		return r, nw, nil
	}
	nw = n.view.Load().inUse
	// Nobody knows of an attachment. A missing plugin cannot have made one that
	// it could now remove, so it must not keep the pod from going away.
	if nw == nil || nw.missing(n.cfg.BinDirs) != nil {
		return record{}, nil, nil
	}
	rt, err := pod.runtimeConf()
	if err != nil {
		// What Attach refused cannot have been attached; the ID alone will do.
		if rt, err = (Pod{ID: pod.ID}).runtimeConf(); err != nil {
			return record{}, nil, err
		}
	}
	return newRecord(pod, rt, nw), nw, nil
}

// cachedByLibrary is the attachment as libcni keeps it after a successful ADD.
func (n *Network) cachedByLibrary(id string) (record, *network, bool) {
	list, err := n.lib.GetCachedAttachments(id)
	if err != nil {
		return record{}, nil, false
	}
	for _, a := range list {
		nw, err := parseNetwork(a.Config)
		if err != nil || nw.check() != nil || a.IfName != ifName {
			continue
		}
		return record{
			Version: recordVersion, ID: id, NetNS: a.NetNS, IfName: a.IfName,
			Args: a.CniArgs, Caps: a.CapabilityArgs, Config: a.Config,
		}, nw, true
	}
	return record{}, nil, false
}

// firstNamespace is the first path with a namespace behind it. Anything else, as
// after a reboot, is the same to a plugin as none, and only "" says so clearly.
func firstNamespace(paths ...string) string {
	for _, p := range paths {
		var st unix.Statfs_t
		if p != "" && unix.Statfs(p, &st) == nil && st.Type == unix.NSFS_MAGIC {
			return p
		}
	}
	return ""
}

// turn waits for the pod's other verbs and for a free slot.
func (n *Network) turn(ctx context.Context, pod Pod) (release func(), err error) {
	start := time.Now()
	wait := func(what string, err error) error {
		return fmt.Errorf("%s: waited %s for %s: %w", pod.label(), time.Since(start).Round(time.Millisecond), what, err)
	}
	unlock, err := n.locks.lock(ctx, pod.ID)
	if err != nil {
		return nil, wait("another operation on its network", err)
	}
	if err := n.slots.Acquire(ctx, 1); err != nil {
		unlock()
		return nil, wait(fmt.Sprintf("one of %d network operations to end", n.cfg.MaxConcurrent), err)
	}
	return func() {
		n.slots.Release(1)
		unlock()
	}, nil
}

// verbError names the network and leaves out libcni's own wrapping where the
// cause tells it all.
func (n *Network) verbError(who string, nw *network, verb string, start time.Time, err error) error {
	var perr *PluginError
	if errors.As(err, &perr) {
		return fmt.Errorf("%s: network %s: %w", who, nw.list.Name, perr)
	}
	return fmt.Errorf("%s: network %s: %s after %s: %w", who, nw.list.Name, verb, time.Since(start).Round(time.Millisecond), err)
}

func (n *Network) setLive(id string, live bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if live {
		n.live[id] = struct{}{}
	} else {
		delete(n.live, id)
	}
}

func (n *Network) isLive(id string) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	_, ok := n.live[id]
	return ok
}
