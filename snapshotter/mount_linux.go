package snapshotter

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// flags are the mount options that are flags of mount(2) and not data for the
// file system: what to set, what to clear.
var flags = map[string]struct{ set, clear uintptr }{
	"ro": {set: unix.MS_RDONLY}, "rw": {clear: unix.MS_RDONLY},
	"nosuid": {set: unix.MS_NOSUID}, "suid": {clear: unix.MS_NOSUID},
	"nodev": {set: unix.MS_NODEV}, "dev": {clear: unix.MS_NODEV},
	"noexec": {set: unix.MS_NOEXEC}, "exec": {clear: unix.MS_NOEXEC},
	"noatime": {set: unix.MS_NOATIME}, "relatime": {set: unix.MS_RELATIME},
	"bind": {set: unix.MS_BIND}, "rbind": {set: unix.MS_BIND | unix.MS_REC},
}

// split separates the options that are flags from those for the file system.
func (m Mount) split() (set uintptr, data []string) {
	for _, o := range m.Options {
		if f, ok := flags[o]; ok {
			set = set&^f.clear | f.set
		} else {
			data = append(data, o)
		}
	}
	return set, data
}

// option returns the value of the option key=value, or "".
func (m Mount) option(key string) string {
	for _, o := range m.Options {
		if v, ok := strings.CutPrefix(o, key+"="); ok {
			return v
		}
	}
	return ""
}

// OpenRoot returns the root directory of a read-only view of what the mounts
// would show, as a descriptor with O_PATH and O_CLOEXEC. The view is mounted
// nowhere, so nobody else sees it and it cannot be in the way of anything;
// closing the file drops it. Devices, programs and set-user-ID bits in it have
// no effect.
//
// The mounts are those of one snapshot: exactly one, without a Target, as all
// backends in this repository return them. The writable layer of an active
// snapshot is shown as one more read-only layer, so that a view may be open
// while a container uses the snapshot; changes that the container makes
// meanwhile may or may not be seen.
//
// Needs CAP_SYS_ADMIN. Uses fsopen(2) and open_tree(2); where the kernel has
// not got them, or not overlay's lowerdir+ (Linux 6.7), it uses mount(2) in a
// mount namespace of its own.
func OpenRoot(mounts []Mount) (*os.File, error) {
	if len(mounts) != 1 || mounts[0].Target != "" {
		return nil, fmt.Errorf("root: %d mounts, limit 1 without a target", len(mounts))
	}
	m, err := readOnly(mounts[0])
	if err != nil {
		return nil, err
	}
	if m.Type == "overlay" && oldOverlay.Load() {
		if f, err := detachedByNamespace(m); err == nil {
			return f, nil
		}
	}
	f, err := detached(m)
	if err != nil {
		// Whatever the reason, mount(2) decides: old kernels differ in how
		// they say that they know one of the steps not.
		var err2 error
		if f, err2 = detachedByNamespace(m); err2 != nil {
			return nil, fmt.Errorf("root: %w (detached: %w)", err2, err)
		}
		if m.Type == "overlay" {
			oldOverlay.Store(true)
		}
	}
	return f, nil
}

// oldOverlay tells that an overlay could be mounted by mount(2) only. An old
// kernel logs each option that it does not know, so it is asked once.
var oldOverlay atomic.Bool

// readOnly returns the mount with the writable layer turned into the topmost
// read-only one.
func readOnly(m Mount) (Mount, error) {
	r := Mount{Type: m.Type, Source: m.Source}
	upper := m.option("upperdir")
	for _, o := range m.Options {
		key, value, _ := strings.Cut(o, "=")
		switch {
		case m.Type == "overlay" && (key == "upperdir" || key == "workdir"):
		case m.Type == "overlay" && key == "lowerdir" && upper != "":
			if value == "" {
				return r, errors.New("root: overlay mount without lowerdir")
			}
			r.Options = append(r.Options, "lowerdir="+upper+":"+value)
		case o == "rw":
		default:
			r.Options = append(r.Options, o)
		}
	}
	r.Options = append(r.Options, "ro", "nosuid", "nodev", "noexec")
	return r, nil
}

