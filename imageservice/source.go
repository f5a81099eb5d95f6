package imageservice

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containers/image/v5/docker/reference"
	"github.com/containers/image/v5/manifest"
	"github.com/opencontainers/go-digest"

	"github.com/berthd/berth/imageservice/registry"
)

// maxRetryAfter is the longest that a server may ask to be left alone before its answer
// counts as a refusal: a kubelet asks again by itself, and tells its user meanwhile.
const maxRetryAfter = time.Minute

// remote is one endpoint in use by a pull.
type remote struct {
	endpoint
	client *registry.Client
	bad    atomic.Int32 // failures since the last success
}

// source is where one pull gets one image from.
type source struct {
	named   reference.Named
	remotes []*remote // in the order of the configuration
	cfg     *Config

	mu     sync.Mutex
	liars  map[liar]bool // remotes that sent other bytes than asked for
	notice func(string)  // gets the problems that were got over
}

type liar struct {
	r    *remote
	blob string
}

// openSource asks no registry yet, at most credential helpers. The source is the caller's to close.
func (s *Service) openSource(ctx context.Context, named reference.Named, auth *Auth, notice func(string)) (*source, error) {
	conf, err := s.sourcesOf(named)
	if err != nil {
		return nil, err
	}
	endpoints, err := s.endpointsOf(ctx, conf, auth)
	if err != nil {
		return nil, err
	}
	src := &source{named: named, cfg: &s.cfg, liars: map[liar]bool{}, notice: notice}
	for _, e := range endpoints {
		src.remotes = append(src.remotes, &remote{endpoint: e, client: registry.New(e.Endpoint)})
	}
	return src, nil
}

// Close ends idle connections.
func (src *source) Close() {
	for _, r := range src.remotes {
		r.client.Close()
	}
}

// usable are the remotes for a blob or manifest, those without recent failures first.
func (src *source) usable(blob string, resolve bool) []*remote {
	src.mu.Lock()
	defer src.mu.Unlock()
	var out []*remote
	for _, r := range src.remotes {
		if (resolve && r.resolve || !resolve && r.pull) && !src.liars[liar{r, blob}] {
			out = append(out, r)
		}
	}
	slices.SortStableFunc(out, func(a, b *remote) int { return min(int(a.bad.Load()), 1) - min(int(b.bad.Load()), 1) })
	return out
}

// distrust notes who sent a blob with the wrong digest, and tells if somebody else is left.
func (src *source) distrust(blob string, senders ...*remote) bool {
	src.mu.Lock()
	for _, r := range senders {
		src.liars[liar{r, blob}] = true
	}
	src.mu.Unlock()
	return len(senders) > 0 && len(src.usable(blob, false)) > 0
}

// ask puts a question to one remote after the other until one answers, and again, after
// a while, to those that may answer otherwise then. One that says no is not asked twice.
// What is waited for, as a server wishes it, is not silence; that is bounded by StallTimeout
// for one remote, and by half of it for each of several.
func (src *source) ask(ctx context.Context, remotes []*remote, what func(context.Context, *remote) error) error {
	if len(remotes) == 0 {
		return fmt.Errorf("no endpoint with the capability: %w", ErrRegistryUnavailable)
	}
	said := answers{}
	stalls, mostStalls := 0, max(2, len(remotes))
	for round := 0; ; round++ {
		var again []*remote
		var wait time.Duration
		for _, r := range remotes {
			err := src.attempt(ctx, r, what)
			if err == nil {
				r.bad.Store(0)
				return nil
			}
			said.add(r, err)
			if src.notice != nil {
				src.notice(r.Host + ": " + err.Error())
			}
			if errors.Is(err, ErrStalled) {
				stalls++
			}
			if ctx.Err() != nil || stalls >= mostStalls {
				return said.error()
			}
			if after, ok := retryable(err); ok {
				r.bad.Add(1)
				again, wait = append(again, r), max(wait, after)
			}
		}
		if remotes = again; len(remotes) == 0 || round+1 >= src.cfg.Retries {
			return said.error()
		}
		if err := pause(ctx, max(wait, backoff(round))); err != nil {
			return said.error()
		}
	}
}

