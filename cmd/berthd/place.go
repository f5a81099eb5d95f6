package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"k8s.io/klog/v2"

	"github.com/berthd/berth/cni/netns"
	"github.com/berthd/berth/sandbox"
)

// place is where a process stands: mounts are seen, and processes known by their
// numbers, from the same place only, and for as long as the machine is up.
type place struct {
	Mounts    string `json:"mnt"` // as in /proc/self/ns
	Processes string `json:"pid"`
	Boot      string `json:"boot"`
}

// placeFile is, in run_dir, the place of the daemon that ran last.
const placeFile = "place.json"

// errElsewhere: what runs on the node would look as if it were gone.
var errElsewhere = errors.New("not the namespaces that berthd ran in")

func here() (p place, err error) {
	if p.Mounts, err = os.Readlink("/proc/self/ns/mnt"); err != nil {
		return p, err
	}
	if p.Processes, err = os.Readlink("/proc/self/ns/pid"); err != nil {
		return p, err
	}
	if p.Boot = os.Getenv("BERTH_TEST_BOOT_ID"); p.Boot == "" {
		p.Boot, err = sandbox.BootID()
	}
	return p, err
}

// claim locks run_dir for a daemon until the result is closed, then takes from others
// what they may do with the directories, and notes where the daemon stands.
func (c *config) claim(ctx context.Context) (lock *os.File, err error) {
	if lock, err = lockDir(ctx, c.RunDir); err != nil {
		return nil, c.wrong("run_dir", "%q: %w", c.RunDir, err)
	}
	if err = errors.Join(c.tighten(), c.notePlace()); err != nil {
		return nil, errors.Join(err, lock.Close())
	}
	return lock, nil
}

func (c *config) notePlace() error {
	p, err := here()
	if err != nil {
		return err
	}
	b, err := json.Marshal(p)
	if err != nil {
		return err
	}
	path := filepath.Join(c.RunDir, placeFile)
	// Whole or not at all, also when this process is killed.
	if err := os.WriteFile(path+".tmp", b, 0o600); err != nil {
		return err
	}
	return os.Rename(path+".tmp", path)
}

// checkPlace is for a process that is to change what a daemon has made. It returns
// errElsewhere if the last one was in other namespaces, in this boot.
func (c *config) checkPlace() error {
	path := filepath.Join(c.RunDir, placeFile)
	b, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil // none has run in this boot, or one that did not note it
	}
	if err != nil {
		return err
	}
	var noted place
	if err := json.Unmarshal(b, &noted); err != nil {
		return fmt.Errorf("%s: %w: if this shell is on the node itself, and in no container, remove the file", path, err)
	}
	now, err := here()
	if err != nil {
		return err
	}
	if noted == now || noted.Boot != now.Boot {
		return nil
	}
	return fmt.Errorf("%w: mounts %s and processes %s, here %s and %s: what runs would seem to be gone and be taken down; enter those of the node first: nsenter -t 1 -m -p",
		errElsewhere, noted.Mounts, noted.Processes, now.Mounts, now.Processes)
}

// privateRun makes run_dir a mount whose mounts stay in this namespace.
func (c *config) privateRun(ctx context.Context) error {
	err := netns.PrivateMount(c.RunDir)
	if errors.Is(err, netns.ErrNoexec) {
		klog.FromContext(ctx).Error(err, "Pods with a user namespace, or with an init of berth's, will not start", "runDir", c.RunDir)
		return nil
	}
	return err
}
