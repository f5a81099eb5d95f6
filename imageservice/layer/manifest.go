package layer

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/cespare/xxhash/v2"
	"golang.org/x/sys/unix"
)

// ErrManifest: a manifest that is damaged, or of a format that is not known.
var ErrManifest = errors.New("layer manifest damaged")

const (
	manifestMagic = "berth layer manifest 1\n"
	// What a record may take, so that a damaged manifest cannot demand much.
	maxManifestString = 1 << 16 // the kernel's bound of an attribute; names are shorter
)

// The kinds of records. The values are stored; they never change.
const (
	kindFile     = 'f'
	kindDir      = 'd' // as the archive lists it
	kindSymlink  = 'l'
	kindLink     = 'h' // a further name of the file Target
	kindChar     = 'c'
	kindBlock    = 'b'
	kindFifo     = 'p'
	kindWhiteout = 'w'
	kindImplied  = 'i' // a directory, of which nothing else is known here
	kindOpaque   = 'o' // the directory hides those below
	kindRemoved  = 'x' // of what was recorded so far, nothing at or below the path counts
	kindEnd      = 'e'
)

// record is one line of a manifest.
type record struct {
	kind     byte
	path     string // below the root, without symbolic links; "" is the root
	mode     uint32 // permission bits
	uid, gid uint32
	mtime    unix.Timespec
	size     int64
	sum      uint64 // XXH64 of the contents
	dev      uint64
	target   string
	xattrs   map[string]string
}

// manifestWriter writes records as they come, each path by what it does not share with
// the one before. The zero value writes nothing.
//
//	manifest = magic, record…, 'e', count, XXH64 of all before it (8 bytes)
//	record   = kind, path, fields of the kind
//	path     = length shared with the path before, string of the rest
//	string   = length, bytes; numbers are varints (encoding/binary)
type manifestWriter struct {
	w     *bufio.Writer // nil: no manifest is wanted
	sum   *xxhash.Digest
	last  string
	count uint64
	buf   []byte
}

func newManifestWriter(w io.Writer) manifestWriter {
	if w == nil {
		return manifestWriter{}
	}
	m := manifestWriter{w: bufio.NewWriterSize(w, 32<<10), sum: xxhash.New()}
	m.put([]byte(manifestMagic))
	return m
}

// wanted tells whether records go anywhere.
func (m *manifestWriter) wanted() bool { return m.w != nil }

// put keeps errors for the end, as a bufio.Writer does.
func (m *manifestWriter) put(b []byte) {
	m.sum.Write(b)
	m.w.Write(b)
}

func (m *manifestWriter) add(r *record) {
	if m.w == nil {
		return
	}
	m.count++
	b := append(m.buf[:0], r.kind)
	n := 0
	for n < len(r.path) && n < len(m.last) && r.path[n] == m.last[n] {
		n++
	}
	m.last = r.path
	b = appendString(binary.AppendUvarint(b, uint64(n)), r.path[n:])
	switch r.kind {
	case kindFile, kindDir, kindSymlink, kindChar, kindBlock, kindFifo:
		b = r.appendInode(b)
	case kindLink:
		b = appendString(b, r.target)
	}
	m.put(b)
	m.buf = b
}

// appendInode writes what all but links and notes have, and then the field of the kind.
func (r *record) appendInode(b []byte) []byte {
	for _, v := range [...]uint32{r.mode, r.uid, r.gid} {
		b = binary.AppendUvarint(b, uint64(v))
	}
	b = binary.AppendUvarint(binary.AppendVarint(b, r.mtime.Sec), uint64(r.mtime.Nsec))
	b = binary.AppendUvarint(b, uint64(len(r.xattrs)))
	for _, name := range sortedNames(r.xattrs) {
		b = appendString(appendString(b, name), r.xattrs[name])
	}
	switch r.kind {
	case kindFile:
		b = binary.LittleEndian.AppendUint64(binary.AppendUvarint(b, uint64(r.size)), r.sum)
	case kindSymlink:
		b = appendString(b, r.target)
	case kindChar, kindBlock:
		b = binary.AppendUvarint(b, r.dev)
	}
	return b
}

func appendString(b []byte, s string) []byte {
	return append(binary.AppendUvarint(b, uint64(len(s))), s...)
}

// finish writes the end.
func (m *manifestWriter) finish() error {
	if m.w == nil {
		return nil
	}
	m.put(binary.AppendUvarint([]byte{kindEnd}, m.count))
	m.w.Write(binary.LittleEndian.AppendUint64(nil, m.sum.Sum64()))
	if err := m.w.Flush(); err != nil {
		return fmt.Errorf("layer manifest: %w", err)
	}
	return nil
}

// manifestReader reads records again. It trusts nothing: a manifest lies on a disk that
// is suspected.
type manifestReader struct {
	r     *bufio.Reader
	sum   *xxhash.Digest
	last  string
	count uint64
	err   error
	b     [1]byte
}

