// Package failpoint makes programs fail where a test wants them to. Only what is
// built with the tag "failpoint", and the tests' own programs, import it.
//
// The nouns:
//
//   - Point: a place in a program, by name: "<operation>.<step>", such as
//     "run pod.network". No slash.
//   - Dir: a directory that the test and all programs of a node share, named by
//     the environment variable Env. It outlives every process, so what is armed
//     stays so over kills and restarts.
//   - Order: what shall happen at the nth pass of a point from now on, once.
//
// In a Dir:
//
//	armed/<point>  an order: "<nth> <action>", or "always <action>"
//	hit/<point>    the same after it was carried out, or while it is
//	go/<point>     lets a program that has paused there go on
//	trace          a line for each pass of each point, armed or not
//
// An order is claimed by renaming its file, so that of several programs one gets
// it. Package shim/shimd reads the same directory by means of its own.
package failpoint

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Env names the directory in the environment of berthd and its shims.
const Env = "BERTH_FAILPOINTS"

// The actions. A program's own may come on top (test/fakes).
const (
	Error = "error" // the step fails with ErrInjected and has no effect
	Hang  = "hang"  // the step stands until its context's end, at most MaxHang
	Kill  = "kill"  // the process kills itself with SIGKILL
	Pause = "pause" // the process stands until the test lets it go on (Dir.Go)
	Sleep = "sleep" // the step comes SleepFor later
)

// MaxHang bounds a hang of what has no deadline, and a pause.
const MaxHang = 5 * time.Second

// SleepFor is how long Sleep takes.
const SleepFor = 300 * time.Millisecond

// ErrInjected is the error of a step that was made to fail.
var ErrInjected = errors.New("injected failure")

// Dir is a directory of failpoints. "" is none: nothing is armed and nothing traced.
type Dir string

// dirOfEnv is looked up once: it does not change under a process.
var dirOfEnv = sync.OnceValue(func() Dir { return Dir(os.Getenv(Env)) })

// Hit is a pass of a point: it does what was ordered, and returns an error if
// the step is to fail.
func Hit(ctx context.Context, point string) error { return dirOfEnv().Hit(ctx, point) }

// Hit is a pass of a point of this directory.
func (d Dir) Hit(ctx context.Context, point string) error {
	switch action := d.Pass(point); action {
	case "":
		return nil
	case Error:
		return fmt.Errorf("failpoint %s: %w", point, ErrInjected)
	case Hang:
		select {
		case <-ctx.Done():
			return fmt.Errorf("failpoint %s: %w", point, context.Cause(ctx))
		case <-time.After(MaxHang):
			return fmt.Errorf("failpoint %s: hung for %s: %w", point, MaxHang, ErrInjected)
		}
	case Kill:
		_ = unix.Kill(os.Getpid(), unix.SIGKILL)
		select {} // the signal comes before this goroutine gets on
	case Pause:
		d.wait(point)
		return nil
	case Sleep:
		time.Sleep(SleepFor)
		return nil
	default:
		return fmt.Errorf("failpoint %s: unknown action %q", point, action)
	}
}

// Pass records a pass of a point and claims the order that was due at it: its
// action, "" for none.
func (d Dir) Pass(point string) string {
	if d == "" {
		return ""
	}
	d.note(point)
	armed := d.path("armed", point)
	b, err := os.ReadFile(armed)
	if err != nil {
		return ""
	}
	when, action, _ := strings.Cut(strings.TrimSpace(string(b)), " ")
	if when == "always" {
		_ = os.WriteFile(d.path("hit", point), b, 0o600)
		return action
	}
	if n, err := strconv.Atoi(when); err == nil && n > 1 {
		if put(armed, fmt.Sprintf("%d %s", n-1, action)) != nil {
			return "" // disarmed this moment
		}
		return ""
	}
	if os.Rename(armed, d.path("hit", point)) != nil {
		return "" // somebody else was faster
	}
	return action
}

func (d Dir) note(point string) {
	f, err := os.OpenFile(filepath.Join(string(d), "trace"), os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		return
	}
	defer f.Close()
	_, _ = f.WriteString(point + "\n") // one write: lines of several processes do not mix
}

func (d Dir) wait(point string) {
	for end := time.Now().Add(MaxHang); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if os.Remove(d.path("go", point)) == nil {
			return
		}
	}
}

func (d Dir) path(kind, point string) string { return filepath.Join(string(d), kind, point) }

// put replaces a file as a whole.
func put(path, text string) error {
	if err := os.WriteFile(path+".new", []byte(text), 0o600); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

// Make makes the directory, for a test.
func Make(dir string) (Dir, error) {
	for _, kind := range []string{"armed", "hit", "go"} {
		if err := os.MkdirAll(filepath.Join(dir, kind), 0o700); err != nil {
			return "", fmt.Errorf("failpoints: %w", err)
		}
	}
	return Dir(dir), nil
}

// Arm orders an action for the nth pass of a point from now on, once; for every
// pass if nth is 0.
func (d Dir) Arm(point, action string, nth int) error {
	when := strconv.Itoa(nth)
	if nth == 0 {
		when = "always"
	}
	if err := put(d.path("armed", point), when+" "+action); err != nil {
		return fmt.Errorf("failpoint %s: %w", point, err)
	}
	return nil
}

// WasHit tells whether an order for the point was carried out, or is being.
func (d Dir) WasHit(point string) bool {
	_, err := os.Stat(d.path("hit", point))
	return err == nil
}

// Go lets what pauses at the point go on.
func (d Dir) Go(point string) error { return os.WriteFile(d.path("go", point), nil, 0o600) }

// Reset takes all orders back and forgets what was hit and traced.
func (d Dir) Reset() error {
	var errs []error
	for _, kind := range []string{"armed", "hit", "go"} {
		dir := filepath.Join(string(d), kind)
		errs = append(errs, os.RemoveAll(dir), os.Mkdir(dir, 0o700))
	}
	errs = append(errs, os.RemoveAll(filepath.Join(string(d), "trace")))
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("failpoints: %w", err)
	}
	return nil
}

// Trace returns the points that were passed since the last Reset, in order.
func (d Dir) Trace() ([]string, error) {
	b, err := os.ReadFile(filepath.Join(string(d), "trace"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("failpoints: %w", err)
	}
	return strings.FieldsFunc(string(b), func(r rune) bool { return r == '\n' }), nil
}
