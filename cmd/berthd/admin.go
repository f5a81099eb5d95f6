package main

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/berthd/berth/cri/admin"
)

// serveAdmin opens the admin socket and answers on it until the function that it
// returns is called.
func (d *daemon) serveAdmin(ctx context.Context, p parts) (stop func(), err error) {
	s, err := admin.New(admin.Deps{Images: p.images, Puller: p.images, Importer: p.images, Exporter: p.images, Verifier: p.images,
		Leaks: p.leaks, Config: d.inForce, Version: version()})
	if err != nil {
		return nil, err
	}
	l, err := listenUnix(ctx, filepath.Join(d.config.RunDir, "admin.sock"))
	if err != nil {
		return nil, fmt.Errorf("admin socket: %w", err)
	}
	return background(ctx, "admin", func(ctx context.Context) error { return s.Serve(ctx, l) }), nil
}

// inForce is the configuration by key, and what differs from the defaults as a file.
func (d *daemon) inForce() (map[string]any, string) {
	values, _ := d.show().(map[string]any)
	d.mu.Lock()
	defer d.mu.Unlock()
	var b strings.Builder
	d.config.printInForce(&b)
	return values, b.String()
}
