package cri

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http/httptest"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berthd/berth/imageservice"
	"github.com/berthd/berth/sandbox"
)

func mustRun(t *testing.T, e *edge) string {
	t.Helper()
	r, err := e.RunPodSandbox(t.Context(), &runtime.RunPodSandboxRequest{Config: podConfig()})
	if err != nil {
		t.Fatal(err)
	}
	return r.GetPodSandboxId()
}

// unimplemented are the methods that gRPC itself has to answer: checkpoint and
// restore. A method that is added to the API shows up here by itself.
var unimplemented = []string{"CheckpointContainer", "CheckpointPod", "RestorePod"}

func TestEveryMethod(t *testing.T) {
	n := newNode()
	n.events = make(chan *runtime.ContainerEventResponse)
	close(n.events) // the stream of events ends, too
	e := mustEdge(t, n)
	check := func(t *testing.T, method string, err error) {
		t.Helper()
		got := status.Code(err) == codes.Unimplemented
		if want := slices.Contains(unimplemented, method); got != want {
			t.Errorf("%s: unimplemented = %v, want %v: %v", method, got, want, err)
		}
		if got && err.Error() != "rpc error: code = Unimplemented desc = method "+method+" not implemented" {
			t.Errorf("%s: %q is not gRPC's own answer", method, err)
		}
	}
	for _, desc := range []grpc.ServiceDesc{runtime.RuntimeService_ServiceDesc, runtime.ImageService_ServiceDesc} {
		for _, m := range desc.Methods {
			req := mustRequest(t, desc, m.MethodName)
			err := e.conn.Invoke(t.Context(), "/"+desc.ServiceName+"/"+m.MethodName, req, new(runtime.ImageFsInfoResponse))
			check(t, m.MethodName, err)
		}
		for _, s := range desc.Streams {
			st, err := e.conn.NewStream(t.Context(), &s, "/"+desc.ServiceName+"/"+s.StreamName)
			if err != nil {
				t.Fatal(err)
			}
			if err = st.SendMsg(mustRequest(t, desc, s.StreamName)); err == nil || errors.Is(err, io.EOF) {
				_ = st.CloseSend()
				err = st.RecvMsg(new(runtime.ImageFsInfoResponse))
			}
			check(t, s.StreamName, err)
		}
	}
}

// mustRequest is an empty request of a method, found by the method's signature.
func mustRequest(t *testing.T, desc grpc.ServiceDesc, method string) any {
	t.Helper()
	m, ok := reflect.TypeOf(desc.HandlerType).Elem().MethodByName(method)
	if !ok {
		t.Fatalf("%s has no method %s", desc.ServiceName, method)
	}
	for i := range m.Type.NumIn() {
		if in := m.Type.In(i); in.Kind() == reflect.Pointer {
			return reflect.New(in.Elem()).Interface()
		}
	}
	t.Fatalf("%s: no request in %s", method, m.Type)
	return nil
}

func TestLifecycle(t *testing.T) {
	e := mustEdge(t, newNode())
	pod := mustRun(t, e)
	c, err := e.CreateContainer(t.Context(), createRequest(pod))
	if err != nil {
		t.Fatal(err)
	}
	id := c.GetContainerId()
	if _, err := e.StartContainer(t.Context(), &runtime.StartContainerRequest{ContainerId: id}); err != nil {
		t.Error(err)
	}
	if _, err := e.StopContainer(t.Context(), &runtime.StopContainerRequest{ContainerId: id, Timeout: 1 << 62}); err != nil {
		t.Error(err)
	}
	if got, want := e.node.grace, 100*365*24*time.Hour; got != want {
		t.Errorf("grace period %v, want %v", got, want)
	}
	l, err := e.ListPodSandbox(t.Context(), &runtime.ListPodSandboxRequest{})
	if err != nil || len(l.GetItems()) != 1 || l.GetItems()[0].GetId() != pod {
		t.Errorf("list: %v, %v", l, err)
	}
}

