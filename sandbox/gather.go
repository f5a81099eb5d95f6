package sandbox

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	goruntime "runtime"
	"slices"
	"strconv"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/opencontainers/selinux/go-selinux"
	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berthd/berth/sandbox/cgroup"
	"github.com/berthd/berth/sandbox/spec"
)

// This file has the look-ups on the host that package spec, which is pure, is
// fed with. None of them changes anything but applySysctls.

const (
	maxUserDB   = 4 << 20 // bytes of an image's passwd or group file
	maxProfile  = 1 << 20 // bytes of a seccomp profile
	maxDevices  = 16384   // device nodes of one container
	maxSysctls  = 256     // of one pod
	maxSysctl   = 4096    // bytes of a sysctl's value
	maxMountTab = 64 << 20
)

// gatherMounts resolves the mounts of a container. A host path must exist; its
// symbolic links are followed. Propagation needs a source that takes part in it.
// The source of an image volume is for makeVolumes to fill in.
// What is not supported is refused by the name of its field, never ignored.
func gatherMounts(mounts []*runtime.Mount, ids mountIDs) ([]spec.Mount, error) {
	var out []spec.Mount
	for i, m := range mounts {
		s, err := gatherMount(m, ids)
		if err != nil {
			return nil, fmt.Errorf("mounts[%d] (container_path %.200q): %w", i, m.GetContainerPath(), err)
		}
		out = append(out, s)
	}
	return out, nil
}

func gatherMount(m *runtime.Mount, ids mountIDs) (spec.Mount, error) {
	s := spec.Mount{Destination: m.GetContainerPath(), Readonly: m.GetReadonly(), RecursiveReadonly: m.GetRecursiveReadOnly(), Options: m.GetMountOptions()}
	switch {
	case isVolume(m):
		s.Propagation = "rprivate"
		return s, ids.image(m)
	case m.GetImageSubPath() != "":
		return s, fmt.Errorf("%w: image_sub_path %.200q: only for an image", ErrInvalid, m.GetImageSubPath())
	case !filepath.IsAbs(m.GetHostPath()):
		return s, fmt.Errorf("%w: host_path %.200q: not an absolute path", ErrInvalid, m.GetHostPath())
	}
	var err error
	if err := awaitAnswer(m.HostPath); err != nil {
		return s, fmt.Errorf("host_path %.200q: %w", m.HostPath, err)
	}
	if s.Source, err = filepath.EvalSymlinks(m.HostPath); err != nil {
		return s, fmt.Errorf("%w: host_path %.200q: %w", ErrInvalid, m.HostPath, err)
	}
	if err := ids.gather(m, &s); err != nil {
		return s, err
	}
	switch m.GetPropagation() {
	case runtime.MountPropagation_PROPAGATION_PRIVATE:
		s.Propagation = "rprivate"
		return s, nil
	case runtime.MountPropagation_PROPAGATION_HOST_TO_CONTAINER:
		s.Propagation = "rslave"
	case runtime.MountPropagation_PROPAGATION_BIDIRECTIONAL:
		s.Propagation = "rshared"
	default:
		return s, fmt.Errorf("%w: propagation %d: unknown", ErrInvalid, m.GetPropagation())
	}
	return s, checkPropagation(s.Source, s.Propagation)
}

// checkPropagation makes sure that the mount that source is on is shared, or for
// rslave at least a slave: events of a private one reach nobody, and a container
// that was promised them would wait for ever.
func checkPropagation(source, want string) error {
	shared, slave, point, err := propagationOf(source)
	switch {
	case err != nil:
		return fmt.Errorf("host_path %.200q: %w", source, err)
	case shared || want == "rslave" && slave:
		return nil
	case want == "rslave":
		return fmt.Errorf("%w: host_path %.200q: propagation host-to-container needs a shared or slave mount, %s is private", ErrInvalid, source, point)
	}
	return fmt.Errorf("%w: host_path %.200q: bidirectional propagation needs a shared mount, %s is not", ErrInvalid, source, point)
}