// attempt bounds one question to one remote, so that one that hangs leaves time for others.
func (src *source) attempt(ctx context.Context, r *remote, what func(context.Context, *remote) error) error {
	ctx, stop := patience(ctx, src.cfg.StallTimeout/2)
	defer stop()
	return fromNetwork(ctx, because(ctx, what(ctx, r)))
}

// fromNetwork is classify for what can only be the network's: HTTP/2 has errors of its own,
// which are not net.Errors.
func fromNetwork(ctx context.Context, err error) error {
	if err = classify(err); err != nil && !isClassified(err) && ctx.Err() == nil {
		return mark(ErrRegistryUnavailable, err)
	}
	return err
}

// answers are the errors of several remotes; the last remote of the configuration is the
// registry itself, whose word decides what kind of error it is.
type answers struct {
	order []*remote
	errs  map[*remote]error
}

func (a *answers) add(r *remote, err error) {
	if a.errs == nil {
		a.errs = map[*remote]error{}
	}
	if a.errs[r] == nil {
		a.order = append(a.order, r)
	}
	a.errs[r] = err
}

func (a *answers) error() error {
	if len(a.order) == 1 {
		return a.errs[a.order[0]]
	}
	main := a.order[len(a.order)-1]
	for _, r := range a.order {
		if !r.mirror {
			main = r
		}
	}
	var mirrors []string
	for _, r := range a.order {
		if r != main {
			mirrors = append(mirrors, fmt.Sprintf("%s: %v", r.Host, a.errs[r]))
		}
	}
	return fmt.Errorf("%s: %w (before that %s)", main.Host, a.errs[main], strings.Join(mirrors, "; "))
}

// retryable tells if the same question to the same server makes sense later, and when.
func retryable(err error) (after time.Duration, ok bool) {
	var status *registry.StatusError
	if errors.As(err, &status) {
		return status.RetryAfter, status.Temporary() && status.RetryAfter <= maxRetryAfter
	}
	if errors.Is(err, ErrDigestMismatch) || errors.Is(err, ErrTooLarge) || errors.Is(err, ErrInvalidImage) || errors.Is(err, ErrUnsupported) {
		return 0, false
	}
	return 0, worthRetrying(err)
}

// backoff is the wait before attempt n+1, n from 0. It is random so that the nodes of a
// cluster do not come back to a registry all at once.
func backoff(n int) time.Duration {
	d := min(200*time.Millisecond<<min(n, 10), 5*time.Second)
	return d/2 + rand.N(d)
}

func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// manifest gets and verifies the manifest of a digest, or of what the source's name says
// if that is "".
func (src *source) manifest(ctx context.Context, d digest.Digest) (m registry.Manifest, err error) {
	ref := wanted(src.named)
	if digested, ok := src.named.(reference.Digested); ok && d == "" {
		d = digested.Digest()
	}
	if d != "" {
		ref = d.String()
	}
	err = src.ask(ctx, src.usable(ref, d == ""), func(ctx context.Context, r *remote) error {
		got, err := r.client.Manifest(ctx, ref)
		if err != nil {
			return err
		}
		if d != "" {
			// Not just a sum over the bytes: schema 1 leaves its signatures out.
			if same, err := manifest.MatchesDigest(got.Body, d); err != nil || !same {
				return fmt.Errorf("received %d bytes with digest %s, want %s: %w", len(got.Body), d.Algorithm().FromBytes(got.Body), d, ErrDigestMismatch)
			}
		}
		m = got
		return nil
	})
	if err != nil {
		return m, fmt.Errorf("manifest %s: %w", ref, err)
	}
	return m, nil
}

// wanted is the tag or digest of a reference.
func wanted(named reference.Named) string {
	if d, ok := named.(reference.Digested); ok {
		return d.Digest().String()
	}
	if t, ok := named.(reference.Tagged); ok {
		return t.Tag()
	}
	return "latest"
}
