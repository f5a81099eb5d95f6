package imageservice

import (
	"context"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containers/image/v5/docker/reference"
	"github.com/containers/image/v5/pkg/sysregistriesv2"
	"golang.org/x/net/http/httpproxy"

	"github.com/berthd/berth/imageservice/registry"
)

// Plan is what a pull of a reference would try, in order. It can be sent as JSON and
// holds no secret.
type Plan struct {
	Reference  string      `json:"reference"`  // as it was given
	Candidates []Candidate `json:"candidates"` // more than one only for a short name
	// Registries, Hosts, Policy are where the configuration is read from.
	Registries string `json:"registries"` // registries.conf and its drop-ins
	Hosts      string `json:"hosts"`      // root of the hosts.toml files
	Policy     string `json:"policy"`     // signature policy; "" for none, which accepts everything
}

// Candidate is a full name that the reference may mean.
type Candidate struct {
	Image  string `json:"image"`
	Reason string `json:"reason"` // why this name: "as given", an alias, a search registry
	// Source is the file that decides about the endpoints; "" when the name alone does.
	Source string `json:"source"`
	// Ignored is a file that also says something about the registry and does not count.
	Ignored   string         `json:"ignored,omitempty"`
	Error     string         `json:"error,omitempty"` // why nothing would be asked, such as that it is blocked
	Endpoints []PlanEndpoint `json:"endpoints"`
}

// PlanEndpoint is one place that would be asked, if the ones before it fail.
type PlanEndpoint struct {
	URL        string `json:"url"` // of the API; without a scheme when HTTPS and then HTTP is tried
	Repository string `json:"repository"`
	Mirror     bool   `json:"mirror"`
	Resolve    bool   `json:"resolve"` // asked what a tag means
	Pull       bool   `json:"pull"`    // asked for manifests by digest and for blobs
	// Credentials is where those that would be sent come from: a file, "credential
	// helper", "request", or "" for none.
	Credentials string            `json:"credentials"`
	Username    string            `json:"username,omitempty"`
	CAFiles     []string          `json:"caFiles,omitempty"` // beside those of the system
	ClientFiles []ClientPair      `json:"clientFiles,omitempty"`
	SkipVerify  bool              `json:"skipVerify"` // any certificate is accepted
	Headers     []string          `json:"headers,omitempty"`
	Proxy       string            `json:"proxy,omitempty"` // from the environment
	Probe       *ProbeResult      `json:"probe,omitempty"`
	endpoint    registry.Endpoint `json:"-"`
}

// ClientPair names the files of a client certificate.
type ClientPair struct {
	Certificate string `json:"certificate"`
	Key         string `json:"key"` // "" when it is in the same file
}

// ProbeResult is what an endpoint answered when it was asked for the image's manifest.
type ProbeResult struct {
	OK        bool          `json:"ok"`
	Took      time.Duration `json:"took"`             // nanoseconds in JSON
	Scheme    string        `json:"scheme,omitempty"` // that was spoken: "https", "http"
	Auth      string        `json:"auth,omitempty"`   // that was asked for: "basic", "bearer"
	Digest    string        `json:"digest,omitempty"` // of the manifest
	MediaType string        `json:"mediaType,omitempty"`
	Error     string        `json:"error,omitempty"`
}

// probeTimeout bounds one probe; they run side by side.
const probeTimeout = 20 * time.Second

// Explain tells what a pull of ref without credentials of its own would try now, as the
// files are now. With probe each endpoint is asked for the manifest, and nothing is kept.
// Errors: ErrInvalidReference; what is wrong with one candidate is in the plan.
func (s *Service) Explain(ctx context.Context, ref string, probe bool) (Plan, error) {
	s.refresh(ctx)
	names, err := s.search.Load().toPull(ref)
	if err != nil {
		return Plan{}, err
	}
	plan := Plan{Reference: ref, Registries: sysregistriesv2.ConfigurationSourceDescription(s.systemContext()), Hosts: s.cfg.HostsDir, Policy: s.policyPath()}
	if plan.Hosts == "" {
		plan.Hosts = hostHosts
	}
	for _, n := range names {
		plan.Candidates = append(plan.Candidates, s.explain(ctx, n))
	}
	if probe {
		s.probe(ctx, plan, names)
	}
	return plan, nil
}

func (s *Service) explain(ctx context.Context, n candidate) Candidate {
	c := Candidate{Image: n.named.String(), Reason: n.reason}
	src, err := s.sourcesOf(n.named)
	if err != nil {
		c.Error = err.Error()
		return c
	}
	switch {
	case src.registry != nil:
		c.Source = src.registries
		if src.hosts != nil {
			c.Ignored = src.hosts.path
		}
	case src.hosts != nil:
		c.Source = src.hosts.path
	}
	endpoints, err := s.endpointsOf(ctx, src, nil)
	if err != nil {
		c.Error = err.Error()
		return c
	}
	for _, e := range endpoints {
		pe := PlanEndpoint{
			URL: e.String(), Repository: e.Repository, Mirror: e.mirror, Resolve: e.resolve, Pull: e.pull,
			Credentials: e.credentials, Username: e.Credentials.Username, CAFiles: e.caFiles, SkipVerify: e.insecure,
			Headers: slices.Sorted(maps.Keys(e.Header)), Proxy: proxyOf(e.Endpoint), endpoint: e.Endpoint,
		}
		for _, p := range e.clientFiles {
			pe.ClientFiles = append(pe.ClientFiles, ClientPair{Certificate: p[0], Key: p[1]})
		}
		c.Endpoints = append(c.Endpoints, pe)
	}
	return c
}

// proxyOf is the proxy that the environment names for an endpoint, without its password.
func proxyOf(e registry.Endpoint) string {
	scheme := e.Scheme
	if scheme == "" {
		scheme = "https"
	}
	u, err := httpproxy.FromEnvironment().ProxyFunc()(&url.URL{Scheme: scheme, Host: e.Host})
	if err != nil {
		return fmt.Sprintf("(%v)", err)
	}
	if u == nil {
		return ""
	}
	return u.Redacted()
}

// probe asks all endpoints at the same time.
func (s *Service) probe(ctx context.Context, plan Plan, names []candidate) {
	ctx, stop := context.WithTimeout(ctx, probeTimeout)
	defer stop()
	var wg sync.WaitGroup
	for i, c := range plan.Candidates {
		for j := range c.Endpoints {
			wg.Go(func() {
				r := probeOne(ctx, c.Endpoints[j].endpoint, names[i].named)
				c.Endpoints[j].Probe = &r
			})
		}
	}
	wg.Wait()
}

func probeOne(ctx context.Context, e registry.Endpoint, named reference.Named) ProbeResult {
	client := registry.New(e)
	defer client.Close()
	began := time.Now()
	m, err := client.Manifest(ctx, wanted(named))
	r := ProbeResult{Took: time.Since(began), Scheme: client.Endpoint().Scheme, Auth: client.Challenge()}
	if err != nil {
		r.Error = because(ctx, err).Error()
		return r
	}
	d, err := topDigest(named, m.Body)
	if err != nil {
		r.Error = err.Error()
		return r
	}
	r.OK, r.Digest, r.MediaType = true, d.String(), m.MediaType
	if !strings.Contains(r.MediaType, "manifest") && !strings.Contains(r.MediaType, "index") {
		r.MediaType = http.DetectContentType(m.Body)
	}
	return r
}
