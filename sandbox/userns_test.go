package sandbox

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	goruntime "runtime"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go/features"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berthd/berth/cni/netns"
	"github.com/berthd/berth/sandbox/spec"
	"github.com/berthd/berth/shim"
	"github.com/berthd/berth/snapshotter"
)

func idMaps(inside, outside, length uint32) []*runtime.IDMapping {
	return []*runtime.IDMapping{{ContainerId: inside, HostId: outside, Length: length}}
}

var (
	someUsers = &userNS{uids: netns.IDMap{Outside: 100000, Length: 65536}, gids: netns.IDMap{Outside: 200000, Length: 1000}}
	asked     = &runtime.UserNamespace{Mode: runtime.NamespaceMode_POD, Uids: idMaps(0, 100000, 65536), Gids: idMaps(0, 200000, 1000)}
)

func TestUserNSOf(t *testing.T) {
	for name, u := range map[string]*runtime.UserNamespace{"nothing said": nil, "NODE": {Mode: runtime.NamespaceMode_NODE}} {
		if got, err := userNSOf(u); got != nil || err != nil {
			t.Errorf("%s: %v, %v", name, got, err)
		}
	}
	if got, err := userNSOf(asked); err != nil || *got != *someUsers {
		t.Errorf("got %v, %v", got, err)
	}
	// The highest IDs that there are.
	if got, err := userNSOf(&runtime.UserNamespace{Uids: idMaps(0, 1<<32-11, 10), Gids: idMaps(0, 1, 1<<32-2)}); err != nil || got.gids.Length != 1<<32-2 {
		t.Errorf("got %v, %v", got, err)
	}
	for name, tt := range map[string]struct {
		edit func(*runtime.UserNamespace)
		err  string
	}{
		"target":     {func(u *runtime.UserNamespace) { u.Mode = runtime.NamespaceMode_TARGET }, ".mode: TARGET"},
		"container":  {func(u *runtime.UserNamespace) { u.Mode = runtime.NamespaceMode_CONTAINER }, ".mode: CONTAINER"},
		"node":       {func(u *runtime.UserNamespace) { u.Mode = runtime.NamespaceMode_NODE }, "NODE with 1 uids and 1 gids"},
		"no uids":    {func(u *runtime.UserNamespace) { u.Uids = nil }, ".uids: 0 mappings, want one"},
		"two gids":   {func(u *runtime.UserNamespace) { u.Gids = append(u.Gids, u.Gids...) }, ".gids: 2 mappings, want one"},
		"nil":        {func(u *runtime.UserNamespace) { u.Gids = []*runtime.IDMapping{nil} }, ".gids[0].length: 0"},
		"length":     {func(u *runtime.UserNamespace) { u.Uids[0].Length = 0 }, ".uids[0].length: 0"},
		"wraps":      {func(u *runtime.UserNamespace) { u.Uids = idMaps(0, 1<<32-1, 1) }, ".uids[0]: 1 IDs from 4294967295 on: limit 4294967294"},
		"root":       {func(u *runtime.UserNamespace) { u.Gids[0].ContainerId = 1 }, ".gids[0].container_id: 1"},
		"host's own": {func(u *runtime.UserNamespace) { u.Uids[0].HostId = 0 }, ".uids[0].host_id: 0"},
	} {
		u := proto.Clone(asked).(*runtime.UserNamespace)
		tt.edit(u)
		_, err := userNSOf(u)
		if err == nil || !strings.Contains(err.Error(), usernsField) {
			t.Errorf("%s: %v, want the field", name, err)
		}
		wantInvalid(t, err, tt.err)
	}
}

func FuzzUserNSOf(f *testing.F) {
	f.Add(uint32(0), uint32(100000), uint32(65536))
	f.Add(uint32(0), ^uint32(0), ^uint32(0))
	f.Fuzz(func(t *testing.T, inside, outside, length uint32) {
		u, err := userNSOf(&runtime.UserNamespace{Uids: idMaps(inside, outside, length), Gids: idMaps(inside, outside, length)})
		if err != nil {
			return
		}
		if last := uint64(u.uids.Outside) + uint64(u.uids.Length) - 1; u.uids.Inside != 0 || u.uids.Outside == 0 || u.uids.Length == 0 || last >= 1<<32-1 {
			t.Errorf("accepted %+v", u.uids)
		}
	})
}

func TestDecodePodUserNS(t *testing.T) {
	row := func(u *runtime.UserNamespace) podRow {
		raw, err := proto.Marshal(&runtime.PodSandboxConfig{Linux: &runtime.LinuxPodSandboxConfig{SecurityContext: &runtime.LinuxSandboxSecurityContext{
			NamespaceOptions: &runtime.NamespaceOption{UsernsOptions: u}}}})
		if err != nil {
			t.Fatal(err)
		}
		return podRow{ID: "p", Config: raw}
	}
	if p, err := decodePod(row(asked)); err != nil || !sameUserNS(p.userNS, someUsers) {
		t.Errorf("got %+v, %v", p, err)
	}
	// An earlier berth took mappings with NODE, and a pod that runs must stay known.
	if p, err := decodePod(row(&runtime.UserNamespace{Mode: runtime.NamespaceMode_NODE, Uids: asked.Uids})); err != nil || p.userNS != nil {
		t.Errorf("NODE: got %+v, %v", p, err)
	}
	// What cannot be read must not become a pod in the host's user namespace.
	if p, err := decodePod(row(&runtime.UserNamespace{})); err == nil {
		t.Errorf("without mappings: %+v", p.userNS)
	}
}

