package critest

import (
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/berthd/berth/test/node"
)

// TestUpstream runs Kubernetes' own conformance suite, if the machine has its
// binary, against a node of its own. The suite pulls images from registries
// of the Internet; these variables send it elsewhere:
//
//	BERTH_CRITEST_IMAGES           a file for its --test-images-file
//	BERTH_CRITEST_REGISTRIES_CONF  a registries.conf with mirrors, for berthd
//	BERTH_CRITEST_ARGS             further arguments, separated by spaces
//	BERTH_CRITEST_REPORT           a file for its JUnit report
func TestUpstream(t *testing.T) {
	if shared == nil {
		t.Skip(node.NeedsRoot)
	}
	if shared.node == nil {
		t.Skip("BERTH_ENDPOINT names another runtime")
	}
	critest, err := exec.LookPath("critest")
	if err != nil {
		t.Skip("there is no critest on PATH: the upstream suite was NOT run, only the project's own")
	}
	opts := node.Options{Bin: shared.bin}
	if conf := os.Getenv("BERTH_CRITEST_REGISTRIES_CONF"); conf != "" {
		opts.RegistriesConf = conf
	}
	n, err := node.New(opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.Close(); err != nil {
			t.Errorf("clean-up: %v", err)
		}
	})
	if err := n.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	args := []string{"--runtime-endpoint=unix://" + n.Socket, "--image-endpoint=unix://" + n.Socket, "--nri-socket=" + n.NRI, "--ginkgo.no-color"}
	if f := os.Getenv("BERTH_CRITEST_IMAGES"); f != "" {
		args = append(args, "--test-images-file="+f)
	}
	if f := os.Getenv("BERTH_CRITEST_REPORT"); f != "" {
		args = append(args, "--ginkgo.junit-report="+f)
	}
	args = append(args, strings.Fields(os.Getenv("BERTH_CRITEST_ARGS"))...)
	cmd := exec.CommandContext(t.Context(), critest, args...)
	cmd.Dir = t.TempDir()
	out, err := cmd.CombinedOutput()
	summary := out
	if i := strings.LastIndex(string(out), "Ran "); i >= 0 {
		summary = out[i:]
	}
	t.Logf("upstream critest: %s", summary)
	for _, line := range strings.Split(string(out), "\n") {
		if strings.Contains(line, "[FAIL]") {
			t.Log(line)
		}
	}
	if err != nil {
		t.Errorf("upstream critest: %v", err)
	}
}
