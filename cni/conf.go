package cni

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/utils"
	"github.com/containernetworking/cni/pkg/version"
)

// Limits of a configuration.
const (
	maxConfSize   = 1 << 20
	maxConfFiles  = 256
	maxPlugins    = 64
	maxNameLen    = 100 // libcni puts it in a file name, with the pod ID
	statusVersion = "1.1.0"
)

var confExtensions = []string{".conf", ".conflist", ".json"}

// network is one configuration, checked. It does not change.
type network struct {
	file     string // "" for the fallback and for what a record holds
	list     *libcni.NetworkConfigList
	fallback bool
}

// source names it in errors.
func (n *network) source() string {
	switch {
	case n.fallback:
		return "the fallback configuration"
	case n.file == "":
		return "the recorded configuration"
	}
	return n.file
}

// hasStatus tells whether its version has the verbs STATUS and GC.
func (n *network) hasStatus() bool {
	ok, err := version.GreaterThanOrEqualTo(n.list.CNIVersion, statusVersion)
	return ok && err == nil
}

// binaries are the plugins that it needs, without repetition.
func (n *network) binaries() []string {
	var names []string
	for _, p := range n.list.Plugins {
		for _, name := range []string{p.Network.Type, p.Network.IPAM.Type} {
			if name != "" && !slices.Contains(names, name) {
				names = append(names, name)
			}
		}
	}
	return names
}

// missing joins an error for each plugin that is not installed.
func (n *network) missing(dirs []string) error {
	var errs []error
	for _, name := range n.binaries() {
		if _, err := (&runner{}).FindInPath(name, dirs); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", n.source(), err))
		}
	}
	return errors.Join(errs...)
}

// candidate is a file that could be the configuration: net or err is set.
type candidate struct {
	file string
	net  *network
	err  error
}

// readConfDir reads the candidates in lexical order. An absent directory has none.
func readConfDir(dir string) ([]candidate, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("configuration directory: %w", err)
	}
	var found []candidate
	for _, e := range entries {
		if e.IsDir() || !slices.Contains(confExtensions, filepath.Ext(e.Name())) {
			continue
		}
		if len(found) == maxConfFiles {
			return found, fmt.Errorf("configuration directory %s: more than %d files; the rest is not read", dir, maxConfFiles)
		}
		path := filepath.Join(dir, e.Name())
		c := candidate{file: path}
		if c.net, c.err = readNetwork(path); c.err != nil {
			c.err = fmt.Errorf("%s: %w", path, c.err)
		} else {
			c.net.file = path
		}
		found = append(found, c)
	}
	return found, nil
}

// choose decides which network serves, given the one in use (or nil), what the
// directory holds and the fallback (or nil). It is pure.
//
// The first valid file wins, with one exception: if the file in use is still
// there but broken now, or if only broken files are there, somebody is editing,
// and the one in use stays. To move every new pod of a node to another network,
// or to none, because of a typing error would be worse than to be out of date.
func choose(inUse *network, found []candidate, fallback *network) *network {
	var first *network
	for _, c := range found {
		if c.err != nil && inUse != nil && c.file == inUse.file {
			return inUse
		}
		if c.err == nil && first == nil {
			first = c.net
		}
	}
	switch {
	case first != nil && inUse != nil && first.file == inUse.file && bytes.Equal(first.list.Bytes, inUse.list.Bytes):
		return inUse
	case first != nil:
		return first
	case len(found) > 0 && inUse != nil:
		return inUse
	}
	return fallback
}

// readNetwork reads a file, as a list or as a single plugin by what is in it.
func readNetwork(path string) (*network, error) {
	b, err := readBounded(path, maxConfSize)
	if err != nil {
		return nil, err
	}
	n, err := parseNetwork(b)
	if err != nil {
		return nil, err
	}
	if n.list.LoadOnlyInlinedPlugins {
		return n, nil
	}
	return n.withDropIns(filepath.Join(filepath.Dir(path), n.list.Name))
}