func TestCheckContainerUserNS(t *testing.T) {
	with, without := &pod{userNS: someUsers}, &pod{}
	opts := func(u *runtime.UserNamespace) *runtime.NamespaceOption {
		return &runtime.NamespaceOption{UsernsOptions: u}
	}
	node := &runtime.UserNamespace{Mode: runtime.NamespaceMode_NODE}
	for _, ok := range []struct {
		p *pod
		o *runtime.NamespaceOption
	}{{with, nil}, {with, opts(nil)}, {with, opts(asked)}, {without, nil}, {without, opts(node)}, {without, &runtime.NamespaceOption{Pid: runtime.NamespaceMode_NODE}}} {
		if err := checkContainerUserNS(ok.p, ok.o); err != nil {
			t.Errorf("%v in a pod with %v: %v", ok.o, ok.p.userNS, err)
		}
	}
	other := proto.Clone(asked).(*runtime.UserNamespace)
	other.Gids[0].Length--
	wantInvalid(t, checkContainerUserNS(with, opts(other)), "999 groups at 200000, but the pod's is 65536 users at 100000 and 1000 groups at 200000")
	wantInvalid(t, checkContainerUserNS(with, opts(node)), usernsField+": the node's, but the pod's is")
	wantInvalid(t, checkContainerUserNS(without, opts(asked)), "but the pod's is the node's")
	wantInvalid(t, checkContainerUserNS(with, &runtime.NamespaceOption{Pid: runtime.NamespaceMode_NODE}), "namespace_options.pid: NODE")
}

func TestCheckUser(t *testing.T) {
	var none *userNS
	for _, ok := range []error{none.checkUser(spec.User{UID: 1 << 30}), someUsers.checkUser(spec.User{UID: 65535, GID: 999, AdditionalGIDs: []uint32{999, 0}})} {
		if ok != nil {
			t.Error(ok)
		}
	}
	wantInvalid(t, someUsers.checkUser(spec.User{UID: 65536}), "user 65536: the pod's user namespace has 0 to 65535")
	wantInvalid(t, someUsers.checkUser(spec.User{GID: 1000}), "group 1000: the pod's user namespace has 0 to 999")
	wantInvalid(t, someUsers.checkUser(spec.User{AdditionalGIDs: []uint32{0, 1000}}), "group 1000")
}

func TestUserNamespacesOfRuntime(t *testing.T) {
	on, off := true, false
	idmap := func(enabled *bool) *features.MountExtensions {
		return &features.MountExtensions{IDMap: &features.IDMap{Enabled: enabled}}
	}
	for why, f := range map[string]*features.Features{
		"does not tell":          nil,
		"does not tell its":      {},
		"no user namespaces":     {Linux: &features.Linux{Namespaces: []string{"net"}, MountExtensions: idmap(&on)}},
		"no ID-mapped mounts":    {Linux: &features.Linux{Namespaces: []string{"user"}}},
		"no ID-mapped mounts (l": {Linux: &features.Linux{Namespaces: []string{"user"}, MountExtensions: &features.MountExtensions{}}},
		"linux.mountExtensions":  {Linux: &features.Linux{Namespaces: []string{"user"}, MountExtensions: idmap(&off)}},
		"mountExtensions.idmap":  {Linux: &features.Linux{Namespaces: []string{"user"}, MountExtensions: idmap(nil)}},
	} {
		if err := (runtimeFacts{Features: f}).userNamespaces(); err == nil || !strings.Contains(err.Error(), why) {
			t.Errorf("%v, want %q", err, why)
		}
	}
	if err := (runtimeFacts{Features: &features.Features{Linux: &features.Linux{Namespaces: []string{"user"}, MountExtensions: idmap(&on)}}}).userNamespaces(); err != nil {
		t.Error(err)
	}
}

