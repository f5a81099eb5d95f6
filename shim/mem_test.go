package shim_test

import (
	"os"
	"fmt"
	"testing"
	"time"
)

func TestMemX(t *testing.T) {
	c := newContainer(t, "/bin/sleep", "1000").run()
	time.Sleep(1500*time.Millisecond)
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", c.up.ShimPID))
	t.Logf("%s", b)
	b, _ = os.ReadFile(fmt.Sprintf("/proc/%d/status", c.up.ShimPID))
	t.Logf("%s", b)
	b, _ = os.ReadFile(fmt.Sprintf("/proc/%d/smaps", c.up.ShimPID))
	os.WriteFile("/tmp/smaps.txt", b, 0644)
	b, _ = os.ReadFile(fmt.Sprintf("/proc/%d/stat", c.up.ShimPID))
	t.Logf("%s", b)
	for _, d := range descriptors(t, c.up.ShimPID) { t.Log(d) }
}
