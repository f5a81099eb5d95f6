package shim

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/berthd/berth/shim/wire"
)

// argv0 is the name under which every shim runs, whatever its file is called.
// The command line is: berth-shim <socket> <container ID>. ListShims reads it.
const argv0 = "berth-shim"

// shimEnv is the shim's whole environment: the Go runtime's settings for a
// process that mostly sleeps (one P, so no look at the cgroup for more; no
// periodic collection, as the shim asks for collections itself, with a bound
// should it not), and what the OCI runtime needs.
var shimEnv = []string{
	"GOMAXPROCS=1",
	"GODEBUG=containermaxprocs=0,updatemaxprocs=0",
	"GOGC=off",
	"GOMEMLIMIT=12MiB",
	"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
}

// Run starts a shim, which has the runtime create the container, and returns
// when that is done. The container waits for Start. After an error other than
// ctx's nothing is left of it but the bundle; after ctx's error the shim may go
// on, and is to be ended by Connect and Shutdown. ErrRuntime carries what the
// runtime said, ErrTimeout names the step that took longer than
// l.CreateTimeout, ErrInvalid the field that is wrong.
func Run(ctx context.Context, shimBinary string, l Launch) (*Client, Launched, error) {
	conn, err := spawn(shimBinary, l.Socket, l.ID)
	if err != nil {
		return nil, Launched{}, fmt.Errorf("shim %s: %w", shimBinary, err)
	}
	c, err := newClient(ctx, conn.(*net.UnixConn)) // a socket pair of that family
	if err != nil {
		return nil, Launched{}, fmt.Errorf("shim %s: %w", shimBinary, err)
	}
	body, err := c.ask(ctx, "launch", wire.TypeLaunched, nil, func(b *wire.Builder, id uint32) error {
		return l.Append(b, id)
	})
	var up Launched
	if err == nil {
		err = up.Decode(body)
	}
	if err != nil {
		c.Close()
		return nil, Launched{}, err
	}
	c.hello.ID = l.ID
	return c, up, nil
}

// spawn starts the shim's process in a session of its own, with one end of a
// socket pair as its descriptor 3.
func spawn(binary, socket, id string) (net.Conn, error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("socketpair", err)
	}
	defer unix.Close(pair[1])
	ours := os.NewFile(uintptr(pair[0]), "shim")
	defer ours.Close()
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer null.Close()
	pidfd := -1
	pid, err := syscall.ForkExec(readOnly(binary), []string{argv0, socket, id}, &syscall.ProcAttr{
		Dir:   "/",
		Env:   shimEnv,
		Files: []uintptr{null.Fd(), null.Fd(), null.Fd(), uintptr(pair[1])},
		Sys:   &syscall.SysProcAttr{Setsid: true, PidFD: &pidfd},
	})
	if err != nil {
		return nil, err
	}
	go reap(pid, pidfd)
	return net.FileConn(ours)
}

// reap collects a shim that ends while this process lives. It waits on the
// pidfd by way of the poller, as a blocking wait would take a thread for each
// container.
func reap(pid, pidfd int) {
	wait := func(flags int) bool {
		for {
			got, err := unix.Wait4(pid, nil, flags, nil)
			if err != unix.EINTR {
				return err != nil || got == pid
			}
		}
	}
	if pidfd < 0 || unix.SetNonblock(pidfd, true) != nil {
		wait(0)
		return
	}
	f := os.NewFile(uintptr(pidfd), "pidfd")
	defer f.Close()
	raw, err := f.SyscallConn()
	if err == nil {
		err = raw.Read(func(uintptr) bool { return wait(unix.WNOHANG) })
	}
	if err != nil {
		wait(0)
	}
}

// ListShims returns the shims whose socket is below runDir, by container ID, with
// their process IDs. It reads /proc, so that it finds those, too, whose socket
// is not up yet or already removed. As a process inside a container can choose
// its command line, only processes in the caller's mount namespace count.
func ListShims(runDir string) (map[string]int, error) {
	proc, err := os.Open("/proc")
	if err != nil {
		return nil, err
	}
	defer proc.Close()
	names, err := proc.Readdirnames(-1)
	if err != nil {
		return nil, fmt.Errorf("shim list: %w", err)
	}
	own, err := os.Readlink("/proc/self/ns/mnt")
	if err != nil {
		return nil, fmt.Errorf("shim list: %w", err)
	}
	runDir = filepath.Clean(runDir) + "/"
	shims := map[string]int{}
	for _, name := range names {
		pid, err := strconv.Atoi(name)
		if err != nil {
			continue
		}
		// A shim leads its session; what it has just forked does not.
		if sid, err := unix.Getsid(pid); err != nil || sid != pid {
			continue
		}
		if ns, err := os.Readlink("/proc/" + name + "/ns/mnt"); err != nil || ns != own {
			continue // before its command line, which may take as long as it likes to be read
		}
		if socket, id := shimCommand(name); id != "" && strings.HasPrefix(socket, runDir) {
			shims[id] = pid
		}
	}
	return shims, nil
}

// maxCommand bounds what is read of a command line, in bytes. A process can make its
// own as large as its address space (PR_SET_MM_MAP of prctl(2)); a shim's has two paths.
const maxCommand = 64 << 10

// shimCommand returns the arguments of a process that runs as a shim. Processes
// end while they are looked at: that is no error.
func shimCommand(pid string) (socket, id string) {
	f, err := os.Open("/proc/" + pid + "/cmdline")
	if err != nil {
		return "", ""
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxCommand+1))
	if err != nil || len(b) > maxCommand {
		return "", ""
	}
	args := strings.Split(strings.TrimSuffix(string(b), "\x00"), "\x00")
	if len(args) != 3 || args[0] != argv0 {
		return "", ""
	}
	return args[1], args[2]
}
