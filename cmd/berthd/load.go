package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strings"

	"github.com/BurntSushi/toml"
)

const (
	defaultConfig = "/etc/berth/berth.toml"
	maxConfigFile = 1 << 20 // bytes
	maxDropIns    = 256
)

// source is where the configuration comes from: a file, its drop-ins in the
// directory of the same name with ".d" behind it, and settings of the command
// line, which count most.
type source struct {
	file     string
	required bool // the file has been asked for, so it must be there
	flags    []setting
}

// setting is a key that a flag sets.
type setting struct {
	flag, key string
	value     any
}

// load reads everything again; a running daemon calls it for a reload.
func (s source) load() (*config, error) {
	c := defaults()
	if err := c.readFile(s.file, s.required); err != nil {
		return nil, err
	}
	drops, err := dropIns(s.file + ".d")
	if err != nil {
		return nil, err
	}
	for _, d := range drops {
		if err := c.readFile(d, true); err != nil {
			return nil, err
		}
	}
	for _, o := range s.flags {
		i := slices.IndexFunc(c.fields(), func(f *field) bool { return f.key == o.key })
		if err := c.fields()[i].set(o.value); err != nil {
			return nil, fmt.Errorf("%s: %w", o.flag, err)
		}
		c.origin[o.key] = o.flag
	}
	return c, c.finish()
}

// dropIns lists the *.toml files of a directory in lexical order.
func dropIns(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("config drop-ins: %w", err)
	}
	var files []string
	for _, e := range entries {
		if name := e.Name(); strings.HasSuffix(name, ".toml") && !strings.HasPrefix(name, ".") && !e.IsDir() {
			files = append(files, filepath.Join(dir, name))
		}
	}
	if len(files) > maxDropIns {
		return nil, fmt.Errorf("config drop-ins: %s has %d files, limit %d", dir, len(files), maxDropIns)
	}
	return files, nil
}

// readFile applies one file to c.
func (c *config) readFile(file string, required bool) error {
	f, err := os.Open(file)
	if errors.Is(err, fs.ErrNotExist) && !required {
		return nil
	}
	if err != nil {
		return fmt.Errorf("config: %w", err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxConfigFile+1))
	if err != nil {
		return fmt.Errorf("config: %w", err)
	}
	if len(b) > maxConfigFile {
		return fmt.Errorf("config: %s is larger than %d bytes", file, maxConfigFile)
	}
	return c.apply(file, string(b))
}

// document is a parsed file. The TOML library tells positions only in the
// errors of its own decoding, so each value is decoded on its own, by a
// [receiver] whose error then comes back with the line of its key.
type document struct {
	file  string
	md    toml.MetaData
	order map[string]int // place of a key, or of the first key below it, in the file
}

