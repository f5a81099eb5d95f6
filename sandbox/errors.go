package sandbox

import (
	"errors"
	"fmt"

	"github.com/berthd/berth/sandbox/cgroup"
	"github.com/berthd/berth/sandbox/nri"
	"github.com/berthd/berth/sandbox/spec"
)

// Errors of this package, tested with errors.Is. Package cri maps each of them
// to one gRPC code.

// Errors of what a caller asked for.
var (
	// ErrInvalid: a field of the request has a value that cannot be used. The
	// text names the field, the value and the limit.
	ErrInvalid = spec.ErrInvalid
	// ErrNotFound: no pod or container has that ID.
	ErrNotFound = errors.New("not found")
	// ErrAmbiguous: several objects have IDs that begin with that prefix.
	ErrAmbiguous = errors.New("ambiguous ID prefix")
	// ErrState: the object is in a state that does not allow the call.
	ErrState = errors.New("wrong state")
	// ErrUnknownHandler: no OCI runtime is configured under that name.
	ErrUnknownHandler = errors.New("unknown runtime handler")
)

// Errors of work that goes on or took too long.
var (
	// ErrBusy: the caller's time is up while the operation goes on. The text
	// names the step that it is at and for how long. Calling again joins it.
	ErrBusy = errors.New("operation still running")
	// ErrTimeout: a command in a container did not end in its time and was
	// killed.
	ErrTimeout = errors.New("timed out")
	// ErrStuck: processes of a container did not die of SIGKILL, as when they
	// wait for a device or a network file system.
	ErrStuck = errors.New("processes do not die")
)

// ErrPlugin: plugins of the node want something of a container that cannot be.
// The text names the field, the value and the limit.
var ErrPlugin = nri.ErrAdjustment

// ErrRuntime: an OCI runtime is missing, too old or does not answer.
var ErrRuntime = errors.New("OCI runtime unusable")

// invalid is err as an ErrInvalid about a field, "" if err names one. A text that
// says so already is not made to say it twice.
func invalid(field string, err error) error {
	said := errors.Is(err, ErrInvalid) || errors.Is(err, cgroup.ErrInvalid)
	if field != "" {
		err = fmt.Errorf("%s: %w", field, err)
	}
	if !said {
		return fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	return invalidError{err}
}

type invalidError struct{ error }

func (e invalidError) Unwrap() error        { return e.error }
func (e invalidError) Is(target error) bool { return target == ErrInvalid }
