// Package netns keeps Linux namespaces alive without a process in them.
//
// # Vocabulary
//
//   - A pin is a file with a namespace bind-mounted on it. While it is mounted
//     the kernel keeps the namespace, and its path works wherever a namespace
//     path is asked for: setns(2), the OCI runtime, CNI_NETNS.
//   - Pins is a directory of them: <dir>/<id>/<kind>, one subdirectory per
//     owner (a pod). What is in the directory minus what the owner's records
//     name is what leaked.
//
// # Example
//
//	netns.PrivateMount("/run/berth")                   // once, at start
//	pins, _ := netns.NewPins("/run/berth/ns")
//	pins.Create(ctx, id, []netns.Kind{netns.Net, netns.UTS}, func() error {
//		return netns.LoopbackUp()                  // runs inside
//	})
//	use(pins.Path(id, netns.Net))
//	pins.Destroy(id)
//
// # Caveats
//
//   - Namespaces are a property of a thread. Whatever enters one does so on a
//     thread of its own that is never given back to the Go scheduler, so no
//     other goroutine can find itself on the wrong network.
//   - The directory has to be on a mount with private propagation, else each pin
//     also appears in every other mount namespace that is a peer.
//   - The kernel frees a network namespace some time after its last pin is gone,
//     in the background: interfaces in it can outlive Destroy by a moment.
//   - A user namespace cannot be made by a thread of a running process: CreateIn
//     starts one for it. PID namespaces are not among the kinds.
package netns

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strings"

	"golang.org/x/sys/unix"
)

// Errors of this package, tested with errors.Is.
var (
	// ErrID: the ID cannot be the name of a directory.
	ErrID = errors.New("not a usable ID")
	// ErrKind: the kind of namespace is not known here.
	ErrKind = errors.New("unknown kind of namespace")
	// ErrExists: that ID has pins, or the remains of some.
	ErrExists = errors.New("pins exist")
	// ErrNotPinned: there is no namespace at that path.
	ErrNotPinned = errors.New("namespace not pinned")
)

// Kind is a kind of namespace, by the name that /proc/<pid>/ns has for it.
type Kind string

// The kinds that can be pinned.
const (
	Net Kind = "net"
	IPC Kind = "ipc"
	UTS Kind = "uts"
	// User is pinned by CreateIn only, and cannot be entered with Do.
	User Kind = "user"
)

// cloneFlags are the kinds that unshare(2) makes for one thread alone.
var cloneFlags = map[Kind]int{
	Net: unix.CLONE_NEWNET,
	IPC: unix.CLONE_NEWIPC,
	UTS: unix.CLONE_NEWUTS,
}

// maxID is NAME_MAX: an ID is a directory's name.
const maxID = 255

// Pins is a directory of pinned namespaces. Its methods may be called from
// several goroutines; calls for one ID are for the caller to order.
type Pins struct {
	dir string
}

// NewPins uses dir, which is made with mode 0700 if it is absent. It should lie
// below a directory given to PrivateMount.
func NewPins(dir string) (*Pins, error) {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("pin directory %q: %w", dir, err)
	}
	if err := os.MkdirAll(abs, 0o700); err != nil {
		return nil, fmt.Errorf("pin directory: %w", err)
	}
	return &Pins{dir: abs}, nil
}

// Path is where the namespace of that kind is pinned, or would be.
func (p *Pins) Path(id string, k Kind) string {
	return filepath.Join(p.dir, id, string(k))
}

// Pinned tells whether a namespace is mounted at Path. A plain file, left by a
// crash or by a reboot on a directory that is no tmpfs, is not one.
func (p *Pins) Pinned(id string, k Kind) bool {
	if checkID(id) != nil {
		return false
	}
	var st unix.Statfs_t
	return unix.Statfs(p.Path(id, k), &st) == nil && st.Type == unix.NSFS_MAGIC
}

// Create makes new namespaces of the kinds, all on one thread, runs setup on that
// thread inside them (nil: nothing to do) and then pins each. The calling
// process stays where it is. setup may write sysctls, set the host name or call
// LoopbackUp; what it starts must not outlive it.
//
// If anything fails, or ctx has ended by the time setup returns, nothing is left.
// The steps themselves are not interrupted by ctx. ErrExists means that the ID
// has pins or the remains of some, which Destroy removes.
func (p *Pins) Create(ctx context.Context, id string, kinds []Kind, setup func() error) error {
	flags, err := flagsOf(kinds)
	if err != nil {
		return fmt.Errorf("pins %q: %w", id, err)
	}
	return p.create(ctx, id, func() error { return p.fill(ctx, id, kinds, flags, setup) })
}

// create runs fill on a thread of its own, with a directory for the pins.
func (p *Pins) create(ctx context.Context, id string, fill func() error) error {
	if err := checkID(id); err != nil {
		return fmt.Errorf("pins: %w", err)
	}
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("pins %s: %w", id, err)
	}
	if err := os.Mkdir(filepath.Join(p.dir, id), 0o700); errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("pins %s: %w", id, ErrExists)
	} else if err != nil {
		return fmt.Errorf("pins %s: %w", id, err)
	}
	if err := OnThread(fill); err != nil {
		return errors.Join(fmt.Errorf("pins %s: %w", id, err), p.Destroy(id))
	}
	return nil
}

