// Package cni attaches pods to networks through CNI plugins.
//
// # Vocabulary
//
//   - The configuration is the first valid file of a directory, in lexical order.
//     It lists the plugins that run, one after the other, for a pod.
//   - An attachment is a pod's place on the network: addresses, interfaces, port
//     mappings. Attach makes it (verb ADD), Detach removes it (verb DEL).
//   - The record is a file, written before the first plugin runs, with all that a
//     DEL needs: the configuration, the arguments, the port mappings. A pod is
//     detached with what it was attached with, whatever happened to the
//     configuration, to the daemon or to the node since.
//   - The fallback is a configuration of berth's own, a bridge with addresses from
//     one subnet, used while the directory has no valid file.
//
// # Example
//
//	network, _ := cni.New(cni.Config{ConfDir: "/etc/cni/net.d", …})
//	go network.Run(ctx)                        // watches, asks for STATUS
//	result, err := network.Attach(ctx, pod)
//	if err != nil {
//		network.Detach(cleanupCtx, pod)    // always, also after an error
//	}
//
// # Caveats
//
//   - Plugins are programs from outside. Each runs in a process group of its own
//     under a deadline, its output is bounded, and its group is killed when it
//     ends; only what made a session of its own escapes.
//   - Ready and Info answer from memory. No plugin runs in them.
//   - A file that turns bad does not take the network away: the configuration in
//     use stays in use, and Ready or Info says what is wrong with the file.
//   - Detach with an empty or dead NetNS is right after a reboot. While the network
//     namespace exists, detach before destroying it: some plugins can only then
//     remove their packet filter rules.
package cni

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containernetworking/cni/libcni"
	"golang.org/x/sync/semaphore"
)

// Errors about the caller's input and the node's set-up.
var (
	// ErrInvalid: a field of Config or Pod has a value that cannot be used.
	ErrInvalid = errors.New("invalid value")
	// ErrNotReady: no configuration, or its plugins say that they cannot serve.
	ErrNotReady = errors.New("network not ready")
	// ErrPluginMissing: a plugin's binary is in none of the directories.
	ErrPluginMissing = errors.New("plugin missing")
)

// Errors about what a plugin did.
var (
	// ErrOutputTooLarge: a plugin printed more than is read of it.
	ErrOutputTooLarge = errors.New("output too large")
	// ErrLocked: host-local's lock was held by somebody else for too long.
	ErrLocked = errors.New("locked")
	// ErrBadResult: a plugin's result cannot be understood or used.
	ErrBadResult = errors.New("bad result")
)

// Defaults of Config.
const (
	DefaultTimeout = 60 * time.Second
	minConcurrent  = 4
)

// ifName is the pod's interface, as every Kubernetes runtime names it.
const ifName = "eth0"

// Config says where things are. It does not change during a run.
type Config struct {
	// ConfDir holds *.conflist, *.conf and *.json files. It may be absent and
	// appear later. Required.
	ConfDir string
	// BinDirs are searched for plugins, in order. At least one.
	BinDirs []string
	// CacheDir keeps records and results; it must survive a reboot. Made with
	// mode 0700. Required, and used by one daemon at a time.
	CacheDir string
	// Timeout is how long the plugins of one verb may take together. The default
	// is 60 s, the least 1 ms.
	Timeout time.Duration
	// MaxConcurrent is how many verbs run at once; plugins that wait for each
	// other's locks cost processor time and win none. The default is twice the
	// number of processors, 4 at least.
	MaxConcurrent int
	// FallbackSubnet is the subnet of the fallback network in CIDR notation, IPv4
	// or IPv6; "" for no fallback.
	FallbackSubnet string
	// FallbackDataDir is where the fallback's address allocations are kept.
	// Required with FallbackSubnet.
	FallbackDataDir string
	// Observe is for a look at what an earlier daemon has left, by a process that
	// is none: New neither ends plugins nor removes unfinished records.
	Observe bool
}

// Network attaches pods. Its methods may be called from several goroutines.
type Network struct {
	cfg      Config
	lib      *libcni.CNIConfig
	gcLib    *libcni.CNIConfig // see pluginGC
	fallback *network          // nil: none
	records  records
	slots    *semaphore.Weighted
	locks    keyLocks
	recheck  chan struct{} // asks Run for a STATUS round

	view atomic.Pointer[view] // what readers see

	mu   sync.Mutex          // serialises changes of view
	live map[string]struct{} // attached by this process and not detached; guarded by mu
}

