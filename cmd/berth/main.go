// Command berth is the tool of a node's administrator: what a container runtime's
// clients, such as crictl, have no verb for. It talks to berthd through a unix socket
// that only root may use (package cri/admin/api).
//
// The verbs are one table, in verbs.go; each has its file. How things are shown is in
// print.go and progress.go. Exit codes:
//
//	0  done
//	1  failed; the reason is on standard error
//	2  wrong command line
//	3  berthd cannot be reached
//	4  an image that was named is not there
//	5  something was found and is still there (image verify, leaks, check, doctor)
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"

	"github.com/berthd/berth/cri/admin/api"
)

// The exit codes.
const (
	exitFailed = iota + 1
	exitUsage
	exitUnreachable
	exitNotFound
	exitDamaged
)

// errUsage: the command line is wrong. Its text has been shown with the usage.
var errUsage = errors.New("usage")

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// app is one run of the program.
type app struct {
	in       io.Reader
	out, err io.Writer
	socket   string // "" to find it out
	config   string // of berthd
	json     bool
	quiet    bool
}

// run executes a command line and returns the exit code.
func run(ctx context.Context, args []string, in io.Reader, out, errOut io.Writer) int {
	a := &app{in: in, out: out, err: errOut, config: defaultConfig}
	v, rest := find(args)
	if v == nil {
		return a.noVerb(rest)
	}
	fs := a.flags(v)
	set := v.setup(a, fs)
	operands, err := parse(fs, rest)
	if err == nil && (len(operands) < v.least || v.most >= 0 && len(operands) > v.most) {
		err = fmt.Errorf("%d arguments, want %s", len(operands), v.args)
		if v.args == "" {
			err = fmt.Errorf("argument %q: want none", operands[0])
		}
	}
	switch {
	case errors.Is(err, flag.ErrHelp):
		v.help(out, fs)
		return 0
	case err != nil:
		fmt.Fprintf(errOut, "berth %s: %v\nUsage: berth %s\n", v.name, err, v.usage())
		return exitUsage
	}
	if err := set(ctx, operands); err != nil {
		if !errors.Is(err, errReported) {
			fmt.Fprintf(errOut, "berth %s: %v\n", v.name, err)
		}
		return exitCode(err)
	}
	return 0
}

// errReported: what failed has been shown, one by one.
var errReported = errors.New("see above")

func exitCode(err error) int {
	var e *api.Error
	switch {
	case errors.Is(err, errUsage):
		return exitUsage
	case errors.Is(err, errUnreachable):
		return exitUnreachable
	case errors.Is(err, errDamage), errors.Is(err, errLeft), errors.Is(err, errFindings):
		return exitDamaged
	case errors.As(err, &e) && e.Code == api.CodeNotFound:
		return exitNotFound
	}
	return exitFailed
}

// errDamage: a verification found some.
var errDamage = errors.New("damage found")

// flags are those that every verb has.
func (a *app) flags(v *verb) *flag.FlagSet {
	fs := flag.NewFlagSet("berth "+v.name, flag.ContinueOnError)
	fs.SetOutput(io.Discard)
	fs.StringVar(&a.socket, "socket", os.Getenv("BERTH_ADMIN_SOCKET"), "berthd's admin `socket` (default admin.sock in the run_dir of the configuration; environment BERTH_ADMIN_SOCKET)")
	fs.StringVar(&a.config, "config", a.config, "berthd's configuration `file`")
	fs.BoolVar(&a.json, "json", false, "print JSON")
	return fs
}

// parse takes flags before, between and after the operands; "--" ends them.
func parse(fs *flag.FlagSet, args []string) (operands []string, err error) {
	for {
		if err := fs.Parse(args); err != nil {
			return nil, err
		}
		rest := fs.Args()
		if len(rest) == 0 {
			return operands, nil
		}
		if n := len(args) - len(rest); n > 0 && args[n-1] == "--" {
			return append(operands, rest...), nil
		}
		operands, args = append(operands, rest[0]), rest[1:]
	}
}

// find returns the verb that the arguments begin with, and what follows it.
func find(args []string) (*verb, []string) {
	for n := min(2, len(args)); n > 0; n-- {
		name := strings.Join(args[:n], " ")
		i := slices.IndexFunc(verbs, func(v *verb) bool { return v.name == name })
		if i >= 0 {
			return verbs[i], args[n:]
		}
	}
	return nil, args
}

// noVerb answers a command line without a known verb.
func (a *app) noVerb(args []string) int {
	word := ""
	if len(args) > 0 {
		word = args[0]
	}
	help := slices.ContainsFunc(args, func(s string) bool { return s == "-h" || s == "--help" || s == "-help" })
	if help || word == "help" {
		if word == "help" {
			word = strings.Join(args[1:], " ")
			if v, _ := find(args[1:]); v != nil {
				fs := a.flags(v)
				v.setup(a, fs)
				v.help(a.out, fs)
				return 0
			}
		}
		if strings.HasPrefix(word, "-") {
			word = ""
		}
		overview(a.out, word)
		return 0
	}
	if word == "--version" || word == "-version" {
		fmt.Fprintln(a.out, "berth", versionText())
		return 0
	}
	if word != "" {
		group := slices.ContainsFunc(verbs, func(v *verb) bool { return strings.HasPrefix(v.name, word+" ") })
		if !group {
			fmt.Fprintf(a.err, "berth: unknown command %q\n", strings.Join(args[:min(2, len(args))], " "))
			word = ""
		}
	}
	overview(a.err, word)
	return exitUsage
}
