// Package wire is the language that berthd and a shim speak, and the values
// they speak about. It stands apart from package shim, the client, so that the
// shim can use it without linking the client's packages (net, fmt, os).
//
// Nouns: a Frame is one message; a call is a request and the frames that answer
// it, joined by a number that the client chose; an event is a frame that
// answers no call (number 0).
//
// Caveat: a shim outlives the berthd that started it, so every change here is
// met by older shims. Types and tags are never reused, new fields get new tags,
// and a reader skips tags that it does not know. The golden bytes in the tests
// hold version 1 to that.
package wire

import (
	"errors"
	"math"
	"time"
)

// Version is the protocol spoken by this code; MinVersion the oldest one that
// it still understands. Both sides send theirs in Hello and use the lower
// Version, or end the connection when that is below either MinVersion.
//
// Version 2 has ExecImage, in ExecData under TagImage, and Launch.KeepFilter.
const (
	Version    = 2
	MinVersion = 1
)

// A frame:
//
//	 0               4       6               10
//	+---------------+-------+---------------+-----------------------+
//	| length u32 le | type  | call u32 le   | fields …              |
//	|               | u16le |               |                       |
//	+---------------+-------+---------------+-----------------------+
//	length counts what follows it: 6 + len(fields), at most MaxFrame
//
//	a field:  tag u8 | length uvarint | payload
//	payload:  text and bytes as they are; numbers as uvarint, signed ones
//	          zigzag; true is the number 1; a nested value is fields again.
//	          A list is its tag repeated. A field that is absent is zero.
//
// A connection:
//
//	client                         shim
//	Hello{version,min}      ---->
//	                        <----  Hello{version,min,pid,id}
//	Launch (first conn only) --->
//	                        <----  Launched | Error
//	Exec call=7             ---->
//	Kill call=8             ---->
//	                        <----  OK call=8
//	                        <----  ExecOutput call=7 (any number)
//	                        <----  ExecResult call=7
//	Exec{stream} call=9 +fds --->
//	                        <----  Started call=9
//	                        <----  ExecResult call=9
//	Attach call=10 +fds     ---->
//	                        <----  Started call=10
//	                        <----  OK call=10 (the container's output has ended)
//	                        <----  Exit call=0 (once, when the container ends,
//	                               or at once when it already has)
//
// Descriptors (SCM_RIGHTS) come with the first byte of the write that has the
// frame that is about them, or before it, and are taken in their order.
const (
	HeaderLen = 10
	MaxFrame  = 64 << 10 // bytes after the length word
	MaxChunk  = 32 << 10 // bytes of output, input or exec data in one frame
)

// Types of frames. Requests are below 128, answers from 128, events from 192.
const (
	TypeHello     uint16 = 1
	TypeLaunch    uint16 = 2
	TypeStart     uint16 = 3
	TypeKill      uint16 = 4
	TypeExecData  uint16 = 5 // a piece of the process file, before Exec
	TypeExec      uint16 = 6
	TypeReopenLog uint16 = 7
	TypeState     uint16 = 8
	TypeShutdown  uint16 = 9
	TypeStdin     uint16 = 10
	TypeCancel    uint16 = 11 // ends the exec, attach or stdin of the same call; no answer of its own
	TypeAttach    uint16 = 12
	TypeResize    uint16 = 13

	TypeOK         uint16 = 128
	TypeError      uint16 = 129
	TypeLaunched   uint16 = 130
	TypeStateIs    uint16 = 131
	TypeExecOutput uint16 = 132
	TypeExecResult uint16 = 133
	TypeStarted    uint16 = 134 // of a streaming exec or an attach; the answer follows at its end

	TypeExit uint16 = 192
)

// Code says of what kind an Error is.
type Code uint64

// The codes. An unknown one is to be taken as CodeInternal.
const (
	CodeInternal    Code = 1
	CodeInvalid     Code = 2 // the request is malformed or out of bounds
	CodeState       Code = 3 // not in this state of the container
	CodeRuntime     Code = 4 // the OCI runtime refused; the message is its own
	CodeTimeout     Code = 5 // a step took longer than it may
	CodeBusy        Code = 6 // too many of these at once
	CodeUnsupported Code = 7 // this shim does not know the request
	CodeSlow        Code = 8 // an attach was ended because its pipe stayed full
)

// Errors of decoding.
var (
	ErrFrame = errors.New("malformed shim frame")
	ErrSize  = errors.New("shim frame above 64 KiB")
)

