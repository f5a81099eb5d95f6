package admin

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/berthd/berth/cri/admin/api"
	"github.com/berthd/berth/imageservice"
)

// shelf is a node's images in memory.
type shelf struct {
	mu     sync.Mutex
	images map[string]imageservice.Image
	pull   func(context.Context, string) (imageservice.Image, error)
	ops    []api.Op
}

func (s *shelf) Get(ref string) (imageservice.Image, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	img, ok := s.images[ref]
	if !ok {
		return img, fmt.Errorf("%w: %q", imageservice.ErrNotFound, ref)
	}
	return img, nil
}

func (s *shelf) List() (out []imageservice.Image) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, img := range s.images {
		out = append(out, img)
	}
	return out
}

// Remove knows one image more than Get, "hidden".
func (s *shelf) Remove(_ context.Context, ref string) error {
	if _, err := s.Get(ref); err != nil && ref != "hidden" {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.images, ref)
	return nil
}

func (s *shelf) Pin(ref string, pinned bool) (imageservice.Image, error) {
	img, err := s.Get(ref)
	if err == nil {
		img.Pinned = pinned || ref == "always"
		s.mu.Lock()
		defer s.mu.Unlock()
		s.images[ref] = img
	}
	return img, err
}

func (s *shelf) Pull(ctx context.Context, ref string, _ *imageservice.Auth) (imageservice.Image, error) {
	return s.pull(ctx, ref)
}

func (s *shelf) Pulls() []imageservice.PullProgress {
	return []imageservice.PullProgress{{Reference: "slow", Stage: "layers 1/2", Began: time.Now(), Layers: []imageservice.LayerProgress{{Endpoint: "h"}}}}
}

func (s *shelf) Explain(_ context.Context, ref string, probe bool) (imageservice.Plan, error) {
	p := imageservice.Plan{Reference: ref, Candidates: []imageservice.Candidate{{Ignored: "i", Error: "e", Endpoints: []imageservice.PlanEndpoint{{
		Username: "u", CAFiles: []string{"ca"}, ClientFiles: []imageservice.ClientPair{{Certificate: "c", Key: "k"}}, Headers: []string{"h"}, Proxy: "p"}}}}}
	if probe {
		p.Candidates[0].Endpoints[0].Probe = &imageservice.ProbeResult{OK: true, Took: 1, Scheme: "https", Auth: "basic", Digest: "d", MediaType: "m", Error: "e"}
	}
	return p, nil
}

func (s *shelf) Import(ctx context.Context, f *os.File, o imageservice.ImportOptions) ([]imageservice.Image, error) {
	return s.ImportStream(ctx, f, o)
}

// ImportStream takes "good" for an image, and "half" for one that fails beside one that does not.
func (s *shelf) ImportStream(_ context.Context, r io.Reader, o imageservice.ImportOptions) ([]imageservice.Image, error) {
	b, err := io.ReadAll(r)
	if err != nil {
		return nil, err
	}
	img := imageservice.Image{ID: "sha256:i", RepoTags: []string{o.Name}, Pinned: o.Pin}
	o.Report(imageservice.ImportReport{Name: "n", Stage: "layers", Bytes: int64(len(b)), Total: 10})
	if string(b) != "good" && string(b) != "half" {
		return nil, fmt.Errorf("%w: %s", imageservice.ErrInvalidImage, b)
	}
	o.Report(imageservice.ImportReport{Name: "n", Image: &img, Present: o.Pin})
	if string(b) == "half" {
		err = fmt.Errorf("second: %w", imageservice.ErrDigestMismatch)
		o.Report(imageservice.ImportReport{Name: "second", Err: err})
	}
	return []imageservice.Image{img}, err
}

func (s *shelf) Verify(_ context.Context, refs []string, o imageservice.VerifyOptions) (imageservice.VerifyResult, error) {
	if len(refs) > 0 && refs[0] == "none" {
		return imageservice.VerifyResult{}, imageservice.ErrNotFound
	}
	o.Report(imageservice.LayerReport{Name: "n", Number: 1, Of: 2, ChainID: "c", Damaged: true, Count: 3, Deviating: []string{"d"}, Err: imageservice.ErrNoManifest})
	o.Report(imageservice.LayerReport{Name: "n", Number: 1, Of: 2, Repaired: o.Repair})
	return imageservice.VerifyResult{Images: 1, Layers: 2, Bytes: 3, Damaged: 1, Repaired: 1}, nil
}

