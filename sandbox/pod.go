package sandbox

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berthd/berth/cni"
	"github.com/berthd/berth/cni/netns"
	"github.com/berthd/berth/sandbox/cgroup"
)

// undoTimeout bounds what is undone after an error. A plugin that hangs costs at
// most this; what is left then is the janitor's.
const undoTimeout = 90 * time.Second

// maxConfig bounds the size of a stored CRI configuration in bytes. A gRPC
// message is bounded too, but a book should not grow by 16 MiB for each pod.
const maxConfig = 4 << 20

// RunPod makes a pod and returns its ID. A pod of the same name, namespace, UID
// and attempt that is ready is the result; one that is being made is joined.
func (s *Service) RunPod(ctx context.Context, cfg *runtime.PodSandboxConfig, handler string) (string, error) {
	plan, err := s.planPod(ctx, cfg, handler)
	if err != nil {
		return "", err
	}
	key := podKey(cfg)
	return s.ops.do(ctx, "run pod", key, s.cfg.PodTimeout, func(ctx context.Context, o *op) (string, error) {
		if p := s.readyPod(key); p != nil {
			return p.ID, nil
		}
		return s.runPod(ctx, o, plan)
	})
}

// podPlan is a validated request to make a pod.
type podPlan struct {
	row      podRow
	config   *runtime.PodSandboxConfig
	hostname string
	sysctls  []sysctl
	kinds    []netns.Kind
	userNS   *userNS
}

// planPod checks what can be checked before anything is done.
func (s *Service) planPod(ctx context.Context, cfg *runtime.PodSandboxConfig, handler string) (podPlan, error) {
	var plan podPlan
	m := cfg.GetMetadata()
	if m.GetName() == "" || m.GetNamespace() == "" || m.GetUid() == "" {
		return plan, fmt.Errorf("%w: metadata: name %q, namespace %q and uid %q must not be empty", ErrInvalid, m.GetName(), m.GetNamespace(), m.GetUid())
	}
	rt, err := s.handler(handler)
	if err != nil {
		return plan, err
	}
	ns := cfg.GetLinux().GetSecurityContext().GetNamespaceOptions()
	hostNet := ns.GetNetwork() == runtime.NamespaceMode_NODE
	hostIPC := ns.GetIpc() == runtime.NamespaceMode_NODE
	if plan.userNS, err = s.planUserNS(ctx, cfg, rt); err != nil {
		return plan, err
	}
	if plan.hostname, err = hostnameOf(cfg, hostNet); err != nil {
		return plan, err
	}
	if plan.sysctls, err = s.podSysctls(cfg, hostNet, hostIPC, plan.userNS); err != nil {
		return plan, err
	}
	if _, err := resolvConf(cfg.GetDnsConfig()); err != nil {
		return plan, err
	}
	if _, err := cgroup.OCIPath(rt.driver, cfg.GetLinux().GetCgroupParent(), "x"); err != nil {
		return plan, invalid("", err)
	}
	raw, err := proto.Marshal(cfg)
	if err != nil {
		return plan, fmt.Errorf("%w: config: %w", ErrInvalid, err)
	}
	if len(raw) > maxConfig {
		return plan, fmt.Errorf("%w: config: %d bytes, limit %d", ErrInvalid, len(raw), maxConfig)
	}
	if !hostNet {
		plan.kinds = append(plan.kinds, netns.Net, netns.UTS)
	}
	if !hostIPC {
		plan.kinds = append(plan.kinds, netns.IPC)
	}
	plan.config = cfg
	plan.row = podRow{ID: s.ids.newID(), State: StateCreating, Handler: handler, OCI: rt.row(), Config: raw,
		BootID: s.cfg.BootID, HostNetwork: hostNet}
	return plan, nil
}

// podSysctls are the sysctls asked for, and the node's defaults for pods with a
// network of their own.
func (s *Service) podSysctls(cfg *runtime.PodSandboxConfig, hostNet, hostIPC bool, u *userNS) ([]sysctl, error) {
	asked := cfg.GetLinux().GetSysctls()
	all := map[string]string{}
	if !hostNet {
		if s.cfg.UnprivilegedPorts {
			all["net.ipv4.ip_unprivileged_port_start"] = "0"
		}
		if s.cfg.UnprivilegedICMP {
			all["net.ipv4.ping_group_range"] = "0 2147483647"
			if u != nil {
				all["net.ipv4.ping_group_range"] = fmt.Sprintf("0 %d", min(u.gids.Length-1, math.MaxInt32))
			}
		}
	}
	for k, v := range asked {
		delete(all, strings.ReplaceAll(k, "/", ".")) // the pod's own wins in either form
		all[k] = v
	}
	list, err := parseSysctls(all, hostNet, hostIPC)
	if err != nil {
		return nil, err
	}
	return list, u.hostSysctls(list)
}

