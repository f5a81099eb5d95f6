package imageservice

import (
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/BurntSushi/toml"
)

// maxHostsFile bounds hosts.toml in bytes.
const maxHostsFile = 1 << 20

// hostsFile is a hosts.toml of containerd's certs.d, which tells where the images of one
// registry come from.
type hostsFile struct {
	path  string // of the file, or of the directory when that has certificates only
	hosts []hostEntry
	// server is asked last. Its host is "" when the file leaves that to the image's name.
	server hostEntry
	// fallback: it was found under _default and not under the registry's own name.
	fallback bool
}

// hostEntry is one endpoint in it.
type hostEntry struct {
	scheme, host, path string
	resolve, pull      bool
	ca                 []string
	client             [][2]string // certificate and key; the key may be in the first file
	skipVerify         bool
	header             http.Header
	dialTimeout        time.Duration
}

// hostSettings is how an entry is written.
type hostSettings struct {
	Capabilities []string       `toml:"capabilities"`
	CA           any            `toml:"ca"`     // file or list of files
	Client       any            `toml:"client"` // file, list of files, list of pairs
	SkipVerify   bool           `toml:"skip_verify"`
	Header       map[string]any `toml:"header"` // text or list of texts
	OverridePath bool           `toml:"override_path"`
	DialTimeout  string         `toml:"dial_timeout"`
}

// findHosts looks for what root says about a registry: in a directory called like its
// host and port ("host_port_" or "host:port"), and in _default. nil means nothing.
func findHosts(root, host string) (*hostsFile, error) {
	names := []string{host, "_default"}
	if h, port, ok := strings.Cut(host, ":"); ok && !strings.Contains(port, ":") {
		names = slices.Insert(names, 0, h+"_"+port+"_")
	}
	for _, n := range names {
		dir := filepath.Join(root, n)
		if st, err := os.Stat(dir); err != nil || !st.IsDir() {
			if err != nil && !errors.Is(err, os.ErrNotExist) {
				return nil, fmt.Errorf("registry hosts: %w", err)
			}
			continue
		}
		f, err := readHosts(dir)
		if err != nil {
			return nil, err
		}
		f.fallback = n == "_default"
		return f, nil
	}
	return nil, nil
}

func readHosts(dir string) (*hostsFile, error) {
	name := filepath.Join(dir, "hosts.toml")
	b, err := readBounded(name, maxHostsFile)
	if errors.Is(err, os.ErrNotExist) {
		return certsOnly(dir)
	}
	if err != nil {
		return nil, fmt.Errorf("registry hosts: %w", err)
	}
	f, err := parseHosts(b, dir)
	if err != nil {
		return nil, fmt.Errorf("registry hosts %s: %w", name, err)
	}
	f.path = name
	return f, nil
}

// certsOnly is a directory without hosts.toml, in which Docker's names count: *.crt for
// authorities, *.cert and *.key for client certificates.
func certsOnly(dir string) (*hostsFile, error) {
	f := &hostsFile{path: dir, server: hostEntry{resolve: true, pull: true}}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("registry hosts: %w", err)
	}
	for _, e := range entries {
		p := filepath.Join(dir, e.Name())
		switch filepath.Ext(p) {
		case ".crt":
			f.server.ca = append(f.server.ca, p)
		case ".cert":
			key := strings.TrimSuffix(p, ".cert") + ".key"
			if _, err := os.Stat(key); err != nil {
				key = ""
			}
			f.server.client = append(f.server.client, [2]string{p, key})
		}
	}
	return f, nil
}

// parseHosts reads a hosts.toml; relative file names in it start at dir. A key that it
// does not know is an error: a typing error would send pulls elsewhere without a word.
func parseHosts(b []byte, dir string) (*hostsFile, error) {
	var c struct {
		hostSettings
		Server string                  `toml:"server"`
		Hosts  map[string]hostSettings `toml:"host"`
	}
	md, err := toml.Decode(string(b), &c)
	if err != nil {
		return nil, err
	}
	if unknown := md.Undecoded(); len(unknown) > 0 {
		return nil, fmt.Errorf("unknown key %.100q", unknown[0].String())
	}
	if md.IsDefined("host") && c.Hosts == nil { // which toml takes for no hosts
		return nil, errors.New("host: want tables [host.\"https://…\"]")
	}
	f := &hostsFile{}
	seen := map[string]bool{}
	for _, key := range md.Keys() { // in the order of the file, which is that of the tries
		if len(key) < 2 || key[0] != "host" || seen[key[1]] {
			continue
		}
		seen[key[1]] = true
		h, err := newHostEntry(key[1], c.Hosts[key[1]], dir)
		if err != nil {
			return nil, fmt.Errorf("host %.100q: %w", key[1], err)
		}
		if h.host == "" {
			return nil, fmt.Errorf("host %.100q: it has no name", key[1])
		}
		f.hosts = append(f.hosts, h)
	}
	if f.server, err = newHostEntry(c.Server, c.hostSettings, dir); err != nil {
		return nil, fmt.Errorf("server %.100q: %w", c.Server, err)
	}
	return f, nil
}

