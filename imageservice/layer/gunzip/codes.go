package gunzip

import "math/bits"

const (
	maxCode = 15 // bits of the longest code
	// Codes up to so many bits are in the first part of a table; longer ones lead
	// to a second look-up.
	litBits  = 11
	distBits = 8
	lenBits  = 7 // of the code in which code lengths are written: no second part

	numLit  = 288
	numDist = 32
	numLen  = 19
	maxLit  = 286 // valid ones
	maxDist = 30

	// A second part has at most 2^(15-first) entries. Behind each of them are two
	// codes at least, since a code that is not complete has just one.
	litSize  = 1<<litBits + numLit/2<<(maxCode-litBits)
	distSize = 1<<distBits + numDist/2<<(maxCode-distBits)
)

// An entry of a table says what a code stands for:
//
//	bits 0–5    bits that are used up: the code's, and those of the extra bits
//	bits 8–11   bits of the code alone; of a link, bits that choose in the second part
//	bits 16–30  the literal, the least length or distance, or the index of the second part
//	bits 12–15, 31  the flags
const (
	flagLiteral = 1 << 31
	flagSpecial = 1 << 15 // one of the following
	flagLink    = 1 << 14
	flagEnd     = 1 << 13
	// An entry that no code leads to has flagSpecial alone.
	invalid = flagSpecial
)

// codes are the tables of a block.
type codes struct {
	lit     [litSize]uint32
	dist    [distSize]uint32
	len     [1 << lenBits]uint32
	isFixed bool
	lengths [maxLit + maxDist]uint8 // scratch
}

// What symbols stand for, without the code's own bits (RFC 1951, 3.2.5).
var (
	litSymbols  [numLit]uint32
	distSymbols [numDist]uint32
	lenSymbols  [numLen]uint32
	fixedLit    [numLit]uint8
	fixedDist   [numDist]uint8
)

func init() {
	for i := range 256 {
		litSymbols[i] = flagLiteral | uint32(i)<<16
	}
	litSymbols[256] = flagSpecial | flagEnd
	base := uint32(3)
	for i := range uint32(28) {
		extra := uint32(0)
		if i >= 8 {
			extra = i/4 - 1
		}
		litSymbols[257+i] = base<<16 | extra
		base += 1 << extra
	}
	litSymbols[285] = 258 << 16
	litSymbols[286], litSymbols[287] = invalid, invalid
	base = 1
	for i := range uint32(maxDist) {
		extra := uint32(0)
		if i >= 4 {
			extra = i/2 - 1
		}
		distSymbols[i] = base<<16 | extra
		base += 1 << extra
	}
	distSymbols[30], distSymbols[31] = invalid, invalid
	for i := range lenSymbols {
		lenSymbols[i] = uint32(i) << 16
	}
	for i := range fixedLit {
		switch {
		case i < 144:
			fixedLit[i] = 8
		case i < 256:
			fixedLit[i] = 9
		case i < 280:
			fixedLit[i] = 7
		default:
			fixedLit[i] = 8
		}
	}
	for i := range fixedDist {
		fixedDist[i] = 5
	}
}

// fixed makes the tables of a block with the fixed codes.
func (c *codes) fixed() {
	if c.isFixed {
		return
	}
	build(c.lit[:], litBits, fixedLit[:], litSymbols[:])
	build(c.dist[:], distBits, fixedDist[:], distSymbols[:])
	c.isFixed = true
}

// order is that in which the lengths of the code for code lengths are written.
var order = [numLen]uint8{16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15}

// dynamic reads the codes of a block (RFC 1951, 3.2.7).
func (r *Reader) dynamic() error {
	c := &r.codes
	c.isFixed = false
	v, err := r.take(14)
	if err != nil {
		return err
	}
	nlit, ndist, nlen := int(v&31)+257, int(v>>5&31)+1, int(v>>10)+4
	if nlit > maxLit || ndist > maxDist {
		return r.corrupt("number of codes")
	}
	var lens [numLen]uint8
	for _, i := range order[:nlen] {
		v, err := r.take(3)
		if err != nil {
			return err
		}
		lens[i] = uint8(v)
	}
	if !build(c.len[:], lenBits, lens[:], lenSymbols[:]) {
		return r.corrupt("code for code lengths")
	}
	lengths := c.lengths[:nlit+ndist]
	if err := r.readLengths(lengths); err != nil {
		return err
	}
	if !build(c.lit[:], litBits, lengths[:nlit], litSymbols[:]) || !build(c.dist[:], distBits, lengths[nlit:], distSymbols[:]) {
		return r.corrupt("code")
	}
	return nil
}

