// Package gunzip decompresses gzip streams (RFC 1952, RFC 1951), about twice as fast
// as a decoder that reads its input byte by byte. It accepts what compress/gzip accepts
// and refuses what that refuses; a fuzz test compares the two.
//
// # Vocabulary
//
//   - member: header, deflate stream, trailer. A gzip stream is one or more of them.
//   - window: the 32 KiB of output that a match may refer to.
//   - symbol: what one Huffman code stands for: a literal byte, the length of a match
//     (its distance follows), or the end of the block.
//
// # How it is fast
//
// Bits are taken from 64 of them that are refilled by one load of eight bytes. Codes
// are decoded by one look-up, for the rare long ones two, in tables whose entries hold all
// that is to be done. Matches are copied eight bytes at a time. The output goes straight
// into the caller's buffer, in front of which the window is kept.
//
// # Caveats
//
//   - Memory is about 150 KiB for a Reader, whatever the stream.
//   - The input is read ahead of what was decoded.
package gunzip

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
)

const (
	// Window is the room that Fill needs in front of what it writes.
	Window = 32 << 10
	// MinBuffer is the smallest buffer that Fill takes.
	MinBuffer = Window + 4<<10

	inputSize = 64 << 10
	// inputSlack is what one turn of the decoding loop may read beyond its position.
	inputSlack = 24
	// outputSlack is what one turn may write: three literals, a match, and the
	// overhang of its copy.
	outputSlack = 3 + 258 + 16
	// maxName is the longest name or comment in a header, with its zero byte.
	maxName = 512
)

// Errors. A stream that ends too early is io.ErrUnexpectedEOF.
var (
	// ErrHeader: no gzip stream, or garbage after one.
	ErrHeader = errors.New("gzip: invalid header")
	// ErrChecksum: the contents are not those that the trailer tells.
	ErrChecksum = errors.New("gzip: invalid checksum")
	// ErrCorrupt: no deflate stream. The text tells where.
	ErrCorrupt = errors.New("gzip: invalid deflate data")
)

// The states of a Reader.
type state uint8

const (
	atHeader state = iota
	atBlock
	inStored
	inHuffman
	atTrailer
)

// Reader decompresses a stream. Make it with NewReader; it may be used again by Reset.
type Reader struct {
	src   io.Reader
	state state
	final bool // the block is the member's last one
	err   error

	in     [inputSize + 2*inputSlack]byte
	pos    int    // next byte of in that is not in bits
	end    int    // of what was read into in
	limit  int    // end, and once the source has ended the zeros after it
	eof    bool   // the source has ended
	srcErr error  // why reading stopped, if not by eof
	read   int64  // bytes taken from the source, for errors
	bits   uint64 // the next nbits bits; those above are zero
	nbits  uint

	window  [Window]byte // what was decoded last, right aligned
	history int          // how much of it belongs to the member
	stored  int          // bytes left of a stored block
	crc     uint32
	size    uint32 // of the member, modulo 2^32

	codes codes

	// For Read.
	buf       []byte
	from, got int
}

// NewReader returns a Reader of src.
func NewReader(src io.Reader) *Reader {
	r := &Reader{}
	r.Reset(src)
	return r
}

// Reset makes the Reader as new.
func (r *Reader) Reset(src io.Reader) {
	r.src, r.state, r.err = src, atHeader, nil
	r.pos, r.end, r.limit, r.eof, r.srcErr, r.read = 0, 0, 0, false, nil, 0
	r.bits, r.nbits, r.from, r.got = 0, 0, 0, 0
}

// Read implements io.Reader.
func (r *Reader) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if r.buf == nil {
		r.buf = make([]byte, Window+64<<10)
	}
	for r.from == r.got {
		n, err := r.Fill(r.buf)
		if n == 0 && err != nil {
			return 0, err
		}
		r.from, r.got = Window, Window+n
	}
	n := copy(p, r.buf[r.from:r.got])
	r.from += n
	return n, nil
}

// Fill decompresses into b[Window:] and returns how many bytes it wrote, which is less
// than there is room for. b[:Window] is overwritten. The error comes with no bytes; it is
// io.EOF at the end of the stream. It panics if b is smaller than MinBuffer.
func (r *Reader) Fill(b []byte) (int, error) {
	if len(b) < MinBuffer {
		panic(fmt.Sprintf("gunzip: buffer of %d bytes, want %d", len(b), MinBuffer))
	}
	copy(b, r.window[:])
	at := Window
	for r.err == nil && at <= len(b)-outputSlack {
		from := at
		at, r.err = r.step(b, at)
		if at != from {
			r.crc = crc32.Update(r.crc, crc32.IEEETable, b[from:at])
			r.size += uint32(at - from)
			r.history = min(r.history+at-from, Window)
			continue // a source may be slow, and a block long
		}
	}
	copy(r.window[:], b[at-Window:at])
	if at > Window {
		return at - Window, nil
	}
	return 0, r.err
}

// step does one thing: a header, a trailer, the begin of a block, or as much of a block
// as there is input or room for. It returns where the output ends now.
func (r *Reader) step(b []byte, at int) (int, error) {
	switch r.state {
	case atHeader:
		return at, r.header()
	case atBlock:
		return at, r.beginBlock()
	case inStored:
		return r.copyStored(b, at)
	case inHuffman:
		return r.huffman(b, at)
	default:
		return at, r.trailer()
	}
}

