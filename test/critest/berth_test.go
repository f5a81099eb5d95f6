package critest

import (
	"bytes"
	"encoding/json"
	"errors"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/berthd/berth/test/node"
)

// berthTool runs the administrator's tool on a node and returns what it wrote and its
// exit code.
func (b *box) berthTool(n *node.Node, args ...string) (out, errOut string, code int) {
	b.Helper()
	var o, e bytes.Buffer
	cmd := exec.CommandContext(b.ctx, filepath.Join(b.bin, "berth"), append(args, "--config", n.Config)...)
	cmd.Stdout, cmd.Stderr = &o, &e
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		b.Fatal(err)
	}
	return o.String(), e.String(), cmd.ProcessState.ExitCode()
}

// berth runs it on the node of the suite and wants success.
func (b *box) berth(args ...string) string {
	b.Helper()
	out, errOut, code := b.berthTool(b.node, args...)
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
	if out, errOut, code := b.berthTool(b.node, "image", "rm", ref); code != 1 || !strings.Contains(errOut, "pinned") {
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
	if _, errOut, code := b.berthTool(b.node, "image", "ls", ref); code != 4 || !strings.Contains(errOut, "not found") {
		t.Errorf("ls of a removed image: exit %d, %q", code, errOut)
	}
	if _, errOut, code := b.berthTool(b.node, "image", "pull", b.ref("t/no-such")); code != 4 {
		t.Errorf("pull of what is not there: exit %d, %q", code, errOut)
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
