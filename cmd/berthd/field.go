package main

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// field is one key of the configuration and what is known about it.
type field struct {
	key   string
	doc   string
	limit string // what values are accepted, for the documentation; "" if the type says all
	// reload tells that a running daemon takes a new value.
	reload bool
	// empty tells that "" is accepted where a path is wanted.
	empty bool
	max   int // bytes of a text
	set   func(v any) error
	reset func()
	// get is the present value, of a type that set takes.
	get func() any
}

// literal is the present value in TOML.
func (f *field) literal() string {
	switch v := f.get().(type) {
	case string:
		return quote(v)
	case []any:
		q := make([]string, len(v))
		for i, s := range v {
			q[i] = quote(s.(string))
		}
		return "[" + strings.Join(q, ", ") + "]"
	default:
		return fmt.Sprint(v)
	}
}

// Limits of every list and text; a path has PATH_MAX.
const (
	maxEntries = 1024
	maxText    = 4095
)

func (f *field) live() *field     { f.reload = true; return f }
func (f *field) optional() *field { f.empty = true; return f }
func (f *field) bytes(n int) *field {
	f.max = n
	f.limit += fmt.Sprintf(", up to %d bytes", n)
	return f
}
func (f *field) limited(s string) *field { f.limit = s; return f }

// text is a string with a check of its own.
func text(v *string, key, def string, check func(string) error, doc string) *field {
	f := &field{key: key, doc: doc, max: maxText, reset: func() { *v = def }, get: func() any { return *v }}
	f.set = func(a any) error {
		s, ok := a.(string)
		if !ok {
			return wanted("a string", a)
		}
		if len(s) > f.max {
			return fmt.Errorf("%d bytes, limit %d", len(s), f.max)
		}
		if strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r == 0x7f }) {
			return fmt.Errorf("%s: control character", quote(s))
		}
		if err := check(s); err != nil {
			return fmt.Errorf("%s: %w", quote(s), err)
		}
		*v = s
		return nil
	}
	return f
}

// path is an absolute path in its shortest form.
func path(v *string, key, def, doc string) *field {
	var f *field
	f = text(v, key, def, func(s string) error {
		if s == "" && f.empty {
			return nil
		}
		return checkAbsolute(s)
	}, doc).limited("absolute path")
	return f
}

func checkAbsolute(s string) error {
	if !filepath.IsAbs(s) || filepath.Clean(s) != s {
		return errors.New("want an absolute path without \"..\" or a slash at its end")
	}
	if s == "/" {
		return errors.New("the root directory cannot be used")
	}
	return nil
}

// program is a path, or a name to be looked up in PATH, or nothing.
func program(v *string, key, doc string) *field {
	return text(v, key, "", func(s string) error {
		if strings.Contains(s, "/") {
			return checkAbsolute(s)
		}
		return nil
	}, doc).limited("absolute path or a name in PATH")
}

// choice is one of several words; the first is the default.
func choice(v *string, key string, words []string, doc string) *field {
	return text(v, key, words[0], func(s string) error {
		if !slices.Contains(words, s) {
			return fmt.Errorf("want one of %s", strings.Join(words, ", "))
		}
		return nil
	}, doc).limited(strings.Join(words, ", "))
}

// list is an array of strings, each with the same check.
func list(v *[]string, key string, def []string, check func(string) error, doc string) *field {
	return &field{key: key, doc: doc,
		reset: func() { *v = slices.Clone(def) },
		get: func() any {
			out := make([]any, len(*v))
			for i, s := range *v {
				out[i] = s
			}
			return out
		},
		set: func(a any) error {
			in, ok := a.([]any)
			if !ok {
				return wanted("a list of strings", a)
			}
			if len(in) > maxEntries {
				return fmt.Errorf("%d entries, limit %d", len(in), maxEntries)
			}
			out := make([]string, 0, len(in))
			for i, e := range in {
				var s string
				if err := text(&s, "", "", check, "").set(e); err != nil {
					return fmt.Errorf("entry %d: %w", i, err)
				}
				out = append(out, s)
			}
			*v = out
			return nil
		}}
}

// paths is a list of absolute paths that is not empty.
func paths(v *[]string, key string, def []string, doc string) *field {
	f := list(v, key, def, checkAbsolute, doc).limited("absolute paths, one at least")
	set := f.set
	f.set = func(a any) error {
		if in, ok := a.([]any); ok && len(in) == 0 {
			return errors.New("[]: want one path at least")
		}
		return set(a)
	}
	return f
}

