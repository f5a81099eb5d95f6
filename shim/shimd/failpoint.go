//go:build !failpoint

package shimd

// point is a failpoint, of which the name tells what comes next. Tests build it
// in with the tag "failpoint"; here it is nothing.
func point(string) *stepError { return nil }