// Mount is one mount(2) call in the namespace that the container is created in.
type Mount struct {
	Type    string
	Source  string
	Options []string
	// Dir, when set, is the working directory of the call, to which the
	// directories named in Options may be relative: overlay options are
	// limited to one page.
	Dir string
	// Target is where it is mounted, a local path below the bundle; "" is the
	// container's root.
	Target string
	// IDMap, when set, is a directory, an absolute path, of which a copy that
	// shows owners as Launch.UserNS maps them is mounted on Target first; Dir
	// is relative to it then. For a bind mount the copy is all.
	IDMap string
}

// Launch tells a new shim what to create and how to look after it.
type Launch struct {
	ID          string   // of the container, known to the runtime by it
	Bundle      string   // OCI bundle, an absolute path
	Runtime     string   // path of the OCI runtime
	RuntimeRoot string   // --root of the runtime; "" is its default
	RuntimeArgs []string // more global options, before the verb

	// SystemdCgroup passes --systemd-cgroup.
	SystemdCgroup bool

	Socket   string // where the shim listens, an absolute path
	ExitFile string // where it records the exit, an absolute path
	LogPath  string // CRI log; "" for none

	Terminal  bool // the container has a pty; stdout and stderr are one
	Stdin     bool // keep its stdin open; else it reads /dev/null
	StdinOnce bool // close stdin for good when the first writer ends it

	Mounts []Mount // made in order, in a mount namespace of their own
	Rootfs string  // target of those without one; "" when there are none

	// OOMFile is memory.events (cgroup v2) or memory.oom_control (v1) of the
	// container; "" for none. It need not exist before the container does.
	OOMFile string
	// CgroupKill are the container's cgroup directories; of cgroup v1, where
	// several hold the same processes, one is enough. When the init ends
	// and PrivatePID is false, every process in them is killed. Kill with
	// All looks into them, too; without any, it goes from parent to child.
	CgroupKill []string
	PrivatePID bool // the container has a PID namespace of its own

	MaxLogLine    int           // bytes of a log line before it is split; 0 is 16 KiB; 64 B … 64 KiB
	DrainTimeout  time.Duration // for output after the init's end; 0 is 2 s; at most 1 min
	CreateTimeout time.Duration // for the runtime's create and start, each; 0 is 2 min; at most 1 h

	// KeepFilter has the shim take down the seccomp filter that the runtime
	// gives the container, so that it can start processes by itself. To look
	// at it, the shim traces the init while that executes the container's
	// program. Where the kernel refuses, the runtime starts all processes.
	KeepFilter bool

	// OOMScoreAdj is the shim's own, -1000 … 1000; nil leaves it. Where the
	// kernel does not let it be lowered (no CAP_SYS_RESOURCE), it stays. The
	// container inherits it unless its spec sets one.
	OOMScoreAdj *int

	// UserNS is the path of the container's user namespace, for Mount.IDMap;
	// "" for none. RootUID and RootGID are who is root in it, on the host: the
	// owner of pipes to the container.
	UserNS           string
	RootUID, RootGID uint32
}

// Launched answers Launch.
type Launched struct {
	ShimPID int
	Pid     int // of the container's init
}

// Exit tells how a container ended.
type Exit struct {
	Code      int  // 0 … 255; 128+n when signal n ended it
	Signal    int  // 0 for none
	OOMKilled bool // the kernel killed a process of it for memory, and Code is not 0
	At        time.Time
	Reason    string // in words, "" when Code says it all
}

// Status of a container, as the shim sees it.
const (
	StatusCreating = "creating"
	StatusCreated  = "created"
	StatusRunning  = "running"
	StatusExited   = "exited"
)

// State answers a request of that name.
type State struct {
	Pid     int // of the container's init, 0 before it is created
	ShimPID int
	Status  string
	Exit    *Exit // nil until Status is exited
}

// Error answers a call that did not succeed.
type Error struct {
	Code    Code
	Step    string // of the shim, such as "runtime create"; may be ""
	Message string
}

// Frame is one message as it was read; Body aliases the buffer.
type Frame struct {
	Type uint16
	Call uint32
	Body Fields
}

// ParseFrame reads one frame from the start of b. n is what it took, 0 when b
// holds less than a whole frame. The error is ErrFrame or ErrSize, and means
// that the connection is lost.
func ParseFrame(b []byte) (f Frame, n int, err error) {
	if len(b) < 4 {
		return Frame{}, 0, nil
	}
	size, err := FrameSize(b)
	if err != nil || len(b) < size {
		return Frame{}, 0, err
	}
	f.Type = uint16(b[4]) | uint16(b[5])<<8
	f.Call = le32(b[6:])
	f.Body = Fields(b[HeaderLen:size:size])
	return f, size, nil
}