// fill reads more input. What is left is moved to the front. At the end of the source,
// zeros follow, which huffman may look at and must not use.
func (r *Reader) fill() {
	if r.eof || r.srcErr != nil {
		return
	}
	r.end = copy(r.in[:], r.in[r.pos:r.end])
	r.pos = 0
	for empty := 0; r.end < inputSize; empty++ {
		n, err := r.src.Read(r.in[r.end:inputSize])
		r.end += n
		r.read += int64(n)
		if n > 0 && err == nil {
			break
		}
		if err == io.EOF {
			r.eof = true
			break
		}
		if err == nil && empty >= 100 {
			err = io.ErrNoProgress
		}
		if err != nil {
			r.srcErr = err
			break
		}
	}
	r.limit = r.end
	if r.eof || r.srcErr != nil {
		clear(r.in[r.end:])
		r.limit = min(r.end+2*inputSlack, len(r.in))
	}
}

// ended is the error of input that is not there.
func (r *Reader) ended() error {
	if r.srcErr != nil {
		return r.srcErr
	}
	return io.ErrUnexpectedEOF
}

func (r *Reader) corrupt(what string) error {
	return fmt.Errorf("%w: %s before byte %d", ErrCorrupt, what, r.read-int64(r.end-r.pos))
}

// need makes sure that n bits, at most 16, are in r.bits.
func (r *Reader) need(n uint) error {
	for r.nbits < n {
		if r.pos >= r.end {
			r.fill()
			if r.pos >= r.end {
				return r.ended()
			}
		}
		r.bits |= uint64(r.in[r.pos]) << r.nbits
		r.pos++
		r.nbits += 8
	}
	return nil
}

func (r *Reader) take(n uint) (uint, error) {
	if err := r.need(n); err != nil {
		return 0, err
	}
	v := uint(r.bits) & (1<<n - 1)
	r.bits >>= n
	r.nbits -= n
	return v, nil
}

// align drops the bits up to the next byte. More than seven bits are never left.
func (r *Reader) align() { r.bits, r.nbits = 0, 0 }

// byte is one byte of the input, outside of a deflate stream.
func (r *Reader) byte() (byte, error) {
	if r.pos >= r.end {
		r.fill()
		if r.pos >= r.end {
			return 0, r.ended()
		}
	}
	r.pos++
	return r.in[r.pos-1], nil
}

// bytes reads a few bytes and, if sum is not nil, adds them to the header's checksum.
func (r *Reader) bytes(b []byte, sum *uint32) error {
	for i := range b {
		var err error
		if b[i], err = r.byte(); err != nil {
			return err
		}
	}
	if sum != nil {
		*sum = crc32.Update(*sum, crc32.IEEETable, b)
	}
	return nil
}

// header reads a member's header. At the end of the source, the stream ends if a member
// came before.
func (r *Reader) header() error {
	var b [10]byte
	var sum uint32
	if c, err := r.byte(); err != nil {
		if r.eof && r.srcErr == nil {
			return io.EOF
		}
		return err
	} else {
		b[0] = c
	}
	if err := r.bytes(b[1:], nil); err != nil {
		return err
	}
	if b[0] != 0x1f || b[1] != 0x8b || b[2] != 8 {
		return ErrHeader
	}
	sum = crc32.Update(sum, crc32.IEEETable, b[:])
	flags := b[3]
	if flags&4 != 0 { // extra
		if err := r.bytes(b[:2], &sum); err != nil {
			return err
		}
		for n := binary.LittleEndian.Uint16(b[:2]); n > 0; n-- {
			if err := r.bytes(b[:1], &sum); err != nil {
				return err
			}
		}
	}
	for _, flag := range []byte{8, 16} { // name, comment
		if flags&flag != 0 {
			if err := r.name(&sum); err != nil {
				return err
			}
		}
	}
	if flags&2 != 0 { // checksum
		want := uint16(sum)
		if err := r.bytes(b[:2], nil); err != nil {
			return err
		}
		if binary.LittleEndian.Uint16(b[:2]) != want {
			return ErrHeader
		}
	}
	r.final, r.crc, r.size, r.history = false, 0, 0, 0
	r.state = atBlock
	return nil
}

func (r *Reader) name(sum *uint32) error {
	var b [1]byte
	for range maxName {
		if err := r.bytes(b[:], sum); err != nil {
			return err
		}
		if b[0] == 0 {
			return nil
		}
	}
	return ErrHeader
}

func (r *Reader) trailer() error {
	r.align()
	var b [8]byte
	if err := r.bytes(b[:], nil); err != nil {
		return err
	}
	if binary.LittleEndian.Uint32(b[:4]) != r.crc || binary.LittleEndian.Uint32(b[4:]) != r.size {
		return ErrChecksum
	}
	r.state = atHeader
	return nil
}

func (r *Reader) beginBlock() error {
	if r.final {
		r.state = atTrailer
		return nil
	}
	v, err := r.take(3)
	if err != nil {
		return err
	}
	r.final = v&1 != 0
	switch v >> 1 {
	case 0:
		return r.beginStored()
	case 1:
		r.codes.fixed()
	case 2:
		if err := r.dynamic(); err != nil {
			return err
		}
	default:
		return r.corrupt("block of an unknown type")
	}
	r.state = inHuffman
	return nil
}

func (r *Reader) beginStored() error {
	r.align()
	var b [4]byte
	if err := r.bytes(b[:], nil); err != nil {
		return err
	}
	n := binary.LittleEndian.Uint16(b[:2])
	if n != ^binary.LittleEndian.Uint16(b[2:]) {
		return r.corrupt("length of a stored block")
	}
	r.stored, r.state = int(n), inStored
	return nil
}

func (r *Reader) copyStored(b []byte, at int) (int, error) {
	if r.stored == 0 {
		r.state = atBlock
		return at, nil
	}
	if r.pos >= r.end {
		r.fill()
		if r.pos >= r.end {
			return at, r.ended()
		}
	}
	n := copy(b[at:at+min(r.stored, len(b)-at)], r.in[r.pos:r.end])
	r.pos += n
	r.stored -= n
	return at + n, nil
}
