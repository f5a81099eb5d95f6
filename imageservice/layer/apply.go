package layer

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path"
	"strconv"
	"strings"

	"github.com/cespare/xxhash/v2"
	"golang.org/x/sys/unix"
)

const (
	whiteoutPrefix = ".wh."
	whiteoutMeta   = ".wh..wh."
	whiteoutOpaque = ".wh..wh..opq"
	blockSize      = 4 << 10
	// sparseStep is the size of the holes that are looked for in sparse files.
	sparseStep = 64 << 10
)

// Apply unpacks the tar archive r into root, an empty directory, and reads r to its
// end. ctx is looked at between entries and buffers; to end a read that hangs is the
// business of r. The descriptor stays the caller's.
func Apply(ctx context.Context, root *os.File, r io.Reader, opts Options) (Result, error) {
	if opts.MaxBytes <= 0 {
		opts.MaxBytes = math.MaxInt64
	}
	if opts.MaxEntries <= 0 {
		opts.MaxEntries = math.MaxInt64
	}
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)
	a := &applier{ctx: ctx, opts: opts, umask: umask(), root: int(root.Fd()), made: map[string]bool{}}
	src, ok := r.(Chunks)
	if !ok {
		second := buffers.Get().(*[]byte)
		defer buffers.Put(second)
		src = chunked{r, *second}
	}
	a.tar = archive{src: src, buf: *buf}
	a.log = newManifestWriter(opts.Manifest)
	a.dirs = newDirs(a.root, opts.MaxEntries, &a.log)
	defer a.dirs.forget()
	err := a.all()
	if err == nil {
		err = a.log.finish()
	}
	a.result.Implied = a.impliedDirs()
	return a.result, err
}

// ApplyDir is Apply into the directory with that path.
func ApplyDir(ctx context.Context, root string, r io.Reader, opts Options) (Result, error) {
	f, err := os.OpenFile(root, os.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return Result{}, fmt.Errorf("layer root: %w", err)
	}
	defer f.Close()
	return Apply(ctx, f, r, opts)
}

// applier is the state of one Apply.
type applier struct {
	ctx    context.Context
	opts   Options
	root   int
	dirs   *dirs
	tar    archive
	umask  uint32
	bytes  int64
	result Result
	log    manifestWriter
	sum    xxhash.Digest // of the file at work
	// later holds what directories get at the end, as entries change their times,
	// and as setgid and default ACLs would be inherited by what is made inside.
	later []dirMeta
	// made has the directories that the archive lists, of those that were implied
	// before they were listed.
	made map[string]bool
}

func (a *applier) all() error {
	for {
		if err := a.ctx.Err(); err != nil {
			return context.Cause(a.ctx)
		}
		h, err := a.tar.next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return streamError(err)
		}
		if a.result.Entries++; a.result.Entries > a.opts.MaxEntries {
			return fmt.Errorf("more than %d entries: %w", a.opts.MaxEntries, ErrTooLarge)
		}
		if err := a.entry(h); err != nil {
			return entryError(h.Name, err)
		}
	}
	if err := a.finishDirs(); err != nil {
		return err
	}
	// Padding after the archive's end counts for the digests. A stream is hashed as
	// it is read, so it must be read to the end.
	if err := a.tar.drain(); err != nil {
		return streamError(err)
	}
	return nil
}

// streamError tells a broken archive from errors of the stream below, which have
// sentinels of their own.
func streamError(err error) error {
	if errors.Is(err, tar.ErrHeader) || errors.Is(err, tar.ErrFieldTooLong) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("%w: %w", ErrCorrupt, err)
	}
	return err
}

