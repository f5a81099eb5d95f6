package critest

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berthd/berth/test/images"
	"github.com/berthd/berth/test/registry"
)

func xattr(path, name string) ([]byte, error) {
	buf := make([]byte, 256)
	n, err := unix.Lgetxattr(path, name, buf)
	if err != nil {
		return nil, err
	}
	return buf[:n], nil
}

// broken pushes an image into a repository with a fault.
func (b *box) broken(repo string, f registry.Fault) (ref string, img *registry.Image) {
	b.Helper()
	img = b.push(repo)
	b.registry.SetFault(repo, f)
	return b.ref(repo), img
}

// absent checks that a failed pull has left no image to be seen.
func (b *box) absent(ref string, img *registry.Image) {
	b.Helper()
	for _, r := range []string{ref, img.ConfigID} {
		if got := b.imageStatus(r); got != nil {
			b.Errorf("%s is there: %v", r, got)
		}
	}
}

// unavailable checks for an error of a registry that does not do its work. The
// kubelet looks at the beginning of the text, and sees it only if the code is
// Unknown.
func (b *box) unavailable(err error, parts ...string) {
	b.Helper()
	b.refused(err, codes.Unknown, parts...)
	if text := status.Convert(err).Message(); !strings.HasPrefix(text, "RegistryUnavailable") {
		b.Errorf("error does not begin with RegistryUnavailable: %s", text)
	}
}

func TestPullMissing(t *testing.T) {
	b := open(t)
	b.push("t/missing")
	for _, ref := range []string{b.registry.Ref("t/missing", "no-such-tag"), b.ref("t/no-such-repository"), b.registry.Ref("t/missing", "sha256:"+strings.Repeat("0", 64))} {
		_, err := b.client.Pull(b.ctx, ref)
		b.refused(err, codes.NotFound, ref)
	}
}

func TestPullWrongDigest(t *testing.T) {
	b := open(t)
	ref, img := b.broken("t/wrong-layer", registry.Fault{WrongBlob: true})
	_, err := b.client.Pull(b.ctx, ref)
	if err == nil {
		t.Fatal("a layer with a wrong digest was accepted")
	}
	if b.node != nil {
		b.refused(err, codes.DataLoss, ref, "digest", img.Layers[0].Digest)
	}
	b.absent(ref, img)
	_, other := b.broken("t/wrong-manifest", registry.Fault{WrongManifest: true})
	byDigest := b.registry.Ref("t/wrong-manifest", other.Digest)
	if _, err := b.client.Pull(b.ctx, byDigest); err == nil {
		t.Error("a manifest with a wrong digest was accepted")
	}
	b.absent(byDigest, other)
	b.registry.SetFault("t/wrong-layer", registry.Fault{})
	if id := b.pull(ref); id != img.ConfigID {
		t.Errorf("healed: %q", id)
	}
}

func TestPullDroppedConnection(t *testing.T) {
	b := open(t)
	ref, img := b.broken("t/dropped", registry.Fault{DropAfter: 20, DropTimes: -1, NoRange: true})
	_, err := b.client.Pull(b.ctx, ref)
	if err == nil {
		t.Fatal("half a layer was accepted")
	}
	if b.node != nil {
		b.unavailable(err, ref)
	}
	b.absent(ref, img)
	b.registry.SetFault("t/dropped", registry.Fault{})
	if id := b.pull(ref); id != img.ConfigID {
		t.Errorf("healed: %q", id)
	}
}

// TestPullRegistryError: codes follow the HTTP status, so that the kubelet can
// tell a registry that is down from a pull that can never work.
func TestPullRegistryError(t *testing.T) {
	b := open(t)
	b.ours()
	for s, want := range map[int]codes.Code{401: codes.Unauthenticated, 403: codes.Unauthenticated, 404: codes.NotFound, 429: codes.Unknown, 500: codes.Unknown, 503: codes.Unknown} {
		ref, img := b.broken(fmt.Sprintf("t/status%d", s), registry.Fault{Status: s})
		_, err := b.client.Pull(b.ctx, ref)
		if want == codes.Unknown {
			b.unavailable(err, ref)
		} else if got := status.Code(err); got != want || !strings.Contains(err.Error(), ref) {
			t.Errorf("HTTP status %d: code %v, want %v and the image's name: %v", s, got, want, err)
		}
		b.absent(ref, img)
	}
	_, err := b.client.Pull(b.ctx, "127.0.0.1:1/nobody/listens:1")
	b.unavailable(err, "127.0.0.1:1")
}

