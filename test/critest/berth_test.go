package critest

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berthd/berth/test/images"
	"github.com/berthd/berth/test/registry"
)

// berthTool runs the administrator's tool on the node of the suite and returns what it
// wrote and its exit code.
func (b *box) berthTool(args ...string) (out, errOut string, code int) {
	b.Helper()
	out, errOut, code, err := b.node.Tool(b.ctx, args...)
	b.must(err)
	return out, errOut, code
}

// berth runs it and wants success.
func (b *box) berth(args ...string) string {
	b.Helper()
	out, errOut, code := b.berthTool(args...)
	if code != 0 {
		b.Fatalf("berth %s: exit %d: %s %s", strings.Join(args, " "), code, out, errOut)
	}
	return out
}

func TestBerthImages(t *testing.T) {
	b := open(t)
	b.ours()
	img := b.push("t/tool")
	ref := b.ref("t/tool")
	if out := b.berth("image", "pull", ref); !strings.Contains(out, img.ConfigID) {
		t.Errorf("pull prints %q, want %s", out, img.ConfigID)
	}
	if out := b.berth("image", "ls", ref); !strings.Contains(out, ref) {
		t.Errorf("ls prints %q", out)
	}
	b.berth("image", "pin", ref)
	if got := b.imageStatus(ref); got == nil || !got.Pinned {
		t.Errorf("after pin: %v", got)
	}
	if out, errOut, code := b.berthTool("image", "rm", ref); code != 1 || !strings.Contains(errOut, "pinned") {
		t.Errorf("rm of a pinned image: exit %d, %q %q", code, out, errOut)
	}
	b.berth("image", "unpin", ref)
	if got := b.imageStatus(ref); got == nil || got.Pinned {
		t.Errorf("after unpin: %v", got)
	}
	b.berth("image", "rm", ref)
	if got := b.imageStatus(ref); got != nil {
		t.Errorf("after rm: %v", got)
	}
	if _, errOut, code := b.berthTool("image", "ls", ref); code != 4 || !strings.Contains(errOut, "not found") {
		t.Errorf("ls of a removed image: exit %d, %q", code, errOut)
	}
	if _, errOut, code := b.berthTool("image", "pull", b.ref("t/no-such")); code != 4 {
		t.Errorf("pull of what is not there: exit %d, %q", code, errOut)
	}
}

// archive writes files as a tar archive into the node's directory under a name.
func (b *box) archive(path string, files map[string][]byte, err error) string {
	b.Helper()
	b.must(err)
	f, err := os.Create(path)
	b.must(err)
	b.must(errors.Join(registry.Tar(f, files), f.Close()))
	return path
}

func TestBerthImport(t *testing.T) {
	b := open(t)
	b.ours()
	img := b.images[images.Busybox]
	other, err := img.WithConfig(registry.Config{Cmd: []string{"sh", "-c", "exit 7"}})
	b.must(err)
	name := "import.example/sh:1"
	b.Cleanup(func() { b.dropImage(other.ConfigID) })
	files, err := registry.Layout(registry.Named{Image: other, Names: []string{name}})
	path := b.archive(filepath.Join(t.TempDir(), "a.tar"), files, err)
	if out := b.berth("image", "import", path); !strings.Contains(out, "imported "+other.ConfigID) || !strings.Contains(out, name) {
		t.Errorf("import prints %q", out)
	}
	if out := b.berth("image", "import", "--json", path); !strings.Contains(out, `"note":"present"`) {
		t.Errorf("the second import prints %q", out)
	}
	c := b.pod().run(nil, func(c *runtime.ContainerConfig) { c.Image = spec(name) })
	if st := c.wait(); st.ExitCode != 7 {
		t.Errorf("a container of the imported image: %v, want exit code 7", st)
	}
	out, errOut, code := b.berthTool("image", "import", filepath.Join(t.TempDir(), "none.tar"))
	if code != 1 || !strings.Contains(errOut, "no such file") {
		t.Errorf("import of nothing: exit %d, %q %q", code, out, errOut)
	}
	files["blobs/"+strings.Replace(other.Digest, ":", "/", 1)] = []byte("{}")
	bad := b.archive(filepath.Join(t.TempDir(), "b.tar"), files, nil)
	if _, errOut, code := b.berthTool("image", "import", bad); code != 1 || !strings.Contains(errOut, other.Digest) {
		t.Errorf("import of a broken archive: exit %d, %q", code, errOut)
	}
}

