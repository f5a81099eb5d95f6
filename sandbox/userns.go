package sandbox

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berthd/berth/cni/netns"
	"github.com/berthd/berth/sandbox/spec"
	"github.com/berthd/berth/shim"
	"github.com/berthd/berth/snapshotter"
)

// A pod may have a user namespace, in which its containers' root is nobody on the
// host. It is pinned beside the pod's other namespaces, which belong to it, and
// each container joins it. Image layers are shown to it through ID-mapped mounts,
// so that no file is changed for it; so are volumes, by the OCI runtime, when
// their mounts say so.

// userNS is what a pod's user namespace maps: one range of users and one of
// groups, each from 0 in the namespace on.
type userNS struct{ uids, gids netns.IDMap }

const usernsField = "linux.security_context.namespace_options.userns_options"

// userNSOf reads the user namespace that a configuration asks for; nil is the
// node's.
func userNSOf(u *runtime.UserNamespace) (*userNS, error) {
	switch {
	case u == nil || u.GetMode() == runtime.NamespaceMode_NODE && len(u.GetUids()) == 0 && len(u.GetGids()) == 0:
		return nil, nil
	case u.GetMode() == runtime.NamespaceMode_NODE:
		return nil, fmt.Errorf("%w: %s: mode NODE with %d uids and %d gids: it has no mappings", ErrInvalid, usernsField, len(u.GetUids()), len(u.GetGids()))
	case u.GetMode() != runtime.NamespaceMode_POD:
		return nil, fmt.Errorf("%w: %s.mode: %v: want POD or NODE", ErrInvalid, usernsField, u.GetMode())
	}
	uids, err := podIDs(usernsField+".uids", u.GetUids())
	if err != nil {
		return nil, err
	}
	gids, err := podIDs(usernsField+".gids", u.GetGids())
	if err != nil {
		return nil, err
	}
	return &userNS{uids, gids}, nil
}

// podIDs is the one range of a pod's mapping.
func podIDs(field string, list []*runtime.IDMapping) (netns.IDMap, error) {
	if len(list) != 1 {
		return netns.IDMap{}, fmt.Errorf("%w: %s: %d mappings, want one", ErrInvalid, field, len(list))
	}
	if err := checkIDs(field, list); err != nil {
		return netns.IDMap{}, err
	}
	m := list[0]
	switch {
	case m.GetContainerId() != 0:
		return netns.IDMap{}, fmt.Errorf("%w: %s[0].container_id: %d: the container's root, 0, must be mapped", ErrInvalid, field, m.GetContainerId())
	case m.GetHostId() == 0:
		return netns.IDMap{}, fmt.Errorf("%w: %s[0].host_id: 0: is the node's root", ErrInvalid, field)
	}
	return netns.IDMap{Inside: 0, Outside: m.GetHostId(), Length: m.GetLength()}, nil
}

// maxIDMaps is how many ranges the kernel takes (user_namespaces(7)).
const maxIDMaps = 340

// checkIDs refuses ranges that are empty or go beyond the highest ID, 2^32-2.
func checkIDs(field string, list []*runtime.IDMapping) error {
	if len(list) > maxIDMaps {
		return fmt.Errorf("%w: %s: %d mappings, limit %d", ErrInvalid, field, len(list), maxIDMaps)
	}
	for i, m := range list {
		first := uint64(max(m.GetHostId(), m.GetContainerId()))
		switch n := uint64(m.GetLength()); {
		case n == 0:
			return fmt.Errorf("%w: %s[%d].length: 0, want 1 or more", ErrInvalid, field, i)
		case first+n > math.MaxUint32:
			return fmt.Errorf("%w: %s[%d]: %d IDs from %d on: limit %d", ErrInvalid, field, i, n, first, uint32(math.MaxUint32-1))
		}
	}
	return nil
}

func (u *userNS) String() string {
	if u == nil {
		return "the node's"
	}
	return fmt.Sprintf("%d users at %d and %d groups at %d", u.uids.Length, u.uids.Outside, u.gids.Length, u.gids.Outside)
}

func sameUserNS(a, b *userNS) bool { return a == b || a != nil && b != nil && *a == *b }

// root are the IDs on the host of who is root in the namespace; 0 without one.
func (u *userNS) root() (uid, gid uint32) {
	if u == nil {
		return 0, 0
	}
	return u.uids.Outside, u.gids.Outside
}

// own gives a file of the host to the namespace's root.
func (u *userNS) own(path string) error {
	if u == nil {
		return nil
	}
	return os.Lchown(path, int(u.uids.Outside), int(u.gids.Outside))
}

