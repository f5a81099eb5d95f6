package sandbox

import (
	"fmt"
	"path/filepath"
	"testing"

	"google.golang.org/protobuf/proto"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/berthd/berth/store"
)

// BenchmarkLoad reads a book of 500 pods with two containers each, as a start does.
func BenchmarkLoad(b *testing.B) {
	path := filepath.Join(b.TempDir(), "book.db")
	st, err := store.Open(path)
	if err != nil {
		b.Fatal(err)
	}
	if err := fillBook(st, 500); err != nil {
		b.Fatal(err)
	}
	if err := st.Close(); err != nil {
		b.Fatal(err)
	}
	b.Run("open", func(b *testing.B) {
		for b.Loop() {
			st, err := store.Open(path)
			if err != nil {
				b.Fatal(err)
			}
			if err := st.Close(); err != nil {
				b.Fatal(err)
			}
		}
	})
	if st, err = store.Open(path); err != nil {
		b.Fatal(err)
	}
	defer st.Close()
	b.Run("rows", func(b *testing.B) {
		for b.Loop() {
			book := newBook(st)
			if err := book.load(); err != nil {
				b.Fatal(err)
			}
			if v := book.view(); len(v.pods) != 500 || len(v.containers) != 1000 {
				b.Fatalf("%d pods, %d containers", len(v.pods), len(v.containers))
			}
		}
	})
}

// fillBook writes rows of running pods with two containers each, of the size that
// those of a Deployment have.
func fillBook(st *store.Store, pods int) error {
	return st.Update(func(tx *store.Tx) error {
		for i := range pods {
			p := podRow{ID: newID(), State: StateReady, Created: int64(i + 1), IPs: []string{"10.0.0.1"}, BootID: "b", Attached: true,
				CNI: []byte(`{"cniVersion":"1.0.0","interfaces":[{"name":"br0","mac":"00:00:00:00:00:01"}],"ips":[{"address":"10.0.0.1/24"}]}`)}
			cfg := &runtime.PodSandboxConfig{Hostname: "web", LogDirectory: "/var/log/pods/default_web", Labels: manyStrings(6), Annotations: manyStrings(6),
				Metadata: &runtime.PodSandboxMetadata{Name: fmt.Sprintf("web-%d", i), Namespace: "default", Uid: newID()[:36]},
				Linux:    &runtime.LinuxPodSandboxConfig{CgroupParent: "/kubepods/besteffort/pod" + p.ID[:36]}}
			var err error
			if p.Config, err = proto.Marshal(cfg); err != nil {
				return err
			}
			if err := podTable.Put(tx, p.ID, p); err != nil {
				return err
			}
			for n := range 2 {
				c := containerRow{ID: newID(), PodID: p.ID, State: StateRunning, BootID: "b", Created: int64(pods + 2*i + n), Pid: 2, ShimPid: 3,
					ImageID: "sha256:" + newID(), ImageRef: "registry/web:1", ImageName: "registry/web:1", ImageDigest: "registry/web@sha256:" + newID(),
					CgroupPath: cfg.Linux.CgroupParent, LogPath: cfg.LogDirectory + "/web/0.log"}
				cc := &runtime.ContainerConfig{Metadata: &runtime.ContainerMetadata{Name: fmt.Sprintf("c%d", n)}, Labels: manyStrings(6), Annotations: manyStrings(8),
					Image: &runtime.ImageSpec{Image: c.ImageID}, Command: []string{"/bin/web"}, Args: []string{"--listen", ":8080"}, LogPath: "web/0.log"}
				for k, v := range manyStrings(30) {
					cc.Envs = append(cc.Envs, &runtime.KeyValue{Key: k, Value: []byte(v)})
				}
				for k := range 6 {
					cc.Mounts = append(cc.Mounts, &runtime.Mount{ContainerPath: fmt.Sprintf("/mnt/%d", k), HostPath: "/var/lib/kubelet/pods/" + p.ID[:36] + "/volumes/v"})
				}
				if c.Config, err = proto.Marshal(cc); err != nil {
					return err
				}
				if err := containerTable.Put(tx, c.ID, c); err != nil {
					return err
				}
			}
		}
		return nil
	})
}

func manyStrings(n int) map[string]string {
	m := map[string]string{}
	for i := range n {
		m[fmt.Sprintf("kubernetes.io/some-key-%d", i)] = "tcp://10.96.0.1:443/value"
	}
	return m
}