func newManifestReader(r io.Reader) (*manifestReader, error) {
	m := &manifestReader{r: bufio.NewReaderSize(r, 32<<10), sum: xxhash.New()}
	if got := m.bytes(len(manifestMagic)); m.err != nil || string(got) != manifestMagic {
		return nil, fmt.Errorf("begins with %q: %w", got, ErrManifest)
	}
	return m, nil
}

// next returns io.EOF after the last record, once the sum was found to be right.
func (m *manifestReader) next() (*record, error) {
	r := &record{kind: m.byte()}
	if m.err == nil && r.kind == kindEnd {
		return nil, m.end()
	}
	shared := m.uvarint()
	if shared > uint64(len(m.last)) {
		m.fail("path shares %d bytes with one of %d", shared, len(m.last))
		shared = 0
	}
	r.path = m.last[:shared] + m.string()
	m.last = r.path
	switch r.kind {
	case kindFile, kindDir, kindSymlink, kindChar, kindBlock, kindFifo:
		m.inode(r)
	case kindLink:
		r.target = m.string()
	case kindImplied, kindOpaque, kindRemoved, kindWhiteout:
	default:
		m.fail("kind %q", r.kind)
	}
	if m.err == nil && (!cleanPath(r.path) || r.kind == kindLink && !cleanPath(r.target)) {
		m.fail("path %q", clip(r.path))
	}
	if m.err != nil {
		return nil, fmt.Errorf("record %d: %w: %w", m.count+1, ErrManifest, m.err)
	}
	m.count++
	return r, nil
}

func (m *manifestReader) inode(r *record) {
	r.mode, r.uid, r.gid = uint32(m.uvarint()), uint32(m.uvarint()), uint32(m.uvarint())
	r.mtime.Sec, r.mtime.Nsec = m.varint(), int64(m.uvarint())
	n := m.uvarint()
	if n > maxXattrs {
		m.fail("%d attributes", n)
	}
	for ; n > 0 && m.err == nil; n-- {
		if r.xattrs == nil {
			r.xattrs = map[string]string{}
		}
		name := m.string()
		r.xattrs[name] = m.string()
	}
	switch r.kind {
	case kindFile:
		r.size = int64(m.uvarint())
		if b := m.bytes(8); m.err == nil {
			r.sum = binary.LittleEndian.Uint64(b)
		}
	case kindSymlink:
		r.target = m.string()
	case kindChar, kindBlock:
		r.dev = m.uvarint()
	}
}

func (m *manifestReader) end() error {
	count := m.uvarint()
	want := m.sum.Sum64()
	got := m.bytes(8)
	switch {
	case m.err != nil:
		return fmt.Errorf("end: %w: %w", ErrManifest, m.err)
	case count != m.count:
		return fmt.Errorf("%d records, stated are %d: %w", m.count, count, ErrManifest)
	case binary.LittleEndian.Uint64(got) != want:
		return fmt.Errorf("checksum: %w", ErrManifest)
	}
	return io.EOF
}

func (m *manifestReader) fail(format string, args ...any) {
	if m.err == nil {
		m.err = fmt.Errorf(format, args...)
	}
}

// ReadByte implements io.ByteReader.
func (m *manifestReader) ReadByte() (byte, error) {
	b, err := m.r.ReadByte()
	if err == nil {
		m.b[0] = b
		m.sum.Write(m.b[:])
	} else if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return b, err
}

func (m *manifestReader) byte() byte {
	if m.err != nil {
		return 0
	}
	b, err := m.ReadByte()
	m.err = err
	return b
}

func (m *manifestReader) uvarint() uint64 {
	if m.err != nil {
		return 0
	}
	v, err := binary.ReadUvarint(m)
	m.err = err
	return v
}

func (m *manifestReader) varint() int64 {
	if m.err != nil {
		return 0
	}
	v, err := binary.ReadVarint(m)
	m.err = err
	return v
}

func (m *manifestReader) bytes(n int) []byte {
	if m.err != nil {
		return nil
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(m.r, b); err != nil {
		m.err = io.ErrUnexpectedEOF
		return nil
	}
	m.sum.Write(b)
	return b
}

func (m *manifestReader) string() string {
	n := m.uvarint()
	if n > maxManifestString {
		m.fail("string of %d bytes", n)
	}
	if m.err != nil {
		return ""
	}
	return string(m.bytes(int(n)))
}

// cleanPath tells whether a path is one that Apply records.
func cleanPath(p string) bool {
	if p == "" {
		return true
	}
	got, err := cleanName(p)
	return err == nil && got == p
}

// sortedNames makes reports come out the same every time.
func sortedNames(m map[string]string) []string {
	names := make([]string, 0, len(m))
	for n := range m {
		names = append(names, n)
	}
	slices.Sort(names)
	return names
}

// CheckManifestHeader returns ErrManifest unless r begins like a manifest that Verify can
// read. It reads no further.
func CheckManifestHeader(r io.Reader) error {
	got := make([]byte, len(manifestMagic))
	if _, err := io.ReadFull(r, got); err != nil {
		return fmt.Errorf("%w: too short", ErrManifest)
	}
	if string(got) != manifestMagic {
		return fmt.Errorf("%w: begins with %.32q", ErrManifest, got)
	}
	return nil
}