// propagationOf finds the mount that a path is on by the kernel's own ID of it and
// returns what proc_pid_mountinfo(5) says about it.
func propagationOf(name string) (shared, slave bool, point string, err error) {
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, name, unix.AT_STATX_DONT_SYNC|unix.AT_NO_AUTOMOUNT, unix.STATX_MNT_ID, &st); err != nil {
		return false, false, "", err
	}
	if st.Mask&unix.STATX_MNT_ID == 0 {
		return false, false, "", errors.New("mount ID: needs Linux 5.8")
	}
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return false, false, "", err
	}
	defer f.Close()
	s := bufio.NewScanner(io.LimitReader(f, maxMountTab))
	s.Buffer(nil, 1<<20)
	id := strconv.FormatUint(st.Mnt_id, 10)
	for s.Scan() {
		fields := strings.Fields(s.Text())
		if len(fields) < 7 || fields[0] != id {
			continue
		}
		for _, f := range fields[6:] {
			if f == "-" {
				break
			}
			shared = shared || strings.HasPrefix(f, "shared:")
			slave = slave || strings.HasPrefix(f, "master:")
		}
		return shared, slave, fields[4], nil
	}
	return false, false, "", errors.Join(s.Err(), fmt.Errorf("mount %s: not in the mount table", id))
}

// gatherDevices looks up the device nodes of a container: those that it names,
// a directory standing for the nodes in it, and for a privileged one all others
// of the host too.
func gatherDevices(devs []*runtime.Device, privileged bool) ([]spec.Device, error) {
	var out []spec.Device
	for i, d := range devs {
		found, err := gatherDevice(d)
		if err != nil {
			return nil, fmt.Errorf("devices[%d]: %w", i, err)
		}
		out = append(out, found...)
	}
	if privileged {
		all, err := devicesBelow("/dev", "/dev", "rwm", true)
		if err != nil {
			return nil, fmt.Errorf("privileged: %w", err)
		}
		for _, d := range all {
			if !slices.ContainsFunc(out, func(o spec.Device) bool { return o.Path == d.Path }) {
				out = append(out, d)
			}
		}
	}
	if len(out) > maxDevices {
		return nil, fmt.Errorf("%w: devices: %d, the limit is %d", ErrInvalid, len(out), maxDevices)
	}
	return out, nil
}

func gatherDevice(d *runtime.Device) ([]spec.Device, error) {
	if !filepath.IsAbs(d.GetHostPath()) {
		return nil, fmt.Errorf("%w: host_path %.200q: not an absolute path", ErrInvalid, d.GetHostPath())
	}
	if !spec.AccessOK(d.GetPermissions()) {
		return nil, fmt.Errorf("%w: permissions %.200q: want one or more of r, w and m", ErrInvalid, d.GetPermissions())
	}
	inside := d.GetContainerPath()
	if inside == "" {
		inside = d.HostPath
	}
	if err := awaitAnswer(d.HostPath); err != nil {
		return nil, fmt.Errorf("host_path %.200q: %w", d.HostPath, err)
	}
	source, err := filepath.EvalSymlinks(d.HostPath)
	if err != nil {
		return nil, fmt.Errorf("%w: host_path %.200q: %w", ErrInvalid, d.HostPath, err)
	}
	var st unix.Stat_t
	if err := unix.Stat(source, &st); err != nil {
		return nil, fmt.Errorf("%w: host_path %.200q: %w", ErrInvalid, d.HostPath, err)
	}
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		return devicesBelow(source, inside, d.Permissions, false)
	}
	dev, ok := deviceOf(&st, inside, d.Permissions)
	if !ok {
		return nil, fmt.Errorf("%w: host_path %.200q: neither a device node nor a directory", ErrInvalid, d.HostPath)
	}
	dev.Source = source
	return []spec.Device{dev}, nil
}

// devicesBelow returns the device nodes in a directory and its subdirectories,
// as they appear at inside. Symbolic links are not followed and other
// files are left out. usual leaves out, too, what the runtime gives every
// container by itself.
func devicesBelow(dir, inside, access string, usual bool) ([]spec.Device, error) {
	var out []spec.Device
	err := filepath.WalkDir(dir, func(p string, e fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // unplugged meanwhile
		}
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, p)
		if err != nil {
			return err
		}
		switch {
		case e.IsDir() && slices.Contains([]string{"/dev/pts", "/dev/shm", "/dev/mqueue", "/dev/fd"}, p):
			return filepath.SkipDir
		case e.Type()&fs.ModeDevice == 0 || usual && slices.Contains(usualDevices, rel):
			return nil
		case len(out) >= maxDevices:
			return fmt.Errorf("%w: %s: more than %d device nodes", ErrInvalid, dir, maxDevices)
		}
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err != nil {
			return nil // unplugged meanwhile
		}
		if d, ok := deviceOf(&st, path.Join(inside, rel), access); ok {
			d.Source = p
			out = append(out, d)
		}
		return nil
	})
	return out, err
}