const detachedAttrs = unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC

// detached makes the mount with the file-descriptor based calls.
func detached(m Mount) (*os.File, error) {
	set, data := m.split()
	if set&unix.MS_BIND != 0 {
		return clone(m.Source)
	}
	fs, err := unix.Fsopen(m.Type, unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("fsopen %s: %w", m.Type, err)
	}
	defer unix.Close(fs)
	if m.Source != "" {
		if err := unix.FsconfigSetString(fs, "source", m.Source); err != nil {
			return nil, fmt.Errorf("fsconfig source: %w", err)
		}
	}
	if err := unix.FsconfigSetFlag(fs, "ro"); err != nil {
		return nil, fmt.Errorf("fsconfig ro: %w", err)
	}
	for _, o := range data {
		if err := configure(fs, m.Type, o); err != nil {
			key, _, _ := strings.Cut(o, "=") // 500 layers are no message
			return nil, fmt.Errorf("fsconfig %s: %w", key, err)
		}
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		return nil, fmt.Errorf("fsconfig create %s: %w", m.Type, err)
	}
	fd, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, detachedAttrs)
	if err != nil {
		return nil, fmt.Errorf("fsmount %s: %w", m.Type, err)
	}
	return os.NewFile(uintptr(fd), m.Type+" root"), nil
}

// configure hands one option to the file system. A string there holds at most
// 255 bytes, so layers are added one by one, topmost first.
func configure(fs int, fsType, option string) error {
	key, value, hasValue := strings.Cut(option, "=")
	switch {
	case !hasValue:
		return unix.FsconfigSetFlag(fs, key)
	case fsType == "overlay" && key == "lowerdir":
		for dir := range strings.SplitSeq(value, ":") {
			if err := unix.FsconfigSetString(fs, "lowerdir+", dir); err != nil {
				return err
			}
		}
		return nil
	}
	return unix.FsconfigSetString(fs, key, value)
}

// clone is a detached read-only bind mount.
func clone(dir string) (*os.File, error) {
	fd, err := cloneWith(dir, unix.MountAttr{Attr_set: detachedAttrs})
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), dir), nil
}

// cloneWith is a detached copy of the mount at path, with attributes changed.
func cloneWith(path string, attr unix.MountAttr) (int, error) {
	fd, err := unix.OpenTree(unix.AT_FDCWD, path, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("open_tree %s: %w", path, err)
	}
	if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &attr); err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("mount_setattr %s: %w", path, err)
	}
	return fd, nil
}

// detachedByNamespace mounts in a namespace that ends at once; the descriptor
// keeps the mount alive. /proc serves as the mount point because it exists
// wherever berth runs, and the thread has no more use for it.
func detachedByNamespace(m Mount) (f *os.File, err error) {
	const target = "/proc"
	err = WithMounted([]Mount{m}, target, func() error {
		fd, err := unix.Open(target, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("open %s: %w", target, err)
		}
		f = os.NewFile(uintptr(fd), m.Type+" root")
		return nil
	})
	return f, err
}

// WithMounted mounts the mounts on the directory target and below, in a mount
// namespace that nobody else is in and that ends with the call, and runs fn in
// it. fn runs on a thread of its own; goroutines that it starts do not see the
// mounts, processes that it starts do. The working directory in fn is not
// defined. Needs CAP_SYS_ADMIN.
func WithMounted(mounts []Mount, target string, fn func() error) error {
	return onOwnThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNS | unix.CLONE_FS); err != nil {
			return fmt.Errorf("mount namespace: %w", err)
		}
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			return fmt.Errorf("mount namespace: private: %w", err)
		}
		dir, compact := Compact(mounts)
		for _, m := range compact {
			if err := m.mount(dir, target); err != nil {
				return err
			}
		}
		return fn()
	})
}

