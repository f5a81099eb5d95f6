package cri

import (
	"context"
	"fmt"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Condition is one of those by which the kubelet decides whether to start pods.
type Condition struct {
	Type  string // "RuntimeReady", "NetworkReady"
	Holds bool
	Why   string // if not
}

// Ask is a client's view: what the server at a unix socket tells the kubelet.
func Ask(ctx context.Context, socket string) ([]Condition, error) {
	conn, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, fmt.Errorf("socket %s: %w", socket, err)
	}
	defer conn.Close()
	st, err := runtime.NewRuntimeServiceClient(conn).Status(ctx, &runtime.StatusRequest{})
	if err != nil {
		return nil, fmt.Errorf("socket %s: %w", socket, err)
	}
	var out []Condition
	for _, c := range st.GetStatus().GetConditions() {
		out = append(out, Condition{Type: c.GetType(), Holds: c.GetStatus(), Why: c.GetReason() + ": " + c.GetMessage()})
	}
	return out, nil
}
