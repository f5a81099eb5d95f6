package wire

import (
	"bytes"
	"encoding/hex"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"
)

type frame interface {
	Append(b *Builder, call uint32) error
}

var (
	adj    = -998
	at     = time.Unix(1764000000, 7)
	exited = Exit{Code: 137, Signal: 9, OOMKilled: true, At: at, Reason: "out of memory"}
)

// messages are one of each type, every field set. Version 1 of each stands in
// testdata/v1 and never changes: a shim that is running speaks it.
var messages = []struct {
	name string
	m    frame
}{
	{"hello", Hello{Version: 1, Min: 1, ShimPID: 4242, ID: "c1"}},
	{"launch", Launch{
		ID: "c1", Bundle: "/b", Runtime: "/usr/sbin/runc", RuntimeRoot: "/run/r", RuntimeArgs: []string{"--debug", ""},
		SystemdCgroup: true, Socket: "/s", ExitFile: "/e", LogPath: "/l", Terminal: true, Stdin: true, StdinOnce: true,
		Mounts: []Mount{{Type: "overlay", Source: "overlay", Options: []string{"lowerdir=1:2", "ro"}, Dir: "/layers"}, {Type: "bind", Source: "/x"}},
		Rootfs: "/b/rootfs", OOMFile: "/o", CgroupKill: []string{"/c1", "/c2"}, PrivatePID: true, MaxLogLine: 16384,
		DrainTimeout: 2 * time.Second, CreateTimeout: time.Minute, OOMScoreAdj: &adj,
	}},
	{"launchtarget", Launch{ID: "c1", Mounts: []Mount{{Type: "bind", Source: "/x", Target: "vol-0"}}}},
	{"launchuser", Launch{ID: "c1", Mounts: []Mount{{Type: "overlay", IDMap: "/state", Dir: "layers"}},
		UserNS: "/ns/user", RootUID: 1<<32 - 2, RootGID: 65536}},
	{"kill", Kill{Signal: 15, All: true}},
	{"exec", Exec{Timeout: time.Second, Drain: time.Millisecond, MaxOutput: 1 << 24}},
	{"execstream", Exec{Stream: true, Console: "/c"}},
	{"attach", Attach{Stdin: true, Stdout: true, Stderr: true}},
	{"resize", Resize{Width: 200, Height: 50}},
	{"stdin", Stdin{Data: []byte("in"), EOF: true}},
	{"launched", Launched{ShimPID: 1, Pid: 2}},
	{"state", State{Pid: 2, ShimPID: 1, Status: StatusExited, Exit: &exited}},
	{"execoutput", ExecOutput{Stream: 2, Data: []byte("out")}},
	{"execresult", ExecResult{ExitCode: 255, StdoutTruncated: true, StderrTruncated: true, TimedOut: true}},
	{"exit", exited},
	{"error", Error{Code: CodeRuntime, Step: "runtime create", Message: "no"}},
}

func TestGolden(t *testing.T) {
	for _, test := range messages {
		t.Run(test.name, func(t *testing.T) {
			text, err := os.ReadFile(filepath.Join("testdata", "v1", test.name+".hex"))
			if err != nil {
				t.Fatal(err)
			}
			golden, err := hex.DecodeString(strings.Join(strings.Fields(string(text)), ""))
			if err != nil {
				t.Fatal(err)
			}
			var b Builder
			if err := test.m.Append(&b, 0x01020304); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(b.Buf, golden) {
				t.Errorf("encoded as\n%x, golden\n%x", b.Buf, golden)
			}
			f, n, err := ParseFrame(golden)
			if err != nil || n != len(golden) || f.Call != 0x01020304 {
				t.Fatalf("frame %+v of %d bytes, %v", f, n, err)
			}
			into := reflect.New(reflect.TypeOf(test.m))
			if err := into.Interface().(interface{ Decode(Fields) error }).Decode(f.Body); err != nil {
				t.Fatal(err)
			}
			if got := into.Elem().Interface(); !reflect.DeepEqual(got, test.m) {
				t.Errorf("decoded as\n%+v, want\n%+v", got, test.m)
			}
		})
	}
}

// A field of a later version is skipped.
func TestUnknownFieldsAreSkipped(t *testing.T) {
	for _, test := range messages {
		var b Builder
		if err := test.m.Append(&b, 1); err != nil {
			t.Fatal(err)
		}
		f, _, _ := ParseFrame(b.Buf)
		var more Builder
		more.Bytes(200, []byte("later"))
		more.Buf = append(more.Buf, f.Body...)
		more.Uint(201, 1<<63)
		into := reflect.New(reflect.TypeOf(test.m))
		if err := into.Interface().(interface{ Decode(Fields) error }).Decode(Fields(more.Buf)); err != nil {
			t.Fatal(err)
		}
		if got := into.Elem().Interface(); !reflect.DeepEqual(got, test.m) {
			t.Errorf("%s decoded as %+v", test.name, got)
		}
	}
}

