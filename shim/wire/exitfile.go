package wire

import (
	"errors"
	"strconv"
	"strings"
	"time"
)

// ErrExitFile: an exit record that is not whole or not of a known version.
var ErrExitFile = errors.New("malformed exit record")

// MaxExitFile is the largest exit record in bytes.
const MaxExitFile = 4 << 10

const maxReason = 1 << 10

// An exit record is text, so that a person can read it, with one "key value"
// to a line. The first line names the version, the last one proves that the
// record is whole. Keys that a reader does not know are skipped; a change that
// an older reader must not skip gets a new version.
//
//	berth-exit 1
//	code 137
//	signal 9
//	oom 1
//	at 1764000000.000000001
//	reason killed because the container was shut down
//	end
const exitHeader = "berth-exit 1"

// AppendExitFile appends the exit record of e to b.
func AppendExitFile(b []byte, e Exit) []byte {
	b = append(b, exitHeader+"\ncode "...)
	b = strconv.AppendInt(b, int64(e.Code), 10)
	b = append(b, "\nsignal "...)
	b = strconv.AppendInt(b, int64(e.Signal), 10)
	if e.OOMKilled {
		b = append(b, "\noom 1"...)
	}
	b = append(b, "\nat "...)
	b = strconv.AppendInt(b, e.At.Unix(), 10)
	b = append(b, '.')
	ns := strconv.Itoa(e.At.Nanosecond())
	b = append(b, "000000000"[len(ns):]...)
	b = append(b, ns...)
	if e.Reason != "" {
		b = append(b, "\nreason "...)
		b = append(b, oneLine(e.Reason)...)
	}
	return append(b, "\nend\n"...)
}

func oneLine(s string) string {
	if len(s) > maxReason {
		s = s[:maxReason]
	}
	return strings.Map(func(r rune) rune {
		if r < ' ' {
			return ' '
		}
		return r
	}, s)
}

// ParseExitFile reads an exit record, or returns ErrExitFile.
func ParseExitFile(b []byte) (Exit, error) {
	if len(b) > MaxExitFile {
		return Exit{}, ErrExitFile
	}
	lines := strings.Split(string(b), "\n")
	n := len(lines)
	if n < 3 || lines[0] != exitHeader || lines[n-1] != "" || lines[n-2] != "end" {
		return Exit{}, ErrExitFile
	}
	var e Exit
	for _, line := range lines[1 : n-2] {
		key, value, _ := strings.Cut(line, " ")
		if err := e.setLine(key, value); err != nil {
			return Exit{}, ErrExitFile
		}
	}
	if e.Code < 0 || e.Code > 255 || e.Signal < 0 || e.Signal > 127 || e.At.IsZero() {
		return Exit{}, ErrExitFile
	}
	return e, nil
}

func (e *Exit) setLine(key, value string) (err error) {
	switch key {
	case "code":
		e.Code, err = strconv.Atoi(value)
	case "signal":
		e.Signal, err = strconv.Atoi(value)
	case "oom":
		e.OOMKilled = value == "1"
	case "reason":
		e.Reason = value
	case "at":
		sec, frac, _ := strings.Cut(value, ".")
		var s, ns int64
		if s, err = strconv.ParseInt(sec, 10, 64); err != nil {
			return err
		}
		if len(frac) != 9 {
			return ErrExitFile
		}
		if ns, err = strconv.ParseInt(frac, 10, 64); err != nil || ns < 0 {
			return ErrExitFile
		}
		e.At = time.Unix(s, ns)
	}
	return err
}
