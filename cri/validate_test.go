package cri

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"unicode/utf8"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berthd/berth/imageservice"
	"github.com/berthd/berth/sandbox"
)

func podConfig() *runtime.PodSandboxConfig {
	return &runtime.PodSandboxConfig{
		Metadata:     &runtime.PodSandboxMetadata{Name: "web", Namespace: "ns", Uid: "uid-1"},
		Hostname:     "web",
		LogDirectory: "/var/log/pods/ns_web_uid-1",
		Linux:        &runtime.LinuxPodSandboxConfig{CgroupParent: "kubepods-poduid.slice"},
	}
}

func createRequest(podID string) *runtime.CreateContainerRequest {
	return &runtime.CreateContainerRequest{
		PodSandboxId:  podID,
		SandboxConfig: podConfig(),
		Config: &runtime.ContainerConfig{
			Metadata: &runtime.ContainerMetadata{Name: "c"},
			Image:    &runtime.ImageSpec{Image: "example.org/a:1"},
			LogPath:  "c/0.log",
			Linux:    &runtime.LinuxContainerConfig{Resources: &runtime.LinuxContainerResources{}, SecurityContext: &runtime.LinuxContainerSecurityContext{}},
		},
	}
}

// checkCase wants nil, or InvalidArgument with the field's name in its text.
func checkCase(t *testing.T, err error, field string) {
	t.Helper()
	switch {
	case field == "" && err != nil:
		t.Errorf("got %v, want no error", err)
	case field != "" && (!errors.Is(err, errInvalid) || !strings.Contains(err.Error(), ": "+field+": ") && !strings.Contains(err.Error(), ": "+field+" key: ")):
		t.Errorf("got %v, want an error that names %s", err, field)
	}
}

