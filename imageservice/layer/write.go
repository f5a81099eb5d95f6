package layer

import (
	"archive/tar"
	"context"
	"fmt"
	"io"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// maxWriteDepth is how many directories deep Write goes, with a descriptor open for each.
const maxWriteDepth = 1000

// Write writes what a directory that Apply filled holds as a tar archive, from which Apply
// would make the same again: whiteouts and opaque directories in the form of OCI layers,
// further names of a file as links, owners, modes, times and attributes. opaqueRoot says that
// the layer hides all below it. Two calls write the same bytes, but not those that the
// layer was made from: of what does not matter to a file system, such as the order of
// entries, the archive that was has left no trace.
//
// No link is followed. Holes are written as zeros. Memory is a word for each file with
// several names, and the names of one directory at a time.
func Write(ctx context.Context, root *os.File, w io.Writer, opaqueRoot bool) error {
	a := &archiver{ctx: ctx, tw: tar.NewWriter(w), names: map[uint64]string{}, buf: make([]byte, 256<<10)}
	var st unix.Stat_t
	if err := unix.Fstat(int(root.Fd()), &st); err != nil {
		return fmt.Errorf("layer root: %w", err)
	}
	if err := a.header(int(root.Fd()), "./", tar.TypeDir, &st, ""); err != nil {
		return err
	}
	if opaqueRoot {
		if err := a.mark(whiteoutOpaque); err != nil {
			return err
		}
	}
	if err := a.dir(int(root.Fd()), "", 0); err != nil {
		return err
	}
	return a.tw.Close()
}

type archiver struct {
	ctx   context.Context
	tw    *tar.Writer
	names map[uint64]string // inode -> first name, of files with several
	buf   []byte
}

// dir writes what is in a directory, in the order of names.
func (a *archiver) dir(fd int, prefix string, depth int) error {
	if depth > maxWriteDepth {
		return entryError(prefix, fmt.Errorf("directories nested deeper than %d: %w", maxWriteDepth, ErrUnsupported))
	}
	dup, err := unix.Openat(fd, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return entryError(prefix, err)
	}
	d := os.NewFile(uintptr(dup), prefix)
	defer d.Close()
	entries, err := d.Readdirnames(-1)
	if err != nil {
		return entryError(prefix, err)
	}
	slices.Sort(entries)
	for _, name := range entries {
		if a.ctx.Err() != nil {
			return context.Cause(a.ctx)
		}
		if err := a.entry(fd, prefix, name, depth); err != nil {
			return err
		}
	}
	return nil
}

func (a *archiver) entry(at int, prefix, name string, depth int) error {
	full := prefix + name
	var st unix.Stat_t
	if err := unix.Fstatat(at, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return entryError(full, err)
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		return a.subdir(at, full, name, &st, depth)
	case unix.S_IFREG:
		return a.file(at, full, name, &st)
	case unix.S_IFLNK:
		target, err := readlinkat(at, name)
		if err != nil {
			return entryError(full, err)
		}
		return a.linked(full, &st, func() error { return a.header(-1, full, tar.TypeSymlink, &st, target) })
	case unix.S_IFCHR:
		if isWhiteout(&st) {
			return a.mark(prefix + whiteoutPrefix + name)
		}
		return a.linked(full, &st, func() error { return a.header(-1, full, tar.TypeChar, &st, "") })
	case unix.S_IFBLK:
		return a.linked(full, &st, func() error { return a.header(-1, full, tar.TypeBlock, &st, "") })
	case unix.S_IFIFO:
		return a.linked(full, &st, func() error { return a.header(-1, full, tar.TypeFifo, &st, "") })
	}
	return nil // sockets are of no use to anybody, and no archive has them
}

// linked writes an inode that has been written already as a further name of it.
func (a *archiver) linked(full string, st *unix.Stat_t, write func() error) error {
	if st.Nlink > 1 {
		if first, ok := a.names[st.Ino]; ok {
			return named(full, a.tw.WriteHeader(&tar.Header{Typeflag: tar.TypeLink, Name: full, Linkname: first, ModTime: modTime(st), Format: tar.FormatPAX}))
		}
		a.names[st.Ino] = full
	}
	return write()
}

func (a *archiver) subdir(at int, full, name string, st *unix.Stat_t, depth int) error {
	fd, err := unix.Openat(at, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return entryError(full, err)
	}
	defer unix.Close(fd)
	if err := a.header(fd, full+"/", tar.TypeDir, st, ""); err != nil {
		return err
	}
	opaque := make([]byte, 1)
	if n, err := unix.Fgetxattr(fd, opaqueXattr, opaque); err == nil && n == 1 && opaque[0] == 'y' {
		if err := a.mark(full + "/" + whiteoutOpaque); err != nil {
			return err
		}
	}
	return a.dir(fd, full+"/", depth+1)
}

func (a *archiver) file(at int, full, name string, st *unix.Stat_t) error {
	return a.linked(full, st, func() error {
		fd, err := unix.Openat(at, name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err != nil {
			return entryError(full, err)
		}
		f := os.NewFile(uintptr(fd), full)
		defer f.Close()
		if err := a.header(fd, full, tar.TypeReg, st, ""); err != nil {
			return err
		}
		// A file that is shorter than it was is an error of the writer's at the next entry.
		_, err = io.CopyBuffer(onlyWriter{a.tw}, onlyReader{io.LimitReader(f, st.Size)}, a.buf)
		return named(full, err)
	})
}

// They keep io.CopyBuffer to its buffer.
type onlyWriter struct{ io.Writer }
type onlyReader struct{ io.Reader }

// mark writes an empty file that means something by its name.
func (a *archiver) mark(name string) error {
	return named(name, a.tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, ModTime: time.Unix(0, 0), Format: tar.FormatPAX}))
}

// header writes the metadata of an inode; attributes are read from fd, if that is not -1.
func (a *archiver) header(fd int, name string, kind byte, st *unix.Stat_t, target string) error {
	h := &tar.Header{
		Typeflag: kind, Name: name, Linkname: target, Mode: int64(st.Mode & 0o7777), Uid: int(st.Uid), Gid: int(st.Gid),
		ModTime: modTime(st), Format: tar.FormatPAX,
	}
	switch kind {
	case tar.TypeReg:
		h.Size = st.Size
	case tar.TypeChar, tar.TypeBlock:
		h.Devmajor, h.Devminor = int64(unix.Major(st.Rdev)), int64(unix.Minor(st.Rdev))
	}
	if fd >= 0 {
		xattrs, err := keptXattrs(fd)
		if err != nil {
			return entryError(name, err)
		}
		for key, value := range xattrs {
			if h.PAXRecords == nil {
				h.PAXRecords = map[string]string{}
			}
			h.PAXRecords[xattrRecord+key] = value
		}
	}
	return named(name, a.tw.WriteHeader(h))
}

// named adds the name of an entry to an error, if there is one.
func named(name string, err error) error {
	if err == nil {
		return nil
	}
	return entryError(name, err)
}

func modTime(st *unix.Stat_t) time.Time { return time.Unix(st.Mtim.Unix()) }