// checkUser refuses users and groups that the namespace does not map.
func (u *userNS) checkUser(who spec.User) error {
	if u == nil {
		return nil
	}
	if who.UID >= u.uids.Length {
		return fmt.Errorf("%w: user %d: the pod's user namespace has 0 to %d", ErrInvalid, who.UID, u.uids.Length-1)
	}
	for _, g := range append([]uint32{who.GID}, who.AdditionalGIDs...) {
		if g >= u.gids.Length {
			return fmt.Errorf("%w: group %d: the pod's user namespace has 0 to %d", ErrInvalid, g, u.gids.Length-1)
		}
	}
	return nil
}

func ociIDs(m netns.IDMap) []specs.LinuxIDMapping {
	return []specs.LinuxIDMapping{{ContainerID: m.Inside, HostID: m.Outside, Size: m.Length}}
}

// specUserNS is what the containers of a pod join.
func (s *Service) specUserNS(p *pod) *spec.UserNS {
	if p.userNS == nil {
		return nil
	}
	return &spec.UserNS{Path: s.deps.Pins.Path(p.ID, netns.User), UIDs: ociIDs(p.userNS.uids), GIDs: ociIDs(p.userNS.gids)}
}

// userSpec describes the namespace to package netns.
func (s *Service) userSpec(u *userNS) netns.UserSpec {
	return netns.UserSpec{UIDs: []netns.IDMap{u.uids}, GIDs: []netns.IDMap{u.gids}, Holder: []string{s.userHolder()}}
}

// userHolder is the program of the process in a new user namespace. Only root can get
// at the configured binary in some places; this copy is where everybody's path leads.
func (s *Service) userHolder() string { return filepath.Join(s.initDir, "berth-init") }

// userNSOfPod is nil for a pod that is gone.
func (s *Service) userNSOfPod(id string) *userNS {
	if p := s.book.view().pods[id]; p != nil {
		return p.userNS
	}
	return nil
}

// userNSSupport is what was found out about this node.
type userNSSupport struct {
	mu   sync.Mutex
	look chan struct{} // closed when the look under way ends; nil if there is none
	at   time.Time     // zero before the first answer
	err  error         // why it has no user namespaces for pods
}

// userNSAgain is how long a node that has none is not asked again: it takes a
// process and files on the disk.
const userNSAgain = time.Minute

// lookAtUserNS finds out in the background, unless it is known, whether kernel and
// file system can do user namespaces for pods. What it returns is closed then.
func (s *Service) lookAtUserNS() <-chan struct{} {
	k := &s.userNS
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.look != nil {
		return k.look
	}
	done := make(chan struct{})
	if !k.at.IsZero() && (k.err == nil || time.Since(k.at) < userNSAgain) {
		close(done)
		return done
	}
	k.look = done
	go func() {
		err := ProbeUserNamespaces(s.userHolder(), s.cfg.StateDir, s.cfg.RunDir)
		k.mu.Lock()
		k.look, k.at, k.err = nil, time.Now(), err
		k.mu.Unlock()
		close(done)
	}()
	return done
}

// kernelUserNS returns at once what is known: why neither kernel nor file system
// can do user namespaces for pods, nil if they can.
func (s *Service) kernelUserNS() error {
	s.lookAtUserNS()
	k := &s.userNS
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.at.IsZero() {
		return errors.New("user namespaces: not probed yet")
	}
	return k.err
}

// searchable makes sure that everybody may pass through what is above a
// directory. The directory itself, which is root's alone, is opened when needed.
func searchable(dir string) error {
	for dir = parentDir(dir); ; dir = parentDir(dir) {
		fi, err := os.Stat(dir)
		if err != nil {
			return err
		}
		if fi.Mode().Perm()&1 == 0 {
			return fmt.Errorf("run_dir: %s has mode %#o: users of a pod's user namespace cannot pass", dir, fi.Mode().Perm())
		}
		if dir == "/" {
			return nil
		}
	}
}

// openRunDir lets everybody who knows a name pass, but not look around: with the
// IDs of a user namespace the OCI runtime has to reach the container's root. What
// is below, but for that, stays root's.
func (s *Service) openRunDir() error {
	for _, dir := range []string{s.cfg.RunDir, filepath.Join(s.cfg.RunDir, "c"), filepath.Join(s.cfg.RunDir, "init")} {
		if err := os.Chmod(dir, 0o711); err != nil {
			return err
		}
	}
	return nil
}

// userNamespaces tells why the runtime cannot run containers in the user namespace
// of a pod; nil if it can.
func (f runtimeFacts) userNamespaces() error {
	switch l := f.Features; {
	case l == nil || l.Linux == nil:
		return errors.New("does not tell its features")
	case !slices.Contains(l.Linux.Namespaces, string(specs.UserNamespace)):
		return errors.New("has no user namespaces (linux.namespaces in its features)")
	case !f.idMappedMounts():
		return errors.New("has no ID-mapped mounts (linux.mountExtensions.idmap in its features)")
	}
	return nil
}

