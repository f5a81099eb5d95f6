// Package stream is a client for the URLs that Exec, Attach and PortForward are
// answered with: SPDY (channel protocol v4) and WebSockets (v4 and v5), as a
// kubelet or crictl would use them.
package stream

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
)

// The protocols of a session.
const (
	SPDY        = "SPDY"
	WebSocketV4 = "v4.channel.k8s.io"
	WebSocketV5 = "v5.channel.k8s.io"
)

// Options are what was asked for with the URL.
type Options struct{ Stdin, Stdout, Stderr, TTY bool }

// Session is a connection for Exec or Attach. Out and Err have to be read, each
// on its own, or the session stands still; they are nil if not wanted.
type Session struct {
	In       io.WriteCloser // its Close ends the input, if the protocol can do that
	Out, Err io.Reader
	resize   io.Writer
	close    func() error

	ended  chan struct{} // closed when status is complete
	status []byte
	fault  error
}

// follow collects the status, which comes whether or not output was read.
func (s *Session) follow(status io.Reader) *Session {
	s.ended = make(chan struct{})
	go func() {
		s.status, s.fault = io.ReadAll(status)
		close(s.ended)
	}()
	return s
}

// Dial opens a session.
func Dial(ctx context.Context, protocol, url string, o Options) (*Session, error) {
	if protocol == SPDY {
		return dialSPDY(ctx, url, o)
	}
	return dialWebSocket(ctx, url, protocol, o)
}

// Resize tells the size of the terminal.
func (s *Session) Resize(width, height uint16) error {
	return json.NewEncoder(s.resize).Encode(struct{ Width, Height uint16 }{width, height})
}

// Close drops the connection.
func (s *Session) Close() error { return s.close() }

// Wait returns the exit code that the session ended with, or the error that it
// reported.
func (s *Session) Wait() (int, error) {
	<-s.ended
	b := s.status
	if s.fault != nil {
		return 0, s.fault
	}
	if len(b) == 0 {
		return 0, errors.New("session ended without a status")
	}
	var r struct {
		Status, Message, Reason string
		Details                 struct {
			Causes []struct{ Reason, Message string }
		}
	}
	if err := json.Unmarshal(b, &r); err != nil {
		return 0, fmt.Errorf("status %q: %w", b, err)
	}
	if r.Status == "Success" {
		return 0, nil
	}
	if r.Reason == "NonZeroExitCode" {
		for _, c := range r.Details.Causes {
			if c.Reason == "ExitCode" {
				return strconv.Atoi(c.Message)
			}
		}
	}
	return 0, fmt.Errorf("%s: %s", r.Reason, r.Message)
}