func TestCheckRunPod(t *testing.T) {
	long := strings.Repeat("x", 2<<20)
	for name, tc := range map[string]struct {
		edit  func(*runtime.PodSandboxConfig)
		field string
	}{
		"valid":             {func(*runtime.PodSandboxConfig) {}, ""},
		"no hostname":       {func(c *runtime.PodSandboxConfig) { c.Hostname = "" }, ""},
		"no log directory":  {func(c *runtime.PodSandboxConfig) { c.LogDirectory = "" }, ""},
		"no linux":          {func(c *runtime.PodSandboxConfig) { c.Linux = nil }, ""},
		"no metadata":       {func(c *runtime.PodSandboxConfig) { c.Metadata = nil }, "config.metadata"},
		"no name":           {func(c *runtime.PodSandboxConfig) { c.Metadata.Name = "" }, "config.metadata.name"},
		"no namespace":      {func(c *runtime.PodSandboxConfig) { c.Metadata.Namespace = "" }, "config.metadata.namespace"},
		"no uid":            {func(c *runtime.PodSandboxConfig) { c.Metadata.Uid = "" }, "config.metadata.uid"},
		"name with slash":   {func(c *runtime.PodSandboxConfig) { c.Metadata.Name = "../x" }, "config.metadata.name"},
		"name too long":     {func(c *runtime.PodSandboxConfig) { c.Metadata.Name = long }, "config.metadata.name"},
		"name with newline": {func(c *runtime.PodSandboxConfig) { c.Metadata.Name = "a\nb" }, "config.metadata.name"},
		"hostname of 64":    {func(c *runtime.PodSandboxConfig) { c.Hostname = strings.Repeat("h", 64) }, ""},
		"hostname of 65":    {func(c *runtime.PodSandboxConfig) { c.Hostname = strings.Repeat("h", 65) }, "config.hostname"},
		"hostname injects":  {func(c *runtime.PodSandboxConfig) { c.Hostname = "a\n127.0.0.1 b" }, "config.hostname"},
		"relative log dir":  {func(c *runtime.PodSandboxConfig) { c.LogDirectory = "logs" }, "config.log_directory"},
		"log dir with dots": {func(c *runtime.PodSandboxConfig) { c.LogDirectory = "/var/log/../etc" }, "config.log_directory"},
		"dns": {func(c *runtime.PodSandboxConfig) {
			c.DnsConfig = &runtime.DNSConfig{Servers: []string{"10.0.0.10", "fd00::a"}, Searches: []string{"svc.cluster.local"}, Options: []string{"ndots:5"}}
		}, ""},
		"dns injects": {func(c *runtime.PodSandboxConfig) {
			c.DnsConfig = &runtime.DNSConfig{Servers: []string{"10.0.0.10", "1.1.1.1\noptions x"}}
		}, "config.dns_config.servers[1]"},
		"port": {func(c *runtime.PodSandboxConfig) {
			c.PortMappings = []*runtime.PortMapping{{ContainerPort: 80, HostPort: 8080, HostIp: "::1"}, {ContainerPort: 53, Protocol: runtime.Protocol_UDP}}
		}, ""},
		"port too large": {func(c *runtime.PodSandboxConfig) {
			c.PortMappings = []*runtime.PortMapping{{ContainerPort: 80, HostPort: 65536}}
		}, "config.port_mappings[0].host_port"},
		"port negative": {func(c *runtime.PodSandboxConfig) {
			c.PortMappings = []*runtime.PortMapping{{ContainerPort: -1}}
		}, "config.port_mappings[0].container_port"},
		"host port alone": {func(c *runtime.PodSandboxConfig) {
			c.PortMappings = []*runtime.PortMapping{{HostPort: 80}}
		}, "config.port_mappings[0].container_port"},
		"port protocol": {func(c *runtime.PodSandboxConfig) {
			c.PortMappings = []*runtime.PortMapping{{ContainerPort: 80, Protocol: 9}}
		}, "config.port_mappings[0].protocol"},
		"port host ip": {func(c *runtime.PodSandboxConfig) {
			c.PortMappings = []*runtime.PortMapping{{ContainerPort: 80, HostIp: "localhost"}}
		}, "config.port_mappings[0].host_ip"},
		"labels too large":      {func(c *runtime.PodSandboxConfig) { c.Labels = map[string]string{"k": long} }, "config.labels"},
		"label key too long":    {func(c *runtime.PodSandboxConfig) { c.Labels = map[string]string{long: "v"} }, "config.labels"},
		"annotations":           {func(c *runtime.PodSandboxConfig) { c.Annotations = map[string]string{"k": long[:1<<19]} }, ""},
		"annotations too large": {func(c *runtime.PodSandboxConfig) { c.Annotations = map[string]string{"k": long} }, "config.annotations"},
		"group without user": {func(c *runtime.PodSandboxConfig) {
			c.Linux.SecurityContext = &runtime.LinuxSandboxSecurityContext{RunAsGroup: &runtime.Int64Value{Value: 1}}
		}, "config.linux.security_context.run_as_group"},
		"windows": {func(c *runtime.PodSandboxConfig) { c.Windows = &runtime.WindowsPodSandboxConfig{} }, "config.windows"},
	} {
		t.Run(name, func(t *testing.T) {
			c := podConfig()
			tc.edit(c)
			checkCase(t, checkRunPod(&runtime.RunPodSandboxRequest{Config: c}), tc.field)
		})
	}
	checkCase(t, checkRunPod(&runtime.RunPodSandboxRequest{}), "config")
	checkCase(t, checkRunPod(&runtime.RunPodSandboxRequest{Config: podConfig(), RuntimeHandler: long}), "runtime_handler")
}