// idMappedMounts tells whether the runtime maps the owners of volumes.
func (f runtimeFacts) idMappedMounts() bool {
	if f.Features == nil || f.Features.Linux == nil || f.Features.Linux.MountExtensions == nil || f.Features.Linux.MountExtensions.IDMap == nil {
		return false
	}
	on := f.Features.Linux.MountExtensions.IDMap.Enabled
	return on != nil && *on
}

// canUserNS tells why pods of a runtime cannot have a user namespace.
func (s *Service) canUserNS(f runtimeFacts) error {
	if err := f.userNamespaces(); err != nil {
		return fmt.Errorf("%s %w", f.Version, err)
	}
	return s.kernelUserNS()
}

// planUserNS reads and checks the user namespace that a pod asks for.
func (s *Service) planUserNS(ctx context.Context, cfg *runtime.PodSandboxConfig, rt ociRuntime) (*userNS, error) {
	opts := cfg.GetLinux().GetSecurityContext().GetNamespaceOptions()
	u, err := userNSOf(opts.GetUsernsOptions())
	if err != nil || u == nil {
		return nil, err
	}
	if err := checkUserPID(opts); err != nil {
		return nil, err
	}
	f, err := rt.now(ctx)
	if err != nil {
		return nil, err
	}
	select {
	case <-s.lookAtUserNS():
	case <-ctx.Done():
		return nil, fmt.Errorf("user namespaces: state_dir %s does not answer: %w", s.cfg.StateDir, ctx.Err())
	}
	if err := s.canUserNS(f); err != nil {
		return nil, fmt.Errorf("%w: %s.mode: POD: handler %q: %w", ErrInvalid, usernsField, rt.handler, err)
	}
	return u, nil
}

// checkUserPID refuses the host's processes in a user namespace, whose root may
// not mount a /proc of them. Kubernetes does not allow it either.
func checkUserPID(opts *runtime.NamespaceOption) error {
	if opts.GetPid() == runtime.NamespaceMode_NODE {
		return fmt.Errorf("%w: linux.security_context.namespace_options.pid: NODE is not possible in a user namespace", ErrInvalid)
	}
	return nil
}

// checkContainerUserNS refuses a container that wants another user namespace than
// its pod's. One that says nothing gets that.
func checkContainerUserNS(p *pod, opts *runtime.NamespaceOption) error {
	if o := opts.GetUsernsOptions(); o != nil {
		u, err := userNSOf(o)
		if err != nil {
			return err
		}
		if !sameUserNS(u, p.userNS) {
			return fmt.Errorf("%w: %s: %v, but the pod's is %v", ErrInvalid, usernsField, u, p.userNS)
		}
	}
	if p.userNS == nil {
		return nil
	}
	return checkUserPID(opts)
}

// mountIDs looks after the mappings of mounts.
type mountIDs struct {
	able bool    // the OCI runtime can do it
	user *userNS // of the pod
	path string  // where that is pinned
}

// gather fills in the mappings of a host path.
func (ids mountIDs) gather(m *runtime.Mount, s *spec.Mount) error {
	if len(m.GetUidMappings()) == 0 && len(m.GetGidMappings()) == 0 {
		return nil
	}
	if err := ids.check(m); err != nil {
		return err
	}
	s.UIDMappings, s.GIDMappings = ociMappings(m.GetUidMappings()), ociMappings(m.GetGidMappings())
	if !ids.ofPod(m) {
		return nil
	}
	ns, err := os.Open(ids.path)
	if err != nil {
		return fmt.Errorf("user namespace: %w", err)
	}
	defer ns.Close()
	if err := snapshotter.CanIDMap(s.Source, ns); err != nil {
		return fmt.Errorf("%w: uidMappings, gidMappings: host_path %.200q: %w", ErrInvalid, m.GetHostPath(), err)
	}
	return nil
}

func (ids mountIDs) check(m *runtime.Mount) error {
	switch {
	case len(m.GetUidMappings()) == 0:
		return fmt.Errorf("%w: uidMappings: none, but %d gidMappings", ErrInvalid, len(m.GetGidMappings()))
	case len(m.GetGidMappings()) == 0:
		return fmt.Errorf("%w: gidMappings: none, but %d uidMappings", ErrInvalid, len(m.GetUidMappings()))
	case !ids.able:
		return fmt.Errorf("%w: uidMappings, gidMappings: the OCI runtime has no ID-mapped mounts (linux.mountExtensions.idmap in its features)", ErrInvalid)
	}
	return errors.Join(checkIDs("uidMappings", m.GetUidMappings()), checkIDs("gidMappings", m.GetGidMappings()))
}