func TestMountIDs(t *testing.T) {
	m := func(uids, gids []*runtime.IDMapping) *runtime.Mount {
		return &runtime.Mount{HostPath: "/", UidMappings: uids, GidMappings: gids}
	}
	own, foreign := m(asked.Uids, asked.Gids), m(idMaps(0, 5, 5), idMaps(0, 5, 5))
	pod, plain := mountIDs{able: true, user: someUsers, path: "/nowhere"}, mountIDs{able: true}
	var s spec.Mount
	if err := plain.gather(foreign, &s); err != nil || s.UIDMappings[0].HostID != 5 || s.GIDMappings[0].Size != 5 {
		t.Errorf("%+v, %v", s, err)
	}
	if err := (mountIDs{}).gather(m(nil, nil), &s); err != nil {
		t.Error(err)
	}
	if err := pod.gather(own, &s); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("without a pinned namespace: %v", err)
	}
	wantInvalid(t, (mountIDs{}).gather(foreign, &s), "uidMappings, gidMappings: the OCI runtime has no ID-mapped mounts")
	wantInvalid(t, plain.gather(m(asked.Uids, nil), &s), "gidMappings: none, but 1 uidMappings")
	wantInvalid(t, plain.gather(m(nil, asked.Uids), &s), "uidMappings: none, but 1 gidMappings")
	wantInvalid(t, plain.gather(m(idMaps(0, 1, 0), asked.Gids), &s), "uidMappings[0].length: 0")
	wantInvalid(t, plain.gather(m(make([]*runtime.IDMapping, 341), asked.Gids), &s), "uidMappings: 341 mappings, limit 340")
	if err := errors.Join(pod.image(own), pod.image(m(nil, nil)), plain.image(m(nil, nil))); err != nil {
		t.Error(err)
	}
	wantInvalid(t, pod.image(foreign), "the pod's user namespace, which is 65536 users at 100000")
	wantInvalid(t, plain.image(own), "which is the node's")
}

func TestShimMounts(t *testing.T) {
	mounts := []snapshotter.Mount{{Type: "overlay", Source: "overlay", Options: []string{"upperdir=/s/snapshots/2/upper", "lowerdir=/s/layers/1"}}}
	got, err := shimMounts(mounts, "vol-1", nil)
	if want := (shim.Mount{Type: "overlay", Source: "overlay", Options: mounts[0].Options, Target: "vol-1"}); err != nil || fmt.Sprint(got) != fmt.Sprint([]shim.Mount{want}) {
		t.Errorf("%+v, %v; want %+v", got, err, want)
	}
	got, err = shimMounts(mounts, "", someUsers)
	if err != nil || got[0].IDMap != "/s" || got[0].Dir != "layers" || got[0].Options[1] != "lowerdir=1" {
		t.Errorf("%+v, %v", got, err)
	}
	if _, err := shimMounts([]snapshotter.Mount{{Type: "zfs"}}, "", someUsers); !errors.Is(err, snapshotter.ErrIDMap) {
		t.Errorf("a snapshot that cannot be mapped: %v", err)
	}
}

func TestHostSysctls(t *testing.T) {
	for in, want := range map[string]string{"0 999": "200000 200999", " 5\t7 ": "200005 200007", "1 0": "1 0", "x": "x", "1 2 3": "1 2 3", "-1 5": "-1 5"} {
		list := []sysctl{{"net/ipv4/ip_forward", "0 5"}, {pingRange, in}}
		if err := someUsers.hostSysctls(list); err != nil || list[1].value != want || list[0].value != "0 5" {
			t.Errorf("%q: %v, %v; want %q", in, list, err, want)
		}
		var none *userNS
		list[1].value = in
		if err := none.hostSysctls(list); err != nil || list[1].value != in {
			t.Errorf("%q without a user namespace: %v, %v", in, list, err)
		}
	}
	wantInvalid(t, someUsers.hostSysctls([]sysctl{{pingRange, "0 1000"}}), `linux.sysctls["net.ipv4.ping_group_range"]: "0 1000": the pod's user namespace has groups 0 to 999`)
}

func TestSearchable(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a", "b")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := searchable(dir); err == nil || !strings.Contains(err.Error(), filepath.Dir(dir)+" has mode 0700") {
		t.Errorf("below a directory of root's: %v", err)
	}
	if err := searchable("/run-berth"); err != nil {
		t.Errorf("below the root: %v", err)
	}
}

// TestAsRoot: only this thread, and only for a while.
func TestAsRoot(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: changes its user")
	}
	done := make(chan [3]string)
	go func() {
		goruntime.LockOSThread() // never unlocked
		who := func() string {
			b, err := os.ReadFile("/proc/thread-self/status")
			var out []string
			for line := range strings.Lines(string(b)) {
				if strings.HasPrefix(line, "Uid:") || strings.HasPrefix(line, "Gid:") || strings.HasPrefix(line, "CapEff:") {
					out = append(out, strings.Fields(line)[1:]...)
				}
			}
			return fmt.Sprint(out, err)
		}
		var got [3]string
		got[0] = who()
		boom := errors.New("boom")
		if err := someUsers.asRoot(func() error { got[1] = who(); return boom }); err != boom {
			got[1] += err.Error()
		}
		got[2] = who()
		done <- got
	}()
	got := <-done
	if got[0] != got[2] || !strings.HasPrefix(got[1], "[0 100000 0 100000 0 200000 0 200000 0000000000000000]") {
		t.Errorf("before %s, meanwhile %s, after %s", got[0], got[1], got[2])
	}
	if unix.Geteuid() != 0 {
		t.Error("another thread has changed")
	}
}
