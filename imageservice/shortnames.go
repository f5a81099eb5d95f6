package imageservice

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"

	"github.com/BurntSushi/toml"
	"github.com/containers/image/v5/docker/reference"
)

// maxRegistriesConf bounds one file of registries.conf in bytes.
const maxRegistriesConf = 4 << 20

// shortNames is what registries.conf says about names without a registry. It is read by
// lookups, so it is immutable and needs no file.
type shortNames struct {
	search  []string         // registries, in order; never empty
	aliases map[string]alias // by short name without tag
	// enforcing: a name that may mean several images is refused, as nobody can be asked.
	enforcing bool
}

type alias struct{ full, file string }

// candidate is a full reference that a text may mean, and why.
type candidate struct {
	named  reference.Named
	reason string
}

// candidates are the full forms of a reference in the order in which they are tried: one,
// unless the name is short, has no alias and there are several registries to search.
func (n shortNames) candidates(text string) ([]candidate, error) {
	if !isShort(text) {
		named, err := parseReference(text, "")
		return []candidate{{named, "as given"}}, err
	}
	if c, ok, err := n.alias(text); ok {
		return []candidate{c}, err
	}
	var out []candidate
	for _, registry := range n.search {
		named, err := parseReference(text, registry)
		if err != nil {
			return nil, err
		}
		out = append(out, candidate{named, "short name, searched at " + registry})
	}
	return out, nil
}

func (n shortNames) alias(text string) (candidate, bool, error) {
	end := len(text)
	if i := strings.IndexAny(text, ":@"); i >= 0 {
		end = i
	}
	a, ok := n.aliases[text[:end]]
	if !ok {
		return candidate{}, false, nil
	}
	named, err := parseReference(a.full+text[end:], "")
	return candidate{named, fmt.Sprintf("alias %s in %s", text[:end], a.file)}, true, err
}

// toPull is candidates for a pull, which an ambiguous name may not be good enough for.
func (n shortNames) toPull(text string) ([]candidate, error) {
	all, err := n.candidates(text)
	if err == nil && n.enforcing && len(all) > 1 {
		return nil, fmt.Errorf("%w %q: short-name-mode is enforcing and it may be at any of %s: give the registry, or an alias in registries.conf",
			ErrInvalidReference, text, strings.Join(n.search, ", "))
	}
	return all, err
}

// candidates are the names that text may mean, for lookups.
func candidates(text string, n shortNames) ([]reference.Named, error) {
	all, err := n.candidates(text)
	if err != nil {
		return nil, err
	}
	names := make([]reference.Named, len(all))
	for i, c := range all {
		names[i] = c.named
	}
	return names, nil
}

// readAliases reads the table "aliases" of the files, of which the last counts; an empty
// value takes an alias away. containers/image can look one up too, but makes a lock file
// in a directory of its own for that.
func readAliases(files []string) (map[string]alias, error) {
	out := map[string]alias{}
	for _, f := range files {
		b, err := readBounded(f, maxRegistriesConf)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		var c struct {
			Aliases map[string]string `toml:"aliases"`
		}
		if _, err := toml.Decode(string(b), &c); err != nil {
			return nil, fmt.Errorf("%s: %w", f, err)
		}
		for name, full := range c.Aliases {
			if full == "" {
				delete(out, name)
				continue
			}
			out[name] = alias{full, f}
		}
	}
	return out, nil
}

// confFiles are registries.conf and its drop-ins, in the order in which they count.
func confFiles(conf string, dirs []string) []string {
	files := []string{conf}
	for _, d := range dirs {
		found, _ := filepath.Glob(filepath.Join(d, "*.conf")) // the pattern is well formed
		slices.Sort(found)
		files = append(files, found...)
	}
	return files
}
