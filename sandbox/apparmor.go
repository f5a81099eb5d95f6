package sandbox

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"strings"
	"sync"
	"time"
)

// defaultProfile is the AppArmor profile of containers that ask for the default
// one or for none. It is complete in itself: a node need not have any of the
// includes of a distribution.
const defaultProfile = "berth-default"

// profileText confines root in a container: what is namespaced it may use, what
// concerns the node, in /proc, in /sys and by mounting, it may not. Unlike the
// read-only paths this holds for a process with CAP_SYS_ADMIN, too.
const profileText = `profile berth-default flags=(attach_disconnected,mediate_deleted) {
  network,
  capability,
  file,
  unix,
  umount,

  # Its own processes, and signals from the daemon, the shim and the runtime.
  signal (send,receive) peer=berth-default,
  signal (receive) peer=unconfined,
  signal (receive) peer={runc,crun,youki,/usr/bin/runc,/usr/sbin/runc,/usr/bin/crun},
  ptrace (trace,read,tracedby,readby) peer=berth-default,

  deny mount,
  deny pivot_root,

  # Parameters of the node. Those of namespaces stay: net, kernel/shm*, kernel/msg*,
  # kernel/sem and fs/mqueue.
  deny /proc/sys/{abi,crypto,debug,dev,sunrpc,user,vm,xen}/** wkl,
  deny /proc/sys/fs/[^m]** wkl,
  deny /proc/sys/kernel/[^sm]** wkl,
  deny /proc/sys/kernel/{sched,seccomp,softlockup,spl,stack,sysctl,sysrq,max_,modprobe,modules}** wkl,
  deny /proc/[^0-9st]* wkl,
  deny /proc/{acpi,bus,fs,irq,scsi}/** wkl,
  deny /proc/{kcore,kmem,mem,sysrq-trigger,timer_stats} mrwklx,

  deny /sys/{block,bus,class,dev,devices,firmware,hypervisor,module,power}/** wkl,
  deny /sys/firmware/** mrwklx,
  deny /sys/devices/virtual/powercap/** mrwklx,
  deny /sys/kernel/** wkl,
  deny /sys/kernel/security/** mrwklx,
  deny /sys/fs/[^c]*/** wkl,
}
`

const (
	appArmorSwitch   = "/sys/module/apparmor/parameters/enabled"
	appArmorProfiles = "/sys/kernel/security/apparmor/profiles"
	appArmorParser   = "apparmor_parser"
	appArmorTimeout  = 20 * time.Second
	maxProfileList   = 16 << 20 // bytes
)

// appArmor loads the default profile when it is first needed, and again when it
// has been removed.
type appArmor struct {
	enabled bool
	list    string // file with the profiles in the kernel

	mu sync.Mutex
}

func newAppArmor() *appArmor {
	b, err := os.ReadFile(appArmorSwitch)
	return &appArmor{enabled: err == nil && bytes.HasPrefix(b, []byte("Y")), list: appArmorProfiles}
}

// check makes sure that the kernel has a profile. It loads the default one. On a
// node without the parser that is no error for the default profile: AppArmor is
// in the kernel there, but nobody uses it; usable is false then.
func (a *appArmor) check(ctx context.Context, name string) (usable bool, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	loaded, err := a.loaded(name)
	switch {
	case err != nil:
		return false, fmt.Errorf("AppArmor profile %.200q: %w", name, err)
	case loaded:
		return true, nil
	case name != defaultProfile:
		return false, fmt.Errorf("%w: linux.security_context.apparmor.localhost_ref %.200q: no such profile is loaded", ErrInvalid, name)
	}
	parser, err := exec.LookPath(appArmorParser)
	if err != nil {
		if _, err = os.Stat("/sbin/" + appArmorParser); err != nil {
			return false, nil
		}
		parser = "/sbin/" + appArmorParser
	}
	ctx, cancel := context.WithTimeout(ctx, appArmorTimeout)
	defer cancel()
	if _, err := output(ctx, []byte(profileText), parser, "--replace", "--skip-cache"); err != nil {
		return false, fmt.Errorf("AppArmor profile %s: %w", defaultProfile, err)
	}
	return true, nil
}

// loaded looks a profile up among those in the kernel, one "name (mode)" a line.
func (a *appArmor) loaded(name string) (bool, error) {
	f, err := os.Open(a.list)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil // securityfs is not mounted
	}
	if err != nil {
		return false, err
	}
	defer f.Close()
	s := bufio.NewScanner(io.LimitReader(f, maxProfileList))
	for s.Scan() {
		line := s.Text()
		if i := strings.LastIndex(line, " ("); i >= 0 && line[:i] == name {
			return true, nil
		}
	}
	return false, s.Err()
}
