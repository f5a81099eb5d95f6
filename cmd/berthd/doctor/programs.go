package doctor

import (
	"context"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berthd/berth/cni"
	"github.com/berthd/berth/cri/admin/api"
	"github.com/berthd/berth/sandbox"
)

// programTimeout bounds one that is run for what it says about itself.
const programTimeout = 5 * time.Second

func (x *exam) programs(ctx context.Context) {
	x.own("berth-shim", "shim_path", x.Shim, x.ShimErr)
	x.own("berth-init", "init_path", x.Init, x.InitErr)
	for _, h := range slices.Sorted(maps.Keys(x.Runtimes)) {
		x.runtime(ctx, h)
	}
}

// own looks at a program of berth's.
func (x *exam) own(name, key, path string, err error) {
	remedy := "install all of berth's programs (make install), or set " + key
	if !x.need(api.LevelError, name, path, err, "the program", remedy) {
		return
	}
	if mountFlags(path)&unix.ST_NOEXEC != 0 {
		x.bad(api.LevelError, name+" mount", path+" is on a file system mounted noexec", "where programs can run", "install it elsewhere, or remount with exec")
	}
	if st, err := stat(path); err == nil && (st.Uid != 0 || st.Mode&0o022 != 0) {
		x.bad(api.LevelError, name+" owner", fmt.Sprintf("%s: user %d, mode %#o", path, st.Uid, st.Mode&0o7777), "root, writable by nobody else: it runs as root", "chown root and chmod 0755 "+path)
	}
}

func (x *exam) runtime(ctx context.Context, handler string) {
	name, level := "runtime "+handler, api.LevelWarning
	if handler == x.DefaultRuntime {
		level = api.LevelError
	}
	r, err := sandbox.ProbeRuntime(ctx, x.Runtimes[handler])
	remedy := "install it, or set path in [runtimes." + handler + "]"
	if !x.need(level, name, r.Path+", "+r.Version, err, "an OCI runtime; of runc 1.1 or newer", remedy) {
		return
	}
	if patched, ok := fixedRunc(r.Version); ok && patched != "" {
		x.bad(api.LevelNote, name+" age", r.Version, patched+" or newer, which closes ways out of a container that were published since", "update it, unless the distribution has put the corrections into its own")
	}
	switch {
	case !r.Features:
		x.bad(api.LevelNote, name+" features", "it does not tell", "the verb features (runc 1.1)", "pods get no user namespace and no recursive read-only mounts")
	case r.UserNamespaces != nil || !r.RecursiveReadOnly:
		seen := "no recursive read-only mounts"
		if r.UserNamespaces != nil {
			seen = r.UserNamespaces.Error()
		}
		x.bad(api.LevelNote, name+" features", seen, "user namespaces, ID-mapped and recursive read-only mounts", "pods that ask for them are refused; runc 1.2 has all")
	default:
		x.ok(name+" features", "user namespaces, ID-mapped mounts, recursive read-only mounts")
	}
}

var runcVersion = regexp.MustCompile(`^runc version v?(\d+)\.(\d+)\.(\d+)`)

// fixedRunc tells for a runc, "" if it is recent enough, the version of its line without
// the escapes of November 2025 (CVE-2025-31133, CVE-2025-52565, CVE-2025-52881; runc's
// security advisories).
func fixedRunc(version string) (want string, runc bool) {
	m := runcVersion.FindStringSubmatch(version)
	if m == nil {
		return "", false
	}
	var v [3]int
	for i := range v {
		if _, err := fmt.Sscan(m[i+1], &v[i]); err != nil {
			return "", false
		}
	}
	switch {
	case slices.Compare(v[:], []int{1, 2, 8}) < 0:
		return "1.2.8", true
	case v[0] == 1 && v[1] == 3 && v[2] < 3:
		return "1.3.3", true
	}
	return "", true
}

func (x *exam) network(ctx context.Context) {
	dir, err := os.MkdirTemp("", "berth-doctor-")
	if err != nil {
		x.bad(api.LevelWarning, "network", err.Error(), "a place for temporary files", "free space in "+os.TempDir())
		return
	}
	defer os.RemoveAll(dir)
	conf := x.Network
	conf.CacheDir, conf.Observe = filepath.Join(dir, "cache"), true
	if conf.FallbackSubnet != "" {
		conf.FallbackDataDir = filepath.Join(dir, "fallback")
	}
	n, err := cni.New(conf)
	if err != nil {
		x.bad(api.LevelError, "network", err.Error(), "a configuration of networks", "correct the cni_ keys of the configuration")
		return
	}
	n.Ask(ctx)
	info := n.Info()
	for _, p := range info.Problems {
		x.bad(api.LevelWarning, "network configuration", p, "files that can be read and understood", "correct or remove it")
	}
	if !info.Ready {
		x.bad(api.LevelError, "network", info.Reason, "a configuration in "+conf.ConfDir+" and its plugins in "+strings.Join(conf.BinDirs, " or "),
			"install a network for the cluster, or the plugins (Debian: containernetworking-plugins); pods with the host's network run without")
	} else if info.Fallback {
		x.bad(api.LevelNote, "network", "berth's own bridge "+conf.FallbackSubnet+", as "+conf.ConfDir+" has no configuration", "the network of the cluster", "none on a node by itself; else install it, and set cni_fallback_subnet = \"\" so that no pod starts before")
	} else {
		x.ok("network", "%s (%s), plugins %s", info.Network, info.File, strings.Join(info.Plugins, ", "))
	}
	if slices.ContainsFunc(info.Plugins, func(p string) bool { return p == "bridge" || p == "portmap" || p == "firewall" }) {
		x.iptables(ctx)
	}
	if b, err := os.ReadFile("/proc/sys/net/ipv4/ip_forward"); err == nil && strings.TrimSpace(string(b)) == "0" {
		x.bad(api.LevelNote, "forwarding", "net.ipv4.ip_forward is 0", "1", "the plugin bridge sets it; for others: sysctl -w net.ipv4.ip_forward=1")
	}
}

// iptables is what plugins call, and has two kinds of rules that do not see each other.
func (x *exam) iptables(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, programTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, "iptables", "--version")
	cmd.WaitDelay = time.Second
	out, err := cmd.Output()
	text := strings.TrimSpace(string(out[:min(len(out), 200)]))
	if !x.need(api.LevelError, "iptables", text, err, "the program, for the plugins bridge, portmap and firewall", "install iptables") {
		return
	}
	legacy, _ := os.ReadFile("/proc/net/ip_tables_names")
	if tables := strings.Fields(string(legacy)); strings.Contains(text, "nf_tables") && len(tables) > 0 {
		x.bad(api.LevelWarning, "iptables rules", "iptables is nf_tables, and the kernel has legacy tables, too: "+strings.Join(tables, ", "), "rules of one kind: each is blind to the other",
			"find out who uses iptables-legacy (iptables-legacy-save), and have all use one (update-alternatives --config iptables)")
	}
}
