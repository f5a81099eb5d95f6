package crilog

import (
	"bytes"
	"strconv"
	"strings"
	"testing"
	"time"
)

var at = time.Date(2026, 1, 2, 3, 4, 5, 6, time.FixedZone("", 3600))

const stamp = "2026-01-02T02:04:05.000000006Z"

func TestAppend(t *testing.T) {
	tests := []struct {
		name string
		in   []string // chunks
		want string   // <> stands for the stamp and the stream
	}{
		{"nothing", nil, ""},
		{"one line", []string{"abc\n"}, "<>F abc\n"},
		{"empty lines", []string{"\n\n"}, "<>F \n<>F \n"},
		{"chunks", []string{"a", "b\nc", "\n"}, "<>F ab\n<>F c\n"},
		{"unended", []string{"abc"}, "<>F abc\n"},
		{"exactly the limit", []string{"12345678\n"}, "<>F 12345678\n"},
		{"the limit, then the end", []string{"12345678", "\n"}, "<>F 12345678\n"},
		{"above the limit", []string{"123456789\n"}, "<>P 12345678\n<>F 9\n"},
		{"above the limit in chunks", []string{"12345", "6789ab", "c\n"}, "<>P 12345678\n<>F 9abc\n"},
		{"twice the limit", []string{"1234567812345678\n"}, "<>P 12345678\n<>F 12345678\n"},
		{"split and unended", []string{"123456781"}, "<>P 12345678\n<>F 1\n"},
		{"carriage return stays", []string{"a\r\n"}, "<>F a\r\n"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			f := NewFramer("stdout", 8)
			var out []byte
			for _, chunk := range test.in {
				var n int
				if out, n = appendAll(f, out, []byte(chunk)); n != len(chunk) {
					t.Fatalf("took %d of %d bytes", n, len(chunk))
				}
			}
			out = f.Flush(out, at)
			want := strings.ReplaceAll(test.want, "<>", stamp+" stdout ")
			if string(out) != want {
				t.Errorf("got:\n%swant:\n%s", out, want)
			}
		})
	}
}

// appendAll goes on, with a small capacity, until all of src is taken.
func appendAll(f *Framer, out, src []byte) ([]byte, int) {
	total := 0
	for {
		piece, n := f.Append(make([]byte, 0, 100), src[total:], at)
		out = append(out, piece...)
		total += n
		if total == len(src) || len(piece)+n == 0 {
			return out, total
		}
	}
}

func TestAppendStopsAtCapacity(t *testing.T) {
	f := NewFramer("stderr", MaxLine)
	src := bytes.Repeat([]byte("0123456789\n"), 100)
	dst := make([]byte, 0, 5*(len(stamp)+len(" stderr F 0123456789\n")))
	out, used := f.Append(dst, src, at)
	if used != 55 || len(out) != cap(dst) || &out[0] != &dst[:1][0] {
		t.Errorf("took %d bytes into %d of capacity %d, want 5 lines in place", used, len(out), cap(dst))
	}
}

func TestNote(t *testing.T) {
	got := string(AppendNote(nil, "3 bytes dropped", at))
	if want := stamp + " stderr F berth: 3 bytes dropped\n"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestShrinkKeepsAnUnendedLine(t *testing.T) {
	f := NewFramer("stdout", MaxLine)
	f.Append(nil, []byte("abc"), at)
	f.Shrink()
	if got := string(f.Flush(nil, at)); got != stamp+" stdout F abc\n" {
		t.Errorf("got %q", got)
	}
}

// FuzzAppend holds that the records, put together again, are the input, in
// whatever pieces it comes, and that each is within the limit.
func FuzzAppend(f *testing.F) {
	f.Add([]byte("hello\nworld"), uint8(3), uint8(4))
	f.Add([]byte("\n\n\n"), uint8(1), uint8(1))
	f.Add([]byte("0123456789abcdef\n"), uint8(5), uint8(16))
	f.Fuzz(func(t *testing.T, in []byte, step, limit uint8) {
		size, chunk := int(limit)+1, int(step)+1
		fr := NewFramer("stdout", size)
		var out []byte
		for rest := in; len(rest) > 0; {
			n := min(chunk, len(rest))
			var used int
			if out, used = appendAll(fr, out, rest[:n]); used != n {
				t.Fatalf("took %d of %d", used, n)
			}
			rest = rest[n:]
		}
		out = fr.Flush(out, at)
		want := in
		if len(in) > 0 && in[len(in)-1] != '\n' {
			want = append(bytes.Clone(in), '\n')
		}
		if got := unframe(t, out, size); !bytes.Equal(got, want) {
			t.Errorf("got %q, want %q", got, want)
		}
	})
}

func unframe(t *testing.T, out []byte, limit int) (text []byte) {
	for len(out) > 0 {
		rest, ok := bytes.CutPrefix(out, []byte(stamp+" stdout "))
		if !ok || len(rest) < 3 || rest[1] != ' ' {
			t.Fatalf("no record at %q", out)
		}
		end := bytes.IndexByte(rest, '\n')
		line := rest[2:end]
		if len(line) > limit {
			t.Fatalf("record of %d bytes, limit %d", len(line), limit)
		}
		text = append(text, line...)
		if rest[0] == 'F' {
			text = append(text, '\n')
		} else if rest[0] != 'P' || len(line) != limit {
			t.Fatalf("record %q", rest[:end])
		}
		out = rest[end+1:]
	}
	return text
}

func BenchmarkAppend(b *testing.B) {
	for _, size := range []int{100, 16 << 10} {
		b.Run(strconv.Itoa(size), func(b *testing.B) {
			line := append(bytes.Repeat([]byte("x"), size-1), '\n')
			src := bytes.Repeat(line, 64<<10/size)
			dst := make([]byte, 0, 256<<10)
			f := NewFramer("stdout", MaxLine)
			b.SetBytes(int64(len(src)))
			for b.Loop() {
				f.Append(dst, src, at)
			}
		})
	}
}
