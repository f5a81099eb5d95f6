package shim_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berthd/berth/shim"
)

// What older versions said is kept in testdata/<version>/session.txt, and spoken
// here by code of this file's own, which shares nothing with package wire: the
// present shim has to understand an old berthd, and the present berthd an old
// shim.

// message is a line of a session.
type message struct {
	line     string
	fromShim bool
	typ      uint16
	call     uint32
	fields   []field
}

type field struct {
	tag   byte
	kind  string
	value string
}

// recorded reads one part of a recorded conversation, with its names filled in.
func recorded(t *testing.T, version, part string, names map[string]string) []message {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("testdata", version, "session.txt"))
	mustT(t, err)
	var out []message
	in := false
	for line := range strings.Lines(string(text)) {
		switch line = strings.TrimSpace(line); {
		case line == "", line[0] == '#':
		case line[0] == '[':
			in = line == "["+part+"]"
		case in:
			for k, v := range names {
				line = strings.ReplaceAll(line, "{"+k+"}", v)
			}
			m, err := parseMessage(line)
			mustT(t, err)
			out = append(out, m)
		}
	}
	if len(out) == 0 {
		t.Fatalf("session %s has no part %s", version, part)
	}
	return out
}

func parseMessage(line string) (message, error) {
	f := strings.Split(line, " ")
	m := message{line: line, fromShim: f[0] == "<"}
	typ, err1 := strconv.ParseUint(f[1], 10, 16)
	call, err2 := strconv.ParseUint(f[2], 10, 32)
	m.typ, m.call = uint16(typ), uint32(call)
	fields, err3 := parseFields(f[3:])
	m.fields = fields
	return m, errors.Join(err1, err2, err3)
}

func parseFields(list []string) (out []field, err error) {
	for _, s := range list {
		tag, rest, ok1 := strings.Cut(s, "=")
		kind, value, ok2 := strings.Cut(rest, ":")
		n, err := strconv.ParseUint(tag, 10, 8)
		if err != nil || !ok1 || !ok2 {
			return nil, fmt.Errorf("field %q: %w", s, err)
		}
		out = append(out, field{byte(n), kind, value})
	}
	return out, nil
}

// payload encodes a field's value as version 1 does.
func (f field) payload() ([]byte, error) {
	switch f.kind {
	case "s":
		return []byte(f.value), nil
	case "u":
		n, err := strconv.ParseUint(f.value, 10, 64)
		return binary.AppendUvarint(nil, n), err
	case "i":
		n, err := strconv.ParseInt(f.value, 10, 64)
		return binary.AppendVarint(nil, n), err // zigzag
	case "m":
		in, err := parseFields(strings.Split(strings.Trim(f.value, "{}"), ","))
		if err != nil {
			return nil, err
		}
		return encodeFields(in)
	}
	return nil, fmt.Errorf("kind %q", f.kind)
}

func encodeFields(list []field) ([]byte, error) {
	var out []byte
	for _, f := range list {
		p, err := f.payload()
		if err != nil {
			return nil, fmt.Errorf("tag %d: %w", f.tag, err)
		}
		out = append(binary.AppendUvarint(append(out, f.tag), uint64(len(p))), p...)
	}
	return out, nil
}

// write sends a message under a call's number.
func (m message) write(w io.Writer, call uint32) error {
	for i, f := range m.fields { // what may be anything is one thing here
		if f.value == "*" {
			m.fields[i].value = "1"
		}
	}
	body, err := encodeFields(m.fields)
	if err != nil {
		return fmt.Errorf("%s: %w", m.line, err)
	}
	b := binary.LittleEndian.AppendUint32(nil, uint32(6+len(body)))
	b = binary.LittleEndian.AppendUint32(binary.LittleEndian.AppendUint16(b, m.typ), call)
	_, err = w.Write(append(b, body...))
	return err
}

// got is a frame as it came.
type got struct {
	typ  uint16
	call uint32
	tags map[byte][]byte
}