func TestPullAuth(t *testing.T) {
	b := open(t)
	// A registry of its own: it asks for credentials from the first request on.
	own, err := registry.Start()
	b.must(err)
	t.Cleanup(func() { _ = own.Close() })
	s := *b.suite
	s.registry = own
	b.suite = &s
	try := func(ref string, auth *runtime.AuthConfig) error {
		_, err := b.client.Images.PullImage(b.ctx, &runtime.PullImageRequest{Image: spec(ref), Auth: auth})
		return err
	}
	for _, c := range []struct {
		name  string
		fault registry.Fault
	}{
		{"basic", registry.Fault{Username: "user", Password: "pass:word"}},
		{"bearer", registry.Fault{Username: "user", Password: "pass:word", Token: "a-token"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := b.with(t)
			b.registry.SetFault("", c.fault)
			ref, img := b.broken("t/auth-"+c.name, c.fault)
			for name, auth := range map[string]*runtime.AuthConfig{
				"none":           nil,
				"wrong password": {Username: "user", Password: "sesame"},
			} {
				err := try(ref, auth)
				if err == nil {
					t.Errorf("%s: no error", name)
				} else if b.node != nil {
					b.refused(err, codes.Unauthenticated, ref)
				}
				if err != nil && strings.Contains(err.Error(), "sesame") {
					t.Errorf("%s: the error tells the password: %v", name, err)
				}
				b.absent(ref, img)
			}
			for name, auth := range map[string]*runtime.AuthConfig{
				"user and password":         {Username: "user", Password: "pass:word"},
				"auth":                      {Auth: registry.BasicAuth("user", "pass:word")},
				"with the server's address": {Username: "user", Password: "pass:word", ServerAddress: b.registry.Addr()},
			} {
				if err := try(ref, auth); err != nil {
					t.Errorf("%s: %v", name, err)
				}
				b.dropImage(img.ConfigID)
			}
		})
	}
	t.Run("registry token", func(t *testing.T) {
		b := b.with(t)
		fault := registry.Fault{Username: "user", Password: "x", Token: "given-token"}
		b.registry.SetFault("", fault)
		ref, _ := b.broken("t/auth-token", fault)
		if err := try(ref, &runtime.AuthConfig{RegistryToken: "given-token"}); err != nil {
			t.Error(err)
		}
	})
	t.Run("auth of no form", func(t *testing.T) {
		b := b.with(t)
		b.ours()
		ref, _ := b.broken("t/auth-form", registry.Fault{Username: "user", Password: "x"})
		b.refused(try(ref, &runtime.AuthConfig{Auth: "%%%"}), codes.InvalidArgument, "auth")
	})
}

func TestPullForeignPlatform(t *testing.T) {
	b := open(t)
	b.ours()
	only, err := registry.NewIndex(b.images[images.Foreign])
	b.must(err)
	b.registry.Push("t/foreign", images.Tag, only)
	_, err = b.client.Pull(b.ctx, b.ref("t/foreign"))
	if err == nil {
		b.dropImage(b.ref("t/foreign"))
		t.Fatal("an image for another platform was pulled")
	}
	b.refused(err, status.Code(err), b.ref("t/foreign"))
	if c := status.Code(err); c == codes.Unknown || c == codes.Internal || c == codes.Unavailable {
		t.Errorf("code %v: the kubelet would take it for a passing trouble: %v", c, err)
	}
}

// TestPullHanging: a registry that does not answer holds up its own pull only,
// and the caller that gives up is told at once.
func TestPullHanging(t *testing.T) {
	b := open(t)
	ref, img := b.broken("t/hanging", registry.Fault{Hang: true})
	ctx, cancel := context.WithTimeout(b.ctx, 2*time.Second)
	defer cancel()
	done := make(chan error, 1)
	begin := time.Now()
	go func() { _, err := b.client.Pull(ctx, ref); done <- err }()
	time.Sleep(300 * time.Millisecond)
	b.listed("")
	b.absent(ref, img)
	other := b.push("t/not-hanging")
	b.pull(b.ref("t/not-hanging"))
	if d := time.Since(begin); d > 1900*time.Millisecond {
		t.Errorf("a list, a status and another pull took %v beside a pull that hangs", d)
	}
	if got := b.imageStatus(other.ConfigID); got == nil {
		t.Error("the other image is not there")
	}
	b.refused(<-done, codes.DeadlineExceeded)
	if d := time.Since(begin); d > 4*time.Second {
		t.Errorf("the caller waited %v, its deadline was 2 s", d)
	}
	b.registry.SetFault("t/hanging", registry.Fault{})
	b.pull(ref) // joins what is still under way
}

// TestPullOnce: pulls of the same image at the same time fetch each layer once,
// and nobody sees the image before it is whole.
func TestPullOnce(t *testing.T) {
	b := open(t)
	b.ours()
	img, err := registry.Build(registry.Spec{Layers: []registry.Layer{
		{Files: []registry.File{{Name: "once", Data: []byte(strings.Repeat("once", 50000))}}},
	}})
	b.must(err)
	b.registry.Push("t/once", images.Tag, img)
	b.registry.SetFault("t/once", registry.Fault{Rate: 100_000}) // about two seconds
	ref := b.ref("t/once")
	b.Cleanup(func() { b.dropImage(ref) })
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			if id, err := b.client.Pull(b.ctx, ref); err != nil || id != img.ConfigID {
				t.Errorf("pull: %q, %v", id, err)
			}
		})
	}
	time.Sleep(700 * time.Millisecond)
	b.absent(ref, img)
	wg.Wait()
	n := 0
	for _, r := range b.registry.Requests() {
		if r == "GET /v2/t/once/blobs/"+img.Layers[0].Digest {
			n++
		}
	}
	if n != 1 {
		t.Errorf("the layer was fetched %d times by 4 pulls at the same time, want once", n)
	}
}
