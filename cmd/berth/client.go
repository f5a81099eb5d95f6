package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/BurntSushi/toml"

	"github.com/berthd/berth/cri/admin/api"
)

const (
	defaultConfig = "/etc/berth/berth.toml"
	defaultRunDir = "/run/berth"
	maxConfigFile = 1 << 20
)

// errUnreachable: berthd does not answer.
var errUnreachable = errors.New("berthd not reachable")

// errDown: and that is because none runs.
var errDown = fmt.Errorf("%w", errUnreachable)

// socketPath is where berthd's admin socket is: as told, or where the configuration has
// it.
func (a *app) socketPath() (string, error) {
	if a.socket != "" {
		return a.socket, nil
	}
	dir := defaultRunDir
	drops, err := filepath.Glob(filepath.Join(a.config+".d", "*.toml"))
	if err != nil {
		return "", fmt.Errorf("config drop-ins: %w", err)
	}
	slices.Sort(drops)
	for _, file := range append([]string{a.config}, drops...) {
		own, err := runDir(file)
		if err != nil {
			return "", err
		}
		if own != "" {
			dir = own
		}
	}
	return filepath.Join(dir, "admin.sock"), nil
}

// runDir is the run_dir of one file, "" if it names none or is not there. All else in
// the file is berthd's to judge.
func runDir(file string) (string, error) {
	f, err := os.Open(file)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("config: %w", err)
	}
	defer f.Close()
	var c struct {
		RunDir string `toml:"run_dir"`
	}
	if _, err := toml.NewDecoder(io.LimitReader(f, maxConfigFile)).Decode(&c); err != nil {
		return "", fmt.Errorf("config: %s: %w (--socket does without it)", file, err)
	}
	return c.RunDir, nil
}

// client talks to one socket.
type client struct {
	socket string
	http   *http.Client
}

func (a *app) client() (*client, error) {
	path, err := a.socketPath()
	if err != nil {
		return nil, err
	}
	return &client{socket: path, http: &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
			defer cancel()
			return new(net.Dialer).DialContext(ctx, "unix", path)
		},
	}}}, nil
}

// unreachable says what an error of the transport means.
func (c *client) unreachable(err error) error {
	why, kind := err.Error(), errUnreachable
	switch {
	case errors.Is(err, context.Canceled):
		return errors.New("interrupted")
	case errors.Is(err, fs.ErrNotExist):
		kind, why = errDown, "the socket is not there: is berthd running (systemctl status berthd), and is run_dir another one (--socket)?"
	case errors.Is(err, syscall.ECONNREFUSED):
		kind, why = errDown, "nobody listens there: berthd has ended (systemctl status berthd)"
	case errors.Is(err, fs.ErrPermission):
		why = "permission denied: berth has to run as root"
	case errors.Is(err, io.EOF), errors.Is(err, syscall.ECONNRESET):
		why = "the connection was cut: berthd is ending, or this user is not root"
	}
	return fmt.Errorf("%w at %s: %s", kind, c.socket, why)
}

// do sends a request and returns the answer, whose body the caller closes. An answer that
// is an error is returned as one.
func (c *client) do(ctx context.Context, method, path string, body io.Reader) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, method, "http://berthd"+path, body)
	if err != nil {
		return nil, err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, c.unreachable(err)
	}
	if resp.StatusCode < 400 {
		return resp, nil
	}
	defer resp.Body.Close()
	e := &api.Error{}
	b, err := io.ReadAll(io.LimitReader(resp.Body, api.MaxRecord))
	if err != nil || json.Unmarshal(b, e) != nil || e.Text == "" {
		e = &api.Error{Code: api.CodeFailed, Text: fmt.Sprintf("berthd answers %s: is it as new as berth? %s", resp.Status, strings.TrimSpace(string(b[:min(len(b), 200)])))}
	}
	return nil, e
}

// ask sends a request and decodes the answer into v.
func (c *client) ask(ctx context.Context, method, path string, query url.Values, body, v any) error {
	var in io.Reader
	if body != nil {
		b, err := json.Marshal(body)
		if err != nil {
			return err
		}
		in = bytes.NewReader(b)
	}
	if len(query) > 0 {
		path += "?" + query.Encode()
	}
	resp, err := c.do(ctx, method, path, in)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if err := json.NewDecoder(io.LimitReader(resp.Body, api.MaxAnswer)).Decode(v); err != nil {
		return fmt.Errorf("berthd's answer: %w", err)
	}
	return nil
}

// work sends a request and hands each record of the answer to show, until the last one,
// whose error it returns.
func (c *client) work(ctx context.Context, path string, body io.Reader, show func(api.Record)) error {
	resp, err := c.do(ctx, http.MethodPost, path, body)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	return records(ctx, resp.Body, show)
}

// records hands each record to show, until the last one, whose error it returns.
func records(ctx context.Context, answer io.Reader, show func(api.Record)) error {
	lines := bufio.NewScanner(answer)
	lines.Buffer(nil, api.MaxRecord)
	for lines.Scan() {
		var rec api.Record
		if err := json.Unmarshal(lines.Bytes(), &rec); err != nil {
			return fmt.Errorf("berthd's answer: %w", err)
		}
		show(rec)
		if rec.Done && rec.Error != nil {
			return rec.Error
		}
		if rec.Done {
			return nil
		}
	}
	if ctx.Err() != nil {
		return errors.New("interrupted")
	}
	return fmt.Errorf("%w: its answer ended in the middle: %w", errUnreachable, cmp.Or(lines.Err(), io.ErrUnexpectedEOF))
}

// workOn is work with a JSON body.
func (c *client) workOn(ctx context.Context, path string, body any, show func(api.Record)) error {
	b, err := json.Marshal(body)
	if err != nil {
		return err
	}
	return c.work(ctx, path, bytes.NewReader(b), show)
}
