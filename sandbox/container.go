package sandbox

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	goruntime "runtime"
	"slices"
	"strconv"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/klog/v2"

	"github.com/berthd/berth/cni/netns"
	"github.com/berthd/berth/imageservice"
	"github.com/berthd/berth/sandbox/cgroup"
	"github.com/berthd/berth/sandbox/nri"
	"github.com/berthd/berth/sandbox/spec"
	"github.com/berthd/berth/shim"
	"github.com/berthd/berth/snapshotter"
	"github.com/berthd/berth/store"
)

// Where a container keeps its things: the bundle and the shim's socket in the run
// directory, the exit record in the state directory, so that it outlives a
// reboot.
func (s *Service) bundleDir(id string) string { return filepath.Join(s.cfg.RunDir, "c", id) }
func (s *Service) socket(id string) string    { return filepath.Join(s.cfg.RunDir, "s", id) }
func (s *Service) stateDir(id string) string  { return filepath.Join(s.cfg.StateDir, "containers", id) }
func (s *Service) exitFile(id string) string  { return filepath.Join(s.stateDir(id), "exit") }

func (s *Service) removeBundle(id string) error { return os.RemoveAll(s.bundleDir(id)) }

// CreateContainer makes a container in a ready pod and returns its ID. One of
// the same name and attempt that exists and has not exited is the result; one
// that is being made is joined.
func (s *Service) CreateContainer(ctx context.Context, podID string, cfg *runtime.ContainerConfig, podCfg *runtime.PodSandboxConfig) (string, error) {
	p, err := s.book.view().pod(podID)
	if err != nil {
		return "", err
	}
	key := containerKey(p.ID, cfg)
	return s.ops.do(ctx, "create container", key, s.cfg.ContainerTimeout, func(ctx context.Context, o *op) (string, error) {
		for _, c := range s.book.view().byPod[p.ID] {
			if c.listed() && c.State != StateExited && containerKey(p.ID, c.config) == key {
				return c.ID, nil
			}
		}
		// Here, not before: it looks at paths of the host, of which one on a
		// dead network file system may hang.
		o.enter("plan")
		plan, err := s.planContainer(ctx, p, cfg, podCfg)
		if err != nil {
			return "", err
		}
		return s.createContainer(ctx, o, plan)
	})
}

// containerPlan is a validated request to make a container, and what becomes
// known of it on the way.
type containerPlan struct {
	pod    *pod
	row    containerRow
	config *runtime.ContainerConfig
	image  imageservice.Image
	rt     ociRuntime
	group  cgroup.Group

	keepFilter bool // for execs without the runtime
	in         spec.Container
	mounts     []snapshotter.Mount

	volumes []imageVolume
	cdi     []string // names of CDI devices
	target  string   // ID of the container whose PID namespace it joins

	spec      *specs.Spec
	announced func() // to be called when it is in the book, or undone
}

