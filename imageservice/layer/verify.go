package layer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"strings"

	"github.com/cespare/xxhash/v2"
	"golang.org/x/sys/unix"
)

// VerifyOptions say how thorough Verify is.
type VerifyOptions struct {
	// Contents reads all files and compares what is in them. Without it only what
	// lstat(2) and getxattr(2) tell is compared, which finds what is missing, cut off
	// or empty: what a power cut makes of files that were not synced.
	Contents bool
}

// Deviation is one thing in which a directory is not what its manifest says.
type Deviation struct {
	Path string // below the root; "" is the root itself
	// What differs: "missing", "extra", "type", "mode", "owner", "time", "size", "content",
	// "unreadable", "target" (of a symbolic or hard link), "device", "attribute".
	What      string
	Want, Got string // in words; may be empty
}

func (d Deviation) String() string {
	s := fmt.Sprintf("%q: %s", clip(d.Path), d.What)
	if d.Want != "" || d.Got != "" {
		s += fmt.Sprintf(" %s, want %s", clip(d.Got), clip(d.Want))
	}
	return s
}

// Checked tells what Verify looked at.
type Checked struct {
	Entries    int64 // of the manifest that count
	Bytes      int64 // of contents that were read
	Deviations int64
}

// Verify compares root, a directory that Apply filled, with the manifest that it wrote
// (Options.Manifest), and calls report for each deviation, one after the other. A layer is
// whole when Deviations is 0 and the error nil. An error is about the comparing itself:
// ErrManifest when the manifest is damaged (then the layer can be trusted as little as
// before), or ctx's cause; what the disk does not give back is a deviation.
//
//	root, _ := os.Open(dir)
//	manifest, _ := os.Open(file)
//	checked, err := layer.Verify(ctx, root, manifest, layer.VerifyOptions{Contents: true},
//		func(d layer.Deviation) { fmt.Println(d) })
//
// The manifest is read twice. Nothing is changed, times of access included, and no
// symbolic link is followed. Memory is 8 bytes for an entry, and more only for layers whose
// archive replaced its own entries. Directories that the archive implied are looked at for
// being there only, since AdoptDirs changes them.
func Verify(ctx context.Context, root *os.File, manifest io.ReadSeeker, opts VerifyOptions, report func(Deviation)) (Checked, error) {
	v := &verifier{ctx: ctx, opts: opts, report: report, root: int(root.Fd()), parent: -1, removed: map[string]uint64{}}
	defer v.close()
	err := v.each(manifest, func(i uint64, r *record) {
		if r.kind == kindRemoved {
			v.removed[r.path] = i
		}
	})
	if err != nil {
		return v.checked, err
	}
	if err := v.each(manifest, v.check); err != nil {
		return v.checked, err
	}
	slices.Sort(v.seen)
	return v.checked, v.extras()
}

type verifier struct {
	ctx     context.Context
	opts    VerifyOptions
	report  func(Deviation)
	root    int
	checked Checked
	removed map[string]uint64 // path -> number of the last record that voids it
	seen    []uint64          // hashes of the paths that have to be there

	dir    string // whose descriptor parent is, unless that is -1
	parent int
	buf    []byte
}

func (v *verifier) close() {
	if v.parent >= 0 {
		unix.Close(v.parent)
	}
	v.parent = -1
}

func (v *verifier) each(manifest io.ReadSeeker, fn func(i uint64, r *record)) error {
	if _, err := manifest.Seek(0, io.SeekStart); err != nil {
		return fmt.Errorf("layer manifest: %w", err)
	}
	m, err := newManifestReader(manifest)
	if err != nil {
		return fmt.Errorf("layer manifest: %w", err)
	}
	for i := uint64(0); ; i++ {
		if v.ctx.Err() != nil {
			return context.Cause(v.ctx)
		}
		r, err := m.next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return fmt.Errorf("layer manifest: %w", err)
		}
		fn(i, r)
	}
}

// void tells whether a later record says that record i does not count any more.
func (v *verifier) void(i uint64, p string) bool {
	if len(v.removed) == 0 {
		return false
	}
	for {
		if at, ok := v.removed[p]; ok && at > i {
			return true
		}
		if p == "" {
			return false
		}
		p = dirOf(p)
	}
}