func TestCheckCreateContainer(t *testing.T) {
	long := strings.Repeat("x", 3<<20)
	mount := func(m *runtime.Mount) func(*runtime.ContainerConfig) {
		return func(c *runtime.ContainerConfig) {
			c.Mounts = []*runtime.Mount{{HostPath: "/a", ContainerPath: "/b"}, m}
		}
	}
	env := func(k, v string) func(*runtime.ContainerConfig) {
		return func(c *runtime.ContainerConfig) { c.Envs = []*runtime.KeyValue{{Key: k, Value: []byte(v)}} }
	}
	user := func(edit func(*runtime.LinuxContainerSecurityContext)) func(*runtime.ContainerConfig) {
		return func(c *runtime.ContainerConfig) { edit(c.Linux.SecurityContext) }
	}
	res := func(edit func(*runtime.LinuxContainerResources)) func(*runtime.ContainerConfig) {
		return func(c *runtime.ContainerConfig) { edit(c.Linux.Resources) }
	}
	id := func(v int64) *runtime.Int64Value { return &runtime.Int64Value{Value: v} }
	for name, tc := range map[string]struct {
		edit  func(*runtime.ContainerConfig)
		field string
	}{
		"valid":               {func(*runtime.ContainerConfig) {}, ""},
		"no linux":            {func(c *runtime.ContainerConfig) { c.Linux = nil }, ""},
		"no metadata":         {func(c *runtime.ContainerConfig) { c.Metadata = nil }, "config.metadata"},
		"no name":             {func(c *runtime.ContainerConfig) { c.Metadata.Name = "" }, "config.metadata.name"},
		"no image":            {func(c *runtime.ContainerConfig) { c.Image = nil }, "config.image.image"},
		"image too long":      {func(c *runtime.ContainerConfig) { c.Image.Image = long }, "config.image.image"},
		"no log":              {func(c *runtime.ContainerConfig) { c.LogPath = "" }, ""},
		"log absolute":        {func(c *runtime.ContainerConfig) { c.LogPath = "/etc/passwd" }, "config.log_path"},
		"log with dots":       {func(c *runtime.ContainerConfig) { c.LogPath = "a/../../b" }, "config.log_path"},
		"log with dot name":   {func(c *runtime.ContainerConfig) { c.LogPath = "a/..b.log" }, ""},
		"log is a directory":  {func(c *runtime.ContainerConfig) { c.LogPath = "a/" }, "config.log_path"},
		"log name too long":   {func(c *runtime.ContainerConfig) { c.LogPath = "a/" + long[:256] }, "config.log_path"},
		"working dir":         {func(c *runtime.ContainerConfig) { c.WorkingDir = "/srv" }, ""},
		"working dir bad":     {func(c *runtime.ContainerConfig) { c.WorkingDir = "srv" }, "config.working_dir"},
		"arg too long":        {func(c *runtime.ContainerConfig) { c.Args = []string{"a", long[:1<<17]} }, "config.args[1]"},
		"arg with NUL":        {func(c *runtime.ContainerConfig) { c.Command = []string{"a\x00b"} }, "config.command[0]"},
		"env":                 {env("PATH", "/bin\nmore"), ""},
		"env no key":          {env("", "x"), "config.envs[0].key"},
		"env key with =":      {env("A=B", "x"), "config.envs[0].key"},
		"env value with NUL":  {env("A", "x\x00"), "config.envs[0].value"},
		"env too long":        {env("A", long[:1<<17]), "config.envs[0]"},
		"mount":               {mount(&runtime.Mount{HostPath: "/x", ContainerPath: "/y", Readonly: true, RecursiveReadOnly: true}), ""},
		"mount no host":       {mount(&runtime.Mount{ContainerPath: "/y"}), "config.mounts[1].host_path"},
		"mount no container":  {mount(&runtime.Mount{HostPath: "/y"}), "config.mounts[1].container_path"},
		"mount relative":      {mount(&runtime.Mount{HostPath: "y", ContainerPath: "/y"}), "config.mounts[1].host_path"},
		"mount propagation":   {mount(&runtime.Mount{HostPath: "/y", ContainerPath: "/y", Propagation: 7}), "config.mounts[1].propagation"},
		"mount rro, writable": {mount(&runtime.Mount{HostPath: "/y", ContainerPath: "/y", RecursiveReadOnly: true}), "config.mounts[1].recursive_read_only"},
		"mount rro, shared": {mount(&runtime.Mount{HostPath: "/y", ContainerPath: "/y", Readonly: true, RecursiveReadOnly: true,
			Propagation: runtime.MountPropagation_PROPAGATION_BIDIRECTIONAL}), "config.mounts[1].recursive_read_only"},
		"mount two sources": {mount(&runtime.Mount{HostPath: "/y", ContainerPath: "/y", Image: &runtime.ImageSpec{Image: "a"}}), "config.mounts[1].host_path"},
		"mount sub path":    {mount(&runtime.Mount{ContainerPath: "/y", Image: &runtime.ImageSpec{Image: "a"}, ImageSubPath: "../x"}), "config.mounts[1].image_sub_path"},
		"device": {func(c *runtime.ContainerConfig) {
			c.Devices = []*runtime.Device{{HostPath: "/dev/a", ContainerPath: "/dev/b", Permissions: "rw"}}
		}, ""},
		"device permissions": {func(c *runtime.ContainerConfig) {
			c.Devices = []*runtime.Device{{HostPath: "/dev/a", ContainerPath: "/dev/b", Permissions: "rx"}}
		}, "config.devices[0].permissions"},
		"stop signal":     {func(c *runtime.ContainerConfig) { c.StopSignal = 99 }, "config.stop_signal"},
		"cdi":             {func(c *runtime.ContainerConfig) { c.CDIDevices = make([]*runtime.CDIDevice, 4097) }, "config.CDI_devices"},
		"user":            {user(func(s *runtime.LinuxContainerSecurityContext) { s.RunAsUser, s.RunAsGroup = id(1), id(4294967294) }), ""},
		"user negative":   {user(func(s *runtime.LinuxContainerSecurityContext) { s.RunAsUser = id(-1) }), "config.linux.security_context.run_as_user"},
		"user 2^32-1":     {user(func(s *runtime.LinuxContainerSecurityContext) { s.RunAsUser = id(1<<32 - 1) }), "config.linux.security_context.run_as_user"},
		"group alone":     {user(func(s *runtime.LinuxContainerSecurityContext) { s.RunAsGroup = id(1) }), "config.linux.security_context.run_as_group"},
		"group and name":  {user(func(s *runtime.LinuxContainerSecurityContext) { s.RunAsUsername, s.RunAsGroup = "www", id(1) }), ""},
		"user twice":      {user(func(s *runtime.LinuxContainerSecurityContext) { s.RunAsUsername, s.RunAsUser = "www", id(1) }), "config.linux.security_context.run_as_username"},
		"groups":          {user(func(s *runtime.LinuxContainerSecurityContext) { s.SupplementalGroups = []int64{1, -2} }), "config.linux.security_context.supplemental_groups[1]"},
		"resources":       {res(func(r *runtime.LinuxContainerResources) { r.CpuPeriod, r.CpuQuota, r.OomScoreAdj = 100000, -1, 1000 }), ""},
		"cpu period":      {res(func(r *runtime.LinuxContainerResources) { r.CpuPeriod = 999 }), "config.linux.resources.cpu_period"},
		"cpu quota":       {res(func(r *runtime.LinuxContainerResources) { r.CpuQuota = -2 }), "config.linux.resources.cpu_quota"},
		"memory":          {res(func(r *runtime.LinuxContainerResources) { r.MemoryLimitInBytes = -7 }), "config.linux.resources.memory_limit_in_bytes"},
		"oom score":       {res(func(r *runtime.LinuxContainerResources) { r.OomScoreAdj = 1001 }), "config.linux.resources.oom_score_adj"},
		"cpuset":          {res(func(r *runtime.LinuxContainerResources) { r.CpusetCpus, r.CpusetMems = "0-3,8", "0" }), ""},
		"cpuset bad":      {res(func(r *runtime.LinuxContainerResources) { r.CpusetCpus = "0-x" }), "config.linux.resources.cpuset_cpus"},
		"unified":         {res(func(r *runtime.LinuxContainerResources) { r.Unified = map[string]string{"memory.swap.max": "0"} }), ""},
		"unified escapes": {res(func(r *runtime.LinuxContainerResources) { r.Unified = map[string]string{"../x.y": "0"} }), "config.linux.resources.unified"},
	} {
		t.Run(name, func(t *testing.T) {
			r := createRequest("pod")
			tc.edit(r.Config)
			checkCase(t, checkCreateContainer(r), tc.field)
		})
	}
	for name, tc := range map[string]struct {
		edit  func(*runtime.CreateContainerRequest)
		field string
	}{
		"no pod":            {func(r *runtime.CreateContainerRequest) { r.PodSandboxId = "" }, "pod_sandbox_id"},
		"no config":         {func(r *runtime.CreateContainerRequest) { r.Config = nil }, "config"},
		"no sandbox config": {func(r *runtime.CreateContainerRequest) { r.SandboxConfig = nil }, ""},
	} {
		t.Run(name, func(t *testing.T) {
			r := createRequest("pod")
			tc.edit(r)
			checkCase(t, checkCreateContainer(r), tc.field)
		})
	}
}

