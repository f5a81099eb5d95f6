package cri

import (
	"net/netip"
	"path"
	"regexp"
	"strconv"
	"strings"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Checks of single fields and lists. Each names the field as the interface's
// definition spells it, the value as far as it is short, and the limit.

// first runs the checks in order and returns the first error.
func first(checks ...func() error) error {
	for _, check := range checks {
		if err := check(); err != nil {
			return err
		}
	}
	return nil
}

// checkID accepts what could be an object's ID or a prefix of one. What no ID
// looks like is simply not found further in.
func checkID(field, id string) error {
	if id == "" {
		return invalid(field, "required")
	}
	return checkText(field, id, maxIDText)
}

// checkName accepts a required name of Kubernetes. Its characters are not
// judged beyond what would spoil logs, files and cgroup names.
func checkName(field, s string) error {
	if s == "" {
		return invalid(field, "required")
	}
	if strings.ContainsRune(s, '/') {
		return invalid(field, "%q contains a slash", clip(s, maxName))
	}
	return checkText(field, s, maxName)
}

// checkText refuses what is too long and control characters: such values end
// up in files with one record a line, and in logs.
func checkText(field, s string, limit int) error {
	if len(s) > limit {
		return invalid(field, "%d bytes, limit %d", len(s), limit)
	}
	if i := strings.IndexFunc(s, func(r rune) bool { return r < ' ' || r == 0x7f }); i >= 0 {
		return invalid(field, "control character at byte %d", i)
	}
	return nil
}

func checkReference(field, ref string) error {
	if ref == "" {
		return invalid(field, "required")
	}
	return checkText(field, ref, maxReference)
}

// checkHostname accepts what can stand in /etc/hosts; empty means the pod's
// name or the node's.
func checkHostname(field, h string) error {
	if len(h) > maxHostname {
		return invalid(field, "%d bytes, limit %d", len(h), maxHostname)
	}
	for i, r := range h {
		if !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '-' || r == '.' || r == '_') {
			return invalid(field, "%q has %q at byte %d, want letters, digits, '-', '.' and '_'", h, r, i)
		}
	}
	return nil
}

func checkPath(field, p string) error {
	if p == "" {
		return invalid(field, "required")
	}
	return checkOptionalPath(field, p)
}

// checkOptionalPath accepts an absolute path, or none.
func checkOptionalPath(field, p string) error {
	if p != "" && !path.IsAbs(p) {
		return invalid(field, "%q is not an absolute path", clip(p, maxFileName))
	}
	if len(p) > maxPath {
		return invalid(field, "%d bytes, limit %d", len(p), maxPath)
	}
	if strings.ContainsRune(p, 0) {
		return invalid(field, "NUL character")
	}
	return nil
}

func checkPaths(field string, paths []string) error {
	if err := checkCount(field, len(paths), maxList); err != nil {
		return err
	}
	for i, p := range paths {
		if err := checkPath(at(field, i), p); err != nil {
			return err
		}
	}
	return nil
}

// checkArgs checks a command line against what execve(2) takes.
func checkArgs(field string, args []string) error {
	total := 0
	for i, a := range args {
		if len(a) > maxArg {
			return invalid(at(field, i), "%d bytes, limit %d", len(a), maxArg)
		}
		if strings.ContainsRune(a, 0) {
			return invalid(at(field, i), "NUL character")
		}
		total += len(a) + 1
	}
	if total > maxArgs {
		return invalid(field, "%d bytes together, limit %d", total, maxArgs)
	}
	return nil
}

func checkEnvs(field string, envs []*runtime.KeyValue) error {
	total := 0
	for i, e := range envs {
		k, v := e.GetKey(), e.GetValue()
		n := len(k) + 1 + len(v)
		switch {
		case k == "":
			return invalid(at(field, i)+".key", "required")
		case strings.ContainsAny(k, "=\x00"):
			return invalid(at(field, i)+".key", "%q contains '=' or NUL", clip(k, maxName))
		case strings.ContainsRune(string(v), 0):
			return invalid(at(field, i)+".value", "NUL character in %s", clip(k, maxName))
		case n > maxArg:
			return invalid(at(field, i), "%s has %d bytes, limit %d", clip(k, maxName), n, maxArg)
		}
		total += n + 1
	}
	if total > maxArgs {
		return invalid(field, "%d bytes together, limit %d", total, maxArgs)
	}
	return nil
}

