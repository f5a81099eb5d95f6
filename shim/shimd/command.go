package shimd

import (
	"strconv"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A command is a list of C strings in one buffer, which is used again for the
// next one.
type command struct {
	text []byte
	at   []int // where in text each string begins
	ptrs []*byte
}

func (c *command) reset() { c.text, c.at = c.text[:0], c.at[:0] }

// add appends strings.
func (c *command) add(list ...string) {
	for _, s := range list {
		c.begin().str(s).end()
	}
}

// A string may be made of parts: c.begin().str("/fd/").num(3).end().
func (c *command) begin() *command {
	c.at = append(c.at, len(c.text))
	return c
}

func (c *command) str(s string) *command {
	c.text = append(c.text, s...)
	return c
}

func (c *command) num(n int) *command {
	c.text = strconv.AppendInt(c.text, int64(n), 10)
	return c
}

func (c *command) end() { c.text = append(c.text, 0) }

// fd appends the path by which another process opens a descriptor of this one.
func (c *command) fd(n int) *command {
	return c.str("/proc/").num(unix.Getpid()).str("/fd/").num(n)
}

// pointers returns what execve takes. It is valid until the next reset.
func (c *command) pointers() []*byte {
	c.ptrs = c.ptrs[:0]
	for _, at := range c.at {
		c.ptrs = append(c.ptrs, &c.text[at])
	}
	c.ptrs = append(c.ptrs, nil)
	return c.ptrs
}

// reports is memory that is shared with forked children, one report for each
// that can be under way.
var reports []report

func mapReports() error {
	const size = (maxExecs + spareReports) * unsafe.Sizeof(report{})
	b, err := unix.Mmap(-1, 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_ANONYMOUS)
	if err != nil {
		return err
	}
	reports = unsafe.Slice((*report)(unsafe.Pointer(&b[0])), maxExecs+spareReports)
	return nil
}

// spareReports are for what runs beside execs: create, start, kill, delete.
const spareReports = 256