func TestCheckOthers(t *testing.T) {
	exec := func(r *runtime.ExecSyncRequest) error { _, err := checkExecSync(r); return err }
	for name, tc := range map[string]struct {
		err   error
		field string
	}{
		"exec":             {exec(&runtime.ExecSyncRequest{ContainerId: "a", Cmd: []string{"x"}, Timeout: 3}), ""},
		"exec no id":       {exec(&runtime.ExecSyncRequest{Cmd: []string{"x"}}), "container_id"},
		"exec no command":  {exec(&runtime.ExecSyncRequest{ContainerId: "a"}), "cmd"},
		"exec timeout":     {exec(&runtime.ExecSyncRequest{ContainerId: "a", Cmd: []string{"x"}, Timeout: -3}), "timeout"},
		"update":           {checkUpdateResources(&runtime.UpdateContainerResourcesRequest{ContainerId: "a", Linux: &runtime.LinuxContainerResources{}}), ""},
		"update nothing":   {checkUpdateResources(&runtime.UpdateContainerResourcesRequest{ContainerId: "a"}), "linux"},
		"cidr":             {checkPodCIDR("10.0.0.0/24,fd00::/64"), ""},
		"cidr none":        {checkPodCIDR(""), ""},
		"cidr bad":         {checkPodCIDR("10.0.0.0"), "runtime_config.network_config.pod_cidr"},
		"auth":             {checkAuth(nil), ""},
		"auth encoded":     {checkAuth(&runtime.AuthConfig{Auth: "dTpw"}), ""},
		"auth of no form":  {checkAuth(&runtime.AuthConfig{Auth: "%%%"}), "auth.auth"},
		"auth without :":   {checkAuth(&runtime.AuthConfig{Auth: "dQ=="}), "auth.auth"},
		"auth not used":    {checkAuth(&runtime.AuthConfig{Auth: "%%%", Username: "u"}), ""},
		"auth too long":    {checkAuth(&runtime.AuthConfig{Password: strings.Repeat("p", 1<<17)}), "auth.password"},
		"id too long":      {checkID("container_id", strings.Repeat("a", 257)), "container_id"},
		"id with newline":  {checkID("container_id", "a\nb"), "container_id"},
		"id of any letter": {checkID("container_id", "nginx-1"), ""},
	} {
		t.Run(name, func(t *testing.T) { checkCase(t, tc.err, tc.field) })
	}
	if err := checkAuth(&runtime.AuthConfig{Auth: strings.Repeat("s3cret", 1<<14)}); strings.Contains(err.Error(), "s3cret") {
		t.Errorf("a secret in %v", err)
	}
}