func TestFrameLimits(t *testing.T) {
	tests := []struct {
		name string
		in   []byte
		n    int
		err  error
	}{
		{"nothing", nil, 0, nil},
		{"part of a length", []byte{6, 0, 0}, 0, nil},
		{"part of a frame", []byte{6, 0, 0, 0, 1, 0}, 0, nil},
		{"empty frame", []byte{6, 0, 0, 0, 1, 0, 2, 0, 0, 0}, 10, nil},
		{"and more", []byte{6, 0, 0, 0, 1, 0, 2, 0, 0, 0, 9}, 10, nil},
		{"too short", []byte{5, 0, 0, 0}, 0, ErrFrame},
		{"too long", []byte{1, 0, 1, 0}, 0, ErrSize},
		{"far too long", []byte{255, 255, 255, 255}, 0, ErrSize},
	}
	for _, test := range tests {
		if _, n, err := ParseFrame(test.in); n != test.n || err != test.err {
			t.Errorf("%s: %d, %v; want %d, %v", test.name, n, err, test.n, test.err)
		}
	}
	b := Builder{Buf: []byte("before")}
	if err := (ExecOutput{Data: make([]byte, MaxFrame)}).Append(&b, 1); err != ErrSize || string(b.Buf) != "before" {
		t.Errorf("large frame: %v, left %d bytes", err, len(b.Buf))
	}
	if err := (ExecOutput{Data: make([]byte, MaxChunk)}).Append(&b, 1); err != nil {
		t.Errorf("a chunk does not fit: %v", err)
	}
}

// FuzzParseFrame holds that any bytes are a frame, too few or an error; that
// no message panics on them; and that what decodes encodes to what decodes to
// the same.
func FuzzParseFrame(f *testing.F) {
	for _, test := range messages {
		var b Builder
		if err := test.m.Append(&b, 1); err != nil {
			f.Fatal(err)
		}
		f.Add(b.Buf)
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		fr, n, err := ParseFrame(in)
		if err != nil || n == 0 {
			return
		}
		if n > len(in) || len(fr.Body) != n-HeaderLen {
			t.Fatalf("took %d of %d bytes, body of %d", n, len(in), len(fr.Body))
		}
		for _, test := range messages {
			v := reflect.New(reflect.TypeOf(test.m))
			if v.Interface().(interface{ Decode(Fields) error }).Decode(fr.Body) != nil {
				continue
			}
			var b Builder
			if v.Elem().Interface().(frame).Append(&b, fr.Call) != nil {
				continue // larger than it came, as a field was repeated or not minimal
			}
			again, _, err := ParseFrame(b.Buf)
			if err != nil {
				t.Fatalf("%s: %v", test.name, err)
			}
			w := reflect.New(reflect.TypeOf(test.m))
			if err := w.Interface().(interface{ Decode(Fields) error }).Decode(again.Body); err != nil {
				t.Fatalf("%s: %v", test.name, err)
			}
			var c Builder
			w.Elem().Interface().(frame).Append(&c, fr.Call)
			if !bytes.Equal(b.Buf, c.Buf) {
				t.Errorf("%s: %x became %x", test.name, b.Buf, c.Buf)
			}
		}
	})
}

func TestExitFile(t *testing.T) {
	const text = "berth-exit 1\ncode 137\nsignal 9\noom 1\nat 1764000000.000000007\nreason out of memory\nend\n"
	if got := string(AppendExitFile(nil, exited)); got != text {
		t.Errorf("got %q, want %q", got, text)
	}
	good := []struct {
		in   string
		want Exit
	}{
		{text, exited},
		{"berth-exit 1\ncode 0\nat 5.000000000\nend\n", Exit{At: time.Unix(5, 0)}},
		{"berth-exit 1\nlater x y\ncode 0\nat 5.000000000\nend\n", Exit{At: time.Unix(5, 0)}},
	}
	for _, test := range good {
		if got, err := ParseExitFile([]byte(test.in)); err != nil || !reflect.DeepEqual(got, test.want) {
			t.Errorf("%q: %+v, %v", test.in, got, err)
		}
	}
	bad := []string{
		"", "\n", "berth-exit 1\n", "berth-exit 1\nend\n", strings.TrimSuffix(text, "end\n"), strings.TrimSuffix(text, "\n"),
		strings.Replace(text, "exit 1", "exit 2", 1), strings.Replace(text, "code 137", "code 256", 1),
		strings.Replace(text, "code 137", "code x", 1), strings.Replace(text, ".000000007", ".7", 1),
		strings.Replace(text, ".000000007", ".-00000007", 1), text + strings.Repeat("x", MaxExitFile),
	}
	for _, in := range bad {
		if got, err := ParseExitFile([]byte(in)); err == nil {
			t.Errorf("%.80q: accepted as %+v", in, got)
		}
	}
}

// FuzzExitFile holds that what is read is within bounds and written as it was
// meant.
func FuzzExitFile(f *testing.F) {
	f.Add(AppendExitFile(nil, exited))
	f.Fuzz(func(t *testing.T, in []byte) {
		e, err := ParseExitFile(in)
		if err != nil {
			return
		}
		again, err := ParseExitFile(AppendExitFile(nil, e))
		if err != nil || again.Code != e.Code || again.Signal != e.Signal || again.OOMKilled != e.OOMKilled || !again.At.Equal(e.At) {
			t.Errorf("%+v became %+v, %v", e, again, err)
		}
	})
}