// apply sets the keys of one file, in the order in which they stand there.
func (c *config) apply(file, body string) error {
	var tree map[string]toml.Primitive
	md, err := toml.Decode(body, &tree)
	if err != nil {
		return located(file, err)
	}
	d := &document{file: file, md: md, order: map[string]int{}}
	for i, k := range md.Keys() {
		for n := range k {
			if at := k[:n+1].String(); d.order[at] == 0 {
				d.order[at] = i + 1
			}
		}
	}
	own := c.fields()
	for _, key := range d.sorted(nil, tree) {
		if key == "runtimes" {
			err = c.applyRuntimes(d, tree[key])
		} else {
			err = c.applyKey(d, own, toml.Key{key}, tree[key])
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// applyRuntimes sets the tables [runtimes.<handler>].
func (c *config) applyRuntimes(d *document, p toml.Primitive) error {
	handlers, err := d.table(toml.Key{"runtimes"}, p)
	if err != nil {
		return err
	}
	for _, h := range d.sorted(toml.Key{"runtimes"}, handlers) {
		at := toml.Key{"runtimes", h}
		if err := checkHandler(h); err != nil {
			return d.fail(at, handlers[h], err)
		}
		keys, err := d.table(at, handlers[h])
		if err != nil {
			return err
		}
		if c.Runtimes[h] == nil {
			c.Runtimes[h] = newRuntime(h)
		}
		own := c.Runtimes[h].fields(h)
		for _, k := range d.sorted(at, keys) {
			if err := c.applyKey(d, own, append(slices.Clone(at), k), keys[k]); err != nil {
				return err
			}
		}
	}
	return nil
}

// applyKey sets the value of one key among those that are known at its place.
func (c *config) applyKey(d *document, own []*field, at toml.Key, p toml.Primitive) error {
	key := at[len(at)-1]
	i := slices.IndexFunc(own, func(f *field) bool { return f.key == key })
	if i < 0 {
		return d.fail(at, p, unknownKey(own, key, len(at) == 1))
	}
	if err := d.give(p, own[i].set); err != nil {
		return d.located(at, p, err)
	}
	line, _ := d.line(at, p)
	c.origin[at.String()] = fmt.Sprintf("%s:%d", d.file, line)
	return nil
}

// unknownKey is the error for a key that does not exist, with the nearest one
// that does if it looks like a slip.
func unknownKey(own []*field, key string, top bool) error {
	names := make([]string, 0, len(own)+1)
	for _, f := range own {
		names = append(names, f.key)
	}
	if top {
		names = append(names, "runtimes")
	}
	best := slices.MinFunc(names, func(a, b string) int { return cmp.Compare(distance(key, a), distance(key, b)) })
	if distance(key, best) <= max(1, len(key)/4) {
		return fmt.Errorf("unknown key, did you mean %s?", best)
	}
	return errors.New("unknown key")
}

// table is what is below a key that has to be a table.
func (d *document) table(at toml.Key, p toml.Primitive) (map[string]toml.Primitive, error) {
	if err := d.give(p, func(v any) error {
		if _, ok := v.(map[string]any); !ok {
			return wanted("a table", v)
		}
		return nil
	}); err != nil {
		return nil, d.located(at, p, err)
	}
	var m map[string]toml.Primitive
	return m, d.md.PrimitiveDecode(p, &m)
}

// receiver takes one decoded value.
type receiver struct{ set func(any) error }

func (r *receiver) UnmarshalTOML(v any) error { return r.set(v) }

// give hands the value of p to set; an error of set comes back as a
// toml.ParseError.
func (d *document) give(p toml.Primitive, set func(any) error) error {
	return d.md.PrimitiveDecode(p, &receiver{set})
}

// fail is err with the position of a key.
func (d *document) fail(at toml.Key, p toml.Primitive, err error) error {
	return d.located(at, p, d.give(p, func(any) error { return err }))
}

// located is an error of give, about the key at.
func (d *document) located(at toml.Key, p toml.Primitive, err error) error {
	line, _ := d.line(at, p)
	var pe toml.ParseError
	if errors.As(err, &pe) {
		err = errors.New(pe.Message)
	}
	return fmt.Errorf("%s:%d: %s: %w", d.file, line, at, err)
}

// line is where a key stands. A table that is only there because of a longer
// name, such as a in [a.b], has no line of its own: that of the first key
// below it counts.
func (d *document) line(at toml.Key, p toml.Primitive) (int, bool) {
	var pe toml.ParseError
	if errors.As(d.give(p, func(any) error { return errors.New("") }), &pe) && pe.Position.Line > 0 {
		return pe.Position.Line, true
	}
	var below map[string]toml.Primitive
	if d.md.PrimitiveDecode(p, &below) != nil {
		return 0, false
	}
	for _, k := range d.sorted(at, below) {
		if n, ok := d.line(append(slices.Clone(at), k), below[k]); ok {
			return n, true
		}
	}
	return 0, false
}

// sorted are the keys of a table in the order of the file.
func (d *document) sorted(at toml.Key, m map[string]toml.Primitive) []string {
	keys := slices.Sorted(maps.Keys(m))
	place := func(k string) int { return d.order[append(slices.Clone(at), k).String()] }
	sort.SliceStable(keys, func(i, j int) bool { return place(keys[i]) < place(keys[j]) })
	return keys
}

// located is an error of the parser with its file and line.
func located(file string, err error) error {
	var pe toml.ParseError
	if errors.As(err, &pe) {
		// The parser counts one line too few where the file ends too early.
		return fmt.Errorf("%s:%d: %s", file, max(1, pe.Position.Line), strings.TrimPrefix(pe.Message, "toml: "))
	}
	return fmt.Errorf("%s: %w", file, err)
}

// distance is the number of letters to change, add or leave out between two
// short words (Levenshtein).
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := 1; i <= len(a); i++ {
		diagonal := row[0]
		row[0] = i
		for j := 1; j <= len(b); j++ {
			cost := diagonal
			if a[i-1] != b[j-1] {
				cost++
			}
			diagonal = row[j]
			row[j] = min(cost, row[j]+1, row[j-1]+1)
		}
	}
	return row[len(b)]
}
