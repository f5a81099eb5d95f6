// Package userns gives tests a user namespace of their own.
package userns

import (
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"testing"
)

// Must returns a user namespace with 65536 users, its root at id on the host, and
// closes it at the end of the test. The test is skipped where there are none.
func Must(t *testing.T, id int) *os.File {
	t.Helper()
	cmd := exec.Command("sleep", "60")
	maps := []syscall.SysProcIDMap{{ContainerID: 0, HostID: id, Size: 65536}}
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER, UidMappings: maps, GidMappings: maps}
	if err := cmd.Start(); err != nil {
		t.Skipf("no user namespaces: %v", err)
	}
	defer func() {
		cmd.Process.Kill()
		cmd.Wait()
	}()
	f, err := os.Open(fmt.Sprintf("/proc/%d/ns/user", cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}