func readGot(r io.Reader) (got, error) {
	var head [10]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return got{}, err
	}
	n := binary.LittleEndian.Uint32(head[:])
	if n < 6 || n > 64<<10 {
		return got{}, fmt.Errorf("frame of %d bytes", n)
	}
	body := make([]byte, n-6)
	if _, err := io.ReadFull(r, body); err != nil {
		return got{}, err
	}
	g := got{binary.LittleEndian.Uint16(head[4:]), binary.LittleEndian.Uint32(head[6:]), map[byte][]byte{}}
	for len(body) > 0 {
		size, k := binary.Uvarint(body[1:])
		if k <= 0 || uint64(len(body)-1-k) < size {
			return g, errors.New("malformed field")
		}
		g.tags[body[0]] = body[1+k : 1+k+int(size)]
		body = body[1+k+int(size):]
	}
	return g, nil
}

// is compares a frame with what was recorded. Fields that are not recorded are
// skipped, as a reader of that version does.
func (g got) is(m message) error {
	if g.typ != m.typ {
		return fmt.Errorf("type %d, recorded is: %s", g.typ, m.line)
	}
	for _, f := range m.fields {
		p, ok := g.tags[f.tag]
		if !ok {
			return fmt.Errorf("no field %d, recorded is: %s", f.tag, m.line)
		}
		if f.value == "*" {
			continue
		}
		want, err := f.payload()
		if err != nil {
			return err
		}
		if !bytes.Equal(bytes.TrimSpace(p), want) {
			return fmt.Errorf("field %d is %q, recorded is: %s", f.tag, p, m.line)
		}
	}
	return nil
}

// play is berthd's part of a session: it says its lines and expects the shim's.
func play(t *testing.T, conn net.Conn, lines []message) {
	t.Helper()
	mustT(t, conn.SetDeadline(time.Now().Add(time.Minute)))
	for _, m := range lines {
		if !m.fromShim {
			mustT(t, m.write(conn, m.call))
			continue
		}
		g, err := readGot(conn)
		if err != nil {
			t.Fatalf("%s: %v", m.line, err)
		}
		if err := g.is(m); err != nil || g.call != m.call {
			t.Fatalf("call %d: %v; %q", g.call, err, g.tags)
		}
	}
}

// TestOldDaemon: a berthd of version 1 launches a container with the present shim
// and works with it.
func TestOldDaemon(t *testing.T) {
	c := newContainer(t, "/bin/sleep", "1000")
	mustT(t, writeSpec(c))
	bin, err := builtShim()
	mustT(t, err)
	process, err := json.Marshal(processOf("/bin/echo", "hello"))
	mustT(t, err)
	options := c.l.Mounts[0].Options
	names := map[string]string{"id": c.id, "bundle": c.l.Bundle, "runtime": c.l.Runtime, "root": c.l.RuntimeRoot, "socket": c.l.Socket,
		"exit": c.l.ExitFile, "log": c.l.LogPath, "rootfs": c.l.Rootfs, "process": string(process),
		"lower": options[0], "upper": options[1], "work": options[2]}

	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	mustT(t, err)
	ours, theirs := os.NewFile(uintptr(pair[0]), "ours"), os.NewFile(uintptr(pair[1]), "theirs")
	cmd := &exec.Cmd{Path: bin, Args: []string{"berth-shim", c.l.Socket, c.id}, ExtraFiles: []*os.File{theirs},
		Env: []string{"GOMAXPROCS=1", "GODEBUG=containermaxprocs=0,updatemaxprocs=0", "PATH=" + os.Getenv("PATH")}}
	mustT(t, cmd.Start())
	theirs.Close()
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	conn, err := net.FileConn(ours)
	mustT(t, err)
	ours.Close()
	play(t, conn, recorded(t, "v1", "launch", names))
	again, err := net.Dial("unix", c.l.Socket)
	mustT(t, err)
	play(t, again, recorded(t, "v1", "connect", names))
	conn.Close()
	again.Close()
	select {
	case err := <-ended:
		mustT(t, err)
	case <-time.After(20 * time.Second):
		t.Error("the shim does not end")
		cmd.Process.Kill()
	}
	if e, err := shim.ReadExit(c.l.ExitFile); err != nil || e.Code != 137 {
		t.Errorf("exit record %+v, %v", e, err)
	}
}

