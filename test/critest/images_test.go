package critest

import (
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berthd/berth/test/images"
	"github.com/berthd/berth/test/registry"
)

func spec(ref string) *runtime.ImageSpec { return &runtime.ImageSpec{Image: ref} }

// imageStatus returns the image that ref means, nil if there is none.
func (b *box) imageStatus(ref string) *runtime.Image {
	b.Helper()
	r, err := b.client.Images.ImageStatus(b.ctx, &runtime.ImageStatusRequest{Image: spec(ref)})
	b.must(err)
	return r.Image
}

// pull pulls ref and returns the image's ID.
func (b *box) pull(ref string) string {
	b.Helper()
	id, err := b.client.Pull(b.ctx, ref)
	b.must(err)
	return id
}

// push puts a small image that no other test has into a repository of its
// own, with a tag "1", and removes it from the runtime after the test.
func (b *box) push(repo string) *registry.Image {
	b.Helper()
	img, err := registry.Build(registry.Spec{
		Layers: []registry.Layer{{Compression: registry.Gzip, Files: []registry.File{{Name: "name", Data: []byte(repo)}}}},
		Config: registry.Config{Cmd: []string{"/name"}},
	})
	b.must(err)
	b.registry.Push(repo, images.Tag, img)
	b.Cleanup(func() { b.dropImage(img.ConfigID) })
	return img
}

func (b *box) listed(filter string) []*runtime.Image {
	b.Helper()
	req := &runtime.ListImagesRequest{}
	if filter != "" {
		req.Filter = &runtime.ImageFilter{Image: spec(filter)}
	}
	r, err := b.client.Images.ListImages(b.ctx, req)
	b.must(err)
	return r.Images
}

func TestImageReferences(t *testing.T) {
	b := open(t)
	img := b.push("t/refs")
	tag, dig := b.ref("t/refs"), b.registry.Ref("t/refs", img.Digest)
	if id := b.pull(tag); id != img.ConfigID {
		t.Fatalf("pull answers %q, want the digest of the configuration, %q", id, img.ConfigID)
	}
	hex := strings.TrimPrefix(img.ConfigID, "sha256:")
	for _, ref := range []string{tag, dig, tag + "@" + img.Digest, img.ConfigID, hex} {
		got := b.imageStatus(ref)
		if got == nil || got.Id != img.ConfigID {
			t.Errorf("status of %s: %v", ref, got)
			continue
		}
		if !slices.Equal(got.RepoTags, []string{tag}) || !slices.Equal(got.RepoDigests, []string{dig}) {
			t.Errorf("tags %q, digests %q; want %q and %q", got.RepoTags, got.RepoDigests, tag, dig)
		}
		if got.Size == 0 || got.Pinned {
			t.Errorf("size %d, pinned %v", got.Size, got.Pinned)
		}
	}
	for _, ref := range []string{b.registry.Ref("t/refs", "2"), b.ref("t/other"), "sha256:" + strings.Repeat("0", 64), b.registry.Ref("t/refs", "sha256:"+strings.Repeat("0", 64))} {
		if got := b.imageStatus(ref); got != nil {
			t.Errorf("status of %s, which is not here: %v", ref, got)
		}
	}
	for _, filter := range []string{tag, dig, img.ConfigID} {
		if got := b.listed(filter); len(got) != 1 || got[0].Id != img.ConfigID {
			t.Errorf("list filtered by %s: %v", filter, got)
		}
	}
	if got := b.listed(b.ref("t/other")); len(got) != 0 {
		t.Errorf("list filtered by what is not here: %v", got)
	}
	if !slices.ContainsFunc(b.listed(""), func(i *runtime.Image) bool { return i.Id == img.ConfigID }) {
		t.Error("list without a filter lacks the image")
	}
}

func TestImageByDigest(t *testing.T) {
	b := open(t)
	img := b.push("t/digest")
	ref := b.registry.Ref("t/digest", img.Digest)
	if id := b.pull(ref); id != img.ConfigID {
		t.Errorf("pull answers %q, want %q", id, img.ConfigID)
	}
	got := b.imageStatus(ref)
	if got == nil || len(got.RepoTags) != 0 || !slices.Equal(got.RepoDigests, []string{ref}) {
		t.Errorf("status %v, want no tag and the digest %s", got, ref)
	}
	// Both at once: the digest decides.
	both := b.registry.Ref("t/digest", "no-such-tag") + "@" + img.Digest
	if id := b.pull(both); id != img.ConfigID {
		t.Errorf("pull by tag and digest answers %q", id)
	}
}

