package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/url"
	"path/filepath"

	"github.com/berthd/berth/cri/admin/api"
)

func imageImport(a *app, fs *flag.FlagSet) func(context.Context, []string) error {
	name := fs.String("name", "", "`reference` for the image, in place of its names in the archive; without a tag where the archive has tags")
	pin := fs.Bool("pin", false, "pin the images")
	return func(ctx context.Context, args []string) error {
		c, err := a.client()
		if err != nil {
			return err
		}
		p := a.progress()
		defer p.clear()
		var errs []error
		for _, file := range args {
			query := url.Values{}
			if *name != "" {
				query.Set("name", *name)
			}
			if *pin {
				query.Set("pin", "1")
			}
			err := a.importOne(ctx, c, file, query, p)
			if err != nil && len(args) > 1 {
				p.clear()
				fmt.Fprintf(a.err, "%s: %v\n", file, err)
				err = fmt.Errorf("%w: %w", errReported, err)
			}
			errs = append(errs, err)
		}
		return errors.Join(errs...)
	}
}

// importOne sends a path, which berthd opens as this process sees it, or standard input.
func (a *app) importOne(ctx context.Context, c *client, file string, query url.Values, p *progress) error {
	var body io.Reader
	if file == "-" {
		body = a.in
	} else {
		abs, err := filepath.Abs(file)
		if err != nil {
			return err
		}
		query.Set("path", abs)
	}
	return c.work(ctx, api.PathImport+"?"+query.Encode(), body, p.show)
}