func TestBerthExport(t *testing.T) {
	b := open(t)
	b.ours()
	img := b.push("t/export")
	ref := b.ref("t/export")
	b.pull(ref)
	file := filepath.Join(t.TempDir(), "out.tar")
	for _, args := range [][]string{{"--original"}, nil} {
		b.berth(append([]string{"image", "export", "-o", file, ref}, args...)...)
		b.berth("image", "rm", ref)
		b.berth("image", "import", file)
		got := b.imageStatus(ref)
		if got == nil || (got.Id == img.ConfigID) != (args != nil) {
			t.Fatalf("export %q and import: %v, the image was %s", args, got, img.ConfigID)
		}
		b.Cleanup(func() { b.dropImage(got.Id) })
	}
	if _, errOut, code := b.berthTool("image", "export", "-o", file+"2", "none.example/none:1"); code != 4 || !strings.Contains(errOut, "not found") {
		t.Errorf("export of nothing: exit %d, %q", code, errOut)
	}
}

func TestBerthPreload(t *testing.T) {
	b := open(t)
	b.ours()
	img, err := registry.Build(registry.Spec{Config: registry.Config{Cmd: []string{"preloaded"}}})
	b.must(err)
	b.Cleanup(func() { b.dropImage(img.ConfigID) })
	files, err := registry.DockerSave(registry.Named{Image: img, Names: []string{"preload.example/p:1"}})
	path := b.archive(filepath.Join(b.node.StateDir, "preload", "p.tar"), files, err)
	b.Cleanup(func() { os.Remove(path) })
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(100 * time.Millisecond) {
		if got := b.imageStatus("preload.example/p:1"); got != nil {
			if got.Id != img.ConfigID || !got.Pinned {
				t.Errorf("preloaded: %v", got)
			}
			return
		}
		if time.Now().After(end) {
			t.Fatal("not imported")
		}
	}
}

func TestBerthVerify(t *testing.T) {
	b := open(t)
	b.ours()
	img := b.push("t/verify")
	ref := b.ref("t/verify")
	b.pull(ref)
	if out := b.berth("image", "verify", ref); !strings.Contains(out, "all whole") {
		t.Errorf("verify prints %q", out)
	}
	// The one layer of the image has the one file with this content.
	files, err := filepath.Glob(filepath.Join(b.node.StateDir, "layers", "*", "name"))
	b.must(err)
	hit := 0
	for _, f := range files {
		if text, err := os.ReadFile(f); err == nil && string(text) == "t/verify" {
			b.must(os.WriteFile(f, []byte("t/harmed"), 0o644))
			hit++
		}
	}
	if hit != 1 {
		t.Fatalf("%d files of the image found, want 1", hit)
	}
	if out, _, code := b.berthTool("image", "verify", ref); code != 5 || !strings.Contains(out, "damaged") || !strings.Contains(out, `"name"`) {
		t.Errorf("verify of a damaged image: exit %d, %q", code, out)
	}
	if out := b.berth("image", "verify", "--repair", ref); !strings.Contains(out, "repaired") {
		t.Errorf("repair prints %q", out)
	}
	if out := b.berth("image", "verify", "--json", img.ConfigID); !strings.Contains(out, `"damaged":0`) {
		t.Errorf("after the repair: %q", out)
	}
}

func TestBerthExplain(t *testing.T) {
	b := open(t)
	b.ours()
	ref := b.ref(images.Busybox)
	out := b.berth("registry", "explain", "--probe", ref)
	for _, want := range []string{ref, "asked for tags and content", "answered in", b.images[images.Busybox].Digest} {
		if !strings.Contains(out, want) {
			t.Errorf("explain prints %q, want %q", out, want)
		}
	}
	if _, errOut, code := b.berthTool("registry", "explain", "Not A Reference"); code != 1 || !strings.Contains(errOut, "invalid image reference") {
		t.Errorf("explain of no reference: exit %d, %q", code, errOut)
	}
}

func TestBerthNode(t *testing.T) {
	b := open(t)
	b.ours()
	var conf map[string]any
	b.must(json.Unmarshal([]byte(b.berth("config", "print", "--json")), &conf))
	if conf["state_dir"] != b.node.StateDir {
		t.Errorf("state_dir %v, want %s", conf["state_dir"], b.node.StateDir)
	}
	if out := b.berth("config", "print"); !strings.Contains(out, `cgroup_driver = "cgroupfs"`) || strings.Contains(out, "pull_timeout") {
		t.Errorf("config in force: %s", out)
	}
	if out := b.berth("config", "default"); !strings.Contains(out, "#state_dir") {
		t.Errorf("default config: %.200s", out)
	}
	if out := b.berth("config", "validate"); !strings.Contains(out, "valid") {
		t.Errorf("validate: %s", out)
	}
	if out := b.berth("version"); !strings.Contains(out, "berthd ") || strings.Contains(out, "not reachable") {
		t.Errorf("version: %s", out)
	}
}
