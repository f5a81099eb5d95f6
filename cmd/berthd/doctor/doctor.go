// Package doctor looks whether a node will do for berthd, before it is started and while
// it runs: what is there, what is wanted, and what an administrator can do about it.
//
// # Nouns
//
//   - Node: what the configuration says, as far as it can be looked at.
//   - Check (package api): one thing that was looked at, with a level. An error is what
//     keeps berthd from starting or pods from running; a warning will do so some day; a
//     note is a feature that the node does not have.
//
// # Caveats
//
//   - What berthd finds out by trying is tried here by the same functions, so that the two
//     agree. For that, directories are made in state_dir, or above it if it is not there
//     yet, and removed again. Nothing else is changed.
//   - Limits, privileges and the like are those of the berthd that runs. While there is none
//     they are this process's, and the service manager may give berthd others.
//   - Programs are looked for in the PATH of this process.
package doctor

import (
	"context"
	"fmt"
	"os"

	"github.com/berthd/berth/cni"
	"github.com/berthd/berth/cri/admin/api"
)

// Node is what is looked at.
type Node struct {
	StateDir, RunDir string
	Socket           string // of the CRI
	// Shim and Init are absolute paths, or "" with the error.
	Shim, Init       string
	ShimErr, InitErr error
	Runtimes         map[string]string // programs by handler
	DefaultRuntime   string
	Drivers          map[string]string // cgroup drivers by handler
	Network          cni.Config        // but for the directories of its records
	OOMScoreAdj      int64
	// PID is that of the berthd that runs, 0 if none answers; Held tells that one runs
	// all the same.
	PID  int
	Held bool
}

// exam is one look at a node.
type exam struct {
	Node
	tell func(api.Check)
	root bool
}

// Examine tells of each check as soon as it is made. It takes seconds at most, unless a
// disk or a program hangs: programs are bounded by 5 s each.
func Examine(ctx context.Context, n Node, tell func(api.Check)) {
	x := &exam{Node: n, tell: tell, root: os.Geteuid() == 0}
	if !x.root {
		x.bad(api.LevelError, "user", fmt.Sprintf("user %d", os.Geteuid()), "root", "run berth doctor as root; what needs that is left out here")
	}
	x.kernel()
	x.cgroups()
	x.programs(ctx)
	x.network(ctx)
	x.disks()
	x.clock()
	if x.root { // others may not see, and have, what counts here
		x.sockets()
		x.process()
	}
}

func (x *exam) ok(name, format string, args ...any) {
	x.tell(api.Check{Name: name, Level: api.LevelOK, Seen: fmt.Sprintf(format, args...)})
}

func (x *exam) bad(level api.Level, name, seen, want, remedy string) {
	x.tell(api.Check{Name: name, Level: level, Seen: seen, Want: want, Remedy: remedy})
}

// need is ok with good if err is nil, and else bad with the error.
func (x *exam) need(level api.Level, name, good string, err error, want, remedy string) bool {
	if err != nil {
		x.bad(level, name, err.Error(), want, remedy)
		return false
	}
	x.ok(name, "%s", good)
	return true
}
