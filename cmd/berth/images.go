package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/berthd/berth/cri/admin/api"
)

func imageList(a *app, fs *flag.FlagSet) func(context.Context, []string) error {
	fs.BoolVar(&a.quiet, "quiet", false, "print IDs only")
	return func(ctx context.Context, args []string) error {
		c, err := a.client()
		if err != nil {
			return err
		}
		query := url.Values{}
		if len(args) > 0 {
			query.Set("ref", args[0])
		}
		var images []api.Image
		if err := c.ask(ctx, http.MethodGet, api.PathImages, query, nil, &images); err != nil {
			return err
		}
		switch {
		case a.json:
			return a.printJSON(images)
		case a.quiet:
			for _, i := range images {
				fmt.Fprintln(a.out, i.ID)
			}
			return nil
		}
		return a.printImages(images)
	}
}

func (a *app) printImages(images []api.Image) error {
	t := a.table("NAME", "ID", "SIZE", "PULLED", "PINNED")
	for _, i := range images {
		names := i.Tags
		if len(names) == 0 {
			names = i.Digests
		}
		if len(names) == 0 {
			names = []string{"<none>"}
		}
		for _, n := range names {
			t.row(n, shortID(i.ID), showBytes(int64(i.Size)), showAge(time.Since(i.Pulled)), yes(i.Pinned))
		}
	}
	return t.flush()
}

func imagePull(a *app, fs *flag.FlagSet) func(context.Context, []string) error {
	q := &api.PullRequest{}
	fs.BoolVar(&q.Pin, "pin", false, "pin the image")
	fs.StringVar(&q.Username, "user", "", "user `name` for the registry; otherwise the node's own credentials are used")
	stdin := fs.Bool("password-stdin", false, "read the user's password from standard input")
	return func(ctx context.Context, args []string) error {
		if *stdin != (q.Username != "") {
			return fmt.Errorf("--user and --password-stdin belong together: %w", errUsage)
		}
		if *stdin {
			b, err := io.ReadAll(io.LimitReader(a.in, 64<<10))
			if err != nil {
				return fmt.Errorf("password: %w", err)
			}
			q.Password = strings.TrimRight(string(b), "\r\n")
		}
		q.Ref = args[0]
		c, err := a.client()
		if err != nil {
			return err
		}
		p := a.progress()
		defer p.clear()
		return c.workOn(ctx, api.PathPull, q, p.show)
	}
}

func imagePulls(a *app, fs *flag.FlagSet) func(context.Context, []string) error {
	layers := fs.Bool("layers", false, "show each layer")
	return func(ctx context.Context, _ []string) error {
		c, err := a.client()
		if err != nil {
			return err
		}
		var pulls []api.Pull
		if err := c.ask(ctx, http.MethodGet, api.PathPulls, nil, nil, &pulls); err != nil {
			return err
		}
		if a.json {
			return a.printJSON(pulls)
		}
		t := a.table("IMAGE", "STAGE", "IN ALL", "DONE", "RATE", "LIMIT", "FROM")
		for _, p := range pulls {
			var hosts []string
			for _, l := range p.Layers {
				if l.Endpoint != "" && !slices.Contains(hosts, l.Endpoint) {
					hosts = append(hosts, l.Endpoint)
				}
			}
			t.row(p.Reference, p.Stage, showAge(time.Since(p.Began)), showBytes(p.DoneBytes)+" of "+showBytes(p.TotalBytes),
				showBytes(p.Rate)+"/s", p.Limit, strings.Join(hosts, " "))
			if p.Problem != "" {
				t.row("  problem: " + p.Problem)
			}
			if !*layers {
				continue
			}
			for _, l := range p.Layers {
				t.row("  "+l.Digest, l.State, "", showBytes(l.DoneBytes)+" of "+showBytes(l.TotalBytes), showBytes(l.Rate)+"/s",
					fmt.Sprintf("net %s cpu %s disk %s", showAge(l.Network), showAge(l.CPU), showAge(l.Disk)), l.Endpoint)
			}
		}
		return t.flush()
	}
}

// each sends a request about every image that is named, answered by that image, and shows
// what failed.
func (a *app) each(ctx context.Context, refs []string, path string, request func(ref string) any, done string) error {
	c, err := a.client()
	if err != nil {
		return err
	}
	var images []*api.Image
	var errs []error
	for _, ref := range refs {
		img := new(api.Image)
		if err := c.ask(ctx, http.MethodPost, path, nil, request(ref), img); err != nil {
			fmt.Fprintf(a.err, "%s: %v\n", ref, err)
			errs = append(errs, err)
			continue
		}
		images = append(images, img)
		if !a.json {
			fmt.Fprintf(a.out, "%s %s\n", done, img.ID)
		}
	}
	if a.json {
		errs = append(errs, a.printJSON(images))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("%w: %w", errReported, err)
	}
	return nil
}

func imageRemove(a *app, fs *flag.FlagSet) func(context.Context, []string) error {
	force := fs.Bool("force", false, "also when an image is pinned")
	return func(ctx context.Context, args []string) error {
		return a.each(ctx, args, api.PathRemove, func(ref string) any { return api.RemoveRequest{Ref: ref, Force: *force} }, "removed")
	}
}

func imagePin(pinned bool) func(*app, *flag.FlagSet) func(context.Context, []string) error {
	done := map[bool]string{true: "pinned", false: "unpinned"}[pinned]
	return func(a *app, _ *flag.FlagSet) func(context.Context, []string) error {
		return func(ctx context.Context, args []string) error {
			return a.each(ctx, args, api.PathPin, func(ref string) any { return api.PinRequest{Ref: ref, Pinned: pinned} }, done)
		}
	}
}
