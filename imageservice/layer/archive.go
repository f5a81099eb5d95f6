package layer

import (
	"archive/tar"
	"bytes"
	"io"
	"time"
)

// Chunks is a stream that hands out its own buffers, which saves copying it. Chunk returns
// the next bytes, at least one, which are valid until the next call of either method; or an
// error. Apply uses it where its reader has it, as a Stream has.
type Chunks interface {
	io.Reader
	Chunk() ([]byte, error)
}

// chunked makes Chunks of any reader.
type chunked struct {
	io.Reader
	buf []byte
}

func (c chunked) Chunk() ([]byte, error) {
	for range 100 {
		if n, err := c.Read(c.buf); n > 0 {
			return c.buf[:n], nil
		} else if err != nil {
			return nil, err
		}
	}
	return nil, io.ErrNoProgress
}

const tarBlock = 512

// archive reads a tar archive. The headers of nearly all entries of nearly all layers,
// ustar without anything special, it reads itself; any other header, valid or not, is given
// to archive/tar, which knows PAX, GNU, base-256 numbers, sparse files and all the ways
// in which a header can be wrong. A fuzz test compares the two.
type archive struct {
	src  Chunks
	cur  []byte // of the last chunk, what is not read yet
	off  int64  // of the stream, where cur begins
	left int64  // of the contents of the entry
	slow *tar.Reader
	h    tar.Header
	// scratch holds a block that lies across two chunks.
	scratch [tarBlock]byte
	buf     []byte // for contents that archive/tar reads
}

// more makes cur hold something.
func (a *archive) more() error {
	for len(a.cur) == 0 {
		var err error
		if a.cur, err = a.src.Chunk(); err != nil {
			a.cur = nil
			return err
		}
	}
	return nil
}

// Read implements io.Reader: the bytes of the archive, for archive/tar.
func (a *archive) Read(p []byte) (int, error) {
	if err := a.more(); err != nil {
		return 0, err
	}
	n := copy(p, a.cur)
	a.cur = a.cur[n:]
	a.off += int64(n)
	return n, nil
}

// block returns the next block, or io.EOF when there is none at all. It is valid until the
// next call.
func (a *archive) block() ([]byte, error) {
	if len(a.cur) >= tarBlock {
		b := a.cur[:tarBlock]
		a.cur = a.cur[tarBlock:]
		a.off += tarBlock
		return b, nil
	}
	_, err := io.ReadFull(a, a.scratch[:])
	return a.scratch[:], err
}

func (a *archive) skip(n int64) error {
	for n > 0 {
		if err := a.more(); err != nil {
			return err
		}
		k := min(n, int64(len(a.cur)))
		a.cur = a.cur[k:]
		a.off += k
		n -= k
	}
	return nil
}

// next goes to the next entry, or returns io.EOF. The header is valid until the next call.
func (a *archive) next() (*tar.Header, error) {
	if a.slow != nil {
		if _, err := io.CopyBuffer(onlyWriter{io.Discard}, onlyReader{a.slow}, a.buf); err != nil {
			return nil, err
		}
		a.slow = nil
	}
	if err := a.skip(a.left); err == io.EOF {
		return nil, io.ErrUnexpectedEOF
	} else if err != nil {
		return nil, err
	}
	a.left = 0
	// An archive may end without the padding of its last entry.
	if err := a.skip(-a.off & (tarBlock - 1)); err != nil {
		return nil, err
	}
	b, err := a.block()
	if err != nil {
		return nil, err
	}
	if a.parse(b) {
		return &a.h, nil
	}
	// What follows may be two blocks of zeros, the end.
	a.slow = tar.NewReader(io.MultiReader(bytes.NewReader(bytes.Clone(b)), a))
	return a.slow.Next()
}

// some returns the next bytes of the entry's contents, at most n, which are valid until the
// next call of any method. There must be some left.
func (a *archive) some(n int64) ([]byte, error) {
	if a.slow != nil {
		k, err := io.ReadFull(a.slow, a.buf[:min(n, int64(len(a.buf)))])
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return a.buf[:k], err
	}
	if err := a.more(); err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return nil, err
	}
	b := a.cur[:min(n, int64(len(a.cur)), a.left)]
	a.cur = a.cur[len(b):]
	a.off += int64(len(b))
	a.left -= int64(len(b))
	return b, nil
}

// drain reads what follows the archive's end.
func (a *archive) drain() error {
	for {
		a.cur = nil
		if err := a.more(); err == io.EOF {
			return nil
		} else if err != nil {
			return err
		}
	}
}

var (
	magicUstar = []byte("ustar\x0000")
	magicGNU   = []byte("ustar  \x00")
)

// parse reads a plain header into a.h and tells whether it was one. The layout is that of
// POSIX.1-1988; in GNU's, what ustar has for a prefix of the name is used otherwise.
func (a *archive) parse(b []byte) bool {
	kind := b[156]
	ustar := bytes.Equal(b[257:265], magicUstar)
	if kind != 0 && (kind < '0' || kind > '7') || !ustar && !bytes.Equal(b[257:265], magicGNU) ||
		!ustar && b[345] != 0 || ustar && bytes.Equal(b[508:], []byte("tar\x00")) {
		return false
	}
	sum, ok := octal(b[148:156])
	if !ok || sum != checksum(b) {
		return false
	}
	var n [7]int64
	for i, f := range [...][]byte{b[100:108], b[108:116], b[116:124], b[124:136], b[136:148], b[329:337], b[337:345]} {
		if n[i], ok = octal(f); !ok {
			return false
		}
	}
	a.h = tar.Header{
		Typeflag: kind, Name: text(b[:100]), Linkname: text(b[157:257]), Mode: n[0], Uid: int(n[1]), Gid: int(n[2]),
		Size: n[3], ModTime: time.Unix(n[4], 0), Devmajor: n[5], Devminor: n[6],
	}
	if ustar && b[345] != 0 {
		a.h.Name = text(b[345:500]) + "/" + a.h.Name
	}
	switch kind {
	case 0:
		a.h.Typeflag = tar.TypeReg
		if n := a.h.Name; n != "" && n[len(n)-1] == '/' {
			a.h.Typeflag = tar.TypeDir
			break
		}
		a.left = n[3]
	case tar.TypeReg, tar.TypeCont:
		a.left = n[3]
	}
	return true
}

// octal reads a field: digits between spaces and zero bytes; none are 0.
func octal(b []byte) (n int64, ok bool) {
	i := 0
	for i < len(b) && (b[i] == ' ' || b[i] == 0) {
		i++
	}
	for ; i < len(b) && b[i]-'0' < 8; i++ {
		n = n<<3 | int64(b[i]-'0')
	}
	for ; i < len(b); i++ {
		if b[i] != ' ' && b[i] != 0 {
			return 0, false
		}
	}
	return n, true
}

// checksum adds up the bytes of a header, its own field taken as spaces.
func checksum(b []byte) int64 {
	sum := int64(8 * ' ')
	for i, c := range b {
		if i < 148 || i >= 156 {
			sum += int64(c)
		}
	}
	return sum
}

// text is a field up to its first zero byte.
func text(b []byte) string {
	if i := bytes.IndexByte(b, 0); i >= 0 {
		b = b[:i]
	}
	return string(b)
}
