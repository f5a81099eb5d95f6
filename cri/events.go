package cri

import (
	"context"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Events tell what happens to pods and containers.
type Events interface {
	// FollowEvents calls begun and then send with each event until ctx ends, one
	// of them fails, or send is too slow. It does not wait for a send that
	// blocks.
	FollowEvents(ctx context.Context, begun func() error, send func(*runtime.ContainerEventResponse) error) error
}

// GetContainerEvents sends every event from the call on, until the client goes
// away, the server stops, or the client reads too slowly. In the last case it is
// told so by code ResourceExhausted, and has missed nothing up to there: it lists
// anew and comes back. The answer's headers tell that it is followed from here.
func (s *runtimeService) GetContainerEvents(_ *runtime.GetEventsRequest, stream grpc.ServerStreamingServer[runtime.ContainerEventResponse]) error {
	ctx, cancel := context.WithCancel(stream.Context())
	defer cancel()
	defer context.AfterFunc(s.life, cancel)()
	err := s.deps.Events.FollowEvents(ctx, func() error { return stream.SendHeader(nil) }, stream.Send)
	switch {
	case stream.Context().Err() != nil:
		return nil // the client has gone: that is how a stream of events ends
	case s.life.Err() != nil:
		return status.Error(codes.Unavailable, "the daemon is stopping")
	}
	return err
}
