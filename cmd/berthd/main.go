// Command berthd is the daemon of berth: it serves the Kubernetes container
// runtime interface on a unix socket.
//
// Its parts are put together in wire.go, on one screen. Around that: the
// configuration (config.go describes every key once; load.go reads files and
// names lines), the socket (listen.go), the service manager (notify.go) and what
// a signal does (signals.go):
//
//	SIGTERM, SIGINT  stop serving; every container goes on
//	SIGHUP           read the configuration again
//	SIGUSR1          write the stacks of all goroutines to the log
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"strconv"

	"k8s.io/klog/v2"
	"k8s.io/klog/v2/textlogger"
)

func main() { os.Exit(command(os.Args[1:], os.Stdout, os.Stderr)) }

// command runs the program and returns its exit status: 0, 1 for a failure, 2
// for a wrong command line.
func command(args []string, stdout, stderr io.Writer) int {
	opt, err := parseFlags(args, stderr)
	switch {
	case errors.Is(err, flag.ErrHelp):
		return 0
	case err != nil:
		return 2
	case opt.version:
		fmt.Fprintln(stdout, "berthd", versionText())
		return 0
	case opt.printConfig:
		err = printDefault(stdout)
	case opt.inspect != "":
		err = inspect(opt.source, opt.inspect, opt.mend, stdout, stderr)
	case opt.checkConfig:
		if _, err = opt.source.load(); err == nil {
			fmt.Fprintln(stdout, "configuration is valid")
		}
	default:
		err = serve(opt.source, stderr)
	}
	if err != nil {
		fmt.Fprintln(stderr, "berthd:", err)
		return 1
	}
	return 0
}

// options are what the command line says.
type options struct {
	source                                  source
	version, printConfig, checkConfig, mend bool
	inspect                                 string
}

func parseFlags(args []string, stderr io.Writer) (options, error) {
	o := options{source: source{file: defaultConfig}}
	fs := flag.NewFlagSet("berthd", flag.ContinueOnError)
	fs.SetOutput(stderr)
	fs.BoolVar(&o.version, "version", false, "print the version and exit")
	fs.BoolVar(&o.printConfig, "print-config", false, "print a configuration file with all defaults and exit")
	fs.BoolVar(&o.checkConfig, "check-config", false, "check the configuration and exit")
	fs.StringVar(&o.inspect, "inspect", "", "`look` at a node, but for doctor one whose daemon does not run, and exit: leaks, check, ops or doctor; prints records of JSON, for the command berth")
	fs.BoolVar(&o.mend, "mend", false, "with --inspect: put right what can be")
	fs.Func("config", "configuration `file`, which has to exist (default "+defaultConfig+", which need not)", func(s string) error {
		o.source.file, o.source.required = s, true
		return nil
	})
	set := func(name, key, usage string, parse func(string) (any, error)) {
		fs.Func(name, usage, func(s string) error {
			v, err := parse(s)
			o.source.flags = append(o.source.flags, setting{"--" + name, key, v})
			return err
		})
	}
	asText := func(s string) (any, error) { return s, nil }
	asNumber := func(s string) (any, error) { return strconv.ParseInt(s, 10, 64) }
	set("socket", "socket", "unix socket to serve on, the key socket", asText)
	set("state-dir", "state_dir", "directory of what survives a reboot, the key state_dir", asText)
	set("run-dir", "run_dir", "directory of what does not, the key run_dir", asText)
	set("log-level", "log_level", "verbosity of the log, 0 to 10, the key log_level", asNumber)
	set("v", "log_level", "the same as --log-level", asNumber)
	if err := fs.Parse(args); err != nil {
		return o, err
	}
	if o.mend && o.inspect == "" {
		fmt.Fprintln(stderr, "berthd: --mend: only with --inspect")
		return o, errors.New("--mend without --inspect")
	}
	if fs.NArg() > 0 {
		fmt.Fprintf(stderr, "berthd: unexpected argument %q\n", fs.Arg(0))
		return o, errors.New("unexpected argument")
	}
	return o, nil
}

// serve is the daemon: it returns when a signal ended it, or with an error.
func serve(src source, stderr io.Writer) error {
	c, err := src.load()
	if err != nil {
		return err
	}
	if err := adapt(c); err != nil {
		return err
	}
	logs := textlogger.NewConfig(textlogger.Verbosity(int(c.LogLevel)), textlogger.Output(stderr))
	log := textlogger.NewLogger(logs)
	klog.SetLoggerWithOptions(log, klog.ContextualLogger(true))
	log.Info("Starting berthd", "version", version(), "stateDir", c.StateDir, "runDir", c.RunDir, "config", src.file)
	if err := setOOMScore(c.OOMScoreAdj); err != nil {
		log.Info("OOM score not set", "oomScoreAdj", c.OOMScoreAdj, "err", err)
	}

	ctx, stop := context.WithCancel(klog.NewContext(context.Background(), log))
	defer stop()
	d := &daemon{source: src, config: c, logs: logs, stop: stop}
	if d.manager, err = newNotifier(); err != nil {
		return err
	}
	d.manager.status("Starting")
	signals := d.catch(ctx)
	defer signals()
	if err := d.run(ctx); err != nil && !(ctx.Err() != nil && errors.Is(err, context.Canceled)) {
		return err
	}
	log.Info("Ended, containers go on")
	return nil
}
