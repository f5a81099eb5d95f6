package imageservice

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containers/image/v5/docker/reference"
	"github.com/containers/image/v5/pkg/docker/config"
	"github.com/containers/image/v5/pkg/tlsclientconfig"
	"github.com/containers/image/v5/types"

	"github.com/berthd/berth/imageservice/registry"
)

// maxPEM bounds a file of certificates in bytes.
const maxPEM = 4 << 20

// setTLS reads the endpoint's certificates: those of its hosts.toml, or else those that
// the host has in certs.d.
func (s *Service) setTLS(e *endpoint) error {
	e.TLS = &tls.Config{InsecureSkipVerify: e.insecure} //nolint:gosec // configured for this host
	if len(e.caFiles) == 0 && len(e.clientFiles) == 0 {
		dir := s.certsDir(reference.Domain(e.named))
		if dir == "" {
			return nil
		}
		e.caFiles, _ = filepath.Glob(filepath.Join(dir, "*.crt")) // the pattern is well formed
		certs, _ := filepath.Glob(filepath.Join(dir, "*.cert"))
		for _, c := range certs {
			e.clientFiles = append(e.clientFiles, [2]string{c, strings.TrimSuffix(c, ".cert") + ".key"})
		}
		if err := tlsclientconfig.SetupCertificates(dir, e.TLS); err != nil {
			return fmt.Errorf("certificates %s: %w", dir, err)
		}
		return nil
	}
	for _, name := range e.caFiles {
		pem, err := readBounded(name, maxPEM)
		if err != nil {
			return fmt.Errorf("ca: %w", err)
		}
		if e.TLS.RootCAs == nil {
			if e.TLS.RootCAs, err = x509.SystemCertPool(); err != nil {
				e.TLS.RootCAs = x509.NewCertPool() // a node may have none
			}
		}
		if !e.TLS.RootCAs.AppendCertsFromPEM(pem) {
			return fmt.Errorf("ca %s: no certificate (PEM) in it", name)
		}
	}
	for _, pair := range e.clientFiles {
		key := pair[1]
		if key == "" {
			key = pair[0]
		}
		cert, err := tls.LoadX509KeyPair(pair[0], key)
		if err != nil {
			return fmt.Errorf("client certificate %s: %w", pair[0], err)
		}
		e.TLS.Certificates = append(e.TLS.Certificates, cert)
	}
	return nil
}

func readBounded(name string, limit int64) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && int64(len(b)) > limit {
		err = fmt.Errorf("%s: more than %d bytes", name, limit)
	}
	return b, err
}

// setCredentials gives the caller's credentials to the endpoint that they are for, and
// those of the node's files and helpers to the others. host is that of the image's name: a
// mirror must not see what is meant for it.
func (s *Service) setCredentials(ctx context.Context, e *endpoint, host string, auth *Auth) error {
	own := serverHost(e.Host) == serverHost(host)
	if auth.isFor(serverHost(e.Host), own) {
		cred, err := auth.credentials()
		if err != nil {
			return err
		}
		if cred != (registry.Credentials{}) {
			e.Credentials, e.credentials = cred, "request"
			return nil
		}
	}
	found, from, err := s.lookUp(ctx, e.named)
	if err != nil {
		return fmt.Errorf("credentials: %w", err)
	}
	e.Credentials = registry.Credentials{Username: found.Username, Password: found.Password, IdentityToken: found.IdentityToken}
	e.credentials = from
	return nil
}

const (
	// helperPatience bounds what credential helpers may take.
	helperPatience = 30 * time.Second
	// maxLookUps bounds the helpers that run at once, those that hang included.
	maxLookUps = 8
)