// TestOldShim: the present client works with a shim of version 1, and says
// nothing to it that was not in that version.
func TestOldShim(t *testing.T) {
	names := map[string]string{"id": "c1", "process": "{}"}
	lines := recorded(t, "v1", "connect", names)
	// The tags of each request of version 1, whether or not the session has them.
	known := map[uint16][]byte{1: {1, 2}, 3: {}, 4: {1, 2}, 5: {1}, 6: {1, 2, 3, 4, 5}, 7: {}, 8: {}, 9: {}, 11: {}}
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	mustT(t, err)
	defer l.Close()
	served := make(chan error, 1)
	go func() {
		conn, err := l.Accept()
		if err != nil {
			served <- err
			return
		}
		defer conn.Close()
		served <- answer(conn, lines, known)
	}()
	ctx := ctxFor(t, time.Minute)
	c, err := shim.Connect(ctx, path)
	mustT(t, err)
	defer c.Close()
	if st, err := c.State(ctx); err != nil || st.Status != shim.StatusCreated || c.ID() != "c1" {
		t.Errorf("state %+v of %q, %v", st, c.ID(), err)
	}
	mustT(t, c.Start(ctx))
	if err := c.Start(ctx); !errors.Is(err, shim.ErrState) {
		t.Errorf("second start: %v, want ErrState", err)
	}
	r, err := c.Exec(ctx, shim.ExecRequest{Process: []byte("{}"), Image: &shim.ExecImage{}, Timeout: 20 * time.Second, MaxOutput: 4096})
	if err != nil || string(r.Stdout) != "hello" || r.ExitCode != 0 {
		t.Errorf("exec %+v, %v", r, err)
	}
	mustT(t, c.ReopenLog(ctx))
	if st, err := c.State(ctx); err != nil || st.Status != shim.StatusRunning {
		t.Errorf("state %+v, %v", st, err)
	}
	mustT(t, c.Kill(ctx, 9, true))
	select {
	case e := <-c.Exited():
		if e.Code != 137 || e.Signal != 9 {
			t.Errorf("exit %+v", e)
		}
	case <-ctx.Done():
		t.Error("no exit was told")
	}
	mustT(t, <-served)
}

// answer is the shim's part of a session: it expects berthd's lines and says its
// own, under the numbers that berthd gave its calls.
func answer(conn net.Conn, lines []message, known map[uint16][]byte) error {
	calls := map[uint32]uint32{0: 0} // recorded -> present
	for _, m := range lines {
		if m.fromShim {
			// It speaks version 1 and nothing else.
			if m.typ == 1 {
				m.fields = slices.Clone(m.fields)
				m.fields[0].value = "1"
			}
			if err := m.write(conn, calls[m.call]); err != nil {
				return err
			}
			continue
		}
		g, err := readGot(conn)
		if err != nil {
			return fmt.Errorf("%s: %w", m.line, err)
		}
		if g.typ != m.typ {
			return fmt.Errorf("type %d, expected is: %s", g.typ, m.line)
		}
		for tag := range g.tags {
			if !slices.Contains(known[g.typ], tag) {
				return fmt.Errorf("type %d has the field %d, which version 1 does not know", g.typ, tag)
			}
		}
		calls[m.call] = g.call
	}
	return nil
}

// TestNewerShim: a shim that has given up what this side speaks is refused with
// both ranges.
func TestNewerShim(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	mustT(t, err)
	defer l.Close()
	go func() {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		if g, err := readGot(conn); err == nil {
			m, err := parseMessage("< 1 1 1=u:99 2=u:98 3=i:1 4=s:c1")
			if err == nil {
				_ = m.write(conn, g.call)
			}
		}
	}()
	_, err = shim.Connect(context.Background(), path)
	if !errors.Is(err, shim.ErrUnsupported) || !strings.Contains(err.Error(), "98 to 99") {
		t.Errorf("got %v, want ErrUnsupported with its range", err)
	}
}