// image checks the mappings of an image volume, which are always the pod's.
func (ids mountIDs) image(m *runtime.Mount) error {
	if len(m.GetUidMappings()) == 0 && len(m.GetGidMappings()) == 0 || ids.ofPod(m) {
		return nil
	}
	return fmt.Errorf("%w: uidMappings, gidMappings: of an image they can only be those of the pod's user namespace, which is %v", ErrInvalid, ids.user)
}

// ofPod tells whether the mappings are those of the pod's user namespace.
func (ids mountIDs) ofPod(m *runtime.Mount) bool {
	same := func(list []*runtime.IDMapping, want netns.IDMap) bool {
		return len(list) == 1 && list[0].GetContainerId() == want.Inside && list[0].GetHostId() == want.Outside && list[0].GetLength() == want.Length
	}
	return ids.user != nil && same(m.GetUidMappings(), ids.user.uids) && same(m.GetGidMappings(), ids.user.gids)
}

func ociMappings(list []*runtime.IDMapping) []specs.LinuxIDMapping {
	out := make([]specs.LinuxIDMapping, 0, len(list))
	for _, m := range list {
		out = append(out, specs.LinuxIDMapping{ContainerID: m.GetContainerId(), HostID: m.GetHostId(), Size: m.GetLength()})
	}
	return out
}

// shimMounts is a snapshot as the shim mounts it on target, see wire.Mount, for a
// user namespace or not.
func shimMounts(mounts []snapshotter.Mount, target string, u *userNS) ([]shim.Mount, error) {
	var out []shim.Mount
	if u == nil {
		dir, compact := snapshotter.Compact(mounts)
		for _, m := range compact {
			out = append(out, shim.Mount{Type: m.Type, Source: m.Source, Options: m.Options, Dir: dir, Target: target})
		}
		return out, nil
	}
	for _, m := range mounts {
		base, dir, m, err := snapshotter.IDMapped(m)
		if err != nil {
			return nil, err
		}
		out = append(out, shim.Mount{Type: m.Type, Source: m.Source, Options: m.Options, Dir: dir, Target: target, IDMap: base})
	}
	return out, nil
}

// pingRange is the one sysctl whose value is IDs.
const pingRange = "net/ipv4/ping_group_range"

// hostSysctls turns IDs in sysctls into the host's: the kernel takes them as those
// of who writes.
func (u *userNS) hostSysctls(list []sysctl) error {
	if u == nil {
		return nil
	}
	for i, c := range list {
		if c.name != pingRange {
			continue
		}
		f := strings.Fields(c.value)
		if len(f) != 2 {
			return nil // for the kernel to refuse
		}
		low, err := strconv.ParseUint(f[0], 10, 32)
		high, err2 := strconv.ParseUint(f[1], 10, 32)
		switch {
		case err != nil || err2 != nil:
			return nil
		case low > high: // means that nobody may
			continue
		case high >= uint64(u.gids.Length):
			return fmt.Errorf("%w: linux.sysctls[%q]: %.200q: the pod's user namespace has groups 0 to %d", ErrInvalid, "net.ipv4.ping_group_range", c.value, u.gids.Length-1)
		}
		list[i].value = fmt.Sprintf("%d %d", low+uint64(u.gids.Outside), high+uint64(u.gids.Outside))
	}
	return nil
}

// asRoot runs fn with the calling thread being the user who is root in the
// namespace, and nobody on the host. The thread must be locked to its goroutine.
// By raw system calls, as those of package syscall change all threads.
func (u *userNS) asRoot(fn func() error) error {
	const keep = ^uintptr(0)
	set := func(uid, gid uint32) error {
		if _, _, e := unix.RawSyscall(unix.SYS_SETRESGID, keep, uintptr(gid), keep); e != 0 {
			return e
		}
		if _, _, e := unix.RawSyscall(unix.SYS_SETRESUID, keep, uintptr(uid), keep); e != 0 {
			return e
		}
		return nil
	}
	if err := set(u.root()); err != nil {
		return fmt.Errorf("user %d: %w", u.uids.Outside, err)
	}
	err := fn()
	// The other way round, as only root may change its group.
	_, _, e1 := unix.RawSyscall(unix.SYS_SETRESUID, keep, 0, keep)
	_, _, e2 := unix.RawSyscall(unix.SYS_SETRESGID, keep, 0, keep)
	if e1 != 0 || e2 != 0 {
		return errors.Join(err, fmt.Errorf("user 0: %w, %w", e1, e2))
	}
	return err
}
