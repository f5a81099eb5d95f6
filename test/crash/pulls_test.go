package crash

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berthd/berth/test/node"
	"github.com/berthd/berth/test/registry"
)

// pullKillsEnv is how often TestPullKilled kills berthd in a pull.
const pullKillsEnv = "BERTH_PULL_KILLS"

// pullable is an image and how many layers it has.
type pullable struct {
	ref    string
	img    *registry.Image
	layers int
}

// pushPullables offers three images that share layers.
func (r *rig) pushPullables() (out []pullable) {
	r.Helper()
	noise := func(n int, seed uint64) []byte {
		b := make([]byte, n)
		c := rand.NewChaCha8([32]byte{byte(seed)})
		_, err := c.Read(b)
		r.must(err)
		return b
	}
	many := make([]registry.File, 300)
	for i := range many {
		many[i] = registry.File{Name: fmt.Sprintf("many/%d", i), Data: noise(100+13*i, uint64(i))}
	}
	for i := range 3 {
		layers := []registry.Layer{{Compression: registry.Gzip, Files: []registry.File{{Name: "base", Data: noise(2<<20, 1)}}}}
		if i > 0 {
			layers = append(layers, registry.Layer{Compression: registry.Zstd, Files: many})
		}
		layers = append(layers, registry.Layer{Compression: registry.Gzip, Files: []registry.File{{Name: "own", Data: noise(1<<20, uint64(10+i))}}})
		img, err := registry.Build(registry.Spec{Config: registry.Config{User: strconv.Itoa(i)}, Layers: layers})
		r.must(err)
		repo := fmt.Sprintf("killed/%d", i)
		reg.Push(repo, "1", img)
		out = append(out, pullable{reg.Ref(repo, "1"), img, len(layers)})
	}
	return out
}

// TestPullKilled kills berthd at a random moment of a pull, starts it again, and pulls
// again: images that are listed are whole to the last byte, before and after, and when they
// are removed nothing is left of any attempt.
func TestPullKilled(t *testing.T) {
	t.Parallel()
	kills := numberOf(t, pullKillsEnv, 4)
	r := newNode(t, node.Options{})
	r.must(r.Start(r.ctx))
	all := r.pushPullables()
	took := time.Hour
	for range 3 {
		took = min(took, r.pullAndRemove(all[2]))
	}
	seed := uint64(time.Now().UnixNano())
	t.Logf("%d kills, seed %d, a pull takes %v", kills, seed, took.Round(time.Millisecond))
	rnd := rand.New(rand.NewPCG(seed, 0))
	done := 0
	for i := range kills {
		one := all[rnd.IntN(len(all))]
		// Layers that it shares with another image may be there, its name is not.
		r.removeImage(one)
		moment := time.Duration(rnd.Int64N(int64(took)))
		if r.killInPull(one, moment) {
			done++
		}
		for _, p := range all { // what another one left, by its shared layers, is to be used
			if p == one || rnd.IntN(3) == 0 {
				_, err := r.client.Pull(r.ctx, p.ref)
				r.must(err)
			}
		}
		r.verifyAll(i)
		if rnd.IntN(2) == 0 {
			r.removeAll(i, all)
		}
		if t.Failed() {
			t.Fatalf("kill %d, %v into the pull of %s", i+1, moment, one.ref)
		}
	}
	r.removeAll(kills, all)
	r.must(r.Stop(r.ctx))
	rows, err := r.Rows()
	r.must(err)
	for _, row := range rows {
		t.Errorf("after the removal of all images: %s", row)
	}
	t.Logf("%d kills, in %d of which the pull was done already", kills, done)
}

// pullAndRemove returns how long an undisturbed pull takes.
func (r *rig) pullAndRemove(p pullable) time.Duration {
	r.Helper()
	began := time.Now()
	_, err := r.client.Pull(r.ctx, p.ref)
	r.must(err)
	took := time.Since(began)
	r.removeAll(-1, []pullable{p})
	return took
}

// killInPull tells whether the image was there after the restart.
func (r *rig) killInPull(p pullable, moment time.Duration) bool {
	r.Helper()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_, _ = r.client.Pull(r.ctx, p.ref) // its connection breaks, or it was done before
	}()
	time.Sleep(moment)
	r.must(r.Kill())
	<-ended
	r.must(r.Start(r.ctx))
	r.client.Reset()
	st, err := r.client.Images.ImageStatus(r.ctx, &runtime.ImageStatusRequest{Image: &runtime.ImageSpec{Image: p.ref}})
	r.must(err)
	if st.Image != nil {
		r.verifyAll(-1)
	}
	return st.Image != nil
}

// verifyAll compares all layers with their manifests.
func (r *rig) verifyAll(i int) {
	r.Helper()
	ctx, cancel := context.WithTimeout(r.ctx, time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, filepath.Join(bin, "berth"), "image", "verify", "--config", r.Config).CombinedOutput()
	if err != nil {
		r.Errorf("after kill %d: verify: %v: %s", i+1, err, out)
	}
}

func (r *rig) removeImage(p pullable) {
	r.Helper()
	_, err := r.client.Images.RemoveImage(r.ctx, &runtime.RemoveImageRequest{Image: &runtime.ImageSpec{Image: p.img.ConfigID}})
	r.must(err)
}

// removeAll removes the images and looks for what is left of them, or of attempts.
func (r *rig) removeAll(i int, all []pullable) {
	r.Helper()
	for _, p := range all {
		r.removeImage(p)
	}
	for _, dir := range []string{"layers", "manifests", "snapshots"} {
		left := 0
		for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
			entries, err := os.ReadDir(filepath.Join(r.StateDir, dir))
			r.must(err)
			if left = len(entries); left == 0 {
				break // what a kill left is swept in the background
			}
		}
		if left != 0 {
			r.Errorf("after kill %d and the removal of all images %d entries are in %s", i+1, left, dir)
		}
	}
}