func newHostEntry(address string, c hostSettings, dir string) (e hostEntry, err error) {
	if e.scheme, e.host, e.path, err = splitAddress(address, c.OverridePath); err != nil {
		return e, err
	}
	if e.resolve, e.pull, err = capabilities(c.Capabilities); err != nil {
		return e, err
	}
	if e.ca, err = fileList(c.CA, dir); err != nil {
		return e, fmt.Errorf("ca: %w", err)
	}
	if e.client, err = filePairs(c.Client, dir); err != nil {
		return e, fmt.Errorf("client: %w", err)
	}
	if e.header, err = headers(c.Header); err != nil {
		return e, err
	}
	e.skipVerify = c.SkipVerify
	if c.DialTimeout != "" {
		e.dialTimeout, err = time.ParseDuration(c.DialTimeout)
		if err != nil || e.dialTimeout <= 0 || e.dialTimeout > time.Hour {
			return e, fmt.Errorf("dial_timeout %.50q: want a duration up to 1h", c.DialTimeout)
		}
	}
	return e, nil
}

// splitAddress reads [scheme://]host[:port][/path]. The path of the API is /v2 below it,
// unless override says that the path is all of it.
func splitAddress(address string, override bool) (scheme, host, apiPath string, err error) {
	if address == "" {
		return "", "", "/v2", nil
	}
	if !strings.Contains(address, "://") {
		address = "https://" + address
	}
	u, err := url.Parse(address)
	if err != nil {
		return "", "", "", err
	}
	if u.Scheme != "https" && u.Scheme != "http" || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		return "", "", "", errors.New("want [https:// or http://]host[:port][/path]")
	}
	apiPath = strings.TrimSuffix(path.Clean("/"+u.Path), "/")
	if !override && !strings.HasSuffix(apiPath, "/v2") {
		apiPath += "/v2"
	}
	return u.Scheme, u.Host, apiPath, nil
}

func capabilities(names []string) (resolve, pull bool, err error) {
	if len(names) == 0 {
		return true, true, nil
	}
	for _, n := range names {
		switch strings.ToLower(n) {
		case "pull":
			pull = true
		case "resolve":
			resolve = true
		case "push": // nothing is pushed from here
		default:
			return false, false, fmt.Errorf("capability %.50q: must be pull, resolve or push", n)
		}
	}
	return resolve, pull, nil
}

func inDir(dir, name string) string {
	if filepath.IsAbs(name) {
		return name
	}
	return filepath.Join(dir, name)
}

// fileList is a file name or a list of them.
func fileList(v any, dir string) ([]string, error) {
	switch v := v.(type) {
	case nil:
		return nil, nil
	case string:
		return []string{inDir(dir, v)}, nil
	case []any:
		var out []string
		for _, e := range v {
			s, ok := e.(string)
			if !ok {
				return nil, fmt.Errorf("%s: must be a file name", shown(e))
			}
			out = append(out, inDir(dir, s))
		}
		return out, nil
	}
	return nil, fmt.Errorf("%s: must be a file name or a list of them", shown(v))
}

// shown is a value of a file in an error.
func shown(v any) string { return fmt.Sprintf("%.50q", fmt.Sprint(v)) }

// filePairs is a file with certificate and key, a list of such, or a list of pairs
// [certificate, key].
func filePairs(v any, dir string) ([][2]string, error) {
	list, ok := v.([]any)
	if !ok {
		files, err := fileList(v, dir)
		if err != nil || len(files) == 0 {
			return nil, err
		}
		return [][2]string{{files[0], ""}}, nil
	}
	var out [][2]string
	for _, e := range list {
		files, err := fileList(e, dir)
		if err != nil {
			return nil, err
		}
		switch pair, isPair := e.([]any); {
		case !isPair && len(files) == 1:
			out = append(out, [2]string{files[0], ""})
		case isPair && len(files) == 2:
			if pair[1] == "" {
				files[1] = ""
			}
			out = append(out, [2]string{files[0], files[1]})
		default:
			return nil, fmt.Errorf("%s: want [certificate, key]", shown(e))
		}
	}
	return out, nil
}

func headers(in map[string]any) (http.Header, error) {
	if len(in) == 0 {
		return nil, nil
	}
	out := http.Header{}
	for k, v := range in {
		values, ok := v.([]any)
		if !ok {
			values = []any{v}
		}
		for _, v := range values {
			s, ok := v.(string)
			if !ok || strings.ContainsAny(k, "\r\n: ") || k == "" || strings.ContainsAny(s, "\r\n") {
				return nil, fmt.Errorf("header %.50q: want a name and a text of one line, or a list of texts", k)
			}
			out.Add(k, s)
		}
	}
	return out, nil
}