// Stop and Remove want something to be absent; Status and the rest want it to
// be there.
func TestAbsent(t *testing.T) {
	e := mustEdge(t, newNode())
	ctx := t.Context()
	const id = "no-such-thing"
	calls := map[string]struct {
		err  error
		want codes.Code
	}{}
	add := func(name string, want codes.Code, err error) {
		calls[name] = struct {
			err  error
			want codes.Code
		}{err, want}
	}
	_, err := e.StopPodSandbox(ctx, &runtime.StopPodSandboxRequest{PodSandboxId: id})
	add("StopPodSandbox", codes.OK, err)
	_, err = e.RemovePodSandbox(ctx, &runtime.RemovePodSandboxRequest{PodSandboxId: id})
	add("RemovePodSandbox", codes.OK, err)
	_, err = e.StopContainer(ctx, &runtime.StopContainerRequest{ContainerId: id})
	add("StopContainer", codes.OK, err)
	_, err = e.RemoveContainer(ctx, &runtime.RemoveContainerRequest{ContainerId: id})
	add("RemoveContainer", codes.OK, err)
	_, err = e.images.RemoveImage(ctx, &runtime.RemoveImageRequest{Image: &runtime.ImageSpec{Image: "absent"}})
	add("RemoveImage", codes.OK, err)
	st, err := e.images.ImageStatus(ctx, &runtime.ImageStatusRequest{Image: &runtime.ImageSpec{Image: "absent"}})
	add("ImageStatus", codes.OK, err)
	if st.GetImage() != nil {
		t.Errorf("status of an absent image: %v", st)
	}
	_, err = e.PodSandboxStatus(ctx, &runtime.PodSandboxStatusRequest{PodSandboxId: id})
	add("PodSandboxStatus", codes.NotFound, err)
	_, err = e.ContainerStatus(ctx, &runtime.ContainerStatusRequest{ContainerId: id})
	add("ContainerStatus", codes.NotFound, err)
	_, err = e.ContainerStats(ctx, &runtime.ContainerStatsRequest{ContainerId: id})
	add("ContainerStats", codes.NotFound, err)
	_, err = e.StartContainer(ctx, &runtime.StartContainerRequest{ContainerId: id})
	add("StartContainer", codes.NotFound, err)
	_, err = e.CreateContainer(ctx, createRequest(id))
	add("CreateContainer", codes.NotFound, err)
	_, err = e.ExecSync(ctx, &runtime.ExecSyncRequest{ContainerId: id, Cmd: []string{"true"}})
	add("ExecSync", codes.NotFound, err)
	_, err = e.ReopenContainerLog(ctx, &runtime.ReopenContainerLogRequest{ContainerId: id})
	add("ReopenContainerLog", codes.NotFound, err)
	for name, c := range calls {
		if got := status.Code(c.err); got != c.want {
			t.Errorf("%s: %v, want %v: %v", name, got, c.want, c.err)
		}
	}
}

func TestPanic(t *testing.T) {
	n := newNode()
	n.runPod = func(context.Context) error { panic("boom-7") }
	e := mustEdge(t, n)
	_, err := e.RunPodSandbox(t.Context(), &runtime.RunPodSandboxRequest{Config: podConfig()})
	if status.Code(err) != codes.Internal {
		t.Errorf("got %v, want Internal", err)
	}
	if strings.Contains(err.Error(), "boom-7") || !strings.Contains(err.Error(), "call 1") {
		t.Errorf("%q should name the call and not the panic", err)
	}
	log := e.log.String()
	if strings.Count(log, "boom-7") != 1 || strings.Count(log, "fake_test.go") != 1 {
		t.Errorf("want the stack exactly once in\n%s", log)
	}
	n.runPod = nil
	if mustRun(t, e) == "" {
		t.Error("no pod after a panic")
	}
}