// New checks cfg and reads the configuration. A node without one is no error:
// Ready tells. Plugins that an earlier daemon left running on CacheDir are ended
// meanwhile, before the first new one runs, if they can be found in ten seconds.
func New(cfg Config) (*Network, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, fmt.Errorf("cni: %w", err)
	}
	var fallback *network
	if cfg.FallbackSubnet != "" {
		if fallback, err = fallbackNetwork(cfg.FallbackSubnet, cfg.FallbackDataDir); err != nil {
			return nil, fmt.Errorf("cni: fallback network: %w", err)
		}
	}
	recs, err := openRecords(filepath.Join(cfg.CacheDir, "attachments"), !cfg.Observe)
	if err != nil {
		return nil, fmt.Errorf("cni: %w", err)
	}
	run := &runner{mark: cfg.CacheDir}
	if !cfg.Observe {
		run.clear = within(clearLimit, func(ctx context.Context) { killOrphans(ctx, cfg.CacheDir) })
	}
	n := &Network{
		cfg:      cfg,
		lib:      libcni.NewCNIConfigWithCacheDir(cfg.BinDirs, cfg.CacheDir, run),
		gcLib:    libcni.NewCNIConfigWithCacheDir(cfg.BinDirs, filepath.Join(cfg.CacheDir, "none"), run),
		fallback: fallback,
		records:  recs,
		slots:    semaphore.NewWeighted(int64(cfg.MaxConcurrent)),
		recheck:  make(chan struct{}, 1),
		live:     map[string]struct{}{},
	}
	n.view.Store(&view{})
	n.load(context.Background())
	return n, nil
}

// withDefaults fills in defaults and makes paths absolute: plugins run in /.
func (c Config) withDefaults() (Config, error) {
	if len(c.BinDirs) == 0 {
		return c, fmt.Errorf("%w: BinDirs: empty, want one directory at least", ErrInvalid)
	}
	if c.FallbackSubnet != "" && c.FallbackDataDir == "" {
		return c, fmt.Errorf("%w: FallbackDataDir: empty, want a directory for %s", ErrInvalid, c.FallbackSubnet)
	}
	switch {
	case c.Timeout == 0:
		c.Timeout = DefaultTimeout
	case c.Timeout < time.Millisecond:
		return c, fmt.Errorf("%w: Timeout: %v, at least 1ms", ErrInvalid, c.Timeout)
	}
	switch {
	case c.MaxConcurrent == 0:
		c.MaxConcurrent = max(minConcurrent, 2*runtime.NumCPU())
	case c.MaxConcurrent < 0:
		return c, fmt.Errorf("%w: MaxConcurrent: %d, at least 1", ErrInvalid, c.MaxConcurrent)
	}
	var err error
	abs := func(field, path string) string {
		p, aerr := filepath.Abs(path)
		if path == "" || aerr != nil {
			err = errors.Join(err, fmt.Errorf("%w: %s: %q is no directory", ErrInvalid, field, path))
		}
		return p
	}
	c.ConfDir, c.CacheDir = abs("ConfDir", c.ConfDir), abs("CacheDir", c.CacheDir)
	if c.FallbackSubnet != "" {
		c.FallbackDataDir = abs("FallbackDataDir", c.FallbackDataDir)
	}
	dirs := make([]string, len(c.BinDirs))
	for i, d := range c.BinDirs {
		dirs[i] = abs(fmt.Sprintf("BinDirs[%d]", i), d)
	}
	c.BinDirs = dirs
	if err == nil {
		err = os.MkdirAll(c.CacheDir, 0o700)
	}
	return c, err
}

// keyLocks is one lock per pod ID: CNI forbids verbs in parallel for one
// container (spec, "Lifecycle & Ordering").
type keyLocks struct {
	mu   sync.Mutex
	held map[string]chan struct{} // closed on release
}

// lock waits for its turn or the end of ctx.
func (k *keyLocks) lock(ctx context.Context, key string) (unlock func(), err error) {
	for {
		k.mu.Lock()
		other, taken := k.held[key]
		if !taken {
			mine := make(chan struct{})
			if k.held == nil {
				k.held = map[string]chan struct{}{}
			}
			k.held[key] = mine
			k.mu.Unlock()
			return func() {
				k.mu.Lock()
				delete(k.held, key)
				k.mu.Unlock()
				close(mine)
			}, nil
		}
		k.mu.Unlock()
		select {
		case <-other:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}
