package imageservice

import (
	"fmt"
	"path/filepath"
	"runtime"
	"time"
)

// Config is all that New needs to know. The zero value of a field is its default.
type Config struct {
	// LayersDir is the directory that is reported as the mount point of the image
	// file system: that in which the snapshotter keeps its layers.
	LayersDir string
	// ManifestsDir is where it is kept what each layer holds, for VerifyLayer: a
	// directory on a file system that the snapshotter's Sync makes durable. It is made
	// with mode 0700. "" means that it is not kept.
	ManifestsDir string
	// SnapshotsDir is where the snapshotter keeps writable layers. When it is on another
	// file system than LayersDir, FsUsage tells about both. "" means that it is not.
	SnapshotsDir string

	// MaxConcurrentLayers bounds the layers that are downloaded and unpacked at the
	// same time, over all pulls: 1 to 64, default 6. Each takes about 2 MiB of
	// memory; zstd layers share 24 MiB more for their windows and wait for each other,
	// so that only one with a larger window, of up to 64 MiB, takes more.
	MaxConcurrentLayers int
	// Gunzip is the decoder of gzip layers: "fast", the default, is berth's own;
	// "klauspost" is the widely used one, in case the former were at fault.
	Gunzip string
	// MaxLayerBytes bounds one unpacked layer: default 256 GiB.
	MaxLayerBytes int64
	// MaxLayerEntries bounds the archive entries of one layer: default 1048576.
	MaxLayerEntries int64
	// MaxArchiveBytes bounds an archive that is imported and has to be unpacked or
	// copied to be read: default 256 GiB.
	MaxArchiveBytes int64
	// MaxConfigBytes bounds an image config: default and limit 8 MiB.
	MaxConfigBytes int64

	// PullTimeout ends a pull that takes too long: default 1 h.
	PullTimeout time.Duration
	// StallTimeout ends a pull in which a layer waited that long for registries and
	// got less than MinRate: default 60 s. Half of it makes the pull go on over another
	// connection, to another mirror if there is one. Time spent waiting for the disk does
	// not count.
	StallTimeout time.Duration
	// MinRate is the least, in bytes per second, that a connection must bring not to
	// count as stalled: 1 to 1 GiB, default 1 KiB.
	MinRate int64
	// Retries is how often in a row, without progress, a request is tried or a connection
	// may break before a pull is given up: 1 to 100, default 5.
	Retries int
	// OrphanTimeout is for how long a pull goes on when nobody waits for it any
	// more, so that a caller who comes back finds it further on: default 5 min.
	OrphanTimeout time.Duration

	// ParallelRanges is over how many connections a layer of 32 MiB or more is fetched at
	// once: 1 to 16, default 1. Each but the first takes 4 MiB of memory.
	ParallelRanges int

	// RegistriesConf and RegistriesConfDir are registries.conf (v2) and its drop-ins.
	// "" means those of the host, /etc/containers/registries.conf and .conf.d.
	RegistriesConf, RegistriesConfDir string
	// RegistriesDir is registries.d, which tells where signatures are. "" means the
	// host's, /etc/containers/registries.d.
	RegistriesDir string
	// CertsDir has a directory with CA and client certificates for each registry
	// ("certs.d"). "" means the host's: /etc/containers/certs.d, /etc/docker/certs.d.
	CertsDir string
	// HostsDir is the root of containerd's certs.d: a directory for each registry with
	// a hosts.toml. "" means the host's, /etc/containerd/certs.d.
	HostsDir string
	// PolicyPath is the signature policy. "" means /etc/containers/policy.json if
	// that is there, and to accept anything otherwise.
	PolicyPath string
	// AuthFile has credentials that are used when the caller gives none (auth.json
	// or a docker config.json). "" means the host's.
	AuthFile string
	// UnqualifiedRegistry is the registry of short names such as "busybox", unless
	// registries.conf has an alias or search registries: default docker.io.
	UnqualifiedRegistry string
	// InsecureRegistries lists "host" or "host:port" that may be plain HTTP or have
	// any certificate. Loopback hosts may, without being named here, unless
	// registries.conf or certs.d says something about them.
	InsecureRegistries []string

	// OS, Architecture and Variant choose from multi-arch images: default those of
	// the node.
	OS, Architecture, Variant string

	// BootID tells boots of the machine apart: default the kernel's.
	BootID string

	// PinnedImages are references, or path.Match patterns of them, that are reported
	// as pinned: "registry.example/base:*".
	PinnedImages []string

	// Observe is for a look at what an earlier daemon has left, by a process that
	// is none: New reads the book and changes nothing. The result can tell of images,
	// and not pull.
	Observe bool
}