var usualDevices = []string{"console", "full", "null", "ptmx", "random", "tty", "urandom", "zero"}

func deviceOf(st *unix.Stat_t, inside, access string) (spec.Device, bool) {
	kind := map[uint32]string{unix.S_IFCHR: "c", unix.S_IFBLK: "b"}[st.Mode&unix.S_IFMT]
	mode := os.FileMode(st.Mode & 0o777)
	return spec.Device{
		LinuxDevice: specs.LinuxDevice{
			Path: path.Clean(inside), Type: kind, FileMode: &mode, UID: &st.Uid, GID: &st.Gid,
			Major: int64(unix.Major(st.Rdev)), Minor: int64(unix.Minor(st.Rdev)),
		},
		Access: access,
	}, kind != ""
}

// loadSeccomp returns the profile that a container asks for in either of the two
// fields, nil for none. By CRI, one that asks for nothing is unconfined. caps is
// its bounding set.
func loadSeccomp(p *runtime.SecurityProfile, deprecatedPath string, privileged bool, caps []string) (*specs.LinuxSeccomp, error) {
	const field = "linux.security_context.seccomp"
	p, err := spec.Profile(&runtime.LinuxContainerSecurityContext{Seccomp: p, SeccompProfilePath: deprecatedPath}) //nolint:staticcheck // older kubelets set only this
	switch {
	case err != nil:
		return nil, err
	case privileged || p == nil:
		return nil, nil
	case p.ProfileType != runtime.SecurityProfile_Localhost && p.LocalhostRef != "":
		return nil, fmt.Errorf("%w: %s.localhost_ref %.200q: only for profile_type Localhost", ErrInvalid, field, p.LocalhostRef)
	}
	switch p.ProfileType {
	case runtime.SecurityProfile_Unconfined:
		return nil, nil
	case runtime.SecurityProfile_RuntimeDefault:
		return spec.DefaultSeccomp(caps, goruntime.GOARCH), nil
	case runtime.SecurityProfile_Localhost:
		profile, err := loadProfile(p.LocalhostRef)
		if err != nil {
			return nil, invalid(fmt.Sprintf("%s.localhost_ref %.200q", field, p.LocalhostRef), err)
		}
		return profile, nil
	}
	return nil, fmt.Errorf("%w: %s.profile_type %d: unknown", ErrInvalid, field, p.ProfileType)
}

func loadProfile(ref string) (*specs.LinuxSeccomp, error) {
	name := strings.TrimPrefix(ref, "localhost/")
	if !filepath.IsAbs(name) {
		return nil, errors.New("not an absolute path")
	}
	fd, err := unix.Open(name, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, err
	}
	b, err := readRegular(fd, name, maxProfile)
	if err != nil {
		return nil, err
	}
	return spec.ParseSeccomp(b)
}

// readRegular reads a file that was opened without blocking and closes it. Anything
// but a regular file is refused: a fifo would block, a device never end.
func readRegular(fd int, name string, limit int64) ([]byte, error) {
	f := os.NewFile(uintptr(fd), name)
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() {
		return nil, errors.New("not a regular file")
	}
	b, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && int64(len(b)) > limit {
		err = fmt.Errorf("over %d bytes", limit)
	}
	return b, err
}

// readUserDB returns the passwd and group files of a container's root directory;
// one that is missing is empty. The image decides what is there: symbolic links
// are resolved inside of the root, and neither a fifo nor a huge file
// (CVE-2026-47262) may hold or fill the daemon.
func readUserDB(root *os.File) (passwd, group []byte, err error) {
	if passwd, err = readInRoot(root, "etc/passwd", maxUserDB); err != nil {
		return nil, nil, fmt.Errorf("%w: image: /etc/passwd: %w", ErrInvalid, err)
	}
	if group, err = readInRoot(root, "etc/group", maxUserDB); err != nil {
		return nil, nil, fmt.Errorf("%w: image: /etc/group: %w", ErrInvalid, err)
	}
	return passwd, group, nil
}

func readInRoot(root *os.File, name string, limit int64) ([]byte, error) {
	fd, err := openInRoot(root, name, 0)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return readRegular(fd, name, limit)
}