// onOwnThread runs fn on a thread that ends afterwards, and with it whatever fn
// unshared. The process's first thread never ends, so it must not be the one:
// it would keep the namespace, and the mounts in it, for good.
func onOwnThread(fn func() error) error {
	done := make(chan error, 1)
	go func() {
		err := errors.New("thread: function did not return") // runtime.Goexit
		defer func() { done <- err }()
		runtime.LockOSThread() // never unlocked, so the thread is not reused
		if unix.Gettid() != unix.Getpid() {
			err = fn()
			return
		}
		err = onOwnThread(fn) // elsewhere, as this goroutine holds the first thread
		runtime.UnlockOSThread()
	}()
	return <-done
}

// mount makes one mount in the calling thread's namespace; the thread must not
// share its working directory.
func (m Mount) mount(dir, target string) error {
	set, data := m.split()
	if dir != "" {
		if err := unix.Chdir(dir); err != nil {
			return fmt.Errorf("mount %s: directory %s: %w", m.Type, dir, err)
		}
	}
	target = filepath.Join(target, m.Target)
	joined := strings.Join(data, ",")
	if len(joined) >= os.Getpagesize() {
		return fmt.Errorf("mount %s: options of %d bytes, limit %d", m.Type, len(joined), os.Getpagesize()-1)
	}
	if err := unix.Mount(m.Source, target, m.Type, set, joined); err != nil {
		return fmt.Errorf("mount %s on %s: %w", m.Type, target, err)
	}
	// A bind mount takes no other flags at first.
	const binds = unix.MS_BIND | unix.MS_REC
	if set&unix.MS_BIND != 0 && set&^binds != 0 {
		if err := unix.Mount("", target, "", unix.MS_REMOUNT|set&^unix.MS_REC, ""); err != nil {
			return fmt.Errorf("mount %s on %s: flags: %w", m.Type, target, err)
		}
	}
	return nil
}

// Compact makes mounts fit for mount(2), which takes a page of options at most.
// If one is too long, dir is the directory that holds its layers and the names
// of those in the options are relative to it: whoever mounts must be in dir while
// doing so. Otherwise dir is "" and the mounts are returned as they are.
func Compact(mounts []Mount) (dir string, compact []Mount) {
	var long []int
	var lowers []string
	for i, m := range mounts {
		_, data := m.split()
		if m.Type == "overlay" && len(strings.Join(data, ",")) >= os.Getpagesize() {
			long = append(long, i)
			lowers = append(lowers, strings.Split(m.option("lowerdir"), ":")...)
		}
	}
	dir = commonDir(lowers)
	// The topmost may be a writable layer, which is kept apart from the others;
	// it is then left as it is.
	if below := commonDir(lowers[min(1, len(lowers)):]); len(below) > len(dir) {
		dir = below
	}
	if dir == "" {
		return "", mounts
	}
	compact = slices.Clone(mounts)
	for _, i := range long {
		compact[i].Options = relative(mounts[i].Options, dir)
	}
	return dir, compact
}

// relative rewrites the layers of lowerdir; upperdir and workdir stay.
func relative(options []string, dir string) []string {
	out := slices.Clone(options)
	for i, o := range out {
		value, ok := strings.CutPrefix(o, "lowerdir=")
		if !ok {
			continue
		}
		names := strings.Split(value, ":")
		for j, n := range names {
			names[j] = strings.TrimPrefix(n, dir+"/")
		}
		out[i] = "lowerdir=" + strings.Join(names, ":")
	}
	return out
}

// commonDir returns the deepest directory above all of the absolute paths, or
// "" when there is none but the root.
func commonDir(paths []string) string {
	if len(paths) == 0 {
		return ""
	}
	dir := filepath.Dir(paths[0])
	for _, p := range paths[1:] {
		for dir != "/" && dir != "." && !strings.HasPrefix(p, dir+"/") {
			dir = filepath.Dir(dir)
		}
	}
	if dir == "/" || dir == "." {
		return ""
	}
	return dir
}