func TestImageTags(t *testing.T) {
	b := open(t)
	img := b.push("t/tags")
	for _, tag := range []string{"two", "three"} {
		b.registry.Push("t/tags", tag, img)
	}
	b.registry.Push("t/tags-elsewhere", "1", img)
	want := []string{b.ref("t/tags"), b.registry.Ref("t/tags", "two"), b.registry.Ref("t/tags", "three"), b.ref("t/tags-elsewhere")}
	for _, ref := range append(want, want[0]) { // again: a second pull changes nothing
		b.pull(ref)
	}
	got := b.imageStatus(img.ConfigID)
	slices.Sort(want)
	tags := slices.Sorted(slices.Values(got.GetRepoTags()))
	if !slices.Equal(tags, want) || len(got.GetRepoDigests()) != 2 {
		t.Errorf("tags %q, digests %q; want %q and two digests", tags, got.GetRepoDigests(), want)
	}
	b.dropImage(img.ConfigID)
	for _, ref := range append(want, img.ConfigID) {
		if got := b.imageStatus(ref); got != nil {
			t.Errorf("removed by ID, but %s is still %v", ref, got)
		}
	}
	b.dropImage(img.ConfigID) // idempotent
}

// TestImageTagMoves: a tag means what the registry said last; the image that
// it meant before stays, without it.
func TestImageTagMoves(t *testing.T) {
	b := open(t)
	old, next := b.push("t/moves"), b.push("t/moves-next")
	ref := b.ref("t/moves")
	b.pull(ref)
	b.registry.Push("t/moves", images.Tag, next)
	if id := b.pull(ref); id != next.ConfigID {
		t.Errorf("second pull answers %q, want %q", id, next.ConfigID)
	}
	if got := b.imageStatus(ref); got.GetId() != next.ConfigID {
		t.Errorf("the tag means %v", got)
	}
	if got := b.imageStatus(old.ConfigID); got == nil || len(got.RepoTags) != 0 || len(got.RepoDigests) != 1 {
		t.Errorf("the image before: %v, want it kept with its digest only", got)
	}
}

func TestImageUserInStatus(t *testing.T) {
	b := open(t)
	if got := b.imageStatus(b.ref(images.Settings)); got.GetUsername() != "app" || got.GetUid() != nil {
		t.Errorf("USER app: uid %v, user name %q", got.GetUid(), got.GetUsername())
	}
	if got := b.imageStatus(b.ref(images.Numeric)); got.GetUid().GetValue() != 4242 || got.GetUsername() != "" {
		t.Errorf("USER 4242:4243: uid %v, user name %q", got.GetUid(), got.GetUsername())
	}
}

func TestImageVerboseStatus(t *testing.T) {
	b := open(t)
	r, err := b.client.Images.ImageStatus(b.ctx, &runtime.ImageStatusRequest{Image: spec(b.ref(images.Settings)), Verbose: true})
	b.must(err)
	all := ""
	for _, v := range r.Info {
		all += v
	}
	if !strings.Contains(all, "FROM_IMAGE=yes") {
		t.Errorf("info %q lacks the image's configuration", all)
	}
}

func TestImageIndex(t *testing.T) {
	b := open(t)
	if id := b.pull(b.ref(images.Index)); id != b.images[images.Busybox].ConfigID {
		t.Errorf("pull of an index answers %q, want this machine's image %q", id, b.images[images.Busybox].ConfigID)
	}
	dig := b.registry.Ref(images.Index, b.images[images.Index].Digest)
	if got := b.imageStatus(dig); got.GetId() != b.images[images.Busybox].ConfigID || !slices.Contains(got.RepoDigests, dig) {
		t.Errorf("status by the digest of the index: %v", got)
	}
}

// TestImageLayers: all that layers can hold has arrived in the container.
func TestImageLayers(t *testing.T) {
	b := open(t)
	c := b.pod().run(sh("sleep 300"), b.image(images.Layers))
	for _, x := range []struct{ script, want string }{
		{"ls -d /gone /tree/later 2>/dev/null || true", ""},
		{"cat /kept", "2\n"},
		{"ls -A /hidden", "new\n"},
		{"stat -c '%a' /hidden /sticky", "700\n1777\n"},
		{"stat -c '%u %g %a %h' /tree/a", "12 34 640 2\n"},
		{"[ /tree/a -ef /tree/b ] && cat /tree/b", "linked\n"},
		{"stat -c '%F %t %T' /null-device", "character special file 1 3\n"},
		{"stat -c '%F' /fifo", "fifo\n"},
		{"readlink /escape", "/etc/passwd\n"},
		{"ls /.wh* /*/.wh* 2>/dev/null || true", ""},
		{"stat -c '%Y' /kept", "1700000000\n"},
		{"echo changed > /kept && cat /kept && ls /kept", "changed\n/kept\n"},
	} {
		if got := c.exec("sh", "-c", x.script); got != x.want {
			t.Errorf("%s: %q, want %q", x.script, got, x.want)
		}
	}
	// A second container of the image does not see the first one's change.
	if got := c.pod.output([]string{"cat", "/kept"}, b.image(images.Layers)); got != "2\n" {
		t.Errorf("second container: %q", got)
	}
	// The file capability lets a user without rights bind a low port; it can
	// be read only as an extended attribute.
	if b.node != nil {
		b.fileCapability()
	}
}