// fill runs on the thread that moves into the new namespaces and dies with them.
func (p *Pins) fill(ctx context.Context, id string, kinds []Kind, flags int, setup func() error) error {
	if err := unix.Unshare(flags); err != nil {
		return fmt.Errorf("unshare %v: %w", kinds, err)
	}
	if err := runSetup(ctx, setup); err != nil {
		return err
	}
	for _, k := range kinds {
		// thread-self, not self: the latter is the main thread's.
		if err := pin("/proc/thread-self/ns/"+string(k), p.Path(id, k)); err != nil {
			return fmt.Errorf("%s namespace: %w", k, err)
		}
	}
	return nil
}

func runSetup(ctx context.Context, setup func() error) error {
	if setup != nil {
		if err := setup(); err != nil {
			return fmt.Errorf("setup: %w", err)
		}
	}
	return ctx.Err()
}

// pin mounts a namespace on a new file at path.
func pin(ns, path string) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDONLY, 0o400)
	if err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	if err := unix.Mount(ns, path, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("bind mount: %w", err)
	}
	return nil
}

// Destroy removes every pin of the ID and its directory, whatever state a crash
// left them in. An ID without pins is no error. All pins are tried; the errors
// are joined.
func (p *Pins) Destroy(id string) error {
	if err := checkID(id); err != nil {
		return fmt.Errorf("pins: %w", err)
	}
	dir := filepath.Join(p.dir, id)
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("pins %s: %w", id, err)
	}
	var errs []error
	for _, e := range entries {
		if err := unpin(filepath.Join(dir, e.Name())); err != nil {
			errs = append(errs, fmt.Errorf("pins %s: %w", id, err))
		}
	}
	if len(errs) == 0 {
		if err := os.Remove(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, fmt.Errorf("pins %s: %w", id, err))
		}
	}
	return errors.Join(errs...)
}

// unpin unmounts whatever is mounted on path and removes the file.
//
// Removing the file matters beyond tidiness: a mount namespace that was cloned
// while the pin existed (a service with PrivateTmp, a debugging shell) has a copy
// of it, which private propagation keeps our unmount away from. Unlinking the
// mount point detaches those copies too.
func unpin(path string) error {
	if err := UnmountAll(path); err != nil {
		return err
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// List gives the IDs that have pins or remains of some, sorted.
func (p *Pins) List() ([]string, error) {
	entries, err := os.ReadDir(p.dir)
	if err != nil {
		return nil, fmt.Errorf("pin directory: %w", err)
	}
	ids := make([]string, 0, len(entries))
	for _, e := range entries {
		if e.IsDir() {
			ids = append(ids, e.Name())
		}
	}
	sort.Strings(ids)
	return ids, nil
}

// Do runs fn inside a pinned namespace, on a thread that dies afterwards, and
// returns its error as it is. Goroutines that fn starts run outside; sockets
// and files that it opens stay in the namespace. ErrNotPinned if there is none.
func (p *Pins) Do(id string, k Kind, fn func() error) error {
	flag, ok := cloneFlags[k]
	if !ok {
		return fmt.Errorf("pins %s: %w: %q", id, ErrKind, k)
	}
	if !p.Pinned(id, k) {
		return fmt.Errorf("pins %s: %s: %w", id, k, ErrNotPinned)
	}
	return OnThread(func() error {
		if err := p.enter(id, k, flag); err != nil {
			return fmt.Errorf("pins %s: enter %s namespace: %w", id, k, err)
		}
		return fn()
	})
}

// Each runs fn inside the pinned namespace of each ID in turn, all on one thread
// that dies afterwards: for many that costs a small part of what Do does. An ID
// without a pin is left out. The errors of entering the others are joined.
func (p *Pins) Each(ids []string, k Kind, fn func(id string)) error {
	flag, ok := cloneFlags[k]
	if !ok {
		return fmt.Errorf("pins: %w: %q", ErrKind, k)
	}
	if len(ids) == 0 {
		return nil
	}
	return OnThread(func() error {
		var errs []error
		for _, id := range ids {
			err := p.enter(id, k, flag)
			switch {
			case err == nil:
				fn(id)
			case !errors.Is(err, ErrNotPinned):
				errs = append(errs, fmt.Errorf("pins %s: enter %s namespace: %w", id, k, err))
			}
		}
		return errors.Join(errs...)
	})
}

// enter moves the calling thread into a pinned namespace. Only what lies on nsfs
// can be entered, so that a plain file in the place of a pin is EINVAL.
func (p *Pins) enter(id string, k Kind, flag int) error {
	if err := checkID(id); err != nil {
		return err
	}
	fd, err := unix.Open(p.Path(id, k), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) {
		return ErrNotPinned
	}
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.Setns(fd, flag); errors.Is(err, unix.EINVAL) {
		return ErrNotPinned
	} else if err != nil {
		return err
	}
	return nil
}

// flagsOf are the unshare flags of the kinds, of which there must be one at
// least and none twice.
func flagsOf(kinds []Kind) (int, error) {
	if len(kinds) == 0 {
		return 0, fmt.Errorf("%w: none named", ErrKind)
	}
	flags := 0
	for i, k := range kinds {
		f, ok := cloneFlags[k]
		if !ok {
			return 0, fmt.Errorf("%w: %q", ErrKind, k)
		}
		if slices.Contains(kinds[:i], k) {
			return 0, fmt.Errorf("%w: %q named twice", ErrKind, k)
		}
		flags |= f
	}
	return flags, nil
}

// checkID refuses what would lead out of the directory.
func checkID(id string) error {
	switch {
	case id == "", id == ".", id == "..", strings.ContainsAny(id, "/\x00"):
		return fmt.Errorf("%w: %q", ErrID, id)
	case len(id) > maxID:
		return fmt.Errorf("%w: %d bytes, at most %d", ErrID, len(id), maxID)
	}
	return nil
}
