// Package images defines the images that the tests and the demo run: Debian's
// static busybox, and test/guest, a static Go program that is compiled here.
//
// Standard returns them all; Push puts them on a registry under the names of
// the constants. The images hold nothing that is fetched at test time.
package images

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/berthd/berth/test/registry"
)

// The repositories that Push fills; the tag is Tag everywhere.
const (
	Busybox  = "berth/busybox"  // a shell and the usual tools; root; CMD sh
	Guest    = "berth/guest"    // only /guest; ENTRYPOINT
	Settings = "berth/settings" // busybox with every setting of the image config
	Layers   = "berth/layers"   // whiteouts, opaque directory, hardlink, xattr, device, owner; gzip, zstd and plain
	Numeric  = "berth/numeric"  // USER 4242:4243
	Index    = "berth/index"    // an index with a foreign platform first
	Large    = "berth/large"    // one layer of LargeSize bytes that do not compress
	Foreign  = "berth/foreign"  // for a platform that no test machine has
	Tag      = "1"
)

// LargeSize is the size of the one layer of Large, in bytes.
const LargeSize = 8 << 20

// ErrNoBusybox tells that Debian's busybox-static, or any other static
// busybox, is not on this machine.
var ErrNoBusybox = errors.New("static busybox: not found (Debian: apt-get install busybox-static)")

// Users of the busybox images, as /etc/passwd and /etc/group tell.
const (
	passwd = "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1001:app:/home/app:/bin/sh\n1234:x:0:0:a name of digits:/:/bin/sh\n"
	group  = "root:x:0:\napp:x:1001:\nextra:x:1500:app\nmore:x:1501:app,other\nother:x:1600:\n"
)

// Standard builds every image, by repository. guest is the path of the built
// guest program, as BuildGuest returns it.
func Standard(ctx context.Context, guest string) (map[string]*registry.Image, error) {
	program, err := os.ReadFile(guest)
	if err != nil {
		return nil, fmt.Errorf("guest: %w", err)
	}
	shell, err := busyboxLayer(ctx)
	if err != nil {
		return nil, err
	}
	guestLayer := registry.Layer{Compression: registry.Gzip, Files: []registry.File{
		{Name: "guest", Mode: 0o755, Data: program},
	}}
	suid := registry.Layer{Compression: registry.Gzip, Files: []registry.File{{Name: "guest-suid", Mode: 0o4755, Data: program}}}
	noise := make([]byte, LargeSize)
	chacha := rand.NewChaCha8([32]byte{'b', 'e', 'r', 't', 'h'})
	if _, err := chacha.Read(noise); err != nil {
		return nil, fmt.Errorf("noise: %w", err)
	}

	shellConfig := registry.Config{Cmd: []string{"sh"}, Env: []string{"PATH=/bin:/"}}
	specs := map[string]registry.Spec{
		Busybox: {Layers: []registry.Layer{shell, guestLayer, suid}, Config: shellConfig},
		Guest:   {Layers: []registry.Layer{guestLayer}, Config: registry.Config{Entrypoint: []string{"/guest"}}},
		Settings: {Layers: []registry.Layer{shell, guestLayer}, Config: registry.Config{
			User: "app", Env: []string{"PATH=/bin:/", "FROM_IMAGE=yes", "BOTH=image"}, WorkingDir: "/srv/data",
			Entrypoint: []string{"/bin/sh", "-c", `echo "$@"; pwd; id -u`, "entry"}, Cmd: []string{"default"},
			StopSignal: "SIGUSR1", Labels: map[string]string{"org.example.kind": "settings"},
			Volumes: map[string]struct{}{"/volume": {}},
		}},
		Layers:  {Layers: layered(shell), Config: shellConfig},
		Numeric: {Layers: []registry.Layer{shell}, Config: registry.Config{User: "4242:4243", Cmd: []string{"id"}, Env: []string{"PATH=/bin"}}},
		Large:   {Layers: []registry.Layer{{Files: []registry.File{{Name: "noise", Data: noise}}}}},
		Foreign: {Layers: []registry.Layer{shell}, Architecture: "s390x"},
	}
	out := map[string]*registry.Image{}
	for name, spec := range specs {
		if out[name], err = registry.Build(spec); err != nil {
			return nil, fmt.Errorf("image %s: %w", name, err)
		}
	}
	if out[Index], err = registry.NewIndex(out[Foreign], out[Busybox]); err != nil {
		return nil, fmt.Errorf("image %s: %w", Index, err)
	}
	return out, nil
}