// planContainer checks what can be checked before anything is done.
func (s *Service) planContainer(ctx context.Context, p *pod, cfg *runtime.ContainerConfig, podCfg *runtime.PodSandboxConfig) (*containerPlan, error) {
	if cfg.GetMetadata().GetName() == "" {
		return nil, fmt.Errorf("%w: metadata.name: must not be empty", ErrInvalid)
	}
	if p.State != StateReady {
		return nil, fmt.Errorf("%w: pod %s is not ready", ErrState, p.ID)
	}
	sc := cfg.GetLinux().GetSecurityContext()
	if sc.GetPrivileged() && !p.config.GetLinux().GetSecurityContext().GetPrivileged() {
		return nil, fmt.Errorf("%w: linux.security_context.privileged: true: the pod is not privileged", ErrInvalid)
	}
	image, err := s.deps.Images.Get(cfg.GetImage().GetImage())
	if err != nil {
		return nil, fmt.Errorf("image.image: %w", err)
	}
	rt := s.runtimeOfPod(p)
	if _, err := s.handler(rt.handler); err != nil {
		return nil, err
	}
	raw, err := proto.Marshal(cfg)
	if err != nil || len(raw) > maxConfig {
		return nil, fmt.Errorf("%w: config: %d bytes, limit %d: %w", ErrInvalid, len(raw), maxConfig, err)
	}
	id := s.ids.newID()
	oci, err := cgroup.OCIPath(rt.driver, p.config.GetLinux().GetCgroupParent(), id)
	if err != nil {
		return nil, invalid("", err)
	}
	logPath, err := containerLog(p, cfg, podCfg)
	if err != nil {
		return nil, err
	}
	stop, err := spec.StopSignal(cfg.GetStopSignal(), image.Config.StopSignal)
	if err != nil {
		return nil, err
	}
	plan := &containerPlan{pod: p, config: cfg, image: image, rt: rt, group: s.hier.Group(rt.driver, oci)}
	plan.row = containerRow{ID: id, PodID: p.ID, State: StateCreating, Config: raw, BootID: s.cfg.BootID,
		Handler: p.Handler, OCI: rt.row(), ImageID: image.ID, ImageRef: cfg.GetImage().GetImage(), CgroupPath: oci, LogPath: logPath,
		StopSignal: stop}
	plan.row.ImageName, plan.row.ImageDigest = imageNames(image, plan.row.ImageRef)
	if res := cfg.GetLinux().GetResources(); res != nil {
		if plan.row.Resources, err = proto.Marshal(res); err != nil {
			return nil, fmt.Errorf("%w: linux.resources: %w", ErrInvalid, err)
		}
	}
	if err := s.planVolumes(plan); err != nil {
		return nil, err
	}
	return plan, s.planSpec(ctx, plan)
}

// planSpec gathers what the OCI specification is built from, but for the user,
// who is looked up in the container's file system.
func (s *Service) planSpec(ctx context.Context, plan *containerPlan) error {
	p, cfg := plan.pod, plan.config
	sc := cfg.GetLinux().GetSecurityContext()
	if err := checkContainerUserNS(p, sc.GetNamespaceOptions()); err != nil {
		return err
	}
	host := s.host
	facts, err := plan.rt.now(ctx)
	if err != nil {
		return err
	}
	if !facts.recursiveReadOnly() {
		host.RRO = false
	}
	in := spec.Container{ID: plan.row.ID, PodID: p.ID, Pod: p.config, Config: cfg, Host: host,
		Image: spec.Image{Env: plan.image.Config.Env, Entrypoint: plan.image.Config.Entrypoint, Cmd: plan.image.Config.Cmd,
			WorkingDir: plan.image.Config.WorkingDir, User: plan.image.Config.User, StopSignal: plan.image.Config.StopSignal},
		Annotations: s.annotations(plan.rt.handler, p.config, cfg), CgroupsPath: plan.row.CgroupPath, OOMScoreMin: &s.oomFloor,
		HostsFile: s.podFile(p.ID, fileHosts), ResolvConf: s.podFile(p.ID, fileResolv),
		HostnameFile: s.podFile(p.ID, fileHostname), ShmDir: s.shmDir(p), UserNS: s.specUserNS(p)}
	if in.Hostname, err = hostnameOf(p.config, p.HostNetwork); err != nil {
		return err
	}
	if err := s.namespaces(plan, &in); err != nil {
		return err
	}
	ids := mountIDs{able: facts.idMappedMounts(), user: p.userNS, path: s.deps.Pins.Path(p.ID, netns.User)}
	if in.Mounts, err = gatherMounts(cfg.GetMounts(), ids); err != nil {
		return err
	}
	if in.Devices, err = gatherDevices(cfg.GetDevices(), sc.GetPrivileged()); err != nil {
		return err
	}
	caps, err := spec.Capabilities(sc, host)
	if err != nil {
		return err
	}
	in.Seccomp, err = loadSeccomp(sc.GetSeccomp(), sc.GetSeccompProfilePath(), sc.GetPrivileged(), caps.Bounding) //nolint:staticcheck // older kubelets set the deprecated field
	if err != nil {
		return err
	}
	if in.AppArmor, err = spec.AppArmor(sc, s.appArmor.enabled, defaultProfile); err != nil {
		return err
	}
	if plan.row.Labels, err = s.containerLabels(p, sc); err != nil {
		return err
	}
	in.ProcessLabel, in.MountLabel = plan.row.Labels.Process, plan.row.Labels.Mount
	if plan.cdi, err = cdiNames(cfg); err != nil {
		return err
	}
	plan.in = in
	return s.checkCDI(plan.cdi)
}

