package cni

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Trace is something that the node has for a pod because of its network, whether
// that pod is attached or not: what a plugin leaves that is killed or gives up.
type Trace struct {
	// PodID is what the trace itself says. It may be anybody's; "" for what can
	// only be this Network's own.
	PodID string
	Kind  string // TraceAddress, TraceRules or TracePlugin
	What  string
	Since time.Time // zero if nothing tells
	// Remove detaches the pod, and then removes what that has left of the trace.
	Remove func(context.Context) error
}

// Kinds of traces.
const (
	TraceAddress = "address"
	TraceRules   = "iptables"
	TracePlugin  = "plugin"
)

// Traces are the addresses that host-local keeps for the networks that are
// configured or were recorded, rules of iptables, and with Config.Observe plugins
// that an earlier daemon has left running. The list is complete, other runtimes'
// pods included, as far as there is no error.
func (n *Network) Traces(ctx context.Context) ([]Trace, error) {
	addresses, err := n.addresses(ctx)
	rules, err2 := n.rules(ctx)
	out := append(addresses, rules...)
	if n.cfg.Observe {
		for _, fd := range orphans(n.cfg.CacheDir) {
			unix.Close(fd)
			out = append(out, Trace{Kind: TracePlugin, What: "process of a network plugin, mark " + n.cfg.CacheDir,
				Remove: func(ctx context.Context) error { killOrphans(ctx, n.cfg.CacheDir); return ctx.Err() }})
		}
	}
	return out, errors.Join(err, err2)
}

// hostLocalDir is where host-local keeps its addresses unless told otherwise, in a
// directory for each network.
const hostLocalDir = "/var/lib/cni/networks"

// Limits on what host-local's files may be.
const (
	maxHostLocal   = 1 << 20 // addresses of a network
	maxAddressFile = 4096    // bytes
)

// The lock of host-local is waited for at most lockPatience, looking each lockPause: a
// plugin has it for moments, unless it hangs.
const (
	lockPatience = 3 * time.Second
	lockPause    = 10 * time.Millisecond
)

// addressDirs are the directories with addresses, and of each whether it is this
// Network's alone.
func (n *Network) addressDirs() (map[string]bool, error) {
	var all []*network
	found, err := readConfDir(n.cfg.ConfDir)
	for _, c := range found {
		if c.err == nil {
			all = append(all, c.net)
		}
	}
	if n.fallback != nil {
		all = append(all, n.fallback)
	}
	ids, err2 := n.records.ids()
	for _, id := range ids {
		if _, nw, err := n.records.get(id); err == nil {
			all = append(all, nw)
		}
	}
	dirs := map[string]bool{}
	for _, nw := range all {
		for _, p := range nw.list.Plugins {
			if p.Network.IPAM.Type != "host-local" {
				continue
			}
			var conf struct {
				IPAM struct {
					DataDir string `json:"dataDir"`
				} `json:"ipam"`
			}
			if json.Unmarshal(p.Bytes, &conf) != nil {
				continue
			}
			data := cmp.Or(conf.IPAM.DataDir, hostLocalDir)
			dirs[filepath.Join(data, nw.list.Name)] = n.cfg.FallbackSubnet != "" && filepath.Clean(data) == n.cfg.FallbackDataDir
		}
	}
	return dirs, errors.Join(err, err2)
}

func (n *Network) addresses(ctx context.Context) ([]Trace, error) {
	dirs, err := n.addressDirs()
	errs := []error{err}
	var out []Trace
	for dir, own := range dirs {
		traces, err := n.addressesIn(ctx, dir, own)
		out, errs = append(out, traces...), append(errs, err)
	}
	return out, errors.Join(errs...)
}