// withDropIns appends the plugins that CNI 1.1 lets other software put into a
// directory with the network's name. They become part of the configuration's
// own text, so that a record of it is complete.
func (n *network) withDropIns(dir string) (*network, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		// Most networks have no such directory, and it decides nothing alone.
		return n, n.check()
	}
	var extra []json.RawMessage
	for _, e := range entries {
		if e.IsDir() || filepath.Ext(e.Name()) != ".conf" {
			continue
		}
		if len(extra) == maxPlugins {
			return nil, fmt.Errorf("%w: %s: more than %d plugins", ErrInvalid, dir, maxPlugins)
		}
		b, err := readBounded(filepath.Join(dir, e.Name()), maxConfSize)
		if err != nil {
			return nil, err
		}
		if !json.Valid(b) {
			return nil, fmt.Errorf("%s: no JSON", filepath.Join(dir, e.Name()))
		}
		extra = append(extra, b)
	}
	if len(extra) == 0 {
		return n, n.check()
	}
	var raw map[string]json.RawMessage
	var plugins []json.RawMessage
	if err := json.Unmarshal(n.list.Bytes, &raw); err != nil {
		return nil, err
	}
	if len(raw["plugins"]) > 0 {
		if err := json.Unmarshal(raw["plugins"], &plugins); err != nil {
			return nil, err
		}
	}
	if raw["plugins"], err = json.Marshal(append(plugins, extra...)); err != nil {
		return nil, err
	}
	raw["loadOnlyInlinedPlugins"] = json.RawMessage("true")
	merged, err := json.Marshal(raw)
	if err != nil {
		return nil, err
	}
	if n, err = parseNetwork(merged); err != nil {
		return nil, err
	}
	return n, n.check()
}

// parseNetwork is pure. A list may still be without plugins: see withDropIns.
func parseNetwork(b []byte) (*network, error) {
	var kind struct {
		Type    *string         `json:"type"`
		Plugins json.RawMessage `json:"plugins"`
	}
	if err := json.Unmarshal(b, &kind); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	var list *libcni.NetworkConfigList
	var err error
	if kind.Type != nil && kind.Plugins == nil {
		var single *libcni.PluginConfig
		if single, err = libcni.NetworkPluginConfFromBytes(b); err == nil {
			list, err = libcni.ConfListFromConf(single)
		}
	} else {
		list, err = libcni.NetworkConfFromBytes(b)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	n := &network{list: list}
	if list.LoadOnlyInlinedPlugins || len(list.Plugins) > 0 {
		return n, n.check()
	}
	return n, n.checkHead()
}

// check refuses what would only fail once a pod is to be attached.
func (n *network) check() error {
	if err := n.checkHead(); err != nil {
		return err
	}
	if c := len(n.list.Plugins); c == 0 || c > maxPlugins {
		return fmt.Errorf("%w: plugins: %d of them, want 1 to %d", ErrInvalid, c, maxPlugins)
	}
	for i, p := range n.list.Plugins {
		for field, name := range map[string]string{"type": p.Network.Type, "ipam.type": p.Network.IPAM.Type} {
			if strings.ContainsRune(name, '/') || name == "." || name == ".." || (name == "" && field == "type") {
				return fmt.Errorf("%w: plugins[%d].%s: %q is no file name", ErrInvalid, i, field, name)
			}
		}
	}
	return nil
}

func (n *network) checkHead() error {
	if len(n.list.Name) > maxNameLen {
		return fmt.Errorf("%w: name: %d bytes, at most %d", ErrInvalid, len(n.list.Name), maxNameLen)
	}
	if utils.ValidateNetworkName(n.list.Name) != nil {
		return fmt.Errorf("%w: name: %q, want letters, digits and _.-", ErrInvalid, n.list.Name)
	}
	known := version.All.SupportedVersions()
	if v := n.list.CNIVersion; v != "" && !slices.Contains(known, v) {
		return fmt.Errorf("%w: cniVersion: %q, want one of %s", ErrInvalid, v, strings.Join(known, ", "))
	}
	return nil
}