// entry makes one archive entry.
func (a *applier) entry(h *tar.Header) error {
	switch h.Typeflag {
	case tar.TypeXGlobalHeader:
		return nil
	case tar.TypeReg, tar.TypeCont, tar.TypeGNUSparse, tar.TypeDir, tar.TypeSymlink, tar.TypeLink,
		tar.TypeChar, tar.TypeBlock, tar.TypeFifo:
	default:
		return fmt.Errorf("type %q: %w", h.Typeflag, ErrUnsupported)
	}
	name, err := cleanName(h.Name)
	if err != nil {
		return err
	}
	if name == "" {
		if h.Typeflag != tar.TypeDir {
			return fmt.Errorf("the root can only be a directory: %w", ErrUnsafe)
		}
		return a.dirMetaLater(place{parent: a.root, base: "."}, h)
	}
	dir, base := path.Split(name)
	dir = strings.TrimSuffix(dir, "/")
	parent, real, err := a.dirs.open(dir)
	if err != nil {
		return err
	}
	if strings.HasPrefix(base, whiteoutPrefix) {
		return a.whiteout(parent, real, base)
	}
	at := place{parent: parent, base: base, name: name, real: join(real, base)}
	if h.Typeflag == tar.TypeDir {
		return a.mkdir(at, h)
	}
	return a.create(at, h)
}

// place is where an entry goes.
type place struct {
	parent int    // directory
	base   string // name in it
	name   string // path as the archive has it, cleaned
	real   string // path without symbolic links
}

// create makes anything but a directory, replacing what is there.
func (a *applier) create(at place, h *tar.Header) error {
	for range 2 {
		err := a.createOnce(at, h)
		if err != unix.EEXIST {
			return err
		}
		if _, err := removeAt(at.parent, at.base); err != nil {
			return err
		}
		a.log.add(&record{kind: kindRemoved, path: at.real})
		a.dirs.stale = true // parent itself holds base and stays valid
	}
	return unix.EEXIST
}

func (a *applier) createOnce(at place, h *tar.Header) error {
	mode := uint32(h.Mode) & 0o7777
	r := record{kind: kindSymlink, path: at.real, mode: mode}
	var err error
	switch h.Typeflag {
	case tar.TypeLink:
		return a.link(at, h.Linkname)
	case tar.TypeSymlink:
		r.target = h.Linkname
		err = unix.Symlinkat(h.Linkname, at.parent, at.base)
	case tar.TypeChar, tar.TypeBlock:
		if h.Devmajor < 0 || h.Devmajor > math.MaxUint32 || h.Devminor < 0 || h.Devminor > math.MaxUint32 {
			return fmt.Errorf("device %d:%d: %w", h.Devmajor, h.Devminor, ErrUnsafe)
		}
		kind := uint32(unix.S_IFCHR)
		r.kind, r.dev = kindChar, unix.Mkdev(uint32(h.Devmajor), uint32(h.Devminor))
		if h.Typeflag == tar.TypeBlock {
			r.kind, kind = kindBlock, unix.S_IFBLK
		}
		err = unix.Mknodat(at.parent, at.base, kind|mode&0o777, int(r.dev))
	case tar.TypeFifo:
		r.kind = kindFifo
		err = unix.Mknodat(at.parent, at.base, unix.S_IFIFO|mode&0o777, 0)
	default:
		return a.file(at, mode, h)
	}
	if err != nil {
		return err
	}
	a.result.Inodes++
	return a.nodeMeta(at, &r, h)
}

// file makes a regular file. It costs an openat, a write, a utimensat and a close
// when owner, mode and attributes are those that a new file has anyway.
func (a *applier) file(at place, mode uint32, h *tar.Header) error {
	if h.Size > a.opts.MaxBytes-a.bytes {
		return fmt.Errorf("more than %d bytes: %w", a.opts.MaxBytes, ErrTooLarge)
	}
	fd, err := openNew(at.parent, at.base, mode&0o777)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	a.bytes += h.Size
	a.result.Inodes++
	written, err := a.copy(fd, h)
	if err != nil {
		return err
	}
	a.result.Size += written
	r := record{kind: kindFile, path: at.real, mode: mode, size: h.Size, sum: a.sum.Sum64()}
	return a.fileMeta(fd, at, &r, h)
}

