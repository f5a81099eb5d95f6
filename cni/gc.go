package cni

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
)

// Attachments are the IDs of the pods that are or may be attached, sorted: those
// with a record or with a result in libcni's cache.
func (n *Network) Attachments() ([]string, error) {
	ids, err := n.records.ids()
	if err != nil {
		return nil, fmt.Errorf("cni: %w", err)
	}
	cached, err := n.lib.GetCachedAttachments("")
	if err != nil {
		return nil, fmt.Errorf("cni: results: %w", err)
	}
	for _, a := range cached {
		ids = append(ids, a.ContainerID)
	}
	slices.Sort(ids)
	return slices.Compact(ids), nil
}

// GC removes the attachments of pods that are not in keep: DEL for each that is
// known here, then the GC verb for what the plugins know beyond that, if the
// configuration in use is of CNI 1.1 or later and does not disable it.
//
// What this process attached and was not asked to detach is kept as well, so a
// pod that is born while keep is on its way here is safe. While the GC verb runs
// no other verb does, as the specification demands. All is tried; the errors are
// joined.
func (n *Network) GC(ctx context.Context, keep []Pod) error {
	ids, err := n.Attachments()
	if err != nil {
		return err
	}
	kept := map[string]struct{}{}
	for _, p := range keep {
		kept[p.ID] = struct{}{}
	}
	var mu sync.Mutex
	var errs []error
	var wg sync.WaitGroup
	for _, id := range ids {
		if _, ok := kept[id]; ok || n.isLive(id) {
			continue
		}
		wg.Go(func() {
			if err := n.collect(ctx, id); err != nil {
				mu.Lock()
				errs = append(errs, fmt.Errorf("cni: stale attachment: %w", err))
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	return errors.Join(append(errs, n.pluginGC(ctx, kept))...)
}

// collect detaches a pod that nobody owns.
func (n *Network) collect(ctx context.Context, id string) error {
	pod := Pod{ID: id}
	release, err := n.turn(ctx, pod)
	if err != nil {
		return err
	}
	defer release()
	if n.isLive(id) { // attached while we waited
		return nil
	}
	return n.detachLocked(ctx, pod)
}

// pluginGC runs the GC verb. The library's call would first delete stale cached
// attachments by itself, with the configuration of today; ours were deleted with
// their own, so it is given a cache directory without any.
func (n *Network) pluginGC(ctx context.Context, kept map[string]struct{}) error {
	nw := n.view.Load().inUse
	if nw == nil || !nw.hasStatus() || nw.list.DisableGC {
		return nil
	}
	if err := n.slots.Acquire(ctx, int64(n.cfg.MaxConcurrent)); err != nil {
		return fmt.Errorf("cni: network %s: GC: waited for other operations: %w", nw.list.Name, err)
	}
	defer n.slots.Release(int64(n.cfg.MaxConcurrent))

	// Read now, when nothing can be added any more.
	n.mu.Lock()
	ids := make([]string, 0, len(kept)+len(n.live))
	for id := range kept {
		ids = append(ids, id)
	}
	for id := range n.live {
		ids = append(ids, id)
	}
	n.mu.Unlock()
	slices.Sort(ids)
	args := &libcni.GCArgs{ValidAttachments: []types.GCAttachment{}}
	for _, id := range slices.Compact(ids) {
		args.ValidAttachments = append(args.ValidAttachments, types.GCAttachment{ContainerID: id, IfName: ifName})
	}
	start := time.Now()
	verbCtx, cancel := context.WithTimeout(ctx, n.cfg.Timeout)
	defer cancel()
	if err := n.gcLib.GCNetworkList(verbCtx, nw.list, args); err != nil {
		return n.verbError("cni", nw, "GC", start, err)
	}
	return nil
}