// The log tells what a call was about, and never what it contained.
func TestLog(t *testing.T) {
	e := mustEdge(t, newNode())
	pod := mustRun(t, e)
	r := createRequest(pod)
	r.Config.Envs = []*runtime.KeyValue{{Key: "TOKEN", Value: []byte("s3cret-env")}}
	if _, err := e.CreateContainer(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	if _, err := e.images.PullImage(t.Context(), &runtime.PullImageRequest{
		Image: &runtime.ImageSpec{Image: "example.org/a:1"},
		Auth:  &runtime.AuthConfig{Username: "u", Password: "s3cret-password"},
	}); err != nil {
		t.Fatal(err)
	}
	log := e.log.String()
	for _, want := range []string{
		`method="RunPodSandbox"`, `pod="ns/web"`, `podUID="uid-1"`, `container="c"`, `sandboxID="` + pod + `"`,
		`image="example.org/a:1"`, `call="2"`, `took=`,
	} {
		if !strings.Contains(log, want) {
			t.Errorf("no %s in\n%s", want, log)
		}
	}
	if strings.Contains(log, "s3cret") {
		t.Errorf("a secret in\n%s", log)
	}
}

func TestStatus(t *testing.T) {
	n := newNode()
	n.runtimeReady = fmt.Errorf("runc: version 1.0.3, want 1.1 or newer: %w", sandbox.ErrRuntime)
	n.driver = "systemd"
	e := mustEdge(t, n)
	st, err := e.Status(t.Context(), &runtime.StatusRequest{Verbose: true})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range st.GetStatus().GetConditions() {
		switch {
		case c.GetType() == runtime.RuntimeReady && !c.GetStatus() && c.GetReason() == "RuntimeUnusable" && strings.Contains(c.GetMessage(), "1.0.3"):
		case c.GetType() == runtime.NetworkReady && c.GetStatus() && c.GetReason() == "":
		default:
			t.Errorf("condition %v", c)
		}
	}
	if len(st.GetStatus().GetConditions()) != 2 || len(st.GetRuntimeHandlers()) != 2 || !st.GetFeatures().GetSupplementalGroupsPolicy() {
		t.Errorf("status %v", st)
	}
	for _, can := range []bool{false, true} {
		n.userNS = can
		if st, err := e.Status(t.Context(), &runtime.StatusRequest{}); err != nil || st.GetFeatures().GetUserNamespacesHostNetwork() != can {
			t.Errorf("a handler with user namespaces %v: features %v, %v", can, st.GetFeatures(), err)
		}
	}
	for _, key := range []string{"cni", "versions", "runtimes", "note"} {
		if !json.Valid([]byte(st.GetInfo()[key])) {
			t.Errorf("info %q = %q is not JSON", key, st.GetInfo()[key])
		}
	}
	if st, _ = e.Status(t.Context(), &runtime.StatusRequest{}); len(st.GetInfo()) != 0 {
		t.Errorf("info without verbose: %v", st.GetInfo())
	}
	v, err := e.Version(t.Context(), &runtime.VersionRequest{Version: "v1"})
	if err != nil || v.GetVersion() != "0.1.0" || v.GetRuntimeName() != "berth" || v.GetRuntimeVersion() != "1.2.3" || v.GetRuntimeApiVersion() != "v1" {
		t.Errorf("version %v, %v", v, err)
	}
	rc, err := e.RuntimeConfig(t.Context(), &runtime.RuntimeConfigRequest{})
	if err != nil || rc.GetLinux().GetCgroupDriver() != runtime.CgroupDriver_SYSTEMD {
		t.Errorf("runtime config %v, %v", rc, err)
	}
}

func TestImages(t *testing.T) {
	e := mustEdge(t, newNode())
	ctx := t.Context()
	const ref = "example.org/a:1"
	spec := &runtime.ImageSpec{Image: ref, UserSpecifiedImage: "a:1"}
	p, err := e.images.PullImage(ctx, &runtime.PullImageRequest{Image: spec, Auth: &runtime.AuthConfig{ServerAddress: "example.org"}})
	if err != nil {
		t.Fatal(err)
	}
	if e.node.auth != nil {
		t.Errorf("an auth with nothing to authenticate with became %+v", e.node.auth)
	}
	st, err := e.images.ImageStatus(ctx, &runtime.ImageStatusRequest{Image: spec, Verbose: true})
	if err != nil {
		t.Fatal(err)
	}
	img := st.GetImage()
	if img.GetId() != p.GetImageRef() || img.GetUid().GetValue() != 1000 || img.GetUsername() != "" || img.GetSpec().GetUserSpecifiedImage() != "a:1" {
		t.Errorf("image %v after a pull of %v", img, p)
	}
	var info struct {
		ImageSpec struct{ Config struct{ User string } } `json:"imageSpec"`
	}
	if err := json.Unmarshal([]byte(st.GetInfo()["info"]), &info); err != nil || info.ImageSpec.Config.User != "1000:5" {
		t.Errorf("info %v: %+v, %v", st.GetInfo(), info, err)
	}
	for filter, want := range map[string]int{"": 1, ref: 1, "example.org/b": 0} {
		l, err := e.images.ListImages(ctx, &runtime.ListImagesRequest{Filter: &runtime.ImageFilter{Image: &runtime.ImageSpec{Image: filter}}})
		if err != nil || len(l.GetImages()) != want {
			t.Errorf("list %q: %v, %v, want %d", filter, l, err, want)
		}
	}
	if _, err := e.images.ListImages(ctx, &runtime.ListImagesRequest{Filter: &runtime.ImageFilter{Image: &runtime.ImageSpec{Image: "UPPER/case"}}}); status.Code(err) != codes.InvalidArgument {
		t.Errorf("malformed filter: %v", err)
	}
	fs, err := e.images.ImageFsInfo(ctx, &runtime.ImageFsInfoRequest{})
	if err != nil || fs.GetImageFilesystems()[0].GetTimestamp() != time.Unix(1, 0).UnixNano() || fs.GetImageFilesystems()[0].GetUsedBytes().GetValue() != 3 {
		t.Errorf("fs info %v, %v", fs, err)
	}
}

// The kubelet tells pull errors apart by their first words, and sees those
// only with code Unknown.
func TestPullErrors(t *testing.T) {
	n := newNode()
	e := mustEdge(t, n)
	for _, tc := range []struct {
		err  error
		code codes.Code
		text string
	}{
		{fmt.Errorf("pull x: dial: %w", imageservice.ErrRegistryUnavailable), codes.Unknown, "RegistryUnavailable: pull x"},
		{fmt.Errorf("pull x: %w", imageservice.ErrPolicyRejected), codes.Unknown, "SignatureValidationFailed: pull x"},
		{fmt.Errorf("pull x: %w", imageservice.ErrUnauthorized), codes.Unauthenticated, "pull x"},
	} {
		n.pullErr = tc.err
		_, err := e.images.PullImage(t.Context(), &runtime.PullImageRequest{Image: &runtime.ImageSpec{Image: "x"}})
		if s := status.Convert(err); s.Code() != tc.code || !strings.HasPrefix(s.Message(), tc.text) {
			t.Errorf("%v became %v", tc.err, err)
		}
	}
}

func TestMessageSizes(t *testing.T) {
	n := newNode()
	e := mustEdge(t, n)
	big := bytes.Repeat([]byte("x"), 16<<20)
	n.exec = func(context.Context) (*runtime.ExecSyncResponse, error) {
		return &runtime.ExecSyncResponse{Stdout: big, Stderr: big[:100], ExitCode: 3}, nil
	}
	r, err := e.ExecSync(t.Context(), &runtime.ExecSyncRequest{ContainerId: "c", Cmd: []string{"yes"}})
	if err != nil {
		t.Fatalf("16 MiB of output have to be cut, not refused: %v", err)
	}
	if r.GetExitCode() != 3 || len(r.GetStderr()) < 100 || len(r.GetStdout()) < 15<<20 || !strings.HasSuffix(string(r.GetStderr()), "of both streams]\n") {
		t.Errorf("exit %d, %d and %d bytes", r.GetExitCode(), len(r.GetStdout()), len(r.GetStderr()))
	}
	req := &runtime.RunPodSandboxRequest{Config: podConfig()}
	req.Config.Annotations = map[string]string{"a": string(big)}
	if _, err := e.RunPodSandbox(t.Context(), req); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("a request over the limit: %v", err)
	}
}

