package main

import (
	"cmp"
	"fmt"
	"maps"
	"net"
	"net/netip"
	slashpath "path"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// config is everything that can be configured. Each value is described once,
// in fields: its key, default, limits and meaning. Reading a file, printing
// the default file, the documentation and a reload all follow that list.
type config struct {
	StateDir, RunDir, Socket string
	LogLevel                 int64
	MetricsListen            string
	OOMScoreAdj              int64

	CgroupDriver, DefaultRuntime string
	Runtimes                     map[string]*runtimeConfig
	ShimPath, InitPath           string
	PodTimeout, ContainerTimeout time.Duration
	ExecOutputLimit              int64
	ExecDrain                    time.Duration
	NativeExec                   bool
	MaxLogLine                   int64
	StatsTTL                     time.Duration
	UnprivilegedPorts            bool
	UnprivilegedICMP             bool
	CDISpecDirs                  []string

	NRI                                                       bool
	NRISocket, NRIPlugins, NRIPluginConfigs                   string
	NRIRegistrationTimeout, NRIRequestTimeout, NRISyncTimeout time.Duration

	StreamListen                             string
	StreamIdleTimeout, StreamCreationTimeout time.Duration
	StreamCertFile, StreamKeyFile            string

	CNIConfDir        string
	CNIBinDirs        []string
	CNIFallbackSubnet string
	CNITimeout        time.Duration
	CNIMaxConcurrent  int64

	RegistriesConf, RegistriesConfDir, RegistriesDir string
	CertsDir, HostsDir, PolicyPath, AuthFile         string
	UnqualifiedRegistry                              string
	InsecureRegistries                               []string
	PinnedImages                                     []string
	PreloadDir                                       string
	PreloadPin                                       bool
	MaxConcurrentLayers, MaxLayerBytes               int64
	Gunzip                                           string
	PullTimeout, PullStallTimeout, PullOrphanTimeout time.Duration
	PullMinRate, PullRetries, PullParallelRanges     int64

	// origin tells where a key was set, as "file:line" or a flag, for errors.
	origin map[string]string
}

// runtimeConfig is one OCI runtime, the table [runtimes.<handler>].
type runtimeConfig struct {
	Path, Root, CgroupDriver, Snapshotter string
	PodAnnotations, ContainerAnnotations  []string
}

// program is what is run for a handler.
func (r *runtimeConfig) program(handler string) string { return cmp.Or(r.Path, handler) }

// Limits that have a reason outside of this file.
const (
	maxRunDir = 40  // room for "/s/" and a container's ID in a socket's address
	maxSocket = 107 // the address of a unix socket holds 108 bytes with its NUL
)

// fields describes the keys of c in the order in which they are documented.
func (c *config) fields() []*field {
	return []*field{
		path(&c.StateDir, "state_dir", "/var/lib/berth",
			"Directory of what survives a reboot: the book, image layers, writable layers. Made with mode 0700. Put it on a local ext4 or xfs file system."),
		path(&c.RunDir, "run_dir", "/run/berth",
			"Directory of what does not: sockets, bundles, pinned namespaces. Made with mode 0700, and opened to passing through, 0711, by the first container in a user namespace, for which the directories above it have to be open, too.").bytes(maxRunDir),
		path(&c.Socket, "socket", "",
			`Unix socket of the CRI, mode 0600. "" means berth.sock in run_dir.`).bytes(maxSocket).optional(),
		integer(&c.LogLevel, "log_level", 2, 0, 10,
			"Verbosity of the log: 0 errors and news, 2 also every change of a pod, a container or an image, 4 also every step and every read.").live(),
		text(&c.MetricsListen, "metrics_listen", "", checkMetricsListen,
			`Where /metrics (Prometheus) and /healthz are served: a loopback address such as "127.0.0.1:9797", or "unix:/run/berth/metrics.sock". "" means nowhere.`),
		integer(&c.OOMScoreAdj, "oom_score_adj", -999, -1000, 1000,
			"The kernel's inclination to kill berthd when memory runs out. Containers and shims have their own."),

		choice(&c.CgroupDriver, "cgroup_driver", []string{"auto", "systemd", "cgroupfs"},
			"Who makes cgroups; has to be what the kubelet uses, which asks for it. \"auto\" is systemd where that is the init system. Pods that exist keep the one that they were made with."),
		text(&c.DefaultRuntime, "default_runtime", "runc", checkHandler,
			"The handler of pods that name none."),
		program(&c.ShimPath, "shim_path",
			`The program berth-shim. "" means beside berthd, then in ../libexec/berth from there, then in PATH.`),
		program(&c.InitPath, "init_path",
			`The program berth-init. "" means beside berthd, then in ../libexec/berth from there, then in PATH.`),
		duration(&c.PodTimeout, "pod_timeout", 4*time.Minute, time.Second, time.Hour,
			"How long an operation on a pod may take before it is undone."),
		duration(&c.ContainerTimeout, "container_timeout", 2*time.Minute, time.Second, time.Hour,
			"How long an operation on a container may take before it is undone, beside the grace period of a stop."),
		size(&c.ExecOutputLimit, "exec_output_limit", 16<<20, 4<<10, 16<<20,
			"What is kept of each output stream of an ExecSync; the rest is dropped. The upper limit is that of a CRI message."),
		duration(&c.ExecDrain, "exec_drain", 2*time.Second, 10*time.Millisecond, time.Minute,
			"How long the output of an ExecSync is waited for when its command has ended and a child still holds it open."),
		boolean(&c.NativeExec, "native_exec", true,
			"Let a shim start the processes of execs and probes itself, with the same user, limits, capabilities, seccomp filter and namespaces as the OCI runtime would, at a tenth of the cost. What it cannot do, and what is not runc 1.2 or newer, is left to the runtime."),
		integer(&c.MaxLogLine, "max_container_log_line_size", 16384, 256, 1<<20,
			"Length in bytes at which a line of a container's output is split in its log."),
		duration(&c.StatsTTL, "stats_ttl", 10*time.Second, time.Second, time.Hour,
			"How old the sizes of writable layers in stats may be."),
		boolean(&c.UnprivilegedPorts, "enable_unprivileged_ports", true,
			"Let every process of a pod listen below port 1024."),
		boolean(&c.UnprivilegedICMP, "enable_unprivileged_icmp", true,
			"Let every process of a pod send pings."),
		list(&c.CDISpecDirs, "cdi_spec_dirs", []string{"/etc/cdi", "/var/run/cdi"}, checkAbsolute,
			"Directories of CDI specifications, which tell what a vendor's device needs; of two that define the same device the later one counts. They are watched, and need not exist. [] turns CDI off.").limited("absolute paths"),

		boolean(&c.NRI, "nri", true,
			"Let plugins of the Node Resource Interface see and adjust pods and containers. Without a plugin it costs nothing."),
		path(&c.NRISocket, "nri_socket_path", "/var/run/nri/nri.sock",
			`Unix socket, mode 0600, to which plugins connect. "" means that none can. A socket where another runtime listens is left to it, and NRI is off then.`).bytes(maxSocket).optional(),
		path(&c.NRIPlugins, "nri_plugin_path", "/opt/nri/plugins",
			"Directory of plugins that berthd starts: programs named NN-name, in the order of their numbers. It need not exist."),
		path(&c.NRIPluginConfigs, "nri_plugin_config_path", "/etc/nri/conf.d",
			"Directory of those plugins' configurations, NN-name.conf or name.conf. It need not exist."),
		duration(&c.NRIRegistrationTimeout, "nri_plugin_registration_timeout", 5*time.Second, 10*time.Millisecond, time.Minute,
			"How long a plugin that has connected may take to register; then it is turned away."),
		duration(&c.NRIRequestTimeout, "nri_plugin_request_timeout", 2*time.Second, 10*time.Millisecond, time.Minute,
			"How long a plugin may take over a request; then it is disconnected, unless it asked not to be. Others wait for so long, as plugins get one request at a time."),
		duration(&c.NRISyncTimeout, "nri_plugin_sync_timeout", 10*time.Second, 10*time.Millisecond, time.Minute,
			"How long a new plugin may take over the state of the node. Pods and containers that are to be made wait for so long, so that it misses none."),

		text(&c.StreamListen, "stream_listen", "127.0.0.1:0", checkStreamListen,
			`Where sessions of exec, attach and port-forward are served: IP address and port, 0 for any port. The kubelet connects to it, from this node. "" means that there are none.`),
		duration(&c.StreamIdleTimeout, "stream_idle_timeout", 4*time.Hour, time.Second, 30*24*time.Hour,
			"How long a session may go on in which nothing is sent either way."),
		duration(&c.StreamCreationTimeout, "stream_creation_timeout", 30*time.Second, time.Second, 10*time.Minute,
			"How long a client may take to open the streams of its session."),
		path(&c.StreamCertFile, "stream_cert_file", "",
			`Certificate chain (PEM) with which sessions are served over TLS. "" means without. A reload reads the file again.`).optional(),
		path(&c.StreamKeyFile, "stream_key_file", "",
			`Key (PEM) of stream_cert_file.`).optional(),

		path(&c.CNIConfDir, "cni_conf_dir", "/etc/cni/net.d",
			"Directory of CNI configurations. It is watched, and need not exist yet."),
		paths(&c.CNIBinDirs, "cni_bin_dirs", []string{"/opt/cni/bin", "/usr/lib/cni"},
			"Directories of CNI plugins, searched in order."),
		text(&c.CNIFallbackSubnet, "cni_fallback_subnet", "10.85.0.0/16", checkSubnet,
			`Subnet of berth's own bridge network, which is used as long as cni_conf_dir has no valid configuration. "" means to wait for one. Needs the plugins bridge, host-local and portmap.`),
		duration(&c.CNITimeout, "cni_timeout", time.Minute, time.Second, 10*time.Minute,
			"How long the plugins may take to attach or detach a pod; then they are killed."),
		integer(&c.CNIMaxConcurrent, "max_concurrent_cni", 0, 0, 1024,
			"How many pods are attached or detached at once. 0 means twice the number of processors, 4 at least."),

		path(&c.RegistriesConf, "registries_conf", "",
			`File registries.conf (v2): mirrors, aliases, blocked registries. "" means that of the host, /etc/containers/registries.conf.`).optional(),
		path(&c.RegistriesConfDir, "registries_conf_dir", "",
			`Directory of its drop-ins. "" means that of the host.`).optional(),
		path(&c.RegistriesDir, "registries_dir", "",
			`Directory registries.d, which tells where signatures are. "" means that of the host.`).optional(),
		path(&c.CertsDir, "certs_dir", "",
			`Directory with CA and client certificates for each registry. "" means those of the host, /etc/containers/certs.d and /etc/docker/certs.d.`).optional(),
		path(&c.HostsDir, "hosts_dir", "",
			`Directory with a directory for each registry that holds a hosts.toml, as containerd has it (its config_path). "" means that of the host, /etc/containerd/certs.d. A [[registry]] of registries.conf that matches an image counts instead.`).optional(),
		path(&c.PolicyPath, "policy_path", "",
			`Signature policy. "" means /etc/containers/policy.json if there is one, and to accept every image otherwise.`).optional(),
		path(&c.AuthFile, "auth_file", "",
			`Credentials for pulls that bring none, in the format of auth.json. "" means those of the host.`).optional(),
		text(&c.UnqualifiedRegistry, "unqualified_registry", "docker.io", checkRegistry,
			"Registry of image names without one, unless registries.conf says otherwise."),
		list(&c.InsecureRegistries, "insecure_registries", nil, checkRegistry,
			"Registries (host or host:port) that may use plain HTTP or any certificate. Registries on loopback addresses may without being listed."),
		list(&c.PinnedImages, "pinned_images", nil, checkPattern,
			`Images that the kubelet is told not to remove: references, or patterns such as "registry.example/base:*".`).live(),
		path(&c.PreloadDir, "preload_dir", "",
			`Directory whose image archives (OCI layout or "docker save"; tar, tar.gz, tar.zst or directory) are imported at the start and when it changes. "" means preload in state_dir.`).optional(),
		boolean(&c.PreloadPin, "preload_pin", true,
			"Pin what is imported from preload_dir, so that the kubelet does not remove it."),
		integer(&c.MaxConcurrentLayers, "max_concurrent_layers", 6, 1, 64,
			"How many image layers are downloaded and unpacked at once, over all pulls."),
		choice(&c.Gunzip, "gunzip", []string{"fast", "klauspost"},
			"The decoder of gzip layers: berth's own, or the widely used one, which takes twice the processor time."),
		size(&c.MaxLayerBytes, "max_layer_bytes", 256<<30, 1<<20, 1<<50,
			"How large one layer may become when it is unpacked."),
		duration(&c.PullTimeout, "pull_timeout", time.Hour, time.Second, 24*time.Hour,
			"How long a pull may take in all."),
		duration(&c.PullStallTimeout, "pull_stall_timeout", time.Minute, time.Second, 24*time.Hour,
			"How long registries may send next to nothing before a pull is given up. After half of it the pull goes on over another connection, to another mirror if there is one. Time in which the disk is slow does not count."),
		size(&c.PullMinRate, "pull_min_rate", 1<<10, 1, 1<<30,
			"What next to nothing is: less than this in a second, for one layer, on average."),
		integer(&c.PullRetries, "pull_retries", 5, 1, 100,
			"How often in a row, without progress, a registry is asked again that cannot be reached, breaks the connection or answers with a server error."),
		integer(&c.PullParallelRanges, "pull_parallel_ranges", 1, 1, 16,
			"Over how many connections a layer of 32 MiB or more is fetched at once. It helps where a registry or the way to it gives each connection only so much; each connection takes 4 MiB of memory."),
		duration(&c.PullOrphanTimeout, "pull_orphan_timeout", 5*time.Minute, time.Second, 24*time.Hour,
			"How long a pull goes on when nobody waits for it any more."),
	}
}

// fields describes the keys of one table [runtimes.<handler>].
func (r *runtimeConfig) fields(handler string) []*field {
	return []*field{
		program(&r.Path, "path",
			"The OCI runtime, a program with runc's command line. \"\" means the one in PATH that is called like the handler."),
		path(&r.Root, "root", "",
			`Directory of the runtime's own state. "" means oci/`+handler+` in run_dir.`).optional(),
		text(&r.CgroupDriver, "cgroup_driver", "", checkDriver,
			`Who makes the cgroups of this handler's pods, "systemd" or "cgroupfs". "" means what cgroup_driver says for the node. The kubelet is told that one only, and a pod whose cgroup_parent is in the form of the other driver is refused.`).limited("systemd, cgroupfs"),
		text(&r.Snapshotter, "snapshotter", snapshotters[0], checkSnapshotter,
			`What makes the file systems of this handler's containers from the layers of images. There is one, "overlay"; with a handler that asks for another one berthd does not start.`).limited(strings.Join(snapshotters, ", ")),
		list(&r.PodAnnotations, "pod_annotations", nil, checkAnnotation,
			`Annotations of a pod that the runtime is told about it: patterns of keys such as "dev.gvisor.*", in which * stands for anything but a slash. Others it is not told: it may let an annotation change what a pod is allowed (runc obeys org.systemd.property.*, crun run.oci.*), so list no more than the users of the cluster may decide.`).limited("patterns"),
		list(&r.ContainerAnnotations, "container_annotations", nil, checkAnnotation,
			`The same for annotations of a container, which the kubelet and its device plugins set.`).limited("patterns"),
	}
}

// defaults is the configuration of a node without a file.
func defaults() *config {
	c := &config{Runtimes: map[string]*runtimeConfig{"runc": newRuntime("runc")}, origin: map[string]string{}}
	for _, f := range c.fields() {
		f.reset()
	}
	return c
}

func newRuntime(handler string) *runtimeConfig {
	r := &runtimeConfig{}
	for _, f := range r.fields(handler) {
		f.reset()
	}
	return r
}

// finish checks what concerns several keys and fills in what derives from
// others.
func (c *config) finish() error {
	if c.Runtimes[c.DefaultRuntime] == nil {
		return c.wrong("default_runtime", "%q: there is no table [runtimes.%s], only %s",
			c.DefaultRuntime, c.DefaultRuntime, strings.Join(slices.Sorted(maps.Keys(c.Runtimes)), ", "))
	}
	if c.StateDir == c.RunDir {
		return c.wrong("run_dir", "%q is state_dir as well", c.RunDir)
	}
	if err := c.checkStreams(); err != nil {
		return err
	}
	if c.PreloadDir == "" {
		c.PreloadDir = filepath.Join(c.StateDir, "preload")
	}
	if c.Socket == "" {
		c.Socket = filepath.Join(c.RunDir, "berth.sock")
	}
	return nil
}

// wrong is an error about a key that names where the key was set.
func (c *config) wrong(key, format string, args ...any) error {
	where := ""
	if o := c.origin[key]; o != "" {
		where = o + ": "
	}
	return fmt.Errorf("%s%s = %w", where, key, fmt.Errorf(format, args...))
}

func checkMetricsListen(s string) error {
	if _, _, err := metricsAddress(s); err != nil {
		return fmt.Errorf("want host:port with a loopback address, or unix:/path: %w", err)
	}
	return nil
}

// metricsAddress splits a metrics_listen into what net.Listen takes.
func metricsAddress(s string) (network, address string, err error) {
	if p, ok := strings.CutPrefix(s, "unix:"); ok {
		p = "/" + strings.TrimLeft(p, "/")
		if len(p) > maxSocket || p == "/" {
			return "", "", fmt.Errorf("a path of 1 to %d bytes", maxSocket)
		}
		return "unix", p, nil
	}
	if s == "" {
		return "", "", nil
	}
	a, err := netip.ParseAddrPort(s)
	if err != nil {
		return "", "", err
	}
	if !a.Addr().IsLoopback() {
		// Metrics are not authenticated.
		return "", "", fmt.Errorf("%s is not a loopback address", a.Addr())
	}
	return "tcp", s, nil
}

func checkSubnet(s string) error {
	if s == "" {
		return nil
	}
	p, err := netip.ParsePrefix(s)
	if err != nil || p != p.Masked() {
		return fmt.Errorf("want a subnet such as 10.85.0.0/16")
	}
	return nil
}

// checkHandler accepts the name of a RuntimeClass handler: a DNS label, which
// is also safe as a directory's name.
func checkHandler(s string) error {
	ok := len(s) > 0 && len(s) <= 63
	for _, r := range s {
		ok = ok && (r >= 'a' && r <= 'z' || r >= '0' && r <= '9' || r == '-')
	}
	if !ok || s[0] == '-' || s[len(s)-1] == '-' {
		return fmt.Errorf("want 1 to 63 lower-case letters, digits and '-'")
	}
	return nil
}

func checkDriver(s string) error {
	if s != "" && s != "systemd" && s != "cgroupfs" {
		return fmt.Errorf("want systemd, cgroupfs or nothing")
	}
	return nil
}

// snapshotters are those that there are, the default first.
var snapshotters = []string{"overlay"}

func checkSnapshotter(s string) error {
	if !slices.Contains(snapshotters, s) {
		return fmt.Errorf("no such snapshotter, want one of: %s", strings.Join(snapshotters, ", "))
	}
	return nil
}

// checkAnnotation accepts a pattern of an annotation's key.
func checkAnnotation(s string) error {
	if _, err := slashpath.Match(s, ""); err != nil || s == "" || len(s) > 512 {
		return fmt.Errorf("want the key of an annotation or a pattern of one, up to 512 bytes")
	}
	return nil
}

func checkRegistry(s string) error {
	host := s
	if h, _, err := net.SplitHostPort(s); err == nil {
		host = h
	}
	if host == "" || len(s) > 255 || strings.ContainsAny(s, "/ \t\n@") {
		return fmt.Errorf("want a registry as host or host:port")
	}
	return nil
}

func checkPattern(s string) error {
	if _, err := filepath.Match(s, ""); err != nil || s == "" || len(s) > 512 {
		return fmt.Errorf("want an image reference or a pattern of one, up to 512 bytes")
	}
	return nil
}
