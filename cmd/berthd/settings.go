package main

import (
	"os"
	"path/filepath"

	"github.com/berthd/berth/cni"
	"github.com/berthd/berth/cri"
	"github.com/berthd/berth/imageservice"
	"github.com/berthd/berth/sandbox"
	"github.com/berthd/berth/sandbox/nri"
)

// What each part of the daemon is told of the configuration.

func (c *config) book() string { return filepath.Join(c.StateDir, "book.db") }

func (c *config) sandbox() (sandbox.Config, error) {
	shim, err := findProgram("shim_path", c.ShimPath, "berth-shim")
	if err != nil {
		return sandbox.Config{}, err
	}
	pid1, err := findProgram("init_path", c.InitPath, "berth-init")
	if err != nil {
		return sandbox.Config{}, err
	}
	runtimes := make(map[string]sandbox.Runtime, len(c.Runtimes))
	for handler, r := range c.Runtimes {
		runtimes[handler] = sandbox.Runtime{Path: r.program(handler), Root: r.Root, CgroupDriver: r.CgroupDriver,
			PodAnnotations: r.PodAnnotations, ContainerAnnotations: r.ContainerAnnotations}
	}
	return sandbox.Config{
		StateDir: c.StateDir, RunDir: c.RunDir,
		ShimBinary: shim, InitBinary: pid1,
		Runtimes: runtimes, DefaultRuntime: c.DefaultRuntime,
		CgroupDriver: cgroupDriver(c.CgroupDriver),
		PodTimeout:   c.PodTimeout, ContainerTimeout: c.ContainerTimeout,
		ExecOutputLimit: c.ExecOutputLimit, ExecDrain: c.ExecDrain, NativeExec: c.NativeExec,
		MaxLogLine:        int(c.MaxLogLine),
		UnprivilegedPorts: c.UnprivilegedPorts, UnprivilegedICMP: c.UnprivilegedICMP,
		StatsTTL: c.StatsTTL, CDISpecDirs: c.CDISpecDirs,
		// Tests pretend a reboot with it; empty is the kernel's own.
		BootID: os.Getenv("BERTH_TEST_BOOT_ID"),
	}, nil
}

func (c *config) images() imageservice.Config {
	return imageservice.Config{
		LayersDir:           filepath.Join(c.StateDir, "layers"),
		ManifestsDir:        filepath.Join(c.StateDir, "manifests"),
		SnapshotsDir:        filepath.Join(c.StateDir, "snapshots"),
		MaxConcurrentLayers: int(c.MaxConcurrentLayers), MaxLayerBytes: c.MaxLayerBytes, Gunzip: c.Gunzip,
		PullTimeout: c.PullTimeout, StallTimeout: c.PullStallTimeout, OrphanTimeout: c.PullOrphanTimeout,
		MinRate: c.PullMinRate, Retries: int(c.PullRetries), ParallelRanges: int(c.PullParallelRanges),
		RegistriesConf: c.RegistriesConf, RegistriesConfDir: c.RegistriesConfDir, RegistriesDir: c.RegistriesDir,
		CertsDir: c.CertsDir, HostsDir: c.HostsDir, PolicyPath: c.PolicyPath, AuthFile: c.AuthFile,
		UnqualifiedRegistry: c.UnqualifiedRegistry, InsecureRegistries: c.InsecureRegistries,
		PinnedImages: c.PinnedImages, BootID: os.Getenv("BERTH_TEST_BOOT_ID"),
	}
}

func (c *config) network() cni.Config {
	return cni.Config{
		ConfDir: c.CNIConfDir, BinDirs: c.CNIBinDirs,
		CacheDir: filepath.Join(c.StateDir, "cni", "cache"),
		Timeout:  c.CNITimeout, MaxConcurrent: int(c.CNIMaxConcurrent),
		FallbackSubnet: c.CNIFallbackSubnet, FallbackDataDir: filepath.Join(c.StateDir, "cni", "fallback"),
	}
}

// plugins is NRI, nil when it is off.
func (c *config) plugins() sandbox.Plugins {
	if !c.NRI {
		return nil
	}
	return nri.New(nri.Config{Socket: c.NRISocket, PluginDir: c.NRIPlugins, PluginConfigDir: c.NRIPluginConfigs, Version: version(),
		RegistrationTimeout: c.NRIRegistrationTimeout, RequestTimeout: c.NRIRequestTimeout, SyncTimeout: c.NRISyncTimeout})
}

func (d *daemon) edge(network *cni.Network, plugins sandbox.Plugins) cri.Config {
	out := cri.Config{
		Version: version(),
		Stream:  cri.StreamConfig{IdleTimeout: d.config.StreamIdleTimeout, CreationTimeout: d.config.StreamCreationTimeout},
		Info: map[string]func() any{
			"cni":    func() any { return network.Info() },
			"config": d.show,
		},
	}
	if h, ok := plugins.(*nri.Host); ok {
		out.Info["nri"] = func() any { return h.Info() }
	}
	return out
}

// show is the configuration for a verbose Status. It holds paths and limits;
// credentials are in files of their own.
func (d *daemon) show() any {
	d.mu.Lock()
	defer d.mu.Unlock()
	c := d.config
	out := values(c.fields())
	runtimes := map[string]any{}
	for h, r := range c.Runtimes {
		runtimes[h] = values(r.fields(h))
	}
	out["runtimes"] = runtimes
	return out
}

func values(fields []*field) map[string]any {
	out := map[string]any{}
	for _, f := range fields {
		out[f.key] = f.get()
	}
	return out
}
