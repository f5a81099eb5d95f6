package node

import (
	"bytes"
	"context"
	"errors"
	"os/exec"
	"path/filepath"
)

// Tool runs the administrator's tool on the node and returns what it wrote and its
// exit code. The error is of a tool that did not run to its end.
func (n *Node) Tool(ctx context.Context, args ...string) (out, errOut string, code int, err error) {
	var o, e bytes.Buffer
	cmd := exec.CommandContext(ctx, filepath.Join(n.opts.Bin, "berth"), append(args, "--config", n.Config)...)
	cmd.Stdout, cmd.Stderr = &o, &e
	err = cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		return "", "", 0, err
	}
	return o.String(), e.String(), cmd.ProcessState.ExitCode(), nil
}
