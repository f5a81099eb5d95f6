package gunzip

import "encoding/binary"

// huffman decodes symbols until the block ends, the output is full, or more input is
// wanted, and returns where the output ends.
//
// One turn of the loop decodes up to three literals, or up to two and a match. It needs no
// checks of the input in between: there are inputSlack bytes behind every position, at
// the end of the source zeros, and that too many bits were taken is found out later.
func (r *Reader) huffman(b []byte, at int) (int, error) {
	if r.limit-r.pos < 2*inputSlack {
		r.fill()
	}
	var (
		in      = r.in[:r.limit]
		pos     = r.pos
		hold    = r.bits
		n       = r.nbits
		lit     = &r.codes.lit
		dist    = &r.codes.dist
		inLast  = r.limit - inputSlack
		outLast = len(b) - outputSlack
		lowest  = at - r.history
		err     error
		ended   bool
	)
loop:
	for pos <= inLast && at <= outLast {
		hold |= binary.LittleEndian.Uint64(in[pos:]) << (n & 63)
		pos += int((63 - n) >> 3)
		n |= 56 // 56 to 63 bits now
		e := lit[hold&(1<<litBits-1)]
		if e&flagLiteral != 0 {
			hold >>= e & 63
			n -= uint(e & 63)
			b[at] = byte(e >> 16)
			at++
			e = lit[hold&(1<<litBits-1)]
			if e&flagLiteral != 0 {
				hold >>= e & 63
				n -= uint(e & 63)
				b[at] = byte(e >> 16)
				at++
				e = lit[hold&(1<<litBits-1)]
				if e&flagLiteral != 0 {
					hold >>= e & 63
					n -= uint(e & 63)
					b[at] = byte(e >> 16)
					at++
					continue
				}
			}
			// 34 bits are left at least; a match may take 48.
			hold |= binary.LittleEndian.Uint64(in[pos:]) << (n & 63)
			pos += int((63 - n) >> 3)
			n |= 56
		}
		if e&flagSpecial != 0 {
			if e&flagLink != 0 {
				hold >>= e & 63
				n -= uint(e & 63)
				e = lit[uint64(e>>16)+hold&(1<<(e>>8&15)-1)]
				if e&flagLiteral != 0 {
					hold >>= e & 63
					n -= uint(e & 63)
					b[at] = byte(e >> 16)
					at++
					continue
				}
			}
			if e&flagSpecial != 0 {
				hold >>= e & 63
				n -= uint(e & 63)
				ended = e&flagEnd != 0
				if !ended {
					err = r.corrupt("code that stands for nothing")
				}
				break loop
			}
		}
		length := int(e>>16) + int(hold&(1<<(e&63)-1)>>(e>>8&15))
		hold >>= e & 63
		n -= uint(e & 63)

		e = dist[hold&(1<<distBits-1)]
		if e&flagSpecial != 0 {
			if e&flagLink != 0 {
				hold >>= e & 63
				n -= uint(e & 63)
				e = dist[uint64(e>>16)+hold&(1<<(e>>8&15)-1)]
			}
			if e&flagSpecial != 0 {
				err = r.corrupt("distance that stands for nothing")
				break loop
			}
		}
		far := int(e>>16) + int(hold&(1<<(e&63)-1)>>(e>>8&15))
		hold >>= e & 63
		n -= uint(e & 63)
		from := at - far
		if from < lowest {
			err = r.corrupt("distance before the begin")
			break loop
		}
		match(b, at, from, length)
		at += length
	}
	// Whole bytes go back, so that only here bits can be of what follows the source.
	r.pos, r.bits, r.nbits = pos-int(n>>3), hold&(1<<(n&7)-1), n&7
	if r.pos > r.end {
		r.pos = r.end
		return at, r.ended()
	}
	if ended {
		r.state = atBlock
	}
	return at, err
}

// match copies length bytes from b[from:] to b[at:], as if one by one. It may write up to
// 16 bytes more, for which there is room.
func match(b []byte, at, from, length int) {
	switch far := at - from; {
	case far >= 16:
		for end := at + length; at < end; at, from = at+16, from+16 {
			s, d := b[from:from+16], b[at:at+16]
			x, y := binary.LittleEndian.Uint64(s), binary.LittleEndian.Uint64(s[8:])
			binary.LittleEndian.PutUint64(d, x)
			binary.LittleEndian.PutUint64(d[8:], y)
		}
	case far >= 8:
		for end := at + length; at < end; at, from = at+8, from+8 {
			binary.LittleEndian.PutUint64(b[at:], binary.LittleEndian.Uint64(b[from:]))
		}
	case far == 1:
		x := uint64(b[from]) * 0x0101010101010101
		for end := at + length; at < end; at += 8 {
			binary.LittleEndian.PutUint64(b[at:], x)
		}
	default:
		s, d := b[from:from+length], b[at:at+length]
		for i := range d {
			d[i] = s[i]
		}
	}
}
