// Package crilog writes the log format of CRI, one record for each line of a
// container's output:
//
//	2026-01-02T03:04:05.000000006Z stdout F text of the line
//	2026-01-02T03:04:05.000000006Z stdout P first part of a long line
//
// after kubernetes/design-proposals "CRI log format". F is full, P is partial:
// the parts of a line are those up to and including the next F of the stream.
//
// It is pure: bytes in, bytes out. Caveat: a line that is not ended yet is kept
// until its end, its 16 KiB or Flush, so what was read is not all written.
package crilog

import (
	"bytes"
	"time"
)

// MaxLine is the usual size of a record's text in bytes, above which a line is
// split.
const MaxLine = 16 << 10

// Overhead is the most that a record has beyond its text, in bytes.
const Overhead = stampLen + len(" stdout F ") + len("\n")

const stampLen = len("2026-01-02T03:04:05.000000006Z")

// A Framer turns the bytes of one stream into records.
type Framer struct {
	head  [Overhead]byte // stamp, stream and tag of the records being made
	n     int            // bytes used of head
	max   int
	carry []byte // a line whose end was not seen yet, at most max bytes
}

// NewFramer returns a Framer for stream, "stdout" or "stderr", that splits
// lines at max bytes.
func NewFramer(stream string, max int) *Framer {
	f := &Framer{max: max}
	f.n = stampLen
	f.n += copy(f.head[f.n:], " ")
	f.n += copy(f.head[f.n:Overhead-len(" F \n")], stream)
	f.n += copy(f.head[f.n:], " F ")
	return f
}

// Append appends the records of src, all stamped with now, to dst. It stops
// early when dst has bytes and the next record does not fit into its capacity;
// used is what it took of src. With an empty dst it always gets on: out has bytes
// or used is not 0.
func (f *Framer) Append(dst, src []byte, now time.Time) (out []byte, used int) {
	appendStamp(f.head[:0], now)
	for used < len(src) {
		p := src[used:]
		room := f.max - len(f.carry)
		window := p[:min(len(p), room+1)]
		end := bytes.IndexByte(window, '\n')
		tag, skip := byte('F'), 1
		switch {
		case end >= 0:
		case len(window) > room: // the line goes on past max
			end, tag, skip = room, 'P', 0
		default: // the line may end in what comes next
			f.keep(p)
			return dst, len(src)
		}
		need := f.n + len(f.carry) + end + 1
		if len(dst) > 0 && len(dst)+need > cap(dst) {
			return dst, used
		}
		dst = f.record(dst, tag, p[:end])
		used += end + skip
	}
	return dst, used
}

// keep adds to the carry. It takes room for a whole line at once: growing by
// steps would leave more garbage than that.
func (f *Framer) keep(p []byte) {
	if n := len(f.carry) + len(p); n > cap(f.carry) {
		size := f.max
		if n <= 256 {
			size = min(256, f.max)
		}
		f.carry = append(make([]byte, 0, size), f.carry...)
	}
	f.carry = append(f.carry, p...)
}

func (f *Framer) record(dst []byte, tag byte, text []byte) []byte {
	f.head[f.n-2] = tag
	dst = append(dst, f.head[:f.n]...)
	dst = append(dst, f.carry...)
	f.carry = f.carry[:0]
	dst = append(dst, text...)
	return append(dst, '\n')
}

// Flush appends the line that was not ended, if there is one, as a full record.
func (f *Framer) Flush(dst []byte, now time.Time) []byte {
	if len(f.carry) == 0 {
		return dst
	}
	appendStamp(f.head[:0], now)
	return f.record(dst, 'F', nil)
}

// Pending returns how many bytes of an unended line are kept.
func (f *Framer) Pending() int { return len(f.carry) }

// Shrink gives back the memory of the carry when nothing is in it.
func (f *Framer) Shrink() {
	if len(f.carry) == 0 {
		f.carry = nil
	}
}

// appendStamp appends now as RFC 3339 in UTC with nine digits of a second.
// Years outside 0 … 9999 do not occur in a log.
func appendStamp(b []byte, now time.Time) []byte {
	now = now.UTC()
	year, month, day := now.Date()
	hour, minute, sec := now.Clock()
	b = digits(b, year, 4)
	b = digits(append(b, '-'), int(month), 2)
	b = digits(append(b, '-'), day, 2)
	b = digits(append(b, 'T'), hour, 2)
	b = digits(append(b, ':'), minute, 2)
	b = digits(append(b, ':'), sec, 2)
	b = digits(append(b, '.'), now.Nanosecond(), 9)
	return append(b, 'Z')
}

func digits(b []byte, v, n int) []byte {
	b = append(b, "000000000"[:n]...)
	for i := len(b) - 1; i >= len(b)-n; i-- {
		b[i] = byte('0' + v%10)
		v /= 10
	}
	return b
}

// AppendNote appends a record of berth's own to dst: a line on stderr that says
// what happened to the log.
func AppendNote(dst []byte, text string, now time.Time) []byte {
	dst = appendStamp(dst, now)
	dst = append(dst, " stderr F berth: "...)
	dst = append(dst, text...)
	return append(dst, '\n')
}
