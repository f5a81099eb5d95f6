package admin

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"time"

	"github.com/berthd/berth/cri/admin/api"
	"github.com/berthd/berth/imageservice"
)

func (s *Server) routes() {
	s.get(api.PathVersion, func(*http.Request) (any, error) {
		return api.Version{Version: s.deps.Version, PID: os.Getpid()}, nil
	})
	s.get(api.PathConfig, func(*http.Request) (any, error) {
		values, toml := s.deps.Config()
		return api.Config{Values: values, TOML: toml}, nil
	})
	s.get(api.PathImages, s.images)
	// What the image service tells is sent as it is: its JSON is that of package api.
	s.get(api.PathPulls, func(*http.Request) (any, error) { return s.deps.Puller.Pulls(), nil })
	s.get(api.PathOps, func(*http.Request) (any, error) { return s.ops(), nil })
	s.get(api.PathExplain, s.explain)
	post(s, api.PathRemove, s.remove)
	post(s, api.PathPin, s.pin)
	long(s, api.PathPull, s.pull)
	long(s, api.PathVerify, s.verify)
	long(s, api.PathLeaks, inspection(s.deps.Leaks))
	long(s, api.PathCheck, inspection(s.deps.Check))
	s.mux.HandleFunc("GET "+api.PathExport, s.export)
	s.mux.HandleFunc("POST "+api.PathImport, s.importImages)
}

func (s *Server) images(r *http.Request) (any, error) {
	list := s.deps.Images.List()
	if ref := r.URL.Query().Get("ref"); ref != "" {
		img, err := s.deps.Images.Get(ref)
		if err != nil {
			return nil, err
		}
		list = []imageservice.Image{img}
	}
	out := make([]*api.Image, len(list))
	for i := range list {
		out[i] = toImage(&list[i])
	}
	return out, nil
}

func (s *Server) explain(r *http.Request) (any, error) {
	q := r.URL.Query()
	ctx, cancel := context.WithTimeout(r.Context(), askTimeout)
	defer cancel()
	return s.deps.Puller.Explain(ctx, q.Get("ref"), q.Get("probe") == "1")
}

func (s *Server) remove(ctx context.Context, q *api.RemoveRequest) (any, error) {
	img, err := s.deps.Images.Get(q.Ref)
	if errors.Is(err, imageservice.ErrNotFound) {
		img = imageservice.Image{ID: q.Ref} // it may be hidden, which Remove knows
	} else if err != nil {
		return nil, err
	}
	if img.Pinned && !q.Force {
		return nil, fmt.Errorf("image %q is pinned: %w without force", q.Ref, errConflict)
	}
	return toImage(&img), s.deps.Images.Remove(ctx, q.Ref)
}

func (s *Server) pin(_ context.Context, q *api.PinRequest) (any, error) {
	img, err := s.deps.Images.Pin(q.Ref, q.Pinned)
	if err != nil {
		return nil, err
	}
	if img.Pinned != q.Pinned {
		return nil, fmt.Errorf("image %q stays pinned, by pinned_images in the configuration: %w", q.Ref, errConflict)
	}
	return toImage(&img), nil
}

// pull pulls and tells at what stage the pull is, which another caller may have begun.
func (s *Server) pull(ctx context.Context, q *api.PullRequest, tell func(api.Record)) error {
	var auth *imageservice.Auth
	if q.Username != "" {
		auth = &imageservice.Auth{Username: q.Username, Password: q.Password}
	}
	type result struct {
		img imageservice.Image
		err error
	}
	done := make(chan result, 1)
	go func() {
		img, err := s.deps.Puller.Pull(ctx, q.Ref, auth)
		done <- result{img, err}
	}()
	tick := time.NewTicker(reportEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			for _, p := range s.deps.Puller.Pulls() {
				if p.Reference == q.Ref {
					tell(api.Record{Ref: q.Ref, Stage: p.Stage, Bytes: p.DoneBytes, Total: p.TotalBytes, Rate: p.Rate})
				}
			}
		case r := <-done:
			if r.err == nil && q.Pin {
				r.img, r.err = s.deps.Images.Pin(r.img.ID, true)
			}
			if r.err != nil {
				return r.err
			}
			tell(api.Record{Ref: q.Ref, Image: toImage(&r.img)})
			return nil
		}
	}
}

func toImage(img *imageservice.Image) *api.Image {
	return &api.Image{
		ID: img.ID, Tags: img.RepoTags, Digests: img.RepoDigests, Size: img.Size, Pinned: img.Pinned,
		Created: img.Created, Pulled: img.Pulled, OS: img.OS, Architecture: img.Architecture, Variant: img.Variant,
	}
}