func TestFitExec(t *testing.T) {
	const note = "\n[output cut off at 220 bytes of both streams]\n"
	const room = 220 - len(note)
	for _, tc := range []struct{ out, err, wantOut, wantErr int }{
		{110, 110, 110, 110},
		{220, 0, 220, 0},
		{300, 5, room - 5, 5},
		{5, 300, 5, room - 5},
		{300, 300, room / 2, room / 2},
		{room/2 + 2, 300, room / 2, room / 2},
		{0, 221, 0, room},
		{221, 0, room, 0},
	} {
		out, err := strings.Repeat("o", tc.out), strings.Repeat("e", tc.err)
		r := fitExec(&runtime.ExecSyncResponse{Stdout: []byte(out), Stderr: []byte(err)}, 220)
		wantErr := err[:tc.wantErr]
		if tc.out+tc.err > 220 {
			wantErr += note
		}
		if string(r.Stdout) != out[:tc.wantOut] || string(r.Stderr) != wantErr {
			t.Errorf("%d and %d: got %d bytes and %q", tc.out, tc.err, len(r.Stdout), r.Stderr)
		}
	}
}

// A client whose connection is full of unread answers holds up nobody else.
func TestSlowClient(t *testing.T) {
	n := newNode()
	e := mustEdge(t, n)
	n.exec = func(context.Context) (*runtime.ExecSyncResponse, error) {
		return &runtime.ExecSyncResponse{Stdout: make([]byte, 8<<20)}, nil
	}
	slow := mustDial(t, e.socket)
	for range 8 {
		st, err := slow.NewStream(t.Context(), &grpc.StreamDesc{ServerStreams: true}, runtime.RuntimeService_ExecSync_FullMethodName)
		if err != nil {
			t.Fatal(err)
		}
		// The answer is asked for and never read.
		if err := st.SendMsg(&runtime.ExecSyncRequest{ContainerId: "c", Cmd: []string{"x"}}); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	for range 20 {
		if _, err := e.ListPodSandbox(ctx, &runtime.ListPodSandboxRequest{}); err != nil {
			t.Fatal(err)
		}
	}
}

func TestMetrics(t *testing.T) {
	e := mustEdge(t, newNode())
	mustRun(t, e)
	_, _ = e.PodSandboxStatus(t.Context(), &runtime.PodSandboxStatusRequest{PodSandboxId: "absent"})
	for target, want := range map[string][]string{
		"/metrics": {
			`berth_rpc_duration_seconds_count{code="OK",method="RunPodSandbox"} 1`,
			`berth_rpc_duration_seconds_count{code="NotFound",method="PodSandboxStatus"} 1`,
			`berth_rpc_in_flight{method="RunPodSandbox"} 0`,
		},
		"/healthz": {"ok\n"},
	} {
		w := httptest.NewRecorder()
		e.server.MetricsHandler().ServeHTTP(w, httptest.NewRequest("GET", target, nil))
		for _, line := range want {
			if w.Code != 200 || !strings.Contains(w.Body.String(), line) {
				t.Errorf("%s: %d, no %q in\n%s", target, w.Code, line, w.Body)
			}
		}
	}
}