func (v *verifier) deviates(p, what, want, got string) {
	v.checked.Deviations++
	v.report(Deviation{Path: p, What: what, Want: want, Got: got})
}

// check compares what one record describes.
func (v *verifier) check(i uint64, r *record) {
	if r.kind == kindRemoved || v.void(i, r.path) {
		return
	}
	v.checked.Entries++
	v.seen = append(v.seen, xxhash.Sum64String(r.path))
	parent, err := v.open(dirOf(r.path))
	base := path.Base(r.path)
	if r.path == "" {
		base = "."
	}
	var st unix.Stat_t
	if err == nil {
		err = unix.Fstatat(parent, base, &st, unix.AT_SYMLINK_NOFOLLOW)
	}
	if err != nil {
		v.failed(r.path, err)
		return
	}
	if want := typeOf(r.kind); want != 0 && st.Mode&unix.S_IFMT != want {
		v.deviates(r.path, "type", typeName(want), typeName(st.Mode))
		return
	}
	switch r.kind {
	case kindImplied:
	case kindOpaque:
		v.attribute(parent, base, r.path, opaqueXattr, "y")
	case kindWhiteout:
		v.number(r.path, "device", 0, st.Rdev)
	case kindLink:
		v.link(i, r, &st)
	default:
		v.inode(parent, base, r, &st)
	}
}

// failed reports a call that failed as what it means for the layer.
func (v *verifier) failed(p string, err error) {
	switch err {
	case unix.ENOENT, unix.ENOTDIR, unix.ELOOP:
		v.deviates(p, "missing", "", "")
	default:
		v.deviates(p, "unreadable", "", err.Error())
	}
}

// open returns a descriptor of a directory, which stays this verifier's.
func (v *verifier) open(dir string) (int, error) {
	if dir == "" {
		return v.root, nil
	}
	if v.parent >= 0 && v.dir == dir {
		return v.parent, nil
	}
	fd, err := openBeneath(v.root, dir, dirFlags)
	if err != nil {
		return -1, err
	}
	v.close()
	v.dir, v.parent = dir, fd
	return fd, nil
}

func (v *verifier) number(p, what string, want, got uint64) {
	if want != got {
		v.deviates(p, what, fmt.Sprint(want), fmt.Sprint(got))
	}
}

// inode compares all that a record of the usual kinds has.
func (v *verifier) inode(parent int, base string, r *record, st *unix.Stat_t) {
	if got := st.Mode & 0o7777; r.kind != kindSymlink && got != r.mode {
		v.deviates(r.path, "mode", fmt.Sprintf("%04o", r.mode), fmt.Sprintf("%04o", got))
	}
	if st.Uid != r.uid || st.Gid != r.gid {
		v.deviates(r.path, "owner", fmt.Sprintf("%d:%d", r.uid, r.gid), fmt.Sprintf("%d:%d", st.Uid, st.Gid))
	}
	if !sameTime(r.mtime, st.Mtim) {
		v.deviates(r.path, "time", fmt.Sprintf("%d.%09d", r.mtime.Sec, r.mtime.Nsec), fmt.Sprintf("%d.%09d", st.Mtim.Sec, st.Mtim.Nsec))
	}
	for _, name := range sortedNames(r.xattrs) {
		v.attribute(parent, base, r.path, name, r.xattrs[name])
	}
	switch r.kind {
	case kindFile:
		if st.Size != r.size {
			v.number(r.path, "size", uint64(r.size), uint64(st.Size))
		} else if v.opts.Contents {
			v.content(parent, base, r)
		}
	case kindSymlink:
		got, err := readlinkat(parent, base)
		if err != nil {
			v.failed(r.path, err)
		} else if got != r.target {
			v.deviates(r.path, "target", r.target, got)
		}
	case kindChar, kindBlock:
		v.number(r.path, "device", r.dev, st.Rdev)
	}
}

// sameTime allows for file systems that keep less: whole seconds, or not so many of them.
func sameTime(want, got unix.Timespec) bool {
	if want.Sec != int64(int32(want.Sec)) {
		return true
	}
	return want.Sec == got.Sec && (want.Nsec == got.Nsec || got.Nsec == want.Nsec/1000*1000 || got.Nsec == 0)
}