func (s *shelf) leaks(_ context.Context, mend bool, tell func(api.Finding)) error {
	tell(api.Finding{Kind: "mount", What: "/m", Mendable: true, Mended: mend})
	tell(api.Finding{Kind: "stranger", What: "/s"})
	return fmt.Errorf("third: %w", imageservice.ErrClosed)
}

// Export writes "archive", and fails before it for "none" and after it for "half".
func (s *shelf) Export(_ context.Context, w io.Writer, refs []string, o imageservice.ExportOptions) error {
	if refs[0] == "none" {
		return imageservice.ErrNotFound
	}
	fmt.Fprintf(w, "archive %q %v", refs, o.Original)
	if refs[0] == "half" {
		return fmt.Errorf("line\nbreak: %w", imageservice.ErrDigestMismatch)
	}
	return nil
}

// serve starts a server on a socket and returns a client of it.
func serve(t *testing.T, s *shelf) (*http.Client, string) {
	t.Helper()
	srv, err := New(Deps{Images: s, Puller: s, Importer: s, Exporter: s, Verifier: s, Leaks: s.leaks, Check: s.leaks, Version: "1.2.3",
		Ops:    func() []api.Op { return s.ops },
		Config: func() (map[string]any, string) { return map[string]any{"k": 1}, "k = 1\n" }})
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "admin.sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- srv.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("serve: %v", err)
		}
	})
	c := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", path)
	}}}
	t.Cleanup(c.CloseIdleConnections)
	return c, path
}

func call(t *testing.T, c *http.Client, method, path, body string) (int, string) {
	t.Helper()
	req, err := http.NewRequest(method, "http://x"+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	resp, err := c.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(b)
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: the socket turns everybody else away")
	}
}

func TestAnswers(t *testing.T) {
	needRoot(t)
	s := &shelf{images: map[string]imageservice.Image{
		"a": {ID: "sha256:a"}, "pinned": {ID: "sha256:p", Pinned: true}, "always": {ID: "sha256:w", Pinned: true}}}
	c, _ := serve(t, s)
	for _, q := range []struct {
		method, path, body string
		status             int
		want               string
	}{
		{"GET", api.PathVersion, "", 200, `"version":"1.2.3"`},
		{"GET", api.PathConfig, "", 200, `"toml":"k = 1\n"`},
		{"GET", api.PathImages + "?ref=a", "", 200, `"id":"sha256:a"`},
		{"GET", api.PathImages + "?ref=b", "", 404, `"code":"not-found"`},
		{"GET", api.PathPulls, "", 200, `"stage":"layers 1/2"`},
		{"POST", api.PathPin, `{"ref":"a","pinned":true}`, 200, `"pinned":true`},
		{"POST", api.PathPin, `{"ref":"b","pinned":true}`, 404, `"code":"not-found"`},
		{"POST", api.PathPin, `{"ref":"always","pinned":false}`, 409, "stays pinned"},
		{"POST", api.PathRemove, `{"ref":"pinned"}`, 409, "is pinned"},
		{"POST", api.PathRemove, `{"ref":"pinned","force":true}`, 200, `"id":"sha256:p"`},
		{"POST", api.PathRemove, `{"ref":"hidden"}`, 200, `"id":"hidden"`},
		{"POST", api.PathRemove, `{"ref":"gone"}`, 404, `"code":"not-found"`},
		{"POST", api.PathRemove, `{"ref":`, 400, `"code":"invalid"`},
		{"POST", api.PathRemove, `{"ref":"a"}{}`, 400, "more than one value"},
		{"POST", api.PathRemove, `{"ref":"` + strings.Repeat("x", api.MaxRequest) + `"}`, 400, "too large"},
		{"GET", api.PathRemove, "", 405, ""},
		{"GET", "/v1/nothing", "", 404, ""},
	} {
		status, body := call(t, c, q.method, q.path, q.body)
		if status != q.status || !strings.Contains(body, q.want) {
			t.Errorf("%s %s %.60s: %d %.200s, want %d and %q", q.method, q.path, q.body, status, body, q.status, q.want)
		}
	}
}

