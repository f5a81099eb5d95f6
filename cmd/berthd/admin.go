package main

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/berthd/berth/cri"
	"github.com/berthd/berth/cri/admin"
	"github.com/berthd/berth/cri/admin/api"
	"github.com/berthd/berth/sandbox"
)

// serveAdmin opens the admin socket and answers on it until the function that it
// returns is called.
func (d *daemon) serveAdmin(ctx context.Context, p parts, edge *cri.Server) (stop func(), err error) {
	s, err := admin.New(admin.Deps{Images: p.images, Puller: p.images, Importer: p.images, Exporter: p.images, Verifier: p.images,
		Ops:   func() []api.Op { return underWay(p.pods, edge) },
		Leaks: p.leaks, Check: p.check, Config: d.inForce, Version: version()})
	if err != nil {
		return nil, err
	}
	l, err := listenUnix(ctx, filepath.Join(d.config.RunDir, "admin.sock"))
	if err != nil {
		return nil, fmt.Errorf("admin socket: %w", err)
	}
	return background(ctx, "admin", func(ctx context.Context) error { return s.Serve(ctx, l) }), nil
}

// underWay puts together what the parts of the daemon are at.
func underWay(pods *sandbox.Service, edge *cri.Server) []api.Op {
	var out []api.Op
	for _, o := range pods.Ops() {
		kind := api.KindOperation
		if o.Background {
			kind = api.KindBackground
		}
		out = append(out, api.Op{Kind: kind, What: o.Verb, Object: o.Object, Name: o.Name, Step: o.Step,
			Began: o.Began, Age: o.Age, StepAge: o.StepAge, Waiters: o.Waiters})
	}
	for _, c := range edge.Calls() {
		kind, object, name := api.KindCall, c.ID, pods.NameOf(c.ID)
		if c.Session {
			kind = api.KindSession
		}
		switch {
		case object == "":
			object = c.About
		case name == "":
			name = c.About
		}
		out = append(out, api.Op{Kind: kind, What: c.Method, Object: object, Name: name, Began: c.Began, Age: c.Age, StepAge: c.Age, Call: c.Number})
	}
	return out
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
