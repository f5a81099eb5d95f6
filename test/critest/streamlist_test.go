package critest

import (
	"errors"
	"io"
	"slices"
	"testing"

	"google.golang.org/grpc/codes"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berthd/berth/test/images"
)

// collect reads a streaming list to its end.
func collect[R, I any](b *box, st interface{ Recv() (*R, error) }, err error, items func(*R) []I, id func(I) string) []string {
	b.Helper()
	b.must(err)
	var ids []string
	for {
		r, err := st.Recv()
		if errors.Is(err, io.EOF) {
			return ids
		}
		b.must(err)
		if len(items(r)) == 0 {
			b.Error("a message without items")
		}
		for _, i := range items(r) {
			if slices.Contains(ids, id(i)) {
				b.Errorf("%s twice", id(i))
			}
			ids = append(ids, id(i))
		}
	}
}

// TestStreamingLists: each has what the unary list has under the same filter, and
// ends cleanly when that is nothing.
func TestStreamingLists(t *testing.T) {
	b := open(t)
	p, other := b.pod(), b.pod()
	one, two := p.run(sh("sleep 300")), p.run(sh("sleep 300"))
	third := other.run(sh("sleep 300"))
	expect := func(what string, got []string, want ...string) {
		t.Helper()
		slices.Sort(got)
		slices.Sort(want)
		if !slices.Equal(got, want) {
			t.Errorf("%s: got %.12q, want %.12q", what, got, want)
		}
	}
	has := func(what string, got []string, want ...string) {
		t.Helper()
		for _, w := range want {
			if !slices.Contains(got, w) {
				t.Errorf("%s lacks %.12s", what, w)
			}
		}
	}
	nobody := one.id[:63] + "x"

	pods := func(f *runtime.PodSandboxFilter) []string {
		st, err := b.client.StreamPodSandboxes(b.ctx, &runtime.StreamPodSandboxesRequest{Filter: f})
		return collect(b, st, err, (*runtime.StreamPodSandboxesResponse).GetPodSandboxes, (*runtime.PodSandbox).GetId)
	}
	expect("pods by ID", pods(&runtime.PodSandboxFilter{Id: p.id}), p.id)
	expect("pods by label", pods(&runtime.PodSandboxFilter{LabelSelector: other.cfg.Labels}), other.id)
	expect("no pods", pods(&runtime.PodSandboxFilter{Id: nobody}))
	has("pods", pods(nil), p.id, other.id)

	containers := func(f *runtime.ContainerFilter) []string {
		st, err := b.client.StreamContainers(b.ctx, &runtime.StreamContainersRequest{Filter: f})
		return collect(b, st, err, (*runtime.StreamContainersResponse).GetContainers, (*runtime.Container).GetId)
	}
	expect("containers of a pod", containers(&runtime.ContainerFilter{PodSandboxId: p.id}), one.id, two.id)
	expect("exited containers", containers(&runtime.ContainerFilter{PodSandboxId: p.id,
		State: &runtime.ContainerStateValue{State: runtime.ContainerState_CONTAINER_EXITED}}))
	has("containers", containers(nil), one.id, two.id, third.id)

	stats := func(f *runtime.ContainerStatsFilter) []string {
		st, err := b.client.StreamContainerStats(b.ctx, &runtime.StreamContainerStatsRequest{Filter: f})
		return collect(b, st, err, (*runtime.StreamContainerStatsResponse).GetContainerStats, func(s *runtime.ContainerStats) string { return s.GetAttributes().GetId() })
	}
	expect("stats of a pod's containers", stats(&runtime.ContainerStatsFilter{PodSandboxId: p.id}), one.id, two.id)
	expect("stats of nothing", stats(&runtime.ContainerStatsFilter{Id: nobody}))

	podStats := func(f *runtime.PodSandboxStatsFilter) []string {
		st, err := b.client.StreamPodSandboxStats(b.ctx, &runtime.StreamPodSandboxStatsRequest{Filter: f})
		return collect(b, st, err, (*runtime.StreamPodSandboxStatsResponse).GetPodSandboxStats, func(s *runtime.PodSandboxStats) string { return s.GetAttributes().GetId() })
	}
	expect("stats of a pod", podStats(&runtime.PodSandboxStatsFilter{Id: other.id}), other.id)
	expect("stats of no pod", podStats(&runtime.PodSandboxStatsFilter{Id: nobody}))

	st, err := b.client.StreamPodSandboxMetrics(b.ctx, &runtime.StreamPodSandboxMetricsRequest{})
	has("metrics", collect(b, st, err, (*runtime.StreamPodSandboxMetricsResponse).GetPodSandboxMetrics, (*runtime.PodSandboxMetrics).GetPodSandboxId), p.id, other.id)

	pictures := func(ref string) []string {
		st, err := b.client.Images.StreamImages(b.ctx, &runtime.StreamImagesRequest{Filter: &runtime.ImageFilter{Image: &runtime.ImageSpec{Image: ref}}})
		return collect(b, st, err, (*runtime.StreamImagesResponse).GetImages, (*runtime.Image).GetId)
	}
	if got := pictures(b.ref(images.Busybox)); len(got) != 1 {
		t.Errorf("images by reference: %q", got)
	}
	expect("no images", pictures(b.ref("no/such")))
	if got := pictures(""); len(got) < 3 {
		t.Errorf("images: %q", got)
	}
	if b.node != nil {
		st, err := b.client.Images.StreamImages(b.ctx, &runtime.StreamImagesRequest{Filter: &runtime.ImageFilter{Image: &runtime.ImageSpec{Image: "UPPER/case"}}})
		if err == nil {
			_, err = st.Recv()
		}
		b.refused(err, codes.InvalidArgument, "UPPER/case")
	}
}
