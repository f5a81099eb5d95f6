package wire

import (
	"math"
	"strconv"
	"strings"
	"unsafe"
)

// An ExecImage is all that a shim needs to start a process in its container
// without the OCI runtime: what the runtime would have worked out, laid out so
// that a forked child, which can neither allocate nor call a library, only has to
// pass pointers on to the kernel.
//
// Version 2 of the protocol has it. It comes in ExecData beside the process's
// OCI description, which the shim falls back to.
type ExecImage struct {
	Args, Env []string
	// Files are the paths of the program, the ones to try first before others;
	// one that does not exist or may not be executed is passed over.
	Files []string
	Dir   string // working directory, an absolute path
	// Keyring is the session keyring to join, "" for none.
	Keyring string
	// Cgroups are cgroup.procs files, as the shim sees them.
	Cgroups     []string
	OOMScoreAdj *int

	UID, GID uint32
	Groups   []uint32
	Rlimits  []Rlimit

	// Capability sets; bit n stands for the capability of number n.
	Bounding, Effective, Permitted, Inheritable, Ambient uint64

	NoNewPrivs bool
	// Seccomp says that the container's filter applies, which the shim has
	// kept, with these flags of seccomp(2).
	Seccomp      bool
	SeccompFlags uint64
	Umask        *uint32 // nil leaves it
}

// Rlimit is what prlimit(2) sets.
type Rlimit struct{ Resource, Cur, Max uint64 }

// The image is a header of 64-bit words, then what these point to. A pointer is
// an offset into the image, 0 for none. A list of strings is a table of pointers
// that ends with 0, as execve wants it. The reader adds the address at
// which it has mapped the image to each pointer.
const (
	ImageMagic = 0x3165676d69786562 // "beximge1"

	WordMagic = iota - 1
	WordSize  // of the image in bytes
	WordArgs  // table
	WordEnv   // table
	WordFiles // table
	WordCgroups
	WordDir
	WordKeyring
	WordOOM // decimal text
	WordUID
	WordGID
	WordGroups // 32-bit words
	WordGroupCount
	WordRlimits // three words each
	WordRlimitCount
	WordBounding
	WordEffective
	WordPermitted
	WordInheritable
	WordAmbient
	WordFlags
	WordSeccompFlags
	WordUmask
	ImageWords
)

// Flags of an image.
const (
	ImageNoNewPrivs = 1 << iota
	ImageSeccomp
	ImageUmask
)

// Limits of an image.
const (
	MaxImage        = 8 << 20 // bytes
	maxImageGroups  = 65536   // NGROUPS_MAX
	maxImageRlimits = 64
)

// Append appends the image to b. The error is ErrSize when a limit is exceeded,
// ErrFrame when a string has a zero byte in it.
func (m *ExecImage) Append(b []byte) ([]byte, error) {
	if len(m.Groups) > maxImageGroups || len(m.Rlimits) > maxImageRlimits || len(m.Args) == 0 || len(m.Files) == 0 {
		return b, ErrSize
	}
	w := imageWriter{b: make([]byte, ImageWords*8)}
	w.set(WordMagic, ImageMagic)
	w.set(WordArgs, w.table(m.Args))
	w.set(WordEnv, w.table(m.Env))
	w.set(WordFiles, w.table(m.Files))
	w.set(WordCgroups, w.table(m.Cgroups))
	w.set(WordDir, w.text(m.Dir))
	if m.Keyring != "" {
		w.set(WordKeyring, w.text(m.Keyring))
	}
	if m.OOMScoreAdj != nil {
		w.set(WordOOM, w.text(strconv.Itoa(*m.OOMScoreAdj)))
	}
	w.set(WordUID, uint64(m.UID))
	w.set(WordGID, uint64(m.GID))
	w.set(WordGroupCount, uint64(len(m.Groups)))
	w.set(WordGroups, w.here())
	for _, g := range m.Groups {
		w.b = append(w.b, (*[4]byte)(unsafe.Pointer(&g))[:]...)
	}
	w.set(WordRlimitCount, uint64(len(m.Rlimits)))
	w.set(WordRlimits, w.here())
	for _, r := range m.Rlimits {
		w.word(r.Resource)
		w.word(r.Cur)
		w.word(r.Max)
	}
	for i, set := range []uint64{m.Bounding, m.Effective, m.Permitted, m.Inheritable, m.Ambient} {
		w.set(WordBounding+i, set)
	}
	w.set(WordFlags, m.flags())
	w.set(WordSeccompFlags, m.SeccompFlags)
	if m.Umask != nil {
		w.set(WordUmask, uint64(*m.Umask))
	}
	w.b = append(w.b, 0) // ends the last string, whatever it is
	w.set(WordSize, uint64(len(w.b)))
	switch {
	case w.bad:
		return b, ErrFrame
	case len(w.b) > MaxImage:
		return b, ErrSize
	}
	return append(b, w.b...), nil
}

