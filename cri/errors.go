package cri

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"unicode/utf8"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/berthd/berth/imageservice"
	"github.com/berthd/berth/sandbox"
)

// errInvalid: a field of the request has a value that cannot be used.
var errInvalid = errors.New("invalid argument")

// maxErrorText bounds the text of an error in bytes. gRPC sends it in a
// trailer, where clients accept 16 KiB in all, percent-encoded.
const maxErrorText = 4096

// table maps sentinels to codes. The first line that matches decides, so the
// more particular stand first.
//
// The kubelet takes the text of an error of PullImage apart to choose between
// ErrImagePull, RegistryUnavailable and SignatureValidationFailed: it looks at
// the beginning of the text, and it sees the bare text only if the code is
// Unknown (pullImageV1 in its remote_image.go). Hence the two lines with a
// prefix.
var table = []struct {
	err    error
	code   codes.Code
	prefix string
}{
	{errInvalid, codes.InvalidArgument, ""},

	{sandbox.ErrPlugin, codes.FailedPrecondition, ""}, // it may wrap the next one, and is none of the caller's
	{sandbox.ErrInvalid, codes.InvalidArgument, ""},
	{sandbox.ErrAmbiguous, codes.InvalidArgument, ""},
	{sandbox.ErrUnknownHandler, codes.InvalidArgument, ""},
	{sandbox.ErrNotFound, codes.NotFound, ""},
	{sandbox.ErrState, codes.FailedPrecondition, ""},
	{sandbox.ErrBusy, codes.DeadlineExceeded, ""},
	{sandbox.ErrTimeout, codes.DeadlineExceeded, ""},
	{sandbox.ErrStuck, codes.Unavailable, ""},
	{sandbox.ErrRuntime, codes.Unavailable, ""},
	{sandbox.ErrBehind, codes.ResourceExhausted, ""},
	{sandbox.ErrFollowers, codes.ResourceExhausted, ""},

	{imageservice.ErrRegistryUnavailable, codes.Unknown, "RegistryUnavailable"},
	{imageservice.ErrPolicyRejected, codes.Unknown, "SignatureValidationFailed"},
	{imageservice.ErrInvalidReference, codes.InvalidArgument, ""},
	{imageservice.ErrNotFound, codes.NotFound, ""},
	{imageservice.ErrUnauthorized, codes.Unauthenticated, ""},
	{imageservice.ErrDigestMismatch, codes.DataLoss, ""},
	{imageservice.ErrUnsupported, codes.FailedPrecondition, ""},
	{imageservice.ErrInvalidImage, codes.FailedPrecondition, ""},
	{imageservice.ErrTooLarge, codes.ResourceExhausted, ""},
	{imageservice.ErrClosed, codes.Unavailable, ""},

	{context.Canceled, codes.Canceled, ""},
	{context.DeadlineExceeded, codes.DeadlineExceeded, ""},
}

// toStatus is the error of a handler as gRPC sends it. An error that already
// is a status stays what it is; one that the table does not know is Unknown.
func toStatus(err error) error {
	if err == nil {
		return nil
	}
	if _, ok := err.(interface{ GRPCStatus() *status.Status }); ok {
		return err
	}
	text := clip(err.Error(), maxErrorText)
	for _, line := range table {
		if !errors.Is(err, line.err) {
			continue
		}
		if line.prefix != "" && !strings.HasPrefix(text, line.prefix) {
			text = line.prefix + ": " + text
		}
		return status.Error(line.code, text)
	}
	return status.Error(codes.Unknown, text)
}

// clip cuts s to at most n bytes of valid UTF-8; the text of an error may
// contain what a registry or a runtime wrote.
func clip(s string, n int) string {
	s = strings.ToValidUTF8(s, "\uFFFD")
	if len(s) <= n {
		return s
	}
	const mark = "…"
	cut := n - len(mark)
	for cut > 0 && !utf8.RuneStart(s[cut]) {
		cut--
	}
	return s[:cut] + mark
}

// ignore is err without the given sentinel: a call that asks for something to
// be absent succeeds if it is.
func ignore(err, absent error) error {
	if errors.Is(err, absent) {
		return nil
	}
	return err
}

// invalid names the field of the request that is wrong, and how.
func invalid(field, format string, args ...any) error {
	return fmt.Errorf("%w: %s: %s", errInvalid, field, fmt.Sprintf(format, args...))
}
