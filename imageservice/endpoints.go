package imageservice

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containers/image/v5/docker/reference"
	"github.com/containers/image/v5/pkg/sysregistriesv2"

	"github.com/berthd/berth/imageservice/registry"
)

const (
	userAgent = "berth"
	// hostHosts is where nodes that ran containerd have their hosts.toml.
	hostHosts = "/etc/containerd/certs.d"
	// dockerHub is called by one name and served by another host.
	dockerHub, dockerHubAPI = "docker.io", "registry-1.docker.io"
)

// endpoint is one place to get an image from, and what is configured for it.
type endpoint struct {
	registry.Endpoint
	mirror        bool // not where the image's name points to
	resolve, pull bool // may be asked what a tag means; for what a digest names
	insecure      bool // any certificate will do
	named         reference.Named
	from          string // the file that says so; "" for the image's name alone
	caFiles       []string
	clientFiles   [][2]string
	credentials   string // where they come from; "" for none
}

// sources is what the configuration says about a reference, as far as it decides where
// to ask. At most one of registry and hosts counts: see endpoints.
type sources struct {
	named      reference.Named
	registry   *sysregistriesv2.Registry // of registries.conf; nil when none matches
	registries string                    // where registries.conf is
	hosts      *hostsFile                // nil for none
	insecure   func(host string) bool    // of a host that is in neither
}

// endpoints is the order in which a pull asks: pure.
//
// A [[registry]] of registries.conf that matches the image decides alone; hosts.toml
// counts when there is none, and without both it is the host that the name says.
func (s sources) endpoints() ([]endpoint, error) {
	switch {
	case s.registry != nil:
		return s.fromRegistry()
	case s.hosts != nil:
		return s.fromHosts(), nil
	}
	return []endpoint{s.own()}, nil
}

func (s sources) own() endpoint {
	host := reference.Domain(s.named)
	e := endpoint{named: s.named, resolve: true, pull: true, insecure: s.insecure(host)}
	e.Scheme, e.Host, e.Path, e.Repository = "https", apiHost(host), "/v2", reference.Path(s.named)
	if e.insecure {
		e.Scheme = ""
	}
	return e
}

func apiHost(host string) string {
	if host == dockerHub {
		return dockerHubAPI
	}
	return host
}

func (s sources) fromRegistry() ([]endpoint, error) {
	pulls, err := s.registry.PullSourcesFromReference(s.named)
	if err != nil {
		return nil, fmt.Errorf("registries configuration: %w", err)
	}
	var out []endpoint
	for i, p := range pulls {
		e := sources{named: p.Reference, insecure: func(host string) bool { return p.Endpoint.Insecure || s.insecure(host) }}.own()
		e.from, e.mirror = s.registries, i < len(pulls)-1
		out = append(out, e)
	}
	return out, nil
}

func (s sources) fromHosts() []endpoint {
	own := s.own()
	var out []endpoint
	for _, h := range append(slices.Clone(s.hosts.hosts), s.hosts.server) {
		e := endpoint{
			named: s.named, resolve: h.resolve, pull: h.pull, insecure: h.skipVerify,
			from: s.hosts.path, caFiles: h.ca, clientFiles: h.client,
		}
		e.Scheme, e.Host, e.Path, e.Repository = h.scheme, apiHost(h.host), h.path, own.Repository
		e.Header, e.DialTimeout = h.header, h.dialTimeout
		if h.host == "" {
			e.Host, e.Scheme = own.Host, own.Scheme
			e.insecure = e.insecure || own.insecure && len(h.ca) == 0
		}
		if e.mirror = e.Host != own.Host; e.mirror {
			e.Namespace = reference.Domain(s.named)
			e.named = mirrored(h, s.named)
		}
		out = append(out, e)
	}
	return out
}

// mirrored is what a mirror calls the image, as far as credentials can be looked up by it.
func mirrored(h hostEntry, named reference.Named) reference.Named {
	prefix := strings.Trim(strings.TrimSuffix(h.path, "/v2"), "/")
	if rest, ok := strings.CutPrefix(h.path, "/v2/"); ok {
		prefix = rest
	}
	name := h.host + "/" + strings.TrimPrefix(prefix+"/"+reference.Path(named), "/")
	if n, err := reference.WithName(name); err == nil {
		return n
	}
	if n, err := reference.WithName(h.host + "/" + reference.Path(named)); err == nil {
		return n
	}
	return named
}

// sourcesOf reads the configuration for a reference. The files are read at each pull.
func (s *Service) sourcesOf(named reference.Named) (sources, error) {
	sys := s.systemContext()
	src := sources{named: named, registries: sysregistriesv2.ConfigurationSourceDescription(sys)}
	var err error
	if src.registry, err = sysregistriesv2.FindRegistry(sys, named.Name()); err != nil {
		return src, fmt.Errorf("registries configuration: %w", err)
	}
	host := reference.Domain(named)
	dir := s.cfg.HostsDir
	if dir == "" {
		dir = hostHosts
	}
	if src.hosts, err = findHosts(dir, host); err != nil && src.registry == nil {
		return src, err // a file that does not count may be wrong
	}
	src.insecure = func(host string) bool {
		return slices.Contains(s.cfg.InsecureRegistries, host) ||
			src.registry == nil && (src.hosts == nil || src.hosts.fallback) && isLoopback(host) && s.certsDir(host) == ""
	}
	return src, nil
}

func isLoopback(hostPort string) bool {
	host := hostPort
	if h, _, err := net.SplitHostPort(hostPort); err == nil {
		host = h
	}
	ip := net.ParseIP(strings.Trim(host, "[]"))
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

// certsDir is the directory with certificates for a host; "" for none.
func (s *Service) certsDir(host string) string {
	dirs := []string{s.cfg.CertsDir}
	if s.cfg.CertsDir == "" {
		dirs = []string{"/etc/containers/certs.d", "/etc/docker/certs.d"}
		if home, err := os.UserHomeDir(); err == nil {
			dirs = slices.Insert(dirs, 0, filepath.Join(home, ".config/containers/certs.d"))
		}
	}
	for _, d := range dirs {
		if st, err := os.Stat(filepath.Join(d, host)); err == nil && st.IsDir() {
			return filepath.Join(d, host)
		}
	}
	return ""
}

// endpointsOf is the whole plan of where to ask for a reference: what sourcesOf has read,
// with certificates and credentials, read now.
func (s *Service) endpointsOf(ctx context.Context, src sources, auth *Auth) ([]endpoint, error) {
	if src.registry != nil && src.registry.Blocked {
		return nil, fmt.Errorf("%s is blocked in %s: %w", src.registry.Prefix, src.registries, ErrPolicyRejected)
	}
	endpoints, err := src.endpoints()
	if err != nil {
		return nil, err
	}
	for i := range endpoints {
		e := &endpoints[i]
		e.UserAgent = userAgent
		if err := s.setTLS(e); err != nil {
			return nil, fmt.Errorf("registry %s: %w", e.Host, err)
		}
		if err := s.setCredentials(ctx, e, reference.Domain(src.named), auth); err != nil {
			return nil, fmt.Errorf("registry %s: %w", e.Host, err)
		}
	}
	return endpoints, nil
}