func (s *Service) readyPod(key string) *pod {
	for _, p := range s.book.view().pods {
		if p.State == StateReady && !p.Removing && podKey(p.config) == key {
			return p
		}
	}
	return nil
}

func (s *Service) runPod(ctx context.Context, o *op, plan podPlan) (string, error) {
	row := plan.row
	var err error
	if row.Labels, err = s.podLabels(plan.config); err != nil {
		return "", err
	}
	row.Created = after(s.book.view().newestAttempt(plan.config))
	parent := s.hier.Parent(row.OCI.Driver, plan.config.GetLinux().GetCgroupParent())
	row.Cgroups = s.ownCgroups(parent.Dirs())
	p, err := s.book.insertPod(row)
	if err != nil {
		return "", err
	}
	log, ctx := logFor(ctx, "pod", podKey(p.config), "podID", p.ID)
	begun := time.Now()
	announced := func() {}
	defer func() { announced() }()
	err = o.steps(ctx, []step{
		{"files", func(context.Context) error { return s.makePodFiles(p, plan.hostname) }},
		{"namespaces", func(ctx context.Context) error { return s.makeNamespaces(ctx, p, plan) }},
		{"network", func(ctx context.Context) error {
			attached, err := s.attach(ctx, p)
			if err == nil {
				p = attached
			}
			return err
		}},
		{"hosts", func(context.Context) error { return s.writeHosts(p, plan.hostname) }},
		{"init", func(ctx context.Context) error {
			if p.pidMode() != runtime.NamespaceMode_POD {
				return nil
			}
			return s.ensureInit(ctx, p.ID)
		}},
		{"plugins", func(ctx context.Context) (err error) {
			announced, err = s.announcePod(ctx, p)
			return err
		}},
		{"note", func(context.Context) error { return s.writePodNote(p.ID) }},
		{"ready", func(context.Context) error {
			_, err := s.book.updatePod(p.ID, func(r *podRow) error {
				r.State = StateReady
				return nil
			})
			return err
		}},
	})
	if err != nil {
		undo, cancel := cleanup(ctx, undoTimeout)
		defer cancel()
		if e := s.destroyPod(undo, o, p.ID); e != nil {
			log.Error(e, "Pod half made is left for later")
			s.retryUndo(p.ID)
		}
		return "", fmt.Errorf("pod %s: %w", podKey(p.config), err)
	}
	log.V(2).Info("Pod ready", "ips", p.IPs, "took", time.Since(begun))
	return p.ID, nil
}

// ownCgroups returns which of the directories, and of those above them, go with
// the last pod in them, parents first: what does not exist, and what was made for
// another pod whose removal is not complete, such as this one's last attempt.
func (s *Service) ownCgroups(dirs []string) []string {
	out := missing(dirs)
	for _, p := range s.book.view().pods {
		for _, made := range p.Cgroups {
			if slices.ContainsFunc(dirs, func(d string) bool { return within(d, made) }) && !slices.Contains(out, made) {
				out = append(out, made)
			}
		}
	}
	slices.SortFunc(out, func(a, b string) int { return cmp.Or(cmp.Compare(len(a), len(b)), strings.Compare(a, b)) })
	return out
}

// within tells whether a path is that of dir, or below it.
func within(path, dir string) bool { return path == dir || strings.HasPrefix(path, dir+"/") }

// missing returns the directories that do not exist, and those of their parents,
// parents first. The OCI runtime will make them, and nobody else remove them.
func missing(dirs []string) []string {
	var out []string
	for _, d := range dirs {
		var chain []string
		for d != "/" && d != "." {
			if _, err := os.Lstat(d); err == nil || !errors.Is(err, os.ErrNotExist) {
				break
			}
			chain = append(chain, d)
			d = parentDir(d)
		}
		for i := len(chain) - 1; i >= 0; i-- {
			out = append(out, chain[i])
		}
	}
	return out
}

