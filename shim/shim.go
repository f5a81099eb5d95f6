// Package shim is berthd's side of a shim: the process, one for each container,
// that outlives berthd, runs the OCI runtime, holds the container's stdio,
// writes its log, reaps it and its execs, and records how it ended.
//
//	c, up, err := shim.Run(ctx, "/usr/libexec/berth-shim", shim.Launch{…})
//	err = c.Start(ctx)
//	res, err := c.Exec(ctx, shim.ExecRequest{Process: json, Timeout: time.Second})
//	select {
//	case exit := <-c.Exited(): // the exit record is on disk by now
//	case <-c.Gone():           // ReadExit tells whether it ended in order
//	}
//
// A restarted berthd uses Connect on the socket that Launch named. Any number
// of clients may be connected to one shim.
//
// # Life of a shim
//
// Run starts the process; it listens on its socket before it does anything
// else, mounts the root and has the runtime create the container. If the caller
// goes away meanwhile, the create is finished and the shim stays, to be found by
// Connect. When the container's init ends, the shim kills what is left of the
// container (if it had no PID namespace of its own), drains its output, writes
// the exit record with a rename, tells every client, has the runtime delete the
// container, removes its socket and ends. Signals other than SIGKILL do not end
// a shim; Shutdown does.
//
// Caveats: the exit record is not synced to disk, so a power cut may lose it,
// as it ends the container anyway. A shim that was killed leaves the runtime's
// state, the cgroup and perhaps the container's processes: that is for the
// caller to undo, by cgroup.
package shim

import (
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/berthd/berth/shim/wire"
)

// The values of the protocol, under the names that callers use.
type (
	// Launch tells a new shim what to create and how to look after it.
	Launch = wire.Launch
	// Mount is one mount(2) call on the container's root.
	Mount = wire.Mount
	// Launched tells what Run started.
	Launched = wire.Launched
	// ExecImage tells a shim how to start a process by itself.
	ExecImage = wire.ExecImage
	// Rlimit is a resource limit of prlimit(2).
	Rlimit = wire.Rlimit
	// Exit tells how a container ended.
	Exit = wire.Exit
	// State is a shim's view of its container.
	State = wire.State
)

// The values of State.Status.
const (
	StatusCreating = wire.StatusCreating
	StatusCreated  = wire.StatusCreated
	StatusRunning  = wire.StatusRunning
	StatusExited   = wire.StatusExited
)

// Errors of a Client, tested with errors.Is.
var (
	// ErrGone: nobody listens on the socket, or the connection broke. The
	// shim has ended, in order or not.
	ErrGone = errors.New("shim gone")
	// ErrRuntime: the OCI runtime refused; the text holds its own message.
	ErrRuntime = errors.New("OCI runtime")
	// ErrState: the container is not in a state that allows the call.
	ErrState = errors.New("container state does not allow this")
	// ErrInvalid: an argument is malformed or out of bounds.
	ErrInvalid = errors.New("invalid shim request")
	// ErrTimeout: a step of the shim took longer than it may. The text
	// names the step.
	ErrTimeout = errors.New("shim step timed out")
	// ErrBusy: too many calls of this kind are running.
	ErrBusy = errors.New("shim busy")
	// ErrUnsupported: the shim is of another version and does not know this.
	ErrUnsupported = errors.New("shim does not support this")
	// ErrSlow: an Attach was ended because its pipe was full for too long.
	ErrSlow = errors.New("attached client does not read")
)

var codeErrors = map[wire.Code]error{
	wire.CodeInvalid:     ErrInvalid,
	wire.CodeState:       ErrState,
	wire.CodeRuntime:     ErrRuntime,
	wire.CodeTimeout:     ErrTimeout,
	wire.CodeBusy:        ErrBusy,
	wire.CodeUnsupported: ErrUnsupported,
	wire.CodeSlow:        ErrSlow,
}

// answerError is what a shim answered instead of a result.
type answerError struct {
	call string
	wire wire.Error
}

func (e *answerError) Error() string {
	s := "shim " + e.call + ": "
	if e.wire.Step != "" && e.wire.Step != e.call {
		s += e.wire.Step + ": "
	}
	return s + e.wire.Message
}

func (e *answerError) Is(target error) bool {
	return target != nil && codeErrors[e.wire.Code] == target
}

// ReadExit reads the exit record at path, which a shim wrote. The error is
// os.ErrNotExist when there is none, wire.ErrExitFile when it is damaged.
func ReadExit(path string) (Exit, error) {
	f, err := os.Open(path)
	if err != nil {
		return Exit{}, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, wire.MaxExitFile+1))
	if err != nil {
		return Exit{}, err
	}
	e, err := wire.ParseExitFile(b)
	if err != nil {
		return Exit{}, fmt.Errorf("exit record %s: %w", path, err)
	}
	return e, nil
}
