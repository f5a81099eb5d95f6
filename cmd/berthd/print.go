package main

import (
	"bufio"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
)

// printDefault writes a configuration file in which every key stands with its
// meaning and its default, commented out.
func printDefault(w io.Writer) error {
	out := bufio.NewWriter(w)
	c := defaults()
	for _, line := range wrap("Configuration of berthd, with the defaults. It is read from "+defaultConfig+", then from the files "+
		defaultConfig+".d/*.toml in the order of their names. An unknown key is an error.", 76) {
		fmt.Fprintf(out, "# %s\n", line)
	}
	for _, f := range c.fields() {
		printField(out, f)
	}
	for _, h := range slices.Sorted(maps.Keys(c.Runtimes)) {
		fmt.Fprintf(out, "\n# An OCI runtime; the name is the handler of a RuntimeClass.\n[runtimes.%s]\n", h)
		for _, f := range c.Runtimes[h].fields(h) {
			printField(out, f)
		}
	}
	return out.Flush()
}

// printInForce writes the keys that differ from the default as a configuration file.
func (c *config) printInForce(w io.Writer) {
	show := func(fields, usual []*field) {
		for i, f := range fields {
			if f.literal() != usual[i].literal() {
				fmt.Fprintf(w, "%s = %s\n", f.key, f.literal())
			}
		}
	}
	show(c.fields(), defaults().fields())
	for _, h := range slices.Sorted(maps.Keys(c.Runtimes)) {
		fmt.Fprintf(w, "\n[runtimes.%s]\n", h)
		show(c.Runtimes[h].fields(h), newRuntime(h).fields(h))
	}
}

func printField(w io.Writer, f *field) {
	fmt.Fprintln(w)
	for _, line := range wrap(f.doc+f.notes(), 76) {
		fmt.Fprintf(w, "# %s\n", line)
	}
	fmt.Fprintf(w, "#%s = %s\n", f.key, f.literal())
}

// notes are the limits of a key in words, and whether a reload takes it.
func (f *field) notes() string {
	var s string
	if f.limit != "" {
		s = " (" + f.limit + ")"
	}
	if f.reload {
		s += " Taken by a reload."
	}
	return s
}

// wrap breaks text at spaces into lines of at most width bytes.
func wrap(text string, width int) []string {
	var lines []string
	line := ""
	for _, word := range strings.Fields(text) {
		switch {
		case line == "":
			line = word
		case len(line)+1+len(word) <= width:
			line += " " + word
		default:
			lines = append(lines, line)
			line = word
		}
	}
	return append(lines, line)
}

// printMarkdown writes the table of the documentation.
func printMarkdown(w io.Writer) error {
	out := bufio.NewWriter(w)
	fmt.Fprint(out, "| key | default | accepts | meaning |\n|---|---|---|---|\n")
	row := func(prefix string, f *field) {
		doc := f.doc
		if f.reload {
			doc += " *Taken by a reload.*"
		}
		fmt.Fprintf(out, "| `%s%s` | `%s` | %s | %s |\n", prefix, f.key, f.literal(), f.limit, strings.ReplaceAll(doc, "|", `\|`))
	}
	c := defaults()
	for _, f := range c.fields() {
		row("", f)
	}
	for _, f := range newRuntime("<handler>").fields("<handler>") {
		row("runtimes.<handler>.", f)
	}
	return out.Flush()
}

// difference lists the keys in which two configurations differ.
func (c *config) difference(o *config) []string {
	var keys []string
	compare := func(prefix string, a, b []*field) {
		for i := range a {
			if a[i].literal() != b[i].literal() {
				keys = append(keys, prefix+a[i].key)
			}
		}
	}
	compare("", c.fields(), o.fields())
	handlers := maps.Clone(c.Runtimes)
	maps.Copy(handlers, o.Runtimes)
	for _, h := range slices.Sorted(maps.Keys(handlers)) {
		if c.Runtimes[h] == nil || o.Runtimes[h] == nil {
			keys = append(keys, "runtimes."+h)
			continue
		}
		compare("runtimes."+h+".", c.Runtimes[h].fields(h), o.Runtimes[h].fields(h))
	}
	return keys
}
