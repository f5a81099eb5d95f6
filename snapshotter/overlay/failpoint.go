//go:build !failpoint

package overlay

import "context"

// failpoint is passed before each change on disk and in the book.
// Tests build it in with the tag "failpoint" (test/failpoint); here it is nothing.
func failpoint(context.Context, string, string) error { return nil }
