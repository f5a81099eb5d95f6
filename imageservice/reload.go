package imageservice

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/containers/image/v5/pkg/sysregistriesv2"
	"github.com/containers/image/v5/signature"
	"github.com/containers/image/v5/types"
	"k8s.io/klog/v2"
)

const (
	hostPolicy         = "/etc/containers/policy.json"
	hostRegistriesConf = "/etc/containers/registries.conf"
)

// Reload reads registries.conf and policy.json again, which each pull does by itself when
// they changed; the other files are read by each pull. After an error what was in force
// stays in force.
func (s *Service) Reload() error {
	s.reloadMu.Lock()
	defer s.reloadMu.Unlock()
	s.seen = s.fingerprint()
	return s.reloadLocked()
}

// refresh is Reload if a file changed. Its error is logged: the last good configuration
// must not be lost to a file that is just being written.
func (s *Service) refresh(ctx context.Context) {
	s.reloadMu.Lock()
	defer s.reloadMu.Unlock()
	now := s.fingerprint()
	if now == s.seen {
		return
	}
	s.seen = now
	if err := s.reloadLocked(); err != nil {
		klog.FromContext(ctx).Error(err, "Registry configuration not taken; the last good one stays in force")
		return
	}
	klog.FromContext(ctx).V(2).Info("Registry configuration taken")
}

func (s *Service) reloadLocked() error {
	policy, err := loadPolicy(s.policyPath())
	if err != nil {
		return err
	}
	sys := s.systemContext()
	names, err := s.loadRegistries(sys)
	if err != nil {
		return fmt.Errorf("registries configuration: %w", err)
	}
	s.policy.Store(policy)
	s.search.Store(&names)
	return nil
}

// loadRegistries replaces what containers/image remembers of registries.conf, if it is
// without fault, and reads what it says about short names.
func (s *Service) loadRegistries(sys *types.SystemContext) (n shortNames, err error) {
	if n.aliases, err = readAliases(s.registriesFiles()); err != nil {
		return n, err
	}
	if _, err := sysregistriesv2.TryUpdatingCache(sys); err != nil {
		return n, err
	}
	if n.search, err = sysregistriesv2.UnqualifiedSearchRegistries(sys); err != nil {
		return n, err
	}
	if len(n.search) == 0 {
		n.search = []string{s.cfg.UnqualifiedRegistry}
	}
	mode, err := sysregistriesv2.GetShortNameMode(sys)
	n.enforcing = mode == types.ShortNameModeEnforcing
	return n, err
}

// registriesFiles are those that containers/image reads, in its order.
func (s *Service) registriesFiles() []string {
	conf, dirs := s.cfg.RegistriesConf, []string{s.cfg.RegistriesConfDir}
	home, _ := os.UserHomeDir() // without one the files are not there
	own := filepath.Join(home, ".config/containers/registries.conf")
	if s.cfg.RegistriesConfDir == "" {
		dirs = []string{hostRegistriesConf + ".d", own + ".d"}
	}
	if conf == "" {
		conf = hostRegistriesConf
		if _, err := os.Stat(own); err == nil {
			conf = own
			if s.cfg.RegistriesConfDir == "" {
				dirs = dirs[1:]
			}
		}
	}
	return confFiles(conf, dirs)
}

// policyPath is the signature policy's file; "" for none.
func (s *Service) policyPath() string {
	if s.cfg.PolicyPath != "" {
		return s.cfg.PolicyPath
	}
	if _, err := os.Stat(hostPolicy); errors.Is(err, os.ErrNotExist) {
		return ""
	}
	return hostPolicy
}

// loadPolicy reads the signature policy. Without one anything is accepted: that is how
// nodes are without it, and a node that refused all images would not tell anyone why.
func loadPolicy(path string) (*signature.Policy, error) {
	if path == "" {
		return &signature.Policy{Default: signature.PolicyRequirements{signature.NewPRInsecureAcceptAnything()}}, nil
	}
	p, err := signature.NewPolicyFromFile(path)
	if err != nil {
		return nil, fmt.Errorf("signature policy %s: %w", path, err)
	}
	return p, nil
}

// fingerprint changes when a file does that is not read by each pull anyhow.
func (s *Service) fingerprint() string {
	var b strings.Builder
	for _, f := range append(s.registriesFiles(), s.policyPath()) {
		st, err := os.Stat(f)
		if err != nil {
			fmt.Fprintf(&b, "%s -\n", f)
			continue
		}
		var ino uint64
		if sys, ok := st.Sys().(*syscall.Stat_t); ok {
			ino = sys.Ino
		}
		fmt.Fprintf(&b, "%s %d %d %d\n", f, st.Size(), st.ModTime().UnixNano(), ino)
	}
	return b.String()
}
