package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/berthd/berth/cri/admin/api"
)

// berthd runs the daemon's program, which knows its configuration, with arguments that
// make it print something and end.
func (a *app) berthd(ctx context.Context, args ...string) error {
	return a.runBerthd(ctx, a.out, args...)
}

// runBerthd is berthd with another standard output.
func (a *app) runBerthd(ctx context.Context, out io.Writer, args ...string) error {
	program := "berthd"
	if self, err := os.Executable(); err == nil {
		if p, err := exec.LookPath(filepath.Join(filepath.Dir(self), program)); err == nil {
			program = p
		}
	}
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Stdout, cmd.Stderr = out, a.err
	err := cmd.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return fmt.Errorf("%w: %w", errReported, err) // it said why
	}
	if err != nil {
		return fmt.Errorf("the program berthd, beside berth or in PATH: %w", err)
	}
	return nil
}

// lookAlone has berthd's program look at the node by itself, and returns its records.
func (a *app) lookAlone(ctx context.Context, what string, more ...string) (io.Reader, error) {
	args := append([]string{"--inspect", what}, configFlag(a.config)...)
	var out bytes.Buffer
	err := a.runBerthd(ctx, &out, append(args, more...)...)
	return &out, err
}

func configDefault(a *app, _ *flag.FlagSet) func(context.Context, []string) error {
	return func(ctx context.Context, _ []string) error {
		if a.json {
			return fmt.Errorf("--json: the defaults are a file with comments: %w", errUsage)
		}
		return a.berthd(ctx, "--print-config")
	}
}

func configValidate(a *app, _ *flag.FlagSet) func(context.Context, []string) error {
	return func(ctx context.Context, args []string) error {
		file := a.config
		if len(args) > 0 {
			file = args[0]
		}
		check := append([]string{"--check-config"}, configFlag(file)...)
		if !a.json {
			return a.berthd(ctx, check...)
		}
		err := a.runBerthd(ctx, io.Discard, check...)
		return errors.Join(a.printJSON(map[string]any{"file": file, "valid": err == nil}), err)
	}
}

// configFlag is how berthd is told of a file: the usual one need not exist; one that
// is named has to.
func configFlag(file string) []string {
	if file == defaultConfig {
		return nil
	}
	return []string{"--config", file}
}

func configPrint(a *app, _ *flag.FlagSet) func(context.Context, []string) error {
	return func(ctx context.Context, _ []string) error {
		c, err := a.client()
		if err != nil {
			return err
		}
		var conf api.Config
		if err := c.ask(ctx, http.MethodGet, api.PathConfig, nil, nil, &conf); err != nil {
			return err
		}
		if a.json {
			return a.printJSON(conf.Values)
		}
		_, err = fmt.Fprint(a.out, conf.TOML)
		return err
	}
}
