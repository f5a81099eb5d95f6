package sandbox

import (
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berthd/berth/store"
)

// TestUnfinished: rows in between are told, with what would become of them, and rows at
// rest are not.
func TestUnfinished(t *testing.T) {
	st := mustBook(t).st
	config, err := proto.Marshal(&runtime.PodSandboxConfig{Metadata: &runtime.PodSandboxMetadata{Namespace: "ns", Name: "p"}})
	if err != nil {
		t.Fatal(err)
	}
	container, err := proto.Marshal(&runtime.ContainerConfig{Metadata: &runtime.ContainerMetadata{Name: "c"}})
	if err != nil {
		t.Fatal(err)
	}
	id := func(c string) string { return strings.Repeat(c, 64) }
	minuteAgo := time.Now().Add(-time.Minute).UnixNano()
	pods := []podRow{
		{ID: id("1"), State: StateReady},
		{ID: id("2"), State: StateCreating, Created: minuteAgo},
		{ID: id("3"), State: StateReady, Stopping: true},
		{ID: id("4"), State: StateNotReady, Stopping: true, Torn: true},
		{ID: id("5"), State: StateNotReady, Stopping: true, Removing: true, Failure: "network: plugin"},
		{ID: id("6"), State: StateCreating, Created: time.Now().Add(time.Hour).UnixNano()}, // the clock was set back
	}
	containers := []containerRow{
		{ID: id("a"), PodID: id("1"), State: StateRunning},
		{ID: id("b"), PodID: id("1"), State: StateCreating, Created: minuteAgo - 1},
		{ID: id("c"), PodID: id("9"), State: StateExited, Removing: true},
	}
	err = st.Update(func(tx *store.Tx) error {
		for _, p := range pods {
			p.Config = config
			if err := podTable.Put(tx, p.ID, p); err != nil {
				return err
			}
		}
		for _, c := range containers {
			c.Config = container
			if err := containerTable.Put(tx, c.ID, c); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	list, err := Unfinished(st)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, o := range list {
		got = append(got, strings.Join([]string{o.Verb, o.Object[:1], o.Name, o.Step}, "|"))
	}
	want := []string{"create container|b|ns/p/c|", "run pod|2|ns/p|", "stop pod|3|ns/p|", "remove pod|5|ns/p|network: plugin", "run pod|6|ns/p|", "remove container|c|c|"}
	if !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	if list[1].Age < time.Minute || list[4].Age != 0 || !list[2].Began.IsZero() {
		t.Errorf("ages: %v, %v, began %v; want a minute, 0, and no time", list[1].Age, list[4].Age, list[2].Began)
	}
}