// checkMap bounds labels, annotations and sysctls by their size.
func checkMap(field string, m map[string]string, limit int) error {
	total := 0
	for k, v := range m {
		if k == "" {
			return invalid(field, "an empty key")
		}
		if err := checkText(field+" key", k, maxLabelKey); err != nil {
			return err
		}
		total += len(k) + len(v)
	}
	if total > limit {
		return invalid(field, "%d bytes together, limit %d", total, limit)
	}
	return nil
}

func checkDNS(field string, d *runtime.DNSConfig) error {
	for _, l := range []struct {
		name   string
		values []string
	}{{".servers", d.GetServers()}, {".searches", d.GetSearches()}, {".options", d.GetOptions()}} {
		if err := checkCount(field+l.name, len(l.values), maxDNS); err != nil {
			return err
		}
		for i, v := range l.values {
			if v == "" || strings.ContainsAny(v, " \t") {
				return invalid(at(field+l.name, i), "%q: want one word", clip(v, maxName))
			}
			if err := checkText(at(field+l.name, i), v, maxName+3); err != nil {
				return err
			}
		}
	}
	return nil
}

func checkPorts(field string, ports []*runtime.PortMapping) error {
	if err := checkCount(field, len(ports), maxPort); err != nil {
		return err
	}
	for i, p := range ports {
		f := at(field, i)
		if err := first(
			func() error { return checkRange(f+".container_port", int64(p.GetContainerPort()), 0, maxPort) },
			func() error { return checkRange(f+".host_port", int64(p.GetHostPort()), 0, maxPort) },
			func() error { return checkEnum(f+".protocol", int32(p.GetProtocol()), runtime.Protocol_name) },
		); err != nil {
			return err
		}
		if p.GetHostPort() > 0 && p.GetContainerPort() == 0 {
			return invalid(f+".container_port", "required with host_port %d", p.GetHostPort())
		}
		if ip := p.GetHostIp(); ip != "" {
			if _, err := netip.ParseAddr(ip); err != nil {
				return invalid(f+".host_ip", "%q is not an IP address", clip(ip, maxName))
			}
		}
	}
	return nil
}

func checkMounts(field string, mounts []*runtime.Mount) error {
	if err := checkCount(field, len(mounts), maxList); err != nil {
		return err
	}
	for i, m := range mounts {
		if err := checkMount(at(field, i), m); err != nil {
			return err
		}
	}
	return nil
}

func checkMount(f string, m *runtime.Mount) error {
	image := m.GetImage().GetImage()
	if m.GetHostPath() != "" && image != "" {
		return invalid(f+".host_path", "%q together with image %q, want one of them", clip(m.GetHostPath(), maxFileName), clip(image, maxFileName))
	}
	if image == "" {
		if err := checkPath(f+".host_path", m.GetHostPath()); err != nil {
			return err
		}
	}
	if m.GetRecursiveReadOnly() {
		if !m.GetReadonly() {
			return invalid(f+".recursive_read_only", "needs readonly")
		}
		if p := m.GetPropagation(); p != runtime.MountPropagation_PROPAGATION_PRIVATE {
			return invalid(f+".recursive_read_only", "needs propagation PROPAGATION_PRIVATE, not %s", p)
		}
	}
	return first(
		func() error { return checkPath(f+".container_path", m.GetContainerPath()) },
		func() error {
			return checkEnum(f+".propagation", int32(m.GetPropagation()), runtime.MountPropagation_name)
		},
		func() error { return checkText(f+".image.image", image, maxReference) },
		func() error { return checkLogPath(f+".image_sub_path", m.GetImageSubPath()) },
		func() error { return checkCount(f+".uidMappings", len(m.GetUidMappings()), maxList) },
		func() error { return checkCount(f+".gidMappings", len(m.GetGidMappings()), maxList) },
		func() error { return checkCount(f+".mount_options", len(m.GetMountOptions()), maxList) },
	)
}

func checkDevices(field string, devices []*runtime.Device) error {
	if err := checkCount(field, len(devices), maxList); err != nil {
		return err
	}
	for i, d := range devices {
		f := at(field, i)
		if err := checkPath(f+".container_path", d.GetContainerPath()); err != nil {
			return err
		}
		if err := checkPath(f+".host_path", d.GetHostPath()); err != nil {
			return err
		}
		if p := d.GetPermissions(); strings.Trim(p, "rwm") != "" || len(p) > 3 {
			return invalid(f+".permissions", "%q, want letters of \"rwm\"", clip(p, maxName))
		}
	}
	return nil
}