// fileCapability looks for the attribute in the layers on the host: busybox
// has no getfattr.
func (b *box) fileCapability() {
	b.Helper()
	found := false
	layers, err := os.ReadDir(b.node.StateDir + "/layers")
	b.must(err)
	for _, l := range layers {
		for _, sub := range []string{"", "/fs", "/root"} {
			if v, err := xattr(b.node.StateDir+"/layers/"+l.Name()+sub+"/capable", "security.capability"); err == nil && len(v) == 20 {
				found = true
			}
		}
	}
	if !found {
		b.Error("no layer has the file with its capability")
	}
}

// TestImageRemovedInUse: what runs goes on when its image is removed.
func TestImageRemovedInUse(t *testing.T) {
	b := open(t)
	img, err := b.images[images.Busybox].WithConfig(registry.Config{Cmd: []string{"sleep", "300"}, Env: []string{"PATH=/bin", "IN_USE=1"}})
	b.must(err)
	b.registry.Push("t/in-use", images.Tag, img)
	b.pull(b.ref("t/in-use"))
	c := b.pod().run(nil, b.image("t/in-use"))
	b.dropImage(img.ConfigID)
	if got := c.exec("sh", "-c", "ls /bin/busybox; echo $IN_USE"); got != "/bin/busybox\n1\n" {
		t.Errorf("container of a removed image: %q", got)
	}
	if st := c.status(); st.State != running || st.ImageId != img.ConfigID {
		t.Errorf("container of a removed image: %v, image ID %q", st.State, st.ImageId)
	}
}

func TestImageFilesystem(t *testing.T) {
	b := open(t)
	r, err := b.client.Images.ImageFsInfo(b.ctx, &runtime.ImageFsInfoRequest{})
	b.must(err)
	if len(r.ImageFilesystems) == 0 { // those of containers are optional
		t.Fatalf("file systems %v", r)
	}
	fs := r.ImageFilesystems[0]
	if st, err := os.Stat(fs.GetFsId().GetMountpoint()); err != nil || !st.IsDir() {
		t.Errorf("mount point %q: %v", fs.GetFsId().GetMountpoint(), err)
	}
	if fs.GetUsedBytes().GetValue() < 1<<20 || fs.GetInodesUsed().GetValue() < 100 {
		t.Errorf("used: %d bytes, %d inodes, with images of busybox here", fs.GetUsedBytes().GetValue(), fs.GetInodesUsed().GetValue())
	}
	if at := time.Unix(0, fs.Timestamp); time.Since(at) > 5*time.Minute || at.After(time.Now().Add(time.Second)) {
		t.Errorf("measured at %v", at)
	}
}

func TestImageBadReferences(t *testing.T) {
	b := open(t)
	b.ours()
	long := "example.org/" + strings.Repeat("a", 300)
	for _, ref := range []string{"UPPER/case", "a b", "example.org/x@sha256:123", "http://example.org/x", "example.org/x:", "example.org/x:-", "-x", "example.org//x", "x\n", long} {
		_, err := b.client.Pull(b.ctx, ref)
		b.refused(err, codes.InvalidArgument)
		if err != nil && ref != "x\n" && ref != long && !strings.Contains(err.Error(), ref) {
			t.Errorf("pull of %q: error does not name it: %v", ref, err)
		}
	}
	_, err := b.client.Pull(b.ctx, "")
	b.refused(err, codes.InvalidArgument, "image")
	_, err = b.client.Images.PullImage(b.ctx, &runtime.PullImageRequest{})
	b.refused(err, codes.InvalidArgument, "image")
	_, err = b.client.Images.RemoveImage(b.ctx, &runtime.RemoveImageRequest{})
	b.refused(err, codes.InvalidArgument, "image")
}