func boolean(v *bool, key string, def bool, doc string) *field {
	return &field{key: key, doc: doc, reset: func() { *v = def },
		get: func() any { return *v },
		set: func(a any) error {
			b, ok := a.(bool)
			if !ok {
				return wanted("true or false", a)
			}
			*v = b
			return nil
		}}
}

func integer(v *int64, key string, def, low, high int64, doc string) *field {
	show := func(n int64) string { return strconv.FormatInt(n, 10) }
	return &field{key: key, doc: doc, limit: show(low) + " to " + show(high), reset: func() { *v = def },
		get: func() any { return *v },
		set: func(a any) error {
			n, ok := a.(int64)
			if !ok {
				return wanted("a whole number", a)
			}
			return within(v, n, low, high, show)
		}}
}

// size is a number of bytes, as a number or with a unit: "16MiB".
func size(v *int64, key string, def, low, high int64, doc string) *field {
	return &field{key: key, doc: doc, limit: showSize(low) + " to " + showSize(high), reset: func() { *v = def },
		get: func() any { return showSize(*v) },
		set: func(a any) error {
			n, ok := a.(int64)
			if s, isText := a.(string); isText {
				var err error
				if n, err = parseSize(s); err != nil {
					return fmt.Errorf("%s: %w", quote(s), err)
				}
				ok = true
			}
			if !ok {
				return wanted(`a size such as "16MiB" or a number of bytes`, a)
			}
			return within(v, n, low, high, showSize)
		}}
}

func duration(v *time.Duration, key string, def, low, high time.Duration, doc string) *field {
	return &field{key: key, doc: doc, limit: showDuration(low) + " to " + showDuration(high), reset: func() { *v = def },
		get: func() any { return showDuration(*v) },
		set: func(a any) error {
			s, ok := a.(string)
			if !ok {
				return wanted(`a duration such as "90s"`, a)
			}
			d, err := time.ParseDuration(s)
			if err != nil {
				return fmt.Errorf(`%s: want a duration such as "90s"`, quote(s))
			}
			return within(v, d, low, high, showDuration)
		}}
}

func within[T int64 | time.Duration](v *T, n, low, high T, show func(T) string) error {
	if n < low || n > high {
		return fmt.Errorf("%s: want %s to %s", show(n), show(low), show(high))
	}
	*v = n
	return nil
}

// wanted is the error for a value of the wrong type.
func wanted(want string, got any) error {
	kind := "a date"
	switch got.(type) {
	case string:
		kind = "a string"
	case int64:
		kind = "a number"
	case float64:
		kind = "a fraction"
	case bool:
		kind = "true or false"
	case []any:
		kind = "a list"
	case map[string]any, []map[string]any:
		kind = "a table"
	}
	return fmt.Errorf("want %s, not %s", want, kind)
}

var units = []struct {
	name  string
	shift uint
}{{"TiB", 40}, {"GiB", 30}, {"MiB", 20}, {"KiB", 10}}

// parseSize reads "16MiB", "4096". Only binary units: "16M" is ambiguous.
func parseSize(s string) (int64, error) {
	digits, shift := s, uint(0)
	for _, u := range units {
		if d, ok := strings.CutSuffix(s, u.name); ok {
			digits, shift = strings.TrimSpace(d), u.shift
			break
		}
	}
	n, err := strconv.ParseUint(digits, 10, 63)
	if err != nil || n > (1<<63-1)>>shift {
		return 0, errors.New("want a size such as 4096, 64KiB, 16MiB or 256GiB")
	}
	return int64(n) << shift, nil
}

func showSize(n int64) string {
	for _, u := range units {
		if n != 0 && n&(1<<u.shift-1) == 0 {
			return strconv.FormatInt(n>>u.shift, 10) + u.name
		}
	}
	return strconv.FormatInt(n, 10)
}

// showDuration writes 1m0s as 1m and 1h0m0s as 1h.
func showDuration(d time.Duration) string {
	s := d.String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}

// quote writes s as a TOML basic string. Go's quoting agrees with TOML's for
// valid UTF-8 without control characters, which is all that a field holds.
func quote(s string) string { return strconv.Quote(s) }