// lookUp asks the node's files and helpers. containers/image runs a helper for as long as
// that likes, so one that hangs is left to itself.
func (s *Service) lookUp(ctx context.Context, named reference.Named) (types.DockerAuthConfig, string, error) {
	ctx, stop := context.WithTimeoutCause(ctx, min(helperPatience, s.cfg.StallTimeout), errors.New("files and helpers take too long"))
	defer stop()
	type answer struct {
		found types.DockerAuthConfig
		from  string
		err   error
	}
	done := make(chan answer, 1)
	select {
	case s.lookUps <- struct{}{}:
	case <-ctx.Done():
		return types.DockerAuthConfig{}, "", context.Cause(ctx)
	}
	go func() {
		defer func() { <-s.lookUps }()
		found, from, err := s.lookUpNow(named)
		done <- answer{found, from, err}
	}()
	select {
	case a := <-done:
		return a.found, a.from, a.err
	case <-ctx.Done():
		return types.DockerAuthConfig{}, "", context.Cause(ctx)
	}
}

// lookUpNow also finds out which file has them.
func (s *Service) lookUpNow(named reference.Named) (types.DockerAuthConfig, string, error) {
	found, err := config.GetCredentialsForRef(s.systemContext(), named)
	if err != nil || found == (types.DockerAuthConfig{}) {
		return found, "", err
	}
	for _, f := range s.authFiles() {
		// One file alone, and none of the helpers that registries.conf names.
		alone := &types.SystemContext{AuthFilePath: f, SystemRegistriesConfPath: os.DevNull, SystemRegistriesConfDirPath: os.DevNull}
		if _, err := os.Stat(f); err == nil {
			if c, err := config.GetCredentialsForRef(alone, named); err == nil && c == found {
				return found, f, nil
			}
		}
	}
	return found, "credential helper", nil
}

// authFiles are the files that containers/image looks for credentials in, in its order.
func (s *Service) authFiles() []string {
	if s.cfg.AuthFile != "" {
		return []string{s.cfg.AuthFile}
	}
	files := []string{fmt.Sprintf("/run/containers/%d/auth.json", os.Getuid())}
	if d := os.Getenv("XDG_RUNTIME_DIR"); d != "" {
		files[0] = filepath.Join(d, "containers/auth.json")
	}
	home, _ := os.UserHomeDir() // without one the files are not there
	settings := os.Getenv("XDG_CONFIG_HOME")
	if settings == "" {
		settings = filepath.Join(home, ".config")
	}
	docker := os.Getenv("DOCKER_CONFIG")
	if docker == "" {
		docker = filepath.Join(home, ".docker")
	}
	return append(files, filepath.Join(settings, "containers/auth.json"), filepath.Join(docker, "config.json"))
}

// isFor tells whether the credentials are for an endpoint: the one that they name, or
// that of the image when they name none.
func (a *Auth) isFor(host string, own bool) bool {
	if a == nil {
		return false
	}
	if a.ServerAddress == "" {
		return own
	}
	return serverHost(a.ServerAddress) == host
}

func (a *Auth) credentials() (c registry.Credentials, err error) {
	switch {
	case a.RegistryToken != "":
		c.RegistryToken = a.RegistryToken
	case a.IdentityToken != "":
		c.IdentityToken = a.IdentityToken
	case a.Username != "":
		c.Username, c.Password = a.Username, a.Password
	case a.Auth != "":
		b, err := base64.StdEncoding.DecodeString(a.Auth)
		user, password, ok := strings.Cut(string(b), ":")
		if err != nil || !ok {
			return c, fmt.Errorf("credentials: auth is not the base64 of user:password: %w", ErrUnauthorized)
		}
		c.Username, c.Password = user, strings.TrimRight(password, "\x00")
	}
	if strings.ContainsAny(c.RegistryToken, "\r\n") {
		return c, errors.Join(ErrUnauthorized, errors.New("credentials: line break in the token"))
	}
	return c, nil
}

// serverHost brings the forms in which registries are named in credentials to one.
func serverHost(address string) string {
	_, rest, ok := strings.Cut(address, "://")
	if !ok {
		rest = address
	}
	host, _, _ := strings.Cut(rest, "/")
	switch host {
	case "index.docker.io", "registry-1.docker.io":
		return "docker.io"
	}
	return host
}
