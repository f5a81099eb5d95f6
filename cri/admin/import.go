package admin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berthd/berth/cri/admin/api"
	"github.com/berthd/berth/imageservice"
)

// bodyTimeout is for how long a client may pause in the middle of an archive.
const bodyTimeout = 10 * time.Minute

// importImages takes images from a file or directory of the client, or from the body.
func (s *Server) importImages(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	path := q.Get("path")
	var f *os.File
	if path != "" {
		var err error
		if f, err = openAs(r.Context(), path); err != nil {
			reply(w, r, nil, err)
			return
		}
		defer f.Close()
	}
	s.stream(w, r, func(ctx context.Context, tell func(api.Record)) error {
		failed := 0
		o := imageservice.ImportOptions{Name: q.Get("name"), Pin: q.Get("pin") == "1", Report: func(rep imageservice.ImportReport) {
			if rep.Err != nil {
				failed++
			}
			tell(toRecord(rep))
		}}
		var err error
		if f != nil {
			_, err = s.deps.Importer.Import(ctx, f, o)
		} else {
			c := http.NewResponseController(w)
			// What was already answered must not end the reading of the body.
			if err := c.EnableFullDuplex(); err != nil {
				return err
			}
			_, err = s.deps.Importer.ImportStream(ctx, &patient{r.Body, c}, o)
		}
		if failed > 0 { // each has been told
			return &partly{failed, err}
		}
		return err
	})
}

// partly is the error of an import of which some images failed.
type partly struct {
	failed int
	err    error
}

func (p *partly) Error() string { return fmt.Sprintf("%d of the images not imported", p.failed) }
func (p *partly) Unwrap() error { return p.err }

// patient gives the client time for each piece of the body.
type patient struct {
	io.Reader
	c *http.ResponseController
}

// Read implements io.Reader.
func (p *patient) Read(b []byte) (int, error) {
	_ = p.c.SetReadDeadline(time.Now().Add(bodyTimeout))
	n, err := p.Reader.Read(b)
	if err != nil {
		_ = p.c.SetReadDeadline(time.Time{}) // it would end the request, too
	}
	return n, err
}

// openAs opens a path as the client's process sees it, which may have another root.
func openAs(ctx context.Context, path string) (*os.File, error) {
	if !filepath.IsAbs(path) || strings.ContainsRune(path, 0) {
		return nil, fmt.Errorf("path %.200q: %w: not absolute", path, errInvalid)
	}
	pid, _ := ctx.Value(peerKey{}).(int)
	root, err := unix.Open(fmt.Sprintf("/proc/%d/root", pid), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("root of process %d: %w", pid, err)
	}
	defer unix.Close(root)
	fd, err := unix.Openat2(root, path, &unix.OpenHow{
		Flags:   unix.O_RDONLY | unix.O_NONBLOCK | unix.O_CLOEXEC, // not to wait at a fifo
		Resolve: unix.RESOLVE_IN_ROOT,
	})
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errInvalid, &os.PathError{Op: "open", Path: path, Err: err})
	}
	f := os.NewFile(uintptr(fd), path)
	st, err := f.Stat()
	if err == nil && !st.Mode().IsRegular() && !st.IsDir() {
		err = fmt.Errorf("path %.200q: %w: neither file nor directory", path, errInvalid)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

func toRecord(rep imageservice.ImportReport) api.Record {
	rec := api.Record{Ref: rep.Name, Stage: rep.Stage, Bytes: rep.Bytes, Total: rep.Total}
	if rep.Image != nil {
		rec.Image, rec.Note = toImage(rep.Image), "imported"
		if rep.Present {
			rec.Note = "present"
		}
	}
	if rep.Err != nil {
		rec.Error, _ = toError(rep.Err)
	}
	return rec
}
