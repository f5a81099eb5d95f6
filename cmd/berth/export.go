package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/berthd/berth/cri/admin/api"
)

func imageExport(a *app, fs *flag.FlagSet) func(context.Context, []string) error {
	file := fs.String("o", "", "`file` to write (default standard output)")
	original := fs.Bool("original", false, "fetch the layers from the registry again and keep all digests")
	return func(ctx context.Context, args []string) error {
		if f, ok := a.out.(*os.File); ok && *file == "" {
			if _, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS); err == nil {
				return fmt.Errorf("standard output is a terminal, name a file with -o: %w", errUsage)
			}
		}
		c, err := a.client()
		if err != nil {
			return err
		}
		query := url.Values{"ref": args}
		if *original {
			query.Set("original", "1")
		}
		p := a.progress()
		defer p.clear()
		p.show(api.Record{Ref: "export", Stage: "preparing"})
		resp, err := c.do(ctx, http.MethodGet, api.PathExport+"?"+query.Encode(), nil)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		n, err := a.save(*file, resp, p)
		if err != nil {
			return err
		}
		p.clear()
		if a.json && *file != "" {
			return a.printJSON(map[string]any{"file": *file, "bytes": n})
		}
		if !a.json {
			fmt.Fprintf(a.err, "%s written\n", showBytes(n))
		}
		return nil
	}
}

// save writes an archive to a file, which appears when it is complete, or to standard
// output.
func (a *app) save(file string, resp *http.Response, p *progress) (n int64, err error) {
	if file == "" {
		out := bufio.NewWriterSize(a.out, 256<<10)
		n, err = copyArchive(out, resp, p)
		return n, errors.Join(err, out.Flush())
	}
	tmp := file + ".part"
	f, err := os.Create(tmp)
	if err != nil {
		return 0, err
	}
	n, err = copyArchive(f, resp, p)
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(tmp, file)
	}
	if err != nil {
		_ = os.Remove(tmp)
	}
	return n, err
}

// copyArchive is an error unless berthd says at the end that all is there.
func copyArchive(w io.Writer, resp *http.Response, p *progress) (n int64, err error) {
	buf := make([]byte, 256<<10)
	last := time.Now()
	for {
		k, err := resp.Body.Read(buf)
		if _, werr := w.Write(buf[:k]); werr != nil {
			return n, werr
		}
		if n += int64(k); time.Since(last) > lineEvery/50 && !p.a.json {
			last = time.Now()
			p.show(api.Record{Ref: "export", Stage: "writing", Bytes: n})
		}
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return n, fmt.Errorf("%w: the archive ended in the middle: %w", errUnreachable, err)
		}
	}
	said, ok := resp.Trailer[http.CanonicalHeaderKey(api.TrailerError)]
	if !ok {
		return n, fmt.Errorf("%w: the archive ended in the middle", errUnreachable)
	}
	if text := strings.Join(said, ""); text != "" {
		e := &api.Error{}
		if err := json.Unmarshal([]byte(text), e); err != nil {
			return n, fmt.Errorf("berthd's answer: %w", err)
		}
		return n, e
	}
	return n, nil
}