func openNew(parent int, base string, mode uint32) (int, error) {
	for {
		fd, err := unix.Openat(parent, base, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, mode)
		if err != unix.EINTR {
			return fd, err
		}
	}
}

// copy writes the contents and returns the bytes allocated, roughly. Of sparse
// entries, blocks of zeros stay holes.
func (a *applier) copy(fd int, h *tar.Header) (int64, error) {
	sparse := isSparse(h)
	var off, allocated int64
	a.sum.Reset()
	for off < h.Size {
		if err := a.ctx.Err(); err != nil {
			return 0, context.Cause(a.ctx)
		}
		want := h.Size - off
		if sparse {
			want = min(want, sparseStep-off%sparseStep)
		}
		b, err := a.tar.some(want)
		if err != nil {
			return 0, streamError(err)
		}
		if a.log.wanted() {
			a.sum.Write(b)
		}
		at := off
		off += int64(len(b))
		if sparse && allZero(b) {
			continue
		}
		if err := writeAt(fd, b, at); err != nil {
			return 0, err
		}
		allocated += (off+blockSize-1)&^(blockSize-1) - at&^(blockSize-1)
	}
	if sparse {
		return allocated, unix.Ftruncate(fd, h.Size)
	}
	return allocated, nil
}

func writeAt(fd int, b []byte, off int64) error {
	for len(b) > 0 {
		n, err := unix.Pwrite(fd, b, off)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return err
		}
		if n == 0 {
			return io.ErrShortWrite
		}
		b, off = b[n:], off+int64(n)
	}
	return nil
}

func isSparse(h *tar.Header) bool {
	if h.Typeflag == tar.TypeGNUSparse {
		return true
	}
	for k := range h.PAXRecords {
		if strings.HasPrefix(k, "GNU.sparse.") {
			return true
		}
	}
	return false
}

func allZero(b []byte) bool {
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}

// link makes a hard link to a file of this layer, whose path is resolved inside the
// root like any other. The link itself has no metadata.
func (a *applier) link(at place, target string) error {
	to, err := cleanName(target)
	if err != nil {
		return fmt.Errorf("link target %q: %w", clip(target), err)
	}
	if to == "" {
		return fmt.Errorf("link to the root: %w", ErrUnsafe)
	}
	if to == at.name {
		return nil // some archivers list a file as a link to itself
	}
	dir, base := path.Split(to)
	from, real := a.root, ""
	if dir != "" {
		if from, real, err = resolveReal(a.root, strings.TrimSuffix(dir, "/"), dirFlags); err != nil {
			return fmt.Errorf("link target %q: %w", clip(target), err)
		}
		defer unix.Close(from)
	}
	err = unix.Linkat(from, base, at.parent, at.base, 0)
	if err == unix.EEXIST && sameFile(from, base, at.parent, at.base) {
		return nil // replacing the file by itself would remove it
	}
	if err == nil {
		a.log.add(&record{kind: kindLink, path: at.real, target: join(real, base)})
	} else if err != unix.EEXIST {
		return fmt.Errorf("link target %q: %w", clip(target), err)
	}
	return err
}

func sameFile(dir1 int, name1 string, dir2 int, name2 string) bool {
	var s1, s2 unix.Stat_t
	return unix.Fstatat(dir1, name1, &s1, unix.AT_SYMLINK_NOFOLLOW) == nil &&
		unix.Fstatat(dir2, name2, &s2, unix.AT_SYMLINK_NOFOLLOW) == nil && s1.Dev == s2.Dev && s1.Ino == s2.Ino
}