func (v *verifier) attribute(parent int, base, p, name, want string) {
	b := make([]byte, max(len(want)+1, 256))
	n, err := unix.Lgetxattr(procPath(parent, base), name, b)
	switch {
	case err != nil:
		v.deviates(p, "attribute", name, err.Error())
	case string(b[:n]) != want:
		v.deviates(p, "attribute", fmt.Sprintf("%s=%q", name, want), fmt.Sprintf("%q", b[:n]))
	}
}

// link checks that two names have one file. When the archive replaced the first name
// afterwards, there is nothing to compare with.
func (v *verifier) link(i uint64, r *record, st *unix.Stat_t) {
	if v.void(i, r.target) {
		return
	}
	fd, err := openBeneath(v.root, r.target, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC)
	if err == nil {
		defer unix.Close(fd)
		var to unix.Stat_t
		if err = unix.Fstat(fd, &to); err == nil && to.Dev == st.Dev && to.Ino == st.Ino {
			return
		}
	}
	v.deviates(r.path, "target", r.target, "another file")
}

func (v *verifier) content(parent int, base string, r *record) {
	fd, err := unix.Openat(parent, base, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_NOATIME|unix.O_CLOEXEC, 0)
	if err != nil {
		v.failed(r.path, err)
		return
	}
	defer unix.Close(fd)
	if v.buf == nil {
		v.buf = make([]byte, 256<<10)
	}
	sum := xxhash.New()
	for v.ctx.Err() == nil {
		n, err := unix.Read(fd, v.buf)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			v.deviates(r.path, "unreadable", "", err.Error())
			return
		}
		if n == 0 {
			if got := sum.Sum64(); got != r.sum {
				v.deviates(r.path, "content", fmt.Sprintf("%016x", r.sum), fmt.Sprintf("%016x", got))
			}
			return
		}
		sum.Write(v.buf[:n])
		v.checked.Bytes += int64(n)
	}
}

// extras finds what is there and in no record. What is in an extra directory is not
// listed.
func (v *verifier) extras() error {
	todo := []string{""}
	for len(todo) > 0 {
		if v.ctx.Err() != nil {
			return context.Cause(v.ctx)
		}
		dir := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		more, err := v.extrasIn(dir)
		if err != nil {
			v.failed(dir, err)
		}
		todo = append(todo, more...)
	}
	return nil
}

// extrasIn returns the directories in dir that are in the manifest.
func (v *verifier) extrasIn(dir string) (known []string, err error) {
	name := dir
	if name == "" {
		name = "."
	}
	fd, err := openBeneath(v.root, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOATIME|unix.O_CLOEXEC)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), dir)
	defer f.Close()
	for {
		entries, err := f.ReadDir(1024)
		for _, e := range entries {
			p := join(dir, e.Name())
			if _, ok := slices.BinarySearch(v.seen, xxhash.Sum64String(p)); !ok {
				v.deviates(p, "extra", "", "")
			} else if e.IsDir() {
				known = append(known, p)
			}
		}
		if errors.Is(err, io.EOF) {
			return known, nil
		}
		if err != nil {
			return known, err
		}
	}
}

func dirOf(p string) string {
	if i := strings.LastIndexByte(p, '/'); i >= 0 {
		return p[:i]
	}
	return ""
}

// typeOf is what a record's kind is in a mode; 0 is any: a link may be to anything.
func typeOf(kind byte) uint32 {
	switch kind {
	case kindFile:
		return unix.S_IFREG
	case kindDir, kindImplied, kindOpaque:
		return unix.S_IFDIR
	case kindSymlink:
		return unix.S_IFLNK
	case kindChar, kindWhiteout:
		return unix.S_IFCHR
	case kindBlock:
		return unix.S_IFBLK
	case kindFifo:
		return unix.S_IFIFO
	}
	return 0
}

func typeName(mode uint32) string {
	switch mode & unix.S_IFMT {
	case unix.S_IFREG:
		return "file"
	case unix.S_IFDIR:
		return "directory"
	case unix.S_IFLNK:
		return "symbolic link"
	case unix.S_IFCHR:
		return "character device"
	case unix.S_IFBLK:
		return "block device"
	case unix.S_IFIFO:
		return "fifo"
	}
	return fmt.Sprintf("mode %o", mode)
}
