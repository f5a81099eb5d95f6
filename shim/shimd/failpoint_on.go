//go:build failpoint

package shimd

import (
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/berthd/berth/shim/wire"
)

// The same directory of orders as package test/failpoint has, which describes
// it, read with system calls only: a shim that is built for tests is to be of
// the kind that it is in production.

// maxHang bounds, in ms, a hang and a pause, as failpoint.MaxHang does.
const maxHang = 5_000

func point(step string) *stepError {
	dir, _ := syscall.Getenv("BERTH_FAILPOINTS")
	if dir == "" {
		return nil
	}
	name := "shim." + step
	if fd, err := unix.Open(dir+"/trace", unix.O_WRONLY|unix.O_APPEND|unix.O_CREAT|unix.O_CLOEXEC, 0o600); err == nil {
		unix.Write(fd, []byte(name+"\n"))
		unix.Close(fd)
	}
	switch claim(dir, name) {
	case "error":
		return fail(wire.CodeInternal, "failpoint "+name, "injected failure")
	case "kill":
		unix.Kill(unix.Getpid(), unix.SIGKILL)
	case "sleep":
		unix.Poll(nil, 300)
	case "hang":
		unix.Poll(nil, maxHang)
	case "pause":
		for i := 0; i < maxHang && unix.Unlink(dir+"/go/"+name) != nil; i++ {
			unix.Poll(nil, 1)
		}
	}
	return nil
}

// claim takes the order that is due at this pass: its action, "" for none.
func claim(dir, name string) string {
	armed := dir + "/armed/" + name
	b, err := readFile(armed, 64)
	if err != nil {
		return ""
	}
	when, action, _ := strings.Cut(strings.TrimSpace(string(b)), " ")
	switch {
	case when == "always":
		return action
	case len(when) == 1 && when[0] > '1' && when[0] <= '9':
		replaceFile(armed, []byte(string(when[0]-1)+" "+action))
		return ""
	case unix.Rename(armed, dir+"/hit/"+name) != nil:
		return ""
	}
	return action
}
