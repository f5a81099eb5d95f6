package critest

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"google.golang.org/grpc/codes"

	"github.com/berthd/berth/test/images"
	"github.com/berthd/berth/test/node"
	"github.com/berthd/berth/test/registry"
)

// withMirrors is a box with a daemon of its own, whose hosts.toml and registries.conf the
// test writes.
func withMirrors(t *testing.T) (own *box, write func(name, text string)) {
	t.Helper()
	b := open(t)
	b.ours()
	dir := t.TempDir()
	write = func(name, text string) {
		t.Helper()
		p := filepath.Join(dir, name)
		b.must(os.MkdirAll(filepath.Dir(p), 0o755))
		b.must(os.WriteFile(p, []byte(text), 0o600))
	}
	write("registries.conf", "")
	return b.ownNode(b.ctx, node.Options{
		RegistriesConf: filepath.Join(dir, "registries.conf"),
		Config:         fmt.Sprintf("hosts_dir = %q\npull_stall_timeout = \"2s\"\npull_retries = 2\n", filepath.Join(dir, "certs.d")),
	}), write
}

// TestMirrors: an image is had from mirrors under its own name, whatever they do, and
// their configuration counts from the next pull on.
func TestMirrors(t *testing.T) {
	b, write := withMirrors(t)
	mirror, err := registry.Start()
	b.must(err)
	t.Cleanup(func() { mirror.Close() })
	img, err := registry.Build(registry.Spec{Layers: []registry.Layer{{Files: []registry.File{{Name: "f", Data: make([]byte, 3<<20)}}}}})
	b.must(err)
	for _, r := range []*registry.Server{mirror, b.registry} {
		r.Push("t/mirrored", "1", img)
	}
	const ref = "mirrored.example/t/mirrored:1"
	_, err = b.client.Pull(b.ctx, ref)
	b.unavailable(err, "mirrored.example")
	hosts := fmt.Sprintf("server = \"http://%s\"\n[host.\"http://%s\"]\n", b.registry.Addr(), mirror.Addr())
	for _, f := range []registry.Fault{
		{}, {Status: 500}, {Status: 403}, {WrongBlob: true}, {DropAfter: 1000, DropTimes: -1}, {DropAfter: 1000, DropTimes: -1, NoRange: true}, {Hang: true}, {Rate: 300},
	} {
		write("certs.d/mirrored.example/hosts.toml", hosts)
		mirror.SetFault("t/mirrored", f)
		before := len(mirror.Requests())
		if id := b.pull(ref); id != img.ConfigID {
			t.Errorf("%+v: pull answers %q, want %q", f, id, img.ConfigID)
		}
		got := b.imageStatus(ref)
		if got == nil || len(got.RepoTags) != 1 || got.RepoTags[0] != ref || got.RepoDigests[0] != "mirrored.example/t/mirrored@"+img.Digest {
			t.Errorf("%+v: status %v", f, got)
		}
		if len(mirror.Requests()) == before {
			t.Errorf("%+v: the mirror was not asked", f)
		}
		b.dropImage(ref)
	}
	// Not everything that fails is worth another try elsewhere.
	write("certs.d/mirrored.example/hosts.toml", "server = \"http://"+b.registry.Addr()+"\"\ncapabilites = []\n")
	if _, err = b.client.Pull(b.ctx, ref); err == nil {
		t.Error("a typing error in hosts.toml goes unnoticed")
	}
	b.refused(err, codes.Unknown, "capabilites", "mirrored.example/hosts.toml")
	// A [[registry]] decides alone.
	write("registries.conf", fmt.Sprintf("[[registry]]\nprefix = \"mirrored.example\"\nlocation = %q\ninsecure = true\n", b.registry.Addr()))
	b.pull(ref)
	b.dropImage(ref)
	write("registries.conf", "[[registry]]\nlocation = \"mirrored.example\"\nblocked = true\n")
	_, err = b.client.Pull(b.ctx, ref)
	b.refused(err, codes.Unknown, "SignatureValidationFailed", "blocked")
	b.absent(ref, img)
}

// TestShortNames: what registries.conf says about names without a registry.
func TestShortNames(t *testing.T) {
	b, write := withMirrors(t)
	insecure := fmt.Sprintf("[[registry]]\nlocation = %q\ninsecure = true\n", b.registry.Addr())
	img := b.images[images.Layers]
	write("registries.conf", fmt.Sprintf("[aliases]\n\"nick\" = \"%s/%s\"\n%s", b.registry.Addr(), images.Layers, insecure))
	full := b.ref(images.Layers)
	if id := b.pull("nick:" + images.Tag); id != img.ConfigID {
		t.Errorf("alias: %q", id)
	}
	for _, ref := range []string{"nick:" + images.Tag, full} {
		if got := b.imageStatus(ref); got == nil || got.Id != img.ConfigID || got.RepoTags[0] != full {
			t.Errorf("status of %s: %v", ref, got)
		}
	}
	b.dropImage("nick:" + images.Tag)
	if got := b.imageStatus(full); got != nil {
		t.Errorf("removed by its alias, still there: %v", got)
	}
	write("registries.conf", fmt.Sprintf("unqualified-search-registries = [\"127.0.0.1:1\", %q]\n%s", b.registry.Addr(), insecure))
	short := images.Layers + ":" + images.Tag
	if id := b.pull(short); id != img.ConfigID {
		t.Errorf("searched: %q", id)
	}
	if got := b.imageStatus(short); got == nil || got.RepoTags[0] != full {
		t.Errorf("status of %s: %v", short, got)
	}
	write("registries.conf", fmt.Sprintf("short-name-mode = \"enforcing\"\nunqualified-search-registries = [\"127.0.0.1:1\", %q]\n%s", b.registry.Addr(), insecure))
	_, err := b.client.Pull(b.ctx, short)
	b.refused(err, codes.InvalidArgument, "short-name-mode", b.registry.Addr())
}