func TestPullTells(t *testing.T) {
	needRoot(t)
	s := &shelf{images: map[string]imageservice.Image{}}
	s.pull = func(_ context.Context, ref string) (imageservice.Image, error) {
		if ref != "slow" {
			return imageservice.Image{}, fmt.Errorf("no: %w", imageservice.ErrUnauthorized)
		}
		time.Sleep(2 * reportEvery)
		return imageservice.Image{ID: "sha256:s"}, nil
	}
	c, _ := serve(t, s)
	_, body := call(t, c, "POST", api.PathPull, `{"ref":"slow"}`)
	recs := records(t, body)
	n := len(recs)
	if n < 3 || recs[0].Stage != "layers 1/2" || recs[n-2].Image == nil || recs[n-2].Image.ID != "sha256:s" || !recs[n-1].Done || recs[n-1].Error != nil {
		t.Errorf("records %+v", recs)
	}
	_, body = call(t, c, "POST", api.PathPull, `{"ref":"denied"}`)
	if !strings.Contains(body, `"done":true`) || !strings.Contains(body, `"code":"unauthorized"`) {
		t.Errorf("a pull that was denied: %s", body)
	}
}

// records decodes the lines of an answer.
func records(t *testing.T, body string) (recs []api.Record) {
	t.Helper()
	for lines := bufio.NewScanner(strings.NewReader(body)); lines.Scan(); {
		var r api.Record
		if err := json.Unmarshal(lines.Bytes(), &r); err != nil {
			t.Fatalf("%v: %s", err, lines.Text())
		}
		recs = append(recs, r)
	}
	return recs
}

func TestImport(t *testing.T) {
	needRoot(t)
	c, _ := serve(t, &shelf{})
	file := filepath.Join(t.TempDir(), "archive")
	if err := os.WriteFile(file, []byte("good"), 0o600); err != nil {
		t.Fatal(err)
	}
	fifo := filepath.Join(t.TempDir(), "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, q := range []struct {
		query, body string
		image       bool
		code        api.Code // of the last record
		text        string
	}{
		{"?name=x&pin=1", "good", true, "", ""},
		{"?path=" + file, "", true, "", ""},
		{"", "half", true, api.CodeDamaged, "1 of the images not imported"},
		{"", "rubbish", false, api.CodeDamaged, "rubbish"},
	} {
		status, body := call(t, c, "POST", api.PathImport+q.query, q.body)
		recs := records(t, body)
		last := recs[len(recs)-1]
		image := false
		for _, r := range recs {
			image = image || r.Image != nil
		}
		if status != 200 || image != q.image || !last.Done || (last.Error == nil) != (q.code == "") || last.Error != nil && (last.Error.Code != q.code || !strings.Contains(last.Error.Text, q.text)) {
			t.Errorf("%s %q: %d %s", q.query, q.body, status, body)
		}
	}
	_, body := call(t, c, "POST", api.PathImport+"?name=x&pin=1", "good")
	if recs := records(t, body); len(recs) != 3 || recs[0].Bytes != 4 || recs[1].Note != "present" || !recs[1].Image.Pinned || recs[1].Image.Tags[0] != "x" {
		t.Errorf("records %s", body)
	}
	for path, text := range map[string]string{"relative": "not absolute", "/no/such/file": "no such file", fifo: "neither file nor directory", "/dev/null": "neither"} {
		if status, body := call(t, c, "POST", api.PathImport+"?path="+path, ""); status != 400 || !strings.Contains(body, text) {
			t.Errorf("%s: %d %s", path, status, body)
		}
	}
}