// openInRoot opens a file, with root as its root directory, for readRegular. more
// is what else its name must not lead through (openat2(2)).
func openInRoot(root *os.File, name string, more uint64) (fd int, err error) {
	return openat2(int(root.Fd()), name, &unix.OpenHow{
		Flags:   unix.O_RDONLY | unix.O_CLOEXEC | unix.O_NONBLOCK | unix.O_NOCTTY,
		Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS | more,
	})
}

// openat2 tries again when the kernel could not be sure, because something was
// renamed meanwhile, that ".." had not left the root.
func openat2(dir int, name string, how *unix.OpenHow) (fd int, err error) {
	for range 32 {
		fd, err = unix.Openat2(dir, name, how)
		if !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR) {
			break
		}
	}
	return fd, err
}

// hostFacts asks the kernel what it can do. Host.RRO is about the kernel; the OCI
// runtime has to be able, too.
func hostFacts(h cgroup.Hierarchy) (spec.Host, error) {
	f := spec.Host{CgroupV2: h.V2(), Swap: h.SwapAccounted()}
	for _, flag := range h.Flags() {
		if flag == "nsdelegate" || flag == "memory_recursiveprot" || flag == "memory_hugetlb_accounting" || flag == "favordynmods" {
			f.CgroupFlags = append(f.CgroupFlags, flag)
		}
	}
	// A filter at an impossible address: EFAULT from a kernel that would read it.
	err := unix.Prctl(unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER, 0, 0, 0)
	f.Seccomp = errors.Is(err, unix.EFAULT) || errors.Is(err, unix.EACCES)
	f.RRO = !errors.Is(unix.MountSetattr(-1, "", unix.AT_RECURSIVE, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}), unix.ENOSYS)
	f.SELinux = selinux.GetEnabled()
	var st unix.Statfs_t
	f.MQueue = unix.Statfs("/dev/mqueue", &st) == nil && st.Type == mqueueMagic
	if h.Has("hugetlb") {
		f.HugePages = hugePageSizes("/sys/kernel/mm/hugepages")
	}
	bounding, err := statusCaps("CapBnd")
	if err != nil {
		return f, err
	}
	for n := range 64 {
		if name := spec.CapabilityName(n); name != "" && bounding&(1<<n) != 0 {
			f.Capabilities = append(f.Capabilities, name)
		}
	}
	return f, nil
}

// mqueueMagic is MQUEUE_MAGIC in the kernel's ipc/mqueue.c.
const mqueueMagic = 0x19800202

// hugePageSizes lists a directory of hugepages-2048kB and the like in the form of
// the control files, "2MB".
func hugePageSizes(dir string) (sizes []string) {
	entries, _ := os.ReadDir(dir)
	for _, e := range entries {
		text := strings.TrimSuffix(strings.TrimPrefix(e.Name(), "hugepages-"), "kB")
		kb, err := strconv.ParseUint(text, 10, 64)
		switch {
		case err != nil || kb == 0:
		case kb%(1<<20) == 0:
			sizes = append(sizes, fmt.Sprintf("%dGB", kb>>20))
		case kb%(1<<10) == 0:
			sizes = append(sizes, fmt.Sprintf("%dMB", kb>>10))
		default:
			sizes = append(sizes, fmt.Sprintf("%dKB", kb))
		}
	}
	return sizes
}

// statusCaps reads a capability set of this process, as a bit mask.
func statusCaps(key string) (uint64, error) {
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return 0, err
	}
	for line := range bytes.Lines(b) {
		if v, ok := bytes.CutPrefix(line, []byte(key+":")); ok {
			return strconv.ParseUint(string(bytes.TrimSpace(v)), 16, 64)
		}
	}
	return 0, fmt.Errorf("/proc/self/status: no %s", key)
}

// oomScoreFloor returns the lowest oom_score_adj that this daemon may give a
// process: everything with CAP_SYS_RESOURCE in the first user namespace,
// else no less than its own (proc_pid_oom_score_adj(5)).
func oomScoreFloor() int {
	caps, err := statusCaps("CapEff")
	idMap, _ := os.ReadFile("/proc/self/uid_map")
	first := slices.Equal(strings.Fields(string(idMap)), []string{"0", "0", "4294967295"})
	if err == nil && first && caps&(1<<unix.CAP_SYS_RESOURCE) != 0 {
		return -1000
	}
	b, err := os.ReadFile("/proc/self/oom_score_adj")
	if own, e := strconv.Atoi(string(bytes.TrimSpace(b))); err == nil && e == nil {
		return own
	}
	return 0
}