// FrameSize returns the size of the frame that begins with the four bytes b,
// the length word included.
func FrameSize(b []byte) (int, error) {
	n := le32(b)
	if n > MaxFrame {
		return 0, ErrSize
	}
	if n < HeaderLen-4 {
		return 0, ErrFrame
	}
	return int(n) + 4, nil
}

func le32(b []byte) uint32 {
	return uint32(b[0]) | uint32(b[1])<<8 | uint32(b[2])<<16 | uint32(b[3])<<24
}

// Fields is a run of fields.
type Fields []byte

// Next takes the first field off f. It returns tag 0 at the end.
func (f *Fields) Next() (tag byte, payload []byte, err error) {
	b := []byte(*f)
	if len(b) == 0 {
		return 0, nil, nil
	}
	tag = b[0]
	n, w := uvarint(b[1:])
	if tag == 0 || w == 0 || n > uint64(len(b)-1-w) {
		return 0, nil, ErrFrame
	}
	end := 1 + w + int(n)
	*f = b[end:]
	return tag, b[1+w : end : end], nil
}

func uvarint(b []byte) (v uint64, n int) {
	for i, c := range b {
		if i == 10 || (i == 9 && c > 1) {
			return 0, 0
		}
		v |= uint64(c&0x7f) << (7 * uint(i))
		if c < 0x80 {
			return v, i + 1
		}
	}
	return 0, 0
}

// Uint decodes a payload that is a number.
func Uint(p []byte) (uint64, error) {
	v, n := uvarint(p)
	if n == 0 || n != len(p) {
		return 0, ErrFrame
	}
	return v, nil
}

// Int decodes a payload that is a signed number.
func Int(p []byte) (int64, error) {
	v, err := Uint(p)
	return int64(v>>1) ^ -int64(v&1), err
}

// Builder appends frames to Buf. Frames may follow one another.
type Builder struct {
	Buf   []byte
	start int
}

// Begin starts a frame.
func (b *Builder) Begin(typ uint16, call uint32) {
	b.start = len(b.Buf)
	b.Buf = append(b.Buf, 0, 0, 0, 0, byte(typ), byte(typ>>8),
		byte(call), byte(call>>8), byte(call>>16), byte(call>>24))
}

// End finishes the frame. When that is above MaxFrame it is taken back, and
// ErrSize returned.
func (b *Builder) End() error {
	n := len(b.Buf) - b.start - 4
	if n > MaxFrame {
		b.Buf = b.Buf[:b.start]
		return ErrSize
	}
	h := b.Buf[b.start:]
	h[0], h[1], h[2], h[3] = byte(n), byte(n>>8), byte(n>>16), byte(n>>24)
	return nil
}

func appendUvarint(b []byte, v uint64) []byte {
	for v >= 0x80 {
		b = append(b, byte(v)|0x80)
		v >>= 7
	}
	return append(b, byte(v))
}

func uvarintLen(v uint64) int {
	n := 1
	for ; v >= 0x80; v >>= 7 {
		n++
	}
	return n
}

// Bytes appends a field even when p is empty.
func (b *Builder) Bytes(tag byte, p []byte) {
	b.Buf = append(appendUvarint(append(b.Buf, tag), uint64(len(p))), p...)
}

// String appends a field unless s is empty.
func (b *Builder) String(tag byte, s string) {
	if s != "" {
		b.element(tag, s)
	}
}

func (b *Builder) element(tag byte, s string) {
	b.Buf = append(appendUvarint(append(b.Buf, tag), uint64(len(s))), s...)
}

// Strings appends one field for each element, empty ones too.
func (b *Builder) Strings(tag byte, list []string) {
	for _, s := range list {
		b.element(tag, s)
	}
}

// Uint appends a number unless it is 0.
func (b *Builder) Uint(tag byte, v uint64) {
	if v != 0 {
		b.Buf = appendUvarint(append(b.Buf, tag, byte(uvarintLen(v))), v)
	}
}

// Int appends a signed number unless it is 0.
func (b *Builder) Int(tag byte, v int64) { b.Uint(tag, uint64(v<<1)^uint64(v>>63)) }

// Bool appends a truth unless it is false.
func (b *Builder) Bool(tag byte, v bool) {
	if v {
		b.Uint(tag, 1)
	}
}

// clampInt keeps a decoded number within what int32 holds: nothing in the
// protocol is larger, and a hostile one shall not wrap around.
func clampInt(v int64) int {
	return int(max(min(v, math.MaxInt32), math.MinInt32))
}