// addressesIn reads a directory of host-local: a file for each address, with the
// container's ID in the first line, beside "lock" and "last_reserved_ip.<n>".
func (n *Network) addressesIn(ctx context.Context, dir string, own bool) ([]Trace, error) {
	paths, err := listAddresses(ctx, dir)
	if err != nil {
		return nil, fmt.Errorf("addresses: %w", err)
	}
	var out []Trace
	add := func(path, id string, made time.Time) {
		out = append(out, Trace{PodID: id, Kind: TraceAddress, What: path, Since: made,
			Remove: func(ctx context.Context) error { return n.releaseAddress(ctx, path, id) }})
	}
	var unowned []string // or given away anew since they were listed, and not written yet
	for _, path := range paths {
		if ctx.Err() != nil {
			return out, fmt.Errorf("addresses: %s: %w", dir, ctx.Err())
		}
		switch id, made, err := addressOwner(path); {
		case err != nil: // given back this moment
		case id != "":
			add(path, id, made)
		case own: // else perhaps another's
			unowned = append(unowned, path)
		}
	}
	if len(unowned) == 0 {
		return out, nil
	}
	unlock, err := lockAddresses(ctx, dir)
	if err != nil {
		return out, fmt.Errorf("addresses: %w", err)
	}
	defer unlock()
	for _, path := range unowned {
		if id, made, err := addressOwner(path); err == nil {
			add(path, id, made)
		}
	}
	return out, nil
}

// listAddresses lists the files of a directory's addresses, none if there is no such
// directory. It holds host-local's lock, so that each has its owner written down, but
// no longer than for the listing: pods wait meanwhile.
func listAddresses(ctx context.Context, dir string) ([]string, error) {
	unlock, err := lockAddresses(ctx, dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer unlock()
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var paths []string
	for _, e := range entries[:min(len(entries), maxHostLocal)] {
		if e.Name() != "lock" && !strings.HasPrefix(e.Name(), "last_reserved") && e.Type().IsRegular() {
			paths = append(paths, filepath.Join(dir, e.Name()))
		}
	}
	return paths, nil
}

// lockAddresses takes the lock of host-local on a directory, until unlock is called.
// The error is ErrLocked if somebody else has it for longer than lockPatience.
func lockAddresses(ctx context.Context, dir string) (unlock func(), err error) {
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, lockPatience, ErrLocked)
	defer cancel()
	for {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if err != unix.EWOULDBLOCK && err != unix.EINTR {
			break
		}
		select {
		case <-time.After(lockPause):
			continue
		case <-ctx.Done():
			err = context.Cause(ctx)
		}
		break
	}
	return nil, errors.Join(fmt.Errorf("lock of %s: %w", dir, err), f.Close())
}

// addressOwner reads whose an address is. An ID that none can be is "".
func addressOwner(path string) (id string, made time.Time, err error) {
	text, err := readBounded(path, maxAddressFile)
	if err != nil {
		return "", made, err
	}
	fi, err := os.Lstat(path)
	if err != nil {
		return "", made, err
	}
	line, _, _ := bytes.Cut(text, []byte("\n"))
	id = strings.TrimSpace(string(line))
	if checkID(id) != nil {
		id = ""
	}
	return id, fi.ModTime(), nil
}

func (n *Network) releaseAddress(ctx context.Context, path, id string) error {
	if same, err := n.stillOwned(path, id); err != nil || !same {
		return err
	}
	var err error
	if id != "" {
		err = n.Detach(ctx, Pod{ID: id})
	}
	unlock, e := lockAddresses(ctx, filepath.Dir(path))
	if e != nil {
		return errors.Join(err, fmt.Errorf("address: %w", e))
	}
	defer unlock()
	if same, e := n.stillOwned(path, id); e != nil || !same {
		return e // a plugin that complained has released it all the same
	}
	if e := removeIfThere(path); e != nil {
		return errors.Join(err, fmt.Errorf("address: %w", e))
	}
	return nil
}

func (n *Network) stillOwned(path, id string) (bool, error) {
	now, _, err := addressOwner(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil && now == id, err
}