// sysctl is one kernel parameter to set in a pod's namespaces.
type sysctl struct {
	name  string // below /proc/sys, with slashes
	value string
}

// parseSysctls checks the sysctls of a pod, given in the form with dots or with
// slashes (sysctl(8)), and returns them by name. Only those that belong to a
// namespace which the pod has for itself are let through; anything else would be
// set for the whole node, and kernel.core_pattern gives it away (CVE-2022-0811).
func parseSysctls(m map[string]string, hostNet, hostIPC bool) ([]sysctl, error) {
	if len(m) > maxSysctls {
		return nil, fmt.Errorf("%w: linux.sysctls: %d, the limit is %d", ErrInvalid, len(m), maxSysctls)
	}
	var out []sysctl
	for _, key := range slices.Sorted(maps.Keys(m)) {
		name := sysctlPath(key)
		if err := checkSysctl(name, m[key], hostNet, hostIPC); err != nil {
			return nil, fmt.Errorf("%w: linux.sysctls[%.200q]: %w", ErrInvalid, key, err)
		}
		if slices.ContainsFunc(out, func(s sysctl) bool { return s.name == name }) {
			return nil, fmt.Errorf("%w: linux.sysctls[%.200q]: given twice", ErrInvalid, key)
		}
		out = append(out, sysctl{name: name, value: m[key]})
	}
	return out, nil
}

// sysctlPath returns the form with slashes. What separates first is the separator;
// with dots, a slash stands for a dot in a name (net.ipv4.conf.eth0/1.forwarding).
func sysctlPath(key string) string {
	if i := strings.IndexAny(key, "./"); i < 0 || key[i] == '/' {
		return key
	}
	return strings.NewReplacer(".", "/", "/", ".").Replace(key)
}

func checkSysctl(name, value string, hostNet, hostIPC bool) error {
	parts := strings.Split(name, "/")
	for _, p := range parts {
		bad := strings.IndexFunc(p, func(r rune) bool {
			return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && !strings.ContainsRune("_-.:@", r)
		})
		if p == "" || p == "." || p == ".." || bad >= 0 || len(name) > 255 {
			return errors.New("not the name of a sysctl")
		}
	}
	if len(value) > maxSysctl || strings.ContainsFunc(value, func(r rune) bool { return (r < ' ' && r != '\t') || r > '~' }) {
		return fmt.Errorf("value %.200q: over %d bytes, or not printable ASCII", value, maxSysctl)
	}
	rest := strings.Join(parts[1:], "/")
	ipc := parts[0] == "kernel" && len(parts) == 2 && (strings.HasPrefix(rest, "shm") || strings.HasPrefix(rest, "msg") || rest == "sem") ||
		parts[0] == "fs" && len(parts) == 3 && parts[1] == "mqueue"
	switch {
	case parts[0] == "net" && len(parts) > 1 && hostNet:
		return errors.New("belongs to the network namespace, which is the host's")
	case ipc && hostIPC:
		return errors.New("belongs to the IPC namespace, which is the host's")
	case ipc || parts[0] == "net" && len(parts) > 1:
		return nil
	}
	return errors.New("not of a pod's namespaces: want net.*, kernel.shm*, kernel.msg*, kernel.sem or fs.mqueue.*")
}

// applySysctls sets sysctls in the namespaces of the calling thread, which must be
// the pod's and belong to u, if it has one. A parameter that this kernel does not
// have in a namespace of its own is an error.
func applySysctls(list []sysctl, u *userNS) error {
	if len(list) == 0 {
		return nil
	}
	root, err := unix.Open("/proc/sys", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("/proc/sys: %w", err)
	}
	defer unix.Close(root)
	for _, s := range list {
		err := writeSysctl(root, s)
		if u != nil && (errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM)) {
			// Newer kernels let only its owner change an IPC namespace.
			err = u.asRoot(func() error { return writeSysctl(root, s) })
		}
		if err != nil {
			return fmt.Errorf("%w: linux.sysctls[%.200q]: %.200q: %w", ErrInvalid, strings.ReplaceAll(s.name, "/", "."), s.value, err)
		}
	}
	return nil
}

func writeSysctl(root int, s sysctl) error {
	how := unix.OpenHow{
		Flags:   unix.O_WRONLY | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_XDEV,
	}
	fd, err := openat2(root, s.name, &how)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	_, err = unix.Write(fd, []byte(s.value))
	return err
}
