package node

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
)

// ClockEnv names a file with the number of seconds, "-60" say, by which the clock of
// programs that BuildShifted has built is ahead of the machine's. It is read each
// time that they ask for the time.
const ClockEnv = "BERTH_TEST_CLOCK"

// shift is put into package time, whose Now is renamed. The monotonic part of a time
// is left as it is, as when somebody sets the machine's clock.
const shift = `package time

import "syscall"

func Now() Time {
	t := unshifted()
	path, ok := syscall.Getenv("` + ClockEnv + `")
	if !ok {
		return t
	}
	fd, err := syscall.Open(path, syscall.O_RDONLY|syscall.O_CLOEXEC, 0)
	if err != nil {
		return t
	}
	var b [20]byte
	n, _ := syscall.Read(fd, b[:])
	syscall.Close(fd)
	sign, v := int64(1), int64(0)
	for _, c := range b[:max(n, 0)] {
		if c == '-' {
			sign = -1
		} else if c >= '0' && c <= '9' {
			v = v*10 + int64(c-'0')
		}
	}
	t.addSec(sign * v)
	return t
}
`

// BuildShifted is Build for programs whose clock can be set without that of the
// machine, in all that they are made of: the compiler is given another package time. It
// takes a minute or two, as everything is compiled anew.
func BuildShifted(ctx context.Context, root, dir string) error {
	out, err := exec.CommandContext(ctx, "go", "env", "GOROOT").Output()
	if err != nil {
		return fmt.Errorf("clock: GOROOT: %w", err)
	}
	std := filepath.Join(strings.TrimSpace(string(out)), "src", "time")
	source, err := os.ReadFile(filepath.Join(std, "time.go"))
	if err != nil {
		return fmt.Errorf("clock: %w", err)
	}
	const now = "\nfunc Now() Time {"
	if strings.Count(string(source), now) != 1 {
		return fmt.Errorf("clock: %s: not as it is known", std)
	}
	replace := map[string]string{}
	for name, text := range map[string]string{"time.go": strings.Replace(string(source), now, "\nfunc unshifted() Time {", 1), "shift.go": shift} {
		replace[filepath.Join(std, name)] = filepath.Join(dir, name)
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			return fmt.Errorf("clock: %w", err)
		}
	}
	overlay, err := json.Marshal(map[string]any{"Replace": replace})
	if err != nil {
		return fmt.Errorf("clock: %w", err)
	}
	file := filepath.Join(dir, "overlay.json")
	if err := os.WriteFile(file, overlay, 0o600); err != nil {
		return fmt.Errorf("clock: %w", err)
	}
	return build(ctx, root, dir, buildTags, []string{"-overlay", file}, "./cmd/berthd", "./cmd/berth-shim", "./cmd/berth-init")
}

// SetClock puts the clock of a node ahead of the machine's, or with a negative number
// behind it, in seconds. file is what ClockEnv names.
func SetClock(file string, seconds int64) error {
	if err := os.WriteFile(file+".new", []byte(strconv.FormatInt(seconds, 10)), 0o600); err != nil {
		return fmt.Errorf("clock: %w", err)
	}
	if err := os.Rename(file+".new", file); err != nil { // never half written
		return fmt.Errorf("clock: %w", err)
	}
	return nil
}