// TestSameLanguage: what is sent as the image service has it is what package api says.
func TestSameLanguage(t *testing.T) {
	needRoot(t)
	c, _ := serve(t, &shelf{})
	decode := func(path string, v any) {
		t.Helper()
		_, body := call(t, c, "GET", path, "")
		dec := json.NewDecoder(strings.NewReader(body))
		dec.DisallowUnknownFields()
		if err := dec.Decode(v); err != nil {
			t.Errorf("%s: %v: %s", path, err, body)
		}
	}
	var plan api.Plan
	decode(api.PathExplain+"?ref=x&probe=1", &plan)
	if plan.Reference != "x" || plan.Candidates[0].Endpoints[0].Probe.Digest != "d" || plan.Candidates[0].Endpoints[0].ClientFiles[0].Key != "k" {
		t.Errorf("plan %+v", plan)
	}
	var pulls []api.Pull
	decode(api.PathPulls, &pulls)
	if pulls[0].Stage != "layers 1/2" || pulls[0].Layers[0].Endpoint != "h" {
		t.Errorf("pulls %+v", pulls)
	}
}

func TestExport(t *testing.T) {
	needRoot(t)
	c, _ := serve(t, &shelf{})
	if status, body := call(t, c, "GET", api.PathExport+"?ref=none", ""); status != 404 || !strings.Contains(body, "not-found") {
		t.Errorf("export of nothing: %d %s", status, body)
	}
	for ref, code := range map[string]api.Code{"good": "", "half": api.CodeDamaged} {
		resp, err := c.Get("http://x" + api.PathExport + "?original=1&ref=" + ref + "&ref=second")
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		said, ok := resp.Trailer[api.TrailerError]
		var e api.Error
		if ok && said[0] != "" {
			if err := json.Unmarshal([]byte(said[0]), &e); err != nil {
				t.Error(err)
			}
		}
		if err != nil || string(b) != fmt.Sprintf("archive [%q \"second\"] true", ref) || !ok || e.Code != code {
			t.Errorf("%s: %q, %v, trailer %q %v", ref, b, err, said, ok)
		}
	}
}

// TestInspect: findings are sent one by one, and what the look failed of at the end.
func TestInspect(t *testing.T) {
	needRoot(t)
	c, _ := serve(t, &shelf{})
	for _, path := range []string{api.PathLeaks, api.PathCheck} {
		for body, mended := range map[string]bool{`{"mend":true}`: true, `{}`: false} {
			_, answer := call(t, c, "POST", path, body)
			recs := records(t, answer)
			if len(recs) != 3 || recs[0].Finding == nil || recs[0].Finding.Mended != mended || !recs[0].Finding.Mendable ||
				recs[1].Finding == nil || recs[1].Finding.Kind != "stranger" || !recs[2].Done || recs[2].Error == nil {
				t.Errorf("%s with %s: %s", path, body, answer)
			}
		}
		if status, answer := call(t, c, "POST", path, `[]`); !strings.Contains(answer, `"code":"invalid"`) {
			t.Errorf("%s with rubbish: %v %s", path, status, answer)
		}
	}
}

func TestVerify(t *testing.T) {
	needRoot(t)
	c, _ := serve(t, &shelf{})
	_, body := call(t, c, "POST", api.PathVerify, `{"repair":true}`)
	recs := records(t, body)
	if len(recs) != 4 || recs[0].Layer == nil || recs[0].Layer.Count != 3 || recs[0].Error == nil || !recs[1].Layer.Repaired ||
		recs[2].Summary == nil || *recs[2].Summary != (api.Summary{Images: 1, Layers: 2, Bytes: 3, Damaged: 1, Repaired: 1}) || !recs[3].Done || recs[3].Error != nil {
		t.Errorf("records %s", body)
	}
	if _, body := call(t, c, "POST", api.PathVerify, `{"refs":["none"]}`); !strings.Contains(body, `"code":"not-found"`) {
		t.Errorf("verify of nothing: %s", body)
	}
}