// The values of Config.Gunzip.
const (
	gunzipFast      = "fast"
	gunzipKlauspost = "klauspost"
)

const (
	maxConcurrentLayers = 64
	maxConfigBytes      = 8 << 20
	// maxLayers is what the kernel's overlay accepts as lower directories.
	maxLayers = 500
)

// withDefaults returns c with its defaults filled in, or an error that names the
// field, the value and the limit.
func (c Config) withDefaults() (Config, error) {
	def := func(v *int64, d int64) {
		if *v == 0 {
			*v = d
		}
	}
	layers := int64(c.MaxConcurrentLayers)
	def(&layers, 6)
	c.MaxConcurrentLayers = int(layers)
	def(&c.MaxLayerBytes, 256<<30)
	def(&c.MaxLayerEntries, 1<<20)
	def(&c.MaxArchiveBytes, 256<<30)
	def(&c.MaxConfigBytes, maxConfigBytes)
	def(&c.MinRate, 1<<10)
	retries := int64(c.Retries)
	def(&retries, 5)
	c.Retries = int(retries)
	ranges := int64(c.ParallelRanges)
	def(&ranges, 1)
	c.ParallelRanges = int(ranges)
	def((*int64)(&c.PullTimeout), int64(time.Hour))
	def((*int64)(&c.StallTimeout), int64(time.Minute))
	def((*int64)(&c.OrphanTimeout), int64(5*time.Minute))
	if c.UnqualifiedRegistry == "" {
		c.UnqualifiedRegistry = "docker.io"
	}
	if c.Gunzip == "" {
		c.Gunzip = gunzipFast
	}
	if c.OS == "" {
		c.OS = "linux"
	}
	if c.Architecture == "" {
		c.Architecture = runtime.GOARCH
	}
	return c, c.validate()
}

func (c Config) validate() error {
	if c.Gunzip != gunzipFast && c.Gunzip != gunzipKlauspost {
		return fmt.Errorf("images config: Gunzip = %q: must be %q or %q", c.Gunzip, gunzipFast, gunzipKlauspost)
	}
	for _, f := range []struct {
		name        string
		v, min, max int64
	}{
		{"MaxConcurrentLayers", int64(c.MaxConcurrentLayers), 1, maxConcurrentLayers},
		{"MaxLayerBytes", c.MaxLayerBytes, 1 << 10, 1 << 50},
		{"MaxLayerEntries", c.MaxLayerEntries, 1, 1 << 30},
		{"MaxArchiveBytes", c.MaxArchiveBytes, 1 << 10, 1 << 50},
		{"MaxConfigBytes", c.MaxConfigBytes, 1 << 10, maxConfigBytes},
		{"MinRate", c.MinRate, 1, 1 << 30},
		{"Retries", int64(c.Retries), 1, 100},
		{"ParallelRanges", int64(c.ParallelRanges), 1, 16},
	} {
		if f.v < f.min || f.v > f.max {
			return fmt.Errorf("images config: %s = %d: must be %d to %d", f.name, f.v, f.min, f.max)
		}
	}
	for _, f := range []struct {
		name string
		v    time.Duration
	}{{"PullTimeout", c.PullTimeout}, {"StallTimeout", c.StallTimeout}, {"OrphanTimeout", c.OrphanTimeout}} {
		if f.v < time.Millisecond || f.v > 24*time.Hour {
			return fmt.Errorf("images config: %s = %s: must be 1ms to 24h", f.name, f.v)
		}
	}
	for _, p := range c.PinnedImages {
		if _, err := filepath.Match(p, ""); err != nil {
			return fmt.Errorf("images config: PinnedImages %q: %w", p, err)
		}
	}
	if _, err := parseReference(c.UnqualifiedRegistry+"/x", ""); err != nil {
		return fmt.Errorf("images config: UnqualifiedRegistry %q: not a registry host", c.UnqualifiedRegistry)
	}
	return nil
}