// namespaces decides which namespaces the container joins.
func (s *Service) namespaces(plan *containerPlan, in *spec.Container) error {
	p, opts := plan.pod, plan.config.GetLinux().GetSecurityContext().GetNamespaceOptions()
	pin := func(host bool, k netns.Kind) spec.Namespace {
		if host {
			return spec.Namespace{Host: true}
		}
		return spec.Namespace{Path: s.deps.Pins.Path(p.ID, k)}
	}
	in.Network = pin(p.HostNetwork, netns.Net)
	in.UTS = pin(p.HostNetwork, netns.UTS)
	in.IPC = pin(p.hostIPC(), netns.IPC)
	switch opts.GetPid() {
	case runtime.NamespaceMode_POD:
		in.PID = spec.Namespace{Path: s.deps.Pins.Path(p.ID, pidKind)}
	case runtime.NamespaceMode_CONTAINER:
		plan.row.PrivatePID = true
	case runtime.NamespaceMode_NODE:
		in.PID = spec.Namespace{Host: true}
	case runtime.NamespaceMode_TARGET:
		t, err := s.book.view().container(opts.GetTargetId())
		if err != nil {
			return fmt.Errorf("%w: linux.security_context.namespace_options.target_id: %w", ErrInvalid, err)
		}
		if t.PodID != p.ID || t.State != StateRunning {
			return fmt.Errorf("%w: linux.security_context.namespace_options.target_id: %s is not a running container of this pod", ErrInvalid, t.ID)
		}
		// joinTarget names the file in the end.
		in.PID, plan.target = spec.Namespace{Path: "/proc/" + strconv.Itoa(t.Pid) + "/ns/pid"}, t.ID
	default:
		return fmt.Errorf("%w: linux.security_context.namespace_options.pid: %v", ErrInvalid, opts.GetPid())
	}
	return nil
}

// containerLog is where the container's log goes, "" for nowhere. Its directory
// has to exist: the kubelet makes and removes those of logs.
func containerLog(p *pod, cfg *runtime.ContainerConfig, podCfg *runtime.PodSandboxConfig) (string, error) {
	dir := p.config.GetLogDirectory()
	if dir == "" {
		dir = podCfg.GetLogDirectory()
	}
	if dir == "" || cfg.GetLogPath() == "" {
		return "", nil
	}
	if !filepath.IsAbs(dir) {
		return "", fmt.Errorf("%w: log_directory: %q is not absolute", ErrInvalid, dir)
	}
	if !filepath.IsLocal(cfg.GetLogPath()) {
		return "", fmt.Errorf("%w: log_path: %q does not stay below log_directory", ErrInvalid, cfg.GetLogPath())
	}
	path := filepath.Join(dir, cfg.GetLogPath())
	if fi, err := os.Stat(filepath.Dir(path)); err != nil {
		return "", fmt.Errorf("%w: log_path %q in log_directory %q: %w", ErrInvalid, cfg.GetLogPath(), dir, err)
	} else if !fi.IsDir() {
		return "", fmt.Errorf("%w: log_path %q in log_directory %q: not a directory", ErrInvalid, cfg.GetLogPath(), dir)
	}
	return path, nil
}

