package imageservice

import (
	"context"
	"errors"
	"slices"
	"testing"
)

// TestRemoveNames: what goes with a tag, a repo digest and an ID.
func TestRemoveNames(t *testing.T) {
	n := newNode(t)
	ctx := context.Background()
	img := sample(t, "x")
	other := sample(t, "other")
	for _, repo := range []string{"a", "b"} {
		n.reg.Push(repo, "v1", img)
		n.reg.Push(repo, "v2", img)
	}
	n.reg.Push("o", "v1", other)
	tag := func(repo, tag string) string { return n.reg.Ref(repo, tag) }
	digest := func(repo string) string {
		named, err := parseReference(n.reg.Ref(repo, "v1"), "")
		if err != nil {
			t.Fatal(err)
		}
		return named.Name() + "@" + img.Digest
	}
	a1, a2, b1 := tag("a", "v1"), tag("a", "v2"), tag("b", "v1")
	for _, tc := range []struct {
		name   string
		pull   []string
		remove string
		want   []string // names left
	}{
		{"one of two tags", []string{a1, a2}, a1, []string{a2, digest("a")}},
		{"the only tag", []string{a1}, a1, nil},
		{"the only tag of a repository", []string{a1, b1}, a1, []string{b1, digest("b")}},
		{"a tag beside a digest that was pulled", []string{a1, digest("b")}, a1, []string{digest("b")}},
		{"the digest of the only repository", []string{a1, a2}, digest("a"), nil},
		{"the digest of one of two", []string{a1, a2, b1}, digest("a"), []string{b1, digest("b")}},
		{"a tag with the digest", []string{a1, a2}, a1 + "@" + img.Digest, nil},
		{"the ID", []string{a1, a2, b1}, img.ConfigID, nil},
		{"the digits of the ID", []string{a1, b1}, img.ConfigID[len("sha256:"):], nil},
		{"the beginning of the ID", []string{a1, b1}, img.ConfigID[len("sha256:"):][:12], nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n.mustPull(tag("o", "v1"))
			for _, ref := range tc.pull {
				n.mustPull(ref)
			}
			if err := n.Remove(ctx, tc.remove); err != nil {
				t.Fatal(err)
			}
			if _, err := n.Get(tc.remove); !errors.Is(err, ErrNotFound) {
				t.Errorf("the name that was removed: %v", err)
			}
			got, err := n.Get(img.ConfigID)
			if (err == nil) != (tc.want != nil) {
				t.Fatalf("image: %v; names left: %q", err, tc.want)
			}
			left := slices.Concat(got.RepoTags, got.RepoDigests)
			slices.Sort(left)
			slices.Sort(tc.want)
			if !slices.Equal(left, tc.want) {
				t.Errorf("left %q, want %q", left, tc.want)
			}
			if err := n.Remove(ctx, tag("a", "v9")); !errors.Is(err, ErrNotFound) {
				t.Errorf("removal of a tag that is not there: %v", err)
			}
			if err := n.Remove(ctx, img.ConfigID); (err == nil) != (tc.want != nil) {
				t.Errorf("removal of the rest: %v", err)
			}
			if kept := n.kept(); len(kept) != len(other.Layers) {
				t.Errorf("kept %q", kept)
			}
			if _, err := n.Get(tag("o", "v1")); err != nil {
				t.Errorf("the image beside: %v", err)
			}
		})
	}
}

// TestRemoveNameInUse: while a container uses an image, one name goes like any; with the last
// one the image stays for the container only, and a pin does not outlive it.
func TestRemoveNameInUse(t *testing.T) {
	n := newNode(t)
	ctx := context.Background()
	img := sample(t, "x")
	n.reg.Push("a", "v1", img)
	n.reg.Push("a", "v2", img)
	n.mustPull(n.reg.Ref("a", "v1"))
	n.mustPull(n.reg.Ref("a", "v2"))
	if _, err := n.Pin(img.ConfigID, true); err != nil {
		t.Fatal(err)
	}
	n.SetInUse(func() map[string]bool { return map[string]bool{img.ConfigID: true} })
	if err := n.Remove(ctx, n.reg.Ref("a", "v1")); err != nil {
		t.Fatal(err)
	}
	if got, err := n.Get(img.ConfigID); err != nil || !got.Pinned || len(got.RepoTags) != 1 {
		t.Errorf("after the first name: %+v, %v", got, err)
	}
	if err := n.Remove(ctx, n.reg.Ref("a", "v2")); err != nil {
		t.Fatal(err)
	}
	if _, err := n.Get(img.ConfigID); !errors.Is(err, ErrNotFound) || len(n.kept()) != len(img.Layers) {
		t.Errorf("after the last name: %v, layers %q", err, n.kept())
	}
	if got := n.mustPull(n.reg.Ref("a", "v1")); got.Pinned || len(got.RepoTags) != 1 {
		t.Errorf("pulled again: %+v", got)
	}
}
