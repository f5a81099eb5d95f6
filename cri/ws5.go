package cri

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"time"

	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
	"k8s.io/klog/v2"
	"k8s.io/streaming/pkg/httpstream/wsstream"
)

// The WebSocket protocol v5.channel.k8s.io is v4 with a message by which a
// client ends one channel: 255, then the number of the channel. Version 0.37 of
// k8s.io/cri-streaming serves the older ones only. The channels:
//
//	0 stdin   1 stdout   2 stderr   3 status, as JSON   4 sizes, as JSON

// isV5 tells whether the client offers that protocol.
func isV5(r *http.Request) bool { return wsstream.IsWebSocketRequestWithStreamCloseProtocol(r) }

func serveV5(w http.ResponseWriter, r *http.Request, p *process, idle time.Duration) {
	o := p.options()
	channels := []wsstream.ChannelType{
		channelIf(o.Stdin, wsstream.ReadChannel), channelIf(o.Stdout, wsstream.WriteChannel),
		channelIf(o.Stderr, wsstream.WriteChannel), wsstream.WriteChannel, channelIf(o.TTY, wsstream.ReadChannel),
	}
	conn := wsstream.NewConn(map[string]wsstream.ChannelProtocolConfig{
		remotecommand.StreamProtocolV5Name: {Binary: true, Channels: channels},
	})
	conn.SetIdleTimeout(idle)
	_, ch, err := conn.Open(w, r)
	if err != nil {
		klog.FromContext(r.Context()).V(readV).Info("WebSocket not opened", "err", err)
		return
	}
	defer conn.Close()
	// An empty message tells a client that it is connected.
	greet := remotecommand.StreamErr
	switch {
	case o.Stdout:
		greet = remotecommand.StreamStdOut
	case o.Stderr:
		greet = remotecommand.StreamStdErr
	}
	if _, err := ch[greet].Write(nil); err != nil {
		return
	}
	var resize chan remotecommand.TerminalSize
	if o.TTY {
		resize = make(chan remotecommand.TerminalSize)
		go decodeSizes(r, ch[remotecommand.StreamResize], resize)
	}
	err = p.run(r.Context(), ch[remotecommand.StreamStdIn], ch[remotecommand.StreamStdOut], ch[remotecommand.StreamStdErr], resize)
	text, e := json.Marshal(outcome(err))
	if e == nil {
		_, e = ch[remotecommand.StreamErr].Write(text)
	}
	if err != nil && !errors.As(err, new(exitError)) || e != nil {
		klog.FromContext(r.Context()).V(lifecycleV).Info("Session failed", "err", errors.Join(err, e))
	}
}

func channelIf(wanted bool, t wsstream.ChannelType) wsstream.ChannelType {
	if wanted {
		return t
	}
	return wsstream.IgnoreChannel
}

// decodeSizes reads sizes until the session ends.
func decodeSizes(r *http.Request, from io.Reader, to chan<- remotecommand.TerminalSize) {
	defer close(to)
	d := json.NewDecoder(from)
	for {
		var z remotecommand.TerminalSize
		if d.Decode(&z) != nil {
			// The channel is read on, else no other would be.
			_, _ = io.Copy(io.Discard, from)
			return
		}
		select {
		case to <- z:
		case <-r.Context().Done():
			return
		}
	}
}

// result is a meta/v1 Status, as far as clients of streams read it.
type result struct {
	Status  string         `json:"status"`
	Message string         `json:"message,omitempty"`
	Reason  string         `json:"reason,omitempty"`
	Details *resultDetails `json:"details,omitempty"`
	Code    int32          `json:"code,omitempty"`
}

type resultDetails struct {
	Causes []resultCause `json:"causes,omitempty"`
}

type resultCause struct {
	Type    string `json:"reason,omitempty"`
	Message string `json:"message,omitempty"`
}

// outcome is how a session ended.
func outcome(err error) result {
	var exit exitError
	switch {
	case err == nil:
		return result{Status: "Success"}
	case errors.As(err, &exit):
		return result{Status: "Failure", Reason: remotecommand.NonZeroExitCodeReason,
			Message: fmt.Sprintf("command terminated with non-zero exit code: %v", exit),
			Details: &resultDetails{Causes: []resultCause{{remotecommand.ExitCodeCauseType, strconv.Itoa(int(exit))}}}}
	}
	return result{Status: "Failure", Reason: "InternalError", Message: clip(err.Error(), maxErrorText), Code: http.StatusInternalServerError}
}
