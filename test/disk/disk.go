// Package disk gives tests a small file system of their own, in a file on a loop device: to
// be filled to the last block, or to lose its power.
//
// Caveat: power that is lost here takes what the file system had not written, while what it
// had handed to the device stays: the cache of a real disk is not part of it.
package disk

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// ErrNone tells that this machine cannot mount a file system of the kind.
var ErrNone = errors.New("no loop device or file system")

// Disk is a mounted file system. Make it with New.
type Disk struct {
	Dir    string // where it is mounted
	kind   string
	image  string
	copies int
}

// New makes and mounts a file system of a kind ("ext4", "xfs") and a size in bytes below
// dir, a directory of the caller's, with further arguments of mkfs. It needs root. The error
// is ErrNone where the tools or the kernel lack what it takes.
func New(dir, kind string, size int64, mkfs ...string) (*Disk, error) {
	d := &Disk{kind: kind, Dir: filepath.Join(dir, "disk"), image: filepath.Join(dir, "disk.img")}
	f, err := os.Create(d.image)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(f.Truncate(size), f.Close(), os.Mkdir(d.Dir, 0o700)); err != nil {
		return nil, err
	}
	if out, err := exec.Command("mkfs."+kind, append(append([]string{"-q"}, mkfs...), d.image)...).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("%w: mkfs.%s: %w: %s", ErrNone, kind, err, out)
	}
	if err := d.mount(); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNone, err)
	}
	return d, nil
}

func (d *Disk) mount() error {
	options := "loop"
	if d.kind == "xfs" {
		options += ",nouuid" // a copy of one that may still be mounted somewhere
	}
	if out, err := exec.Command("mount", "-o", options, d.image, d.Dir).CombinedOutput(); err != nil {
		return fmt.Errorf("mount %s: %w: %s", d.image, err, strings.TrimSpace(string(out)))
	}
	return nil
}

// Shutdown of a file system: EXT4_IOC_SHUTDOWN and XFS_IOC_GOINGDOWN are one and the same.
const (
	iocShutdown = 0x8004587d
	noLogFlush  = 2 // not even the journal is written any more
)

// Cut takes the power away: from now on nothing reaches the disk, and every access that
// needs it is an error. Then Restore.
func (d *Disk) Cut() error {
	f, err := os.Open(d.Dir)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.IoctlSetPointerInt(int(f.Fd()), iocShutdown, noLogFlush); err != nil {
		return fmt.Errorf("%w: shutdown: %w", ErrNone, err)
	}
	return nil
}

// Restore gives it back: what the journal has is replayed. Nobody may use the file system.
// It goes on in a copy of what reached the device: another process's mount namespace may
// keep the old file system alive, and its buffers must not be written into the new one.
func (d *Disk) Restore() error {
	if err := unix.Unmount(d.Dir, unix.MNT_DETACH); err != nil {
		return fmt.Errorf("unmount %s: %w", d.Dir, err)
	}
	old := d.image
	d.copies++
	d.image = fmt.Sprintf("%s.%d", strings.TrimSuffix(old, fmt.Sprintf(".%d", d.copies-1)), d.copies)
	if out, err := exec.Command("cp", "--sparse=always", old, d.image).CombinedOutput(); err != nil {
		return fmt.Errorf("copy %s: %w: %s", old, err, out)
	}
	if err := os.Remove(old); err != nil {
		return err
	}
	return d.mount()
}

// Fail has the kernel find an error in the file system, an ext4 made with "-e",
// "remount-ro": it is read-only from now on, whoever writes. Then Restore.
func (d *Disk) Fail() error {
	var st unix.Stat_t
	if err := unix.Stat(d.Dir, &st); err != nil {
		return err
	}
	device, err := os.Readlink(fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev)))
	if err != nil {
		return fmt.Errorf("%w: %w", ErrNone, err)
	}
	trigger := filepath.Join("/sys/fs", d.kind, filepath.Base(device), "trigger_fs_error")
	if err := os.WriteFile(trigger, []byte("of a test"), 0); err != nil {
		return fmt.Errorf("%w: %w", ErrNone, err)
	}
	return nil
}

// FillInodes makes files in a directory "fillers" until there is no inode for another one.
func (d *Disk) FillInodes() error {
	dir := filepath.Join(d.Dir, "fillers")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	for i := 0; ; i++ {
		f, err := os.Create(filepath.Join(dir, strconv.Itoa(i)))
		if errors.Is(err, unix.ENOSPC) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := f.Close(); err != nil {
			return err
		}
	}
}

// Free removes what Fill and FillInodes have made.
func (d *Disk) Free() error {
	return errors.Join(os.RemoveAll(filepath.Join(d.Dir, "filler")), os.RemoveAll(filepath.Join(d.Dir, "fillers")))
}

// Fill writes a file "filler" until no byte is free, whoever asks.
func (d *Disk) Fill() error {
	f, err := os.Create(filepath.Join(d.Dir, "filler"))
	if err != nil {
		return err
	}
	defer f.Close()
	for size := 1 << 20; size > 0; size /= 2 {
		for {
			if _, err = f.Write(make([]byte, size)); err != nil {
				break
			}
		}
		if !errors.Is(err, unix.ENOSPC) {
			return err
		}
	}
	return nil
}

// Close unmounts.
func (d *Disk) Close() error { return unix.Unmount(d.Dir, unix.MNT_DETACH) }
