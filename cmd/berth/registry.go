package main

import (
	"cmp"
	"context"
	"flag"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/berthd/berth/cri/admin/api"
)

func registryExplain(a *app, fs *flag.FlagSet) func(context.Context, []string) error {
	probe := fs.Bool("probe", false, "ask each endpoint for the manifest and show what it answers")
	return func(ctx context.Context, args []string) error {
		c, err := a.client()
		if err != nil {
			return err
		}
		query := url.Values{"ref": {args[0]}}
		if *probe {
			query.Set("probe", "1")
		}
		var plan api.Plan
		if err := c.ask(ctx, http.MethodGet, api.PathExplain, query, nil, &plan); err != nil {
			return err
		}
		if a.json {
			return a.printJSON(plan)
		}
		a.printPlan(plan)
		return nil
	}
}

func (a *app) printPlan(plan api.Plan) {
	say := func(format string, args ...any) { fmt.Fprintln(a.out, printable(fmt.Sprintf(format, args...))) }
	say("registries.conf: %s", plan.Registries)
	say("hosts.toml below: %s", plan.Hosts)
	say("signature policy: %s", cmp.Or(plan.Policy, "none, every image is accepted"))
	for i, c := range plan.Candidates {
		say("")
		say("%d. %s (%s)", i+1, c.Image, c.Reason)
		if c.Source != "" {
			say("   endpoints from %s", c.Source)
		}
		if c.Ignored != "" {
			say("   ignored: %s", c.Ignored)
		}
		if c.Error != "" {
			say("   error: %s", c.Error)
		}
		for j, e := range c.Endpoints {
			say("   %d.%d %s", i+1, j+1, e.URL)
			for _, l := range endpointLines(e) {
				say("       %s", l)
			}
		}
	}
}

// endpointLines is what is worth knowing about an endpoint.
func endpointLines(e api.Endpoint) []string {
	kind := map[bool]string{true: "mirror", false: "registry"}[e.Mirror]
	var may []string
	if e.Resolve {
		may = append(may, "tags")
	}
	if e.Pull {
		may = append(may, "content")
	}
	lines := []string{fmt.Sprintf("%s, repository %s, asked for %s", kind, e.Repository, cmp.Or(strings.Join(may, " and "), "nothing"))}
	add := func(name, value string) {
		if value != "" {
			lines = append(lines, name+": "+value)
		}
	}
	credentials := cmp.Or(e.Credentials, "none")
	if e.Username != "" {
		credentials += " (user " + e.Username + ")"
	}
	add("credentials", credentials)
	add("CA files", strings.Join(e.CAFiles, ", "))
	for _, p := range e.ClientFiles {
		add("client certificate", strings.TrimSuffix(p.Certificate+", key "+p.Key, ", key "))
	}
	if e.SkipVerify {
		lines = append(lines, "any certificate is accepted")
	}
	add("headers", strings.Join(e.Headers, ", "))
	add("proxy", e.Proxy)
	if p := e.Probe; p != nil && p.OK {
		lines = append(lines, fmt.Sprintf("answered in %s: %s %s, over %s, authorization %s", p.Took.Round(time.Millisecond), p.MediaType, p.Digest, p.Scheme, cmp.Or(p.Auth, "none")))
	} else if p != nil {
		lines = append(lines, fmt.Sprintf("failed after %s: %s", p.Took.Round(time.Millisecond), p.Error))
	}
	return lines
}
