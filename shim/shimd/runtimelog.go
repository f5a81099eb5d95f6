package shimd

import (
	"bytes"
	"strconv"
	"unicode/utf8"
)

// maxMessage bounds what is passed on of a runtime's message, in bytes.
const maxMessage = 4 << 10

// runtimeMessage finds in the log of an OCI runtime, one JSON object a line,
// the message of the last line of level error, fatal or panic; else it returns
// the end of the text.
func runtimeMessage(log []byte) string {
	log = bytes.TrimSpace(log)
	for rest := log; len(rest) > 0; {
		i := bytes.LastIndexByte(rest, '\n')
		line := rest[i+1:]
		rest = rest[:max(i, 0)]
		switch level, _ := jsonString(line, "level"); level {
		case "error", "fatal", "panic":
			if msg, ok := jsonString(line, "msg"); ok && msg != "" {
				return clip(msg)
			}
		}
	}
	return clip(string(log[max(0, len(log)-maxMessage):]))
}

func clip(s string) string {
	if len(s) > maxMessage {
		return s[:maxMessage] + " …"
	}
	return s
}

// jsonString returns the text at key in a flat JSON object. It is a scan, not
// a parser: a key inside a string is told apart only by its quotes.
func jsonString(line []byte, key string) (string, bool) {
	i := bytes.Index(line, []byte(`"`+key+`"`))
	if i < 0 || len(line) == 0 || line[0] != '{' {
		return "", false
	}
	p := bytes.TrimLeft(line[i+len(key)+2:], " \t")
	if len(p) == 0 || p[0] != ':' {
		return "", false
	}
	p = bytes.TrimLeft(p[1:], " \t")
	if len(p) == 0 || p[0] != '"' {
		return "", false
	}
	return unquote(p[1:])
}

// unquote decodes a JSON string up to its closing quote.
func unquote(p []byte) (string, bool) {
	var out []byte
	for i := 0; i < len(p); i++ {
		switch c := p[i]; c {
		case '"':
			return string(out), true
		case '\\':
			i++
			if i == len(p) {
				return "", false
			}
			switch e := p[i]; e {
			case 'n':
				out = append(out, '\n')
			case 't':
				out = append(out, '\t')
			case 'r', 'b', 'f':
				out = append(out, ' ')
			case 'u':
				if i+4 >= len(p) {
					return "", false
				}
				v, err := strconv.ParseUint(string(p[i+1:i+5]), 16, 16)
				if err != nil {
					return "", false
				}
				out = utf8.AppendRune(out, rune(v))
				i += 4
			default:
				out = append(out, e)
			}
		default:
			out = append(out, c)
		}
	}
	return "", false
}
