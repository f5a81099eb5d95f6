package imageservice

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/berthd/berth/snapshotter/overlay"
	"github.com/berthd/berth/store"
	"github.com/berthd/berth/test/registry"
)

// pullerEnv makes this test binary a process that pulls, to be killed: "<dir>|<reference>".
const pullerEnv = "BERTH_TEST_PULLER"

func TestMain(m *testing.M) {
	if arg := os.Getenv(pullerEnv); arg != "" {
		fmt.Println(puller(arg))
		return
	}
	os.Exit(m.Run())
}

// puller pulls and removes images at random until it is killed, and returns what stopped it.
// It says "+<reference>" when a pull is done, and "-<reference>" before a removal.
func puller(arg string) error {
	dir, list, _ := strings.Cut(arg, "|")
	refs := strings.Fields(list)
	ctx := context.Background()
	book, err := store.Open(filepath.Join(dir, "book.db"))
	if err != nil {
		return err
	}
	sn, err := overlay.New(filepath.Join(dir, "state"), book)
	if err != nil {
		return err
	}
	s, err := New(ctx, Config{
		RegistriesConf: filepath.Join(dir, "registries.conf"), RegistriesConfDir: filepath.Join(dir, "registries.conf.d"),
		PolicyPath: filepath.Join(dir, "policy.json"),
		LayersDir:  filepath.Join(dir, "state", "layers"), ManifestsDir: filepath.Join(dir, "state", "manifests"),
	}, book, sn)
	if err != nil {
		return err
	}
	fmt.Println("ready")
	for {
		ref := refs[rand.IntN(len(refs))]
		if _, err := s.Pull(ctx, ref, nil); err != nil {
			return err
		}
		fmt.Println("+" + ref)
		if len(refs) > 1 && rand.IntN(2) == 0 {
			continue // several are there at the same time
		}
		fmt.Println("-" + ref)
		if err := s.Remove(ctx, ref); err != nil && !errors.Is(err, ErrNotFound) {
			return err
		}
	}
}

// TestKill: after a kill at any moment of pulling and removing, an image is whole or not
// there, and nothing is left over.
func TestKill(t *testing.T) {
	n := newNode(t)
	img := mustBuild(t, registry.Spec{Layers: []registry.Layer{
		layerOf(registry.Gzip, registry.File{Name: "a", Data: noise(300<<10, 1)}),
		layerOf(registry.Zstd, registry.File{Name: "b", Data: noise(200<<10, 2)}),
		layerOf(registry.Plain, registry.File{Name: "c", Data: noise(100<<10, 3)}),
	}})
	n.reg.Push("r", "v1", img)
	ref := n.reg.Ref("r", "v1")
	whole := 0
	for i := range 12 {
		n.close()
		pullAndKill(t, n.dir+"|"+ref, time.Duration(i*i)*2*time.Millisecond, nil)
		n.open()
		if err := n.sn.Cleanup(context.Background()); err != nil {
			t.Fatal(err)
		}
		got, err := n.Get(ref)
		if err == nil {
			whole++
			for name, want := range map[string][]byte{"a": noise(300<<10, 1), "b": noise(200<<10, 2), "c": noise(100<<10, 3)} {
				if b, _, err := n.readIn(got, name); err != nil || b != string(want) {
					t.Errorf("kill %d: %s is wrong: %d bytes, %v", i, name, len(b), err)
				}
			}
		}
		if kept, want := len(n.kept()), len(got.RepoTags)*3; kept != want {
			t.Errorf("kill %d: %d snapshots, want %d: %q", i, kept, want, n.kept())
		}
		dirs, err := os.ReadDir(filepath.Join(n.dir, "state", "layers"))
		if err != nil || len(dirs) != len(got.RepoTags)*3 {
			t.Errorf("kill %d: %d directories for %d images, %v", i, len(dirs), len(got.RepoTags), err)
		}
	}
	t.Logf("image whole after %d of 12 kills", whole)
	n.mustPull(ref)
}

// pullAndKill lets a puller work for a while, then calls end, if not nil, and kills it. It
// returns what was last said about each reference: '+' or '-'.
func pullAndKill(t *testing.T, arg string, after time.Duration, end func() error) map[string]byte {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), pullerEnv+"="+arg)
	if end == nil {
		cmd.Stderr = os.Stderr
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	if !lines.Scan() || lines.Text() != "ready" {
		t.Errorf("puller said %q", lines.Text())
	}
	said := map[string]byte{}
	var cut atomic.Bool
	read := make(chan struct{})
	go func() {
		defer close(read)
		for lines.Scan() {
			switch l := lines.Text(); {
			case cut.Load() && !strings.HasPrefix(l, "-"): // too late to be a promise
			case l != "" && (l[0] == '+' || l[0] == '-'):
				said[l[1:]] = l[0]
			default:
				t.Errorf("puller stopped by itself: %s", l)
			}
		}
	}()
	time.Sleep(after)
	if end != nil {
		cut.Store(true)
		if err := end(); err != nil {
			t.Error(err)
		}
	}
	if err := cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		t.Error(err)
	}
	<-read
	_ = cmd.Wait() // killed, as it says
	return said
}
