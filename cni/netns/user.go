package netns

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

// IDMap is one range of a user namespace's uid_map or gid_map
// (user_namespaces(7)).
type IDMap struct {
	Inside, Outside, Length uint32
}

// UserSpec describes a user namespace.
//
// A thread of a process with several cannot move into one, so a process has to be
// born there. Its program does not matter as long as it waits: it is killed as soon
// as its namespaces are pinned. It runs as the root of the new namespace only, with
// no permission over anything outside but what everybody has.
type UserSpec struct {
	UIDs, GIDs []IDMap
	Holder     []string // program, an absolute path, and arguments
}

// CreateIn is Create with a user namespace in addition, pinned as User, to which
// the others belong: who is root in it may set them up. There need not be others.
// setup runs inside all of them but the user namespace, as the caller, who is
// privileged over it.
func (p *Pins) CreateIn(ctx context.Context, id string, user UserSpec, kinds []Kind, setup func() error) error {
	flags := 0
	if len(kinds) > 0 {
		var err error
		if flags, err = flagsOf(kinds); err != nil {
			return fmt.Errorf("pins %q: %w", id, err)
		}
	}
	return p.create(ctx, id, func() error {
		return user.hold(flags, func(pid int) error { return p.fillFrom(ctx, id, pid, kinds, flags, setup) })
	})
}

// fillFrom pins the namespaces of a process.
func (p *Pins) fillFrom(ctx context.Context, id string, pid int, kinds []Kind, flags int, setup func() error) error {
	if flags != 0 {
		fd, err := unix.PidfdOpen(pid, 0)
		if err != nil {
			return fmt.Errorf("holder: %w", err)
		}
		defer unix.Close(fd)
		if err := unix.Setns(fd, flags); err != nil {
			// Before Linux 5.8 it takes a namespace at a time.
			if err = setnsEach(pid, kinds); err != nil {
				return err
			}
		}
	}
	if err := runSetup(ctx, setup); err != nil {
		return err
	}
	for _, k := range append(slices.Clone(kinds), User) {
		if err := pin("/proc/"+strconv.Itoa(pid)+"/ns/"+string(k), p.Path(id, k)); err != nil {
			return fmt.Errorf("%s namespace: %w", k, err)
		}
	}
	return nil
}

func setnsEach(pid int, kinds []Kind) error {
	for _, k := range kinds {
		fd, err := unix.Open("/proc/"+strconv.Itoa(pid)+"/ns/"+string(k), unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("%s namespace: %w", k, err)
		}
		err = unix.Setns(fd, cloneFlags[k])
		unix.Close(fd)
		if err != nil {
			return fmt.Errorf("enter %s namespace: %w", k, err)
		}
	}
	return nil
}

// Open returns a user namespace that lives as long as the file.
func (u UserSpec) Open() (f *os.File, err error) {
	err = OnThread(func() error {
		return u.hold(0, func(pid int) error {
			f, err = os.Open("/proc/" + strconv.Itoa(pid) + "/ns/user")
			return err
		})
	})
	if err != nil {
		return nil, fmt.Errorf("user namespace: %w", err)
	}
	return f, nil
}

// hold runs fn while a process is in a new user namespace, and in others that
// belong to it by flags. It must be called on a thread of its own: the process
// dies with the thread that started it, so that a crash leaves none behind.
func (u UserSpec) hold(flags int, fn func(pid int) error) error {
	if len(u.Holder) == 0 {
		return errors.New("user namespace: no holder")
	}
	cmd := exec.Command(u.Holder[0], u.Holder[1:]...)
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWUSER | uintptr(flags),
		UidMappings: mappings(u.UIDs), GidMappings: mappings(u.GIDs), GidMappingsEnableSetgroups: true,
		Pdeathsig: unix.SIGKILL,
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("user namespace: %w", err)
	}
	err := fn(cmd.Process.Pid)
	if e := cmd.Process.Kill(); e != nil && !errors.Is(e, os.ErrProcessDone) {
		return errors.Join(err, fmt.Errorf("holder: %w", e))
	}
	_ = cmd.Wait() // it was killed
	return err
}

func mappings(list []IDMap) []syscall.SysProcIDMap {
	out := make([]syscall.SysProcIDMap, 0, len(list))
	for _, m := range list {
		out = append(out, syscall.SysProcIDMap{ContainerID: int(m.Inside), HostID: int(m.Outside), Size: int(m.Length)})
	}
	return out
}