func (r *Reader) readLengths(lengths []uint8) error {
	for i := 0; i < len(lengths); {
		// The code may end right before the end of the source: what is needed is
		// known only after the look-up.
		if r.nbits < lenBits {
			if err := r.need(lenBits); err != nil && r.srcErr != nil {
				return err
			}
		}
		e := r.codes.len[r.bits&(1<<lenBits-1)]
		if e&flagSpecial != 0 {
			if r.nbits < lenBits && !r.eof {
				return r.ended()
			}
			return r.corrupt("code length")
		}
		n := uint(e & 63)
		if err := r.need(n); err != nil {
			return err
		}
		r.bits >>= n
		r.nbits -= n
		symbol := e >> 16
		if symbol < 16 {
			lengths[i] = uint8(symbol)
			i++
			continue
		}
		var value uint8
		extra, least := uint(7), 11
		switch symbol {
		case 16:
			if i == 0 {
				return r.corrupt("repetition of nothing")
			}
			extra, least, value = 2, 3, lengths[i-1]
		case 17:
			extra, least = 3, 3
		}
		more, err := r.take(extra)
		if err != nil {
			return err
		}
		count := least + int(more)
		if count > len(lengths)-i {
			return r.corrupt("too many code lengths")
		}
		for range count {
			lengths[i] = value
			i++
		}
	}
	return nil
}

// build fills a table from the lengths of the codes, which are canonical, and what each
// stands for. A code must be complete, except that it may be empty, or be one code of
// one bit, as compress/flate has it; using what is not there is an error.
func build(table []uint32, first uint, lengths []uint8, symbols []uint32) bool {
	var count [maxCode + 1]int
	for _, l := range lengths {
		count[l]++
	}
	longest := uint(maxCode)
	for longest > 0 && count[longest] == 0 {
		longest--
	}
	table[0] = invalid
	if longest == 0 {
		for i := range table[:1<<first] {
			table[i] = invalid
		}
		return true
	}
	var offsets [maxCode + 2]int
	code := 0
	for l := uint(1); l <= longest; l++ {
		code = code<<1 + count[l]
		offsets[l+1] = offsets[l] + count[l]
		if code > 1<<l {
			return false
		}
	}
	if code != 1<<longest && !(code == 1 && longest == 1) {
		return false
	}
	var sorted [numLit]uint16
	for s, l := range lengths {
		if l != 0 {
			sorted[offsets[l]] = uint16(s)
			offsets[l]++
		}
	}
	fill(table, first, longest, &count, &sorted, symbols)
	return true
}

// fill writes the codes in their order, which is by length: the table for codes of l bits
// is that for l-1 bits, twice, with the new ones put in.
func fill(table []uint32, first, longest uint, count *[maxCode + 1]int, sorted *[numLit]uint16, symbols []uint32) {
	code, next, size := uint(0), 0, 1
	for l := uint(1); l <= first; l++ {
		copy(table[size:2*size], table[:size])
		size *= 2
		code <<= 1
		for range count[l] {
			table[reverse(code, l)] = entry(symbols[sorted[next]], l)
			code++
			next++
		}
	}
	second := longest - first // bits of the second look-up; used only if positive
	free, link := uint(size), ^uint(0)
	var at uint
	for l := first + 1; l <= longest; l++ {
		code <<= 1
		for range count[l] {
			rev := reverse(code, l)
			if head := rev & (1<<first - 1); head != link {
				link, at = head, free
				free += 1 << second
				table[head] = flagSpecial | flagLink | uint32(at)<<16 | uint32(second)<<8 | uint32(first)
			}
			for i := rev >> first; i < 1<<second; i += 1 << (l - first) {
				table[at+i] = entry(symbols[sorted[next]], l-first)
			}
			code++
			next++
		}
	}
}

func reverse(code, n uint) uint { return uint(bits.Reverse16(uint16(code)) >> (16 - n)) }

// entry adds the bits of the code to what a symbol stands for.
func entry(symbol uint32, n uint) uint32 {
	return symbol&^0xff | uint32(n)<<8 | symbol&0xff + uint32(n)
}