func TestErrorTable(t *testing.T) {
	own := status.Error(codes.Aborted, "x")
	for _, tc := range []struct {
		err  error
		want codes.Code
	}{
		{nil, codes.OK},
		{invalid("a.b", "%d, limit %d", 2, 1), codes.InvalidArgument},
		{sandbox.ErrInvalid, codes.InvalidArgument},
		{sandbox.ErrAmbiguous, codes.InvalidArgument},
		{sandbox.ErrUnknownHandler, codes.InvalidArgument},
		{sandbox.ErrNotFound, codes.NotFound},
		{sandbox.ErrState, codes.FailedPrecondition},
		{sandbox.ErrBusy, codes.DeadlineExceeded},
		{sandbox.ErrTimeout, codes.DeadlineExceeded},
		{sandbox.ErrStuck, codes.Unavailable},
		{sandbox.ErrRuntime, codes.Unavailable},
		{imageservice.ErrNotFound, codes.NotFound},
		{imageservice.ErrInvalidReference, codes.InvalidArgument},
		{imageservice.ErrUnauthorized, codes.Unauthenticated},
		{imageservice.ErrRegistryUnavailable, codes.Unknown},
		{imageservice.ErrDigestMismatch, codes.DataLoss},
		{imageservice.ErrPolicyRejected, codes.Unknown},
		{imageservice.ErrUnsupported, codes.FailedPrecondition},
		{imageservice.ErrInvalidImage, codes.FailedPrecondition},
		{imageservice.ErrTooLarge, codes.ResourceExhausted},
		{imageservice.ErrClosed, codes.Unavailable},
		{context.Canceled, codes.Canceled},
		{context.DeadlineExceeded, codes.DeadlineExceeded},
		{errors.Join(errors.New("a"), sandbox.ErrState), codes.FailedPrecondition},
		{errors.New("disk on fire"), codes.Unknown},
		{own, codes.Aborted},
	} {
		err := tc.err
		if err != nil && err != own {
			err = fmt.Errorf("pod x: %w", err)
		}
		got := toStatus(err)
		if status.Code(got) != tc.want {
			t.Errorf("%v: %v, want %v", tc.err, status.Code(got), tc.want)
		}
		if err != nil && err != own && !strings.Contains(status.Convert(got).Message(), "pod x") {
			t.Errorf("%v lost its text: %v", err, got)
		}
	}
	huge := toStatus(errors.New(strings.Repeat("ä", 1<<20) + "\xff"))
	if m := status.Convert(huge).Message(); len(m) > maxErrorText || !utf8.ValidString(m) {
		t.Errorf("%d bytes, valid UTF-8: %v", len(m), utf8.ValidString(m))
	}
}