func (s *Service) createContainer(ctx context.Context, o *op, plan *containerPlan) (string, error) {
	id := plan.row.ID
	plan.row.Created = after(s.book.view().newestIn(plan.pod))
	if _, err := s.book.insertContainer(plan.row); err != nil {
		return "", err
	}
	log, ctx := logFor(ctx, "pod", podKey(plan.pod.config), "container", plan.config.GetMetadata().GetName(), "containerID", id)
	begun := time.Now()
	var launched shim.Launched
	var target *os.File
	defer func() { target.Close() }() // nil is no harm
	plan.announced = func() {}
	defer func() { plan.announced() }()
	err := o.steps(ctx, []step{
		{"target", func(context.Context) (err error) { target, err = s.joinTarget(plan); return err }},
		{"init", func(ctx context.Context) error {
			if plan.in.PID.Path != s.deps.Pins.Path(plan.pod.ID, pidKind) {
				return nil
			}
			return s.ensureInit(ctx, plan.pod.ID)
		}},
		{"snapshot", func(ctx context.Context) (err error) {
			plan.mounts, err = s.deps.Snapshots.Prepare(ctx, id, plan.image.ChainID)
			return err
		}},
		{"volumes", func(ctx context.Context) error { return s.makeVolumes(ctx, plan) }},
		{"labels", func(ctx context.Context) error { return s.confine(ctx, plan) }},
		{"user", func(context.Context) error { return s.resolveUser(plan) }},
		{"specification", func(context.Context) error { return s.buildSpec(plan) }},
		{"plugins", func(ctx context.Context) error { return s.announceContainer(ctx, plan) }},
		{"bundle", func(context.Context) error { return s.writeBundle(plan) }},
		{"launch", func(ctx context.Context) (err error) { launched, err = s.launch(ctx, plan); return err }},
		{"created", func(context.Context) error { return s.created(plan, launched) }},
	})
	if err != nil {
		undo, cancel := cleanup(ctx, undoTimeout)
		defer cancel()
		if e := s.destroyContainer(undo, o, id); e != nil {
			log.Error(e, "Container half made is left for later")
			s.retryUndo(id)
		}
		return "", fmt.Errorf("container %s in pod %s: %w", plan.config.GetMetadata().GetName(), podKey(plan.pod.config), err)
	}
	s.tellNews(ctx, nri.PostCreateContainer, id)
	log.V(2).Info("Container created", "image", plan.row.ImageRef, "pid", launched.Pid, "took", time.Since(begun))
	return id, nil
}

// resolveUser finds out who the container runs as, from the files of its image.
func (s *Service) resolveUser(plan *containerPlan) error {
	root, err := snapshotter.OpenRoot(plan.mounts)
	if err != nil {
		return err
	}
	defer root.Close()
	passwd, group, err := readUserDB(root)
	if err != nil {
		return err
	}
	u, err := spec.ResolveUser(plan.config.GetLinux().GetSecurityContext(), plan.image.Config.User, passwd, group)
	if err == nil {
		err = plan.pod.userNS.checkUser(u)
	}
	if err != nil {
		return err
	}
	if err := makeImageDirs(plan, root); err != nil {
		return err
	}
	plan.in.User = u
	plan.row.User = rowUser{UID: u.UID, GID: u.GID, Groups: u.AdditionalGIDs}
	return nil
}

// confine makes ready what SELinux and AppArmor need for the container.
func (s *Service) confine(ctx context.Context, plan *containerPlan) error {
	if plan.in.AppArmor != "" {
		usable, err := s.appArmor.check(ctx, plan.in.AppArmor)
		if err != nil {
			return err
		}
		if !usable {
			plan.in.AppArmor = ""
		}
	}
	return relabelMounts(ctx, plan)
}

// buildSpec makes the specification, but for what plugins want.
func (s *Service) buildSpec(plan *containerPlan) (err error) {
	if plan.spec, err = spec.Build(plan.in); err != nil {
		return err
	}
	return s.injectCDI(plan.spec, plan.cdi)
}

// writeBundle writes what the OCI runtime reads.
func (s *Service) writeBundle(plan *containerPlan) error {
	plan.keepFilter = s.keepsFilter(plan.rt, plan.spec)
	if err := os.Mkdir(s.stateDir(plan.row.ID), 0o700); err != nil {
		return err
	}
	return s.makeBundle(plan.row.ID, plan.spec, plan.pod.userNS)
}

// makeBundle makes the bundle of a container or an init.
func (s *Service) makeBundle(id string, sp *specs.Spec, u *userNS) error {
	dir := s.bundleDir(id)
	if err := writeBundle(dir, sp); err != nil || u == nil {
		return err
	}
	// The way to the root file system, for the runtime once it has joined the
	// user namespace.
	if err := os.Chown(dir, 0, int(u.gids.Outside)); err != nil {
		return err
	}
	return errors.Join(os.Chmod(dir, 0o710), s.openRunDir())
}

func writeBundle(dir string, sp *specs.Spec) error {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	if err := os.Mkdir(filepath.Join(dir, "rootfs"), 0o700); err != nil {
		return err
	}
	text, err := json.Marshal(sp)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "config.json"), text, 0o600)
}

