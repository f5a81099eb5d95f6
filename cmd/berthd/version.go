package main

import (
	"fmt"
	"runtime"
	"runtime/debug"
	"strings"
)

// release is the version of a release build, in the form of semantic
// versioning without a "v": go build -ldflags "-X main.release=1.2.3".
var release = ""

// unreleased is the version of every other build.
const unreleased = "0.0.0-dev"

// version is berth's version, in the form of semantic versioning.
func version() string {
	if release != "" {
		return release
	}
	if b, ok := debug.ReadBuildInfo(); ok && strings.HasPrefix(b.Main.Version, "v") {
		return strings.TrimPrefix(b.Main.Version, "v")
	}
	return unreleased
}

// versionText is the version with what identifies a build.
func versionText() string {
	commit := "unknown commit"
	if b, ok := debug.ReadBuildInfo(); ok {
		for _, s := range b.Settings {
			if s.Key == "vcs.revision" {
				commit = s.Value
			}
		}
	}
	return fmt.Sprintf("%s (%s, %s, %s/%s)", version(), commit, runtime.Version(), runtime.GOOS, runtime.GOARCH)
}
