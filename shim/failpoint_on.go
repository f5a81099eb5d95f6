//go:build failpoint

package shim

import "os"

// Shims have the failpoints of the process that starts them.
func init() {
	if dir := os.Getenv("BERTH_FAILPOINTS"); dir != "" {
		shimEnv = append(shimEnv, "BERTH_FAILPOINTS="+dir)
	}
}