// Push puts the images on the registry, each with the tag Tag.
func Push(s *registry.Server, images map[string]*registry.Image) {
	for name, img := range images {
		s.Push(name, Tag, img)
	}
}

// layered returns layers that together make sense only if whiteouts, opaque
// directories, links, attributes, devices and owners are all applied:
// /gone is absent, /hidden holds only "new", /kept holds "2".
func layered(shell registry.Layer) []registry.Layer {
	return []registry.Layer{
		shell,
		{Compression: registry.Gzip, Files: []registry.File{
			{Name: "gone", Data: []byte("1")},
			{Name: "kept", Data: []byte("1\n")},
			{Name: "hidden/"},
			{Name: "hidden/old", Data: []byte("1")},
			{Name: "tree/"},
			{Name: "tree/a", Data: []byte("linked\n"), UID: 12, GID: 34, Mode: 0o640},
			{Name: "tree/b", Type: tar.TypeLink, Link: "tree/a", UID: 12, GID: 34, Mode: 0o640},
			{Name: "tree/later/"},
			{Name: "tree/later/f", Data: []byte("x")},
			{Name: "null-device", Type: tar.TypeChar, Major: 1, Minor: 3, Mode: 0o666},
			{Name: "fifo", Type: tar.TypeFifo, Mode: 0o600},
		}},
		{Compression: registry.Zstd, Files: []registry.File{
			registry.Whiteout("gone"),
			{Name: "kept", Data: []byte("2\n")},
			{Name: "hidden/", Mode: 0o700},
			registry.Opaque("hidden"),
			{Name: "hidden/new", Data: []byte("2")},
			registry.Whiteout("tree/later"),
		}},
		{Compression: registry.Plain, Files: []registry.File{
			{Name: "capable", Mode: 0o755, Data: []byte("x"), Attributes: map[string]string{
				// CAP_NET_BIND_SERVICE, effective and permitted, in the kernel's revision 2 form.
				"security.capability": "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00",
			}},
			{Name: "escape", Type: tar.TypeSymlink, Link: "/etc/passwd"},
			{Name: "sticky/", Mode: 0o1777},
		}},
	}
}

// busyboxLayer returns a root with busybox, a link per applet, the users and
// the directories that programs expect.
func busyboxLayer(ctx context.Context) (registry.Layer, error) {
	bin, err := exec.LookPath("busybox")
	if err != nil {
		return registry.Layer{}, ErrNoBusybox
	}
	data, err := os.ReadFile(bin)
	if err != nil {
		return registry.Layer{}, fmt.Errorf("busybox: %w", err)
	}
	list, err := exec.CommandContext(ctx, bin, "--list").Output()
	if err != nil {
		return registry.Layer{}, fmt.Errorf("busybox --list: %w", err)
	}
	files := []registry.File{
		{Name: "bin/"}, {Name: "etc/"}, {Name: "dev/"}, {Name: "proc/"}, {Name: "sys/"}, {Name: "root/", Mode: 0o700},
		{Name: "home/"}, {Name: "home/app/", UID: 1000, GID: 1001}, {Name: "tmp/", Mode: 0o1777}, {Name: "srv/"}, {Name: "var/"},
		{Name: "etc/passwd", Data: []byte(passwd)}, {Name: "etc/group", Data: []byte(group)},
		{Name: "bin/busybox", Mode: 0o755, Data: data},
	}
	for _, applet := range strings.Fields(string(list)) {
		if applet != "busybox" {
			files = append(files, registry.File{Name: "bin/" + applet, Type: tar.TypeSymlink, Link: "busybox"})
		}
	}
	return registry.Layer{Files: files, Compression: registry.Gzip}, nil
}

// BuildGuest compiles test/guest statically into dir and returns its path.
// root is the root of the module's source.
func BuildGuest(ctx context.Context, root, dir string) (string, error) {
	out := filepath.Join(dir, "guest")
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w", "-o", out, "./test/guest")
	cmd.Dir, cmd.Env = root, append(os.Environ(), "CGO_ENABLED=0")
	if b, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("guest: %w: %s", err, b)
	}
	return out, nil
}
