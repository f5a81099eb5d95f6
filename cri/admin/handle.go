package admin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"

	"k8s.io/klog/v2"

	"github.com/berthd/berth/cri/admin/api"
	"github.com/berthd/berth/imageservice"
)

// errInvalid: the request cannot be understood.
var errInvalid = errors.New("invalid request")

// errConflict: the state of what is named forbids it.
var errConflict = errors.New("refused")

// table maps sentinels to codes; the first that matches decides.
var table = []struct {
	err    error
	code   api.Code
	status int
}{
	{errInvalid, api.CodeInvalid, http.StatusBadRequest},
	{errConflict, api.CodeConflict, http.StatusConflict},
	{imageservice.ErrInvalidReference, api.CodeInvalid, http.StatusBadRequest},
	{imageservice.ErrNotFound, api.CodeNotFound, http.StatusNotFound},
	{imageservice.ErrUnauthorized, api.CodeUnauthorized, http.StatusForbidden},
	{imageservice.ErrRegistryUnavailable, api.CodeUnavailable, http.StatusServiceUnavailable},
	{imageservice.ErrDigestMismatch, api.CodeDamaged, http.StatusUnprocessableEntity},
	{imageservice.ErrInvalidImage, api.CodeDamaged, http.StatusUnprocessableEntity},
	{imageservice.ErrUnsupported, api.CodeInvalid, http.StatusUnprocessableEntity},
	{imageservice.ErrPolicyRejected, api.CodeConflict, http.StatusConflict},
	{imageservice.ErrTooLarge, api.CodeTooLarge, http.StatusRequestEntityTooLarge},
	{imageservice.ErrClosed, api.CodeUnavailable, http.StatusServiceUnavailable},
	{context.Canceled, api.CodeCancelled, http.StatusServiceUnavailable},
	{context.DeadlineExceeded, api.CodeCancelled, http.StatusServiceUnavailable},
}

// maxErrorText bounds the text of an error in bytes.
const maxErrorText = 16 << 10

func toError(err error) (*api.Error, int) {
	text := err.Error()
	if len(text) > maxErrorText {
		text = text[:maxErrorText] + "…"
	}
	for _, line := range table {
		if errors.Is(err, line.err) {
			return &api.Error{Code: line.code, Text: text}, line.status
		}
	}
	return &api.Error{Code: api.CodeFailed, Text: text}, http.StatusInternalServerError
}

// get registers a question that is answered at once.
func (s *Server) get(path string, answer func(*http.Request) (any, error)) {
	s.mux.HandleFunc("GET "+path, func(w http.ResponseWriter, r *http.Request) {
		v, err := answer(r)
		reply(w, r, v, err)
	})
}

// post registers a request with a body that is answered when it is done.
func post[Q any](s *Server, path string, do func(context.Context, *Q) (any, error)) {
	s.mux.HandleFunc("POST "+path, func(w http.ResponseWriter, r *http.Request) {
		q, err := read[Q](w, r)
		if err != nil {
			reply(w, r, nil, err)
			return
		}
		ctx, cancel := context.WithTimeout(r.Context(), askTimeout)
		defer cancel()
		v, err := do(ctx, q)
		reply(w, r, v, err)
	})
}

// long registers work: do reports through tell, from one goroutine at a time.
func long[Q any](s *Server, path string, do func(ctx context.Context, q *Q, tell func(api.Record)) error) {
	s.mux.HandleFunc("POST "+path, func(w http.ResponseWriter, r *http.Request) {
		q, err := read[Q](w, r)
		if err != nil {
			reply(w, r, nil, err)
			return
		}
		s.stream(w, r, func(ctx context.Context, tell func(api.Record)) error { return do(ctx, q, tell) })
	})
}

// stream runs work and sends its records. It ends when the client is gone, or
// takes nothing for sendTimeout.
func (s *Server) stream(w http.ResponseWriter, r *http.Request, do func(context.Context, func(api.Record)) error) {
	release, ok := s.begin(w)
	if !ok {
		return
	}
	defer release()
	ctx, cancel := context.WithCancelCause(r.Context())
	defer cancel(nil)
	w.Header().Set("Content-Type", "application/x-ndjson")
	out, enc := http.NewResponseController(w), json.NewEncoder(w)
	tell := func(rec api.Record) {
		_ = out.SetWriteDeadline(time.Now().Add(sendTimeout)) // a unix socket has deadlines
		if err := errors.Join(enc.Encode(rec), out.Flush()); err != nil {
			cancel(fmt.Errorf("admin client: %w", err))
		}
	}
	last := api.Record{Done: true}
	if err := do(ctx, tell); err != nil {
		klog.FromContext(ctx).V(2).Info("Admin work failed", "path", r.URL.Path, "err", err)
		last.Error, _ = toError(err)
	}
	tell(last)
}

// begin counts a work, or answers that there are too many.
func (s *Server) begin(w http.ResponseWriter) (release func(), ok bool) {
	select {
	case s.work <- struct{}{}:
		return func() { <-s.work }, true
	default:
		busy := &api.Error{Code: api.CodeUnavailable, Text: fmt.Sprintf("berthd does %d such things already, the limit", maxWork)}
		send(w, http.StatusServiceUnavailable, busy)
		return nil, false
	}
}

// read takes the body of a request apart.
func read[Q any](w http.ResponseWriter, r *http.Request) (*Q, error) {
	_ = http.NewResponseController(w).SetReadDeadline(time.Now().Add(sendTimeout))
	dec := json.NewDecoder(http.MaxBytesReader(w, r.Body, api.MaxRequest))
	q := new(Q)
	if err := dec.Decode(q); err != nil {
		return nil, fmt.Errorf("body: %w: %w", errInvalid, err)
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("body: %w: more than one value", errInvalid)
	}
	_ = http.NewResponseController(w).SetReadDeadline(time.Time{})
	return q, nil
}

func reply(w http.ResponseWriter, r *http.Request, v any, err error) {
	status := http.StatusOK
	if err != nil {
		v, status = toError(err)
		klog.FromContext(r.Context()).V(2).Info("Admin request failed", "path", r.URL.Path, "err", err)
	}
	send(w, status, v)
}

func send(w http.ResponseWriter, status int, v any) {
	_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(sendTimeout))
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(v) // the client is gone: nobody to tell
}
