package cni

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/version"
	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"
)

const (
	// maxOutput bounds what is read of a plugin's stdout. A result of a pod
	// with a hundred routes has some 10 KiB.
	maxOutput = 1 << 20
	// maxDiagnostic bounds what is kept of stderr and quoted in errors.
	maxDiagnostic = 4 << 10
	// pipeGrace is how long a descendant that left the process group may hold
	// the pipes open after the group is gone.
	pipeGrace = time.Second
	// busyTries and busyPause wait for a plugin binary that is being written.
	busyTries = 20
	busyPause = 100 * time.Millisecond
)

// markEnv marks a plugin and its descendants with the cache directory of the
// daemon that started them; killOrphans finds them by it.
const markEnv = "BERTH_CNI_CACHE"

// defaultPath is the search path of a plugin when the daemon has none: plugins
// look for iptables, nft and the like.
const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// PluginError is a plugin's run that did not succeed.
type PluginError struct {
	Plugin  string        // name of the binary
	Verb    string        // CNI_COMMAND
	Elapsed time.Duration // from the start of the process
	Code    uint          // the plugin's own code (CNI spec, "Error"), 0 if it gave none
	Reason  string        // the plugin's words, bounded; "" if Err says all
	Err     error         // what ended the run: a context's error, ErrOutputTooLarge, an *exec.ExitError; may be nil
}

func (e *PluginError) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "plugin %s: %s: after %s", e.Plugin, e.Verb, e.Elapsed.Round(time.Millisecond))
	if e.Err != nil {
		fmt.Fprintf(&b, ": %v", e.Err)
	}
	if e.Code != 0 {
		fmt.Fprintf(&b, ": code %d", e.Code)
	}
	if e.Reason != "" {
		fmt.Fprintf(&b, ": %s", e.Reason)
	}
	return b.String()
}

// Unwrap makes errors.Is see a deadline or a cancellation.
func (e *PluginError) Unwrap() error { return e.Err }

// runner implements libcni's invoke.Exec: it finds and runs plugins.
type runner struct {
	version.PluginDecoder
	mark string // value of markEnv
	// clear is closed when no plugin of an earlier daemon runs any more, or the search
	// for them has taken clearLimit; nil is such a channel. A new one could not be told
	// from those before that.
	clear <-chan struct{}
}

// FindInPath is the first executable regular file of that name.
func (r *runner) FindInPath(plugin string, dirs []string) (string, error) {
	if plugin == "" || plugin != filepath.Base(plugin) || plugin == ".." || plugin == "." {
		return "", fmt.Errorf("%w: plugin type %q is no file name", ErrInvalid, plugin)
	}
	for _, dir := range dirs {
		path := filepath.Join(dir, plugin)
		if fi, err := os.Stat(path); err == nil && fi.Mode().IsRegular() && fi.Mode()&0o111 != 0 {
			return path, nil
		}
	}
	return "", fmt.Errorf("%w: no executable %q in %s", ErrPluginMissing, plugin, strings.Join(dirs, ", "))
}

// ExecPlugin runs the plugin until it ends, ctx ends or it has printed too much,
// and kills what is left of its process group in any case. It returns stdout.
func (r *runner) ExecPlugin(ctx context.Context, path string, stdin []byte, environ []string) ([]byte, error) {
	env, verb := r.environment(environ)
	perr := &PluginError{Plugin: filepath.Base(path), Verb: verb}
	if err := r.awaitClear(ctx); err != nil {
		perr.Err = fmt.Errorf("not started, plugins of an earlier daemon still run: %w", err)
		return nil, perr
	}
	out := &boundedBuffer{limit: maxOutput, over: make(chan struct{})}
	diag := &boundedBuffer{limit: maxDiagnostic}
	start := time.Now()
	cmd, err := startPlugin(ctx, func() *exec.Cmd {
		return &exec.Cmd{
			Path: path, Args: []string{path}, Env: env, Dir: "/",
			Stdin: bytes.NewReader(stdin), Stdout: out, Stderr: diag,
			SysProcAttr: &syscall.SysProcAttr{Setpgid: true},
			WaitDelay:   pipeGrace,
		}
	})
	if err == nil {
		err = await(ctx, cmd, out.over)
	}
	perr.Elapsed = time.Since(start)
	if out.exceeded() {
		perr.Err = fmt.Errorf("%w: more than %d bytes on stdout", ErrOutputTooLarge, maxOutput)
		return nil, perr
	}
	if err != nil {
		perr.explain(err, out.buf.Bytes(), diag)
		return nil, perr
	}
	if diag.buf.Len() > 0 {
		klog.FromContext(ctx).V(4).Info("CNI plugin wrote to stderr", "plugin", perr.Plugin, "verb", verb, "text", diag.quote())
	}
	if verb == "ADD" {
		if err := checkResult(out.buf.Bytes()); err != nil {
			perr.Err = err
			return nil, perr
		}
	}
	return out.buf.Bytes(), nil
}