// mkdir makes a listed directory, or takes over one that is there.
func (a *applier) mkdir(at place, h *tar.Header) error {
	if len(a.dirs.implied) > 0 {
		a.made[at.name] = true
	}
	err := unix.Mkdirat(at.parent, at.base, 0o755)
	if err == unix.EEXIST {
		var st unix.Stat_t
		if err := unix.Fstatat(at.parent, at.base, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return err
		}
		if st.Mode&unix.S_IFMT == unix.S_IFDIR {
			return a.dirMetaLater(at, h)
		}
		if err := unix.Unlinkat(at.parent, at.base, 0); err != nil {
			return err
		}
		a.log.add(&record{kind: kindRemoved, path: at.real})
		if err := unix.Mkdirat(at.parent, at.base, 0o755); err != nil {
			return err
		}
		a.dirs.stale = true
		if isWhiteout(&st) {
			if err := a.opaque(at.parent, at.base, at.real); err != nil {
				return err
			}
		}
	} else if err != nil {
		return err
	}
	a.result.Inodes++
	a.result.Size += blockSize
	return a.dirMetaLater(at, h)
}

func (a *applier) opaque(parent int, base, real string) error {
	a.log.add(&record{kind: kindOpaque, path: real})
	return setOpaque(parent, base)
}

// whiteout hides base, or everything, of the layers below. What this layer has itself
// under that name stays, whatever the order of the entries.
func (a *applier) whiteout(parent int, real, base string) error {
	switch {
	case base == whiteoutOpaque:
		if real == "" {
			// Overlay does not look at the attribute of a layer's root.
			a.result.OpaqueRoot = true
			return nil
		}
		return a.opaque(parent, ".", real)
	case strings.HasPrefix(base, whiteoutMeta):
		return nil // notes that aufs kept for itself
	}
	hidden := base[len(whiteoutPrefix):]
	if hidden == "" || hidden == "." || hidden == ".." {
		return fmt.Errorf("whiteout of nothing: %w", ErrUnsafe)
	}
	err := unix.Mknodat(parent, hidden, unix.S_IFCHR, 0)
	if err == nil {
		a.result.Inodes++
		a.log.add(&record{kind: kindWhiteout, path: join(real, hidden)})
		return nil
	}
	if err != unix.EEXIST {
		return err
	}
	var st unix.Stat_t
	if err := unix.Fstatat(parent, hidden, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT == unix.S_IFDIR {
		return a.opaque(parent, hidden, join(real, hidden))
	}
	return nil
}

// impliedDirs leaves out those that the archive listed after all.
func (a *applier) impliedDirs() []string {
	var out []string
	for _, d := range a.dirs.implied {
		if !a.made[d] {
			out = append(out, d)
		}
	}
	n := int64(len(a.dirs.implied))
	a.result.Inodes += n
	a.result.Size += n * blockSize
	return out
}

// cleanName makes an entry name relative to the root; "" is the root itself. ".." is
// refused rather than resolved: no honest archiver writes it.
func cleanName(name string) (string, error) {
	if strings.IndexByte(name, 0) >= 0 {
		return "", fmt.Errorf("NUL in name: %w", ErrUnsafe)
	}
	clean := true // but for what is cut off here
	out := strings.TrimSuffix(strings.TrimPrefix(name, "./"), "/")
	for start := 0; start <= len(out); {
		part := out[start:]
		if i := strings.IndexByte(part, '/'); i >= 0 {
			part = part[:i]
		}
		switch part {
		case "..":
			return "", fmt.Errorf("\"..\" in name: %w", ErrUnsafe)
		case "", ".":
			clean = false
		}
		start += len(part) + 1
	}
	if !clean {
		out = strings.TrimPrefix(path.Clean("/"+name), "/")
	}
	if len(out) >= unix.PathMax {
		return "", fmt.Errorf("name of %d bytes, at most %d: %w", len(out), unix.PathMax-1, ErrUnsafe)
	}
	return out, nil
}

func clip(s string) string {
	if len(s) > 256 {
		return s[:256] + "…"
	}
	return s
}

// umask reads the mask of the process, which umask(2) could only do by changing it.
// When it cannot be read all bits count as masked: each file then costs a chmod.
func umask() uint32 {
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return 0o777
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, "Umask:"); ok {
			if m, err := strconv.ParseUint(strings.TrimSpace(v), 8, 32); err == nil {
				return uint32(m)
			}
		}
	}
	return 0o777
}
