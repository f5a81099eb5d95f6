package sandbox

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berthd/berth/cni/netns"
)

// A pod's files live in <run dir>/pods/<id>: hosts, hostname and resolv.conf, as
// its containers see them in /etc, and shm, a file system of its own.
const (
	fileHosts    = "hosts"
	fileHostname = "hostname"
	fileResolv   = "resolv.conf"
	dirShm       = "shm"
)

// Limits on what a pod's files are made of. resolv.conf's are those of
// glibc (resolv.conf(5)) made generous; Kubernetes allows less.
const (
	shmSize      = 64 << 20 // bytes, the default of every container engine
	maxHostsFile = 1 << 20  // bytes
	maxHostname  = 64       // bytes, HOST_NAME_MAX (gethostname(2))
	maxDNSItems  = 64
	maxDNSItem   = 2048 // bytes
)

func (s *Service) podDir(id string) string { return filepath.Join(s.cfg.RunDir, "pods", id) }

func (s *Service) podFile(id, name string) string { return filepath.Join(s.podDir(id), name) }

// shmDir is what the containers of a pod have as /dev/shm.
func (s *Service) shmDir(p *pod) string {
	if p.hostIPC() {
		return "/dev/shm"
	}
	return s.podFile(p.ID, dirShm)
}

// makePodFiles makes everything but hosts, which needs the pod's address.
func (s *Service) makePodFiles(p *pod, hostname string) error {
	if err := os.Mkdir(s.podDir(p.ID), 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	resolv, err := resolvConf(p.config.GetDnsConfig())
	if err != nil {
		return err
	}
	if err := s.writePodFile(p, fileResolv, resolv); err != nil {
		return err
	}
	if err := s.writePodFile(p, fileHostname, []byte(hostname+"\n")); err != nil {
		return err
	}
	if p.hostIPC() {
		return nil
	}
	shm := s.podFile(p.ID, dirShm)
	if err := os.Mkdir(shm, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	opts := fmt.Sprintf("mode=1777,size=%d", shmSize)
	if uid, gid := p.userNS.root(); uid != 0 {
		opts += fmt.Sprintf(",uid=%d,gid=%d", uid, gid)
	}
	opts = labelOption(opts, p.Labels.Mount)
	if err := unix.Mount("shm", shm, "tmpfs", unix.MS_NOEXEC|unix.MS_NOSUID|unix.MS_NODEV, opts); err != nil {
		return fmt.Errorf("mount %s: %w", shm, err)
	}
	return nil
}

// writePodFile writes a file for the pod's containers, whose root may change it.
func (s *Service) writePodFile(p *pod, name string, text []byte) error {
	path := s.podFile(p.ID, name)
	if err := os.WriteFile(path, text, 0o644); err != nil {
		return err
	}
	if err := p.userNS.own(path); err != nil {
		return err
	}
	return labelFiles(p.Labels.Mount, path)
}

// removePodFiles removes the pod's directory and what is mounted in it.
func (s *Service) removePodFiles(id string) error {
	if err := netns.UnmountAll(s.podFile(id, dirShm)); err != nil {
		return err
	}
	return os.RemoveAll(s.podDir(id))
}

// writeHosts writes the pod's hosts file. The kubelet mounts one of its own over
// it; this one serves other clients.
func (s *Service) writeHosts(p *pod, hostname string) error {
	var text []byte
	if p.HostNetwork {
		var err error
		if text, err = readBounded("/etc/hosts", maxHostsFile); err != nil {
			return err
		}
	} else {
		var b strings.Builder
		b.WriteString("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n" +
			"fe00::0\tip6-localnet\nfe00::0\tip6-mcastprefix\nfe00::1\tip6-allnodes\nfe00::2\tip6-allrouters\n")
		for _, ip := range p.IPs {
			fmt.Fprintf(&b, "%s\t%s\n", ip, hostname)
		}
		text = []byte(b.String())
	}
	return s.writePodFile(p, fileHosts, text)
}

// resolvConf renders a DNSConfig in the form of resolv.conf(5); without one the
// node's own file is used.
func resolvConf(c *runtime.DNSConfig) ([]byte, error) {
	if c == nil {
		return readBounded("/etc/resolv.conf", maxHostsFile)
	}
	for field, list := range map[string][]string{"servers": c.Servers, "searches": c.Searches, "options": c.Options} {
		if len(list) > maxDNSItems {
			return nil, fmt.Errorf("%w: dns_config.%s: %d items, limit %d", ErrInvalid, field, len(list), maxDNSItems)
		}
		for i, v := range list {
			if len(v) > maxDNSItem || v == "" || strings.ContainsFunc(v, func(r rune) bool { return r <= ' ' || r == 0x7f }) {
				return nil, fmt.Errorf("%w: dns_config.%s[%d]: %.64q: want one word of at most %d bytes", ErrInvalid, field, i, v, maxDNSItem)
			}
		}
	}
	var b strings.Builder
	if len(c.Searches) > 0 {
		fmt.Fprintf(&b, "search %s\n", strings.Join(c.Searches, " "))
	}
	for _, v := range c.Servers {
		fmt.Fprintf(&b, "nameserver %s\n", v)
	}
	if len(c.Options) > 0 {
		fmt.Fprintf(&b, "options %s\n", strings.Join(c.Options, " "))
	}
	return []byte(b.String()), nil
}

// readBounded reads a file of the node; that it is absent is no error.
func readBounded(path string, limit int64) ([]byte, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(text)) > limit {
		return nil, fmt.Errorf("%s: larger than %d bytes", path, limit)
	}
	return text, nil
}

// hostnameOf is the host name of a pod: its own if it asks for one, else the
// node's. A pod on the host's network has the node's whatever it asks for.
func hostnameOf(c *runtime.PodSandboxConfig, hostNetwork bool) (string, error) {
	h := c.GetHostname()
	if h == "" || hostNetwork {
		return os.Hostname()
	}
	if len(h) > maxHostname || strings.ContainsFunc(h, func(r rune) bool {
		return !(r == '-' || r == '.' || r == '_' || r >= '0' && r <= '9' || r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z')
	}) {
		return "", fmt.Errorf("%w: hostname: %.80q: want letters, digits, '-', '.' and '_', at most %d bytes", ErrInvalid, h, maxHostname)
	}
	return h, nil
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}
