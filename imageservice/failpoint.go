//go:build !failpoint

package imageservice

import "context"

// failpoint is passed before each stage of a pull, of a layer's making and of a removal.
// Tests build it in with the tag "failpoint" (test/failpoint); here it is nothing.
func failpoint(context.Context, string, string) error { return nil }
