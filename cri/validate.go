package cri

import (
	"bytes"
	"encoding/base64"
	"net/netip"
	"path"
	"strings"
	"time"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Limits of what a request may hold. They are far above what the kubelet
// sends and exist so that nothing behind this package meets a value without a
// bound. What needs the node or the image to be judged (users, seccomp
// profiles, sysctls, devices that exist) is judged behind it.
const (
	maxIDText     = 256              // an object ID as a client writes it
	maxName       = 253              // metadata: a DNS subdomain, as in Kubernetes
	maxHostname   = 64               // HOST_NAME_MAX of Linux
	maxPath       = 4095             // PATH_MAX less its NUL
	maxFileName   = 255              // NAME_MAX
	maxReference  = 1024             // an image reference
	maxArg        = 128<<10 - 1      // MAX_ARG_STRLEN of execve less its NUL
	maxArgs       = 2 << 20          // all arguments and variables together
	maxLabelKey   = 1024             // a label or annotation key
	maxLabels     = 256 << 10        // all labels of an object together
	maxNotes      = 1 << 20          // all annotations of an object together
	maxList       = 4096             // mounts, devices, port mappings, groups
	maxDNS        = 256              // servers, searches and options, each
	maxSecret     = 64 << 10         // one field of an AuthConfig
	maxCIDR       = 256              // a pod range, or two with a comma between
	maxID         = int64(1<<32 - 2) // user and group IDs; 2^32-1 means "none" to Linux
	maxPort       = 65535
	minCPUPeriod  = 1000 // microseconds, as in the kernel
	maxCPUPeriod  = 1000000
	maxOOMScore   = 1000
	maxUnifiedKey = 128
)

func checkRunPod(r *runtime.RunPodSandboxRequest) error {
	if len(r.GetRuntimeHandler()) > maxName {
		return invalid("runtime_handler", "%d bytes, limit %d", len(r.GetRuntimeHandler()), maxName)
	}
	return checkPodConfig("config", r.GetConfig())
}

func checkCreateContainer(r *runtime.CreateContainerRequest) error {
	return first(
		func() error { return checkID("pod_sandbox_id", r.GetPodSandboxId()) },
		func() error {
			// The pod's own is on record; this one comes "for easy reference".
			if r.GetSandboxConfig() == nil {
				return nil
			}
			return checkPodConfig("sandbox_config", r.GetSandboxConfig())
		},
		func() error { return checkContainerConfig("config", r.GetConfig()) },
	)
}

func checkUpdateResources(r *runtime.UpdateContainerResourcesRequest) error {
	if err := checkID("container_id", r.GetContainerId()); err != nil {
		return err
	}
	if r.GetLinux() == nil {
		return invalid("linux", "required")
	}
	if err := checkResources("linux", r.GetLinux()); err != nil {
		return err
	}
	return checkMap("annotations", r.GetAnnotations(), maxNotes)
}

func checkExecSync(r *runtime.ExecSyncRequest) (time.Duration, error) {
	if err := checkID("container_id", r.GetContainerId()); err != nil {
		return 0, err
	}
	if err := checkCommand(r.GetCmd()); err != nil {
		return 0, err
	}
	return seconds("timeout", r.GetTimeout())
}

func checkCommand(cmd []string) error {
	if len(cmd) == 0 {
		return invalid("cmd", "required")
	}
	return checkArgs("cmd", cmd)
}

// checkPodConfig checks what RunPodSandbox is given, and CreateContainer
// again.
func checkPodConfig(field string, c *runtime.PodSandboxConfig) error {
	if c == nil {
		return invalid(field, "required")
	}
	m := c.GetMetadata()
	if m == nil {
		return invalid(field+".metadata", "required")
	}
	return first(
		func() error { return checkName(field+".metadata.name", m.GetName()) },
		func() error { return checkName(field+".metadata.namespace", m.GetNamespace()) },
		func() error { return checkName(field+".metadata.uid", m.GetUid()) },
		func() error { return checkHostname(field+".hostname", c.GetHostname()) },
		func() error { return checkLogDirectory(field+".log_directory", c.GetLogDirectory()) },
		func() error { return checkDNS(field+".dns_config", c.GetDnsConfig()) },
		func() error { return checkPorts(field+".port_mappings", c.GetPortMappings()) },
		func() error { return checkMap(field+".labels", c.GetLabels(), maxLabels) },
		func() error { return checkMap(field+".annotations", c.GetAnnotations(), maxNotes) },
		func() error { return checkPodLinux(field+".linux", c.GetLinux()) },
		func() error { return checkAbsent(field+".windows", c.GetWindows() != nil) },
	)
}

func checkPodLinux(field string, c *runtime.LinuxPodSandboxConfig) error {
	sec := c.GetSecurityContext()
	return first(
		// Not a path with the systemd driver: "kubepods-pod1.slice".
		func() error { return checkText(field+".cgroup_parent", c.GetCgroupParent(), maxPath) },
		func() error { return checkMap(field+".sysctls", c.GetSysctls(), maxLabels) },
		func() error { return checkResources(field+".overhead", c.GetOverhead()) },
		func() error { return checkResources(field+".resources", c.GetResources()) },
		func() error {
			return checkIDs(field+".security_context", sec.GetRunAsUser(), "", sec.GetRunAsGroup(), sec.GetSupplementalGroups())
		},
	)
}

// checkContainerConfig checks what CreateContainer is given.
func checkContainerConfig(field string, c *runtime.ContainerConfig) error {
	if c == nil {
		return invalid(field, "required")
	}
	if c.GetMetadata() == nil {
		return invalid(field+".metadata", "required")
	}
	return first(
		func() error { return checkName(field+".metadata.name", c.GetMetadata().GetName()) },
		func() error { return checkReference(field+".image.image", c.GetImage().GetImage()) },
		func() error { return checkArgs(field+".command", c.GetCommand()) },
		func() error { return checkArgs(field+".args", c.GetArgs()) },
		func() error { return checkOptionalPath(field+".working_dir", c.GetWorkingDir()) },
		func() error { return checkEnvs(field+".envs", c.GetEnvs()) },
		func() error { return checkMounts(field+".mounts", c.GetMounts()) },
		func() error { return checkDevices(field+".devices", c.GetDevices()) },
		func() error { return checkMap(field+".labels", c.GetLabels(), maxLabels) },
		func() error { return checkMap(field+".annotations", c.GetAnnotations(), maxNotes) },
		func() error { return checkLogPath(field+".log_path", c.GetLogPath()) },
		func() error { return checkEnum(field+".stop_signal", int32(c.GetStopSignal()), runtime.Signal_name) },
		func() error { return checkContainerLinux(field+".linux", c.GetLinux()) },
		func() error { return checkAbsent(field+".windows", c.GetWindows() != nil) },
		func() error { return checkCount(field+".CDI_devices", len(c.GetCDIDevices()), maxList) },
	)
}

func checkContainerLinux(field string, c *runtime.LinuxContainerConfig) error {
	sec := c.GetSecurityContext()
	return first(
		func() error { return checkResources(field+".resources", c.GetResources()) },
		func() error {
			return checkIDs(field+".security_context", sec.GetRunAsUser(), sec.GetRunAsUsername(), sec.GetRunAsGroup(), sec.GetSupplementalGroups())
		},
		func() error { return checkPaths(field+".security_context.masked_paths", sec.GetMaskedPaths()) },
		func() error { return checkPaths(field+".security_context.readonly_paths", sec.GetReadonlyPaths()) },
	)
}

// checkImage checks an image a request is about.
func (s *Server) checkImage(spec *runtime.ImageSpec) error {
	if err := checkReference("image.image", spec.GetImage()); err != nil {
		return err
	}
	handler := spec.GetRuntimeHandler()
	if handler == "" {
		return nil
	}
	for _, h := range s.deps.Node.RuntimeHandlers() {
		if h.GetName() == handler {
			return nil
		}
	}
	return invalid("image.runtime_handler", "%q is not configured", clip(handler, maxName))
}

func checkAuth(a *runtime.AuthConfig) error {
	for _, f := range []struct{ name, value string }{
		{"username", a.GetUsername()}, {"password", a.GetPassword()}, {"auth", a.GetAuth()},
		{"server_address", a.GetServerAddress()}, {"identity_token", a.GetIdentityToken()}, {"registry_token", a.GetRegistryToken()},
	} {
		if len(f.value) > maxSecret {
			return invalid("auth."+f.name, "%d bytes, limit %d", len(f.value), maxSecret)
		}
	}
	if a.GetAuth() == "" || a.GetUsername() != "" || a.GetIdentityToken() != "" || a.GetRegistryToken() != "" {
		return nil
	}
	// Docker pads the decoded text with NULs.
	pair, err := base64.StdEncoding.DecodeString(a.GetAuth())
	if err != nil || !bytes.Contains(pair, []byte(":")) {
		return invalid("auth.auth", "want the base64 form of user:password")
	}
	return nil
}

// checkPodCIDR accepts nothing, one range, or several separated by commas.
func checkPodCIDR(s string) error {
	const field = "runtime_config.network_config.pod_cidr"
	if len(s) > maxCIDR {
		return invalid(field, "%d bytes, limit %d", len(s), maxCIDR)
	}
	if s == "" {
		return nil
	}
	for part := range strings.SplitSeq(s, ",") {
		if _, err := netip.ParsePrefix(strings.TrimSpace(part)); err != nil {
			return invalid(field, "%q is not a CIDR range", part)
		}
	}
	return nil
}

// checkLogPath wants a path that stays inside the pod's log directory.
func checkLogPath(field, p string) error {
	if p == "" {
		return nil
	}
	if path.IsAbs(p) {
		return invalid(field, "%q is absolute, want a path relative to log_directory", clip(p, maxFileName))
	}
	for part := range strings.SplitSeq(p, "/") {
		if part == ".." {
			return invalid(field, `%q contains ".."`, clip(p, maxFileName))
		}
		if len(part) > maxFileName {
			return invalid(field, "a file name of %d bytes, limit %d", len(part), maxFileName)
		}
	}
	if strings.HasSuffix(p, "/") || path.Clean(p) == "." {
		return invalid(field, "%q names no file", clip(p, maxFileName))
	}
	return checkText(field, p, maxPath)
}

// checkLogDirectory wants an absolute path without "..".
func checkLogDirectory(field, p string) error {
	if err := checkOptionalPath(field, p); err != nil {
		return err
	}
	for part := range strings.SplitSeq(p, "/") {
		if part == ".." {
			return invalid(field, `%q contains ".."`, clip(p, maxFileName))
		}
	}
	return nil
}