func TestImageUser(t *testing.T) {
	for user, want := range map[string]struct {
		uid  int64
		name string
	}{
		"":                     {-1, ""},
		"0":                    {0, ""},
		"1000":                 {1000, ""},
		"1000:1000":            {1000, ""},
		"www-data":             {-1, "www-data"},
		"www-data:www":         {-1, "www-data"},
		":5":                   {-1, ""},
		"4294967294":           {4294967294, ""},
		"4294967295":           {-1, "4294967295"},
		"4294967296":           {-1, "4294967296"},
		"1e30":                 {-1, "1e30"},
		"+0":                   {-1, "+0"},
		"-1":                   {-1, "-1"},
		"0x0":                  {-1, "0x0"},
		"18446744073709551616": {-1, "18446744073709551616"},
	} {
		uid, name := imageUser(user)
		got := int64(-1)
		if uid != nil {
			got = uid.GetValue()
		}
		if got != want.uid || name != want.name {
			t.Errorf("%q: %d, %q, want %d, %q", user, got, name, want.uid, want.name)
		}
	}
}

// Whatever a client sends, the checks answer with nil or an error of theirs
// that can be sent, and do not panic.
func FuzzCheckFields(f *testing.F) {
	f.Add("web", "c/0.log", "10.0.0.0/24", "1000:5", int64(3))
	f.Add("\x00", "a/../..", ",", "+0", int64(-1))
	f.Fuzz(func(t *testing.T, text, logPath, cidr, user string, n int64) {
		_, secErr := seconds("timeout", n)
		for _, err := range []error{
			checkID("id", text), checkName("name", text), checkHostname("h", text), checkPath("p", text),
			checkLogPath("l", logPath), checkLogDirectory("d", logPath), checkPodCIDR(cidr), secErr,
			checkArgs("a", []string{text, logPath}), checkMap("m", map[string]string{text: cidr}, 100),
		} {
			if err == nil {
				continue
			}
			if !errors.Is(err, errInvalid) {
				t.Errorf("%v is not errInvalid", err)
			}
			if m := status.Convert(toStatus(err)).Message(); !utf8.ValidString(m) || len(m) > maxErrorText {
				t.Errorf("%q cannot be sent", m)
			}
		}
		if checkLogPath("l", logPath) == nil && (strings.HasPrefix(logPath, "/") || strings.Contains("/"+logPath+"/", "/../")) {
			t.Errorf("log path %q leaves its directory", logPath)
		}
		if uid, name := imageUser(user); uid != nil && name != "" {
			t.Errorf("user %q is both %d and %q", user, uid.GetValue(), name)
		}
	})
}