// makeNamespaces pins the pod's namespaces and sets what belongs to them.
func (s *Service) makeNamespaces(ctx context.Context, p *pod, plan podPlan) error {
	setup := func() error {
		if !p.HostNetwork {
			if err := netns.LoopbackUp(); err != nil {
				return err
			}
			if err := unix.Sethostname([]byte(plan.hostname)); err != nil {
				return fmt.Errorf("hostname %q: %w", plan.hostname, err)
			}
		}
		return applySysctls(plan.sysctls, plan.userNS)
	}
	switch {
	case plan.userNS != nil:
		return s.deps.Pins.CreateIn(ctx, p.ID, s.userSpec(plan.userNS), plan.kinds, setup)
	case len(plan.kinds) == 0:
		return nil
	}
	return s.deps.Pins.Create(ctx, p.ID, plan.kinds, setup)
}

// attach connects the pod to its networks. That it is going to is in the book
// first: a plugin may have given out an address when anything fails.
func (s *Service) attach(ctx context.Context, p *pod) (*pod, error) {
	if p.HostNetwork {
		return p, nil
	}
	p, err := s.book.updatePod(p.ID, func(r *podRow) error { r.Attached = true; return nil })
	if err != nil {
		return p, err
	}
	res, err := s.deps.Network.Attach(ctx, s.cniPod(p))
	if err != nil {
		return p, err
	}
	if len(res.IPs) == 0 {
		return p, errors.New("the network gave the pod no address")
	}
	// In the book with the state that makes the pod ready; until then only here.
	return s.book.updatePod(p.ID, func(r *podRow) error {
		r.IPs, r.CNI = res.IPs, res.Raw
		return nil
	})
}

// cniPod is what the network is told about a pod. After a reboot there is no
// namespace to name.
func (s *Service) cniPod(p *pod) cni.Pod {
	m, c := p.config.GetMetadata(), p.config
	out := cni.Pod{ID: p.ID, Name: m.GetName(), Namespace: m.GetNamespace(), UID: m.GetUid(),
		CgroupPath: c.GetLinux().GetCgroupParent(), Annotations: c.GetAnnotations()}
	if s.deps.Pins.Pinned(p.ID, netns.Net) {
		out.NetNS = s.deps.Pins.Path(p.ID, netns.Net)
	}
	for _, pm := range c.GetPortMappings() {
		out.PortMappings = append(out.PortMappings, cni.PortMapping{Protocol: pm.GetProtocol().String(),
			ContainerPort: pm.GetContainerPort(), HostPort: pm.GetHostPort(), HostIP: pm.GetHostIp()})
	}
	if d := c.GetDnsConfig(); d != nil {
		out.DNS = cni.DNS{Servers: d.GetServers(), Searches: d.GetSearches(), Options: d.GetOptions()}
	}
	return out
}

// StopPod kills what runs in the pod and releases its network. That a pod does
// not exist or is stopped already is no error.
func (s *Service) StopPod(ctx context.Context, id string) error {
	p, err := s.book.view().anyPod(id)
	if errors.Is(err, ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	_, err = s.ops.do(ctx, "stop pod", p.ID, s.cfg.PodTimeout, func(ctx context.Context, o *op) (string, error) {
		log, ctx := logFor(ctx, "pod", podKey(p.config), "podID", p.ID)
		begun := time.Now()
		if err := s.teardown(ctx, o, p.ID); err != nil {
			s.kick()
			if !onlyDetach(err) {
				return "", fmt.Errorf("pod %s: %w", podKey(p.config), err)
			}
			log.Error(err, "Network of a stopped pod is left for later")
		}
		log.V(2).Info("Pod stopped", "took", time.Since(begun))
		return "", nil
	})
	return err
}

// RemovePod stops the pod if need be, removes its containers and all that was
// made for it. That it does not exist is no error.
func (s *Service) RemovePod(ctx context.Context, id string) error {
	p, err := s.book.view().anyPod(id)
	if errors.Is(err, ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	return s.destroyPodOp(ctx, p.ID)
}

// destroyPodOp is destroyPod as an operation of its own.
func (s *Service) destroyPodOp(ctx context.Context, id string) error {
	_, err := s.ops.do(ctx, "remove pod", id, s.cfg.PodTimeout, func(ctx context.Context, o *op) (string, error) {
		log, ctx := logFor(ctx, "podID", id)
		begun := time.Now()
		if err := s.destroyPod(ctx, o, id); err != nil {
			s.retryUndo(id)
			if !onlyDetach(err) {
				return "", fmt.Errorf("pod %s: %w", id, err)
			}
			log.Error(err, "Network of a removed pod is left for later")
		}
		log.V(2).Info("Pod removed", "took", time.Since(begun))
		return "", nil
	})
	return err
}