func (m *ExecImage) flags() (f uint64) {
	if m.NoNewPrivs {
		f |= ImageNoNewPrivs
	}
	if m.Seccomp {
		f |= ImageSeccomp
	}
	if m.Umask != nil {
		f |= ImageUmask
	}
	return f
}

type imageWriter struct {
	b   []byte
	bad bool
}

// Numbers are in the machine's own order: the reader is the kernel beside us.
func (w *imageWriter) set(word int, v uint64) { copy(w.b[word*8:], (*[8]byte)(unsafe.Pointer(&v))[:]) }

func (w *imageWriter) word(v uint64) { w.b = append(w.b, (*[8]byte)(unsafe.Pointer(&v))[:]...) }

// here is the offset of what comes next, at a multiple of 8.
func (w *imageWriter) here() uint64 {
	for len(w.b)%8 != 0 {
		w.b = append(w.b, 0)
	}
	return uint64(len(w.b))
}

func (w *imageWriter) text(s string) uint64 {
	at := uint64(len(w.b))
	w.bad = w.bad || strings.IndexByte(s, 0) >= 0
	w.b = append(append(w.b, s...), 0)
	return at
}

func (w *imageWriter) table(list []string) uint64 {
	at := w.here()
	w.b = append(w.b, make([]byte, (len(list)+1)*8)...)
	for i, s := range list {
		w.set(int(at)/8+i, w.text(s))
	}
	return at
}

// Relocate checks an image of size bytes that lies at the address base, and turns
// its offsets into addresses. The error is ErrFrame, after which the image must
// not be used. words are the whole image but for what does not fill a word at
// its end; that its last byte is zero is for the caller to check.
func Relocate(words []uint64, size int, base uintptr) error {
	if size > MaxImage || size < ImageWords*8 || len(words) != size/8 ||
		words[WordMagic] != ImageMagic || words[WordSize] != uint64(size) {
		return ErrFrame
	}
	r := relocation{words, uint64(size), uint64(base)}
	for _, w := range [...]int{WordArgs, WordEnv, WordFiles, WordCgroups} {
		if !r.table(w) {
			return ErrFrame
		}
	}
	groups, limits := words[WordGroupCount], words[WordRlimitCount]
	ok := groups <= maxImageGroups && limits <= maxImageRlimits &&
		r.pointer(&words[WordGroups], groups*4) && r.pointer(&words[WordRlimits], limits*24) &&
		r.pointer(&words[WordDir], 1) &&
		(words[WordKeyring] == 0 || r.pointer(&words[WordKeyring], 1)) &&
		(words[WordOOM] == 0 || r.pointer(&words[WordOOM], 1)) &&
		words[WordUID] <= math.MaxUint32 && words[WordGID] <= math.MaxUint32 && words[WordUmask] <= 0o777
	if !ok {
		return ErrFrame
	}
	return nil
}

type relocation struct {
	words      []uint64
	size, base uint64
}

// pointer turns the offset of something of n bytes into its address.
func (r *relocation) pointer(p *uint64, n uint64) bool {
	if *p < ImageWords*8 || *p > r.size || r.size-*p < n {
		return false
	}
	*p += r.base
	return true
}

// table does so with a table and what is in it. A string ends at the latest with
// the image, whose last byte is zero.
func (r *relocation) table(word int) bool {
	at := r.words[word]
	if at%8 != 0 || !r.pointer(&r.words[word], 8) {
		return false
	}
	for i := at / 8; i < uint64(len(r.words)); i++ {
		if r.words[i] == 0 {
			return true
		}
		if !r.pointer(&r.words[i], 1) {
			return false
		}
	}
	return false
}