// TestClientGone: work ends when nobody listens any more.
func TestClientGone(t *testing.T) {
	needRoot(t)
	began, ended := make(chan struct{}), make(chan error, 1)
	s := &shelf{pull: func(ctx context.Context, _ string) (imageservice.Image, error) {
		close(began)
		<-ctx.Done()
		ended <- ctx.Err()
		return imageservice.Image{}, ctx.Err()
	}}
	c, _ := serve(t, s)
	ctx, cancel := context.WithCancel(context.Background())
	req, err := http.NewRequestWithContext(ctx, "POST", "http://x"+api.PathPull, bytes.NewReader([]byte(`{"ref":"x"}`)))
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		if resp, err := c.Do(req); err == nil {
			_, _ = io.Copy(io.Discard, resp.Body)
			resp.Body.Close()
		}
	}()
	<-began
	cancel()
	select {
	case err := <-ended:
		if !errors.Is(err, context.Canceled) {
			t.Errorf("ended with %v", err)
		}
	case <-time.After(10 * time.Second):
		t.Error("the work goes on without its client")
	}
}

// TestWorkIsBounded: one work too many is refused, and questions are still answered.
func TestWorkIsBounded(t *testing.T) {
	needRoot(t)
	began, end := make(chan struct{}, maxWork), make(chan struct{})
	s := &shelf{pull: func(context.Context, string) (imageservice.Image, error) {
		began <- struct{}{}
		<-end
		return imageservice.Image{}, nil
	}}
	c, _ := serve(t, s)
	var wg sync.WaitGroup
	for range maxWork {
		wg.Go(func() { call(t, c, "POST", api.PathPull, `{"ref":"x"}`) })
	}
	for range maxWork {
		<-began
	}
	if status, body := call(t, c, "POST", api.PathPull, `{"ref":"x"}`); status != http.StatusServiceUnavailable || !strings.Contains(body, "limit") {
		t.Errorf("one too many: %d %s", status, body)
	}
	if status, _ := call(t, c, "GET", api.PathVersion, ""); status != 200 {
		t.Errorf("version beside work: %d", status)
	}
	close(end)
	wg.Wait()
}

// TestOnlyRoot: whoever gets at the socket and is not root is cut off without an answer.
func TestOnlyRoot(t *testing.T) {
	needRoot(t)
	_, path := serve(t, &shelf{})
	// The socket's own mode, in berthd, and its directory's do not let anybody as far as here.
	for dir := path; strings.HasPrefix(dir, os.TempDir()+"/"); dir = filepath.Dir(dir) {
		if err := os.Chmod(dir, 0o777); err != nil {
			t.Fatal(err)
		}
	}
	got, err := asUser(65534, func() (string, error) {
		c, err := net.Dial("unix", path)
		if err != nil {
			return "", err
		}
		defer c.Close()
		fmt.Fprintf(c, "GET %s HTTP/1.0\r\n\r\n", api.PathVersion)
		b, err := io.ReadAll(c)
		return string(b), err
	})
	if errors.Is(err, os.ErrPermission) {
		t.Fatalf("the test's user cannot reach the socket: %v", err)
	}
	if got != "" {
		t.Errorf("user 65534 was answered: %q", got)
	}
}

// asUser runs f on a thread of another user, which ends with it.
func asUser(uid int, f func() (string, error)) (got string, err error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		if _, _, errno := syscall.RawSyscall(syscall.SYS_SETRESUID, ^uintptr(0), uintptr(uid), ^uintptr(0)); errno != 0 {
			err = errno
			return
		}
		got, err = f()
	}()
	<-done
	return got, err
}

// TestOps: pulls stand among the rest by their age, and nothing at all is an empty list.
func TestOps(t *testing.T) {
	needRoot(t)
	s := &shelf{ops: []api.Op{{Kind: api.KindCall, What: "old", Age: time.Hour}, {Kind: api.KindCall, What: "new"}}}
	c, _ := serve(t, s)
	var got []api.Op
	_, body := call(t, c, "GET", api.PathOps, "")
	if err := json.Unmarshal([]byte(body), &got); err != nil {
		t.Fatal(err)
	}
	if len(got) != 3 || got[0].What != "old" || got[1].Kind != api.KindPull || got[1].Object != "slow" || got[1].Step != "layers 1/2" || got[2].What != "new" {
		t.Errorf("%+v", got)
	}
}
