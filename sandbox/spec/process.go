package spec

import (
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"
	"syscall"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	// defaultPath is $PATH for an image that sets none.
	defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

	// Limits of execve(2): one string, and all of them together with their
	// pointers. What exceeds them would fail in the container as E2BIG.
	maxString = 128 << 10
	maxExec   = 6 << 20
)

// command puts the command line together by Kubernetes' rules: a command
// replaces the image's entrypoint and drops its cmd, args replace the cmd.
func command(c *Container) ([]string, error) {
	entry, args := c.Config.GetCommand(), c.Config.GetArgs()
	if len(entry) == 0 {
		entry = c.Image.Entrypoint
		if len(args) == 0 {
			args = c.Image.Cmd
		}
	}
	line := slices.Concat(entry, args)
	if len(line) == 0 {
		return nil, fmt.Errorf("%w: command: none given, and the image has neither entrypoint nor cmd", ErrInvalid)
	}
	if line[0] == "" {
		return nil, fmt.Errorf("%w: command: the name of the program is empty", ErrInvalid)
	}
	for i, s := range line {
		if err := checkString(fmt.Sprintf("command line argument %d", i), s); err != nil {
			return nil, err
		}
	}
	return line, nil
}

// environment merges, later ones winning: a default PATH, the image's
// variables, HOSTNAME, TERM for a terminal, the configuration's variables. A
// variable keeps the place of its first mention.
func environment(c *Container) ([]string, error) {
	var e envList
	e.set("PATH", defaultPath)
	for _, kv := range c.Image.Env {
		// An image may hold anything. A variable without a name or "=" can
		// not be read by a program, so nothing is lost with it.
		if name, value, ok := strings.Cut(kv, "="); ok && name != "" {
			e.set(name, value)
		}
	}
	if c.Hostname != "" {
		e.set("HOSTNAME", c.Hostname)
	}
	if c.Config.GetTty() {
		e.set("TERM", "xterm")
	}
	for i, kv := range c.Config.GetEnvs() {
		if kv.GetKey() == "" || strings.ContainsAny(kv.GetKey(), "=\x00") {
			return nil, fmt.Errorf("%w: envs[%d].key %q: empty, or with '=' or a zero byte", ErrInvalid, i, clip(kv.GetKey()))
		}
		e.set(kv.Key, string(kv.GetValue()))
	}
	for _, kv := range e.list {
		if err := checkVariable(kv); err != nil {
			return nil, err
		}
	}
	return e.list, nil
}

// envList is an environment in order, without a name twice.
type envList struct {
	list []string
	at   map[string]int
}

func (e *envList) set(name, value string) {
	if i, ok := e.at[name]; ok {
		e.list[i] = name + "=" + value
		return
	}
	if e.at == nil {
		e.at = make(map[string]int)
	}
	e.at[name] = len(e.list)
	e.list = append(e.list, name+"="+value)
}

func checkVariable(kv string) error {
	name, value, _ := strings.Cut(kv, "=")
	// Runtimes write $HOME into files such as the container's passwd: a line
	// break in it would be a line of its own there (CVE-2022-4318).
	if name == "HOME" && strings.ContainsFunc(value, func(r rune) bool { return r < ' ' || r == 0x7f || r == ':' }) {
		return fmt.Errorf("%w: env HOME %q: colon or control character", ErrInvalid, clip(value))
	}
	return checkString("env "+clip(name), kv)
}

func checkString(what, s string) error {
	if len(s) >= maxString {
		return fmt.Errorf("%w: %s: %d bytes, the limit is %d", ErrInvalid, what, len(s), maxString-1)
	}
	if i := strings.IndexByte(s, 0); i >= 0 {
		return fmt.Errorf("%w: %s: zero byte at %d", ErrInvalid, what, i)
	}
	return nil
}

// workingDir returns the directory to start in.
func workingDir(c *Container) (string, error) {
	dir := c.Config.GetWorkingDir()
	if dir != "" && !path.IsAbs(dir) {
		return "", fmt.Errorf("%w: working_dir %q: not an absolute path", ErrInvalid, clip(dir))
	}
	if dir == "" {
		dir = c.Image.WorkingDir
	}
	if err := checkString("working_dir", dir); err != nil {
		return "", err
	}
	dir = path.Join("/", dir)
	// A working directory among the runtime's own file descriptors is on the
	// host (CVE-2024-21626). Runtimes check for it too; old ones did not.
	if parts := strings.Split(dir, "/"); parts[1] == "proc" && slices.Contains(parts[2:], "fd") {
		return "", fmt.Errorf("%w: working_dir %q: a file descriptor of another process", ErrInvalid, clip(dir))
	}
	return dir, nil
}

