// Command fakes stands between berth and the programs that it runs: an OCI
// runtime and CNI plugins. It calls the real program, which does the work, and
// before and after that does what a test orders by a failpoint (test/failpoint).
//
// It is named after the program that it stands for, and finds beside itself
//
//	real/<name>   the program, a link
//	points        the directory of failpoints, a link
//
// Its points are "<name> <verb>.run" before the program and
// "<name> <verb>.done" after it: "runc create.run", "bridge ADD.done". Beside
// the actions of failpoints it knows
//
//	rubbish   succeeds: a plugin does its work and says what nobody can read, a
//	          runtime does nothing (its output is the container's)
//	lose      does the work and says nothing: the answer is lost, with a failure
//	halfway   kills the program with SIGKILL in the middle, and itself
package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berthd/berth/test/failpoint"
)

// The actions of its own.
const (
	Rubbish = "rubbish"
	Lose    = "lose"
	Halfway = "halfway"
)

// halfwayAfter is how far a program that is killed halfway has got: runc's
// create takes some 50 ms.
const halfwayAfter = 12 * time.Millisecond

func main() {
	code, err := run()
	if err != nil {
		fmt.Fprintln(os.Stderr, filepath.Base(os.Args[0])+":", err)
	}
	// Not os.Exit: exit hooks would be in the way of a process that is to be light.
	unix.Exit(code)
}

func run() (int, error) {
	dir, name := filepath.Split(os.Args[0])
	points := failpoint.Dir(filepath.Join(dir, "points"))
	real := filepath.Join(dir, "real", name)
	verb := verbOf(os.Args[1:])
	if verb == "" {
		return 1, unix.Exec(real, os.Args, os.Environ())
	}
	point := name + " " + verb
	before := points.Pass(point + ".run")
	switch before {
	case Rubbish:
		return rubbish(real)
	case Lose:
		_, err := call(real, nil, 0)
		return 1, errors.Join(errors.New("the answer got lost"), err)
	case Halfway:
		_, _ = call(real, os.Stdout, halfwayAfter) // how it ended is the point of it
		die()
	}
	if err := perform(before); err != nil {
		refuse(err)
		return 1, err
	}
	after := points.Pass(point + ".done")
	if after == "" {
		return 1, unix.Exec(real, os.Args, os.Environ()) // the usual case costs one execve
	}
	code, err := call(real, os.Stdout, 0)
	if code != 0 || err != nil {
		return code, err
	}
	if err := perform(after); err != nil {
		refuse(err)
		return 1, err
	}
	return 0, nil
}

func rubbish(real string) (code int, err error) {
	if os.Getenv("CNI_COMMAND") == "" {
		return 0, nil
	}
	code, err = call(real, nil, 0)
	fmt.Println("<html>502 Bad Gateway</html>")
	return code, err
}

// perform does what failpoint.Hit does with an action that was claimed already.
func perform(action string) error {
	switch action {
	case "":
		return nil
	case failpoint.Error:
		return failpoint.ErrInjected
	case failpoint.Hang:
		time.Sleep(10 * failpoint.MaxHang) // until somebody has had enough of it
		return context.DeadlineExceeded
	case failpoint.Kill:
		die()
	case failpoint.Sleep:
		time.Sleep(failpoint.SleepFor)
		return nil
	}
	return fmt.Errorf("unknown action %q", action)
}

func die() {
	_ = unix.Kill(os.Getpid(), unix.SIGKILL)
	select {}
}

// refuse tells a failure in the way of a CNI plugin, if that is what this is.
func refuse(err error) {
	if os.Getenv("CNI_COMMAND") != "" {
		fmt.Printf(`{"cniVersion":"1.0.0","code":117,"msg":"%v"}`, err)
	}
}

// call runs the program as a child. With a limit it is killed then, itself and
// nothing that it started.
// The thread that starts it stays, so that its end is that of this process.
func call(real string, stdout *os.File, limit time.Duration) (int, error) {
	cmd := exec.Command(real)
	cmd.Args = os.Args
	cmd.Stdin, cmd.Stderr = os.Stdin, os.Stderr
	cmd.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
	var kept bytes.Buffer
	if cmd.Stdout = stdout; stdout == nil {
		cmd.Stdout = &kept
		cmd.WaitDelay = 100 * time.Millisecond
	}
	runtime.LockOSThread()
	if err := cmd.Start(); err != nil {
		return 1, err
	}
	if limit > 0 {
		time.Sleep(limit)
		_ = cmd.Process.Kill()
	}
	err := cmd.Wait()
	if e := (*exec.ExitError)(nil); errors.As(err, &e) {
		return max(e.ExitCode(), 1), nil
	}
	return 0, err
}

// verbOf is the CNI command, or the verb on the command line of an OCI runtime.
// A question for the version or the features is none.
func verbOf(args []string) string {
	if v := os.Getenv("CNI_COMMAND"); v != "" {
		if v == "VERSION" || v == "STATUS" {
			return ""
		}
		return v
	}
	for i := 0; i < len(args); i++ {
		switch {
		case args[i] == "--root" || args[i] == "--log" || args[i] == "--log-format":
			i++
		case args[i] == "--version" || args[i] == "features":
			return ""
		case !strings.HasPrefix(args[i], "-"):
			return args[i]
		}
	}
	return ""
}