func (r *runner) awaitClear(ctx context.Context) error {
	if r.clear == nil {
		return nil
	}
	select {
	case <-r.clear:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// environment is what a plugin gets to see: the CNI variables, a PATH and the
// mark. The daemon's own environment is none of its business.
func (r *runner) environment(environ []string) (env []string, verb string) {
	path := os.Getenv("PATH")
	if path == "" {
		path = defaultPath
	}
	env = []string{"PATH=" + path, markEnv + "=" + r.mark}
	for _, kv := range environ {
		name, value, _ := strings.Cut(kv, "=")
		switch name {
		case "CNI_COMMAND":
			verb = value
		case "CNI_CONTAINERID", "CNI_NETNS", "CNI_ARGS", "CNI_IFNAME", "CNI_PATH":
		default:
			continue
		}
		env = append(env, kv)
	}
	return env, verb
}

// startPlugin starts the process, with patience for a binary that somebody is
// just installing (ETXTBSY).
func startPlugin(ctx context.Context, build func() *exec.Cmd) (*exec.Cmd, error) {
	for try := 1; ; try++ {
		cmd := build()
		err := cmd.Start()
		if err == nil || try == busyTries || !errors.Is(err, unix.ETXTBSY) {
			return cmd, err
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(busyPause):
		}
	}
}

// await waits for the end of the process or of its right to run, then kills the
// group and reaps the leader.
//
// The order is what makes the kill safe: until the leader is reaped, its number
// cannot be given to another process or group. That is why its end is awaited
// with WNOWAIT first.
func await(ctx context.Context, cmd *exec.Cmd, over <-chan struct{}) error {
	pid := cmd.Process.Pid
	exited := make(chan struct{})
	go func() {
		defer close(exited)
		for unix.Waitid(unix.P_PID, pid, nil, unix.WEXITED|unix.WNOWAIT, nil) == unix.EINTR {
		}
	}()
	var ended error
	select {
	case <-exited:
	case <-over:
	case <-ctx.Done():
		// Both may have happened; then the plugin was in time.
		select {
		case <-exited:
		default:
			ended = ctx.Err()
		}
	}
	// A plugin that succeeded has no business in the background either: a helper
	// still at work would race with the next verb. Real daemons start sessions.
	_ = unix.Kill(-pid, unix.SIGKILL)
	<-exited
	err := cmd.Wait()
	if ended != nil {
		return ended
	}
	if errors.Is(err, exec.ErrWaitDelay) {
		return nil // the plugin itself succeeded
	}
	return err
}

// explain fills in why the run ended, by the plugin's own error object if it
// printed one (CNI spec, section 5, "Error"), else by its stderr.
func (e *PluginError) explain(err error, stdout []byte, diag *boundedBuffer) {
	var own types.Error
	jsonErr := json.Unmarshal(stdout, &own)
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		e.Err = fmt.Errorf("killed: %w", err)
		e.Reason = diag.quote()
	case errors.Is(err, context.Canceled):
		e.Err = fmt.Errorf("killed: caller gave up: %w", err)
	case jsonErr == nil && (own.Msg != "" || own.Code != 0):
		e.Code = own.Code
		e.Reason = clip(own.Msg)
		if own.Details != "" {
			e.Reason += "; " + clip(own.Details)
		}
	case diag.buf.Len() > 0:
		e.Err, e.Reason = err, diag.quote()
	case len(stdout) > 0:
		e.Err, e.Reason = err, clip(fmt.Sprintf("stdout %q", excerpt(stdout)))
	default:
		e.Err, e.Reason = err, "without a word"
	}
	var pathErr *fs.PathError
	if errors.As(err, &pathErr) {
		e.Reason = "" // never started; the path error says it all
	}
}

// checkResult refuses what is no result object, and the null elements that
// libcni's converters would dereference.
func checkResult(stdout []byte) error {
	var r struct {
		Interfaces []json.RawMessage `json:"interfaces"`
		IPs        []json.RawMessage `json:"ips"`
		Routes     []json.RawMessage `json:"routes"`
	}
	trimmed := bytes.TrimSpace(stdout)
	if len(trimmed) == 0 {
		return fmt.Errorf("%w: nothing on stdout", ErrBadResult)
	}
	if err := json.Unmarshal(trimmed, &r); err != nil || trimmed[0] != '{' {
		return fmt.Errorf("%w: stdout is no JSON object: %q", ErrBadResult, excerpt(trimmed))
	}
	for name, list := range map[string][]json.RawMessage{"interfaces": r.Interfaces, "ips": r.IPs, "routes": r.Routes} {
		for i, v := range list {
			if len(v) == 0 || v[0] != '{' {
				return fmt.Errorf("%w: %s[%d] is no object: %q", ErrBadResult, name, i, excerpt(v))
			}
		}
	}
	return nil
}

// boundedBuffer keeps the first limit bytes. With over set, the first byte too
// many closes it and ends the writer's pipe; without, the rest is dropped. It is
// written by one goroutine and read after that one ended.
type boundedBuffer struct {
	buf     bytes.Buffer
	limit   int
	dropped int64
	over    chan struct{}
}

func (b *boundedBuffer) Write(p []byte) (int, error) {
	keep := min(len(p), b.limit-b.buf.Len())
	b.buf.Write(p[:keep])
	if keep == len(p) {
		return len(p), nil
	}
	first := b.dropped == 0
	b.dropped += int64(len(p) - keep)
	if b.over == nil {
		return len(p), nil
	}
	if first {
		close(b.over)
	}
	return keep, ErrOutputTooLarge
}

// exceeded tells whether an output with a hard limit went over it.
func (b *boundedBuffer) exceeded() bool {
	if b.over == nil {
		return false
	}
	select {
	case <-b.over:
		return true
	default:
		return false
	}
}

// quote is the text on one line, with a note of what was left out.
func (b *boundedBuffer) quote() string {
	s := clip(string(bytes.TrimSpace(b.buf.Bytes())))
	if b.dropped > 0 {
		s += fmt.Sprintf(" (%d more bytes)", b.dropped)
	}
	return s
}

// clip makes one bounded line of text that came from outside.
func clip(s string) string {
	s = strings.Join(strings.Fields(strings.ToValidUTF8(s, "?")), " ")
	if len(s) > maxDiagnostic {
		s = strings.ToValidUTF8(s[:maxDiagnostic], "") + " …"
	}
	return s
}

// excerpt is the beginning of a text that is quoted only to recognise it.
func excerpt(b []byte) []byte { return b[:min(len(b), 200)] }