// launch starts the shim, which has the runtime create the container.
func (s *Service) launch(ctx context.Context, plan *containerPlan) (shim.Launched, error) {
	l, err := s.launchOf(ctx, plan.row.ID, s.bundleDir(plan.row.ID), plan.rt, plan.group)
	if err != nil {
		return shim.Launched{}, err
	}
	l.ExitFile, l.LogPath = s.exitFile(plan.row.ID), plan.row.LogPath
	l.Terminal, l.Stdin, l.StdinOnce = plan.config.GetTty(), plan.config.GetStdin(), plan.config.GetStdinOnce()
	l.PrivatePID, l.KeepFilter = plan.row.PrivatePID, plan.keepFilter
	u := plan.pod.userNS
	if u != nil {
		l.UserNS = plan.in.UserNS.Path
	}
	l.RootUID, l.RootGID = u.root()
	if l.Mounts, err = shimMounts(labelled(plan.mounts, plan.row.Labels.Mount, l.Bundle), "", u); err != nil {
		return shim.Launched{}, err
	}
	volumes, err := volumeMounts(l.Bundle, plan.volumes, plan.row.Labels.Mount, u)
	if err != nil {
		return shim.Launched{}, err
	}
	l.Mounts = append(l.Mounts, volumes...)
	c, launched, err := shim.Run(ctx, s.cfg.ShimBinary, l)
	if err != nil {
		// Runtimes have no words for it.
		if crowded := plan.group.Crowded(); crowded != "" {
			err = fmt.Errorf("%w; %s", err, crowded)
		}
		return launched, err
	}
	return launched, s.follow(plan.row.ID, c)
}

// launchOf fills in what is the same for containers and inits.
func (s *Service) launchOf(ctx context.Context, id, bundle string, rt ociRuntime, group cgroup.Group) (shim.Launch, error) {
	path, err := rt.bin(ctx)
	return shim.Launch{ID: id, Bundle: bundle, Runtime: path, RuntimeRoot: rt.root, SystemdCgroup: rt.driver == cgroup.Systemd,
		Socket: s.socket(id), ExitFile: filepath.Join(bundle, "exit"), Rootfs: filepath.Join(bundle, "rootfs"),
		OOMFile: group.OOMFile(), CgroupKill: group.Dirs(), MaxLogLine: s.cfg.MaxLogLine, DrainTimeout: s.cfg.ExecDrain}, err
}

// created makes the container usable, unless its pod was stopped meanwhile.
func (s *Service) created(plan *containerPlan, launched shim.Launched) error {
	note := plan.row
	note.State, note.Pid, note.ShimPid = StateCreated, launched.Pid, launched.ShimPID
	if err := writeNote(s.bundleDir(note.ID), note); err != nil {
		return err
	}
	_, err := s.book.updateContainer(plan.row.ID, func(tx *store.Tx, r *containerRow) error {
		if err := podReady(tx, r.PodID); err != nil {
			return err
		}
		// A process that was killed at once may be in the book as exited.
		if r.State == StateCreating {
			r.State, r.Pid = StateCreated, launched.Pid
		}
		r.ShimPid, r.User, r.Resources, r.PrivatePID = launched.ShimPID, plan.row.User, plan.row.Resources, plan.row.PrivatePID
		return nil
	})
	return err
}

// StartContainer runs what was created. One that runs already is no error.
func (s *Service) StartContainer(ctx context.Context, id string) error {
	c, err := s.book.view().container(id)
	if err != nil {
		return err
	}
	_, err = s.ops.do(ctx, "start container", c.ID, s.cfg.ContainerTimeout, func(ctx context.Context, o *op) (string, error) {
		return "", s.startContainer(ctx, o, c.ID)
	})
	return err
}

