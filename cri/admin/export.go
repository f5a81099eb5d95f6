package admin

import (
	"encoding/json"
	"net/http"
	"time"

	"github.com/berthd/berth/cri/admin/api"
	"github.com/berthd/berth/imageservice"
)

// export sends an archive. An error before its first byte is an ordinary answer, a later one
// stands in the trailer.
func (s *Server) export(w http.ResponseWriter, r *http.Request) {
	release, ok := s.begin(w)
	if !ok {
		return
	}
	defer release()
	q := r.URL.Query()
	out := &lateWriter{w: w, c: http.NewResponseController(w)}
	err := s.deps.Exporter.Export(r.Context(), out, q["ref"], imageservice.ExportOptions{Original: q.Get("original") == "1"})
	if err != nil && !out.begun {
		reply(w, r, nil, err)
		return
	}
	text := ""
	if err != nil {
		e, _ := toError(err)
		if b, err := json.Marshal(e); err == nil {
			text = string(b) // JSON escapes what a header must not have
		}
	}
	w.Header().Set(api.TrailerError, text)
}

// lateWriter begins the answer with the first write.
type lateWriter struct {
	w     http.ResponseWriter
	c     *http.ResponseController
	begun bool
}

// Write implements io.Writer.
func (l *lateWriter) Write(p []byte) (int, error) {
	if !l.begun {
		l.begun = true
		l.w.Header().Set("Content-Type", "application/x-tar")
		l.w.Header().Set("Trailer", api.TrailerError)
	}
	_ = l.c.SetWriteDeadline(time.Now().Add(bodyTimeout)) // it may go through a slow pipe
	return l.w.Write(p)
}