// Process returns the process of an exec in a container that was started with
// base: the same user, capabilities and environment, another command line. It
// shares no memory with base that either may change.
func Process(base *specs.Process, cmd []string, tty bool) *specs.Process {
	p := *base
	p.Args = slices.Clone(cmd)
	p.Terminal = tty
	p.ConsoleSize = nil
	p.Env = slices.Clone(base.Env)
	p.User.AdditionalGids = slices.Clone(base.User.AdditionalGids)
	p.Rlimits = slices.Clone(base.Rlimits)
	if c := base.Capabilities; c != nil {
		p.Capabilities = &specs.LinuxCapabilities{
			Bounding:    slices.Clone(c.Bounding),
			Effective:   slices.Clone(c.Effective),
			Inheritable: slices.Clone(c.Inheritable),
			Permitted:   slices.Clone(c.Permitted),
			Ambient:     slices.Clone(c.Ambient),
		}
	}
	if tty && !slices.ContainsFunc(p.Env, func(kv string) bool { return strings.HasPrefix(kv, "TERM=") }) {
		p.Env = append(p.Env, "TERM=xterm")
	}
	return &p
}

// signals has the numbers of signal(7) on every architecture that Kubernetes
// runs on.
var signals = map[string]int{
	"ABRT": 6, "ALRM": 14, "BUS": 7, "CHLD": 17, "CLD": 17, "CONT": 18, "FPE": 8, "HUP": 1, "ILL": 4, "INT": 2, "IO": 29,
	"IOT": 6, "KILL": 9, "PIPE": 13, "POLL": 29, "PROF": 27, "PWR": 30, "QUIT": 3, "SEGV": 11, "STKFLT": 16, "STOP": 19,
	"SYS": 31, "TERM": 15, "TRAP": 5, "TSTP": 20, "TTIN": 21, "TTOU": 22, "URG": 23, "USR1": 10, "USR2": 12,
	"VTALRM": 26, "WINCH": 28, "XCPU": 24, "XFSZ": 25, "RTMIN": 34, "RTMAX": 64,
}

// StopSignal returns the number (1..64) of the signal that asks a container to
// stop: the configuration's, else the image's ("SIGTERM", "term", "15",
// "SIGRTMIN+3"), else SIGTERM.
func StopSignal(cfg runtime.Signal, image string) (int, error) {
	if cfg != runtime.Signal_SIGNAL_RUNTIME_DEFAULT {
		name, ok := runtime.Signal_name[int32(cfg)]
		n, known := signalNumber(strings.TrimPrefix(name, "SIGNAL_"))
		if !ok || !known {
			return 0, fmt.Errorf("%w: stop_signal %d: no such signal", ErrInvalid, cfg)
		}
		return n, nil
	}
	if image == "" {
		return int(syscall.SIGTERM), nil
	}
	n, ok := signalNumber(image)
	if !ok {
		return 0, fmt.Errorf("%w: image stop signal %q: no such signal", ErrInvalid, clip(image))
	}
	return n, nil
}

func signalNumber(s string) (int, bool) {
	if n, err := strconv.Atoi(s); err == nil {
		return n, n >= 1 && n <= 64 && s[0] != '+'
	}
	s = strings.TrimPrefix(strings.ToUpper(s), "SIG")
	for _, base := range []string{"RTMIN", "RTMAX"} {
		if offset, ok := strings.CutPrefix(s, base); ok && offset != "" {
			// CRI writes RTMINPLUS3 and RTMAXMINUS3 for these.
			offset = strings.NewReplacer("PLUS", "+", "MINUS", "-").Replace(offset)
			n, err := strconv.Atoi(offset)
			n += signals[base]
			return n, err == nil && n >= signals["RTMIN"] && n <= signals["RTMAX"] && strings.IndexByte("+-", offset[0]) >= 0
		}
	}
	n, ok := signals[s]
	return n, ok
}