func (s *Service) startContainer(ctx context.Context, o *op, id string) error {
	c, err := s.book.view().container(id)
	if err != nil {
		return err
	}
	switch c.State {
	case StateRunning:
		return nil
	case StateExited:
		return fmt.Errorf("%w: container %s has exited", ErrState, id)
	}
	p, err := s.book.view().pod(c.PodID)
	if err != nil || p.State != StateReady {
		return fmt.Errorf("%w: pod %s of container %s is not ready", ErrState, c.PodID, id)
	}
	log, ctx := logFor(ctx, "pod", podKey(p.config), "container", c.config.GetMetadata().GetName(), "containerID", id)
	err = o.steps(ctx, []step{
		{"plugins", func(ctx context.Context) error { return s.tell(ctx, nri.StartContainer, id) }},
		{"start", func(ctx context.Context) error { return s.startOnce(ctx, id) }},
		{"running", func(context.Context) error { return s.markRunning(id) }},
	})
	if err != nil {
		s.startFailed(ctx, id, err)
		return fmt.Errorf("container %s in pod %s: %w", c.config.GetMetadata().GetName(), podKey(p.config), err)
	}
	s.tellNews(ctx, nri.PostStartContainer, id)
	log.V(2).Info("Container running", "pid", c.Pid)
	return nil
}

// startPoll is how often a start that an earlier daemon began is looked at.
const startPoll = 10 * time.Millisecond

// startOnce starts the container unless it has been: a daemon that was killed
// while the runtime started it has left the rest of the way to its successor. A
// connection that breaks meanwhile is made again.
func (s *Service) startOnce(ctx context.Context, id string) error {
	for {
		err := s.tryStart(ctx, id)
		switch {
		case err == nil || errors.Is(err, errClosing):
			return err
		case errors.Is(err, shim.ErrGone) && s.shimLives(id):
		case errors.Is(err, errStarting): // the runtime is at it
		default:
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", err, ctx.Err())
		case <-time.After(startPoll):
		}
	}
}

var errStarting = errors.New("container is being started")

func (s *Service) tryStart(ctx context.Context, id string) error {
	client, err := s.client(ctx, id)
	if err != nil {
		return err
	}
	err = client.Start(ctx)
	if !errors.Is(err, shim.ErrState) {
		return err
	}
	st, err := client.State(ctx)
	if err == nil && st.Status == shim.StatusCreated {
		err = errStarting
	}
	return err // without one, it runs, or ran
}

// markRunning records the start. A process that has ended already, and whose exit
// is in the book, keeps it and gets its start time.
func (s *Service) markRunning(id string) error {
	_, err := s.book.updateContainer(id, func(_ *store.Tx, r *containerRow) error {
		switch r.State {
		case StateCreated:
			r.State, r.Reason, r.Message = StateRunning, "", ""
			r.Started = after(r.Created)
		case StateExited:
			if r.Started == 0 {
				r.Started = after(r.Created)
				r.Finished = max(r.Finished, r.Started)
			}
		}
		return nil
	})
	return err
}

// reasonStart is the reason of a container that could not be started.
const reasonStart = "StartError"

// startFailed ends a container that could not be started. The kubelet makes a
// new one instead of starting it again.
func (s *Service) startFailed(ctx context.Context, id string, cause error) {
	if errors.Is(cause, errClosing) || s.live.isClosed() {
		return // the daemon is stopping; its successor sees what has become of it
	}
	undo, cancel := cleanup(ctx, undoTimeout)
	defer cancel()
	_, err := s.book.updateContainer(id, func(_ *store.Tx, r *containerRow) error {
		if r.State == StateCreated {
			r.Reason, r.Message = reasonStart, cause.Error() // kept by markExited
		}
		return nil
	})
	if err = errors.Join(err, s.kill(undo, id)); ignoreGone(err) != nil {
		klog.FromContext(ctx).Error(err, "Container that did not start is not ended")
	}
}

// initArch is the architecture that the init's seccomp profile is for.
const initArch = goruntime.GOARCH

// imageNames chooses the name and the digest under which a container's status
// shows its image.
func imageNames(image imageservice.Image, ref string) (name, digest string) {
	digest = image.ID
	if len(image.RepoDigests) > 0 {
		digest = image.RepoDigests[0]
	}
	switch {
	case slices.Contains(image.RepoTags, ref) || slices.Contains(image.RepoDigests, ref):
		return ref, digest
	case len(image.RepoTags) > 0:
		return image.RepoTags[0], digest
	case len(image.RepoDigests) > 0:
		return image.RepoDigests[0], digest
	}
	return ref, digest
}
