package sandbox

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"

	"github.com/opencontainers/selinux/go-selinux"
	"github.com/opencontainers/selinux/go-selinux/label"
	"golang.org/x/sys/unix"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berthd/berth/sandbox/spec"
	"github.com/berthd/berth/snapshotter"
)

// SELinux, where the kernel has it on. A pod gets a pair of labels when it is
// made, one for its processes and one for its files, with a level (the pair of
// categories) of its own; its containers use both, or labels by their own options
// with the pod's level. Without SELinux nothing here does anything.

// labelRow is a pair of SELinux labels in a record; both are "" without SELinux.
type labelRow struct {
	Process string
	Mount   string // of files that belong to the pod or container
	// Reserved tells that the level is the pod's alone.
	Reserved bool
}

// podLabels chooses the labels of a new pod.
func (s *Service) podLabels(cfg *runtime.PodSandboxConfig) (labelRow, error) {
	sc := cfg.GetLinux().GetSecurityContext()
	opts, err := spec.SELinuxOptions(sc.GetSelinuxOptions())
	if err != nil || !s.host.SELinux {
		return labelRow{}, err
	}
	if sc.GetPrivileged() {
		opts = selinux.DisableSecOpt()
	}
	r, err := initLabels(opts)
	r.Reserved = !sc.GetPrivileged() && sc.GetSelinuxOptions().GetLevel() == ""
	return r, err
}

func initLabels(opts []string) (labelRow, error) {
	process, mount, err := label.InitLabels(opts)
	if err != nil {
		return labelRow{}, fmt.Errorf("%w: selinux_options: %w", ErrInvalid, err)
	}
	return labelRow{Process: process, Mount: mount}, nil
}

// containerLabels chooses the labels of a container: the pod's unless it has
// options of its own.
func (s *Service) containerLabels(p *pod, sc *runtime.LinuxContainerSecurityContext) (labelRow, error) {
	opts, err := spec.SELinuxOptions(sc.GetSelinuxOptions())
	switch {
	case err != nil || !s.host.SELinux:
		return labelRow{}, err
	case sc.GetPrivileged():
		return labelRow{Mount: p.Labels.Mount}, nil
	case len(opts) == 0:
		return labelRow{Process: p.Labels.Process, Mount: p.Labels.Mount}, nil
	}
	r, err := initLabels(opts)
	if err != nil || sc.GetSelinuxOptions().GetLevel() != "" || p.Labels.Process == "" {
		return r, err
	}
	// The level that came with it was made up; the containers of a pod share one.
	selinux.ReleaseLabel(r.Process)
	if r.Process, err = selinux.CopyLevel(p.Labels.Process, r.Process); err == nil {
		r.Mount, err = selinux.CopyLevel(p.Labels.Mount, r.Mount)
	}
	if err != nil {
		return r, fmt.Errorf("selinux_options: level of the pod: %w", err)
	}
	return r, nil
}

// reserveLabels keeps the level of a pod that was made earlier from being given
// out again; releaseLabels gives it back.
func (p *pod) reserveLabels() {
	if p.Labels.Reserved {
		selinux.ReserveLabel(p.Labels.Process)
	}
}

func (p *pod) releaseLabels() {
	if p.Labels.Reserved {
		selinux.ReleaseLabel(p.Labels.Process)
	}
}

// labelFiles lets the pod's processes use files of the pod.
func labelFiles(mountLabel string, files ...string) error {
	for _, f := range files {
		if err := label.SetFileLabel(f, mountLabel); err != nil && !errors.Is(err, unix.ENOTSUP) {
			return fmt.Errorf("SELinux label of %s: %w", f, err)
		}
	}
	return nil
}

// labelOption adds to the data of a mount the label of all files in it.
func labelOption(data, mountLabel string) string { return label.FormatMountLabel(data, mountLabel) }

// relabelMounts labels host paths for the container that asks for it, and for
// nobody else. A file system without labels is left as it is.
func relabelMounts(ctx context.Context, plan *containerPlan) error {
	if plan.row.Labels.Mount == "" {
		return nil
	}
	for i, m := range plan.config.GetMounts() {
		if !m.GetSelinuxRelabel() || isVolume(m) {
			continue
		}
		err := label.Relabel(plan.in.Mounts[i].Source, plan.row.Labels.Mount, false)
		if err != nil && !errors.Is(err, unix.ENOTSUP) {
			return fmt.Errorf("%w: mounts[%d] (host_path %.200q): selinux_relabel: %w", ErrInvalid, i, m.GetHostPath(), err)
		}
		if err := ctx.Err(); err != nil {
			return err
		}
	}
	return nil
}

// labelled returns mounts whose files all have the label. A bind mount shows the
// labels on disk; a view of one layer becomes an overlay of it and an empty
// directory, as overlay wants two.
func labelled(mounts []snapshotter.Mount, mountLabel, bundle string) []snapshotter.Mount {
	if mountLabel == "" {
		return mounts
	}
	out := make([]snapshotter.Mount, 0, len(mounts))
	for _, m := range mounts {
		if m.Type == "bind" && len(m.Options) > 0 && m.Options[0] == "ro" {
			empty := filepath.Join(bundle, "rootfs")
			m = snapshotter.Mount{Type: "overlay", Source: "overlay", Options: []string{"ro", "lowerdir=" + m.Source + ":" + empty}}
		}
		if m.Type == "overlay" {
			m.Options = append(m.Options[:len(m.Options):len(m.Options)], labelOption("", mountLabel))
		}
		out = append(out, m)
	}
	return out
}