// checkIDs checks the users and groups of a security context. A group without
// a user must be refused, says the interface.
func checkIDs(field string, user *runtime.Int64Value, name string, group *runtime.Int64Value, groups []int64) error {
	if user != nil && name != "" {
		return invalid(field+".run_as_username", "%q together with run_as_user %d, want one of them", clip(name, maxName), user.GetValue())
	}
	if group != nil && user == nil && name == "" {
		return invalid(field+".run_as_group", "%d without run_as_user", group.GetValue())
	}
	if err := checkCount(field+".supplemental_groups", len(groups), 65536); err != nil {
		return err
	}
	for i, g := range groups {
		if err := checkRange(at(field+".supplemental_groups", i), g, 0, maxID); err != nil {
			return err
		}
	}
	return first(
		func() error { return checkRange(field+".run_as_user", user.GetValue(), 0, maxID) },
		func() error { return checkRange(field+".run_as_group", group.GetValue(), 0, maxID) },
		func() error { return checkText(field+".run_as_username", name, maxName) },
	)
}

// unifiedKey is the name of a file in a cgroup v2 directory, such as
// "memory.max". Anything with a slash would name another directory.
var unifiedKey = regexp.MustCompile(`^[a-zA-Z0-9_]+(\.[a-zA-Z0-9_-]+)+$`)

// cpuList is the kernel's list format: "0-3,8".
var cpuList = regexp.MustCompile(`^[0-9]{1,5}(-[0-9]{1,5})?(,[0-9]{1,5}(-[0-9]{1,5})?)*$`)

func checkCPUList(field, s string) error {
	if err := checkText(field, s, maxPath); err != nil {
		return err
	}
	if s != "" && !cpuList.MatchString(s) {
		return invalid(field, "%q, want numbers and ranges such as \"0-3,8\"", clip(s, maxName))
	}
	return nil
}

func checkResources(field string, r *runtime.LinuxContainerResources) error {
	if r == nil {
		return nil
	}
	if p := r.GetCpuPeriod(); p != 0 {
		if err := checkRange(field+".cpu_period", p, minCPUPeriod, maxCPUPeriod); err != nil {
			return err
		}
	}
	if err := checkMap(field+".unified", r.GetUnified(), maxLabels); err != nil {
		return err
	}
	for k := range r.GetUnified() {
		if len(k) > maxUnifiedKey || !unifiedKey.MatchString(k) {
			return invalid(field+".unified", "%q is not the name of a cgroup file", clip(k, maxUnifiedKey))
		}
	}
	const max = 1<<63 - 1
	return first(
		// -1 is "no limit" in these.
		func() error { return checkRange(field+".cpu_quota", r.GetCpuQuota(), -1, max) },
		func() error { return checkRange(field+".memory_limit_in_bytes", r.GetMemoryLimitInBytes(), -1, max) },
		func() error {
			return checkRange(field+".memory_swap_limit_in_bytes", r.GetMemorySwapLimitInBytes(), -1, max)
		},
		func() error { return checkRange(field+".cpu_shares", r.GetCpuShares(), 0, max) },
		func() error { return checkRange(field+".oom_score_adj", r.GetOomScoreAdj(), -maxOOMScore, maxOOMScore) },
		func() error { return checkCPUList(field+".cpuset_cpus", r.GetCpusetCpus()) },
		func() error { return checkCPUList(field+".cpuset_mems", r.GetCpusetMems()) },
		func() error { return checkCount(field+".hugepage_limits", len(r.GetHugepageLimits()), maxList) },
	)
}

func checkRange(field string, v, low, high int64) error {
	if v < low || v > high {
		return invalid(field, "%d, want %d to %d", v, low, high)
	}
	return nil
}

func checkCount(field string, n, limit int) error {
	if n > limit {
		return invalid(field, "%d entries, limit %d", n, limit)
	}
	return nil
}

// checkEnum refuses a number that the interface has no name for.
func checkEnum(field string, v int32, names map[int32]string) error {
	if _, ok := names[v]; !ok {
		return invalid(field, "unknown value %d", v)
	}
	return nil
}

// checkAbsent refuses a feature that berth does not have, instead of leaving
// it out silently.
func checkAbsent(field string, present bool) error {
	if present {
		return invalid(field, "not supported by berth")
	}
	return nil
}

// at is the name of the i-th entry of a list.
func at(field string, i int) string { return field + "[" + strconv.Itoa(i) + "]" }
