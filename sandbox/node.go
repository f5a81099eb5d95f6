package sandbox

import (
	"context"
	"fmt"

	"github.com/berthd/berth/cni/netns"
	"github.com/berthd/berth/sandbox/cgroup"
	"github.com/berthd/berth/sandbox/spec"
	"github.com/berthd/berth/snapshotter"
)

// What is here looks at the node in the way that a Service does, for who is to tell an
// administrator whether it will do.

// RuntimeReport is what an OCI runtime says of itself.
type RuntimeReport struct {
	Path, Version string // of the program; the first line of --version
	// Features tells whether it has the verb of that name, without which the rest is
	// not known.
	Features          bool
	RecursiveReadOnly bool
	UserNamespaces    error // why pods cannot have one; nil if they can
}

// ProbeRuntime runs the program, found in PATH unless its name has a slash, for what it
// says. The error is why it cannot be used.
func ProbeRuntime(ctx context.Context, name string) (RuntimeReport, error) {
	path, _, err := lookUp(name)
	if err != nil {
		return RuntimeReport{}, fmt.Errorf("%w: %w", ErrRuntime, err)
	}
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	f, err := ask(ctx, path)
	r := RuntimeReport{Path: f.Path, Version: f.Version, Features: f.Features != nil, RecursiveReadOnly: f.recursiveReadOnly(), UserNamespaces: f.userNamespaces()}
	if err != nil {
		return r, fmt.Errorf("%w: %w", ErrRuntime, err)
	}
	return r, nil
}

// HostFacts are what specifications of containers on this node are made with.
func HostFacts(h cgroup.Hierarchy) (spec.Host, error) { return hostFacts(h) }

// ProbeUserNamespaces makes a user namespace, with the program holder as the process in
// it, and mounts a snapshot's likeness for it below stateDir. The error is why pods
// cannot have one.
func ProbeUserNamespaces(holder, stateDir, runDir string) error {
	some := netns.IDMap{Outside: 65536, Length: 65536}
	ns, err := netns.UserSpec{UIDs: []netns.IDMap{some}, GIDs: []netns.IDMap{some}, Holder: []string{holder}}.Open()
	if err != nil {
		return err
	}
	defer ns.Close()
	if err := snapshotter.IDMapSupported(stateDir, ns, some.Outside, some.Outside); err != nil {
		return fmt.Errorf("state_dir %s: %w", stateDir, err)
	}
	return searchable(runDir)
}
