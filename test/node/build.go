package node

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// BinEnv names a directory of built programs that Build then uses as they are.
const BinEnv = "BERTH_BIN"

// Root returns the root of the module's source, which holds the working
// directory of a test.
func Root() (string, error) {
	out, err := exec.Command("go", "env", "GOMOD").Output()
	if err != nil {
		return "", fmt.Errorf("module root: %w", err)
	}
	mod := strings.TrimSpace(string(out))
	if filepath.Base(mod) != "go.mod" {
		return "", fmt.Errorf("module root: no go.mod above the working directory")
	}
	return filepath.Dir(mod), nil
}

// Build compiles berthd, berth, berth-shim and berth-init from the source tree root
// into dir, as the Makefile does, and returns the directory that holds them:
// dir, or the one that BinEnv names.
func Build(ctx context.Context, root, dir string) (string, error) {
	if bin := os.Getenv(BinEnv); bin != "" {
		return bin, nil
	}
	return dir, build(ctx, root, dir, buildTags, nil, "./cmd/berthd", "./cmd/berth", "./cmd/berth-shim", "./cmd/berth-init")
}

// BuildFailpoints is Build for programs with failpoints (test/failpoint), and
// the one that stands for runtimes and plugins, fakes. It uses no built ones.
func BuildFailpoints(ctx context.Context, root, dir string) error {
	return build(ctx, root, dir, buildTags+",failpoint", nil, "./cmd/berthd", "./cmd/berth-shim", "./cmd/berth-init", "./test/fakes")
}

// buildTags are those of the Makefile.
const buildTags = "containers_image_openpgp,nri_no_wasm"

func build(ctx context.Context, root, dir, tags string, flags []string, packages ...string) error {
	for _, pkg := range packages {
		name := filepath.Base(pkg)
		args := append([]string{"build", "-tags", tags, "-trimpath", "-buildvcs=false", "-ldflags=-s -w", "-o", filepath.Join(dir, name)}, flags...)
		cmd := exec.CommandContext(ctx, "go", append(args, pkg)...)
		cmd.Dir, cmd.Env = root, append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("build %s: %w: %s", name, err, out)
		}
	}
	return nil
}
