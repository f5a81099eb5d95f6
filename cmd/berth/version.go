package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"net/http"
	"runtime"
	"runtime/debug"
	"strings"

	"github.com/berthd/berth/cri/admin/api"
)

// release is set by the build: -ldflags "-X main.release=1.2.3".
var release = ""

func versionText() string {
	v := release
	if b, ok := debug.ReadBuildInfo(); v == "" && ok && strings.HasPrefix(b.Main.Version, "v") {
		v = strings.TrimPrefix(b.Main.Version, "v")
	}
	if v == "" {
		v = "0.0.0-dev"
	}
	return fmt.Sprintf("%s (%s, %s/%s)", v, runtime.Version(), runtime.GOOS, runtime.GOARCH)
}

// versionVerb prints both versions; a berthd that is down is no failure of it.
func versionVerb(a *app, _ *flag.FlagSet) func(context.Context, []string) error {
	return func(ctx context.Context, _ []string) error {
		own := versionText()
		var daemon api.Version
		c, err := a.client()
		if err == nil {
			err = c.ask(ctx, http.MethodGet, api.PathVersion, nil, nil, &daemon)
		}
		if a.json {
			out := map[string]any{"berth": own}
			if err == nil {
				out["berthd"] = daemon
			}
			return a.printJSON(out)
		}
		fmt.Fprintln(a.out, "berth ", own)
		if err != nil {
			fmt.Fprintln(a.out, "berthd", err)
			return nil
		}
		fmt.Fprintf(a.out, "berthd %s (process %d)\n", printable(daemon.Version), daemon.PID)
		return nil
	}
}

func printLine(a *app, v any) error { return json.NewEncoder(a.out).Encode(v) }
